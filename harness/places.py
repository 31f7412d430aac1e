"""Where results are written. A run's folder has one writer, and somebody's own files stay as they are."""

import contextlib
import errno
import os
import re
import time
from pathlib import Path

from harness import runs
from sources import DATASETS, folders, listing

# What only the process with the lock of a run's folder writes, and what other commands write beside it.
LOCKED = ("last.pt", "log.jsonl", "result.json", "per_class.csv", "confusion.csv")
BESIDE = ("ood.json", "weights.json",
          *(f"evaluation{which}.{kind}" for which in ("", "-new", *(f"-{name}" for name in DATASETS))
            for kind in ("json", "csv")))
# What is made from last.pt, and goes when another run takes its place.
REPORTS = ("result.json", "per_class.csv", "confusion.csv", *BESIDE)

# What a file system without locks answers, such as some NFS and Lustre mounts.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


# ---- the folder of a run -----------------------------------------------------------------------------------

def lock(folder, patience=2.0):
    """Locks a folder for this process, and makes it where there is none -> the file to close in the end.

    Removes what a killed process left half-written. Raises OSError with the number of the process that has
    the lock, and for a file `lock` of somebody's own.
    why lockf: a loader worker inherits a flock and keeps it when its parent is killed, but not this lock.
    """
    check_folder(folder, "--output-dir")
    file = open(Path(folder) / "lock", "a+", errors="replace")
    try:
        wait_for(file, folder, patience)
        os.ftruncate(file.fileno(), 0)
        write_number(file)
    except OSError:
        file.close()
        raise
    remove_halves(folder)
    return file


def write_number(file):
    """Writes which process has the lock. Raises OSError, with the file's name, on a full disk."""
    try:
        # why not print: what it kept back would fail again when the file is closed
        os.write(file.fileno(), str(os.getpid()).encode())
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}") from error


def wait_for(file, folder, patience):
    """Locks a file in which stands, if anything, the number of the process that took it last.

    Raises OSError where that process still has it, and for a file with another content.
    """
    file.seek(0)
    owner = file.read(100)
    if owner and not owner.isdecimal():
        raise OSError(f"{file.name} is no file of this program and would be replaced: name another "
                      "--output-dir")

    start = time.monotonic()
    while True:
        try:
            return lock_file(file)
        except (BlockingIOError, PermissionError):
            # why wait: a process that was just killed needs a moment to be gone
            if time.monotonic() - start > patience:
                raise OSError(f"process {owner or 'unknown'} writes to {folder}: wait for its end, or name "
                              "another --output-dir") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"note: {folder} is on a file system without locks: nothing keeps other processes out "
                  "of it", flush=True)
            return None


def lock_file(file):
    """Locks an open file. Raises BlockingIOError or PermissionError where another process has it."""
    if os.name == "nt":
        import msvcrt
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_halves(folder):
    """Removes what a killed process left half-written, see `machine.write_whole`.

    why only files that need the lock: another command may be writing one of the others just now.
    """
    for name in LOCKED:
        for path in Path(folder).glob(f"{name}.tmp*"):
            if re.fullmatch(r"\.tmp\d+", path.suffix):
                path.unlink(missing_ok=True)


def remove(folder, names=REPORTS):
    """Removes what an earlier run left in its folder."""
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)


def check_apart(folder, root, option="--output-dir"):
    """Raises ValueError for a folder of results among the class folders of one's own pictures.

    why: the next command would take it for a class.
    """
    real = Path(os.path.realpath(folder))
    parts = folders.layout(root) if os.path.isdir(root) else {}
    for part in parts.values():
        if real.is_relative_to(os.path.realpath(part)):
            raise ValueError(f"{folder} lies in {part}, whose folders are classes: name an {option} "
                             "elsewhere")


# ---- whether a run stands there already --------------------------------------------------------------------

def check_free(folder, config, resume=False, overwrite=False):
    """Raises ValueError where a run stands in this folder, unless it is to be replaced or can go on.

    The error says in which options that run differs from a configuration, and what to do.
    """
    folder = Path(folder)
    for name in ("lock", *LOCKED):
        listing.check_regular(folder / name)
    can_go_on = (folder / "last.pt").exists()
    is_finished = (folder / "result.json").exists()
    if overwrite or (resume and can_go_on):
        return
    if not (can_go_on or is_finished):
        return check_foreign(folder)

    before = (runs.read_checkpoint(folder) if can_go_on else runs.read_result(folder))["config"]
    differs = runs.changes(before, config)
    own = ["model"]                                        # which `runs.changes` may leave out
    if config["dataset"] == "folder":
        own.insert(0, "data_root")
    for name in own:
        text = f"{name} was {before[name]}, is {config[name]}"
        if before[name] != config[name] and text not in differs:
            differs.append(text)

    others = f"--output-dir {unused(folder)} leaves it alone, --overwrite replaces it"
    if differs:
        raise ValueError(f"{folder} holds a run already, with other options ({'; '.join(differs)}): {others}")
    if not can_go_on:
        raise ValueError(f"{folder} holds a run already, without a last.pt to go on from: {others}")
    shows = "shows its result" if is_finished else "goes on with it"
    raise ValueError(f"{folder} holds a run already, with the same options: python train.py --resume "
                     f"{folder} {shows}; {others}")


def check_foreign(folder):
    """Raises ValueError where a folder without a run holds files that a run would replace."""
    found = [name for name in LOCKED if os.path.lexists(folder / name)]
    if found:
        raise ValueError(f"{folder / found[0]} would be replaced, but no run stands there: --output-dir "
                         f"{unused(folder)} leaves it alone, --overwrite replaces it")


def unused(folder):
    """A folder beside this one that does not exist: runs/a -> runs/a-2."""
    n = 2
    while os.path.exists(f"{folder}-{n}"):
        n += 1
    return f"{folder}-{n}"


def holds_run(folder):
    """Whether a run stands in a folder: a last.pt, a result.json or a log.jsonl that can be read."""
    for read in (runs.read_checkpoint, runs.read_result, runs.read_log):
        with contextlib.suppress(OSError, ValueError):
            if read(folder):
                return True
    return False


# ---- any file or folder that an option names ---------------------------------------------------------------

def check_file(path, option):
    """Makes the folder of a file. Raises ValueError or OSError where the file cannot or must not be written.

    It must not if a run has a file of this name. why before the work: else the user hears of it at the end.
    """
    if os.path.isdir(path) or str(path).endswith("/"):
        raise ValueError(f"{option} {path} is a folder: name a file")
    if {Path(path).name, Path(os.path.realpath(path)).name} & {"lock", *LOCKED, *BESIDE}:
        raise ValueError(f"{option} {path} has the name of a file of a run: give another one")
    if not os.path.exists(path):
        check_folder(Path(os.path.realpath(path)).parent, option)
    elif not os.access(path, os.W_OK):
        raise OSError(f"{option} {path} is read-only: name another file")
    elif os.path.isfile(path):                             # why: pipes and devices are not replaced
        check_folder(Path(os.path.realpath(path)).parent, option)


def check_folder(folder, option):
    """Makes a folder. Raises OSError, with the option that names another, where it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError:                                # why: of a file, which the next line refuses
        pass
    except OSError as error:
        reason = f"{folder} cannot be made ({error.strerror})"
        raise OSError(f"{reason}: name another place by {option}") from error
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise OSError(f"nothing can be written into {folder}: name another place by {option}")
