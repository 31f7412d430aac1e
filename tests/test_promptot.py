"""Prompt-OT: its transport loss by hand, and the method on a small random CLIP."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from extras import compare
from extras import tables
import data
import evaluate
import train as script
from conftest import EPOCHS, copy, random_clip, read, train
from methods.coop import CoOp
from methods.promptot import PromptOT, pair_costs, transport_loss, transport_plan
from sotglp import unit

NAMES = ["cat", "red clay", "sea"]
DOUBLE = torch.float64


# ---- the loss: two images, worked by hand

def two_images():
    """z, z0, t, t0 of one class with <t, t0> = .9."""
    z = torch.tensor([[.8, .6], [1, 0]], dtype=DOUBLE, requires_grad=True)
    z0 = torch.tensor([[1, 0], [.6, .8]], dtype=DOUBLE)
    return z, torch.tensor([[.9, .19 ** .5]], dtype=DOUBLE), z0, torch.tensor([[1, 0]], dtype=DOUBLE)


LABELS = torch.tensor([0, 0])


def test_the_cost_is_the_sum_of_two_cosine_distances():
    # <z, z0> = [[.8, .96], [1, .6]], <t, t0> = .9, so 2 - <z, z0> - <t, t0> is
    z, t, z0, t0 = two_images()
    expected = torch.tensor([[.30, .14], [.10, .50]], dtype=DOUBLE)
    torch.testing.assert_close(pair_costs(z, t, z0, t0, LABELS, LABELS), expected)
    # half the squared distance of the joined vectors
    joined, frozen = (torch.cat([image, text.expand(2, -1)], 1) for image, text in ((z, t), (z0, t0)))
    torch.testing.assert_close(torch.cdist(joined, frozen).square() / 2, expected)


def test_swapping_two_images_is_cheaper_by_hand():
    # in place (.30 + .50) / 2 = .40, swapped (.14 + .10) / 2 = .12
    z, t, z0, t0 = two_images()
    plan = transport_plan(pair_costs(z, t, z0, t0, LABELS, LABELS))
    assert plan.tolist() == [[0, .5], [.5, 0]] and not plan.requires_grad
    loss = transport_loss(z, t, z0, t0, LABELS)
    assert loss.dtype == DOUBLE and loss.item() == pytest.approx(.12)
    # with the plan constant the gradient is -z0 of the partner / 2 ...
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.tensor([[-.3, -.4], [-.5, 0]], dtype=DOUBLE))
    # ... of which the part along z falls away behind `unit`: (-.3, -.4) + .48 (.8, .6), (-.5, 0) + .5 (1, 0)
    loss = transport_loss(unit(z), t, z0, t0, LABELS)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.tensor([[.084, -.112], [0, 0]], dtype=DOUBLE))


def test_sinkhorns_plan_by_hand():
    # as in the 2x2 case of Eq. 9: plan_11 = sigmoid((.14 + .10 - .30 - .50) / (2 epsilon)) / 2
    z, t, z0, t0 = two_images()
    plan = transport_plan(pair_costs(z, t, z0, t0, LABELS, LABELS), "sinkhorn", epsilon=.1)
    diagonal = .5 / (1 + math.exp(2.8))                                            # .028662
    torch.testing.assert_close(plan, torch.tensor([[diagonal, .5 - diagonal], [.5 - diagonal, diagonal]], dtype=DOUBLE))
    loss = transport_loss(z, t, z0, t0, LABELS, plan="sinkhorn", epsilon=.1)
    assert loss.item() == pytest.approx(.8 * diagonal + .24 * (.5 - diagonal))     # .136051
    # with the plan constant: -sum_j plan_ij z0_j
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], -plan @ z0)
    assert transport_loss(z, t, z0, t0, LABELS, plan="sinkhorn", epsilon=.01).item() == pytest.approx(.12, abs=1e-7)


def test_the_plan_is_constant_for_texts_too():
    z, t, z0, t0, labels = random_batch()
    t.requires_grad_()
    cost = pair_costs(z, t, z0, t0, labels, labels)
    expected = torch.autograd.grad((transport_plan(cost.detach(), "sinkhorn") * cost).sum(), t)[0]
    found = torch.autograd.grad(transport_loss(z, t, z0, t0, labels, plan="sinkhorn"), t)[0]
    torch.testing.assert_close(found, expected)


def test_only_the_joint_plan_sees_which_image_has_which_text():
    # the images are swapped, the texts are not: each entry of the joint cost is 1 where the labels differ
    z0, t, labels = torch.eye(2), torch.eye(2), torch.tensor([0, 1])
    z = z0.flip(0)
    loss = {modality: transport_loss(z, t, z0, t, labels, modality=modality).item()
            for modality in ("joint", "image", "text")}
    assert loss == {"joint": 1, "image": 0, "text": 0}
    assert transport_loss(z, t, z0, t, torch.tensor([0, 0])).item() == 0           # of one class, a swap is free


def random_batch(n=4, n_classes=3):
    features = [unit(torch.randn(count, 8, dtype=DOUBLE)) for count in (n, n_classes, n, n_classes)]
    return *features, torch.randint(n_classes, (n,))


def test_joint_transport_lies_between_the_separate_ones_and_the_pointwise_loss():
    for _ in range(20):
        z, t, z0, t0, labels = batch = random_batch()
        joint, image, text = (transport_loss(*batch, modality=modality) for modality in ("joint", "image", "text"))
        pointwise = (1 - (z * z0).sum(1)).mean() + (1 - (t * t0).sum(1)[labels]).mean()
        assert image + text <= joint + 1e-12 and joint <= pointwise + 1e-12
    assert joint <= transport_loss(*batch, plan="sinkhorn")                   # no plan is cheaper than the exact one


def test_equal_features_cost_nothing():
    z, t, _, _, labels = random_batch()
    assert transport_loss(z, t, z, t, labels).item() == pytest.approx(0, abs=1e-12)


def test_eight_images_are_matched_exactly_and_nine_are_refused():
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    cost = torch.ones(8, 8).index_put((torch.arange(8), order), torch.tensor(.5))
    torch.testing.assert_close(transport_plan(cost), F.one_hot(order, 8) / 8)
    with pytest.raises(ValueError, match=r"at most 8 images, got 9: .*--batch-size.*plan=\"sinkhorn\""):
        transport_loss(*random_batch(9))
    assert transport_loss(*random_batch(9), plan="sinkhorn") > 0


def test_the_loss_is_float32_under_autocast():
    batch = [part.bfloat16() if part.is_floating_point() else part for part in random_batch()]
    with torch.autocast("cpu", torch.bfloat16):
        found = transport_loss(*batch)
    assert found.dtype == torch.float32 and found == transport_loss(*(part.float() for part in batch[:4]), batch[4])


# ---- the method

@pytest.fixture
def model(clip_model):
    return PromptOT(clip_model, NAMES).train()


def images():
    return torch.randn(3, 3, 32, 32)


def test_prompts_start_from_the_template_and_from_small_noise(model):
    # two blocks, four tokens, both towers 128 wide
    assert {name: tuple(p.shape) for name, p in model.learned_state().items()} == {
        "text_prompts": (2, 4, 128), "image_prompts": (2, 4, 128)}
    assert torch.equal(model.text_prompts[0], model.word_vectors("a photo of a"))
    for noise in (model.text_prompts[1], model.image_prompts[0], model.image_prompts[1]):
        assert noise.std().item() == pytest.approx(.02, rel=.2) and abs(noise.mean().item()) < .004
    assert len(PromptOT(random_clip(), NAMES, depth=1).text_prompts) == 1


def test_prompts_of_the_first_block_alone_are_coops(clip_model):
    found = PromptOT(clip_model, NAMES, depth=1).encode_prompts()
    expected = CoOp(clip_model, NAMES, words="a photo of a").encode_prompts()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_teacher_is_clip_without_prompts_on_the_same_crops(model):
    x = images()
    texts = [f"a photo of a {name}." for name in NAMES]
    expected = unit(model.clip.encode_image(x)), unit(model.clip.encode_text(evaluate.clip.tokenize(texts)))
    for found, feature in zip(model.teacher(x), expected, strict=True):
        torch.testing.assert_close(found, feature, atol=1e-5, rtol=1e-5)
        assert not found.requires_grad
    _, image, _, frozen_image, _ = model(x)
    assert torch.equal(frozen_image, expected[0]) and not torch.allclose(image, frozen_image, atol=1e-3)


@pytest.mark.parametrize("weight", [10.0, 3.0])
def test_the_objective_is_cross_entropy_and_lambda_times_transport(weight, clip_model):
    model, x, labels = PromptOT(clip_model, NAMES, weight).train(), images(), torch.tensor([2, 0, 1])
    text = model.encode_prompts()
    image = unit(clip_model.encode_image(x, model.image_prompts))
    cross_entropy = F.cross_entropy(math.exp(2) * image @ text.T, labels)
    transport = transport_loss(image, text, *model.teacher(x), labels)
    loss, terms = model.loss(model(x), labels, 3)
    torch.testing.assert_close(loss, cross_entropy + weight * transport)
    torch.testing.assert_close([*terms.values()], [cross_entropy.detach(), transport.detach()])
    loss.backward()
    for p in (model.text_prompts, model.image_prompts):                           # every block's prompts learn
        assert (p.grad.flatten(1).abs().amax(dim=1) > 1e-6).all()
    assert all(p.grad is None for p in clip_model.parameters())


def test_without_transport_it_is_ivlp_and_asks_no_teacher(clip_model, monkeypatch):
    monkeypatch.setattr(PromptOT, "teacher", None)
    model = PromptOT(clip_model, NAMES, lambda_transport=0.0).train()
    outputs = model(images())
    loss, terms = model.loss(outputs, torch.tensor([2, 0, 1]), 3)
    assert [*terms] == ["global"] and loss == terms["global"] == F.cross_entropy(*outputs, torch.tensor([2, 0, 1]))


def test_chunks_and_checkpoints_change_neither_values_nor_gradients(clip_model):
    found, x = [], images()
    for options in ({}, dict(text_chunk=1, checkpoint_text=True)):
        torch.manual_seed(3)
        model = PromptOT(clip_model, NAMES, **options).train()
        loss, _ = model.loss(model(x), torch.tensor([2, 0, 1]), 3)
        found.append((loss, *torch.autograd.grad(loss, (model.text_prompts, model.image_prompts))))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("option, value", [("modality", "both"), ("plan", "greedy")])
def test_unknown_words_are_refused(option, value, clip_model):
    with pytest.raises(ValueError, match=f"--{option} must be one of .*, got '{value}'"):
        PromptOT(clip_model, NAMES, **{option: value})


# ---- the scripts

@pytest.fixture(scope="module")
def own_options(options):
    """The options of the other runs, without SOT-GLP's."""
    at = options.index("--n-support")
    return "--method", "promptot", *options[:at], *options[at + 2:], "--classes", "base"


@pytest.fixture(scope="module")
def base_run(own_options, tmp_path_factory):
    """A run on two of three classes: half of an odd number is rounded up."""
    folder = tmp_path_factory.mktemp("promptot") / "base"
    train(*own_options, "--output-dir", folder)
    return folder


def test_a_run_is_tested_with_its_prompts_in_both_towers(base_run, pictures, capsys):
    result, log, saved = read(base_run)
    assert saved["class_names"] == ["red clay", "sea"] and result["test_images"] == 5
    assert {"global_loss", "transport_loss"} < {*log[0]}
    model = evaluate.load_run(base_run)
    preprocess = evaluate.clip.preprocess(32)
    with torch.no_grad():
        right = [model(preprocess(evaluate.data.read_image(str(path)))[None])[0].argmax().item() == label
                 for label, name in enumerate(("red_clay", "sea"))
                 for path in sorted(pictures.glob(f"test/{name}/*"))]
    assert result["accuracy"] == pytest.approx(100 * sum(right) / 5)


def test_a_resumed_run_ends_as_an_undisturbed_one(base_run, own_options, tmp_path, monkeypatch):
    save = script.save_checkpoint

    def save_and_stop(run):
        save(run)
        if run.epochs_done == EPOCHS - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script, "save_checkpoint", save_and_stop)
        train(*own_options, "--output-dir", tmp_path)
    train("--resume", tmp_path)
    for name, tensor in read(base_run)[2]["learned"].items():
        assert torch.equal(read(tmp_path)[2]["learned"][name], tensor)


def test_base_to_new_tests_the_same_prompts_on_the_other_classes(base_run, tmp_path, capsys):
    run = copy(base_run, tmp_path / "run")
    tables.main(tables.parse_args(["--base-to-new", str(run)]))
    accuracy = read(run)[0]["accuracy"]
    # of the classes "red clay", "sea", "wood" only the last one is new: it cannot be missed
    mean = 2 * accuracy * 100 / (accuracy + 100)
    assert f"accuracy           base {accuracy:.2f}  new 100.00  harmonic mean {mean:.2f}  over 1 run\n" in \
        capsys.readouterr().out
    assert (run / "evaluation-new.csv").read_text().splitlines()[1].startswith("0,wood,2,")
    assert (run / "evaluation.csv").read_text() == (run / "per_class.csv").read_text()


def test_base_to_new_by_hand():
    # means 70 and 70, so 70; the runs' own are 2 * 60 * 80 / 140 = 68.57 and the same again
    assert tables.base_new_cells([(60, 80), (80, 60)]) == {
        "base": "70.00 +- 14.14", "new": "70.00 +- 14.14", "harmonic mean": "70.00 +- 0.00"}
    assert tables.base_new_cells([(60, 80)]) == {"base": "60.00", "new": "80.00", "harmonic mean": "68.57"}


def test_a_run_is_tested_on_another_data_set(base_run, pictures, tmp_path, capsys):
    run = copy(base_run, tmp_path / "run")
    for name in ("wood", "sea", "red_clay"):
        (tmp_path / "other/test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other/train").mkdir(exist_ok=True)
        for part in ("train", "test"):
            (tmp_path / "other" / part / f"a_{name}").symlink_to(pictures / part / name)
    evaluate.main(evaluate.parse_args([str(run), "--on", "folder", "--data-root", str(tmp_path / "other")]))
    assert "on 7 test images" in capsys.readouterr().out
    assert [line.split(",")[1:3] for line in (run / "evaluation-folder.csv").read_text().splitlines()[1:]] == [
        ["a red clay", "3"], ["a sea", "2"], ["a wood", "2"]]


def test_what_a_run_was_trained_on_does_not_count_in_the_test_on_its_folder(base_run, pictures, tmp_path, capsys):
    run = copy(base_run, tmp_path / "run")
    seen = min(pictures.glob("test/sea/*")).relative_to(pictures)         # it moved from train/ to test/, say
    torch.save({**read(run)[2], "training": [str(seen)]}, run / "last.pt")
    evaluate.main(evaluate.parse_args([str(run), "--on", "folder"]))
    printed = capsys.readouterr().out
    assert "was trained on 1 of the 7 test pictures" in printed and "on 6 test images" in printed


def test_new_classes_are_found_only_beside_the_old_ones(base_run, pictures, tmp_path):
    # without red_clay the first half of the classes is "sea" and "wood"
    for part in ("train", "test"):
        shutil.copytree(pictures / part, tmp_path / part, ignore=shutil.ignore_patterns("red_clay"))
        (tmp_path / part / "zoo").symlink_to(pictures / part / "wood")
    with pytest.raises(SystemExit, match="trained for other classes: label 0 of 2 was 'red clay', in the data it is"):
        evaluate.main(evaluate.parse_args([str(copy(base_run, tmp_path / "run")), "--classes", "new", "--data-root",
                                           str(tmp_path)]))


def test_weights_are_for_two_scores_that_are_added(base_run, tmp_path):
    with pytest.raises(SystemExit, match="is a run of promptot: --weights is for sotglp"):
        compare.main(compare.parse_args(["--weights", str(copy(base_run, tmp_path / "run")), "--device", "cpu"]))


def test_a_run_is_tested_on_a_variant_of_imagenet(base_run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "imagenet_a", data.DATASETS["imagenet_a"]._replace(classes=2))
    run, home = copy(base_run, tmp_path / "run"), tmp_path / "root/imagenet-adversarial/imagenet-a"
    home.mkdir(parents=True)
    for wnid, name in (("n3", "sea"), ("n1", "wood")):
        (home / wnid).symlink_to(pictures / "test" / name)
    (tmp_path / "root/imagenet").mkdir()
    (tmp_path / "root/imagenet/classnames.txt").write_text("n1 forest floor\nn2 red clay\nn3 the sea\n")
    evaluate.main(evaluate.parse_args([str(run), "--on", "imagenet_a", "--data-root", str(tmp_path / "root")]))
    printed = capsys.readouterr().out
    assert "on 4 test images" in printed and "has 4 test pictures here, 7500 as published" in printed
    assert [line.split(",")[:3] for line in (run / "evaluation-imagenet_a.csv").read_text().splitlines()[1:]] == [
        ["0", "forest floor", "2"], ["1", "the sea", "2"]]
    (home / "n1").unlink()                                                # a download that was not finished
    with pytest.raises(SystemExit, match="1 class folders in .*imagenet-a, 2 expected"):
        evaluate.main(evaluate.parse_args([str(run), "--on", "imagenet_a", "--data-root", str(tmp_path / "root")]))


@pytest.mark.parametrize("ask", [("--on", "folder"), ("--classes", "new")])
def test_prompts_of_each_class_name_no_other_classes(ask, trained, tmp_path, capsys):
    run = copy(trained, tmp_path / "run")
    saved = read(run)[2]
    torch.save({**saved, "class_names": ["red clay", "sea"], "config": {**saved["config"], "classes": "base"}},
               run / "last.pt")
    with pytest.raises(SystemExit, match="prompts for each of its classes.*--shared-local"):
        evaluate.main(evaluate.parse_args([str(run), *ask]))


@pytest.mark.parametrize("arguments, complaint", [
    (("--method", "promptot", "--cache-features"), "--cache-features: promptot learns prompts of the image tower"),
    (("--classes", "base"), "--classes base .*prompts for each of its classes"),
    (("--method", "promptot", "--lambda-transport", -1), "--lambda-transport must be"),
    (("--method", "promptot", "--batch-size", 9), "--plan exact tries all orders of a batch of at most 8 images, got"),
    (("--method", "promptot", "--depth", 0), "--depth must be at least 1")])
def test_what_cannot_work_is_refused_before_training(arguments, complaint, pictures, clip_file, tmp_path):
    with pytest.raises(SystemExit, match=complaint):
        train(*arguments, "--dataset", "folder", "--data-root", pictures, "--model", clip_file, "--shots", 3,
              "--device", "cpu", "--output-dir", tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_new_classes_are_for_runs_on_base_classes(trained, tmp_path):
    with pytest.raises(SystemExit, match="was trained on all classes"):
        evaluate.main(evaluate.parse_args([str(copy(trained, tmp_path / "run")), "--classes", "new"]))
