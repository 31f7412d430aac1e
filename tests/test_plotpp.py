"""PLOT++: its score by hand, and the method on a small random CLIP."""

import pytest
import torch

import clip
from clip.model import CLIP
from conftest import images, unit_vectors
from extras import looking
from methods import plot, plotpp
from methods.plotpp import PLOTPP

NAMES = ["cat", "red clay", "sea"]
WORDS = ("a photo of", "this is my")
DOUBLE = torch.float64


def unit(features):
    return torch.nn.functional.normalize(features, dim=-1)


# ---- by hand

def test_features_are_matched_as_unit_vectors():
    # cosines [[.9, .6], [.6, .9]]: phi = .885772, see the test of PLOT; lengths 2, 5 and 3, 7 change nothing
    image = torch.tensor([[[2, 0], [0, 5]]], dtype=DOUBLE)
    text = unit(torch.tensor([[[.9, .6], [.6, .9]]], dtype=DOUBLE))
    phi = plot.logits(torch.eye(2, dtype=DOUBLE)[None], text, 1.0).item()
    found = plotpp.logits(image, text * torch.tensor([[3.], [7.]]), 10.0)
    assert found.item() == pytest.approx(10 * phi)


def test_the_pooled_logit_is_of_means_of_raw_features():
    # Image features (3, 0) and (0, 4): the mean is (1.5, 2), of unit length (.6, .8); of unit ones: (.7, .7).
    # Texts (6, 0) and (2, 0): the mean is (1, 0) of unit length: cosine .6.
    # Both texts have the cosines 1 and 0 with the images, which weigh a half each: phi = .5.
    image = torch.tensor([[[3, 0], [0, 4]]], dtype=DOUBLE)
    text = torch.tensor([[[6, 0], [2, 0]]], dtype=DOUBLE)
    assert plotpp.logits(image, text, 10.0).item() == pytest.approx(5)
    assert plotpp.logits(image, text, 10.0, pooled=True).item() == pytest.approx(5 + 6)
    # Texts (0, 3) and (4, 0), of mean (2, 1.5), of unit length (.8, .6): cosine .96
    text = torch.tensor([[[0, 3], [4, 0]]], dtype=DOUBLE)
    both, matched = (plotpp.logits(image, text, 1.0, pooled, .02, 3).item() for pooled in (True, False))
    assert both - matched == pytest.approx(.96)


def test_the_transport_is_plots_with_its_options_and_a_constant_plan():
    image, text = 3 * unit_vectors(2, 4, 5), (2 * unit_vectors(3, 2, 5)).requires_grad_()
    found = plotpp.logits(image, text, 30.0, False, .02, 3)
    expected = plot.logits(unit(image), unit(text), 30.0, .02, 3)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(logits.square().sum(), text)[0] for logits in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_score_is_float32_under_autocast_and_keeps_float64():
    image, text = 3 * unit_vectors(2, 4, 8), 2 * unit_vectors(3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = plotpp.logits(image, text, 100.0, pooled=True)
    torch.testing.assert_close(found, plotpp.logits(image, text, 100.0, pooled=True))
    image, text = image.bfloat16(), text.bfloat16()
    half = plotpp.logits(image, text, 100.0, pooled=True)
    torch.testing.assert_close(half, plotpp.logits(image.float(), text.float(), 100.0, pooled=True))
    assert plotpp.logits(image.double(), text.double(), 100.0, pooled=True).dtype == DOUBLE


# ---- the method

@pytest.fixture
def make(clip_model):
    return lambda **options: PLOTPP(clip_model, NAMES, words=WORDS, n_image_prompts=3, **options)


def test_text_prompts_start_from_words_and_image_prompts_small(make):
    model = make()
    assert model.text_prompts.shape == (2, 3, 128) and model.image_prompts.shape == (3, 2, 128)
    for prompt, words in zip(model.text_prompts, WORDS):
        assert torch.equal(prompt, model.word_vectors(words))
    assert model.image_prompts.std().item() == pytest.approx(.02, rel=.1)
    assert not torch.equal(model.image_prompts[0], model.image_prompts[1])


def test_texts_are_as_the_tower_gives_them(make, clip_model):
    found = make().encode_prompts()                                                # (C, N, D)
    for n, words in enumerate(WORDS):
        expected = clip_model.encode_text(clip.tokenize([f"{words} {name}." for name in NAMES]))
        torch.testing.assert_close(found[:, n], expected, atol=1e-5, rtol=1e-4)
    assert (found.norm(dim=-1) - 1).abs().min() > .01


def test_each_image_prompt_has_a_pass_of_its_own(make, clip_model):
    model, batch = make(n_image_tokens=1), images(2)
    found = model.encode_images(batch)                                             # (B, V, D)
    for v, prompt in enumerate(model.image_prompts):
        torch.testing.assert_close(found[:, v], clip_model.encode_image(batch, prompt[None]))
    model.image_prompts.data[1].normal_()
    changed = (model.encode_images(batch) - found).abs().amax(dim=-1) > 1e-3
    assert changed.tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("stage, pooled", [(1, True), (2, False)])
def test_the_stage_says_what_is_learned_and_whether_features_are_pooled(stage, pooled, make):
    model, batch = make(stage=stage, epsilon=.02, n_iters=3), images(2)
    expected = plotpp.logits(model.encode_images(batch), model.encode_prompts(), model.scale, pooled, .02, 3)
    for found in (*model.train()(batch), *model.eval()(batch)):
        torch.testing.assert_close(found, expected)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {"image_prompts"} | ({"text_prompts"} if stage == 2 else set())
    assert {*model.learned_state()} == {"text_prompts", "image_prompts"}
    # the cosines of both stages are the transported ones
    found, patches = model.cosines(batch, model.encode_prompts())
    expected = plotpp.logits(model.encode_images(batch), model.encode_prompts(), 1.0, False, .02, 3)
    torch.testing.assert_close(found, expected)
    assert patches is None


@pytest.mark.parametrize("words, message", [
    (("a photo of a", "this is my photo too"), "'a photo of a' has 4, 'this is my photo too' has 5"),
    (("a photo", ""), "'a photo' has 2, '' has 0"), ((" ",), "' ' has 0"), ((), "got no text")])
def test_words_of_different_numbers_of_tokens_are_refused(words, message, clip_model):
    with pytest.raises(ValueError, match=f"--words takes texts of the same number of tokens: {message}"):
        PLOTPP(clip_model, NAMES, words=words)


@pytest.mark.parametrize("stage", [0, 3])
def test_another_stage_is_refused(stage, clip_model):
    with pytest.raises(ValueError, match=f"--stage must be 1 or 2, got {stage}"):
        PLOTPP(clip_model, NAMES, stage=stage)


def test_image_prompts_are_as_wide_as_the_image_tower():
    other = CLIP(32, 32, 8, 64, 2, 77, 49408, 128, 2)          # towers 64 and 128 wide
    model = PLOTPP(other, NAMES, n_image_prompts=3)
    assert model.image_prompts.shape == (3, 2, 64) and model.text_prompts.shape == (4, 4, 128)


def test_pictures_say_how_much_the_texts_are_alike_as_unit_vectors(make):
    model = make()
    texts = model.encode_prompts()
    found = looking.look(model.eval(), images(1), texts, label=1).prompt_cosines
    torch.testing.assert_close(found, unit(texts[1]) @ unit(texts[1]).T)
