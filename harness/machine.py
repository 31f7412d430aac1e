"""What every script needs of the machine: a device, a precision, a line of progress, files written whole."""

import contextlib
import csv
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import numpy
import PIL
import torch
import torch._functorch.config
import torch.distributed as dist

from harness import streams
from harness.processes import (
    STARTED_BY, end_with_parent, from_environment, rank_and_world, refuse_torchrun, under_torchrun)

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
WAIT = timedelta(minutes=60)    # for the other processes, when they start and in every step


# ---- what follows from the machine where nothing is said ---------------------------------------------------

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
    """How many processes read pictures for each one that computes: up to 8 on a GPU, else none."""
    if not device.startswith("cuda"):
        return 0
    if hasattr(os, "sched_getaffinity"):
        # why not all CPUs of the machine: a cluster gives a job some of them
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return min(8, cpus // max(1, from_environment("LOCAL_WORLD_SIZE", 1)))


def default_text_chunk(device):
    """How many classes go through the text tower at once.

    why more on a GPU: there each chunk costs the launches of its kernels. On a CPU a large chunk costs more,
    because short names are padded to the longest one in it.
    """
    return 1000 if device.startswith("cuda") else 200


# ---- device and precision ----------------------------------------------------------------------------------

def check_device(name, amp="off", n_processes=None):
    """Raises ValueError for a device that does not exist here, and for a precision that it lacks.

    n_processes: how many on this machine need a device each; None: as many as torchrun started here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is unknown: give cpu, cuda, or cuda:1 for the second GPU")
    if usable_amp(amp, name) != amp:
        raise ValueError("--amp fp16 needs a GPU (on CPU it is many times slower than float32): use bf16 "
                         "or off")
    if device.type == "cpu":
        return

    if n_processes is None:
        n_processes = from_environment("LOCAL_WORLD_SIZE", 1)
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    n_needed = max((device.index or 0) + 1, n_processes)
    if n_gpus < n_needed:
        raise ValueError(f"--device {name} needs {n_needed} GPU(s), one for each process, torch sees "
                         f"{n_gpus}: give --device cpu, or start fewer processes")

    # why not torch's is_bf16_supported: it counts an emulation, which is slower than float32
    if amp == "bf16" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"--amp bf16 needs a GPU of compute capability 8.0 or higher, {name} has "
                         f"{major}.{minor}: give --amp fp16 or off")


def use_device(name, amp="off"):
    """Checks and sets up the device of a command that works as one process -> torch.device.

    Raises ValueError as `check_device` and `refuse_torchrun`.
    """
    refuse_torchrun()
    check_device(name, amp, n_processes=1)
    device = torch.device(name)
    if device.type == "cuda":
        return set_up_gpu(device.index or 0)
    return device


def set_up_gpu(index):
    """Makes a GPU the current one, and settles how torch computes on it -> torch.device."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)         # why: calls that name no GPU then mean this one, as in `versions`
    # why: cuDNN's attention plans for about half a second at each new shape, and texts have many lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    # why: --amp off means float32, of which TF32 keeps 10 of 23 bits
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def usable_amp(amp, device):
    """The precision asked for; "off" for fp16 on a CPU. why: there it is many times slower than float32."""
    return "off" if amp == "fp16" and torch.device(device).type != "cuda" else amp


def precision(amp):
    """The precision as a result names it."""
    return amp if amp in HALF else "float32"


def autocast(amp, device):
    """Mixed precision for the towers; amp: "off", "fp16", "bf16". Similarities, transport, losses opt out."""
    return torch.autocast(torch.device(device).type, dtype=HALF.get(amp), enabled=amp in HALF)


def compiled(model):
    """torch.compile of a model whose forward pass alone is in mixed precision.

    why off: else torch computes the backward pass in half precision as a whole, that of the similarities and
    the transport too, and in fp16 their gradients overflow.
    """
    torch._functorch.config.backward_pass_autocast = "off"
    # why: its compiler warns of what is slow by choice, such as float32 without TF32
    warnings.filterwarnings("ignore", module=r"torch\._inductor")
    return torch.compile(model)


def store_matrices(clip_model, amp):
    """Stores the towers' matrices in the precision of amp. why: else each step casts them anew."""
    if amp in HALF:
        clip_model.store_matrices(HALF[amp])


@functools.cache
def commit():
    """The git commit of this program, "-dirty" behind it for changed files; None where there is no git."""
    folder = Path(__file__).parent.parent
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """What the numbers of a run may depend on besides its configuration."""
    has_gpu = torch.cuda.is_available()
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": version("torchvision"), "numpy": numpy.__version__, "pillow": PIL.__version__,
            "commit": commit(),
            "cuda": torch.version.cuda if has_gpu else None,
            "gpu": torch.cuda.get_device_name() if has_gpu else None}


# ---- the device of each process ----------------------------------------------------------------------------

def start_processes(args):
    """Joins the processes that work together, as torchrun starts them -> rank, world size, device.

    Of a machine's GPUs each process takes that of its LOCAL_RANK, or the only one that it sees.
    """
    rank, world = rank_and_world()
    device = torch.device(args.device)
    if device.type == "cuda":
        index = own_gpu(device) if world > 1 else device.index or 0
        device = set_up_gpu(index)
    if world > 1:
        join(rank, world, device)
    return rank, world, device


def own_gpu(device):
    """The index of the GPU of one of several processes. Raises ValueError where nothing says which it is."""
    n_gpus = torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"--device {device} is one GPU for several processes: give --device cuda")
    if n_gpus == 1:                       # why: srun shows each of its tasks one GPU, which then is number 0
        return 0

    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"LOCAL_RANK is not set, and this process sees {n_gpus} GPUs: set it to the number "
                         "of the process on its machine, or show each process one GPU by "
                         "CUDA_VISIBLE_DEVICES")
    index = from_environment("LOCAL_RANK")
    if index >= n_gpus:
        raise ValueError(f"LOCAL_RANK={index} asks for GPU {index} of this machine, torch sees {n_gpus}")
    return index


def join(rank, world, device):
    """Waits until all processes are there. Raises OSError where they do not come."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if under_torchrun():
        end_with_parent()
    else:                                 # why: of processes started by hand one may be missing
        minutes = WAIT.seconds // 60
        print(f"process {rank} of {world} waits at {place} for the others, up to {minutes} minutes",
              flush=True)

    # why gloo: NCCL does not exist on Windows
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    try:
        with streams.signals_end_at_once():
            dist.init_process_group(backend, timeout=WAIT)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"the {world} processes did not meet at {place}: {reason}") from error


# ---- what every script prints and writes with --------------------------------------------------------------

def progress(steps, label, rank=0, total=None):
    """Passes the steps on. Where stderr is a terminal, rank 0 shows there how many of the total are done."""
    total = len(steps) if total is None else total
    start = time.monotonic()
    shown = 0.0                           # when the line was printed last

    for i, step in enumerate(steps, 1):
        yield step
        if rank == 0 and sys.stderr.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            left = (shown - start) / i * (total - i)
            print(f"\r{label} {i}/{total}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def plain_errors(hint=""):
    """Around a script's `main`. An error that the user can mend ends it with one line and exit code 1.

    Every rank prints its own error, on stderr. hint: what to do after Ctrl-C or SIGTERM, or a function that
    says it. A line that cannot be printed stops no run; a reader who closed the pipe (`| head -1`) ends it.
    """
    # why not `rank_and_world`: what is wrong with these variables is an error like others
    of_several = os.environ.get("WORLD_SIZE", "1") not in ("", "1") and os.environ.get("RANK")
    rank = f"rank {os.environ['RANK']}: " if of_several else ""
    if STARTED_BY in os.environ:
        end_with_parent(int(os.environ[STARTED_BY]))

    try:
        with streams.safe_streams(), streams.safe_end():
            yield
    except streams.ReaderGone:
        sys.exit(1)
    except KeyboardInterrupt as stop:
        hint = hint() if callable(hint) else hint
        how = "terminated" if isinstance(stop, streams.Terminated) else "interrupted"
        advice = f": {hint}" if hint else ""
        sys.exit(f"{rank}{how}{advice}")
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        text = streams.in_words(error)
        if not text:
            raise
        sys.exit(f"{rank}error: {text}")


def write_whole(path, write):
    """Calls write(temporary path), then renames the file: a reader never sees half of it.

    A link stays one, and the file that it leads to is written. Into a pipe or a device the whole is copied.
    """
    stream = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path), path)
    if stream != path or (os.path.exists(path) and not os.path.isfile(path)):
        return write_into(stream, write)

    real = Path(os.path.realpath(path))
    temporary = real.with_name(f"{real.name[:60]}.tmp{os.getpid()}")   # why 60: a name has 255 bytes at most
    try:
        write(temporary)
        os.replace(temporary, real)
    except RuntimeError as error:                      # why: torch's, on a full disk
        raise OSError(f"cannot write {path}, is the disk full? {str(error).splitlines()[0]}") from error
    except OSError as error:                           # why: a full disk is not named by Python
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_into(stream, write):
    """Copies what write(temporary path) wrote into a pipe or a device, by its path or number."""
    sys.stdout.flush()                                 # why: what was printed before comes before
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        write(whole)
        try:
            with open(stream, "wb", closefd=isinstance(stream, str | Path)) as file:
                file.write(whole.read_bytes())
        except BrokenPipeError as error:
            raise streams.ReaderGone from error
        except OSError as error:
            raise OSError(f"cannot write into {stream}: {error.strerror}") from error


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
    write_text(path, json.dumps(fields, indent=2, allow_nan=False) + "\n")
