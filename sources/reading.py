"""How pictures are read: from a path to a PIL image, with one plain error for all that can go wrong."""

import contextlib
import functools
import os

from sources import critters, files
from sources.seen import as_seen, open_image


def read_image(path, as_people_see=False):
    """The picture at `path`, or the one that critters draws for it -> PIL image.

    It keeps its own mode: CLIP converts to RGB after the crop, so that palettes are resized as CLIP resizes
    them. as_people_see: turned and flattened by `as_seen`.
    Raises ValueError, naming the file, where it is not there or cannot be decoded to its end.
    """
    if critters.is_path(path):
        return critters.read(path)
    with named_errors(path):
        if os.path.exists(path) and not os.path.isfile(path):      # why: a pipe or a device may never end
            raise OSError("no regular file")
        # why not Image.open(path): of a file that it opens itself, Pillow mixes up rows of some turned TIFFs
        with open(path, "rb") as file, open_image(file) as image:
            image.load()
            return as_seen(image) if as_people_see else image


@contextlib.contextmanager
def named_errors(picture):
    """Raises ValueError, which names the picture, for all that goes wrong while it is read."""
    try:
        yield
    except Exception as error:   # why: Pillow raises OSError, SyntaxError, ValueError and its own, by format
        raise ValueError(f"cannot read picture {picture}: {type(error).__name__}: {error}") from error


def check_pictures(items, rank=0, world=1):
    """Reads each picture once, as people see it. Raises ValueError that names all which cannot be read.

    Each process reads its share. why before training: else it would end at the first one, minutes or hours
    later.
    """
    paths = [path for path, *_ in items[rank::world]]
    faults = files.unreadable(paths, functools.partial(read_image, as_people_see=True))
    if faults:
        raise ValueError(f"{len(faults)} of {len(items)} pictures cannot be read: replace or remove them\n"
                         + "\n".join(faults))
