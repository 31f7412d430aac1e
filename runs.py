"""A run's folder: what stands in it, how it is written whole, read again and compared. The scripts share this file.

    last.pt        what was learned, how to read it, and what --resume goes on with
    log.jsonl      one line per epoch
    result.json    accuracies on the test split, configuration, versions; per_class.csv has them for each class
    evaluation.json, evaluation.csv    the same numbers from evaluate.py
    ood.json       the table of ood.py

Read it from `open_run` (a folder becomes a model) through the checks to what every script prints and writes with.
"""

import contextlib
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import numpy
import torch
import torchvision

from sotglp import SOTGLP

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Options that change how a run is computed and stored, but not what is computed.
PRACTICAL = {"data_root", "output_dir", "device", "workers", "amp", "text_chunk", "checkpoint_text"}


# ---- from a folder to a model --------------------------------------------------------------------------------

def open_run(run, device="cpu"):
    """A run's folder -> the contents of its last.pt, and its model in evaluation mode with what it has learned.

    Raises FileNotFoundError where there is no run, ValueError where its CLIP is not the one that it was trained with.
    """
    checkpoint = read_checkpoint(run)
    return checkpoint, build(run, checkpoint, device)


def build(run, checkpoint, device="cpu"):
    """The model of a run whose checkpoint is at hand."""
    clip_model, _ = clip.load(checkpoint["config"]["model"], device)
    model = make_model(clip_model, checkpoint["class_names"], checkpoint["config"])
    restore(run, checkpoint, model, clip.weights_hash(clip_model))
    return model.eval()


def make_model(clip_model, class_names, config, ranks=(0, 1)):
    """The model that a configuration (the options of train.py, as a dict) describes."""
    same = ("n_global", "n_local", "n_support", "epsilon", "n_iters", "lambda_local", "prompt_dropout", "text_chunk",
            "checkpoint_text")
    return SOTGLP(clip_model, class_names, **{name: config[name] for name in same},
                  local_projection=not config["no_local_projection"], vv_attention=not config["no_vv"],
                  class_specific=not config["shared_local"], plan_gradient=not config["no_plan_gradient"], ranks=ranks)


def restore(run, checkpoint, model, clip_sha256):
    """Puts the learned tensors of a checkpoint into a model. Raises ValueError where they do not belong together."""
    if checkpoint["clip_sha256"] != clip_sha256:
        raise ValueError(f"{run} was trained with other CLIP weights: those of {checkpoint['config']['model']} have "
                         f"SHA-256 {clip_sha256[:12]}... now, {checkpoint['clip_sha256'][:12]}... then")
    learned = model.learned_state()
    if {name: p.shape for name, p in learned.items()} != {name: p.shape for name, p in checkpoint["learned"].items()}:
        raise ValueError(f"{run}/last.pt does not hold the tensors that its configuration asks for: "
                         f"found {sorted(checkpoint['learned'])}, expected {sorted(learned)}")
    for name, tensor in learned.items():
        tensor.copy_(checkpoint["learned"][name])


# ---- what stands in a folder ---------------------------------------------------------------------------------

def read_checkpoint(run):
    """The contents of a run's last.pt. Raises FileNotFoundError for a folder that holds none."""
    path = Path(run) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no last.pt: name a folder that train.py wrote, such as "
                                "runs/critters-16shot-seed1")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_log(run):
    """The lines of a run's log.jsonl: a dict for each epoch."""
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def read_result(run):
    """A run's result.json."""
    return json.loads((Path(run) / "result.json").read_text())


def finished_runs(folder):
    """The folders below `folder`, at any depth, that hold a result.json, sorted."""
    return [path.parent for path in sorted(Path(folder).rglob("result.json"))]


# ---- what must agree -----------------------------------------------------------------------------------------

def changes(before, now):
    """The options in which two configurations differ, without those in PRACTICAL: a list of texts."""
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in now
            if name not in PRACTICAL and before.get(name) != now[name]]


def check_classes(run, trained, found):
    """Raises ValueError, with the first class that differs, where a run was trained for other classes than these."""
    if trained != found:
        pairs = itertools.zip_longest(trained, found)
        label, (then, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(f"{run} was trained for other classes: label {label} of {len(trained)} was {then!r}, "
                         f"in the data it is {now!r}, of {len(found)}")


# ---- device and precision ------------------------------------------------------------------------------------

def default_model(dataset):
    """The CLIP that goes with a data set where none is named."""
    return "tiny" if dataset == "critters" else "ViT-B/16"


def default_device():
    """The first GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_amp(amp, device):
    """The precision asked for, or "off" where the device lacks it. why: fp16 is many times slower on CPU."""
    return "off" if amp == "fp16" and torch.device(device).type != "cuda" else amp


def precision(amp):
    """What a result says of its precision."""
    return amp if amp in HALF else "float32"


def autocast(amp, device):
    """Mixed precision for the towers; amp: "off", "fp16", "bf16". Similarities, transport and losses opt out of it."""
    return torch.autocast(torch.device(device).type, dtype=HALF.get(amp), enabled=amp in HALF)


def versions():
    """What the numbers of a run may depend on besides its configuration."""
    gpu = torch.cuda.is_available()
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "cuda": torch.version.cuda if gpu else None,
            "gpu": torch.cuda.get_device_name() if gpu else None}


# ---- what every script prints and writes with ----------------------------------------------------------------

def progress(steps, label, rank=0):
    """Passes the steps on. Where stderr is a terminal, rank 0 shows there how far they are."""
    start, shown = time.time(), 0.0
    for i, step in enumerate(steps, 1):
        yield step
        if rank == 0 and sys.stderr.isatty() and time.time() - shown > 0.5:
            shown = time.time()
            left = (shown - start) / i * (len(steps) - i)
            print(f"\r{label} {i}/{len(steps)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def write_whole(path, write):
    """Calls write(temporary path), then renames the file: a reader never sees half of it."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, fields):
    """A dict as indented JSON, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(fields, indent=2) + "\n"))


@contextlib.contextmanager
def plain_errors(rank=0):
    """An error in the user's input ends the program with one line on stderr, printed by rank 0 alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}" if rank == 0 else 1)
