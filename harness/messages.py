"""What a run says at its beginning, and what helps where it ends early."""

import contextlib
import os
import shlex
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

from harness import machine
from harness.configuration import unusual
from sources import files, folders


def announce(run):
    """Prints what is trained on what, and what is unusual about options, pictures and class names."""
    args = run.args
    threads = torch.get_num_threads()
    processes = "1 process" if run.world == 1 else f"{run.world} processes"
    threads = "1 thread" if threads == 1 else f"{threads} threads"
    each = "" if run.world == 1 else " each"
    print(f"{args.method}, model {args.model}, data {args.dataset}: {len(run.model.class_names)} classes, "
          f"{len(run.train_set)} training and {len(run.test_set)} {args.test_split} images; {processes} on "
          f"{run.device.type}, {threads}{each}, precision {machine.precision(args.amp)}, "
          f"writing to {run.folder}")

    options = "".join(f"{name}={value}  " for name, value in unusual(args).items())
    print(f"options: {options}all others have their defaults; result.json has them")

    if args.dataset == "folder":
        twins = files.twins({"train": run.train_set, "test": run.test_set})
        for line in (*folders.remarks(args.data_root), *twins):
            print(line)
    if run.published is False:
        print(f"note: the split file of {args.dataset} is not CoOp's published one: do not compare with "
              "published numbers")
    warn_of_equal_names(run.model, args.model)


def warn_of_equal_names(model, model_name):
    """Prints a line about class names that are one text to the model, and one for each such group."""
    groups = model.text_encoder.equal_names()
    if not groups:
        return
    n_classes = len(model.class_names)
    n_texts = n_classes - sum(len(group) - 1 for group in groups)
    knows = "; tiny knows 106 words, see clip/README.md" if model_name == "tiny" else ""
    print(f"warning: {n_classes} class names are only {n_texts} different texts to this model (compared as "
          f"embeddings): global prompts, and shared local ones, cannot tell such classes apart{knows}")
    for group in groups:
        more = f" and {len(group) - 10} more" if len(group) > 10 else ""
        print(f"  one text: {', '.join(group[:10])}{more}")


def how_to_go_on(args):
    """The command that goes on with an interrupted run."""
    if not (Path(args.output_dir) / "last.pt").exists():
        return "no epoch was finished; the same command starts anew"
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = "python" if processes == "1" else f"torchrun --nproc_per_node={processes}"
    folder = shlex.quote(args.output_dir)
    return f"{start} train.py --resume {folder} goes on after the last epoch that was finished"


@contextlib.contextmanager
def plain_memory_error(model):
    """Says what takes the memory of a GPU, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError("out of GPU memory: the text tower encodes every prompt of "
                          f"{len(model.class_names)} classes in each step. --checkpoint-text --text-chunk 50 "
                          "helps, or more GPUs; a smaller batch does not, unless the image tower has learned "
                          "prompts too") from error
