"""The sets of out-of-distribution (OOD) pictures: where they are, and what looks wrong about them."""

import os

from sources import DATASETS, critters
from sources.files import absolute
from sources.listing import left_out, walk
from sources.overlap import shared

# Each OOD set of ImageNet: its number of pictures, and its folder in one of HOMES, folders of --data-root.
BENCHMARK = {
    "iNaturalist": (10_000, ("iNaturalist",)),
    "SUN": (10_000, ("SUN",)),
    "Places": (10_000, ("Places",)),
    "Textures": (5_640, ("dtd/images", "dtd/dtd/images", "Texture/images")),
}
HOMES = ("ood_data", "", "ImageNet_OOD_dataset")
SOURCES = ("get iNaturalist, SUN and Places from "
           "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/<set>.tar.gz; "
           "Textures is all of DTD: python data.py --dataset dtd --data-root DIR --download")


def ood_sets(dataset, root, own=None):
    """The OOD sets that go with a dataset -> {name: items}, items as in data.py with label -1.

    own: {name: folder}, one's own sets in their place. Raises FileNotFoundError that names every set without
    pictures.
    """
    if own:
        folders = {name: [absolute(top)] for name, top in own.items()}
    elif dataset == "critters":
        return {name: [(path, label, "") for path, label in critters.paths(name)]
                for name in critters.OOD_SETS}
    elif dataset == "imagenet":
        folders = {name: [absolute(os.path.join(root, home, top)) for home in HOMES for top in tops]
                   for name, (_, tops) in BENCHMARK.items()}
    else:
        raise ValueError(f"no OOD sets are known to go with {dataset}: name folders of pictures by "
                         "--ood-root NAME=DIR")

    found = {name: first_with_pictures(candidates) for name, candidates in folders.items()}
    empty = [f"\n{name}: no pictures in {', '.join(folders[name])}" for name in found if not found[name]]
    if empty:
        published = "" if own else f"\n{SOURCES}"
        raise FileNotFoundError("OOD sets are missing" + "".join(empty) + published)
    return found


def first_with_pictures(folders):
    """The pictures, as items, of the first of these folders that has any; none where no folder has."""
    for top in filter(os.path.isdir, folders):
        pictures, others, system = walk(top)
        for text in left_out(others, system):
            print(f"{top}: left out {text}", flush=True)
        if pictures:
            return [(path, -1, "") for path in pictures]
    return []


def count_warnings(sets):
    """One line for each set of the ImageNet benchmark, ID included, whose size is not the published one."""
    expected = {name: count for name, (count, _) in BENCHMARK.items()}
    expected["ID"] = DATASETS["imagenet"].sizes[2]

    warnings = []
    for name, items in sets.items():
        n = len(items)
        published = expected.get(name, n)                  # one's own set has no published size
        if n == published:
            continue
        reason = "others lie among them, or it is the whole dataset, not the benchmark's selection"
        if n < published:
            reason = "some are missing, so an archive may be half unpacked"
        warnings.append(f"warning: {name} has {n:,} pictures, the benchmark {published:,}: {reason}; "
                        "do not compare with published numbers")
    return warnings


def overlap_warnings(sets, trained):
    """One line for each OOD set that holds in-distribution pictures; trained: paths of those trained on."""
    inside = [path for path, *_ in sets["ID"]] + trained
    warnings = []
    for name, items in sets.items():
        if name == "ID":
            continue
        paths = shared([path for path, *_ in items], inside)
        if paths:
            warnings.append(f"warning: {name} holds {len(paths)} pictures that are in-distribution, first "
                            f"{paths[0]}: its numbers are not those of an OOD set")
    return warnings
