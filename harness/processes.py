"""The processes that work together: what their environment says of them, and which must not outlive which."""

import os
import threading
import time

# The variable in which a program gives its process id to the commands that must not outlive it.
STARTED_BY = "SOTGLP_STARTED_BY"


# ---- what the environment says -----------------------------------------------------------------------------

def rank_and_world():
    """The number of this process and how many there are, from RANK and WORLD_SIZE; 0, 1 alone.

    Raises ValueError where the environment says that there are others, but not how to find them.
    """
    world = from_environment("WORLD_SIZE", 1)
    if world < 2:
        return 0, 1

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE={world} says that {world} processes work together, but "
                         f"{', '.join(missing)} is not set: start them with torchrun, or unset WORLD_SIZE")
    from_environment("MASTER_PORT")                        # why: torch would end in a traceback
    rank = from_environment("RANK")
    if rank >= world:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world}")
    return rank, world


def from_environment(name, default=0):
    """A number that torchrun sets, such as RANK. Raises ValueError for what is no whole number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment is not the number that torchrun sets: unset it")
    return int(text)


def under_torchrun():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_torchrun():
    """Raises ValueError where torchrun started a command several times that works as one process."""
    if under_torchrun() and from_environment("WORLD_SIZE", 1) > 1:
        raise ValueError("this command works as one process: start it with python, not with torchrun")


def alone():
    """The environment for a command that works alone, whatever this process belongs to."""
    of_a_group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    return {name: value for name, value in os.environ.items() if name not in of_a_group}


# ---- their end ---------------------------------------------------------------------------------------------

def end_with_parent(parent=None):
    """Ends this process when its parent is gone: the one that it has now, or the one of this id.

    why: ranks would go on writing after torchrun was killed.
    """
    parent = parent or os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
