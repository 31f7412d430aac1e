"""CoCoOp: the shift of the context by hand, each image's own texts, and what they mean for the scripts."""

import warnings

import pytest
import torch
from torch import nn

from clip.precision import unit
from extras import looking
from methods import cocoop
from methods.cocoop import CoCoOp
from methods.coop import CoOp

NAMES = ["cat", "annual_crop land", "sea"]


@pytest.fixture
def model(clip_model):
    return make_model(clip_model)


def make_model(clip_model, **options):
    model = CoCoOp(clip_model, NAMES, **options).eval()
    model.meta_net[2].weight.data.normal_()        # else the shifts of different images are almost alike
    return model


def images(n=3):
    return torch.randn(n, 3, 32, 32)


def image_features(model, batch):
    return unit(model.clip.encode_image(batch))


# ---- the shift ---------------------------------------------------------------------------------------------

def test_every_vector_of_the_context_is_shifted_alike_by_hand(model):
    # W1 = (1, -1), b1 = 0, W2 = (2, 3)^T, b2 = (0, 1), V = I.
    # (.8, .6): hidden .2, shift (.4, .6 + 1); (.6, .8): hidden relu(-.2) = 0, shift (0, 1)
    model.meta_net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    for layer, weight, bias in ((0, [[1., -1]], [0.]), (2, [[2.], [3]], [0., 1])):
        model.meta_net[layer].weight.data = torch.tensor(weight, dtype=torch.float64)
        model.meta_net[layer].bias.data = torch.tensor(bias, dtype=torch.float64)
    model.context = nn.Parameter(torch.eye(2, dtype=torch.float64))
    found = model.contexts(torch.tensor([[.8, .6], [.6, .8]], dtype=torch.float64))
    expected = torch.tensor([[[1.4, 1.6], [.4, 2.6]], [[1, 1], [0, 2]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_the_network_narrows_sixteenfold_and_starts_as_torch_starts_one(clip_model):
    torch.manual_seed(3)
    model = CoCoOp(clip_model, NAMES)
    torch.manual_seed(3)
    # the joint space of the random CLIP is 32 wide, its text tower 128
    first = nn.Linear(32, 2)
    last = nn.Linear(2, 128)
    expected = {"context": model.word_vectors("a photo of a"), "meta_net.0.weight": first.weight,
                "meta_net.0.bias": first.bias, "meta_net.2.weight": last.weight, "meta_net.2.bias": last.bias}
    found = model.learned_state()
    assert found.keys() == expected.keys() and isinstance(model.meta_net[1], nn.ReLU)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert CoCoOp(clip_model, NAMES, words="this is a picture of a").context.shape == (6, 128)


def test_shifts_are_float32_under_autocast(model):
    image = image_features(model, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.contexts(image)
    assert torch.equal(found, model.contexts(image)) and found.dtype == torch.float32


def test_cosines_are_float32_under_autocast():
    image = unit(torch.randn(2, 8))
    text = unit(torch.randn(3, 2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cocoop.logits(image, text, 10.0)
    assert torch.equal(found, cocoop.logits(image, text, 10.0))
    assert cocoop.logits(image.double(), text.double(), 10.0).dtype == torch.float64


# ---- texts of each image -----------------------------------------------------------------------------------

def test_an_image_meets_its_own_texts_by_hand():
    # two images, one class, scale 10: (1, 0) meets (.6, .8), (0, 1) meets (0, 1)
    text = torch.tensor([[[.6, .8], [0, 1]]])
    found = cocoop.logits(torch.eye(2), text, 10.0)
    torch.testing.assert_close(found, torch.tensor([[6.], [10]]))
    # the patches of the first image give .6 and .6, those of the second .6 and 1
    patches = torch.tensor([[[1., 0], [1, 0]], [[.8, .6], [0, 1]]])
    found = cocoop.logits(patches, text, 1.0)
    torch.testing.assert_close(found, torch.tensor([[[.6], [.6]], [[.6], [1]]]))


# all images at once; one at a time; one at a time, and its classes in two parts
@pytest.mark.parametrize("chunk", [200, 3, 2])
def test_logits_are_those_of_each_image_alone(chunk, clip_model):
    model = make_model(clip_model, text_chunk=chunk)
    batch = images(4)
    image = image_features(model, batch)
    shifted = model.context + model.meta_net(image)[:, None]                       # (B, M, W)
    for b, context in enumerate(shifted):
        # CoOp with this context: an image's logits do not depend on its batch
        alone = CoOp(model.clip, NAMES, words="a photo of a")
        alone.context.data = context.data
        expected = model.scale * image[b] @ alone.encode_prompts().T
        torch.testing.assert_close(model(batch)[0][b], expected, atol=1e-4, rtol=1e-4)


def test_with_a_silent_network_it_is_coop(model):
    for parameter in model.meta_net[2].parameters():
        parameter.data.zero_()
    batch = images()
    other = CoOp(model.clip, NAMES, words="a photo of a").eval()
    torch.testing.assert_close(model(batch)[0], other(batch)[0], atol=1e-4, rtol=1e-4)


def test_texts_that_are_given_change_nothing(model):
    batch = images()
    assert model.encode_prompts() is None
    assert torch.equal(model(batch, None, model.encode_prompts())[0], model(batch)[0])
    assert torch.equal(model(batch, None, torch.zeros(3, 32))[0], model(batch)[0])


def test_patches_are_compared_with_the_texts_of_their_image(model):
    batch = images()
    cls, patches = model.clip.encode_patches(batch, "value")
    found, patch_cosines = model.cosines(batch, None)
    assert found.shape == (3, 3) and patch_cosines.shape == (3, 16, 3)
    torch.testing.assert_close(found, model(batch)[0] / model.scale)
    proj = model.clip.visual.proj
    text = model.encode_for(unit(cls @ proj))                                      # (C, B, D)
    for b in range(3):
        expected = unit(patches[b] @ proj) @ text[:, b].T
        torch.testing.assert_close(patch_cosines[b], expected, atol=1e-5, rtol=1e-4)


def test_a_map_of_patches_shows_the_texts_of_the_picture(model):
    batch = images()
    found = looking.patch_cosines(model, batch[1:2], model.encode_prompts(), 2)
    torch.testing.assert_close(found[:, 0], model.cosines(batch, None)[1][1, :, 2], atol=1e-5, rtol=1e-4)


# ---- cost --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk, largest", [(200, 5 * 3), (7, 2 * 3), (2, 2)])
def test_no_more_texts_than_the_chunk_are_in_the_tower_at_once(chunk, largest, clip_model, monkeypatch):
    # names of equal length, which would be one batch otherwise
    model = CoCoOp(clip_model, ["cat", "dog", "sea"], text_chunk=chunk)
    seen = []

    def count(prefix, names, eot):
        seen.append(names.shape[0] * names.shape[1])                               # classes, images
        return torch.zeros(*names.shape[:2], 32)

    monkeypatch.setattr(model.clip, "encode_with_prefix", count)
    model(images(5))
    assert max(seen) == largest and sum(seen) == 15


def test_many_classes_are_worth_a_warning(clip_model):
    names = [f"class {i}" for i in range(100)]
    with pytest.warns(UserWarning, match="texts of all 100 classes"):
        CoCoOp(clip_model, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoCoOp(clip_model, names[:99])


def test_processes_share_no_text_work(clip_model):
    # each has its own images, so its own texts
    assert CoCoOp(clip_model, NAMES, ranks=(1, 2), text_chunk=7).text_encoder.ranks == (0, 1)
