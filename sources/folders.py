"""A folder for each class: one's own pictures, and ImageNet with its variants."""

import collections
import os
import random
import re


PARTS = ("train", "val", "test")
HELD_OUT = 0.5                     # of one's own pictures, the share that is kept for the test, if no folder is for it
NAMES = "classnames.txt"           # of one's own pictures, the file with class names
# ---- one's own pictures ------------------------------------------------------------------------------------


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
    lists = {part: class_items(folder, names) for part, folder in parts.items()}
    if len(names) < 2:
        raise ValueError(f"1 class: {parts['train']} has one class folder, {min(names)!r}, and two or more are needed. "
                         "Is --data-root one level too high, or too low?")
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

# ---- ImageNet ----------------------------------------------------------------------------------------------


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
    items = class_items(images, names)
    if row.classes < 1000 and len(found) != row.classes:
        raise ValueError(f"{len(found)} class folders in {images}, {row.classes} expected: is the download whole?")
    return [], [], items

# ---- class folders and lists -------------------------------------------------------------------------------


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
    names = {}
    for first, *name in (line.split("\t" if "\t" in line else None, 1) for line in lines(path)):
        if first.strip() in names:
            raise ValueError(f"{path} has two lines for {first.strip()!r}")
        names[first.strip()] = " ".join(name).strip() or first
    return names


def lines(path):
    """The lines of a text file, without blanks at their ends and without empty ones."""
    with open(path, encoding="utf-8-sig") as file:      # why -sig: editors on Windows begin a file with a mark
        try:
            return [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: save it as such ({error})") from error


SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
# ---- which files -------------------------------------------------------------------------------------------


def walk(top):
    """All files below a folder, in a fixed order -> paths of pictures, paths of other files.

    What is hidden is skipped: names that begin with a dot, and __MACOSX, which macOS adds to archives. Links are
    followed, but not to a folder above themselves. Raises OSError for a folder that cannot be read.
    """
    def fail(error):
        raise error

    pictures, others = [], []
    for here, folders, files in os.walk(top, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if _visible(name) and not _leads_up(os.path.join(here, name)))
        for name in sorted(filter(_visible, files)):
            (pictures if name.lower().endswith(SUFFIXES) else others).append(os.path.join(here, name))
    return pictures, others


def _visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def _leads_up(folder):
    """Whether a folder is a link to one above it, in which it would be found again, without an end."""
    here, there = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
    return os.path.islink(folder) and os.path.commonpath([here, there]) == there


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
