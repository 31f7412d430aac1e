"""Half precision overflows: the scaler skips such a step, and nothing of it is left."""

import argparse
import functools

import pytest
import torch
from torch import nn

import train as script
from conftest import read, train
from harness import machine


@pytest.fixture
def uninitialised():
    """Memory that nobody has filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trained_weights(factors, device="cpu"):
    """The weights after a step for each factor of the loss, by the optimizer of a GPU; inf: an overflow."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 2).to(device), torch.rand(4, 3).to(device)
    args = argparse.Namespace(lr=0.1, weight_decay=0.01, amp="off")
    optimizer, _ = script.make_optimizer(layer, args, torch.device("cuda"))
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(factor * layer(inputs).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return layer.weight.detach()


@pytest.mark.parametrize("factors", [(torch.inf, 1, 2), (1, torch.inf, 2), (torch.inf, torch.inf, 1, 2)])
def test_a_skipped_step_leaves_no_trace(factors, uninitialised):
    # scales are powers of two, so that the results are equal to the last digit
    assert torch.equal(trained_weights(factors), trained_weights((1, 2)))


@pytest.fixture
def fp16(options, monkeypatch, tmp_path):
    """Trains in fp16, here on a CPU, with a scaler of one's own -> the log."""
    def run(**scaler):
        monkeypatch.setattr(machine, "usable_amp", lambda amp, _: amp)
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, **scaler))
        train(*options, "--amp", "fp16", "--epochs", 2, "--output-dir", tmp_path)
        return read(tmp_path)[1]
    return run


def test_skipped_steps_are_counted_and_shown(fp16, capsys):
    # the first step overflows at 2^127, then the scale is 2^127 / 2^117 = 2^10
    first, second = fp16(init_scale=2.0**127, backoff_factor=2.0**-117)
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert "skipped steps 1 " in lines[0] and "skipped steps 0 " in lines[1]


def test_an_epoch_without_a_step_is_refused(fp16, tmp_path):
    with pytest.raises(SystemExit, match="epoch 1: all 3 steps were skipped, their gradients overflowed in"):
        fp16(init_scale=2.0**127)
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "result.json").exists()
