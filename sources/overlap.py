"""Which pictures of one set are also in another one, as the same file or with the same content."""

import collections
import os

from clip.download import digest


def shared(paths, others):
    """Those of some paths that have the content of one of the others. That of a drawn picture is its name."""
    by_size = collections.defaultdict(list)
    for other in others:
        by_size[size(other)].append(other)

    known = {}                                             # {size: contents of the others that have it}
    found = []
    for path in paths:
        n_bytes = size(path)
        if n_bytes not in by_size:                         # why: most pictures then need not be read
            continue
        if n_bytes not in known:
            known[n_bytes] = {content(other) for other in by_size[n_bytes]}
        if content(path) in known[n_bytes]:
            found.append(path)
    return found


def size(path):
    """The bytes of a file; 0 of a drawn picture, which has none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def content(path):
    """A digest of a file; the name of a drawn picture."""
    return digest(path) if os.path.isfile(path) else path
