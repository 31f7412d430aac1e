"""Whether a finished run, and what was measured of it, may stand in a table.

It must be what would be made now. What train.py --resume compares decides: options, pictures, class names and
CLIP weights.
"""

import functools
import json

import clip  # before torch: it bounds how long torch's threads wait

from harness import places, run_pictures, runs
from methods import METHODS
from sources.listing import check_regular
from sources.ood_sets import ood_sets

# What a run was made from, beside its options, and what to call it.
MADE_FROM = {"class_names": "class names", "data": "pictures", "clip_sha256": "CLIP weights"}
# What a table reads of result.json.
FIELDS = ("zero_shot_accuracy", "learned_parameters", "threads", "seconds")
# The options that decide which pictures there are.
PICTURES = ("dataset", "data_root", "shots", "split_seed", "sampler", "held_out", "classes")


def check_finished(jobs, threads):
    """Raises ValueError where a folder holds a run, or a measurement of it, that is not that of this table.

    threads: how many a run has here, on a CPU; 0 on a GPU, where they matter little. why: times are compared.
    """
    for cached in (read_lists, weights_hash):
        cached.cache_clear()                               # why: files may have changed since
    for job in jobs:
        if job.is_trained:
            check_run(job, threads)
        for file in job.commands:
            if file != "result.json" and (job.folder / file).exists():
                check_measurement(job, file)


# ---- a run -------------------------------------------------------------------------------------------------

def check_run(job, threads):
    """Raises ValueError that names all in which a finished run differs from the one that is needed."""
    result = runs.read_result(job.folder)
    lacks = [name for name in FIELDS if name not in result]
    if lacks:
        raise ValueError(f"{job.folder}/result.json is damaged: it has no {', '.join(lacks)}")

    differs = runs.changes(result["config"], job.config)
    if threads and result["threads"] != threads:
        differs.append(f"threads were {result['threads']}, are {threads}")
    # why: the linear probe has no last.pt
    before = result if job.row == "linear_probe" else runs.read_checkpoint(job.folder)
    for name, found in made_from(job.config).items():
        if name not in before:
            differs.append(f"it does not say which {MADE_FROM[name]} it has")
        elif before[name] != found:
            differs.append(f"it has other {MADE_FROM[name]}")

    if differs:
        raise ValueError(f"{job.folder} holds another run ({'; '.join(differs)}): --output-dir "
                         f"{places.unused(job.folder.parent)} leaves it alone")


def made_from(config):
    """What a run of this configuration would be made from now: the fields of MADE_FROM."""
    train, val, test, class_names = pictures(config)
    parts = {"training": train, "test": run_pictures.choose(config["test_split"], val, test)}
    return {"class_names": class_names, "data": digests(parts, config["data_root"]),
            "clip_sha256": weights_hash(config["model"], config["activation"])}


def digests(parts, root):
    """{part: items} -> {part: digest}."""
    return {part: run_pictures.digest(items, root) for part, items in parts.items()}


def pictures(config, classes=None):
    """Training, validation and test pictures of a configuration, and class names; classes: not its own."""
    changed = {**config, "classes": classes or config["classes"]}
    return read_lists(*(changed[name] for name in PICTURES))


@functools.cache
def read_lists(*options):
    """The pictures of a run, by its values of the options `PICTURES`."""
    # why a cache: the lists of ImageNet take seconds, and the runs of a table share them
    return run_pictures.load_pictures(dict(zip(PICTURES, options)))


@functools.cache
def weights_hash(model, activation):
    """The hash of a CLIP's weights; each CLIP is read once."""
    clip_model, _ = clip.load(model, activation=activation)
    return clip.weights_hash(clip_model)


# ---- what was measured of it -------------------------------------------------------------------------------

def check_measurement(job, file):
    """Raises ValueError where a measurement of a run is not what the command of this table writes."""
    path = job.folder / file
    found = read_measurement(path)
    differs = []
    for name, value in expected_fields(job, file).items():
        if found.get(name) != value:
            differs.append("other pictures" if name == "data" else f"{name} {found.get(name)}, here {value}")
    if differs:
        raise ValueError(f"{path} was made otherwise ({'; '.join(differs)}): remove it, and it is made again")


def expected_fields(job, file):
    """What a measurement must say of how it was made."""
    root = job.config["data_root"]
    _, val, test, _ = pictures(job.config)
    if file == "ood.json":
        sets = {"ID": test, **ood_sets(job.dataset, root)}
        temperature = METHODS[job.config["method"]].ood_temperature
        return {"temperature": temperature, "local_weight": 1.0, "ood_root": {}, "data": digests(sets, root)}
    if file == "evaluation-new.json":
        _, _, new, _ = pictures(job.config, "new")
        return {"data": digests({"test": new}, root)}
    parts = {"val": val, "test": test} if val else {"test": test}      # weights.json
    return {"data": digests(parts, root)}


def read_measurement(path):
    """A JSON file that a measurement wrote, as a dict. Raises ValueError where it is none."""
    check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and it is made again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a file of this program: remove it, and it is made again")
    return found
