"""All processes of a run train the same thing, or none does."""

import contextlib
import hashlib

from clip.loader import tensors_hash  # before torch: it bounds how long torch's threads wait

import torch.distributed as dist

from harness import runs
from harness.checkpoints import is_done
from sources.overlap import content

# Options that may be others on another machine; files are compared by what was read of them.
MAY_DIFFER = (runs.IGNORED_WHEN_COMPARING - {"amp"}) | {"model", "start_from"}


@contextlib.contextmanager
def together():
    """Around what the processes of a run do. They part in the end, also where it fails."""
    try:
        yield
    except BaseException:
        # why: gloo's threads would abort the program; why not NCCL's: it may wait for processes that are gone
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def facts(fingerprint, learned, epochs_done):
    """What all processes must share, {what: value}.

    fingerprint: as last.pt has it; learned: {name: tensor}.
    """
    options = {f"--{name.replace('_', '-')}": value for name, value in fingerprint["config"].items()
               if name not in MAY_DIFFER}
    pictures = {f"{part} pictures": digest for part, digest in fingerprint["data"].items()}
    return {**options, **pictures, "classes": fingerprint["class_names"],
            "CLIP weights": fingerprint["clip_sha256"], "epochs done": epochs_done,
            "learned tensors": tensors_hash(learned)}


def facts_of(run):
    """The `facts` of a run, what its pictures hold, and whether its test is done.

    why the last: else some processes would make the test, and wait for the others.
    """
    return {**facts(run.fingerprint, run.model.learned_state(), run.epochs_done),
            "content of the training pictures": contents(run.train_set),
            "content of the test pictures": contents(run.test_set), "test done": is_done(run)}


def contents(items, most=2_000):
    """A hash of what the files of some items hold; of many, of every n-th, so that at most `most` are read.

    why: on another machine equal names may be other files.
    """
    found = hashlib.sha256()
    for path, *_ in items[:: 1 + len(items) // most]:
        found.update(content(path).encode())
    return found.hexdigest()


def check_agreement(mine):
    """Raises ValueError, on every process, with the first of their `facts` in which processes differ."""
    all_facts = [None] * dist.get_world_size()
    dist.all_gather_object(all_facts, mine)
    first, *others = all_facts
    for rank, other in enumerate(others, 1):
        for what in {**first, **other}:
            if first.get(what) != other.get(what):
                raise ValueError(f"the processes differ in {what}: {shown(first.get(what))} in process 0, "
                                 f"{shown(other.get(what))} in process {rank}; give all the same options and "
                                 "data")


def shown(value):
    """A value in a few characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "..."
