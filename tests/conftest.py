"""What the tests share: the project on the path, marks, seeds, a small random CLIP, pictures, a run, the commands.

`pytest` leaves out what is marked slow; `pytest -m slow` runs that. Tests marked cuda run where a GPU is.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from clip.model import CLIP  # noqa: E402  (after the path is set, and before torch: it bounds the wait of its threads)

import torch  # noqa: E402
from PIL import Image  # noqa: E402

if torch.cuda.is_available():
    torch.cuda.init()        # why now: a test may hide the GPU from the commands that it starts
torch.set_num_threads(1)     # why: the matrices here are so small that a second thread costs more than it saves


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out unless -m asks for it")
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.option.markexpr = config.option.markexpr or "not slow"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """A test means the CPU unless it is marked cuda: what it sees must not depend on the machine."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")   # for the commands that it starts


# ---- what is the user's stays the user's

USERS = [PROJECT / folder for folder in ("runs", "data", "comparison", "ablations")]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
noticed = []


def touches(event, arguments):
    """Whether an event of Python's audit hooks looks into a folder of the user's, or changes the project's.

    A program that starts in the project's folder counts: its default folders would be the user's.
    """
    if event == "subprocess.Popen":
        path, changes = arguments[2] or ".", True
    elif event == "open":
        path, changes = arguments[0], arguments[2] & WRITING
    elif event in CHANGES or event in ("os.listdir", "os.scandir"):
        path, changes = arguments[0] or ".", event in CHANGES
    else:
        return False
    if isinstance(path, int):                           # an open file, noticed when it was opened
        return False
    path = Path(os.path.abspath(os.fsdecode(path)))
    if not path.is_relative_to(PROJECT) or {"__pycache__", ".pytest_cache"} & {*path.parts}:
        return False
    return bool(changes) or any(path.is_relative_to(folder) for folder in USERS)


def notice(event, arguments):
    if touches(event, arguments):
        noticed.append(f"{event} {arguments[0]}")


sys.addaudithook(notice)


@pytest.fixture(scope="session", autouse=True)
def away_from_the_user(tmp_path_factory):
    """Nothing that is named by default, a run, a data set or weights, is one of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("away"))
        patch.setenv("CLIP_CACHE", str(tmp_path_factory.mktemp("weights")))
        patch.delenv("DATA_ROOT", raising=False)
        noticed.clear()                 # why: until here pytest and the imports worked in the user's folder
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """A working directory for each test. What the test touches of the user's makes it fail."""
    monkeypatch.chdir(tmp_path_factory.mktemp("test"))
    yield
    found = noticed.copy()
    noticed.clear()
    assert not found, f"this test, or what it is made from, touches the folder of the project: {found[0]}"


# ---- a model

def random_clip(seed=0, resolution=32, patch=8, layers=2):
    """A CLIP of 16 patches, tower widths 128 (two heads), joint width 32; far from symmetric in every tensor."""
    return own_copy(drawn_clip(seed, resolution, patch, layers))   # why: drawing it takes 15 times as long


def own_copy(model):
    """A CLIP of one's own, but for the values of its tokens: they are most of it, and no test writes into them."""
    table = model.token_embedding.weight
    return deepcopy(model, {id(table): torch.nn.Parameter(table.detach(), requires_grad=False)})


@functools.cache
def drawn_clip(seed, resolution, patch, layers):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():        # why: the layers' own start must not move the draws of a test
        model = CLIP(32, resolution, patch, 128, layers, 77, 49408, 128, layers)
    for name, p in model.named_parameters():
        around = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        p.data = around + 0.1 * torch.randn(p.shape, generator=generator)
    model.logit_scale.data.fill_(2.0)
    return model


@pytest.fixture
def clip_model():
    return random_clip()


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """The random CLIP as a file of half-precision weights, as OpenAI stores them."""
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save({name: tensor.half() for name, tensor in random_clip().state_dict().items()}, path)
    return path


def images(n=3):
    return torch.randn(n, 3, 32, 32)


def unit_vectors(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


# ---- pictures, and a run on them

COLOURS = {"red_clay": (200, 60, 40), "sea": (30, 80, 200), "wood": (90, 140, 30)}
EPOCHS = 3


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of one's own: three classes of coloured noise, 4 training images each; 3, 2 and 2 test images.

    The last test image of "wood" has the colour of "sea", so that no model can be right everywhere.
    """
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, counts in {"train": (4, 4, 4), "test": (3, 2, 2)}.items():
        for name, count in zip(COLOURS, counts):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = COLOURS["sea" if (split, name, i) == ("test", "wood", 1) else name]
                noise = torch.randint(-30, 30, (40, 40, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def options(clip_file, pictures):
    """3 of 4 images per class, in batches of 4: the last batch has one image, so that of two processes one is idle.

    Two iterations leave a row error that is more than rounding.
    """
    return ("--dataset", "folder", "--data-root", pictures, "--model", clip_file, "--shots", 3, "--batch-size", 4,
            "--epochs", EPOCHS, "--n-support", 5, "--n-iters", 2, "--lr", 0.5, "--device", "cpu")


@pytest.fixture(scope="session")
def trained(options, tmp_path_factory):
    """The folder of a finished run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(*options, "--output-dir", folder)
    return folder


def train(*options):
    """train.py with these options, in this process."""
    import train as script  # why here: what a test replaces in the scripts must be replaced before
    script.main(script.parse_args([*map(str, options)]))


def read(folder):
    """What a run wrote: result.json, the lines of log.jsonl, last.pt."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), log, torch.load(folder / "last.pt", weights_only=True)


def copy(run, folder, **changes):
    """A run of one's own in a folder, with another checkpoint where changes say so."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    if changes:
        torch.save({**read(run)[2], **changes}, folder / "last.pt")
    return folder


# ---- the commands

def run(*command, timeout=120, **environment):
    """Runs a command of the project in the test's own folder -> the finished process, output as text."""
    command = [str(PROJECT / word) if str(word).endswith(".py") else str(word) for word in command]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
