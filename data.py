"""The images: where they are, which of them are drawn, and how they reach the model. No model is used here.

    python data.py --dataset eurosat --data-root DIR --download      fetch pictures and lists
    python data.py --dataset eurosat --data-root DIR --check         look at every picture that the lists name

Read it from `load` (lists of pictures) and the draws (`few_shot` and its variants) to `Pictures`, `Batches`
and the loaders (tensors). What datasets there are, where their pictures come from, and how a picture is read,
stands in sources/. A picture is an item `(path, label, class name)` everywhere.
"""

import functools
import os
import random
import sys
import zlib

import clip  # before torch: it bounds how long torch's threads wait; else only `preprocess` is used of it

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from harness import machine, processes
from harness.parser import Parser
from sources import DATASETS, choose_classes, files, folders, read_lists, split_matches_published
from sources.reading import read_image

TEST_BATCH = 32      # why no more: the activations of a larger batch leave a processor's cache


# ---- from a name to lists of items -------------------------------------------------------------------------

def default_root():
    """The folder of the datasets where none is named: $DATA_ROOT, else ./data."""
    return os.environ.get("DATA_ROOT", "data")


def find_root(name, given=None):
    """The folder of the datasets as an absolute path. Raises ValueError for one that would not be used."""
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


def load(name, root, shots, seed, sampler="exact", held_out=None, classes="all"):
    """The pictures to train on, to validate with and to test on -> train, val, test, class names.

    Three lists of `(path, label, class name)`, and the names ordered by label, raw: underscores stay.
    shots: images per class, drawn with `seed` by `draw_shots`; None or 0 means all. sampler: "exact" (CoOp's
    k-shot), "up-to" or "proportional" (the released code's). held_out: see `own_lists`, for others None.
    classes: see `choose_classes`; shots are drawn before, so that a class has the same ones in any case.
    Raises FileNotFoundError, with the folder looked in and the tree expected, where anything named is not
    there.
    """
    if (shots or 0) < 0:
        raise ValueError(f"--shots must not be negative, got {shots}")
    lists, class_names = read_lists(name, root, seed, held_out)
    if shots and not lists["train"]:
        raise ValueError(f"{name} has no training images: it is for evaluate.py RUN --on {name}")

    if shots:
        lists = draw_shots(lists, shots, seed, sampler)
    lists, class_names = choose_classes(lists, class_names, classes)
    check_files(name, root, lists)
    return *lists.values(), class_names


def check_files(name, root, lists):
    """Raises FileNotFoundError, with the first one and the tree expected, where pictures are missing."""
    # why: their lists are made from the files, or the pictures are drawn
    always_exist = name.startswith(("critters", "folder", "imagenet"))
    if always_exist:
        return
    for part, items in lists.items():
        gone = files.missing(path for path, *_ in items)
        if gone:
            raise FileNotFoundError(f"{name}: {len(gone)} of {len(items)} {part} images missing, first: "
                                    f"{gone[0]}\n" + files.tree(name, DATASETS[name], root))


# ---- drawing few shots -------------------------------------------------------------------------------------

def draw_shots(lists, shots, seed, sampler):
    """Some training and validation items of each class, and all test items, as {"train", "val", "test"}.

    Validation gets up to min(shots, 4) per class. As in CoOp, a dataset without validation pictures takes
    them from its training part.
    """
    rng = random.Random(seed)              # one stream: train draws first, then validation
    train = SAMPLERS[sampler](lists["train"], shots, rng)
    drawn = set(train)
    pool = lists["val"] or [item for item in lists["train"] if item not in drawn]
    val = up_to(pool, min(shots, 4), rng)
    return {"train": train, "val": val, "test": lists["test"]}


def few_shot(items, shots, seed):
    """Exactly `shots` items per class: CoOp's draw, in CoOp's order of drawing.

    seed: an int, or a random.Random to continue with. Raises ValueError where a class has fewer.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    groups = _by_label(items)
    fewest = min(groups, key=len)
    if len(fewest) < shots:
        raise ValueError(f"class {fewest[0][2]!r} has {len(fewest)} images, fewer than the {shots} shots "
                         "asked for (images held out for the test do not count): "
                         f"--shots {len(fewest)} is the most that every class has, "
                         f"--sampler up-to takes up to {shots} of each class, --shots 0 takes all")
    return [item for group in groups for item in rng.sample(group, shots)]


def up_to(items, shots, seed):
    """Up to `shots` items per class: all of a class that has fewer, else as `few_shot`."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    return [item for group in _by_label(items) for item in rng.sample(group, min(shots, len(group)))]


def proportional(items, shots, seed):
    """shots x classes items in total, each class by its share of the data: the released code's draw.

    differs: the literature's k-shot is `few_shot`. Here a rare class gets few images or none (Caltech101,
    1 shot: 26 of 100 classes). As in scikit-learn's StratifiedShuffleSplit, which the released code calls,
    shares are rounded by largest remainder with ties broken at random; so class counts are its own up to
    ties, the images others.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    groups = _by_label(items)
    total = shots * len(groups)
    if total > len(items):
        raise ValueError(f"{shots} shots of {len(groups)} classes are {total} images, but there are "
                         f"{len(items)}")

    shares, remainders = zip(*(divmod(total * len(group), len(items)) for group in groups))
    by_remainder = sorted(range(len(groups)), key=lambda i: (-remainders[i], rng.random()))
    rounded_up = by_remainder[:total - sum(shares)]

    drawn = []
    for i, group in enumerate(groups):
        count = shares[i] + 1 if i in rounded_up else shares[i]
        drawn += rng.sample(group, count)
    return drawn


SAMPLERS = {"exact": few_shot, "up-to": up_to, "proportional": proportional}


def _by_label(items):
    """The items of each label. Labels come in the order of their first appearance, as in CoOp."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


# ---- from pictures to tensors ------------------------------------------------------------------------------

def train_transform(preprocess):
    """CLIP's test transform -> the one for training: random crop and flip, not resize and centre crop."""
    from torchvision import transforms  # why here: as in clip.preprocess
    _, centre_crop, *tail = preprocess.transforms       # tail: to RGB, to tensor, minus mean over deviation
    crop = transforms.RandomResizedCrop(centre_crop.size, scale=(0.08, 1),
                                        interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tail])


def to_tensor(image, transform, name):
    """transform(image). Raises ValueError, with the picture's name, where the memory does not suffice."""
    try:
        return transform(image)
    except MemoryError as error:     # which has no words of its own
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"out of memory at picture {name} of {size}") from error


class Pictures(Dataset):
    """Items as tensors: `pictures[i]` -> (image (3, R, R), label).

    With a seed, for training, the index is a pair `(epoch, i)`, and the crop depends only on (seed, epoch,
    i), not on the batch size, the workers or the number of processes. as_people_see: as in `read_image`.
    """

    def __init__(self, items, transform, seed=None, as_people_see=False):
        self.items = items
        self.transform = transform
        self.seed = seed
        self.as_people_see = as_people_see

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        epoch, i = index if isinstance(index, tuple) else (0, index)
        path, label, _ = self.items[i]
        image = read_image(path, self.as_people_see)
        if self.seed is None:
            return to_tensor(image, self.transform, path), label

        with torch.random.fork_rng(devices=[]):
            # why not torch.manual_seed: it seeds CUDA too, which fork_rng(devices=[]) does not restore
            torch.default_generator.manual_seed(_mix(self.seed, epoch, i))
            return to_tensor(image, self.transform, path), label

    def collate(self, samples):
        """Samples -> images (n, 3, R, R), labels (n,); n is 0 where a last batch has none for this rank."""
        if samples:
            return default_collate(samples)
        image, _ = self[0]           # why: only the transform knows the resolution R
        return image.new_empty(0, *image.shape), torch.empty(0, dtype=torch.int64)


class Batches(Sampler):
    """This rank's share of each batch of some epochs, one after the other, as lists of `(epoch, i)`.

    The order of the images depends only on (seed, epoch). All ranks get the same number of batches; in the
    last, smaller one of an epoch the share of a rank may be empty.
    why all epochs in one: workers read on from epoch to epoch, while the model still learns from what they
    have read.
    """

    def __init__(self, n, batch_size, seed, rank=0, world=1, epochs=(0,)):
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epochs = epochs
        self.per_epoch = -(-n // batch_size)

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
    """One seed made of several numbers, the same on every machine."""
    # why 32 bits: torch's CPU generator uses no more
    return zlib.crc32(repr(numbers).encode())


def train_loader(pictures, batches, workers=0, device="cpu"):
    """Batches of tensors. Workers live as long as the iterator; the indices tell them the epoch."""
    if workers < 0:
        raise ValueError(f"--workers must not be negative, got {workers}")
    if workers:
        # why: where shared memory is full this fails in one line, the loader in many
        torch.multiprocessing.Lock()
    # why a generator: otherwise an iterator draws from the global one
    return DataLoader(pictures, batch_sampler=batches, collate_fn=pictures.collate, num_workers=workers,
                      pin_memory=torch.device(device).type == "cuda", worker_init_fn=end_with_parent,
                      generator=torch.Generator())


def end_with_parent(worker):
    """In each process that reads pictures: it ends when its parent is gone, even by SIGKILL."""
    processes.end_with_parent()


def test_loader(pictures, batch_size, workers=0, device="cpu", rank=0, world=1):
    """Every picture once, over all ranks: no padding, so that counts add up to len(pictures)."""
    share = range(rank, len(pictures), world)
    batches = [share[start:start + batch_size] for start in range(0, len(share), batch_size)]
    return train_loader(pictures, batches, workers, device)


def train_batches(items, dataset, preprocess, batches, seed, workers=0, device="cpu"):
    """The `train_loader` of a dataset's pictures, read as its row says, cropped and flipped at random."""
    pictures = Pictures(items, train_transform(preprocess), seed, DATASETS[dataset].as_people_see)
    return train_loader(pictures, batches, workers, device)


def test_batches(items, dataset, resolution, workers=0, device="cpu", rank=0, world=1):
    """The `test_loader` of a dataset's pictures, read as its row says, with CLIP's own transform."""
    as_people_see = DATASETS[dataset].as_people_see
    pictures = Pictures(items, clip.preprocess(resolution), as_people_see=as_people_see)
    return test_loader(pictures, TEST_BATCH, workers, device, rank, world)


# ---- the script --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options."""
    parser = Parser(
        "python data.py --dataset NAME {--download,--check} [options]", __doc__,
        epilog="--download leaves alone what is there. If --check then finds images missing, an earlier\n"
               "download was interrupted: remove the picture folder and start again. sun397 is 37 GB. The\n"
               "pictures of imagenet, stanford_cars and ucf101 must be downloaded by hand: --download says\n"
               "where.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, metavar="NAME", required=True, help=", ".join(DATASETS))
    add("--data-root", default=default_root(), help="$DATA_ROOT or ./data unless given; one root holds all "
        "datasets, in CoOp's layout or torchvision's (for `folder`: the folder of your pictures itself)")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--download", action="store_true", help="get what is not there yet, then check")
    mode.add_argument("--check", action="store_true", help="count, look for missing files, and decode every "
                      "picture once; the exit code is 0 if all is as expected, else 1")
    return parser.parse_args(argv)


@machine.plain_errors("the same command starts anew")
def main(args):
    """Downloads what is missing if asked to, checks all; exits with 1 unless all is as expected."""
    machine.refuse_torchrun()
    name = args.dataset
    row = DATASETS[name]
    root = files.absolute(args.data_root)
    if args.download:
        files.download(name, row, root)

    lists = read_lists(name, root)
    if name == "folder":
        for line in folders.remarks(root):
            print(line)
    read = functools.partial(read_image, as_people_see=row.as_people_see)
    sys.exit(0 if files.check(name, row, root, *lists, read) else 1)


if __name__ == "__main__":
    main(parse_args())
