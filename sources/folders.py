"""A folder for each class: one's own pictures, and ImageNet with its variants."""

import collections
import os
import random
import re
import unicodedata

from sources.listing import (
    check_regular, class_folders, folders_in, is_picture, kinds, left_out, normal, walk)

PARTS = ("train", "val", "test")
# What people call the folders of the parts, in any case. All of them may have the same beginning or end:
# seg_train and seg_test, train_set and test_set.
PART_OF = {"train": "train", "training": "train",
           "val": "val", "valid": "val", "validation": "val", "dev": "val",
           "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
PART_NAME = re.compile(rf"(?P<start>.*[^a-z])?(?P<word>{'|'.join(PART_OF)})(?P<end>set|[^a-z].*)?", re.DOTALL)
HELD_OUT = 0.5                     # the share of one's own pictures that is kept for a test without a folder
NAMES = "classnames.txt"           # the file with the class names of one's own pictures


# ---- the parts of one's own pictures -----------------------------------------------------------------------

def layout(root):
    """The parts of one's own pictures and their folders: {"train": ..., "val": ..., "test": ...}.

    Folders are parts where two or more have the names of different parts; else the root is the training part.
    A folder that classnames.txt names is a class. Raises ValueError where none is for training, where two are
    for one part, and for class folders beside parts.
    """
    classes = own_names(root) or {}
    folders = [name for name in folders_in(root) if normal(name) not in classes]
    split = split_of(folders)
    if len(split) < 2:
        check_alone(root, folders)
        check_inside(root, folders)
        return {"train": root}

    for part, names in split.items():
        if len(names) > 1:
            raise ValueError(f"{root} has two folders for one part, {names[0]} and {names[1]}: leave one of "
                             "them")

    parts = {part: names[0] for part, names in split.items()}
    if "train" not in parts:
        raise ValueError(f"{root} has {' and '.join(parts.values())}, but no folder to train on: call it "
                         "train")
    for name in folders:
        if name not in parts.values() and walk(f"{root}/{name}").pictures:
            raise ValueError(f"{root} has pictures in {name} beside the part {parts['train']}: move them "
                             f"into the parts or away; if {parts['train']} is a class, {NAMES} must name it")
    return {part: innermost(f"{root}/{parts[part]}") for part in PARTS if part in parts}


def split_of(folders):
    """The folders that seem to be parts of one split, {part: names}; one part alone is no split."""
    named = collections.defaultdict(lambda: collections.defaultdict(list))    # {start and end: {part: names}}
    for name in folders:
        match = PART_NAME.fullmatch(normal(name).lower())
        if match:
            named[match["start"], match["end"]][PART_OF[match["word"]]].append(name)
    return max(named.values(), key=len, default={})


def check_inside(root, folders):
    """Raises ValueError where each class folder has the parts in it."""
    inside = [split_of(folders_in(f"{root}/{name}")) for name in folders]
    if len(folders) > 1 and min(map(len, inside)) > 1:     # why two: of one, the root is a level too high
        part = next(iter(inside[0].values()))[0]
        raise ValueError(f"{root} has the parts in the class folders: put {part}/{folders[0]} in place of "
                         f"{folders[0]}/{part}, and so on")


def check_alone(root, folders):
    """Raises ValueError where a folder beside classes looks like a part, by its name and its content.

    It is a class if it has pictures of its own, or a single folder of them, or if two other classes have
    folders of the same names. why: the folders in a part are classes, so the classes beside it lack them.
    """
    for name in folders:
        beside = [other for other in folders if other != name]
        if not beside or normal(name).lower() not in PART_OF:
            continue
        inside = folders_in(f"{root}/{name}")
        alike = [other for other in beside if {*inside} & {*folders_in(f"{root}/{other}")}]
        has_pictures = any(map(is_picture, os.listdir(f"{root}/{name}")))
        if len(inside) > 1 and len(alike) < 2 and not has_pictures:
            raise ValueError(f"{root} has {name}, which looks like a part with the classes "
                             f"{', '.join(inside[:3])}, beside {beside[0]}: call a second part test or val, "
                             f"or move {beside[0]} away; if {name} is a class, {NAMES} must name it")


def innermost(folder):
    """A part's folder, or the only one in it, of the same name. why: archives are often packed like this."""
    inside = folders_in(folder)
    same = len(inside) == 1 and normal(inside[0]) == normal(os.path.basename(folder))
    return f"{folder}/{inside[0]}" if same else folder


def own_names(root):
    """What classnames.txt says, {class folder: name}; None where there is no such file."""
    given = os.path.join(root, NAMES)
    return read_names(given) if os.path.exists(given) else None


def folder_names(folders):
    """Class names made of the names of folders: {folder: name}, with _ and - as spaces."""
    # why as UTF-8: a class must have the same name, and so the same tokens, whatever the locale is
    return {folder: re.sub("[_-]", " ", os.fsencode(folder).decode("utf-8", "replace")) for folder in folders}


def own_lists(root, seed, held_out=None):
    """One's own pictures -> train, val, test: lists of items.

    There are folders train/ and test/ or val/ or both; without test/, val/ is the test. Or there are only
    class folders: then the share `held_out` of each class, HELD_OUT where None, is drawn for the test. Class
    names are those of classnames.txt, lines `<folder> <name>`, else the folders' with _ and - as spaces.
    Raises ValueError for fewer than two classes, and where `held_out` has nothing to do.
    """
    parts = layout(root)
    if held_out is not None and len(parts) > 1:
        there = " and ".join(os.path.basename(folder) for folder in parts.values())
        raise ValueError(f"--held-out is for class folders alone, but {root} has {there}: leave it out")

    found = {part: class_folders(folder) for part, folder in parts.items()}
    names = own_names(root)
    if names is None:
        names = folder_names(found["train"])
    lists = {part: class_items(folder, names, found=found[part]) for part, folder in parts.items()}
    if len(names) < 2:
        raise ValueError(f"1 class: {parts['train']} has one class folder, {min(names)!r}, and two or more "
                         "are needed. Is --data-root one level too high, or too low?")

    if len(parts) == 1:
        return hold_out(lists["train"], seed, HELD_OUT if held_out is None else held_out)
    test = lists.pop("test", None) or lists.pop("val")
    return lists["train"], lists.get("val", []), test


def hold_out(items, seed, share):
    """Draws a share of each class, at least one picture, for the test -> train, val (empty), test.

    share: in (0, 1). Raises ValueError for a class with a single picture.
    """
    rng = random.Random(seed)
    groups = collections.defaultdict(list)
    for item in items:
        groups[item[1]].append(item)

    test = set()
    for _, group in sorted(groups.items()):
        if len(group) < 2:
            raise ValueError(f"class {group[0][2]!r} has 1 picture, {group[0][0]}: two are needed, as one is "
                             "held out for the test")
        count = int(len(group) * share + 1e-9)           # why 1e-9: 0.29 * 100 is a little less than 29
        test.update(rng.sample(group, max(count, 1)))
    return [item for item in items if item not in test], [], [item for item in items if item in test]


def remarks(root):
    """Lines that say which of one's own pictures are left out, and which folders are read as which part."""
    parts = layout(root)
    used = {path for part in parts.values() for paths in class_folders(part).values() for path in paths}
    pictures, others, system = walk(root)
    others = [path for path in others if path != os.path.join(root, NAMES)]
    beside = [path for path in pictures if path not in used]

    lines = [f"left out: {text}" for text in left_out(others, system)]
    if beside:
        lines.append(f"left out: {kinds(beside)}, outside of the class folders, first {beside[0]}")
    if any(os.path.basename(folder) != part for part, folder in parts.items()) and len(parts) > 1:
        lines.append("read as " + ", ".join(f"{part}: {folder}" for part, folder in parts.items()))
    if "val" in parts and "test" not in parts:
        lines.append(f"no folder test/: {os.path.basename(parts['val'])}/ is the test")
    return lines


# ---- ImageNet ----------------------------------------------------------------------------------------------

def imagenet_lists(row, home, images):
    """ImageNet -> train, val (empty), test; labels are the ranks of the folders' sorted WordNet ids.

    differs: CoOp lists files in the order of the disk, so its draw varies from machine to machine; here file
    names are sorted. CoOp also uses the 50,000 test pictures for validation; here training pictures are used.
    """
    names = read_names(f"{home}/{row.lists[0]}")
    return class_items(f"{images}/train", names), [], class_items(f"{images}/val", names)


def variant_lists(row, home, images):
    """A variant of ImageNet -> train and val (empty), test. Folders are WordNet ids, those of V2 labels."""
    names = read_names(f"{home}/{row.lists[0]}")
    found = class_folders(images)
    if all(folder.isdigit() for folder in found):
        names = {str(label): names[wnid] for label, wnid in enumerate(sorted(names))}
        return [], [], class_items(images, names, key=int)
    if row.classes < 1000:                               # a variant of some of the classes
        names = {wnid: name for wnid, name in names.items() if wnid in found}
    items = class_items(images, names)
    if row.classes < 1000 and len(found) != row.classes:
        raise ValueError(f"{len(found)} class folders in {images}, {row.classes} expected: is the download "
                         "whole?")
    return [], [], items


# ---- class folders and lists -------------------------------------------------------------------------------

def class_items(folder, names, key=None, found=None):
    """Items of folder/<class>/; names: {class folder: class name}. The sorted class folders are the labels.

    key: by which they are sorted; found: what `class_folders` gives for the folder, where it is known.
    """
    found = found or class_folders(folder)
    if set(found) != set(names):
        unmatched = sorted(set(found) ^ set(names))
        more = " ..." if len(unmatched) > 3 else ""
        raise ValueError("each class needs a folder with pictures in every part, and each folder a name: add "
                         f"what lacks, or leave the class out everywhere. {len(names)} class names for "
                         f"{len(found)} class folders in {folder}; without counterpart: "
                         f"{', '.join(unmatched[:3])}{more}")
    return [(path, label, names[at]) for label, at in enumerate(sorted(names, key=key)) for path in found[at]]


def read_names(path):
    """Lines `<folder or picture> <class name>` -> {folder or picture: class name}.

    Without a class name, the folder's own is taken. A tab parts the two where a folder's name has a blank.
    """
    names = {}
    for line in lines(path):
        first, *name = line.split("\t" if "\t" in line else None, 1)
        key = normal(first.strip())
        if key in names:
            raise ValueError(f"{path} has two lines for {key!r}")
        names[key] = " ".join(name).strip() or first
    return names


def lines(path):
    """The lines of a text file in NFC, without blanks at their ends and without empty ones."""
    check_regular(path)
    with open(path, encoding="utf-8-sig") as file:      # why -sig: on Windows files often begin with a mark
        try:
            return [unicodedata.normalize("NFC", line.strip()) for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: save it as such ({error})") from error
