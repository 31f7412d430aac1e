"""--compile changes how a step is computed, not what: the forward pass is one graph, with the same numbers."""

import functools

import pytest
import torch

from conftest import read, train
from methods import METHODS
from two_ranks import batch, make_method


def losses(folder, *options):
    train(*options, "--output-dir", folder)
    return [entry["loss"] for entry in read(folder)[1]]


def compiled_without_a_compiler(monkeypatch, backend="eager", **options):
    """torch.compile as far as the graph: it is traced as a whole, or fails, and runs as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, **options))
    torch._dynamo.reset()


def test_a_compiled_run_has_the_same_losses(options, tmp_path, monkeypatch):
    # aot_eager has a graph of the backward pass too: its gradients must be as precise as without a graph
    compiled_without_a_compiler(monkeypatch, backend="aot_eager", fullgraph=True)
    options = (*options, "--epochs", 2, "--amp", "bf16")
    plain = losses(tmp_path / "plain", *options)
    assert losses(tmp_path / "compiled", *options, "--compile") == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_graph(name, monkeypatch):
    # but for the texts of the frozen CLIP, which two methods read in their first step
    model, (images, _, _) = make_method(name), batch(3, 5)
    compiled_without_a_compiler(monkeypatch, fullgraph=not hasattr(model, "encode_frozen"))
    drawn = model.draw(3)
    for found, expected in zip(torch.compile(model)(images, drawn), model(images, drawn), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_the_real_compiler_has_the_same_losses(options, tmp_path):
    plain = losses(tmp_path / "plain", *options)
    assert losses(tmp_path / "compiled", *options, "--compile") == pytest.approx(plain, rel=1e-5)
