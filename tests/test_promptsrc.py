"""PromptSRC: its loss and its average by hand, the frozen CLIP's sixty texts, the way through train.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import clip
import train as script
from clip.precision import unit
from conftest import EPOCHS, read, train
from methods import promptsrc
from methods.promptsrc import TEMPLATES, PromptSRC, epoch_weights

NAMES = ["cat", "annual_crop land", "sea"]
LN3 = math.log(3)


def images(n=3):
    return torch.randn(n, 3, 32, 32)


# ---- the loss ----------------------------------------------------------------------------------------------

def one_image():
    """An image and two classes, label 1, scale 5 ln 3; numbers below."""
    image, frozen_image = torch.tensor([[.6, .8]]), torch.tensor([[.8, .6]])
    text, frozen_text = torch.tensor([[1., 0], [1, 0]]), torch.eye(2)
    return image, text, frozen_image, frozen_text, torch.tensor([1]), 5 * LN3


def test_the_terms_by_hand():
    # cosines (.6, .6): p = (1/2, 1/2), cross-entropy ln 2.
    # image: (.2 + .2) / 2. text: the second class differs, (0 + 0 + 1 + 1) / 4.
    # frozen cosines (.8, .6): their difference is .2 * 5 ln 3 = ln 3, so q = (3/4, 1/4);
    # logits: (3/4 ln(3/2) + 1/4 ln(1/2)) / 2 = .130812 / 2
    found = promptsrc.terms(*one_image())
    assert {name: term.item() for name, term in found.items()} == pytest.approx(
        {"global": math.log(2), "image": .2, "text": .5, "logits": .065406}, abs=1e-6)
    # ln 2 + 10 * .2 + 25 * .5 + .065406
    loss = promptsrc.objective(*one_image()).item()
    assert loss == pytest.approx(math.log(2) + 2 + 12.5 + .065406, abs=1e-5)
    loss = promptsrc.objective(*one_image(), lambda_image=3.0, lambda_text=.5).item()
    assert loss == pytest.approx(math.log(2) + .6 + .25 + .065406, abs=1e-5)


def random_batch(n=5, n_classes=4):
    features = [unit(torch.randn(count, 8, dtype=torch.float64)) for count in (n, n_classes, n, n_classes)]
    return *features, torch.randint(n_classes, (n,)), 20.0


def test_parts_of_a_batch_add_up_to_the_whole():
    image, text, frozen_image, frozen_text, labels, scale = batch = random_batch()
    parts = [(image[part], text, frozen_image[part], frozen_text, labels[part], scale)
             for part in (slice(2), slice(2, 5))]
    one, two = (promptsrc.terms(*part, n_batch=5) for part in parts)
    for name, term in promptsrc.terms(*batch).items():
        torch.testing.assert_close(one[name] + two[name], term)
    total = sum(promptsrc.objective(*part, n_batch=5) for part in parts)
    torch.testing.assert_close(total, promptsrc.objective(*batch))


def test_nothing_but_the_cross_entropy_is_left_where_the_prompts_change_nothing():
    image, text, _, _, labels, scale = random_batch()
    found = promptsrc.terms(image, text, image, text, labels, scale)
    assert [name for name, term in found.items() if term.item() > 1e-12] == ["global"]
    torch.testing.assert_close(found["global"], F.cross_entropy(scale * image @ text.T, labels))


def test_the_loss_is_float32_under_autocast():
    *features, labels, scale = random_batch()
    half = [feature.bfloat16() for feature in features]
    with torch.autocast("cpu", torch.bfloat16):
        found = promptsrc.terms(*half, labels, scale)
    expected = promptsrc.terms(*(feature.float() for feature in half), labels, scale)
    assert all(found[name].dtype == torch.float32 and found[name] == expected[name] for name in expected)


# ---- the average over the epochs ---------------------------------------------------------------------------

def test_the_shares_of_three_epochs_by_hand():
    # mean 2, deviation 1: exp(-1/2), 1, exp(-1/2), over their sum 2.213061
    found = epoch_weights(3, 2.0, 1.0)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([.274069, .451863, .274069], abs=1e-6)
    # a deviation of 2 divides the exponents by 4: exp(-1/8) = .882497
    assert epoch_weights(3, 2.0, 2.0)[0].item() == pytest.approx(.882497 / 2.764994, abs=1e-6)


def test_far_from_the_mean_the_nearest_epoch_has_all():
    # exp(-(990)^2 / 2) and less, all 0 in float64
    torch.testing.assert_close(epoch_weights(10, 1000.0, 1.0), F.one_hot(torch.tensor(9), 10).double())


@pytest.fixture
def model(clip_model):
    return PromptSRC(clip_model, NAMES, average_mean=2.0, average_std=1.0).train()


def test_the_prompts_become_their_average_after_the_last_epoch(model):
    # the prompts are 1, 2 and 6 after the epochs: .274069 * 1 + .451863 * 2 + .274069 * 6 = 2.822206
    for epoch, value in enumerate((1., 2, 6), 1):
        for prompts in (model.text_prompts, model.image_prompts):
            prompts.data.fill_(value)
        model.after_epoch(epoch, 3)
        assert epoch == 3 or (model.text_prompts == value).all() and (model.image_prompts == value).all()
    for prompts in model.learned_state().values():
        torch.testing.assert_close(prompts, torch.full_like(prompts, 2.822206))


def test_the_average_of_a_run_that_this_one_starts_from_does_not_count(model):
    for average in (model.average_text_prompts, model.average_image_prompts):
        average.fill_(9.)
    model.after_epoch(1, 1)                                               # of one epoch, which has all the weight
    torch.testing.assert_close(model.average_text_prompts, model.text_prompts.detach())
    torch.testing.assert_close(model.average_image_prompts, model.image_prompts.detach())


def test_what_is_learned_holds_the_average_so_far(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.learned_state().items()}
    assert shapes == dict.fromkeys(("text_prompts", "image_prompts", "average_text_prompts",
                                    "average_image_prompts"), (2, 4, 128))
    state = model.learned_state()
    averages = {name: state[f"average_{name}"] for name in ("text_prompts", "image_prompts")}
    assert all((average == 0).all() for average in averages.values())
    # the memory is the model's own, so that what is restored counts
    model.after_epoch(1, 3)
    for name, average in averages.items():
        torch.testing.assert_close(average, .274069 * state[name], atol=1e-6, rtol=1e-4)
    assert {name for name, _ in model.named_parameters() if not name.startswith("clip.")} == {
        "text_prompts", "image_prompts"}


# ---- the frozen CLIP ---------------------------------------------------------------------------------------

def test_there_are_sixty_different_templates():
    assert len(TEMPLATES) == len({*TEMPLATES}) == 60 and TEMPLATES[0] == "a photo of a {}."
    assert all(template.count("{}") == 1 for template in TEMPLATES)


def test_the_teacher_has_the_mean_of_raw_features_of_all_templates(model, monkeypatch):
    batch = images()
    image, text = model.teacher(batch)
    torch.testing.assert_close(image, unit(model.clip.encode_image(batch)))
    for c, name in enumerate(("cat", "annual crop land", "sea")):
        raw = model.clip.encode_text(clip.tokenize([template.replace("{}", name) for template in TEMPLATES]))
        torch.testing.assert_close(text[c], unit(raw.mean(dim=0)), atol=1e-5, rtol=1e-4)
    assert not (image.requires_grad or text.requires_grad)
    monkeypatch.setattr(PromptSRC, "encode_frozen", None)                          # computed once
    assert model.teacher(batch)[1] is text


def test_the_sixty_texts_are_added_in_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        text = model.teacher(images())[1]
    assert text.dtype == torch.float32 and (text != text.bfloat16().float()).any()


def test_a_step_holds_the_prompted_clip_to_the_frozen_one(clip_model):
    model = PromptSRC(clip_model, NAMES, lambda_image=3.0, lambda_text=.5).train()
    batch, labels = images(), torch.tensor([2, 0, 1])
    image = unit(clip_model.encode_image(batch, model.image_prompts))
    text = model.encode_prompts()
    parts = promptsrc.terms(image, text, *model.teacher(batch), labels, model.scale)
    expected = parts["global"] + 3 * parts["image"] + .5 * parts["text"] + parts["logits"]
    loss, terms = model.loss(model(batch), labels, 3)
    torch.testing.assert_close(terms, {name: part.detach() for name, part in parts.items()})
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for prompts in (model.text_prompts, model.image_prompts):
        assert (prompts.grad.flatten(1).abs().amax(dim=1) > 1e-6).all()            # in each block
    assert all(parameter.grad is None for parameter in clip_model.parameters())


def test_the_test_asks_no_teacher(model, monkeypatch):
    monkeypatch.setattr(PromptSRC, "teacher", None)
    assert len(model.eval()(images())) == 1


def test_prompts_stand_in_the_first_nine_blocks(clip_model):
    assert PromptSRC(clip_model, NAMES, depth=1).text_prompts.shape == (1, 4, 128)
    assert script.parse_args(["--method", "promptsrc"]).depth == 9


# ---- train.py ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def own_options(options):
    """The options of the other runs, without SOT-GLP's. Each epoch has a share of the average."""
    drop = {options.index(name) for name in ("--n-support", "--n-iters")}
    shared = [value for i, value in enumerate(options) if not drop & {i, i - 1}]
    return ["--method", "promptsrc", *shared, "--average-mean", 2, "--average-std", .8, "--classes", "base",
            "--depth", 1, "--lr", .05]


@pytest.fixture(scope="module")
def finished(own_options, tmp_path_factory):
    """An undisturbed run: what it learned, and its prompts after each epoch."""
    folder, prompts = tmp_path_factory.mktemp("promptsrc"), []
    after_epoch = PromptSRC.after_epoch

    def watch(model, epoch, epochs):
        prompts.append(model.text_prompts.detach().clone())
        after_epoch(model, epoch, epochs)

    PromptSRC.after_epoch = watch
    train(*own_options, "--output-dir", folder)
    PromptSRC.after_epoch = after_epoch
    return read(folder)[2]["learned"], prompts


def test_a_run_ends_with_the_average_of_its_epochs(finished):
    learned, prompts = finished
    assert len(prompts) == EPOCHS == 3
    # deviations from the mean (-1, 0, 1) / .8: exp(-1 / 1.28) = .457833, 1, .457833, over their sum 1.915667
    shares = .457833 / 1.915667, 1 / 1.915667, .457833 / 1.915667
    expected = sum(share * prompt for share, prompt in zip(shares, prompts))
    torch.testing.assert_close(learned["text_prompts"], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(learned["text_prompts"], prompts[-1], atol=1e-6, rtol=1e-5)


def test_a_run_resumed_between_epochs_ends_as_if_undisturbed(finished, own_options, tmp_path, monkeypatch):
    save = script.save_checkpoint

    def save_and_stop(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_stop)
        with pytest.raises(SystemExit):
            train(*own_options, "--output-dir", tmp_path)
    learned = torch.load(tmp_path / "last.pt", weights_only=True)["learned"]
    # after one epoch of three: its share of its own prompts, .457833 / 1.915667
    expected = .238994 * learned["text_prompts"]
    torch.testing.assert_close(learned["average_text_prompts"], expected, atol=1e-6, rtol=1e-4)
    train("--resume", tmp_path)
    found = read(tmp_path)[2]["learned"]
    assert found.keys() == finished[0].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in finished[0].items())


@pytest.mark.parametrize("option, value", [
    ("--average-std", 0), ("--average-std", -1), ("--average-std", "nan"), ("--average-mean", "inf"),
    ("--lambda-image", -1), ("--lambda-text", "nan")])
def test_options_out_of_range_are_refused_before_training(option, value, own_options, tmp_path):
    with pytest.raises(SystemExit, match=f"{option} must be"):
        train(*own_options, option, value, "--output-dir", tmp_path)
    assert not (tmp_path / "last.pt").exists()
