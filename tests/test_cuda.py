"""What only a GPU can show: `pytest -m cuda` where there is one, some minutes. docs/speed.md says when to run it.

test_cuda_simulated.py shows what can be seen without one.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import train as script
from conftest import PROJECT, TORCHRUN, random_clip, read, run, train
from harness import machine
from methods import METHODS
from test_overflow import trained_weights
from two_ranks import NAMES, SMALL, batch, few_pictures, gradients, make_method

pytestmark = pytest.mark.cuda
GPU = "cuda"
HALF = [torch.float16, torch.bfloat16]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def ready():
    """The GPU as the commands set it up."""
    machine.use_device(GPU)


def on_gpu(options):
    """The options of a run, on a GPU and in float32 where nothing else is said behind them."""
    return (*options, "--device", GPU, "--amp", "off", "--workers", 0)


def last_loss(folder):
    return read(folder)[1][-1]["loss"]


# ---- a run

def test_the_commands_run_on_the_gpu_by_themselves(trained, options, pictures, tmp_path):
    # the GPU is the default, so nothing names it
    cpu = options.index("--device")
    options = (*options[:cpu], *options[cpu + 2:])
    folder = tmp_path / "run"
    for command in (("train.py", *options, "--output-dir", folder),
                    ("evaluate.py", folder), ("evaluate.py", folder, "--images", pictures / "test/sea/0.png"),
                    ("ood.py", folder, "--ood-root", f"red={pictures / 'test/red_clay'}"),
                    ("-m", "extras.visualize", folder), ("-m", "extras.linear_probe", "--shots", 2)):
        process = run(*command, PYTHONPATH=str(PROJECT))
        assert process.returncode == 0, process.stderr
    result, log, _ = read(folder)
    assert result["config"]["device"] == GPU and result["config"]["amp"] == "fp16"
    assert result["versions"]["gpu"] == torch.cuda.get_device_name()
    assert log[-1]["loss"] == pytest.approx(last_loss(trained), rel=0.02)


@pytest.mark.parametrize("amp, rel", [("off", 1e-4), ("fp16", 0.02), ("bf16", 0.1)])
def test_each_precision_agrees_with_the_cpu(amp, rel, trained, options, tmp_path):
    train(*on_gpu(options), "--amp", amp, "--output-dir", tmp_path)
    assert last_loss(tmp_path) == pytest.approx(last_loss(trained), rel=rel)
    evaluated = evaluate.evaluate_run(tmp_path, read(tmp_path)[2], GPU)
    assert evaluated["accuracy"] == read(tmp_path)[0]["accuracy"]


@pytest.mark.parametrize("extra", [("--checkpoint-text", "--text-chunk", 1), ("--text-chunk", 1),
                                   ("--workers", 2)])
def test_what_changes_only_memory_and_time_changes_no_number(extra, options, tmp_path):
    for name, more in (("plain", ()), ("other", extra)):
        train(*on_gpu(options), *more, "--output-dir", tmp_path / name)
    assert last_loss(tmp_path / "other") == pytest.approx(last_loss(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("amp, rel", [("off", 1e-4), ("fp16", 0.02)])
def test_cached_features_are_those_of_the_cpu(amp, rel, options, tmp_path):
    train(*options, "--cache-features", "--output-dir", tmp_path / "cpu")
    train(*on_gpu(options), "--amp", amp, "--cache-features", "--output-dir", tmp_path / "gpu")
    assert last_loss(tmp_path / "gpu") == pytest.approx(last_loss(tmp_path / "cpu"), rel=rel)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_compiled_run_has_the_same_losses(amp, options, tmp_path):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        train(*on_gpu(options), "--amp", amp, *more, "--output-dir", tmp_path / name)
    rel = 1e-4 if amp == "off" else 0.01
    assert last_loss(tmp_path / "compiled") == pytest.approx(last_loss(tmp_path / "plain"), rel=rel)


@contextlib.contextmanager
def deterministic(monkeypatch):
    """Every sum in one order. why the plain attention: the others add up their gradients in any order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(amp, options, tmp_path, monkeypatch):
    def interrupt(run, epoch, fields):
        finish(run, epoch, fields)
        if epoch == 1:
            raise KeyboardInterrupt

    finish = script.finish_epoch
    options = (*on_gpu(options), "--amp", amp, "--epochs", 3)
    with deterministic(monkeypatch):
        train(*options, "--output-dir", tmp_path / "whole")
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(script, "finish_epoch", interrupt)
            train(*options, "--output-dir", tmp_path / "parts")
        train(*options, "--output-dir", tmp_path / "parts", "--resume")
    whole, parts = (read(tmp_path / name)[2]["learned"] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


# ---- a step

@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_each_method_is_that_of_the_cpu(name):
    images, labels, _ = batch(3, len(NAMES))
    torch.manual_seed(1)
    there = METHODS[name](random_clip().to(GPU), NAMES, **SMALL.get(name, {})).train()
    here = make_method(name)
    there.load_state_dict(here.state_dict())
    found = []
    for model, device in ((here, "cpu"), (there, GPU)):
        drawn = model.draw(3, torch.Generator().manual_seed(3))
        drawn = None if drawn is None else drawn.to(device)
        loss, _ = model.loss(model(images.to(device), drawn), labels.to(device), 3)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (loss, expected), (loss_there, gradients_there) = found
    assert loss_there == pytest.approx(loss, rel=1e-4)
    for key, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients_there[key].cpu(), gradient, atol=1e-4 * largest, rtol=1e-2)


def test_an_overflow_in_the_first_step_leaves_no_trace():
    assert torch.equal(trained_weights((torch.inf, 1, 2), GPU), trained_weights((1, 2), GPU))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_the_host_waits_for_nothing_inside_a_step(name, amp):
    # as train_epoch makes it; the first step may fetch what it keeps
    torch.manual_seed(1)
    model = METHODS[name](random_clip().to(GPU), NAMES, **SMALL.get(name, {})).train()
    args = script.parse_args(["--method", name, "--device", GPU, "--amp", amp])
    if amp in machine.HALF:
        model.clip.store_matrices(machine.HALF[amp])
    optimizer, scaler = script.make_optimizer(model, args, torch.device(GPU, 0))
    images, labels, _ = (part.pin_memory() for part in batch(3, len(NAMES)))
    for first in (True, False):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            drawn = model.draw(3)
            pictures, answers, drawn = (script.to_device(part, GPU) for part in (images, labels, drawn))
            with machine.autocast(amp, GPU):
                outputs = model(pictures, drawn)
            loss, _ = model.loss(outputs, answers, 3)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


# ---- attention

def plain_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v in float64, as it is written."""
    q, k, v = (part.double() for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


# sequences, queries and keys of the towers: patches, texts (causal), names behind a prefix, [EOT] alone, none
SHAPES = {"patches": (4, 197, 197, "all"), "texts": (40, 9, 9, "causal"), "behind": (40, 5, 10, "prefix"),
          "eot": (40, 1, 10, "one"), "none": (0, 9, 9, "causal")}


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
                                    None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_every_attention_kernel_computes_what_is_written(kernel, shape, dtype):
    n, queries, keys, kind = SHAPES[shape]
    masked = kind in ("prefix", "one")
    if kernel is SDPBackend.FLASH_ATTENTION and (masked or dtype == torch.float32):
        pytest.skip("flash attention takes no mask and no float32")
    q, k, v = (torch.randn(n, 8, length, 64, device=GPU, dtype=dtype, requires_grad=True)
               for length in (queries, keys, keys))
    mask = torch.ones(queries, keys, dtype=torch.bool, device=GPU)
    mask = mask.tril(keys - queries) if kind in ("causal", "prefix") else mask
    if kind == "one":                                    # each text ends at another place
        mask = torch.arange(keys, device=GPU) <= torch.arange(n, device=GPU)[:, None, None, None] % keys
    with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
        found = F.scaled_dot_product_attention(q, k, v, mask if masked else None, is_causal=kind == "causal")
        weights = torch.randn_like(found)
        found_gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    expected = plain_attention(q, k, v, mask)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-4}[dtype]
    for a, b in zip((found, *found_gradients), (expected, *expected_gradients)):
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_towers_take_a_batch_of_nothing(dtype):
    """A process may have no image and no class."""
    model = random_clip().to(GPU)
    model.store_matrices(dtype)
    with torch.autocast(GPU, dtype=dtype):
        cls, patches = model.encode_patches(torch.empty(0, 3, 32, 32, device=GPU))
        prefix = torch.randn(4, 5, 128, device=GPU, requires_grad=True)
        texts = torch.empty(0, 4, 1, 128, device=GPU)
        features = model.encode_with_prefix(prefix, texts, torch.empty(0, dtype=torch.int64, device=GPU))
    features.sum().backward()
    assert len(cls) == len(patches) == len(features) == 0


# ---- two GPUs

FEW = """
import argparse, sys
sys.path.insert(0, {tests!r})
from two_ranks import few_pictures
from harness import machine
import torch

place = machine.start_processes(argparse.Namespace(device={device!r}))
print(few_pictures(*place))
torch.distributed.destroy_process_group()
"""


@two_gpus
@pytest.mark.parametrize("amp, rel", [("off", 1e-3), ("fp16", 0.02)])
@pytest.mark.parametrize("extra", [(), ("--cache-features",), ("--batch-size", 2, "--shots", 1)])
def test_two_gpus_do_what_one_does(amp, rel, extra, options, tmp_path):
    # the last batch has one picture, so one process is idle in it
    options = (*on_gpu(options), "--amp", amp, *extra)
    process = run(*TORCHRUN, "train.py", *options, "--output-dir", tmp_path / "two")
    assert process.returncode == 0, process.stderr
    train(*options, "--output-dir", tmp_path / "one")
    (two, log, _), (one, log_one, _) = read(tmp_path / "two"), read(tmp_path / "one")
    assert two["world_size"] == 2 and two["test_images"] == one["test_images"] == 7
    assert log[-1]["loss"] == pytest.approx(log_one[-1]["loss"], rel=rel)


@two_gpus
def test_a_gpu_without_test_pictures_counts_with_the_others(tmp_path):
    (tmp_path / "few.py").write_text(FEW.format(tests=str(PROJECT / "tests"), device=GPU))
    process = run(*TORCHRUN, tmp_path / "few.py")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(str(few_pictures(0, 1))) == 2
