"""Where the files of a dataset are, whether they are complete, and how to get them.

    python data.py --dataset NAME --data-root DIR --download
    python data.py --dataset NAME --data-root DIR --check

`row` is a dataset's line in sources.DATASETS. torchvision downloads the pictures where it can. CoOp's split
files and the class names of ImageNet come from addresses whose content is fixed by a commit; their hashes are
compared.
"""

import collections
import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
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
    "imagenet": "register at https://image-net.org, get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, "
                "unpack them into one folder per class",
    "imagenet_v2": "huggingface.co/datasets/vaishaal/ImageNetV2 has imagenetv2-matched-frequency.tar.gz",
    "imagenet_sketch": "github.com/HaohanWang/ImageNet-Sketch says where they are",
    "imagenet_a": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
    "imagenet_r": "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "stanford_cars": "the authors' page, ai.stanford.edu/~jkrause/cars, is gone; copies of cars_train and "
                     "cars_test are in use elsewhere",
    "ucf101": "the middle frames of the videos, UCF-101-midframes.zip, are file "
              "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O on Google Drive, where CoOp's authors put them"}


# ---- where -------------------------------------------------------------------------------------------------

def absolute(root):
    """The root as an absolute path, ~ resolved."""
    return os.path.abspath(os.path.expanduser(root))


def locate(row, root):
    """The layout that exists under `root`, else the first one -> folder of the lists, picture folder."""
    layouts = [(absolute(os.path.join(root, home)), absolute(os.path.join(root, home, images)))
               for home, images in row.layouts]
    return next((layout for layout in layouts if os.path.isdir(layout[1])), layouts[0])


def tree(name, row, root, failed=False):
    """Where files are expected, and how to get them, for errors. failed: a download was just tried."""
    root = absolute(root)
    layouts = []
    for home, images in row.layouts:
        expected = [*row.lists, os.path.join(images, row.pictures)]
        layouts.append("".join(f"\n  {os.path.join(root, home, file)}" for file in expected))
    text = "expected:" + "\nor:".join(layouts)

    if name in BY_HAND:
        text += f"\nthe pictures: {BY_HAND[name]}"
    if row.lists and failed:
        text += "\nfetch the files on another machine and put them there"
    elif row.lists:
        what = "the list" if name in BY_HAND else "to get it"
        text += f"\n{what}: python data.py --dataset {name} --data-root {root} --download"
    return text


def missing(paths):
    """The paths that do not exist. Each folder is listed once, without a look at each file."""
    folders = {}               # {folder: names of what it holds}
    gone = []
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


# ---- getting -----------------------------------------------------------------------------------------------

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
            folders, expected = (SPLITS, row.digest) if row.digest else (CLASSNAMES, CLASSNAMES_DIGEST)
            addresses = [f"{folder}/{os.path.basename(file)}" for folder in folders]
            fetch(addresses, path, expected, LIST_LIMIT)
            print(f"{path} downloaded, digest as expected")


def download_pictures(name, row, root):
    """Lets torchvision fetch and unpack the pictures. They come into the root whole, or not at all."""
    import torchvision  # why here: as in clip.preprocess
    os.makedirs(root, exist_ok=True)
    # why a new name: what is removed in the end must not be somebody's own
    part = tempfile.mkdtemp(prefix=f"{name}.part", dir=root)

    try:
        # why: Flowers102 has its pictures by the time it asks for scipy, for labels that we do not use
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
    """Moves all that a folder holds into another one. Folders that both have are merged; files there stay."""
    for entry in os.scandir(folder):
        place = os.path.join(other, entry.name)
        if entry.is_dir() and os.path.isdir(place):
            move_into(entry.path, place)
        elif not os.path.lexists(place):
            os.replace(entry.path, place)


# ---- checking ----------------------------------------------------------------------------------------------

def check(name, row, root, lists, class_names, read_image):
    """Reads every picture that the lists name and prints what it finds -> whether all is as expected."""
    fine = row.classes in (None, len(class_names))
    print(f"{name} in {absolute(root)}: {len(class_names)} classes" + _unless(fine, row.classes))
    if is_published(row, root) is False:
        fine = False
        print(f"{row.lists[0]} is not CoOp's published file")

    for part, size in zip(lists, row.sizes or (None, None, None)):
        part_is_fine = check_part(part, lists[part], size, read_image)
        fine = fine and part_is_fine
    if row.as_people_see:
        for line in twins(lists):
            print(line)
    print("all as expected" if fine else tree(name, row, root))
    return fine


def check_part(part, items, size, read_image):
    """Reads the pictures of a part and prints what it finds -> whether all is as expected.

    size: how many there should be; None: any number.
    """
    fine = size in (None, len(items))
    per_class = collections.Counter(label for _, label, _ in items).values()
    span = f", {min(per_class)} to {max(per_class)} per class" if items else ""
    print(f"{part}: {len(items)} images" + _unless(fine, size) + span)

    gone = set(missing(path for path, *_ in items if os.path.isabs(path)))
    if gone:
        print(f"{len(gone)} of {len(items)} {part} images missing, first: {min(gone)}")
    bad = unreadable([path for path, *_ in items if path not in gone], read_image)
    for fault in bad[:5]:
        print(fault)
    if bad:
        print(f"{len(bad)} of {len(items)} {part} images cannot be read")
    return fine and not gone and not bad


def twins(lists):
    """Warnings of equal files in two parts or in two classes; lists: {part: items}."""
    from clip.download import digest  # why here: as in is_published
    by_size = collections.defaultdict(list)
    for part, items in lists.items():
        for path, label, _ in items:
            if os.path.isfile(path):                       # why: a pipe or a device may never end
                by_size[os.path.getsize(path)].append((part, label, path))

    by_content = collections.defaultdict(list)
    for size, group in by_size.items():
        if len(group) > 1:                                 # why: most files then need not be read
            for part, label, path in group:
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
    for other in others:
        if other[column] != first[column]:
            return first[2], other[2]
    return None


def _unless(fine, expected):
    return "" if fine else f" (expected {expected})"


def unreadable(paths, read_image):
    """An error message for each picture that cannot be decoded completely."""
    def fault(path):
        try:
            read_image(path)
        except ValueError as error:
            return str(error)

    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:       # why threads: Pillow decodes outside Python's lock
        for start in range(0, len(paths), 100):            # why in pieces: the pool takes all it is given
            piece = paths[start : start + 100]
            faults += filter(None, pool.map(fault, piece))
            if sys.stderr.isatty():
                done = start + len(piece)
                print(f"\r{done} of {len(paths)} pictures read", end="", file=sys.stderr, flush=True)
    if paths and sys.stderr.isatty():
        print(file=sys.stderr)
    return faults
