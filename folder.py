"""Pictures in folders: which files they are, which class they show, how they are read. No model is used here.

`own_lists` reads one's own pictures, `--dataset folder`. `class_folders` serves ImageNet too; `walk` finds the pictures
of OOD sets and of `evaluate.py --images`; `read_image` reads every picture of this project.
"""

import collections
import os
import random
import re
import sys
import threading
import warnings

import numpy
from PIL import Image, ImageOps

import critters
import download

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
PARTS = ("train", "val", "test")
HELD_OUT = 0.5                     # the share of each class that is kept for the test where there is no folder for it
NAMES = "classnames.txt"


# ---- which files ---------------------------------------------------------------------------------------------

def walk(top):
    """All files below a folder, in a fixed order -> paths of pictures, paths of other files.

    What is hidden is skipped: names that begin with a dot, and __MACOSX, which macOS adds to archives. Links are
    followed. Raises OSError for a folder that cannot be read.
    """
    def fail(error):
        raise error

    pictures, others = [], []
    for here, folders, files in os.walk(top, onerror=fail, followlinks=True):
        folders[:] = sorted(filter(_visible, folders))
        for name in sorted(filter(_visible, files)):
            (pictures if name.lower().endswith(SUFFIXES) else others).append(os.path.join(here, name))
    return pictures, others


def _visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def class_folders(folder):
    """{class folder: paths of its pictures, at any depth}, all sorted.

    No file is looked at: ImageNet has 1.3 million. Raises FileNotFoundError for a class without a picture.
    """
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and _visible(entry.name))
    if not classes:
        pictures, _ = walk(folder)
        if pictures:
            raise ValueError(f"{folder} is flat: {len(pictures)} pictures and no class folder; move each into "
                             f"{folder}/<class>/ (for ImageNet's validation pictures its development kit has the "
                             "classes; for your own, is the folder one level too low?)")
        raise FileNotFoundError(f"there is no class folder in {folder}")
    found = {name: walk(f"{folder}/{name}") for name in classes}
    for name, (pictures, others) in found.items():
        if not pictures:
            raise FileNotFoundError(f"there is no picture in {folder}/{name}" + f" ({kinds(others)})" * bool(others))
    return {name: pictures for name, (pictures, _) in found.items()}


def kinds(paths):
    """What kinds of files these are, as text: "8 .heic, 1 .txt"."""
    counts = collections.Counter(os.path.splitext(path)[1].lower() or "without a suffix" for path in paths)
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def remarks(root):
    """What one should know of a folder of one's own pictures, as lines: what is left out, and why; what the test is."""
    parts = layout(root)
    used = {path for part in parts.values() for paths in class_folders(part).values() for path in paths}
    pictures, others = walk(root)
    others = [path for path in others if path != os.path.join(root, NAMES)]
    beside = [path for path in pictures if path not in used]
    lines = [f"left out: {kinds(others)}, not read as pictures, first {others[0]}"] if others else []
    lines += [f"left out: {kinds(beside)}, outside of the class folders, first {beside[0]}"] if beside else []
    return lines + ["no folder test/: val/ is the test"] * ("val" in parts and "test" not in parts)


def check(items, rank=0, world=1):
    """Reads every picture once, as people see it. Raises ValueError that names those which cannot be read.

    why before training: else it would end at the first one, minutes or hours later. Each process reads its share.
    """
    faults = download.unreadable([path for path, *_ in items[rank::world]], lambda path: read_image(path, own=True))
    if faults:
        shown = faults[:20] + [f"and {len(faults) - 20} more"] * (len(faults) > 20)
        raise ValueError(f"{len(faults)} of {len(items)} pictures cannot be read: replace or remove them\n"
                         + "\n".join(shown))


# ---- which class ---------------------------------------------------------------------------------------------

def layout(root):
    """Where the parts of one's own pictures are: {"train": folder, "val": ..., "test": ...}, or {"train": root}."""
    there = {part: f"{root}/{part}" for part in PARTS if os.path.isdir(f"{root}/{part}")}
    return there if "train" in there and len(there) > 1 else {"train": root}


def own_lists(root, seed, held_out=None):
    """One's own pictures -> train, val, test: lists of items.

    Folders train/ and test/ or val/ or both; without test/, val/ is the test. Or only class folders: then the share
    `held_out` of each class, HELD_OUT where None, is drawn for the test. Class names are the folders' with _ and - as
    spaces, or, where there is a classnames.txt, its lines `<folder> <name>`.
    Raises ValueError for fewer than two classes, and where `held_out` has nothing to do.
    """
    parts = layout(root)
    if held_out is not None and len(parts) > 1:
        raise ValueError(f"--held-out is for class folders alone, but {root} has {' and '.join(parts)}: leave it out")
    given = os.path.join(root, NAMES)
    names = read_names(given) if os.path.exists(given) else {
        # why as UTF-8: a class must have the same name, and so the same tokens, whatever the locale is
        folder: re.sub("[_-]", " ", os.fsencode(folder).decode("utf-8", "replace"))
        for folder in class_folders(parts["train"])}
    if len(names) < 2:
        raise ValueError(f"1 class: {parts['train']} has one class folder, {min(names)!r}, and two or more are needed. "
                         "Is --data-root one level too high, or too low?")
    lists = {part: class_items(folder, names) for part, folder in parts.items()}
    if len(parts) == 1:
        return hold_out(lists["train"], seed, HELD_OUT if held_out is None else held_out)
    test = lists.pop("test", None) or lists.pop("val")
    return lists["train"], lists.get("val", []), test


def hold_out(items, seed, share):
    """Draws a share, in (0, 1), of each class for the test, at least one picture -> train, val (empty), test."""
    rng, test = random.Random(seed), set()
    for label in range(items[-1][1] + 1):
        group = [item for item in items if item[1] == label]
        if len(group) < 2:
            raise ValueError(f"class {group[0][2]!r} has 1 picture, {group[0][0]}: two are needed, as one is held out "
                             "for the test")
        count = int(len(group) * share + 1e-9)           # why 1e-9: 0.29 * 100 is a little less than 29
        test |= {*rng.sample(group, max(count, 1))}
    return [item for item in items if item not in test], [], [item for item in items if item in test]


def imagenet_lists(row, home, images):
    """ImageNet -> train, val (empty), test; the label is the rank of the folder's WordNet id among all of them, sorted.

    differs: CoOp lists files in the order of the disk, so its draw varies from machine to machine; here file names are
    sorted. CoOp also uses the 50,000 test pictures for validation; here the few come from the training pictures.
    """
    names = read_names(f"{home}/{row.lists[0]}")
    return class_items(f"{images}/train", names), [], class_items(f"{images}/val", names)


def variant_lists(row, home, images):
    """A variant of ImageNet -> train and val (empty), test. Folders are called by WordNet id, those of V2 by label."""
    names, found = read_names(f"{home}/{row.lists[0]}"), class_folders(images)
    if all(folder.isdigit() for folder in found):
        names = {str(label): names[wnid] for label, wnid in enumerate(sorted(names))}
        return [], [], class_items(images, names, key=int)
    if row.classes < 1000:                               # a variant of some of the classes
        names = {wnid: name for wnid, name in names.items() if wnid in found}
    return [], [], class_items(images, names)


def class_items(folder, names, key=None):
    """Items of folder/<class>/; the label is the class folder's rank, by key, in `names`: {class folder: name}."""
    found = class_folders(folder)
    if set(found) != set(names):
        unmatched = sorted(set(found) ^ set(names))
        raise ValueError(f"{len(names)} class names for {len(found)} class folders in {folder}; "
                         f"without counterpart: {', '.join(unmatched[:3])}{' ...' * (len(unmatched) > 3)}")
    return [(path, label, names[at]) for label, at in enumerate(sorted(names, key=key)) for path in found[at]]


def read_names(path):
    """Lines `<folder or picture> <class name>` -> {folder or picture: class name}; without a name, the folder's own.

    A tab parts the two where the folder's name has a blank.
    """
    pairs = (line.split("\t" if "\t" in line else None, 1) for line in lines(path))
    return {first.strip(): " ".join(name).strip() or first for first, *name in pairs}


def lines(path):
    """The lines of a text file, without blanks at their ends and without empty ones."""
    with open(path, encoding="utf-8-sig") as file:      # why -sig: editors on Windows begin a file with a mark
        return [line.strip() for line in file if line.strip()]


# ---- how they are read ---------------------------------------------------------------------------------------

def read_image(path, own=False):
    """The picture at `path`, or the one that critters draws for it -> PIL image.

    It keeps its own mode: CLIP converts to RGB after the crop, so that palettes are resized as CLIP resizes them.
    own: one of one's own pictures, read `as_seen`.
    Raises ValueError, naming the file, where it is not there or cannot be decoded to its end.
    """
    if critters.is_path(path):
        return critters.read(path)
    _now.path = path
    try:
        with Image.open(path) as image:
            image.load()
            return as_seen(image) if own else image
    except Exception as error:   # why: Pillow raises OSError, SyntaxError, ValueError and its own, by format
        raise ValueError(f"cannot read picture {path}: {type(error).__name__}: {error}") from error
    finally:
        _now.path = None


def as_seen(image):
    """A PIL image as people see it, in RGB: upright, of 8 bits, with white where it is transparent.

    why not for the published datasets: their numbers belong to CLIP's own preprocessing, which does none of this.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":    # grey of 16 or 32 bits, which Pillow would cut off at 255
        values = numpy.asarray(image).astype(numpy.float64)
        # why: 16 bits have a white of their own, 32 bits have none, so the picture's brightest value serves
        low, high = (0, 65535) if image.mode.startswith("I;16") else (values.min(), values.max())
        image = Image.fromarray(((values - low) / ((high - low) or 1) * 255).round().astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


_now = threading.local()         # .path: the picture that this thread reads
_told, _show = set(), warnings.showwarning


def show_warning(message, category, *where, **more):
    """Shows a warning of Pillow once for each picture, with the name of its file; all other warnings as usual."""
    path = getattr(_now, "path", None)
    if path is None:
        _show(message, category, *where, **more)
    elif (path, str(message)) not in _told:
        _told.add((path, str(message)))
        print(f"warning: {path}: {message}", file=sys.stderr, flush=True)


warnings.showwarning = show_warning
warnings.filterwarnings("always", module=r"PIL\.")       # why always: Python drops a warning that it showed before
