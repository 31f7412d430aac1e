"""MaPLe: the coupling by hand, where prompts start, and both towers behind them."""

import pytest
import torch
import torch.nn.functional as F

import clip
from clip.model import CLIP
from clip.precision import unit
from conftest import random_clip
from methods.coop import CoOp
from methods.maple import MaPLe, couple

NAMES = ["cat", "annual_crop land", "sea"]


def images(n=3):
    return torch.randn(n, 3, 32, 32)


def test_the_coupling_by_hand():
    # W (1, 0) + b = (1, 1, 0) + (0, 0, 1), W (0, 1) + b = (0, 2, 1) + (0, 0, 1); the second block: 2 W, no b
    weight = torch.tensor([[1., 0], [1, 2], [0, 1]])
    bias = torch.tensor([0., 0, 1])
    prompts = torch.eye(2).expand(2, -1, -1)
    found = couple(prompts, torch.stack([weight, 2 * weight]), torch.stack([bias, 0 * bias]))
    assert found.tolist() == [[[1, 1, 1], [0, 2, 2]], [[2, 2, 0], [0, 4, 2]]]


def test_the_coupling_is_float32_under_autocast_and_keeps_float64():
    parts = [torch.randn(shape) for shape in ((2, 2, 4), (2, 3, 4), (2, 3))]
    with torch.autocast("cpu", torch.bfloat16):
        found = couple(*(part.bfloat16() for part in parts))
    assert torch.equal(found, couple(*(part.bfloat16().float() for part in parts)))
    assert couple(*(part.double() for part in parts)).dtype == torch.float64


# ---- where it starts

def test_it_starts_from_words_small_noise_and_linear_maps():
    model = MaPLe(random_clip(layers=3), NAMES)        # both towers have three blocks and are 128 wide
    words = model.word_vectors("a photo of a")
    assert {name: tuple(p.shape) for name, p in model.learned_state().items()} == {
        "text_prompts": (3, 2, 128), "coupling_weights": (3, 128, 128), "coupling_biases": (3, 128)}
    assert torch.equal(model.text_prompts[0], words[:2]) and torch.equal(model.frozen_words, words[2:])
    deeper = model.text_prompts[1:]
    assert deeper.std().item() == pytest.approx(.02, rel=.2) and abs(deeper.mean().item()) < .004
    assert not torch.equal(deeper[0], deeper[1])
    for maps in (model.coupling_weights, model.coupling_biases):
        assert torch.equal(maps[1], maps[2]) and not torch.equal(maps[0], maps[1])
        # as nn.Linear: uniform in +-1 / sqrt(128), of which the deviation is that / sqrt(3)
        assert maps.abs().max() <= 128 ** -.5 and maps.std().item() == pytest.approx((3 * 128) ** -.5, rel=.1)


@pytest.mark.parametrize("n", [1, 4])
def test_the_other_words_stay_before_the_class_name(n, clip_model):
    # with prompts in the first block alone the text tower is CoOp's, whatever n
    model = MaPLe(clip_model, NAMES, n_context=n, depth=1)
    assert model.text_prompts.shape == (1, n, 128)
    expected = CoOp(clip_model, NAMES, words="a photo of a").encode_prompts()
    torch.testing.assert_close(model.encode_prompts(), expected, atol=1e-6, rtol=1e-5)
    assert "frozen_words" not in {**model.learned_state(), **model.state_dict()}
    model.encode_prompts().sum().backward()
    assert model.text_prompts.grad is not None and not model.frozen_words.requires_grad


@pytest.mark.parametrize("n", [0, 5])
def test_there_are_four_words(n, clip_model):
    with pytest.raises(ValueError, match=f"--n-context must lie between 1 and 4.*got {n}"):
        MaPLe(clip_model, NAMES, n_context=n)


def test_a_name_that_does_not_fit_is_refused(clip_model):
    # [SOS], four words, the name, the full stop and [EOT]: 77 tokens with a name of 70
    MaPLe(clip_model, ["word " * 69 + "word"])
    with pytest.raises(ValueError, match="is too long"):
        MaPLe(clip_model, ["word " * 70 + "word"])


def test_it_learns_as_many_numbers_as_published():
    # ViT-B/16: 9 blocks of 2 tokens of 512, and 9 maps from 512 to 768: 9 (1024 + 768 (512 + 1)) = 3,555,072
    with torch.device("meta"):
        clip_model = CLIP(512, 224, 16, 768, 12, 77, 49408, 512, 12)
    model = MaPLe(clip_model, NAMES)
    assert sum(p.numel() for p in model.learned_state().values()) == 3_555_072


@pytest.mark.parametrize("text_layers, image_layers, depth, J", [(3, 2, 9, 2), (2, 3, 9, 2), (3, 3, 2, 2)])
def test_no_block_is_coupled_to_one_that_is_not_there(text_layers, image_layers, depth, J):
    with torch.device("meta"):
        clip_model = CLIP(32, 32, 8, 128, image_layers, 77, 49408, 64, text_layers)
    model = MaPLe(clip_model, NAMES, n_context=3, depth=depth)
    assert [tuple(p.shape) for p in model.learned_state().values()] == [(J, 3, 64), (J, 128, 64), (J, 128)]


# ---- both towers

@pytest.fixture
def model(clip_model):
    model = MaPLe(clip_model, NAMES)
    model.text_prompts.data.normal_()
    return model


def test_both_towers_see_the_prompts_block_by_block(model):
    embed, words = model.clip.token_embedding.weight, model.word_vectors("a photo of a")
    text = []
    for name in ("cat", "annual crop land", "sea"):
        tokens = clip.tokenize(f"{name}.")[0]
        eot = int(tokens.argmax())
        # [SOS], two learned tokens, "of a", name, full stop, [EOT]
        parts = embed[tokens[:1]], model.text_prompts[0], words[2:], embed[tokens[1 : eot + 1]]
        place = torch.tensor([eot + 4])
        text.append(model.clip.encode_embeddings(torch.cat(parts)[None], place, model.text_prompts[1:]))
    text = unit(torch.cat(text))
    torch.testing.assert_close(model.encode_prompts(), text, atol=1e-5, rtol=1e-4)

    blocks = zip(model.text_prompts, model.coupling_weights, model.coupling_biases)
    prompts = torch.stack([F.linear(*block) for block in blocks])
    batch = images()
    image = unit(model.clip.encode_image(batch, prompts))
    (found,) = model(batch)
    torch.testing.assert_close(found, model.scale * image @ text.T, atol=1e-4, rtol=1e-4)
    (found,) = model(batch, None, torch.eye(3, 32))                                # other texts, which are given
    torch.testing.assert_close(found, model.scale * image[:, :3], atol=1e-4, rtol=1e-4)
    cosines, patch_cosines = model.cosines(batch, model.encode_prompts())
    torch.testing.assert_close(cosines, image @ text.T, atol=1e-5, rtol=1e-4)
    assert patch_cosines is None


def test_gradients_of_the_image_tower_reach_the_text_prompts(model):
    # the texts are given, so that nothing comes from the text tower
    (logits,) = model(images(), None, torch.eye(3, 32))
    model.loss((logits,), torch.tensor([0, 1, 2]), 3)[0].backward()
    for parameter in (model.text_prompts, model.coupling_weights, model.coupling_biases):
        assert (parameter.grad.flatten(1).abs().amax(dim=1) > 1e-6).all()          # in each block
    assert all(parameter.grad is None for parameter in model.clip.parameters())


def test_the_loss_is_cross_entropy_alone(model):
    outputs, labels = model(images()), torch.tensor([2, 0, 1])
    loss, terms = model.loss(outputs, labels, 3)
    torch.testing.assert_close(loss, F.cross_entropy(outputs[0], labels))
    assert [*terms] == ["global"] and torch.equal(terms["global"], loss.detach())
    assert model.logits(outputs) is outputs[0] and [*model.scores(outputs)] == ["global"]
