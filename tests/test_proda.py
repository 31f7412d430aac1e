"""ProDA: its scores and loss by hand, and the method on a small random CLIP."""

import math

import pytest
import torch

from conftest import images, unit_vectors
from methods import coop, proda
from methods.proda import ProDA

NAMES = ["cat", "red clay", "sea"]
DOUBLE = torch.float64

# class 0 has the prompts (.8, .6) and (.6, .8), class 1 has (0, 1) twice
IMAGE = torch.tensor([[1, 0]], dtype=DOUBLE)
TEXT = torch.tensor([[[.8, .6], [.6, .8]], [[0, 1], [0, 1]]], dtype=DOUBLE)


# ---- by hand

def test_the_score_is_the_cosine_with_the_mean_text():
    # mean texts (.7, .7) and (0, 1), which are not made unit vectors again
    torch.testing.assert_close(proda.logits(IMAGE, TEXT, 10), torch.tensor([[7, 0]], dtype=DOUBLE))


def test_the_shift_is_half_the_variance_against_the_own_class():
    # own class 0: its deviations are (.1, -.1) and (-.1, .1), those of class 1 are 0. The image sees the
    # first number alone: ((0 - .1)^2 + (0 + .1)^2) / (2 + 1) / 2 = .02 / 6. At the scale 10: 100 times that.
    expected = torch.tensor([[0, .02 / 6]], dtype=DOUBLE)
    torch.testing.assert_close(proda.shift(IMAGE, TEXT, torch.tensor([0]), 1), expected)
    torch.testing.assert_close(proda.shift(IMAGE, TEXT, torch.tensor([0]), 10), 100 * expected)
    torch.testing.assert_close(proda.shift(IMAGE, TEXT, torch.tensor([1]), 1), expected.flip(1))


def test_the_shift_is_the_sum_over_prompts_and_numbers():
    image, text = unit_vectors(5, 7).double(), unit_vectors(4, 3, 7).double()
    labels = torch.tensor([3, 0, 0, 2, 1])
    deviation = text - text.mean(1, keepdim=True)
    found = proda.shift(image, text, labels, 30)
    for b, label in enumerate(labels):
        for c in range(4):
            difference = image[b] * (deviation[c] - deviation[label])              # (3, 7)
            assert found[b, c].item() == pytest.approx(450 * difference.square().sum().item() / 4, abs=1e-12)


def test_the_own_class_is_not_shifted_at_all_in_float32():
    # at CLIP's scale rounding is multiplied by 5000
    labels = torch.arange(8)
    found = proda.shift(unit_vectors(8, 512), unit_vectors(8, 4, 512), labels, 100)
    assert found.diagonal().tolist() == [0] * 8 and (found > 0).sum() == 8 * 7


def test_equal_prompts_give_no_shift():
    text = unit_vectors(3, 1, 5).double().expand(-1, 4, -1)
    shift = proda.shift(unit_vectors(2, 5).double(), text, torch.tensor([0, 2]), 100)
    torch.testing.assert_close(shift, torch.zeros_like(shift), atol=1e-12, rtol=0)


def test_orthogonality_is_the_mean_over_pairs_of_different_prompts():
    # |cosines|: .6 and .8 with (0, -1), .6 between the first two
    text = torch.tensor([[1, 0], [.6, .8], [0, -1]], dtype=DOUBLE)
    assert proda.orthogonality(text[:2]).item() == pytest.approx(.6)
    assert proda.orthogonality(text).item() == pytest.approx((.6 + .8 + 0) / 3)


def test_the_loss_by_hand():
    # logits (.7, .02 / 6): cross-entropy ln(1 + exp(.003333 - .7)) = .404293; orthogonality .6, times .1
    bare = torch.tensor([[1, 0], [.6, .8]], dtype=DOUBLE)
    loss = proda.objective(IMAGE, TEXT, bare, torch.tensor([0]), 1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(.02 / 6 - .7)) + .06)
    assert loss.item() == pytest.approx(.404293 + .06, abs=1e-6)
    # one of four images: a quarter of both terms
    part = proda.objective(IMAGE, TEXT, bare, torch.tensor([0]), 1, lambda_orthogonal=2.0, n_batch=4)
    assert part.item() == pytest.approx((.404293 + 1.2) / 4, abs=1e-6)


def test_the_functions_are_float32_under_autocast_and_keep_float64():
    image, text, bare = unit_vectors(2, 8), unit_vectors(3, 4, 8), unit_vectors(4, 8)
    labels = torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = proda.objective(image, text, bare, labels, 100.0)
    torch.testing.assert_close(found, proda.objective(image, text, bare, labels, 100.0))
    assert proda.objective(image.double(), text.double(), bare.double(), labels, 100.0).dtype == DOUBLE


# ---- the method

@pytest.fixture
def model(clip_model):
    return ProDA(clip_model, NAMES, n_global=5, n_context=3, n_drawn=2, lambda_orthogonal=2.0)


def test_contexts_start_small_and_each_from_its_own(model):
    prompts = model.global_prompts
    assert prompts.shape == (5, 3, 128) and not torch.equal(prompts[0], prompts[1])
    assert prompts.std().item() == pytest.approx(.02, rel=.1)


def test_the_contexts_of_a_step_are_different_ones_alike_for_all_images(model):
    draws = [model.draw(3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(drawn.shape == (3, 2) and (drawn == drawn[0]).all() for drawn in draws)
    assert all(drawn[0, 0] != drawn[0, 1] for drawn in draws)
    assert {number for drawn in draws for number in drawn[0].tolist()} == {0, 1, 2, 3, 4}


def test_a_step_compares_the_drawn_contexts_and_keeps_all_apart(model, clip_model):
    drawn, batch, labels = torch.tensor([[3, 1], [3, 1]]), images(2), torch.tensor([2, 0])
    logits, image, text, bare = outputs = model.train()(batch, drawn)
    every = model.encode_prompts()                                                 # (C, K, D)
    torch.testing.assert_close(text, every[:, [3, 1]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits, proda.logits(image, text, model.scale))
    loss, terms = model.loss(outputs, labels, 2)
    expected = proda.objective(image, every[:, [3, 1]], bare, labels, model.scale, 2.0)
    torch.testing.assert_close(loss, expected)
    shifted = logits + proda.shift(image, text, labels, model.scale)
    torch.testing.assert_close(terms["global"], coop.objective(shifted, labels))
    torch.testing.assert_close(terms["orthogonality"], proda.orthogonality(bare))
    # both terms reach the contexts that were drawn; the others are kept apart all the same
    found, = torch.autograd.grad(loss, model.global_prompts, retain_graph=True)
    wanted, = torch.autograd.grad(expected, model.global_prompts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found.flatten(1).norm(dim=1) > 0).tolist() == [True] * 5


def test_contexts_are_kept_apart_without_a_class_name(model, clip_model):
    # [SOS], context, ".", [EOT]
    tokens = model.clip.token_embedding.weight
    sos, stop, eot = 49406, 269, 49407
    before, behind = tokens[sos].expand(5, 1, -1), tokens[[stop, eot]].expand(5, -1, -1)
    texts = torch.cat([before, model.global_prompts, behind], dim=1)
    expected = torch.nn.functional.normalize(clip_model.encode_embeddings(texts, torch.full((5,), 5)), dim=-1)
    bare = model.train()(images(1), torch.tensor([[0, 1]]))[3]
    torch.testing.assert_close(bare, expected, atol=1e-6, rtol=1e-5)


def test_a_step_without_a_draw_makes_one(model):
    logits, _, text, _ = model.train()(images(2))
    assert logits.shape == (2, 3) and text.shape == (3, 2, 32)


def test_the_test_takes_all_contexts(model):
    batch = images(2)
    (logits,) = model.eval()(batch)
    cls, _ = model.clip.encode_patches(batch, "value")
    image = torch.nn.functional.normalize(cls @ model.clip.visual.proj, dim=-1)
    torch.testing.assert_close(logits, proda.logits(image, model.encode_prompts(), model.scale))
    assert model.encode_prompts().shape == (3, 5, 32)


def test_one_context_for_all_is_coop(clip_model):
    model, other = ProDA(clip_model, NAMES, 1, 3, 1).eval(), coop.CoOp(clip_model, NAMES, 3).eval()
    other.context.data.copy_(model.global_prompts[0])
    batch = images(2)
    torch.testing.assert_close(model(batch)[0], other(batch)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_drawn", [0, 6])
def test_more_contexts_in_a_step_than_there_are_are_refused(n_drawn, clip_model):
    with pytest.raises(ValueError, match=f"--n-drawn must lie between 1 and --n-global, 5: got {n_drawn}"):
        ProDA(clip_model, NAMES, n_global=5, n_drawn=n_drawn)
