"""The GPU path without a GPU: what would stop it, make it wait or make it slow shows with fake tensors.

simulated_gpu.py says how. Widths are those of CLIP ViT-B/16; of its 12 blocks, all alike, two are enough.
"""

import pytest
import torch

import ood
import simulated_gpu
import train
from clip.model import CLIP
from harness import machine
from methods import METHODS, promptot, promptsrc
from simulated_gpu import is_cuda

# EuroSAT
NAMES = ["annual crop land", "forest", "herbaceous vegetation land", "highway or road",
         "industrial buildings", "pasture land", "permanent crop land", "residential buildings", "river",
         "sea or lake"]


@pytest.fixture
def gpu(monkeypatch):
    """The account of what a simulated GPU does."""
    simulated_gpu.replace(monkeypatch)
    monkeypatch.setattr(promptsrc, "TEMPLATES", promptsrc.TEMPLATES[:1])     # why: each is a pass like the others
    with simulated_gpu.running() as account:
        yield account
    promptot.permutations.cache_clear()                  # why: fake tensors must not be left in it


def make(name, amp, blocks=2, **options):
    """A method for ten classes on a GPU, as train.py builds it."""
    with torch.device("cuda"):
        clip_model = CLIP(512, 224, 16, 768, blocks, 77, 49408, 512, blocks)
    if amp in machine.HALF:
        clip_model.store_matrices(machine.HALF[amp])
    return METHODS[name](clip_model, NAMES, **options)


def batch(name, device="cuda"):
    """Images and labels of a batch of the method's size."""
    B = METHODS[name].DEFAULTS["batch_size"]
    return torch.randn(B, 3, 224, 224, device=device), torch.zeros(B, dtype=torch.int64, device=device)


def is_float32(tensor):
    return is_cuda(tensor) and tensor.dtype == torch.float32


def forward(model, amp, images, labels):
    """The forward half of a training step -> outputs, loss, terms."""
    drawn = model.draw(len(images))
    if drawn is not None:
        drawn = drawn.to("cuda", non_blocking=True)
    with machine.autocast(amp, "cuda"):
        outputs = model(images, drawn)
    loss, terms = model.loss(outputs, labels, len(images))
    return outputs, loss, terms


# why few in bf16: the operations are those of fp16
BOTH = ("sotglp", "promptot")
EVERY = [(name, "fp16") for name in METHODS] + [(name, "bf16") for name in BOTH]
EVERY += [pytest.param(name, "bf16", marks=pytest.mark.slow) for name in METHODS if name not in BOTH]


@pytest.mark.parametrize("name, amp", EVERY)
def test_training_test_and_ood_scores_run_on_a_gpu(name, amp, gpu):
    model = make(name, amp).train()
    images, labels = batch(name)
    gpu.waits.clear()
    outputs, loss, terms = forward(model, amp, images, labels)
    if amp == "fp16":
        loss.backward()
        assert all(is_float32(p.grad) for p in model.parameters() if p.requires_grad)
    assert gpu.waits == []
    assert all(map(is_float32, [*outputs, loss, *terms.values(), *model.learned_state().values()]))

    model.eval()
    with machine.autocast(amp, "cuda"), torch.no_grad():
        features = model.features(images)
        if hasattr(model, "diagnostics"):
            assert all(map(is_float32, model.diagnostics(features, labels).values()))
        texts = model.encode_prompts()
        assert all(map(is_float32, model.scores(model(features, None, texts)).values()))
        rows, predicted = ood.confidences(features, {"run": model}, {"run": texts})
    assert is_cuda(predicted) and all(is_cuda(row) and row.dtype == torch.float64 for row in rows.values())


@pytest.mark.parametrize("amp", ("fp16", "bf16"))
def test_features_leave_half_precision_before_the_joint_space(amp, gpu):
    clip_model = make("coop", amp).clip
    images, prefix = torch.randn(2, 3, 224, 224, device="cuda"), torch.randn(4, 5, 512, device="cuda")
    texts, eot = torch.randn(3, 4, 6, 512, device="cuda"), torch.ones(3, dtype=torch.int64, device="cuda")
    with machine.autocast(amp, "cuda"):
        features = [clip_model.encode_image(images), clip_model.encode_embeddings(texts[:, 0], eot),
                    clip_model.encode_with_prefix(prefix, texts, eot)]
    assert [feature.dtype for feature in features] == [torch.float32] * 3


@pytest.mark.parametrize("name, amp", [("sotglp", "fp16"), ("promptot", "off")])
def test_an_epoch_waits_for_nothing_but_its_end(name, amp, gpu, monkeypatch):
    ends = []
    monkeypatch.setattr(train, "epoch_means", lambda run, sums, names: ends.append(sums) or {})
    monkeypatch.setattr(train, "skipped_steps", lambda run, skipped, *_: ends.append(skipped) or {})
    monkeypatch.setattr(train, "diagnose", lambda *_: {})
    images, labels = batch(name, "cpu")
    args = train.parse_args(["--method", name, "--device", "cuda", "--amp", amp])
    model = make(name, amp)
    run = train.Run(args, 0, 1, torch.device("cuda"), [None] * 2 * len(images), [], None, None, model,
                    *train.make_optimizer(model, args, torch.device("cuda")), {}, 0.0)
    gpu.waits.clear()
    train.train_epoch(run, model, iter([(images, labels)] * 2), 0)
    assert gpu.waits == [] and is_cuda(ends[0])


def test_cached_features_are_picked_without_waiting(gpu):
    cached = object.__new__(train.CachedFeatures)
    cached.cls = torch.empty(9, 768, device="cuda")
    cached.patches = torch.empty(9, 196, 768, device="cuda")
    cached.labels = torch.zeros(9, dtype=torch.int64, device="cuda")
    cached.batches = [[(0, 8), (0, 3)], [(0, 1)]]        # (epoch, image)
    gpu.waits.clear()
    (first, labels), (second, _) = cached
    assert gpu.waits == [] and len(labels) == 2
    shapes = [tuple(part.shape) for part in (*first, *second)]
    assert shapes == [(2, 768), (2, 196, 768), (1, 768), (1, 196, 768)]


@pytest.mark.parametrize("name, most", [("sotglp", 1000), ("coop", 750)])
def test_a_step_launches_no_more_kernels_than_it_needs(name, most, gpu):
    # blocks are alike, so the launches of 12 follow from those of 2 and 3
    counts = []
    for blocks in (2, 3):
        model = make(name, "fp16", blocks).train()
        gpu.launches.clear()
        _, loss, _ = forward(model, "fp16", *batch(name))
        loss.backward()
        counts.append(gpu.launches.total())
    launches = counts[0] + 10 * (counts[1] - counts[0])
    print(f"{launches} launches in a step of {name}, 12 blocks, 10 classes")
    assert launches <= most
