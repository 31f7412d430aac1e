"""What the tests share: the project on the path, marks, seeds, a small random CLIP, and a way to run the commands.

`pytest` leaves out what is marked slow; `pytest -m slow` runs that. Tests marked cuda run where a GPU is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from clip.model import CLIP  # noqa: E402  (after the path is set)


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


def random_clip(seed=0, resolution=32, patch=8, layers=2):
    """A CLIP of 16 patches, tower widths 128 (two heads), joint width 32; far from symmetric in every tensor."""
    generator = torch.Generator().manual_seed(seed)
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


def run(*command, timeout=120, **environment):
    """Runs a command of the project from its folder -> the finished process, output as text."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
