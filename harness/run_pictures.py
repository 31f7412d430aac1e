"""The pictures that a run was trained on, and those that it is tested on."""

import hashlib
import os

import data
from harness import runs
from sources.listing import normal


# ---- which pictures ----------------------------------------------------------------------------------------

def load_pictures(config, data_root=None, classes=None):
    """What `data.load` gives for a run's configuration. data_root, classes: in place of the run's own."""
    return data.load(config["dataset"], root_of(config, data_root), config["shots"], config["split_seed"],
                     config["sampler"], config["held_out"], classes or config["classes"])


def root_of(config, data_root=None, dataset=None):
    """The folder of a run's dataset, or of another one: the one given, else the run's own.

    Raises FileNotFoundError where the run's own is not there any more.
    """
    if data_root:
        return data.find_root(dataset or config["dataset"], data_root)
    root = config["data_root"]
    if config["dataset"] != "critters" and not os.path.isdir(root):
        raise FileNotFoundError(f"there is no folder {root}, which had the pictures of the run: --data-root "
                                "names where they are now")
    return root


def training_pictures(run, checkpoint, data_root=None):
    """The pictures that a run was trained on. Raises ValueError where they, or its classes, have changed."""
    config = checkpoint["config"]
    items, *_, class_names = load_pictures(config, data_root)
    runs.check_classes(run, checkpoint["class_names"], class_names)
    now = digest(items, root_of(config, data_root))
    check_data(run, checkpoint["data"], {"training": now})
    return items


def unseen_pictures(run, checkpoint, data_root=None, split="test", on=None, classes=None):
    """The pictures of `asked_pictures` without those that the run was trained on -> items, class names.

    Prints how many are left out, and where a run is not finished. Raises ValueError where no picture is left.
    why: the test pictures among one's own are drawn anew, and the folder may hold others than at training.
    """
    config = checkpoint["config"]
    root = root_of(config, data_root, on)
    items, class_names = asked_pictures(run, checkpoint, data_root, split, on, classes)
    if checkpoint["epoch"] < config.get("epochs", 0):
        print(f"note: {run} is not finished: it stands at epoch {checkpoint['epoch']} of {config['epochs']}",
              flush=True)

    trained = {*checkpoint["training"]}
    elsewhere = on and os.path.realpath(root) != os.path.realpath(config["data_root"])
    if elsewhere or (on and on != config["dataset"]):      # why: equal names then do not mean equal pictures
        trained = set()
    unseen = [item for item in items if relative_path(item[0], root) not in trained]
    if len(unseen) < len(items):
        n_trained = len(items) - len(unseen)
        print(f"note: {run} was trained on {n_trained} of the {len(items)} {split} pictures of today: they "
              f"are left out, {len(unseen)} count", flush=True)
    if not unseen:
        raise ValueError(f"{run} was trained on all pictures that are in its {split} part now")
    return unseen, class_names


def asked_pictures(run, checkpoint, data_root, split, on, classes):
    """A run's own test or validation pictures -> items, class names.

    on: the test pictures of another dataset; classes "new": those of the classes on which it was not trained.
    Raises ValueError where the run's own classes are others now, and where there are no new classes.
    """
    config = checkpoint["config"]
    if on:                                                 # why 0 shots: no training images are needed
        items, class_names = data.load(on, root_of(config, data_root, on), 0, config["split_seed"])[2:]
        published = (data.DATASETS[on].sizes or [len(items)])[-1]
        if len(items) != published:
            print(f"note: {on} has {len(items)} test pictures here, {published} as published", flush=True)
        return items, class_names

    if classes and config["classes"] != "base":
        raise ValueError(f"{run} was trained on all classes: --classes new is for runs of train.py --classes "
                         "base")
    _, val, test, class_names = load_pictures(config, data_root)
    runs.check_classes(run, checkpoint["class_names"], class_names)
    if classes:
        return load_pictures(config, data_root, classes)[2:]
    return choose(split, val, test), class_names


def choose(split, val, test):
    """The split that accuracies are measured on, "test" or "val". Raises ValueError where it is empty."""
    if split == "val" and not val:
        raise ValueError("there are no validation pictures: all are trained on. Give --shots, or a folder "
                         "val/")
    return {"val": val, "test": test}[split]



# ---- whether they are the same -----------------------------------------------------------------------------

def relative_path(path, root):
    """An item's path below the root, in its normal form. Drawn pictures have no root."""
    if not os.path.isabs(path):
        return path
    return normal(os.path.relpath(path, os.path.abspath(os.path.expanduser(root))))


def digest(items, root):
    """The number of some items, and a hash of their paths below the root and their labels."""
    lines = [f"{relative_path(path, root)}\t{label}" for path, label, _ in items]
    return [len(items), hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()]


def check_data(run, before, now):
    """Raises ValueError where a run was started with other pictures; before, now: {part: digest}."""
    for part in now:
        if before.get(part) != now[part]:
            n_then = before[part][0] if part in before else "unknown"
            n_now = now[part][0]
            raise ValueError(f"{run} was started with other {part} pictures ({n_then} then, {n_now} now, of "
                             "other names or labels): give the same data by --data-root, or start another "
                             "run")
