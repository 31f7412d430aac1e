"""The images: where they are, which of them are drawn, and how they reach the model. No model is used here.

    python data.py --dataset eurosat --data-root DIR --download      fetch pictures and lists
    python data.py --dataset eurosat --data-root DIR --check         look at every picture that the lists name

Read it from DATASETS (what exists) through `load` (lists of pictures) and the two draws to `Pictures`, `Batches` and
the loaders (tensors). A picture is an item `(path, label, class name)` everywhere.
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import sys
import threading
import warnings
import zlib
from typing import NamedTuple

import clip  # before torch: it bounds how long torch's threads wait; nothing else of it is used here

import numpy
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms

from sources import critters
from sources import files


# ---- the datasets --------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """What is known of a dataset before its files are read."""
    template: str              # the hand-written prompt of zero-shot CLIP, as CoOp has it
    classes: int = None
    sizes: tuple = None        # train, val, test images
    zero_shot: float = None    # published accuracy of the template with ViT-B/16, percent (GalLoP's README)
    pictures: str = ""         # what the picture folder contains
    layouts: tuple = ()        # (folder of the lists, picture folder in it): CoOp's, torchvision's; the first one found
    lists: tuple = ()          # files that say what the pictures show
    digest: str = None         # of CoOp's split file: sha256, or git's blob id (40 digits) where only that is known


DATASETS = {
    "critters": Row("a photo of a {}.", len(critters.CLASSES),
        tuple(len(critters.CLASSES) * count for count in critters.POOL.values())),
    "folder": Row("a photo of a {}.", layouts=(("", ""),),
        pictures="{train,val,test}/<class>/*.jpg (val or test may be absent)   or only <class>/*.jpg"),
    "imagenet": Row("a photo of a {}.", 1000, (1281167, 0, 50000), 66.7, "{train,val}/<wnid>/*.JPEG",
        (("imagenet", "images"), ("imagenet", "")), ("classnames.txt",)),
    # Variants of ImageNet, with its names and template. They are for tests alone: --on of evaluate.py.
    "imagenet_v2": Row("a photo of a {}.", 1000, (0, 0, 10000), 60.8, "<0..999>/*.jpeg",
        (("", "imagenetv2/imagenetv2-matched-frequency-format-val"),), ("imagenet/classnames.txt",)),
    "imagenet_sketch": Row("a photo of a {}.", 1000, (0, 0, 50889), 46.2, "<wnid>/*.JPEG",
        (("", "imagenet-sketch/images"),), ("imagenet/classnames.txt",)),
    "imagenet_a": Row("a photo of a {}.", 200, (0, 0, 7500), 47.8, "<wnid>/*.jpg",
        (("", "imagenet-adversarial/imagenet-a"),), ("imagenet/classnames.txt",)),
    "imagenet_r": Row("a photo of a {}.", 200, (0, 0, 30000), 74.0, "<wnid>/*.jpg",
        (("", "imagenet-rendition/imagenet-r"),), ("imagenet/classnames.txt",)),
    "fgvc_aircraft": Row("a photo of a {}, a type of aircraft.", 100, (3334, 3333, 3333), 24.8, "<7 digits>.jpg",
        (("fgvc_aircraft", "images"), ("fgvc-aircraft-2013b/data", "images")),
        ("variants.txt", "images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt")),
    "caltech101": Row("a photo of a {}.", 100, (4128, 1649, 2465), 92.2, "<class>/image_*.jpg",
        (("caltech-101", "101_ObjectCategories"), ("caltech101", "101_ObjectCategories")),
        ("split_zhou_Caltech101.json",), "52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5"),
    "oxford_pets": Row("a photo of a {}, a type of pet.", 37, (2944, 736, 3669), 88.4, "<breed>_*.jpg",
        (("oxford_pets", "images"), ("oxford-iiit-pet", "images")), ("split_zhou_OxfordPets.json",),
        "d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e"),
    "stanford_cars": Row("a photo of a {}.", 196, (6509, 1635, 8041), 65.5, "{cars_train,cars_test}/*.jpg",
        (("stanford_cars", ""),), ("split_zhou_StanfordCars.json",),
        "40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d"),
    "oxford_flowers": Row("a photo of a {}, a type of flower.", 102, (4093, 1633, 2463), 70.7, "image_*.jpg",
        (("oxford_flowers", "jpg"), ("flowers-102", "jpg")), ("split_zhou_OxfordFlowers.json",),
        "2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794"),
    "food101": Row("a photo of {}, a type of food.", 101, (50500, 20200, 30300), 84.8, "<class>/*.jpg",
        (("food-101", "images"),), ("split_zhou_Food101.json",),
        "39557040ee6501bd32aa8b5dfd75f7941a32f0a7"),
    "sun397": Row("a photo of a {}.", 397, (15880, 3970, 19850), 62.3, "<letter>/<scene>/sun_*.jpg",
        (("sun397", "SUN397"), ("SUN397", "")), ("split_zhou_SUN397.json",),
        "8d5725db8f70bcf02245665304f863e68f96a24c"),
    "dtd": Row("{} texture.", 47, (2820, 1128, 1692), 44.1, "<class>/*.jpg",
        (("dtd", "images"), ("dtd", "dtd/images")), ("split_zhou_DescribableTextures.json",),
        "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38"),
    "eurosat": Row("a centered satellite photo of {}.", 10, (13500, 5400, 8100), 48.3, "<Class>/*.jpg",
        (("eurosat", "2750"),), ("split_zhou_EuroSAT.json",),
        "541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2"),
    "ucf101": Row("a photo of a person doing {}.", 101, (7639, 1898, 3783), 64.7, "<Class>/*.jpg",
        (("ucf101", "UCF-101-midframes"),), ("split_zhou_UCF101.json",),
        "d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8"),
}


PARTS = ("train", "val", "test")
HELD_OUT = 0.5                     # of one's own pictures, the share that is kept for the test, if no folder is for it
NAMES = "classnames.txt"           # of one's own pictures, the file with class names
VARIANTS = [name for name, row in DATASETS.items() if row.sizes and not row.sizes[0]]


def default_root():
    """The folder of the datasets where none is named: $DATA_ROOT, else ./data."""
    return os.environ.get("DATA_ROOT", "data")


def find_root(name, given=None):
    """The folder of the datasets as an absolute path. Raises ValueError for one that is given and would not be used."""
    if given is not None and name == "critters":
        raise ValueError("--data-root is not used for critters, which are drawn: leave it out, or name other "
                         "data by --dataset; `folder` is for your own pictures")
    return files.absolute(given or default_root())


def template(name, given=None):
    """The prompt of zero-shot CLIP, the one given or the dataset's, with one {} for the class name.

    Underscores of a class name become spaces. Raises ValueError for any other use of braces.
    """
    if given is not None and [given.count(sign) for sign in ("{}", "{", "}")] != [1, 1, 1]:
        raise ValueError(f"--template {given!r} must have one {{}} for the class name, and no other brace")
    return given or DATASETS[name].template


# ---- from a name to lists of items ---------------------------------------------------------------------------

def load(name, root, shots, seed, sampler="exact", held_out=None, classes="all"):
    """The pictures to train on, to validate with and to test on -> train, val, test, class names.

    Three lists of `(path, label, class name)`, and the names ordered by label, raw: underscores stay.
    shots: images per class, drawn with `seed`; None or 0 means all. sampler: "exact" (CoOp's k-shot) or
    "proportional" (the released code's). held_out: see `own_lists`, None for other datasets.
    Validation gets up to min(shots, 4) per class from the same random stream. classes: see `choose_classes`; shots are
    drawn before, so that a class has the same ones in any case.
    Raises FileNotFoundError, with the folder looked in and the tree expected, where anything named is not there.
    """
    if (shots or 0) < 0:
        raise ValueError(f"--shots must not be negative, got {shots}")
    lists, class_names = read_lists(name, root, seed, held_out)
    if shots and not lists["train"]:
        raise ValueError(f"{name} has no training images: it is for evaluate.py RUN --on {name}")
    if shots:
        rng = random.Random(seed)          # one stream: train draws first, then validation
        train = {"exact": few_shot, "proportional": proportional}[sampler](lists["train"], shots, rng)
        # as in CoOp, a dataset without validation pictures takes them from its training part
        drawn = set(train)
        pool = lists["val"] or [item for item in lists["train"] if item not in drawn]
        val = [item for group in _by_label(pool) for item in rng.sample(group, min(len(group), shots, 4))]
        lists = {"train": train, "val": val, "test": lists["test"]}
    lists, class_names = choose_classes(lists, class_names, classes)
    for part, items in lists.items():
        # why not all: these list existing files, or draw their pictures
        there = name.startswith(("critters", "folder", "imagenet"))
        gone = [] if there else files.missing(path for path, *_ in items)
        if gone:
            raise FileNotFoundError(f"{name}: {len(gone)} of {len(items)} {part} images missing, first: {gone[0]}\n"
                                    + files.tree(name, DATASETS[name], root))
    return *lists.values(), class_names


def choose_classes(lists, class_names, classes):
    """Keeps the items of "all" classes, of "base", the first ceil(C / 2), or of "new", the others, numbered from 0."""
    half = -(-len(class_names) // 2)
    if classes != "all" and half < 2:
        raise ValueError(f"{len(class_names)} classes have too few base classes to train on: base and new classes "
                         "need three or more")
    first, end = {"all": (0, len(class_names)), "base": (0, half), "new": (half, len(class_names))}[classes]
    return {part: [(path, label - first, class_name) for path, label, class_name in items if first <= label < end]
            for part, items in lists.items()}, class_names[first:end]


def read_lists(name, root, seed=1, held_out=None):
    """All that a dataset lists, whether it exists or not -> {"train": items, "val": items, "test": items}, names."""
    if name not in DATASETS:
        raise ValueError(f"no dataset is called {name!r}; there are {', '.join(DATASETS)}")
    if held_out is not None and name != "folder":
        raise ValueError(f"--held-out is for one's own pictures, --dataset folder; {name} has a test split")
    readers = {"critters": _critters, "imagenet": imagenet_lists, "fgvc_aircraft": _aircraft,
               **dict.fromkeys(VARIANTS, variant_lists)}
    row, read = DATASETS[name], readers.get(name, _split)
    try:
        home, images = files.locate(row, root) if row.layouts else ("", "")
        parts = own_lists(images, seed, held_out) if name == "folder" else read(row, home, images)
        lists = dict(zip(PARTS, parts))
    except FileNotFoundError as error:
        what = f"there is no {error.filename}" if error.filename else error
        raise FileNotFoundError(f"{name}: {what}\n" + files.tree(name, row, root)) from None
    return lists, _class_names(name, lists)


def _class_names(name, lists):
    """Names ordered by the lists' own integer labels; two classes may share a name (ImageNet has two missiles)."""
    names = {}
    for path, label, class_name in itertools.chain(*lists.values()):
        if names.setdefault(label, class_name) != class_name:
            raise ValueError(f"{name}: label {label} is {names[label]!r} and, for {path}, {class_name!r}")
    labels = sorted(names)
    if labels != list(range(max(1, len(labels)))):
        raise ValueError(f"{name}: labels should run from 0 without a gap, found {labels[:3]} ... {labels[-1:]}")
    for part in ("test",) if name in VARIANTS else ("train", "test"):
        without = set(labels) - {label for _, label, _ in lists[part]}
        if without:
            raise ValueError(f"{name}: class {names[min(without)]!r} has no {part} image")
    return [names[label] for label in labels]


def _critters(row, home, images):
    names = critters.class_names()
    return [[(path, label, names[label]) for path, label in critters.paths(part)] for part in critters.POOL]


def _split(row, home, images):
    """CoOp's split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    path = f"{home}/{row.lists[0]}"
    with open(path, encoding="utf-8") as file:
        try:
            parts = json.load(file)
            return [[(f"{images}/{picture}", int(label), str(class_name)) for picture, label, class_name in parts[part]]
                    for part in ("train", "val", "test")]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} should hold lists train, val and test of [path, label, class name]: "
                             f"{type(error).__name__}: {error}") from error


def _aircraft(row, home, images):
    """The dataset's own lists, lines `<7 digits> <variant>`; the label is the variant's line in variants.txt.

    differs: the released code trains on train and val together (6,667 images), the literature on train (3,334).
    """
    labels = {variant: label for label, variant in enumerate(lines(f"{home}/variants.txt"))}
    for path in (f"{home}/images_variant_{part}.txt" for part in ("train", "val", "test")):
        names = read_names(path)
        unknown = set(names.values()) - set(labels)
        if unknown:
            raise ValueError(f"{path}: {min(unknown)!r} is none of the {len(labels)} variants of variants.txt")
        yield [(f"{images}/{number}.jpg", labels[variant], variant) for number, variant in names.items()]


def split_matches_published(name, root):
    """Whether the split file is CoOp's, byte for byte; None where a dataset has no split file."""
    return files.is_published(DATASETS[name], root)


# ---- drawing few shots ---------------------------------------------------------------------------------------

def few_shot(items, shots, seed):
    """Exactly `shots` items per class: CoOp's draw, in CoOp's order of drawing.

    seed: an int, or a random.Random to continue with. Raises ValueError where a class has fewer.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    groups = _by_label(items)
    fewest = min(groups, key=len)
    if len(fewest) < shots:
        raise ValueError(f"class {fewest[0][2]!r} has {len(fewest)} images, fewer than the {shots} shots asked for "
                         f"(images held out for the test do not count): --shots {len(fewest)} is the most that every "
                         "class has, --shots 0 takes all")
    return [item for group in groups for item in rng.sample(group, shots)]


def proportional(items, shots, seed):
    """shots x classes items in total, each class in proportion to its share of the data: the released code's draw.

    differs: the literature's k-shot is `few_shot`. Here a rare class gets few images or none (Caltech101, 1 shot: 26
    of 100 classes). As in scikit-learn's StratifiedShuffleSplit, which the released code calls, shares are rounded
    by largest remainder with ties broken at random; so class counts are its own up to ties, the images others.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    groups = _by_label(items)
    total = shots * len(groups)
    if total > len(items):
        raise ValueError(f"{shots} shots of {len(groups)} classes are {total} images, but there are {len(items)}")
    share, rest = zip(*(divmod(total * len(group), len(items)) for group in groups))
    rounded_up = sorted(range(len(groups)), key=lambda i: (-rest[i], rng.random()))[:total - sum(share)]
    return [item for i, group in enumerate(groups) for item in rng.sample(group, share[i] + (i in rounded_up))]


def _by_label(items):
    """The items of each label. Labels come in the order of their first appearance, as in CoOp."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


# ---- one's own pictures, and ImageNet: a folder for each class -----------------------------------------------

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
        for folder in files.class_folders(parts["train"])}
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


def imagenet_lists(row, home, images):
    """ImageNet -> train, val (empty), test; the label is the rank of the folder's WordNet id among all of them, sorted.

    differs: CoOp lists files in the order of the disk, so its draw varies from machine to machine; here file names are
    sorted. CoOp also uses the 50,000 test pictures for validation; here the few come from the training pictures.
    """
    names = read_names(f"{home}/{row.lists[0]}")
    return class_items(f"{images}/train", names), [], class_items(f"{images}/val", names)


def variant_lists(row, home, images):
    """A variant of ImageNet -> train and val (empty), test. Folders are called by WordNet id, those of V2 by label."""
    names, found = read_names(f"{home}/{row.lists[0]}"), files.class_folders(images)
    if all(folder.isdigit() for folder in found):
        names = {str(label): names[wnid] for label, wnid in enumerate(sorted(names))}
        return [], [], class_items(images, names, key=int)
    if row.classes < 1000:                               # a variant of some of the classes
        names = {wnid: name for wnid, name in names.items() if wnid in found}
    items = class_items(images, names)
    if row.classes < 1000 and len(found) != row.classes:
        raise ValueError(f"{len(found)} class folders in {images}, {row.classes} expected: is the download whole?")
    return [], [], items


def class_items(folder, names, key=None):
    """Items of folder/<class>/; the label is the class folder's rank, by key, in `names`: {class folder: name}."""
    found = files.class_folders(folder)
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


def remarks(root):
    """What one should know of a folder of one's own pictures, as lines: what is left out, and why; what the test is."""
    parts = layout(root)
    used = {path for part in parts.values() for paths in files.class_folders(part).values() for path in paths}
    pictures, others = files.walk(root)
    others = [path for path in others if path != os.path.join(root, NAMES)]
    beside = [path for path in pictures if path not in used]
    lines = [f"left out: {files.kinds(others)}, not read as pictures, first {others[0]}"] if others else []
    lines += [f"left out: {files.kinds(beside)}, outside of the class folders, first {beside[0]}"] if beside else []
    return lines + ["no folder test/: val/ is the test"] * ("val" in parts and "test" not in parts)


def check_pictures(items, rank=0, world=1):
    """Reads each picture once, as people see it. Raises ValueError that names all which cannot be read.

    why before training: else it would end at the first one, minutes or hours later. Each process reads its share.
    """
    faults = files.unreadable([path for path, *_ in items[rank::world]], lambda path: read_image(path, own=True))
    if faults:
        raise ValueError(f"{len(faults)} of {len(items)} pictures cannot be read: replace or remove them\n"
                         + "\n".join(faults))


# ---- how pictures are read -----------------------------------------------------------------------------------

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


# ---- from pictures to tensors --------------------------------------------------------------------------------

def train_transform(preprocess):
    """CLIP's test transform -> the one for training: random crop and flip in place of resize and centre crop."""
    _, centre_crop, *tail = preprocess.transforms       # tail: to RGB, to tensor, minus mean over deviation
    crop = transforms.RandomResizedCrop(centre_crop.size, scale=(0.08, 1),
                                        interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tail])


class Pictures(Dataset):
    """Items as tensors: `pictures[i]` -> (image (3, R, R), label).

    With a seed, for training, the index is a pair `(epoch, i)`, and the crop depends only on (seed, epoch, i), not on
    the batch size, the workers or the number of processes. own: as people see them, `as_seen`.
    """

    def __init__(self, items, transform, seed=None, own=False):
        self.items, self.transform, self.seed, self.own = items, transform, seed, own

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        epoch, i = index if isinstance(index, tuple) else (0, index)
        path, label, _ = self.items[i]
        image = read_image(path, self.own)
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            # why not torch.manual_seed: it seeds CUDA too, which fork_rng(devices=[]) does not restore
            torch.default_generator.manual_seed(_mix(self.seed, epoch, i))
            return self.transform(image), label

    def collate(self, samples):
        """Samples -> images (n, 3, R, R), labels (n,); n is 0 where a small last batch has no image for this rank."""
        if samples:
            return default_collate(samples)
        image, _ = self[0]           # why: only the transform knows the resolution R
        return image.new_empty(0, *image.shape), torch.empty(0, dtype=torch.int64)


class Batches(Sampler):
    """This rank's share of each batch of some epochs, one after the other, as lists of `(epoch, i)`.

    The order of the images depends only on (seed, epoch). All ranks get the same number of batches; in the last,
    smaller one of an epoch the share of a rank may be empty.
    why all epochs in one: workers read on from epoch to epoch, while the model still learns from what they have read.
    """

    def __init__(self, n, batch_size, seed, rank=0, world=1, epochs=(0,)):
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.epochs, self.per_epoch = epochs, -(-n // batch_size)

    def __len__(self):
        return len(self.epochs) * self.per_epoch

    def __iter__(self):
        for epoch in self.epochs:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(self.n, generator=generator).tolist()
            for start in range(0, self.n, self.batch_size):
                batch = order[start:start + self.batch_size]
                yield [(epoch, i) for i in batch[self.rank::self.world]]


def _mix(*numbers):
    """One seed made of several numbers, the same on every machine. why 32 bits: torch's CPU generator uses no more."""
    return zlib.crc32(repr(numbers).encode())


def train_loader(pictures, batches, workers=0, device="cpu"):
    """Batches of tensors. Workers live as long as the iterator; the indices tell them the epoch."""
    if workers < 0:
        raise ValueError(f"--workers must not be negative, got {workers}")
    return DataLoader(pictures, batch_sampler=batches, collate_fn=pictures.collate, num_workers=workers,
                      pin_memory=torch.device(device).type == "cuda",
                      generator=torch.Generator())     # why: otherwise an iterator draws from the global generator


def test_loader(pictures, batch_size, workers=0, device="cpu", rank=0, world=1):
    """Every picture once, over all ranks: no padding, so that counts add up to len(pictures)."""
    share = range(rank, len(pictures), world)
    batches = [share[start:start + batch_size] for start in range(0, len(share), batch_size)]
    return train_loader(pictures, batches, workers, device)


# ---- the script ----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--download leaves alone what is there. If --check then finds images missing, an earlier download was\n"
               "interrupted: remove the picture folder and start again. sun397 is 37 GB. The pictures of imagenet,\n"
               "stanford_cars and ucf101 must be downloaded by hand: --download says where.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, metavar="NAME", required=True, help=", ".join(DATASETS))
    add("--data-root", default=default_root(), help="$DATA_ROOT or ./data unless given; one root holds all datasets, "
        "in CoOp's layout or torchvision's (for `folder`: the folder of your pictures itself)")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--download", action="store_true", help="get what is not there yet, then check")
    mode.add_argument("--check", action="store_true", help="count, look for missing files, and decode every picture "
                      "once; the exit code is 0 if all is as expected, else 1")
    return parser.parse_args(argv)


def main(args):
    """Downloads what is missing where that is asked for, checks all; exits with 1 where anything is not as expected."""
    name, root = args.dataset, files.absolute(args.data_root)
    try:
        if args.download:
            files.download(name, DATASETS[name], root)
        lists = read_lists(name, root)
        for line in remarks(root) if name == "folder" else ():
            print(line)
        fine = files.check(name, DATASETS[name], root, *lists, functools.partial(read_image, own=name == "folder"))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    sys.exit(not fine)


if __name__ == "__main__":
    main(parse_args())
