"""Where the files of a dataset are, whether they are complete, and how to get them. Lists are read in data.py.

    python data.py --dataset NAME --data-root DIR --download
    python data.py --dataset NAME --data-root DIR --check

`row` is a dataset's line in data.DATASETS. torchvision downloads the pictures where it can. CoOp's split files and the
class names of ImageNet come from addresses whose content is fixed by a commit; their hashes are compared.
"""

import collections
import contextlib
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException


GITHUB = "https://raw.githubusercontent.com"
SPLITS = (f"{GITHUB}/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a/splits",
          f"{GITHUB}/MarcLafon/gallop/f75999e1601cc66e44bc6ff6faa8612021055ff3/gallop/datasets/files")
CLASSNAMES = (f"{GITHUB}/ChongQingNoSubway/Prompt-OT/f042f02394f9f38c7d4e4ff2dca2a6f27bb2ae59",)
CLASSNAMES_DIGEST = "89e0b642c6697a3a43a06a2bb65f9fefb3ca295ccc5f4ba9ce385f1a3a58c629"

TORCHVISION = {"caltech101": "Caltech101", "oxford_pets": "OxfordIIITPet", "oxford_flowers": "Flowers102",
               "food101": "Food101", "fgvc_aircraft": "FGVCAircraft", "sun397": "SUN397", "dtd": "DTD",
               "eurosat": "EuroSAT"}
# What urllib, tarfile, zipfile and torchvision raise where a download breaks off or is not what it should be.
BROKEN = (OSError, RuntimeError, ValueError, EOFError, HTTPException, tarfile.TarError, zipfile.BadZipFile,
          zlib.error)
LIST_LIMIT = 64 * 2**20                            # bytes that a list may have
BY_HAND = {
    "imagenet": "register at https://image-net.org, get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, unpack "
                "them into one folder per class",
    "imagenet_v2": "huggingface.co/datasets/vaishaal/ImageNetV2 has imagenetv2-matched-frequency.tar.gz",
    "imagenet_sketch": "github.com/HaohanWang/ImageNet-Sketch says where they are",
    "imagenet_a": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
    "imagenet_r": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "stanford_cars": "the authors' page, ai.stanford.edu/~jkrause/cars, is gone; copies of cars_train and cars_test "
                     "are in use elsewhere",
    "ucf101": "the middle frames of the videos, UCF-101-midframes.zip, are file 10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O on "
              "Google Drive, where CoOp's authors put them"}


# ---- which files ---------------------------------------------------------------------------------------------


# ---- where ---------------------------------------------------------------------------------------------------

def absolute(root):
    """The root as an absolute path, ~ resolved."""
    return os.path.abspath(os.path.expanduser(root))


def locate(row, root):
    """The layout that exists under `root`, else the first one -> folder of the lists, picture folder."""
    layouts = [(absolute(os.path.join(root, home)), absolute(os.path.join(root, home, images)))
               for home, images in row.layouts]
    return next((layout for layout in layouts if os.path.isdir(layout[1])), layouts[0])


def tree(name, row, root, failed=False):
    """The files that are expected and their places, for error messages. failed: a download was tried just now."""
    root = absolute(root)
    layouts = ["".join(f"\n  {os.path.join(root, home, file)}" for file in
                       (*row.lists, os.path.join(images, row.pictures))) for home, images in row.layouts]
    by_hand = f"\nthe pictures: {BY_HAND[name]}" if name in BY_HAND else ""
    fetch = f"\n{'the list' if by_hand else 'to get it'}: python data.py --dataset {name} --data-root {root} --download"
    if failed:
        fetch = "\nfetch the files on another machine and put them there"
    return "expected:" + "\nor:".join(layouts) + by_hand + (fetch if row.lists else "")


def missing(paths):
    """The paths that do not exist. Each folder is listed once, without a look at each file."""
    folders, gone = {}, []
    for path in paths:
        folder, file = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in folders[folder]:
            gone.append(path)
    return gone


def is_published(row, root):
    """Whether the split file is CoOp's, byte for byte; None where a dataset has no split file."""
    if row.digest is None:
        return None
    from clip.download import digest  # why here: whoever asks for the names of datasets needs no torch
    return digest(f"{locate(row, root)[0]}/{row.lists[0]}", like=row.digest) == row.digest


# ---- getting -------------------------------------------------------------------------------------------------

def download(name, row, root):
    """Downloads what is missing: the pictures first, because their layout decides where the lists go."""
    from clip.download import fetch  # why here: as in is_published
    if not row.lists:
        raise ValueError(f"{name} needs no download")
    root = absolute(root)
    if name in BY_HAND:
        print(f"{name}: the pictures must be downloaded by hand\n" + tree(name, row, root), flush=True)
    elif not os.path.isdir(locate(row, root)[1]):
        print(f"{name}: torchvision downloads the pictures into {root}", flush=True)
        download_pictures(name, row, root)
    home, _ = locate(row, root)
    for file in row.lists:
        path = f"{home}/{file}"
        if os.path.exists(path):
            print(f"{path} is there already")
        elif row.digest or file.endswith("classnames.txt"):
            addresses, expected = (SPLITS, row.digest) if row.digest else (CLASSNAMES, CLASSNAMES_DIGEST)
            fetch([f"{address}/{os.path.basename(file)}" for address in addresses], path, expected, LIST_LIMIT)
            print(f"{path} downloaded, digest as expected")


def download_pictures(name, row, root):
    """Lets torchvision fetch and unpack the pictures. They come into the root whole, or not at all."""
    import torchvision  # why here: as in clip.preprocess
    part = os.path.join(root, f"{name}.part")
    try:
        os.makedirs(part, exist_ok=True)
        # why: all is there where a module is missing: Flowers102 needs scipy for its labels, which we do not use
        with contextlib.suppress(ModuleNotFoundError):
            getattr(torchvision.datasets, TORCHVISION[name])(part, download=True)
        move_into(part, root)
    except BROKEN as error:
        text = str(error) or type(error).__name__
        raise OSError(f"{name}: torchvision could not download the pictures: {text}\n"
                      + tree(name, row, root, failed=True)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def move_into(folder, other):
    """Moves all that a folder holds into another one, folder by folder where both have one of the same name."""
    for entry in os.scandir(folder):
        place = os.path.join(other, entry.name)
        if entry.is_dir() and os.path.isdir(place):
            move_into(entry.path, place)
        else:
            os.replace(entry.path, place)


# ---- checking ------------------------------------------------------------------------------------------------

def check(name, row, root, lists, class_names, read_image):
    """Reads every picture that the lists name and prints what it finds -> whether all is as expected."""
    fine = row.classes in (None, len(class_names))
    print(f"{name} in {absolute(root)}: {len(class_names)} classes" + _unless(fine, row.classes))
    if is_published(row, root) is False:
        fine = False
        print(f"{row.lists[0]} is not CoOp's published file")
    for part, items, size in zip(lists, lists.values(), row.sizes or (None,) * 3):
        per_class = collections.Counter(label for _, label, _ in items).values()
        right = size in (None, len(items))
        print(f"{part}: {len(items)} images" + _unless(right, size)
              + (f", {min(per_class)} to {max(per_class)} per class" if items else ""))
        gone = set(missing(path for path, *_ in items if os.path.isabs(path)))
        if gone:
            print(f"{len(gone)} of {len(items)} {part} images missing, first: {min(gone)}")
        bad = unreadable([path for path, *_ in items if path not in gone], read_image)
        for fault in bad[:5]:
            print(fault)
        if bad:
            print(f"{len(bad)} of {len(items)} {part} images cannot be read")
        fine = fine and right and not gone and not bad
    for line in twins(lists) if row.as_people_see else ():
        print(line)
    print("all as expected" if fine else tree(name, row, root))
    return fine


def twins(lists):
    """Warnings of pictures that are the same, byte by byte, in two parts or in two classes; lists: {part: items}."""
    from clip.download import digest  # why here: as in is_published
    by_size = collections.defaultdict(list)
    for part, items in lists.items():
        for path, label, _ in items:
            if os.path.exists(path):
                by_size[os.path.getsize(path)].append((part, label, path))
    by_content = collections.defaultdict(list)
    for size, group in by_size.items():
        for part, label, path in group if len(group) > 1 else ():
            by_content[size, digest(path)].append((part, label, path))

    lines = []
    for where, column in (("two parts", 0), ("two classes", 1)):
        pairs = [pair for pair in (unlike(group, column) for group in by_content.values()) if pair]
        if pairs:
            more = f", and {len(pairs) - 1} more such pairs" if len(pairs) > 1 else ""
            lines.append(f"warning: one picture, byte by byte, is in {where}: {' and '.join(pairs[0])}{more}")
    return lines


def unlike(group, column):
    """The paths of two entries of a group that differ in a column, or None."""
    first, *others = group
    return next(((first[2], other[2]) for other in others if other[column] != first[column]), None)


def _unless(right, expected):
    return "" if right else f" (expected {expected})"


def unreadable(paths, read_image):
    """An error message for each picture that cannot be decoded completely."""
    def fault(path):
        try:
            read_image(path)
        except ValueError as error:
            return str(error)

    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:       # why threads: Pillow decodes outside Python's lock
        for start in range(0, len(paths), 100):            # why in pieces: the pool takes all that it is given
            piece = paths[start : start + 100]
            faults += filter(None, pool.map(fault, piece))
            if sys.stderr.isatty():
                done = start + len(piece)
                print(f"\r{done} of {len(paths)} pictures read", end="", file=sys.stderr, flush=True)
    if paths and sys.stderr.isatty():
        print(file=sys.stderr)
    return faults
