"""What every method of METHODS promises to the scripts. That two processes equal one is in test_distributed.py."""

import pytest
import torch

from conftest import random_clip
from methods import METHODS
from sotglp import Method

NAMES = ["sea lake", "cat", "annual crop land", "dog"]
SMALL = {"sotglp": {"n_support": 5}, "gallop": {"top_k": (1, 2, 3, 4)},        # of 16 patches
         "proda": {"n_global": 5, "n_context": 3, "n_drawn": 2}}
LABELS = torch.tensor([0, 3, 2, 1, 0])


def images(n=5):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(name, names=NAMES, seed=1):
    """A method on the random CLIP; what it learns is moved from its start, so that no two prompts are alike."""
    torch.manual_seed(seed)
    model = METHODS[name](random_clip(), names, **SMALL.get(name, {}))
    for tensor in model.learned_state().values():
        tensor.add_(0.05 * torch.randn(tensor.shape))
    return model


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def drawn_for(model, n):
    return model.draw(n, torch.Generator().manual_seed(2))


def test_outputs_scores_and_losses_have_their_shapes_and_float32(name):
    model = make(name).train()
    B, C = len(LABELS), len(NAMES)
    outputs = model(images(), drawn_for(model, B))
    loss, terms = model.loss(outputs, LABELS, B)
    assert isinstance(outputs, tuple) and model.logits(outputs).shape == (B, C)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert terms and all(term.shape == () and not term.requires_grad for term in terms.values())

    model.eval()
    outputs = model(images())
    scores = model.scores(outputs)
    assert {(score.shape, score.dtype) for score in scores.values()} == {((B, C), torch.float32)}
    assert torch.equal([*scores.values()][0], model.logits(outputs))     # the decisive one comes first
    cosines, patch_cosines = model.cosines(model.features(images()), model.encode_prompts())
    assert cosines is not None or patch_cosines is not None
    assert cosines is None or cosines.shape == (B, C) and cosines.abs().max() <= 1.001
    assert patch_cosines is None or patch_cosines.shape == (B, 16, C)


def test_gradients_reach_what_is_learned_and_nothing_else(name):
    model = make(name).train()
    model.loss(model(images(), drawn_for(model, len(LABELS))), LABELS, len(LABELS))[0].backward()
    learned = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learned and {key for key, p in model.named_parameters() if p.grad is not None} == learned
    assert not [key for key in learned if key.startswith("clip.")]
    assert learned <= {*model.learned_state()}


# In two methods a term couples all images of a batch, so that the processes exchange what it needs.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("locoop", "promptot")])
def test_parts_of_a_batch_add_up_to_the_whole(name):
    # terms without images among them: each part has its share
    model = make(name).train()
    drawn = drawn_for(model, 5)
    whole, terms = model.loss(model(images(), drawn), LABELS, 5)
    parts = [model.loss(model(images()[part], None if drawn is None else drawn[part]), LABELS[part], 5)
             for part in (slice(0, 3), slice(3, 5))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, atol=1e-5, rtol=1e-5)
    for term in terms:
        torch.testing.assert_close(sum(found[term] for _, found in parts), terms[term], atol=1e-5, rtol=1e-5)


def test_an_image_is_scored_as_if_it_were_alone(name):
    model = make(name).eval()
    with torch.no_grad():
        together = model.logits(model(images()))
        for i, image in enumerate(images()):
            torch.testing.assert_close(model.logits(model(image[None]))[0], together[i], atol=1e-4, rtol=1e-5)


def test_features_and_texts_computed_before_change_nothing(name):
    model = make(name).eval()
    with torch.no_grad():
        expected = model.logits(model(images()))
        found = model.logits(model(model.features(images()), None, model.encode_prompts()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_learned_is_all_that_a_checkpoint_needs(name):
    model, other = make(name).eval(), make(name, seed=7).eval()
    with torch.no_grad():
        expected = model.logits(model(images()))
        assert not torch.allclose(other.logits(other(images())), expected, atol=1e-3)
        saved = {key: tensor.clone() for key, tensor in model.learned_state().items()}
        for key, tensor in other.learned_state().items():
            tensor.copy_(saved[key])
        assert torch.equal(other.logits(other(images())), expected)


def test_shared_prompts_name_other_classes_and_others_say_that_they_cannot(name):
    model = make(name)
    other = make(name, ["wood", "a river"], seed=7).eval()
    shapes = [{key: tensor.shape for key, tensor in m.learned_state().items()} for m in (model, other)]
    assert (shapes[0] == shapes[1]) != model.class_specific
    if not model.class_specific:
        for key, tensor in other.learned_state().items():
            tensor.copy_(model.learned_state()[key])
        assert other.logits(other(images())).shape == (5, 2)


def test_a_method_keeps_its_clip_frozen_and_its_recipe_whole(name):
    model = make(name).train()
    assert isinstance(model, Method) and not model.clip.training
    assert not any(p.requires_grad for p in model.clip.parameters())
    assert {*model.recipe("dtd")} >= {"lr", "epochs", "warmup_epochs", "batch_size", "weight_decay"}
    drawn = drawn_for(model, 5)
    assert drawn is None or len(drawn) == 5


@pytest.mark.parametrize("stub, arguments", [("encode_prompts", ()), ("forward", (None,)), ("loss", (None, None, 1)),
                                             ("logits", (None,)), ("scores", (None,)), ("cosines", (None, None))])
def test_what_a_method_must_have_is_said_by_a_stub(stub, arguments, clip_model):
    assert getattr(Method, stub).__doc__
    with pytest.raises(NotImplementedError):
        getattr(Method(clip_model, NAMES), stub)(*arguments)
