"""What every script needs of the machine: device, precision, processes, a line of progress, files written whole."""

import contextlib
import csv
import functools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import numpy
import PIL
import torch
import torch.distributed as dist
import torchvision


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# ---- device and precision ----------------------------------------------------------------------------------


def default_model(dataset):
    """The CLIP that goes with a dataset where none is named."""
    return "tiny" if dataset == "critters" else "ViT-B/16"


def default_device():
    """The first GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_amp(device):
    """Mixed precision where none is named: fp16 on a GPU."""
    return "fp16" if device.startswith("cuda") else "off"


def default_workers(device):
    """How many processes read pictures for each that computes, where none are named: up to 8 on a GPU, else none."""
    # why not all CPUs of the machine: a cluster allows a job some of them
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if device.startswith("cuda") else 0


def check_device(name, amp="off"):
    """Raises ValueError for a device that does not exist here, and for a precision that it lacks."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is unknown: give cpu, cuda, or cuda:1 for the second GPU")
    gpus = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    needed = max((device.index or 0) + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cuda" and gpus < needed:
        raise ValueError(f"--device {name} needs {needed} GPU(s), one for each process, torch sees {gpus}: give "
                         "--device cpu, or start fewer processes")
    if usable_amp(amp, name) != amp:
        raise ValueError("--amp fp16 needs a GPU (on CPU it is many times slower than float32): use bf16 or off")


def usable_amp(amp, device):
    """The precision asked for, or "off" where the device lacks it. why: fp16 is many times slower on CPU."""
    return "off" if amp == "fp16" and torch.device(device).type != "cuda" else amp


def precision(amp):
    """What a result says of its precision."""
    return amp if amp in HALF else "float32"


def autocast(amp, device):
    """Mixed precision for the towers; amp: "off", "fp16", "bf16". Similarities, transport and losses opt out of it."""
    return torch.autocast(torch.device(device).type, dtype=HALF.get(amp), enabled=amp in HALF)


@functools.cache
def commit():
    """The git commit of this program, with "-dirty" where files were changed since; None where there is no git."""
    command = ["git", "-C", Path(__file__).parent.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """What the numbers of a run may depend on besides its configuration."""
    gpu = torch.cuda.is_available()
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "pillow": PIL.__version__, "commit": commit(),
            "cuda": torch.version.cuda if gpu else None,
            "gpu": torch.cuda.get_device_name() if gpu else None}

# ---- processes ---------------------------------------------------------------------------------------------


def end_with_parent():
    """Ends this process when its parent is gone. why: ranks would go on writing after torchrun was killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

# ---- what every script prints and writes with --------------------------------------------------------------


def progress(steps, label, rank=0, total=None):
    """Passes the steps on. Where stderr is a terminal, rank 0 shows there how many of the total are done."""
    total = len(steps) if total is None else total
    start = time.time()
    shown = 0.0
    for i, step in enumerate(steps, 1):
        yield step
        if rank == 0 and sys.stderr.isatty() and time.time() - shown > 0.5:
            shown = time.time()
            left = (shown - start) / i * (total - i)
            print(f"\r{label} {i}/{total}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def plain_errors(hint=""):
    """Around a script's `main`: what the user can mend ends the program with one line on stderr and exit code 1.

    Every rank prints its own error. hint: what to do after Ctrl-C, or a function that says it. Nothing printed can stop
    a run: a character that the terminal does not know is escaped, and a closed pipe (`| head -1`) ends the program
    quietly.
    """
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # why: Python flushes once more at its end
        sys.exit(1)
    except KeyboardInterrupt:
        hint = hint() if callable(hint) else hint
        sys.exit(f"{rank}interrupted" + (f": {hint}" if hint else ""))
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"{rank}error: {error}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):    # torch's words on a CPU
            raise
        sys.exit(f"{rank}error: out of memory: {str(error).splitlines()[0]}")


def refuse_empty(parser, args):
    """Ends the program where an option was given an empty text, which else would count as not given."""
    # why not device: it has a message of its own
    for name in (name for name, value in vars(args).items() if value in ("", [""]) and name != "device"):
        parser.error(f"--{name.replace('_', '-')} is empty")


def write_whole(path, write):
    """Calls write(temporary path), then renames the file: a reader never sees half of it."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:                      # why: torch's, on a full disk
        raise OSError(f"cannot write {path}, is the disk full? {str(error).splitlines()[0]}") from error
    except OSError as error:                           # why: a full disk is not named by Python
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text in UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path, rows):
    """Rows, {column: value} each, as a CSV file, whole or not at all."""
    def write(temporary):
        # why surrogateescape: a file name need not be text in any encoding
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            table.writerows(rows)

    write_whole(path, write)


def write_json(path, fields):
    """A dict as indented JSON, whole or not at all."""
    write_text(path, json.dumps(fields, indent=2) + "\n")


def check_writable(folder):
    """Raises OSError for a folder that cannot be written to. why: else it would show when all the work is done."""
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is read-only here: results are written into it, so copy it to where they can be")


def start_processes(args):
    """Joins the processes that torchrun started -> rank, world size, device; alone without torchrun."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if world > 1 else device
        torch.cuda.set_device(device)                    # why: what names no GPU, result.json among it, means this one
    if world > 1:
        end_with_parent()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=60))
    return rank, world, device
