"""LSN: its losses and its confidence by hand, and the method on a small random CLIP."""

import csv
import json
import math

import pytest
import torch

import ood
from conftest import images, train, unit_vectors
from extras import looking
from methods import coop, lsn
from methods.lsn import LSN

NAMES = ["cat", "red clay", "sea"]
DOUBLE = torch.float64


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- by hand

def test_the_own_class_is_the_one_that_the_image_resembles_least():
    # cosines .1 and .4: logits 20 * .9 = 18 and 20 * .6 = 12, so p = (.997527, .002473). The loss of label 0
    # is .002476; of the softmax of p, it is ln(1 + exp(.002473 - .997527)) = .314594
    logits = lsn.negative_logits(torch.tensor([[.1, .4]], dtype=DOUBLE))
    torch.testing.assert_close(logits, torch.tensor([[18, 12]], dtype=DOUBLE))
    label = torch.tensor([0])
    assert lsn.objective(logits, label).item() == pytest.approx(math.log1p(math.exp(-6)))
    assert lsn.objective(logits, label, double_softmax=True).item() == pytest.approx(.314594, abs=1e-6)
    assert lsn.objective(logits, label, True, n_batch=4).item() == pytest.approx(.314594 / 4, abs=1e-6)
    torch.testing.assert_close(lsn.negative_logits(torch.tensor([.25]), scale=4.0), torch.tensor([3.]))


def sets():
    """Of two classes the texts of three sets; cosines of the first: .6, 0, .8, of the second: 1, 0, 0."""
    text = torch.tensor([[[1, 0], [.6, .8], [0, 1]], [[1, 0], [1, 0], [0, 1]]], dtype=DOUBLE)
    return text.requires_grad_()


def test_diversity_is_the_mean_cosine_with_the_other_sets():
    # first class (.6 + 0) / 2, (.6 + .8) / 2, (0 + .8) / 2; second class .5, .5, 0; their means:
    torch.testing.assert_close(lsn.diversity(sets()), torch.tensor([.4, .6, .2], dtype=DOUBLE))


def test_the_other_sets_are_constant_in_the_gradient():
    # of the first set in the first class: the mean of the others, (.3, .9), over two classes; not twice that
    text = sets()
    gradient, = torch.autograd.grad(lsn.diversity(text).sum(), text)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([.15, .45], dtype=DOUBLE))
    gradient, = torch.autograd.grad(lsn.diversity(text)[1], text)
    assert gradient[:, [0, 2]].abs().max() == 0 and gradient[:, 1].abs().min() > 0


def test_one_set_has_no_others():
    assert lsn.diversity(unit_vectors(3, 1, 5)).tolist() == [0]


def test_the_confidence_adds_what_positive_and_negative_texts_say():
    # cosines .3, .1: sigmoid(.2) = .549834; sets (.1, .4): sigmoid(.3 / 5) = .514996, (.2, .7): sigmoid(.1)
    cosines = torch.tensor([[.3, .1]], dtype=DOUBLE)
    negative = torch.tensor([[[.1, .4], [.7, .2]]], dtype=DOUBLE)
    assert lsn.confidence(cosines, negative[:, :1]).item() == pytest.approx(1.064829, abs=1e-6)
    both = sigmoid(.2) + (sigmoid(.06) + sigmoid(.1)) / 2
    torch.testing.assert_close(lsn.confidence(cosines, negative), torch.tensor([both], dtype=DOUBLE))
    # three classes, the first is resembled least: (.18, .12, .12), so 1 / (1 + 2 exp(-.06)); and a third
    three = lsn.confidence(torch.zeros(1, 3), torch.tensor([[[.1, .4, .4]]]))
    assert three.item() == pytest.approx(1 / 3 + 1 / (1 + 2 * math.exp(-.06)), abs=1e-6)


def test_the_functions_are_float32_at_least():
    cosines = torch.rand(2, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = lsn.confidence(cosines[:, 0], cosines)
        alike = lsn.diversity(unit_vectors(3, 2, 8))
    torch.testing.assert_close(found, lsn.confidence(cosines[:, 0].float(), cosines.float()))
    assert alike.dtype == torch.float32


# ---- the method

@pytest.fixture
def model(clip_model):
    return LSN(clip_model, NAMES, n_context=3, n_negative=2)


def test_every_class_has_negative_contexts_of_its_own(model):
    assert model.context.shape == (3, 128) and model.negative_contexts.shape == (2, 3, 3, 128)
    assert model.class_specific
    assert model.negative_contexts.std().item() == pytest.approx(.02, rel=.1)
    before = model.encode_prompts()
    model.negative_contexts.data[1, 2].normal_()
    text, negative = model.encode_prompts()
    changed = (negative - before[1]).abs().amax(dim=-1) > 1e-3                     # (C, S)
    assert torch.equal(text, before[0])
    assert changed.tolist() == [[False, False], [False, False], [False, True]]


def test_the_recipe_has_no_warm_up_and_the_class_says_that_it_is_class_specific(clip_model):
    assert LSN.DEFAULTS["warmup_epochs"] == 0
    assert LSN.class_specific and LSN(clip_model, NAMES).class_specific and not coop.CoOp.class_specific


def test_a_negative_text_is_coops_with_this_context(model, clip_model):
    other = coop.CoOp(clip_model, NAMES, 3, class_specific=True)
    other.context.data.copy_(model.negative_contexts[1])
    torch.testing.assert_close(model.encode_prompts()[1][:, 1], other.encode_prompts(), atol=1e-6, rtol=1e-5)


def test_the_prediction_is_coops(model, clip_model):
    other, batch = coop.CoOp(clip_model, NAMES, 3), images(2)
    other.context.data.copy_(model.context)
    for found in (model.train()(batch)[0], *model.eval()(batch)):
        torch.testing.assert_close(found, other(batch)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("double_softmax, lambda_diversity", [(False, .3), (True, 2.0)])
def test_the_loss_adds_up_the_sets(double_softmax, lambda_diversity, clip_model):
    model = LSN(clip_model, NAMES, 3, 2, lambda_diversity, double_softmax).train()
    batch, labels = images(2), torch.tensor([2, 0])
    outputs = model(batch)
    text, negative = model.encode_prompts()
    cls, _ = clip_model.encode_patches(batch, "value")
    image = torch.nn.functional.normalize(cls @ clip_model.visual.proj, dim=-1)
    positive = lsn.objective(model.scale * image @ text.T, labels, double_softmax)
    sets = [lsn.objective(20 * (1 - image @ negative[:, s].T), labels, double_softmax) for s in range(2)]
    apart = 2 * (negative[:, 0] * negative[:, 1]).sum(-1).mean()           # each set with the other one
    loss, terms = model.loss(outputs, labels, 2)
    assert [*terms] == ["global", "negative", "diversity"]
    torch.testing.assert_close((terms["global"], terms["negative"], terms["diversity"]),
                               (positive, sum(sets), apart), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, positive + sum(sets) + lambda_diversity * apart, atol=1e-5, rtol=1e-4)


def test_the_methods_confidence_reads_images_and_features(model):
    batch, texts = images(2), model.encode_prompts()
    cosines, _ = model.cosines(batch, texts)
    cls, _ = model.clip.encode_patches(batch, "value")
    image = torch.nn.functional.normalize(cls @ model.clip.visual.proj, dim=-1)
    negative = torch.stack([image @ texts[1][:, s].T for s in range(2)], dim=1)    # (B, S, C)
    torch.testing.assert_close(cosines, image @ texts[0].T)
    found = model.confidence(batch, texts)
    torch.testing.assert_close(found, lsn.confidence(cosines, negative))
    torch.testing.assert_close(model.confidence(model.features(batch), texts), found)


def test_ood_has_a_row_of_the_methods_own_score_and_csv_lists_it(options, pictures, tmp_path, capsys):
    place = options.index("--n-support")
    train(*options[:place], "--method", "lsn", "--n-context", 3, "--n-negative", 2, "--epochs", 1,
          "--device", "cpu", "--output-dir", tmp_path)
    ood.main(ood.parse_args([str(tmp_path), "--ood-root", f"clay={pictures}/test/red_clay", "--device", "cpu",
                             "--csv", str(tmp_path / "scores.csv")]))
    table = json.loads((tmp_path / "ood.json").read_text())["table"]
    assert [*table][-2:] == ["gl_mcm", "own"] and "this method's own score" in capsys.readouterr().out
    with open(tmp_path / "scores.csv") as file:
        lines = [*csv.DictReader(file)]
    # a confidence adds two probabilities of the likeliest of three classes: more than 2/3
    inside = [float(line["score"]) for line in lines if line["set"] == "ID"]
    outside = [float(line["score"]) for line in lines if line["set"] == "clay"]
    assert min(inside) > 2 / 3
    assert 100 * ood.auroc(inside, outside) == pytest.approx(table["own"]["clay"]["auroc"])


def test_a_method_without_a_score_of_its_own_has_no_such_row(model, clip_model):
    for method in (model, coop.CoOp(clip_model, NAMES)):
        methods = ood.make_methods(clip_model, NAMES, method)
        texts = {name: one.encode_prompts() for name, one in methods.items()}
        batch = images(2)
        rows, _ = ood.confidences(batch, methods, texts)
        assert ("own" in rows) == (method is model)
        if method is model:
            torch.testing.assert_close(rows["own"], model.confidence(batch, texts["run"]).double())


def test_pictures_show_the_patches_beside_the_positive_text(model):
    batch, texts = images(1), model.encode_prompts()
    found = looking.patch_cosines(model, batch, texts, 2)
    torch.testing.assert_close(found, model.cosines(batch, texts)[1][0, :, [2]])   # (P, 1)
    assert looking.look(model.eval(), batch, texts).prompt_cosines is None       # of one prompt
