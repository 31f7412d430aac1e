"""Every option of a method reaches its loss and its score, which are the plain functions' given that value.

No value is a default, and no two values of a kind are equal: an option that is lost, or changes places with
another one, shows. The methods that are not here have this test in their own files.
"""

import math

import pytest
import torch

import clip
from clip.precision import unit
from conftest import random_clip
from methods import METHODS, OPTIONS, coop, gallop, locoop, plot, promptot, released, zero_shot
from sotglp import cross_entropy, draw_prompts, fuse, global_logits, local_logits, objective

NAMES = ["sea lake", "cat", "annual crop land", "dog"]
LABELS = torch.tensor([0, 3, 2, 1, 0, 3])
SCALE = math.exp(2)            # 1/tau of the random CLIP, whose towers are 128 wide; a picture has 16 patches

# The options that say what is learned. The others act in a step or a test.
SHAPING = ("n_global", "n_local", "n_context", "words", "class_specific", "local_projection", "depth")
CASES = {
    "coop": ("coop", dict(n_context=3, class_specific=True), {"context": (4, 3, 128)}),
    "coop, words": ("coop", dict(words="a big cat"), {"context": (3, 128)}),
    "locoop": ("locoop", dict(n_context=3, class_specific=True, lambda_entropy=0.7, top_k=2),
               {"context": (4, 3, 128)}),
    "locoop, words": ("locoop", dict(words="a big cat"), {"context": (3, 128)}),
    "gallop": ("gallop", dict(n_global=5, n_local=2, top_k=(2, 7), prompt_dropout=0.5,
                              local_projection=False),
               {"global_prompts": (5, 4, 128), "local_prompts": (2, 4, 128), "local_projection": (128, 128)}),
    "plot": ("plot", dict(n_local=3, n_context=5, epsilon=0.02, n_iters=2), {"local_prompts": (3, 5, 128)}),
    "promptot": ("promptot", dict(lambda_transport=3.0, modality="image", plan="sinkhorn", epsilon=0.01,
                                  n_iters=1, depth=1),
                 {"text_prompts": (1, 4, 128), "image_prompts": (1, 4, 128)}),
    "released": ("released", dict(n_global=5, n_local=3, n_support=6, epsilon=0.02, n_iters=2,
                                  lambda_local=0.6, prompt_dropout=0.5),
                 {"global_prompts": (5, 4, 128), "local_prompts": (4, 3, 4, 128),
                  "local_projection": (128, 128)}),
    "independent": ("independent", dict(n_support=6),
                    {"global_prompts": (4, 4, 128), "local_prompts": (4, 4, 4, 128),
                     "local_projection": (128, 128)})}


def images():
    return torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(name, clip_model=None, **options):
    """A method whose learned tensors are moved from their start, so that no two prompts are alike."""
    torch.manual_seed(1)
    model = METHODS[name](clip_model or random_clip(), NAMES, **options)
    for tensor in model.learned_state().values():
        tensor.add_(0.1 * torch.randn(tensor.shape))
    return model


def generator():
    return torch.Generator().manual_seed(2)


# ---- the plain functions: model, the options that act -> loss of a training step, score of a test ----------

def seen(model, stream, local_projection=None):
    """The image features and the patches of a stream, in the joint space."""
    cls, patches = model.clip.encode_patches(images(), stream)
    proj = model.clip.visual.proj
    return unit(cls @ proj), unit(patches @ (proj if local_projection is None else local_projection @ proj))


def text_of_context(model):
    return model.encode(model.context[..., None, :, :], ".")[:, 0]


def plain_coop(model):
    image, _ = seen(model, "value")
    score = coop.logits(image, text_of_context(model), SCALE)
    return cross_entropy(score, LABELS), score


def plain_locoop(model, lambda_entropy=0.25, top_k=None):
    image, patches = seen(model, "value")
    score, local = (coop.logits(tokens, text_of_context(model), SCALE) for tokens in (image, patches))
    return locoop.objective(score, local, LABELS, lambda_entropy, top_k), score


def plain_gallop(model, top_k, prompt_dropout):
    image, patches = seen(model, "value", model.local_projection)
    global_text, local_text = model.encode(model.global_prompts), model.encode(model.local_prompts)
    local = gallop.local_logits(patches, local_text, SCALE, top_k)
    drawn = draw_prompts(len(LABELS), 5, prompt_dropout, generator())
    loss = gallop.objective(global_logits(image, global_text, SCALE, drawn), local, LABELS)
    return loss, gallop.fuse(global_logits(image, global_text, SCALE), local)


def plain_plot(model, epsilon, n_iters):
    _, patches = seen(model, "qk")
    score = plot.logits(patches, model.encode(model.local_prompts, "."), SCALE, epsilon, n_iters)
    return cross_entropy(score, LABELS), score


def plain_promptot(model, lambda_transport, **transport):
    text = model.encode(model.text_prompts[:1], ".", model.text_prompts[1:])[:, 0]
    frozen_text = zero_shot.template_features(model.clip, NAMES, "a photo of a {}.")
    image = unit(model.clip.encode_image(images(), model.image_prompts))
    frozen_image = unit(model.clip.encode_image(images()))
    loss = promptot.transport_loss(image, text, frozen_image, frozen_text, LABELS, **transport)
    score = coop.logits(image, text, SCALE)
    return cross_entropy(score, LABELS) + lambda_transport * loss, score


def plain_released(model, n_support, epsilon, n_iters, lambda_local, prompt_dropout):
    image, patches = seen(model, "released_vv", model.local_projection)
    global_text, local_text = model.encode(model.global_prompts), model.encode(model.local_prompts)
    local = released.local_mean_logits(patches, local_text, SCALE, n_support, epsilon, n_iters)
    drawn = draw_prompts(len(LABELS), 5, prompt_dropout, generator())
    loss = objective(global_logits(image, global_text, SCALE, drawn), local, LABELS, lambda_local)
    return loss, fuse(global_logits(image, global_text, SCALE), local, lambda_local)


def plain_independent(model, n_support):
    image, patches = seen(model, "vv", model.local_projection)
    global_text, local_text = model.encode(model.global_prompts), model.encode(model.local_prompts)
    local = gallop.local_logits(patches, local_text, SCALE, n_support).mean(dim=-1)
    drawn = draw_prompts(len(LABELS), 4, 0.75, generator())
    loss = objective(global_logits(image, global_text, SCALE, drawn), local, LABELS)
    return loss, fuse(global_logits(image, global_text, SCALE), local)


PLAIN = {"coop": plain_coop, "locoop": plain_locoop, "gallop": plain_gallop, "plot": plain_plot,
         "promptot": plain_promptot, "released": plain_released, "independent": plain_independent}


def acting(options):
    return {name: value for name, value in options.items() if name not in SHAPING}


def found(model):
    """Loss of a training step and score of a test, as train.py and evaluate.py ask for them."""
    outputs = model.train()(images(), model.draw(len(LABELS), generator()))
    loss, _ = model.loss(outputs, LABELS, len(LABELS))
    return loss, model.eval().logits(model(images()))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_options_reach_what_is_learned_the_loss_and_the_score(case):
    name, options, shapes = CASES[case]
    defaults = OPTIONS[name]
    assert all(value != defaults[option] for option, value in options.items())
    model = make(name, **options)
    assert {key: tuple(tensor.shape) for key, tensor in model.learned_state().items()} == shapes
    learned = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learned == {*shapes} - ({"local_projection"} if "local_projection" in options else set())
    assert model.class_specific == ("class_specific" in options or name in ("released", "independent"))

    result = found(model)
    torch.testing.assert_close(result, PLAIN[name](model, **acting(options)), atol=1e-5, rtol=1e-5)
    for option in acting(options):
        usual = defaults[option]
        usual = usual[:2] if isinstance(usual, tuple) else usual           # two numbers for two prompts
        others = PLAIN[name](model, **{**acting(options), option: usual})
        assert max(abs(one - other).max() for one, other in zip(result, others)) > 1e-4, option


def test_every_option_has_a_case():
    given = {}
    for name, options, _ in CASES.values():
        given.setdefault(name, set()).update(options)
    assert given == {name: {*OPTIONS[name]} for name in given} and OPTIONS["dense"] == {}


@torch.no_grad()
def test_dense_transport_is_sot_glp_on_all_patches():
    model = make("dense")
    image, patches = seen(model, "vv", model.local_projection)
    local, _ = local_logits(patches, model.encode(model.local_prompts), SCALE, 16)
    score = fuse(global_logits(image, model.encode(model.global_prompts), SCALE), local)
    torch.testing.assert_close(found(model)[1], score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shorter, text, image", [("text", 1, 2), ("image", 2, 1)])
def test_each_tower_has_prompts_in_as_many_blocks_as_it_has(shorter, text, image):
    clip_model = random_clip()                                             # of two blocks in each tower
    tower = clip_model.transformer if shorter == "text" else clip_model.visual.transformer
    del tower.resblocks[1:]
    model = METHODS["promptot"](clip_model, NAMES)
    assert (len(model.text_prompts), len(model.image_prompts)) == (text, image)


def test_a_context_starts_from_the_words_that_are_given():
    words = clip.tokenize("a big cat")[0, 1:4]
    for name in ("coop", "locoop"):
        for class_specific in (False, True):
            model = METHODS[name](random_clip(), NAMES, words="a big cat", class_specific=class_specific)
            expected = model.clip.token_embedding.weight[words].expand_as(model.context)
            assert torch.equal(model.context, expected)


@pytest.mark.parametrize("name, fits, too_many", [
    # [SOS] + M + 57 + "." + [EOT]: 77 tokens for M = 17
    ("coop", dict(n_context=17), dict(n_context=18)), ("coop", dict(words="a " * 17), dict(words="a " * 18)),
    ("coop", dict(words="a", n_context=99), dict(words="a " * 18, n_context=1)),
    ("locoop", dict(words="a " * 17), dict(words="a " * 18)),
    ("plot", dict(n_context=17), dict(n_context=18))])
def test_a_name_fits_to_the_last_token(name, fits, too_many):
    names = ["cat", "word " * 56 + "word"]
    METHODS[name](random_clip(), names, **fits)
    with pytest.raises(ValueError, match="is too long"):
        METHODS[name](random_clip(), names, **too_many)


# ---- what all methods take: texts, the size of the batch, draws --------------------------------------------

SMALL = {"sotglp": dict(n_support=5), "gallop": dict(n_global=3, top_k=(1, 2, 3, 4)),
         "proda": dict(n_global=5, n_context=3, n_drawn=2)}


@pytest.fixture(params=METHODS)
def model(request):
    return make(request.param, **SMALL.get(request.param, {}))


def reversed_classes(text_features):
    if isinstance(text_features, tuple):
        return tuple(text.flip(0) for text in text_features)
    return text_features.flip(0)


@torch.no_grad()
def test_texts_that_are_given_are_used(model):
    model.eval()
    texts = model.encode_prompts()
    if texts is None:
        pytest.skip("each image has its own texts")
    outputs = model(images(), None, reversed_classes(texts))
    own = model.logits(model(images()))
    torch.testing.assert_close(model.logits(outputs), own.flip(1), atol=1e-5, rtol=1e-5)
    features = model.features(images())
    swapped = model.cosines(features, reversed_classes(texts))
    for given, own in zip(swapped, model.cosines(features, texts)):
        if own is not None:
            torch.testing.assert_close(given, own.flip(-1), atol=1e-5, rtol=1e-5)
    if isinstance(model, locoop.LoCoOp):                                   # which reads them in training too
        local = model.train()(images(), None, reversed_classes(texts))[1]
        torch.testing.assert_close(local, model(images())[1].flip(2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_counts_half_in_a_batch_of_twice_as_many(model):
    outputs = model.train()(images(), model.draw(len(LABELS), generator()))
    (_, whole), (_, half) = (model.loss(outputs, LABELS, n * len(LABELS)) for n in (1, 2))
    coupled = ("entropy", "transport")         # means over the whole batch, which the processes find together
    for name in {*whole} - {*coupled}:
        torch.testing.assert_close(half[name], whole[name] / 2)


@torch.no_grad()
def test_draws_come_from_the_generator_alone(model):
    one, two = model.draw(50, generator()), model.draw(50, generator())
    if one is None:
        assert two is None
        return
    other = model.draw(50, torch.Generator().manual_seed(3))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert {*one.flatten().tolist()} <= {*range(len(model.global_prompts))}


@torch.no_grad()
def test_cosines_are_scores_without_the_scale(model):
    model.eval()
    features, texts = model.features(images()), model.encode_prompts()
    cosines, _ = model.cosines(features, texts)
    scores = model.scores(model(features, None, texts))
    if "global" in scores and cosines is not None:
        torch.testing.assert_close(SCALE * cosines, scores["global"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_reported_scores_of_gallop_by_hand():
    # 6 images, 4 classes; the local score is the mean over the prompts, not the best of them
    model = make("gallop", n_global=3, top_k=(1, 2, 3, 4)).eval()
    outputs = torch.randn(6, 4), torch.randn(6, 4, 4)
    scores = model.scores(outputs)
    assert torch.equal(scores["global"], outputs[0]) and torch.equal(scores["local"], outputs[1].mean(dim=2))
    torch.testing.assert_close(scores["fused"], (scores["global"] + scores["local"]) / 2)
    loss, terms = model.loss(outputs, LABELS, 6)
    local = torch.stack([cross_entropy(outputs[1][..., prompt], LABELS) for prompt in range(4)]).mean()
    torch.testing.assert_close(terms, {"global": cross_entropy(outputs[0], LABELS), "local": local})
    torch.testing.assert_close(loss, terms["global"] + terms["local"])


@torch.no_grad()
def test_terms_in_the_log_are_unweighted():
    model = make("locoop", lambda_entropy=0.7, top_k=2).train()
    outputs = model(images())
    loss, terms = model.loss(outputs, LABELS, 6)
    torch.testing.assert_close(terms["entropy"], locoop.background_entropy(outputs[1], LABELS, 2))
    torch.testing.assert_close(loss, terms["global"] - 0.7 * terms["entropy"])
    model = make("promptot", lambda_transport=3.0, plan="sinkhorn").train()
    loss, terms = model.loss(model(images()), LABELS, 6)
    torch.testing.assert_close(loss, terms["global"] + 3 * terms["transport"])


# ---- zero-shot CLIP, which train.py does not train ---------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("stream", ["value", "vv", "qk"])
def test_zero_shot_takes_template_stream_and_texts(stream):
    clip_model = random_clip()
    names = ["sea_lake", "cat", "dog"]
    model = zero_shot.ZeroShot(clip_model, names, "the {}, seen", stream)
    raw = clip_model.encode_text(clip.tokenize(["the sea lake, seen", "the cat, seen", "the dog, seen"]))
    found = zero_shot.template_features(clip_model, names, "the {}, seen", raw=True)
    torch.testing.assert_close(found, raw)
    image, patches = seen(model, stream)
    score, = model(images())
    torch.testing.assert_close(score, SCALE * image @ unit(raw).T, atol=1e-5, rtol=1e-5)
    swapped, = model(images(), None, unit(raw).flip(0))
    torch.testing.assert_close(swapped, score.flip(1), atol=1e-5, rtol=1e-5)
    cosines = model.cosines(images(), unit(raw).flip(0))
    for found, tokens in zip(cosines, (image, patches)):
        torch.testing.assert_close(found, tokens @ unit(raw).flip(0).T, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'word word .* does not fit with the template"):
        zero_shot.ZeroShot(clip_model, ["cat", "word " * 80], "the {}, seen")


def test_zero_shot_asks_for_a_photo_with_a_full_stop_and_looks_at_the_value_path():
    model = zero_shot.ZeroShot(random_clip(), NAMES)
    assert (model.template, model.stream) == ("a photo of a {}.", "value")


def test_methods_with_a_transport_plan_say_so():
    has_plan = {name: make(name, **SMALL.get(name, {})).has_plan for name in METHODS}
    assert [name for name in METHODS if has_plan[name]] == ["sotglp", "plot", "released", "dense"]
