"""Where pictures come from: the datasets by name, and the lists of their pictures.

critters.py draws the embedded dataset, folders.py reads a folder for each class, files.py knows where
published files are and how to get them. A picture is an item `(path, label, class name)` everywhere.
"""

import itertools
import json
from typing import NamedTuple

from sources import critters, files, folders
from sources.listing import check_regular


class Row(NamedTuple):
    """What is known of a dataset before its files are read."""
    template: str              # the hand-written prompt of zero-shot CLIP, as CoOp has it
    classes: int = None
    sizes: tuple = None        # train, val, test images
    zero_shot: float = None    # published accuracy of the template with ViT-B/16, percent (GalLoP's README)
    pictures: str = ""         # what the picture folder contains
    layouts: tuple = ()        # (folder of the lists, picture folder in it): CoOp's, then torchvision's
    lists: tuple = ()          # files that say what the pictures show
    digest: str = None         # of CoOp's split file: sha256, or git's blob id (40 digits)
    as_people_see: bool = False     # whether pictures are read `as_seen`; else as CLIP does


DATASETS = {
    "critters": Row("a photo of a {}.", len(critters.CLASSES),
        tuple(len(critters.CLASSES) * count for count in critters.POOL.values())),
    "folder": Row("a photo of a {}.", layouts=(("", ""),), as_people_see=True,
        pictures="{train,val,test}/<class>/*.jpg (val or test may be absent)   or only <class>/*.jpg   "
                 "(remove the folder of a class without pictures)"),
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
    "fgvc_aircraft": Row("a photo of a {}, a type of aircraft.", 100, (3334, 3333, 3333), 24.8,
        "<7 digits>.jpg",
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
# The datasets without training images.
VARIANTS = [name for name, row in DATASETS.items() if row.sizes and not row.sizes[0]]


# ---- lists of items ----------------------------------------------------------------------------------------

def read_lists(name, root, seed=1, held_out=None):
    """All that a dataset lists -> {"train": items, "val": items, "test": items}, class names.

    It is not asked whether the pictures exist. Raises ValueError for lists that are wrong, FileNotFoundError
    for missing ones.
    """
    if name not in DATASETS:
        raise ValueError(f"no dataset is called {name!r}; there are {', '.join(DATASETS)}")
    if held_out is not None and name != "folder":
        raise ValueError(f"--held-out is for one's own pictures, --dataset folder; {name} has a test split")

    readers = {"critters": _critters, "imagenet": folders.imagenet_lists, "fgvc_aircraft": _aircraft,
               **dict.fromkeys(VARIANTS, folders.variant_lists)}
    read = readers.get(name, _split)
    row = DATASETS[name]
    try:
        home, images = files.locate(row, root) if row.layouts else ("", "")
        if name == "folder":
            parts = folders.own_lists(images, seed, held_out)
        else:
            parts = read(row, home, images)
        lists = dict(zip(folders.PARTS, parts))
    except FileNotFoundError as error:
        what = f"there is no {error.filename}" if error.filename else error
        raise FileNotFoundError(f"{name}: {what}\n" + files.tree(name, row, root)) from None
    return lists, _class_names(name, lists)


def choose_classes(lists, class_names, classes):
    """Keeps some of the classes, with labels from 0 -> lists, class names.

    classes: "all", "base", the first ceil(C / 2) of them, or "new", the others.
    """
    C = len(class_names)
    half = (C + 1) // 2
    if classes != "all" and half < 2:
        raise ValueError(f"{C} classes have too few base classes to train on: base and new classes need "
                         "three or more")
    first, end = {"all": (0, C), "base": (0, half), "new": (half, C)}[classes]

    kept = {}
    for part, items in lists.items():
        kept[part] = [(path, label - first, class_name) for path, label, class_name in items
                      if first <= label < end]
    return kept, class_names[first:end]


def _class_names(name, lists):
    """Class names in the order of their labels. Two classes may share one: ImageNet has two missiles."""
    names = {}
    for path, label, class_name in itertools.chain(*lists.values()):
        if names.setdefault(label, class_name) != class_name:
            raise ValueError(f"{name}: label {label} is {names[label]!r} and, for {path}, {class_name!r}")

    labels = sorted(names)
    if labels != list(range(max(1, len(labels)))):
        raise ValueError(f"{name}: labels should run from 0 without a gap, found {labels[:3]} ... "
                         f"{labels[-1:]}")
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
    check_regular(path)
    with open(path, encoding="utf-8") as file:
        try:
            parts = json.load(file)
            return [[(f"{images}/{picture}", int(label), str(class_name))
                     for picture, label, class_name in parts[part]] for part in folders.PARTS]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} should hold lists train, val and test of [path, label, class name]: "
                             f"{type(error).__name__}: {error}") from error


def _aircraft(row, home, images):
    """The dataset's own lists, lines `<7 digits> <variant>`; the label is the variant's line in variants.txt.

    differs: the released code trains on train and val (6,667 images), the literature on train (3,334).
    """
    labels = {variant: label for label, variant in enumerate(folders.lines(f"{home}/variants.txt"))}
    for part in folders.PARTS:
        path = f"{home}/images_variant_{part}.txt"
        names = folders.read_names(path)
        unknown = set(names.values()) - set(labels)
        if unknown:
            raise ValueError(f"{path}: {min(unknown)!r} is none of the {len(labels)} variants of "
                             "variants.txt")
        yield [(f"{images}/{number}.jpg", labels[variant], variant) for number, variant in names.items()]


def split_matches_published(name, root):
    """Whether the split file is CoOp's, byte for byte; None where a dataset has no split file."""
    return files.is_published(DATASETS[name], root)
