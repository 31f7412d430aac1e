"""The compared methods: each score and loss by hand, ties to SOT-GLP's own functions, and the way through train.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import ood
from extras import linear_probe as probe_command
from harness import run_pictures, runs
import sotglp
from methods.zero_shot import template_features
import train as script
from conftest import PROJECT, read, train
from methods import METHODS, OPTIONS, constructor_options, coop, gallop, linear_probe, locoop, plot

NAMES = ["cat", "dog", "annual_crop land"]
LN3 = math.log(3)


def images(n=3):
    return torch.randn(n, 3, 32, 32)


def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


# ---- CoOp ----------------------------------------------------------------------------------------------------

def test_coop_by_hand():
    # image (.6, .8) against (1, 0) and (0, 1): cosines .6 and .8; scale 5 ln 3: the difference is .2 * 5 ln 3 = ln 3,
    # so p = (1/4, 3/4) and the loss of label 1 is ln(4/3)
    logits = coop.logits(torch.tensor([[0.6, 0.8]]), torch.eye(2), 5 * LN3)
    torch.testing.assert_close(logits, torch.tensor([[3 * LN3, 4 * LN3]]))
    assert coop.objective(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))
    assert coop.objective(logits, torch.tensor([1]), n_batch=4).item() == pytest.approx(math.log(4 / 3) / 4)


def test_coop_with_the_words_of_the_template_is_zero_shot_clip(clip_model):
    text = template_features(clip_model, NAMES, "a photo of a {}.")
    model = coop.CoOp(clip_model, NAMES, words="a photo of a").eval()
    torch.testing.assert_close(model.encode_prompts(), text, atol=1e-6, rtol=1e-5)
    batch = images()
    expected = sotglp.unit(clip_model.encode_image(batch)) @ text.T * clip_model.logit_scale.exp()
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options, shape", [
    ({}, (16, 128)), (dict(n_context=3), (3, 128)), (dict(words="a photo of a"), (4, 128)),
    (dict(n_context=3, class_specific=True), (3, 3, 128)), (dict(words="a photo", class_specific=True), (3, 2, 128))])
def test_contexts_are_shared_or_one_for_each_class(options, shape, clip_model):
    assert coop.CoOp(clip_model, NAMES, **options).context.shape == shape


def test_contexts_start_small_and_those_of_classes_differ(clip_model):
    context = coop.CoOp(clip_model, NAMES, class_specific=True).context
    assert context.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(context[0], context[1])


def test_a_context_of_a_class_changes_this_class_alone(clip_model):
    model = coop.CoOp(clip_model, NAMES, class_specific=True)
    before = model.encode_prompts()
    model.context.data[1].normal_()
    changed = (model.encode_prompts() - before).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [False, True, False]


# ---- GalLoP --------------------------------------------------------------------------------------------------

def test_each_prompt_keeps_its_own_best_patches():
    # three patches, two prompts, k = 1 and 2: .9, and (.8 + .5) / 2 = .65; with k = 2 for both: (.9 + .5) / 2 = .7
    similarity = torch.tensor([[.9, .8], [.5, .2], [.1, .5]])[None, None]
    torch.testing.assert_close(gallop.top_k_mean(similarity, (1, 2)), torch.tensor([[[.9, .65]]]))
    torch.testing.assert_close(gallop.top_k_mean(similarity, 2), torch.tensor([[[.7, .65]]]))
    # k is at most P = 3: the means of all patches, 1.5 / 3 = .5 and 1.5 / 3 = .5
    torch.testing.assert_close(gallop.top_k_mean(similarity, (20, 3)), torch.tensor([[[.5, .5]]]))


@pytest.mark.parametrize("top_k", [(1,), (1, 2, 3), (0, 1), 0])
def test_a_wrong_number_of_patches_is_refused(top_k):
    with pytest.raises(ValueError, match="--top-k takes one number"):
        gallop.top_k_mean(torch.zeros(1, 1, 4, 2), top_k)


def test_gallop_loss_and_fusion_by_hand():
    # label 0. Global logits (0, 0): ln 2. Local logits of the two prompts (ln 3, 0) and (0, 0): -ln(3/4) = .287682 and
    # ln 2 = .693147, mean .490415. The loss of the averaged logits would be .455746.
    global_logits, local_logits = torch.zeros(1, 2), torch.tensor([[[LN3, 0], [0, 0]]])
    loss = gallop.objective(global_logits, local_logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2) + 0.490415, abs=1e-6)
    # class 0: (1 + (2 + 4) / 2) / 2 = 2; class 1: (3 + 0) / 2
    fused = gallop.fuse(torch.tensor([[1., 3.]]), torch.tensor([[[2., 4.], [0., 0.]]]))
    assert fused.tolist() == [[2, 1.5]]


def test_gallop_compares_value_path_patches_behind_its_map(clip_model):
    model = gallop.GalLoP(clip_model, NAMES, top_k=(1, 2, 3, 4)).eval()
    model.local_projection.data.normal_()
    model.local_prompts.data.normal_()
    batch = images()
    _, patches = clip_model.encode_patches(batch, "value")
    patches = sotglp.unit(patches @ model.local_projection @ clip_model.visual.proj)
    similarity = torch.einsum("bpd,cld->bclp", patches, model.encode_prompts()[1]) * model.scale
    expected = torch.stack([similarity[:, :, l].sort(descending=True).values[..., : l + 1].mean(dim=-1)
                            for l in range(4)], dim=-1)
    torch.testing.assert_close(model(batch)[1], expected, atol=1e-4, rtol=1e-4)


# ---- PLOT ----------------------------------------------------------------------------------------------------

def test_plot_by_hand():
    # similarities [[.9, .6], [.6, .9]], epsilon .1: T11 = sigmoid((.9 + .9 - .6 - .6) / .2) / 2 = .476287, so
    # phi = 2 (.476287 * .9 + .023713 * .6) = .885772
    patches = torch.eye(2)[None]
    text = torch.tensor([[.9, .6], [.6, .9]])[None]
    assert plot.logits(patches, text, 1.0).item() == pytest.approx(0.885772, abs=1e-6)
    assert plot.logits(patches, text, 100.0).item() == pytest.approx(88.5772, abs=1e-4)


@pytest.mark.parametrize("epsilon, n_iters", [(0.1, 20), (0.02, 3)])
def test_plot_is_sot_glps_local_score_on_all_patches_with_a_constant_plan(epsilon, n_iters):
    patches, text = unit_vectors(2, 7, 5), unit_vectors(3, 4, 5).requires_grad_()
    found = plot.logits(patches, text, 30.0, epsilon, n_iters)
    expected = sotglp.local_logits(patches, text, 30.0, 7, epsilon, n_iters, plan_gradient=False)[0]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape)
    gradients = [torch.autograd.grad((logits * weights).sum(), text)[0] for logits in (found, expected)]
    torch.testing.assert_close(*gradients)


# ---- LoCoOp --------------------------------------------------------------------------------------------------

LIKELY = torch.tensor([.4, .3, .2, .1]).log()        # label 0 is among its two likeliest classes
UNLIKELY = torch.tensor([.1, .4, .4, .1]).log()      # and not among these


def test_background_is_where_the_own_label_is_unlikely():
    patches = torch.stack([LIKELY, UNLIKELY])[None]
    assert locoop.background(patches, torch.tensor([0]), 2).tolist() == [[False, True]]
    assert locoop.background(patches, torch.tensor([3]), 2).tolist() == [[True, True]]
    assert locoop.background(patches, torch.tensor([3]), 4).tolist() == [[False, False]]


def test_locoop_loss_by_hand():
    # the entropy of UNLIKELY: -.2 ln(.1 + 1e-5) - .8 ln(.4 + 1e-5) = 1.193510
    assert locoop.entropy(UNLIKELY).item() == pytest.approx(1.193510, abs=1e-6)
    # cross-entropy of equal logits: ln 4; a quarter of the entropy: .298378
    logits, label = torch.zeros(1, 4), torch.tensor([0])
    loss = locoop.objective(logits, torch.stack([LIKELY, UNLIKELY, UNLIKELY])[None], label, top_k=2)
    assert loss.item() == pytest.approx(math.log(4) - 0.298378, abs=1e-6)
    # without a background patch only the cross-entropy is left
    assert locoop.objective(logits, LIKELY[None, None], label, top_k=2).item() == pytest.approx(math.log(4))


def test_the_mean_is_over_the_background_patches_of_the_batch_not_of_each_image():
    # Label 0. One background patch, of entropy 1.193510, in the first image; in the second two of entropy 0, less 1e-5,
    # since they are surely class 1: the mean is 1.193510 / 3 = .397837. Over the means of the images it were .596755.
    sure = torch.tensor([-99., 99, 0, -99])
    local_logits = torch.stack([torch.stack([LIKELY, UNLIKELY]), torch.stack([sure, sure])])
    loss = locoop.objective(torch.zeros(2, 4), local_logits, torch.tensor([0, 0]), lambda_entropy=1.0, top_k=2)
    assert loss.item() == pytest.approx(math.log(4) - 0.397837, abs=2e-5)


def test_a_fifth_of_the_classes_is_likely_unless_said_otherwise():
    assert [locoop.default_top_k(n) for n in (1, 4, 10, 1000)] == [1, 1, 2, 200]
    local_logits, labels, logits = torch.randn(2, 3, 10), torch.tensor([1, 2]), torch.randn(2, 10)
    assert torch.equal(locoop.objective(logits, local_logits, labels),
                       locoop.objective(logits, local_logits, labels, top_k=2))


def test_an_undecided_background_is_better():
    # uniform probabilities have the largest entropy, so the smallest loss
    logits, labels = torch.zeros(1, 4), torch.tensor([0])
    sure = torch.tensor([[[-9., 9, 0, 0]]])
    assert locoop.objective(logits, sure / 9, labels, top_k=1) < locoop.objective(logits, sure, labels, top_k=1)


def test_locoop_is_tested_as_coop(clip_model):
    options, batch = dict(n_context=4), images()
    torch.manual_seed(3)
    one = coop.CoOp(clip_model, NAMES, **options).eval()
    torch.manual_seed(3)
    two = locoop.LoCoOp(clip_model, NAMES, **options).eval()
    assert torch.equal(one(batch)[0], two(batch)[0]) and len(two(batch)) == 1
    logits, local_logits = two.train()(batch)
    _, patches = clip_model.encode_patches(batch, "value")
    expected = two.scale * sotglp.unit(patches @ clip_model.visual.proj) @ two.encode_prompts().T
    torch.testing.assert_close(logits, one(batch)[0])
    torch.testing.assert_close(local_logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [-1, 0, 4])
def test_locoop_refuses_more_likely_classes_than_there_are(top_k, clip_model):
    with pytest.raises(ValueError, match="--top-k must lie between 1 and the number of classes, 3"):
        locoop.LoCoOp(clip_model, NAMES, top_k=top_k)
    for last in (1, 3):
        locoop.LoCoOp(clip_model, NAMES, top_k=last)


# ---- the linear probe ----------------------------------------------------------------------------------------

def test_linear_probe_by_hand():
    # Points x = 1 of class 1 and x = -1 of class 0. By symmetry w_1 = -w_0 = u/2 and b = 0. The minimum of
    # u^2 / 4 + 2 c ln(1 + e^-u) has u / 2 = 2 c / (1 + e^u), so c = (1 + e) / 4 gives u = 1.
    weight, bias = linear_probe.fit(torch.tensor([[-1.], [1.]]), torch.tensor([0, 1]), (1 + math.e) / 4)
    torch.testing.assert_close(weight, torch.tensor([[-.5], [.5]], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(bias, torch.zeros(2, dtype=torch.float64), atol=1e-5, rtol=0)
    logits = linear_probe.logits(torch.tensor([[3.]]), weight, bias)
    torch.testing.assert_close(logits, torch.tensor([[-1.5, 1.5]], dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_bias_has_no_penalty():
    # All points at 0: weights stay 0 and the biases alone fit the shares, 3 of 4 and 1 of 4: they differ by ln 3.
    weight, bias = linear_probe.fit(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), 1e-3)
    assert weight.abs().max() == 0 and (bias[0] - bias[1]).item() == pytest.approx(LN3, abs=1e-3)


def test_classes_without_images_get_a_row():
    weight, bias = linear_probe.fit(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), 1.0, n_classes=5)
    assert weight.shape == (5, 2) and bias.shape == (5,)


@pytest.mark.parametrize("better, expected", [
    # The best power of ten is 1 in all cases: the ends are .1 and 10, the middle of the logarithms is the new end.
    # Always the right end: .1 -> 1 -> 10^.5 -> ..., the right end stays 10 and is the better one of the last round.
    (lambda c: c, 10.0),
    # Always the left end, where equal too: the left end stays .1.
    (lambda c: -c, 0.1), (lambda c: 0, 0.1)])
def test_search_halves_the_interval_towards_the_better_end(better, expected, monkeypatch):
    tried = []

    def fit(features, labels, c, n_classes):
        tried.append(c)
        return c, None

    # validation accuracy: the best power of ten is 1, the rest is decided by `better`
    def right(c):
        return 100.0 if c == 1 and len(tried) <= 7 else 0.0 if len(tried) <= 7 else better(c)

    class Hits:
        def __init__(self, c):
            self.value = right(c)

        def argmax(self, dim):
            return self

        def __eq__(self, labels):
            return self

        def sum(self):
            return 1000 * self.value

    monkeypatch.setattr(linear_probe, "fit", fit)
    monkeypatch.setattr(linear_probe, "logits", lambda features, weight, bias: Hits(weight))
    labels = torch.tensor([0, 1])
    assert linear_probe.search(None, labels, None, labels) == pytest.approx(expected)
    assert tried[:7] == [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6] and len(tried) == 7 + 2 * 8
    assert tried[7:9] == pytest.approx([0.1, 10])
    middle = [1, 10] if expected == 10 else [0.1, 1]         # (.1 * 10)^.5 = 1
    assert tried[9:11] == pytest.approx(middle)


def test_linear_probe_command_chooses_fits_and_writes_the_result_of_train(pictures, clip_file, tmp_path, capsys,
                                                                          monkeypatch):
    # the pictures have no validation part: every other training image serves
    drawn, searched, fitted, as_seen = [], [], [], []
    load, fit, Pictures = data.load, probe_command.fit, data.Pictures

    def load_with_validation(*args):
        train_set, _, test, names = load(*args)
        drawn.append((args, train_set))
        return train_set, train_set[::2], test, names

    def pictures_of(*args, **options):
        as_seen.append(Pictures(*args, **options).as_people_see)
        return Pictures(*args, **options)

    monkeypatch.setattr(data, "load", load_with_validation)
    monkeypatch.setattr(data, "Pictures", pictures_of)
    monkeypatch.setattr(probe_command, "search", lambda *args: searched.append(args) or 0.37)
    monkeypatch.setattr(probe_command, "fit", lambda *args: fitted.append(args) or fit(*args))
    options = ["--dataset", "folder", "--data-root", str(pictures), "--model", str(clip_file), "--shots", "3",
               "--seed", "4", "--split-seed", "3", "--activation", "gelu", "--device", "cpu", "--output-dir",
               str(tmp_path / "probe")]
    probe_command.main(probe_command.parse_args(options))
    (args, train_set), = drawn
    assert args == ("folder", str(pictures), 3, 3) and as_seen == [True, True, True]
    with torch.no_grad():
        images = torch.stack([clip.preprocess(32)(data.read_image(path)) for path, *_ in train_set])
        features = clip.load(str(clip_file), "cpu", "gelu")[0].encode_image(images)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    for found, expected in zip(searched[0], (features, labels, features[::2], labels[::2]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert fitted[0] == (searched[0][0], searched[0][1], 0.37, 3)

    result = json.loads((tmp_path / "probe/result.json").read_text())
    # coloured noise is easy; one test image has another class's colour on purpose
    assert result["accuracy"] == pytest.approx(100 * 6 / 7)
    facts = {"method": "linear_probe", "test_images": 7, "train_images": 9, "learned_parameters": 3 * 32 + 3,
             "c": 0.37, "seed": 4, "split_seed": 3, "class_names": ["red clay", "sea", "wood"]}
    assert result.items() >= facts.items()
    assert (result["config"]["seed"], result["config"]["activation"]) == (4, "gelu")
    assert result["data"] == {part: run_pictures.digest(items, pictures)
                              for part, items in (("training", train_set), ("test", load(*args)[2]))}
    assert "accuracy 85.71 %" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run already"):
        probe_command.main(probe_command.parse_args(options))
    (tmp_path / "probe/last.pt").touch()                                  # as if another method had trained here
    (tmp_path / "probe/evaluation.json").touch()
    probe_command.main(probe_command.parse_args([*options, "--overwrite"]))
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {
        "lock", "result.json", "per_class.csv", "confusion.csv"}


def test_search_is_decided_by_the_validation_images():
    # Class 0 has (1, .1) and (-.2, .1), class 1 their negatives. A heavy penalty, up to c = 10, points the weights at
    # the sum of both, about (.8, .2); a light one, from c = 100 on, has to separate them: about (0, 1).
    train = torch.tensor([[1, 0.1], [-0.2, 0.1], [-1, -0.1], [0.2, -0.1]])
    labels, pair = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    # Validation against the second feature: right for c = 1 and below, so the first such power is 1, and of the equal
    # ends .1 and 10 the left one stays.
    heavy = torch.tensor([[0.2, -0.1], [-0.2, 0.1]])
    assert linear_probe.search(train, labels, heavy, pair) == pytest.approx(0.1)
    # Validation for it: right for c = 100 and above, of which 10^6 comes first; its left end is 10^5.
    assert linear_probe.search(train, labels, -heavy, pair) == pytest.approx(1e5)


@torch.no_grad()
def test_the_probe_of_a_run_reads_clips_features_as_they_are(clip_model):
    weight, bias = torch.randn(3, 32, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    model, batch = linear_probe.LinearProbe(clip_model, NAMES, weight, bias), images()
    expected = clip_model.encode_image(batch).double() @ weight.T + bias
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert model.scores(model(batch)).keys() == {"probe"} and model.encode_prompts() is None


def test_linear_probe_needs_validation_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args: ([], [], [], []))
    with pytest.raises(SystemExit, match="no validation images"):
        probe_command.main(probe_command.parse_args(["--output-dir", str(tmp_path)]))


# ---- what several methods share --------------------------------------------------------------------------------

def test_gallops_prompts_start_alike_and_plots_differ(clip_model):
    model = gallop.GalLoP(clip_model, NAMES)
    template = model.word_vectors("a photo of a")
    assert all(torch.equal(prompt, template) for prompt in (*model.global_prompts, *model.local_prompts))
    assert torch.equal(model.local_projection, torch.eye(len(model.local_projection)))
    assert model.draw(5).shape == (5, 1)                                  # 4 - int(.75 * 4) = 1 of 4 is kept
    prompts = plot.PLOT(clip_model, NAMES).local_prompts
    assert prompts.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(prompts[0], prompts[1])


@pytest.mark.parametrize("name, stream", [("coop", "value"), ("locoop", "value"), ("gallop", "value"), ("plot", "qk")])
def test_ood_has_raw_cosines_of_each_methods_own_patches(name, stream, clip_model):
    model, batch = METHODS[name](clip_model, NAMES).eval(), images()
    cls, patches = clip_model.encode_patches(batch, stream)
    if name == "gallop":
        model.local_projection.data.normal_()
        patches = patches @ model.local_projection
    texts = model.encode_prompts()
    pair = texts if name == "gallop" else (texts, texts)
    found = model.cosines(batch, texts)
    assert (found[0] is None) == (name == "plot")
    for cosines, tokens, text in zip(found, (cls, patches), pair):
        if cosines is not None:                                           # the mean over prompts, where there are some
            text = text if text.dim() == 3 else text[:, None]
            expected = torch.einsum("b...d,cnd->b...cn", sotglp.unit(tokens @ clip_model.visual.proj), text).mean(-1)
            torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=1e-4)


def test_a_constructors_parameter_that_is_true_becomes_a_switch(clip_model, monkeypatch):
    class Mine(coop.CoOp):
        def __init__(self, clip_model, class_names, centred=True, width=3, **texts):
            super().__init__(clip_model, class_names, **texts)
            self.options = centred, width

    monkeypatch.setitem(METHODS, "mine", Mine)
    monkeypatch.setitem(OPTIONS, "mine", constructor_options(Mine))
    for words, expected in (([], (True, 3)), (["--no-centred", "--width", "5"], (False, 5))):
        args = script.parse_args(["--method", "mine", *words])
        assert runs.make_model(clip_model, NAMES, vars(args)).options == expected


# ---- every method in the same program ------------------------------------------------------------------------

SMALL = {"coop": ("--n-context", 3), "gallop": ("--top-k", 1, 2, 3, 4), "plot": ("--n-context", 3, "--n-iters", 2),
         "locoop": ("--n-context", 3)}


def practical(options):
    """The options of the run in conftest.py that every method has."""
    drop = {options.index(name) for name in ("--n-support", "--n-iters")}
    return [value for i, value in enumerate(options) if i not in drop and i - 1 not in drop]


@pytest.fixture(scope="module", params=SMALL)
def method_run(request, options, tmp_path_factory):
    """A finished run of each method, and its options."""
    folder = tmp_path_factory.mktemp("methods") / request.param
    chosen = [*practical(options), "--method", request.param, *SMALL[request.param]]
    train(*chosen, "--output-dir", folder)
    return request.param, folder, chosen


def test_a_method_trains_and_is_read_again(method_run):
    name, folder, _ = method_run
    result, log, checkpoint = read(folder)
    assert (result["method"], result["config"]["method"], len(log)) == (name, name, 3)
    model = evaluate.load_run(folder)
    assert type(model) is METHODS[name] and not model.training
    assert result["learned_parameters"] == sum(tensor.numel() for tensor in checkpoint["learned"].values())
    again = evaluate.evaluate_run(folder, runs.read_checkpoint(folder), "cpu")
    assert again["accuracy"] == result["accuracy"] and again["zero_shot_accuracy"] == result["zero_shot_accuracy"]
    assert min(entry["loss"] for entry in log[1:]) < log[0]["loss"]


@pytest.mark.parametrize("method_run", ["gallop"], indirect=True)       # the one that draws in each step
def test_a_method_resumes_bit_for_bit(method_run, tmp_path, monkeypatch):
    _, folder, options = method_run
    finish = script.finish_epoch

    def stop(run, epoch, fields):
        finish(run, epoch, fields)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finish_epoch", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        train(*options, "--output-dir", tmp_path)
    monkeypatch.setattr(script, "finish_epoch", finish)
    train("--resume", tmp_path)
    expected = read(folder)[2]["learned"]
    for key, tensor in read(tmp_path)[2]["learned"].items():
        assert torch.equal(tensor, expected[key])


def test_a_methods_rows_of_ood_are_those_that_it_has(method_run):
    name, folder, _ = method_run
    model = evaluate.load_run(folder)
    methods = ood.make_methods(model.clip, model.class_names, model)
    with torch.no_grad():
        text_features = {name: method.encode_prompts() for name, method in methods.items()}
        rows, _ = ood.confidences(images(), methods, text_features)
    own = {row for row in rows if not row.startswith("zero_shot")}
    assert own == ({"l_mcm"} if name == "plot" else {"mcm", "l_mcm", "gl_mcm"})


def test_cached_features_train_a_method_too(method_run, tmp_path):
    _, folder, options = method_run
    train(*options, "--cache-features", "--epochs", 1, "--output-dir", tmp_path)
    assert math.isfinite(read(tmp_path)[1][0]["loss"])


def test_bf16_leaves_a_methods_losses_in_float32(method_run):
    name, folder, _ = method_run
    model = evaluate.load_run(folder).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images(), model.draw(3))
    assert {output.dtype for output in outputs} == {torch.float32}
    loss, terms = model.loss(outputs, torch.tensor([0, 1, 2]), 3)
    assert loss.dtype == torch.float32 and all(not term.requires_grad for term in terms.values())


def test_an_option_that_a_method_lacks_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--method", "coop", "--n-support", "5", "--lambda-local", "1"])
    error = capsys.readouterr().err
    assert "coop has no --n-support 5 --lambda-local 1: --method coop --help lists what it has" in error


@pytest.mark.parametrize("method, expected", [
    ("coop", dict(lr=0.002, epochs=200, warmup_epochs=1, batch_size=32, weight_decay=5e-4, n_context=16, words=None,
                  class_specific=False)),
    ("proda", dict(lr=0.001, epochs=100, warmup_epochs=1, batch_size=20, weight_decay=5e-4, n_global=32, n_context=16,
                   n_drawn=4, lambda_orthogonal=0.1)),
    ("lsn", dict(lr=0.002, epochs=100, warmup_epochs=0, batch_size=8, weight_decay=5e-4, n_context=16, n_negative=3,
                 lambda_diversity=1, double_softmax=False)),
    ("plotpp", dict(lr=0.002, epochs=200, warmup_epochs=1, batch_size=32, weight_decay=5e-4, stage=2, epsilon=0.1,
                    n_image_prompts=4, n_image_tokens=2, n_iters=20, start_from=None,
                    words=["a photo of a", "this is a photo", "this is picture of", "one picture of a"])),
    ("locoop", dict(lr=0.002, epochs=50, warmup_epochs=1, weight_decay=5e-4, lambda_entropy=0.25, top_k=None)),
    ("plot", dict(lr=0.002, epochs=50, warmup_epochs=1, batch_size=32, weight_decay=5e-4, n_local=4, n_context=16,
                  epsilon=0.1, n_iters=20)),
    ("gallop", dict(lr=0.002, epochs=200, warmup_epochs=0, weight_decay=0.01, n_global=4, n_local=4,
                    top_k=[5, 10, 15, 20], prompt_dropout=0.75, local_projection=True)),
    ("promptot", dict(lr=0.005, epochs=40, warmup_epochs=1, batch_size=4, weight_decay=5e-4, lambda_transport=10,
                      modality="joint", plan="exact", depth=12)),
    ("cocoop", dict(lr=0.002, epochs=10, warmup_epochs=1, batch_size=1, weight_decay=5e-4, words="a photo of a")),
    ("maple", dict(lr=0.0035, epochs=5, warmup_epochs=0.5, batch_size=4, weight_decay=5e-4, n_context=2, depth=9)),
    ("promptsrc", dict(lr=0.0025, epochs=50, warmup_epochs=1, batch_size=4, weight_decay=5e-4, lambda_image=10,
                       lambda_text=25, average_mean=30, average_std=30, depth=9))])
def test_a_methods_defaults_are_its_own(method, expected):
    args = vars(script.parse_args(["--method", method]))
    assert args.items() >= expected.items()
    assert args["output_dir"] == f"runs/{method}-critters-16shot-seed1"
    assert not {"n_support", "vv_attention"} & {*args} and {*OPTIONS[method]} <= {*args}


def test_an_unknown_method_is_refused_by_name(trained, tmp_path):
    checkpoint = read(trained)[2]
    torch.save({**checkpoint, "config": {**checkpoint["config"], "method": "mine"}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="it has no readable known method, but 'mine'"):
        runs.read_checkpoint(tmp_path)


def test_no_script_knows_a_method_by_name():
    # but for compare.py, whose rows they are, and the help texts of train.py
    for name in ("evaluate.py", "ood.py", "harness/runs.py", "data.py"):
        text = (PROJECT / name).read_text()
        names = ("coop", "cocoop", "maple", "promptsrc", "promptot", "plot", "locoop", "gallop", "released")
        assert not [method for method in names if f'"{method}"' in text]


def test_names_fit_behind_the_context_or_are_refused(clip_model):
    long = "word " * 56 + "word"            # 57 tokens: [SOS] + 16 + 57 + "." + [EOT] = 76 fit, with 18 they do not
    for method in (coop.CoOp, locoop.LoCoOp, plot.PLOT):
        method(clip_model, [long])
        with pytest.raises(ValueError, match="is too long"):
            method(clip_model, [long], n_context=18)


def test_words_are_tokenised_as_clip_does(clip_model):
    tokens = clip.tokenize("a photo of a")[0, 1:5]
    vectors = coop.CoOp(clip_model, NAMES).word_vectors("a photo of a")
    assert torch.equal(vectors, clip_model.token_embedding.weight[tokens])
