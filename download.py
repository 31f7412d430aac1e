"""Where the files of a data set lie, whether they are all there, and how to get them. It reads no list itself.

    python data.py --dataset NAME --data-root DIR --download
    python data.py --dataset NAME --data-root DIR --check

`row` is a data set's line in data.DATASETS. Pictures come by torchvision where it can; CoOp's split files and the
class names of ImageNet from addresses whose content is fixed by a commit, and checked.
"""

import argparse
import collections
import hashlib
import http.client
import os
import sys
import urllib.request
from multiprocessing.pool import ThreadPool

import torchvision

GITHUB = "https://raw.githubusercontent.com"
SPLITS = (f"{GITHUB}/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a/splits",
          f"{GITHUB}/MarcLafon/gallop/f75999e1601cc66e44bc6ff6faa8612021055ff3/gallop/datasets/files")
CLASSNAMES = (f"{GITHUB}/ChongQingNoSubway/Prompt-OT/f042f02394f9f38c7d4e4ff2dca2a6f27bb2ae59",)
CLASSNAMES_DIGEST = "89e0b642c6697a3a43a06a2bb65f9fefb3ca295ccc5f4ba9ce385f1a3a58c629"

TORCHVISION = {"caltech101": "Caltech101", "oxford_pets": "OxfordIIITPet", "oxford_flowers": "Flowers102",
               "food101": "Food101", "fgvc_aircraft": "FGVCAircraft", "sun397": "SUN397", "dtd": "DTD",
               "eurosat": "EuroSAT"}
BY_HAND = {
    "imagenet": "register at https://image-net.org, get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, unpack "
                "them into one folder per class",
    "stanford_cars": "the authors' page, ai.stanford.edu/~jkrause/cars, is gone; copies of cars_train and cars_test "
                     "are in use elsewhere",
    "ucf101": "the middle frames of the videos, UCF-101-midframes.zip, are file 10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O on "
              "Google Drive, where CoOp's authors put them"}

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


# ---- where ---------------------------------------------------------------------------------------------------

def absolute(root):
    """The root as an absolute path, ~ resolved."""
    return os.path.abspath(os.path.expanduser(root))


def locate(row, root):
    """The layout found under `root` -> folder of the lists, picture folder. The first one where there is none."""
    layouts = [(absolute(os.path.join(root, home)), absolute(os.path.join(root, home, images)))
               for home, images in row.layouts]
    return next((layout for layout in layouts if os.path.isdir(layout[1])), layouts[0])


def tree(name, row, root):
    """What must lie where, for error messages."""
    root = absolute(root)
    layouts = ["".join(f"\n  {os.path.join(root, home, file)}" for file in
                       (*row.lists, os.path.join(images, row.pictures))) for home, images in row.layouts]
    by_hand = f"\nthe pictures: {BY_HAND[name]}" if name in BY_HAND else ""
    fetch = f"\n{'the list' if by_hand else 'to get it'}: python data.py --dataset {name} --data-root {root} --download"
    return "expected:" + "\nor:".join(layouts) + by_hand + (fetch if row.lists else "")


def missing(paths):
    """Those of the paths that are not there. One look at each folder, none at each file."""
    folders, gone = {}, []
    for path in paths:
        folder, file = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in folders[folder]:
            gone.append(path)
    return gone


def class_folders(folder):
    """The picture folder of ImageNet's kind: {class folder: paths of its pictures}, all sorted.

    One look at each class folder and none at each file: ImageNet has 1.3 million.
    """
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes and _pictures(folder):
        raise ValueError(f"{folder} is flat: {len(_pictures(folder))} pictures and no class folder; move each into "
                         f"{folder}/<class>/ (ImageNet's development kit says which class each validation picture has)")
    if not classes:
        raise FileNotFoundError(f"there is no class folder in {folder}")
    found = {name: _pictures(f"{folder}/{name}") for name in classes}
    for name, paths in found.items():
        if not paths:
            raise FileNotFoundError(f"there is no picture in {folder}/{name}")
    return found


def _pictures(folder):
    return [f"{folder}/{file}" for file in sorted(os.listdir(folder))
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")]


def is_published(row, root):
    """Whether the split file found is CoOp's, byte for byte; None where a data set has no split file."""
    if row.digest is None:
        return None
    with open(f"{locate(row, root)[0]}/{row.lists[0]}", "rb") as file:
        return digest(file.read(), like=row.digest) == row.digest


def digest(content, like):
    """sha256 of some bytes, or git's blob id where `like` has that one's 40 digits."""
    if len(like) == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


# ---- getting -------------------------------------------------------------------------------------------------

def fetch(addresses, path, expected):
    """Writes to `path` what the first address gives whose content has the digest `expected`.

    The file appears under its name when it is complete and right, or not at all. Raises OSError with what went
    wrong at each address.
    """
    faults = []
    for address in addresses:
        try:
            with urllib.request.urlopen(address, timeout=60) as response:
                content = response.read()
            if digest(content, like=expected) != expected:
                raise ValueError(f"{len(content)} bytes, digest {digest(content, like=expected)}, expected {expected}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(f"{path}.part", "wb") as file:
                file.write(content)
            return os.replace(f"{path}.part", path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            faults.append(f"\n  {address}: {type(error).__name__}: {error}")
    raise OSError(f"could not get {path} from" + "".join(faults))


def download(name, row, root):
    """Gets what is not there yet: pictures first, since their layout decides where the lists go."""
    if not row.lists:
        raise ValueError(f"{name} needs no download")
    root = absolute(root)
    if name in BY_HAND:
        print(f"{name}: the pictures must be got by hand\n" + tree(name, row, root), flush=True)
    elif not os.path.isdir(locate(row, root)[1]):
        print(f"{name}: torchvision downloads the pictures into {root}", flush=True)
        try:
            getattr(torchvision.datasets, TORCHVISION[name])(root, download=True)
        except ModuleNotFoundError:
            pass    # why: all is there by then; Flowers102 goes on to read labels, with scipy, that the split file has
        except (OSError, RuntimeError) as error:
            raise OSError(f"{name}: torchvision could not download the pictures: {error}\n" + tree(name, row, root))
    home, _ = locate(row, root)
    for file in row.lists:
        path = f"{home}/{file}"
        if os.path.exists(path):
            print(f"{path} is there already")
        elif name == "imagenet" or row.digest:
            addresses, expected = (CLASSNAMES, CLASSNAMES_DIGEST) if name == "imagenet" else (SPLITS, row.digest)
            fetch([f"{address}/{file}" for address in addresses], path, expected)
            print(f"{path} downloaded, digest as expected")


# ---- checking ------------------------------------------------------------------------------------------------

def check(name, row, root, lists, class_names, read_image):
    """Looks at every picture that the lists name, and prints what it finds -> whether all is as expected."""
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
        bad = _unreadable([path for path, *_ in items if path not in gone], read_image)
        for fault in bad[:5]:
            print(fault)
        if bad:
            print(f"{len(bad)} of {len(items)} {part} images cannot be read")
        fine = fine and right and not gone and not bad
    print("all as expected" if fine else tree(name, row, root))
    return fine


def _unless(right, expected):
    return "" if right else f" (expected {expected})"


def _unreadable(paths, read_image):
    """What is wrong with each picture that cannot be decoded to its end."""
    def fault(path):
        try:
            read_image(path)
        except ValueError as error:
            return str(error)

    faults = []
    with ThreadPool(os.cpu_count()) as pool:       # why threads: Pillow decodes outside Python's lock
        for count, found in enumerate(pool.imap(fault, paths, chunksize=16), start=1):
            faults += [found] if found else []
            if sys.stderr.isatty() and (count % 100 == 0 or count == len(paths)):
                print(f"\r{count} of {len(paths)} pictures read", end="\n" * (count == len(paths)), file=sys.stderr)
    return faults


def main(rows, read_lists, read_image):
    parser = argparse.ArgumentParser(
        description="Downloads a data set and checks it.",
        epilog="--download leaves alone what is there. If --check then finds images missing, an earlier download was "
               "interrupted: remove the picture folder and start again. sun397 is 37 GB. The pictures of imagenet, "
               "stanford_cars and ucf101 must be got by hand: --download says where.")
    add = parser.add_argument
    add("--dataset", choices=rows, metavar="NAME", required=True, help=", ".join(rows))
    add("--data-root", default=os.environ.get("DATA_ROOT", "data"), help="$DATA_ROOT or ./data unless given; one root "
        "holds all data sets, in CoOp's layout or torchvision's (for `folder`: the folder of your pictures itself)")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--download", action="store_true", help="get what is not there yet, then check")
    mode.add_argument("--check", action="store_true", help="count, look for missing files, and decode every picture "
                      "once; the exit code is 0 if all is as expected, else 1")
    args = parser.parse_args()
    row = rows[args.dataset]
    try:
        if args.download:
            download(args.dataset, row, args.data_root)
        lists, class_names = read_lists(args.dataset, args.data_root)
        sys.exit(not check(args.dataset, row, args.data_root, lists, class_names, read_image))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
