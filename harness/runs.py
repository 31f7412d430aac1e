"""Writes, reads and compares run folders. All scripts share this file.

    last.pt        what was learned, and all that --resume needs; it contains the log too
    log.jsonl      one line per epoch
    lock           the number of the process that writes here; only one can. It may be removed when none does
    result.json    accuracies on the test split, configuration, versions
    per_class.csv, confusion.csv    accuracies of each class, and which classes are taken for which
    evaluation.json, evaluation.csv    the same from evaluate.py; with -new or -DATASET for other classes
    ood.json       the table of ood.py
    weights.json   accuracies for several weights of the local branch, from extras/compare.py --ablations
    pictures/      what extras/visualize.py drew, and the page of extras/explore.py

It begins with `load_run`, from a folder to a model, and ends with the checks. The pictures of a run are in
run_pictures.py.
"""

import itertools
import json
import os
import zipfile
from io import BytesIO
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

from clip.weights import check_archive, is_memory
from methods import METHODS, OPTIONS
from sources.listing import check_regular, normal

# What last.pt contains; training: the paths of the training pictures below the root.
CHECKPOINT = {"learned": dict, "optimizer": dict, "scaler": dict, "config": dict, "class_names": list,
              "data": dict, "training": list, "clip_sha256": str, "threads": int, "epoch": int,
              "seconds": float, "log": list}
# What result.json contains at least.
RESULT = {"dataset": str, "model": str, "shots": int, "seed": int, "split_seed": int, "accuracy": float,
          "config": dict}
# The options that all configurations have, besides those of the method.
CONFIGURATION = ("dataset", "data_root", "model", "activation", "template", "classes", "shots", "held_out",
                 "test_split", "seed", "split_seed", "sampler", "amp", "text_chunk", "checkpoint_text")
# Options that change how a run is computed and stored, but not what is computed.
IGNORED_WHEN_COMPARING = {"data_root", "output_dir", "device", "workers", "amp", "text_chunk",
                          "checkpoint_text", "compile"}


# ---- from a folder to a model ------------------------------------------------------------------------------

def load_run(run, device="cpu", model=None):
    """A run's folder -> its model with the learned prompts, in evaluation mode.

    model: the file of its CLIP, where it has moved. Raises FileNotFoundError where there is no run or no
    CLIP, ValueError where the CLIP is not the one that the run was trained with.
    """
    return build(run, read_checkpoint(run), device, model=model)


def build(run, checkpoint, device="cpu", class_names=None, model=None):
    """The model of a run, from its checkpoint, for its own classes or for others; model: as in `load_run`.

    Raises ValueError for other classes where the run has learned prompts of each class.
    """
    config = checkpoint["config"]
    clip_model, _ = clip.load(model_file(run, config, model), device, config["activation"])
    class_names = class_names or checkpoint["class_names"]
    with torch.random.fork_rng(devices=[]):                # why: what is drawn here is replaced below
        model = make_model(clip_model, class_names, config)
    if class_names != checkpoint["class_names"]:
        check_shared(model, run)
    restore(run, checkpoint, model, clip.weights_hash(clip_model))
    return model.eval()


def model_file(run, config, given=None):
    """The name or the file of a run's CLIP: the one given, or its own, wherever that lies.

    A file that is gone is looked for by its name, in the run's folder and beside it. `restore` compares its
    hash.
    Raises FileNotFoundError where there is none.
    """
    own = config["model"]
    if given or is_known(own) or os.path.isfile(own):
        return given or own

    file = short_name(own)
    for folder in (Path(run), Path(run).absolute().parent):
        if (folder / file).is_file():
            return str(folder / file)
    raise FileNotFoundError(f"{run} was trained with the weights {own}, which are not there, and {file} lies "
                            f"neither in {run} nor beside it: put it there, or name it by --model FILE (in "
                            "Python load_run(RUN, model=FILE))")


def short_name(model):
    """A model's name, or the last part of a file's path. why: its folders may be those of another system."""
    return clip.full_name(model) if is_known(model) else normal(model).split("/")[-1]


def is_known(model):
    """Whether a model has a name of its own, and is not somebody's file."""
    return clip.full_name(model) in clip.available_models()


def make_model(clip_model, class_names, config, ranks=(0, 1)):
    """The model that a configuration (the options of train.py, as a dict) describes."""
    options = {name: config[name] for name in OPTIONS[config["method"]]}
    return METHODS[config["method"]](clip_model, class_names, **options, text_chunk=config["text_chunk"],
                                     checkpoint_text=config["checkpoint_text"], ranks=ranks)


def restore(run, checkpoint, model, clip_sha256):
    """Puts the learned tensors of a checkpoint into a model. Raises ValueError where they do not fit."""
    then = checkpoint["clip_sha256"]
    if then != clip_sha256:
        name = checkpoint["config"]["model"]
        raise ValueError(f"{run} was trained with other CLIP weights: those of {name} have SHA-256 "
                         f"{clip_sha256[:12]}... now, {then[:12]}... then. --model FILE names others")

    learned = checkpoint["learned"]
    wanted = model.learned_state()
    found, expected = shapes(learned), shapes(wanted)
    if found != expected:
        raise ValueError(f"{run}/last.pt does not hold the tensors that the configuration asks for: "
                         f"found {found}, expected {expected}")
    clip.check_finite(learned, f"{run}/last.pt")
    for name, tensor in wanted.items():
        tensor.copy_(learned[name])


def shapes(tensors):
    """The shapes of {name: tensor}, sorted by name."""
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}


# ---- what stands in a folder -------------------------------------------------------------------------------

def read_checkpoint(run):
    """The contents of a run's last.pt.

    Raises FileNotFoundError for a folder that holds none, ValueError for a damaged file and for another one.
    """
    path = Path(run) / "last.pt"
    if not path.is_file():
        what = f"{run} holds no last.pt" if Path(run).is_dir() else f"there is no folder {run}"
        raise FileNotFoundError(f"{what}: name one that train.py wrote, such as runs/critters-16shot-seed1")

    content = path.read_bytes()                            # why apart: what a disk refuses is no damage
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            check_archive(archive)
        checkpoint = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    # why so broad: in a damaged file zipfile, pickle and torch can trip over anything
    except Exception as error:
        if is_memory(error):
            raise
        raise ValueError(f"{path} is damaged: it cannot be read ({type(error).__name__}); the run must start "
                         "anew, with --overwrite") from error

    wrong = unreadable(checkpoint)
    if wrong:
        raise ValueError(f"{path} is damaged, or is not a file of this program: it has no readable "
                         f"{', '.join(wrong)}")
    for name in ("class_names", "training"):               # why: another system may have written them
        checkpoint[name] = [normal(text) for text in checkpoint[name]]
    return checkpoint


def unreadable(checkpoint):
    """What is missing in the content of a last.pt or is of the wrong kind, as texts."""
    if not isinstance(checkpoint, dict):
        return [*CHECKPOINT]
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        return wrong

    parts = {"learned": (checkpoint["learned"].values(), torch.Tensor), "log": (checkpoint["log"], dict),
             "class_names": (checkpoint["class_names"], str), "training": (checkpoint["training"], str)}
    wrong = [name for name, (values, kind) in parts.items() if not all(isinstance(v, kind) for v in values)]
    config = checkpoint["config"]
    method = config.get("method")
    if method not in [*METHODS]:
        wrong.append(f"known method, but {method!r}")
    options = (*CONFIGURATION, *OPTIONS.get(str(method), ()))
    return wrong + [f"option {name}" for name in options if name not in config]


def read_log(run):
    """The lines of a run's log.jsonl: a dict for each epoch."""
    path = Path(run) / "log.jsonl"
    check_regular(path)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) and "seconds" in line for line in lines):
            raise ValueError("a line is none of an epoch")
        return lines
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; train.py --resume {run} writes it again from "
                         "last.pt") from error


def read_result(run):
    """A run's result.json. Raises ValueError where it cannot be read as such."""
    path = Path(run) / "result.json"
    check_regular(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in RESULT.items() if not isinstance(result.get(name), kind)]
        if not wrong:
            wrong = [f"option {name}" for name in ("method", "dataset", "classes", "model")
                     if not isinstance(result["config"].get(name), str)]
            if not 0 <= result["accuracy"] <= 100:         # why: JSON may hold NaN, which would spoil a mean
                wrong.append("accuracy in percent")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; remove it, and train.py "
                         f"--resume {run} tests the run again") from error

    if wrong:
        raise ValueError(f"{path} is damaged, or is not a file of this program: it has no readable "
                         f"{', '.join(wrong)}")
    return result


def finished_runs(folder):
    """The folders below `folder`, at any depth, that hold a result.json, sorted."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return [path.parent for path in sorted(Path(folder).rglob("result.json"))]


# ---- what must agree ---------------------------------------------------------------------------------------

def changes(before, now):
    """The options in which two configurations differ, as texts, without those in IGNORED_WHEN_COMPARING.

    Two files of weights are no difference here. why: their contents are compared, wherever they lie.
    """
    differs = [name for name in now if name not in IGNORED_WHEN_COMPARING and before.get(name) != now[name]]
    if "model" in differs and not (is_known(before["model"]) or is_known(now["model"])):
        differs.remove("model")
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in differs]


def is_variant(config):
    """Whether a method's own options differ from its defaults, as in an ablation."""
    options = OPTIONS.get(config["method"], {})            # why: the linear probe has none
    if not options:
        return False
    defaults = {**options, **METHODS[config["method"]].recipe(config["dataset"])}
    # why only those that it has: a run may be older than an option
    return any(comparable(config[name]) != comparable(defaults[name]) for name in options if name in config)


def comparable(value):
    """An option's value, lists as tuples. why: JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def check_kind(run, checkpoint, other, other_checkpoint):
    """Raises ValueError, with the first difference besides the seeds, for runs that cannot be averaged."""
    seeds = {name: checkpoint["config"][name] for name in ("seed", "split_seed")}
    differs = changes(checkpoint["config"], {**other_checkpoint["config"], **seeds})
    if checkpoint["class_names"] != other_checkpoint["class_names"]:
        differs.append("it has other classes")
    if checkpoint["clip_sha256"] != other_checkpoint["clip_sha256"]:
        differs.append("it has other CLIP weights")
    if checkpoint["epoch"] != other_checkpoint["epoch"]:
        differs.append(f"it stands at epoch {other_checkpoint['epoch']}, the first one at epoch "
                       f"{checkpoint['epoch']}")
    if differs:
        raise ValueError(f"{other} is another kind of run than {run}: {differs[0]}; evaluate each alone")


def read_alike(folders):
    """The checkpoints of runs that differ in their seeds alone.

    Raises ValueError for others, and for equal seeds.
    """
    checkpoints = [read_checkpoint(run) for run in folders]
    seen = {}
    for run, checkpoint in zip(folders, checkpoints):
        check_kind(folders[0], checkpoints[0], run, checkpoint)
        config = checkpoint["config"]
        seeds = (config["seed"], config["split_seed"])
        if seeds in seen:
            raise ValueError(f"{run} has the seeds of {seen[seeds]}: a mean over equal runs says nothing; "
                             "name one of them")
        seen[seeds] = run
    return checkpoints


def check_shared(model, asking):
    """Raises ValueError where a method learns prompts of each class, which say nothing of other classes."""
    if model.class_specific:
        raise ValueError(f"{asking}: this method learns prompts for each of its classes, which name no other "
                         "classes; train one whose prompts are shared (for sotglp --shared-local, for coop "
                         "and locoop without --class-specific)")


def check_classes(run, trained, found):
    """Raises ValueError, with the first class that differs, where a run was trained for other classes."""
    for label, (then, now) in enumerate(itertools.zip_longest(trained, found)):
        if then != now:
            raise ValueError(f"{run} was trained for other classes: label {label} of {len(trained)} was "
                             f"{then!r}, in the data it is {now!r}, of {len(found)}")
