"""OOD detection (Sec. 3.5): scores and metrics worked by hand, the sets and their counts, and the command."""

import csv
import inspect
import json
import re
import time
from math import log, sqrt

import clip  # before torch: it bounds how long torch's threads wait

import numpy
import pytest
import torch
from PIL import Image

from sources import critters
import data
import ood
from harness import machine, ood_table
import train
from conftest import random_clip
from sotglp import SOTGLP, unit


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- scores

def test_mcm_by_hand():
    # e^ln3 / (e^ln3 + e^0) = 3/4; three equal classes: 1/3. At temperature 2, e^(ln3 / 2) = sqrt 3.
    cosines = tensor([log(3), 0])
    assert ood.mcm(cosines).tolist() == pytest.approx([3 / 4])
    assert ood.mcm(cosines - 0.4).tolist() == pytest.approx([3 / 4])          # a shift of all cosines changes nothing
    assert ood.mcm(tensor([0.2, 0.2, 0.2])).tolist() == pytest.approx([1 / 3])
    assert ood.mcm(cosines, temperature=2).tolist() == pytest.approx([sqrt(3) / (sqrt(3) + 1)])


def test_l_mcm_by_hand():
    # Three patches: 1/2, 3/4 for the first class, 4/5 for the second -> the largest of them all.
    patches = tensor([[0, 0], [log(3), 0], [0, log(4)]])
    assert ood.l_mcm(patches).tolist() == pytest.approx([4 / 5])
    assert ood.l_mcm(patches, temperature=2).tolist() == pytest.approx([2 / 3])   # e^(ln4 / 2) = 2


def test_gl_mcm_by_hand():
    # 3/4 + w 4/5: the class of the image and that of the patch may differ.
    cosines, patches = tensor([log(3), 0]), tensor([[0, 0], [0, log(4)]])
    assert ood.gl_mcm(cosines, patches).tolist() == pytest.approx([1.55])
    assert ood.gl_mcm(cosines, patches, local_weight=0.5).tolist() == pytest.approx([1.15])
    assert ood.gl_mcm(cosines, patches, temperature=2, local_weight=0).tolist() == ood.mcm(cosines, 2).tolist()
    # at temperature 2: sqrt 3 / (sqrt 3 + 1) + 2 * 2 / 3, both parts divided by it
    assert ood.gl_mcm(cosines, patches, 2, 2).tolist() == pytest.approx([sqrt(3) / (sqrt(3) + 1) + 4 / 3])


def test_each_image_has_its_own_score():
    # the first image as above, the second has equal cosines everywhere: 1/2, 1/2, and the sum of both
    cosines = tensor([log(3), 0], [0, 0])
    patches = torch.stack([tensor([0, 0], [0, log(4)]), tensor([0, 0], [0, 0])])
    assert ood.mcm(cosines).tolist() == pytest.approx([3 / 4, 1 / 2])
    assert ood.l_mcm(patches).tolist() == pytest.approx([4 / 5, 1 / 2])
    assert ood.gl_mcm(cosines, patches).tolist() == pytest.approx([1.55, 1])


def test_scores_are_float64_at_temperature_and_weight_1():
    cosines, patches = torch.rand(2, 3), torch.rand(2, 4, 3)                       # of float32
    for score in (ood.mcm(cosines), ood.l_mcm(patches), ood.gl_mcm(cosines, patches)):
        assert score.dtype == torch.float64 and score.shape == (2,)
    for function in (ood.mcm, ood.l_mcm, ood.gl_mcm):
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if "cosines" not in n}
        assert set(defaults.values()) == {1.0}


def test_temperature_1000_keeps_the_order_of_two_classes_without_ties():
    cosines = torch.stack([0.3 * torch.rand(2000), torch.zeros(2000)], dim=1)   # MCM is monotone in their difference
    warm, cold = ood.mcm(cosines, 1000), ood.mcm(cosines)
    assert torch.equal(warm.argsort(), cold.argsort())
    assert len(warm.unique()) == len(cosines.unique(dim=0))


# ---- metrics

def test_fpr95_of_four_scores_by_hand():
    # Recalls at .9 .8 .7 .65 .6: 1/4 1/2 3/4 3/4 1. Nearest to .95 is 1, at .6: accepts .65, not .5.
    assert ood.fpr95([.9, .8, .7, .6], [.65, .5]) == 1 / 2


def test_fpr95_of_ten_scores_by_hand():
    # Recall .9 at .2 and 1 at .1 are both .05 away, yet |.9 - .95| = .04999999999999993 and |1 - .95| =
    # .050000000000000044 in double precision: .9 it is. At .2 and at .15, an OOD score, it is .9: the lower one
    # counts, and accepts .95 and .15 of four.
    inside = [.1, .2, .3, .4, .5, .6, .7, .8, .9, 1.]
    assert ood.fpr95(inside, [.95, .15, .05, .02]) == 2 / 4


def test_fpr95_of_twenty_scores_by_hand():
    # Recall .95 at .10 exactly, and at .06, the OOD score below it: that accepts .06 .1 .3 .9 of six. The textbook's
    # threshold, .10, accepts .1 .3 .9: 3/6.
    inside = [i / 20 for i in range(1, 21)]
    assert ood.fpr95(inside, [.02, .04, .06, .1, .3, .9]) == 4 / 6


def test_thresholds_below_the_lowest_id_score_do_not_count():
    # One ID score: recall is 1 at .5 and below. .5 is the threshold; .4 would accept more and is not looked at.
    assert ood.fpr95([.5], [.4, .6]) == 1 / 2


def test_auroc_with_ties_by_hand():
    # Pairs: 3 > 2, 3 > 1; 2 = 2 is half a win, 2 > 1; 1 < 2, 1 = 1: 2 + 1.5 + 0.5 = 4 of 6.
    assert ood.auroc([3., 2, 1], [2., 1]) == 4 / 6
    assert ood.auroc([.9, .8, .7, .6], [.65, .5]) == 7 / 8


@pytest.mark.parametrize("inside, outside, fpr, auc", [
    ([3., 4, 5], [0., 1, 2], 0, 1), ([0., 1, 2], [3., 4, 5], 1, 0), ([1.] * 5, [1.] * 7, 1, .5)],
    ids=["perfect", "inverted", "all equal"])
def test_extremes(inside, outside, fpr, auc):
    assert ood.fpr95(inside, outside) == fpr and ood.auroc(inside, outside) == auc


def slow_fpr95(inside, outside):
    """The rule read aloud: from the highest threshold down to the first of full recall, the last of the nearest."""
    least, answer = 2.0, None
    for threshold in sorted({*inside, *outside}, reverse=True):
        recall = sum(score >= threshold for score in inside) / len(inside)
        if abs(recall - 0.95) <= least:
            least, answer = abs(recall - 0.95), sum(score >= threshold for score in outside) / len(outside)
        if recall == 1:
            return answer


@pytest.mark.parametrize("n, m, values", [(7, 9, 5), (10, 4, 8), (20, 30, 40), (40, 25, 1000), (60, 60, 12)])
def test_metrics_agree_with_their_definitions(n, m, values):
    generator = torch.Generator().manual_seed(n)
    for _ in range(30):
        inside = (torch.randint(values, (n,), generator=generator) / values + 0.2).tolist()
        outside = (torch.randint(values, (m,), generator=generator) / values).tolist()
        wins = sum((i > o) + (i == o) / 2 for i in inside for o in outside)
        assert ood.auroc(inside, outside) == pytest.approx(wins / (n * m), abs=1e-12)
        assert ood.fpr95(inside, outside) == slow_fpr95(inside, outside)


def test_only_the_order_of_scores_matters():
    inside, outside = torch.randn(200, dtype=torch.float64) + 1, torch.randn(300, dtype=torch.float64)
    for monotone in (torch.exp, lambda x: 3 * x - 7, torch.atan):
        assert ood.fpr95(monotone(inside), monotone(outside)) == ood.fpr95(inside, outside)
        assert ood.auroc(monotone(inside), monotone(outside)) == ood.auroc(inside, outside)


def test_tensors_arrays_and_lists_are_the_same_scores():
    inside, outside = torch.randn(50), torch.randn(40)
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.double):
        assert ood.fpr95(kind(inside), kind(outside)) == ood.fpr95(inside, outside)
        assert ood.auroc(kind(inside), kind(outside)) == ood.auroc(inside, outside)
    assert type(ood.fpr95(inside, outside)) is type(ood.auroc(inside, outside)) is float


def test_sixty_thousand_scores_take_less_than_a_second():
    inside, outside = torch.randn(50_000) + 1, torch.randn(10_000)
    start = time.process_time()
    fpr, auc = ood.fpr95(inside, outside), ood.auroc(inside, outside)
    assert time.process_time() - start < 1
    assert auc == pytest.approx(0.7602, abs=0.01)         # of two unit Gaussians one apart: Phi(1 / sqrt 2)
    assert fpr == pytest.approx(0.7405, abs=0.02)         # Phi(1.645 - 1)


@pytest.mark.parametrize("metric", [ood.fpr95, ood.auroc])
def test_scores_that_are_none_or_not_finite_are_refused(metric):
    with pytest.raises(ValueError, match="of 0 ID scores 0 are finite"):
        metric([], [1.0])
    with pytest.raises(ValueError, match="of 3 OOD scores 1 are finite"):
        metric([1.0], numpy.array([1, numpy.nan, numpy.inf]))


# ---- from pictures to scores

def confidences(clip_model, images, class_names, model=None, *options):
    """The rows of a table and the predicted classes, and the texts of its controls."""
    methods = ood.make_methods(clip_model, class_names, model)
    text_features = {name: method.encode_prompts() for name, method in methods.items()}
    return *ood.confidences(images, methods, text_features, *options), text_features["vv"]


@pytest.mark.parametrize("vv_attention", [True, False])
def test_rows_are_the_scores_of_averaged_cosines(clip_model, vv_attention):
    model = SOTGLP(clip_model, ["red clay", "sea"], n_support=5, vv_attention=vv_attention).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        model.local_projection.add_(0.1 * torch.randn(128, 128))
        prompts = model.encode_prompts()
        rows, predicted, text = confidences(clip_model, images, model.class_names, model, 0.1, 0.5)
        alone, nearest, _ = confidences(clip_model, images, model.class_names, None, 0.1, 0.5)
        image, patches = model.encode_images(images)
        cosines = torch.einsum("bd,cgd->bcg", image, prompts[0]).mean(dim=-1)
        patch_cosines = torch.einsum("bpd,cld->bpcl", patches, prompts[1]).mean(dim=-1)
    assert list(rows) == list(ood_table.ROWS)[:-1] and list(alone) == list(ood_table.ROWS)[:3]
    for row, expected in {"mcm": ood.mcm(cosines, 0.1), "l_mcm": ood.l_mcm(patch_cosines, 0.1),
                          "gl_mcm": ood.gl_mcm(cosines, patch_cosines, 0.1, 0.5)}.items():
        torch.testing.assert_close(rows[row], expected, atol=1e-5, rtol=0)
    assert all(torch.equal(alone[row], rows[row]) for row in alone)
    g, l = model(images)
    assert torch.equal(predicted, (g + 0.25 * l).argmax(dim=1))                    # the fused score, Sec. 3.5
    assert torch.equal(nearest, (image @ text.T).argmax(dim=1))


def test_controls_take_clips_own_features(clip_model):
    images = torch.randn(2, 3, 32, 32)
    rows, _, text = confidences(clip_model, images, ["red clay", "sea", "wood"])
    torch.testing.assert_close(text, unit(clip_model.encode_text(clip.tokenize(
        ["a photo of a red clay", "a photo of a sea", "a photo of a wood"]))))
    cosines = unit(clip_model.encode_image(images)) @ text.T
    torch.testing.assert_close(rows["zero_shot_mcm"], ood.mcm(cosines), atol=1e-6, rtol=0)
    for row, stream in {"zero_shot_gl_mcm": "value", "zero_shot_gl_mcm_vv": "vv"}.items():
        _, patches = clip_model.encode_patches(images, stream)
        expected = ood.gl_mcm(cosines, unit(patches @ clip_model.visual.proj) @ text.T)
        torch.testing.assert_close(rows[row], expected, atol=1e-6, rtol=0)


def test_the_towers_alone_run_in_mixed_precision(clip_model, monkeypatch):
    # the same tokens give the same scores, to the last digit
    images = torch.randn(2, 3, 32, 32)
    tokens = clip_model.encode_patches(images)
    methods = ood.make_methods(clip_model, ["red clay", "sea"])
    text_features = {name: method.encode_prompts() for name, method in methods.items()}
    monkeypatch.setattr(clip_model, "encode_patches", lambda *_: tokens)
    plain, _ = ood.confidences(images, methods, text_features)
    with machine.autocast("bf16", "cpu"):
        half, _ = ood.confidences(images, methods, text_features)
    assert all(torch.equal(half[row], plain[row]) for row in plain)


def test_scores_of_a_picture_do_not_depend_on_its_batch(clip_model):
    model = SOTGLP(clip_model, ["red clay", "sea"], n_support=5).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together, _, _ = confidences(clip_model, images, model.class_names, model)
        for i, image in enumerate(images):
            alone, _, _ = confidences(clip_model, image[None], model.class_names, model)
            for row in together:
                torch.testing.assert_close(alone[row][0], together[row][i], atol=1e-6, rtol=0)


# ---- the sets

def draw(folder, count, colour=(128, 128, 128)):
    """`count` pictures of noise about a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = (torch.tensor(colour) + torch.randint(-30, 30, (40, 40, 3))).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


@pytest.mark.parametrize("home, textures", [("ood_data", "dtd/images"), ("", "Texture/images"), ("", "dtd/dtd/images"),
                                            ("ImageNet_OOD_dataset", "dtd/images")])
def test_benchmark_is_found_in_every_layout_and_at_every_depth(tmp_path, home, textures):
    for count, folder in enumerate(("iNaturalist/images", "SUN", "Places/a/b", textures + "/banded"), start=1):
        draw(tmp_path / home / folder, count)
    (tmp_path / home / "SUN" / "readme.txt").write_text("no picture")
    (tmp_path / home / "SUN" / "._0.jpg").write_text("what macOS leaves in archives")
    sets = ood.ood_sets("imagenet", tmp_path)
    assert {name: len(items) for name, items in sets.items()} == dict(iNaturalist=1, SUN=2, Places=3, Textures=4)
    assert all(data.read_image(path).size == (40, 40) for items in sets.values() for path, *_ in items)


def test_a_set_is_read_from_the_first_place_that_has_pictures(tmp_path):
    for count, folder in enumerate(("iNaturalist", "SUN", "ImageNet_OOD_dataset/SUN", "ood_data/Places", "Places",
                                    "dtd/images", "Texture/images", "ood_data/Texture/images"), start=1):
        draw(tmp_path / folder, count)
    (tmp_path / "ood_data/SUN").mkdir()
    sets = ood.ood_sets("imagenet", tmp_path)
    assert [*sets] == ["iNaturalist", "SUN", "Places", "Textures"]
    assert {name: len(items) for name, items in sets.items()} == dict(iNaturalist=1, SUN=2, Places=4, Textures=8)


def test_pictures_are_those_with_a_pictures_suffix_in_order_of_their_names(tmp_path, monkeypatch):
    for folder in ("mine/b", "mine/a/deep", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("mine/2.jpg", "mine/10.PNG", "mine/b/1.JPEG", "mine/a/deep/0.jpeg", "elsewhere/1.jpg",
                 "mine/.hidden.jpg", "mine/jpg", "mine/a/notes.txt"):
        (tmp_path / file).touch()
    (tmp_path / "mine/c").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    found = ood.ood_sets("imagenet", "nowhere", {"z": "mine", "a": str(tmp_path / "elsewhere")})
    assert [*found] == ["z", "a"]
    assert found["z"] == [(f"{tmp_path}/mine/{file}", -1, "") for file in
                          ("10.PNG", "2.jpg", "a/deep/0.jpeg", "b/1.JPEG", "c/1.jpg")]


def test_every_missing_or_empty_set_is_named_with_where_it_was_looked_for(tmp_path):
    draw(tmp_path / "SUN", 1)
    (tmp_path / "ood_data/Places").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        ood.ood_sets("imagenet", tmp_path)
    message = str(error.value)
    places = [f"{tmp_path}/{home}Places" for home in ("ood_data/", "", "ImageNet_OOD_dataset/")]
    assert f"\nPlaces: no pictures in {', '.join(places)}\n" in message
    assert "iNaturalist: no" in message and "Texture/images" in message and "SUN:" not in message
    assert "iNaturalist, SUN and Places from http" in message
    with pytest.raises(FileNotFoundError, match="mine: no pictures in .*nowhere$"):  # and not where to get it
        ood.ood_sets("eurosat", tmp_path, {"mine": str(tmp_path / "nowhere"), "SUN": str(tmp_path / "SUN")})
    with pytest.raises(ValueError, match="eurosat: name folders of pictures by --ood-root"):
        ood.ood_sets("eurosat", tmp_path)


def test_wrong_counts_are_named():
    right = {"ID": 50_000, "iNaturalist": 10_000, "SUN": 10_000, "Places": 10_000, "Textures": 5_640}
    assert ood.count_warnings({name: range(n) for name, n in right.items()} | {"mine": [1]}) == []
    short, long = ood.count_warnings({name: range(n) for name, n in {**right, "SUN": 9_999, "Textures": 5_641}.items()})
    assert short.startswith("warning: SUN has 9,999 pictures, the benchmark 10,000: some are missing")
    assert long.startswith("warning: Textures has 5,641 pictures, the benchmark 5,640: others lie among them")


def test_drawn_sets_are_pictures():
    sets = ood.ood_sets("critters", "nowhere")
    assert tuple(sets) == critters.OOD_SETS and {len(items) for items in sets.values()} == {critters.OOD_SIZE}
    assert all(data.read_image(items[-1][0]).size == (64, 64) for items in sets.values())


# Table 3, "FPR95 / AUC", typed from the paper: iNaturalist, SUN, Places, Textures, Average
TABLE_3 = """
CLIP (MCM)  30.9 / 94.6  37.7 / 92.6  44.8 / 89.8  57.9 / 86.1  42.8 / 90.8
CLIP (GL)   15.2 / 96.7  30.4 / 93.1  38.9 / 89.9  57.9 / 83.6  35.5 / 90.8
SOT-GLP     10.4 / 98.0  31.7 / 92.6  39.2 / 90.2  31.2 / 92.1  28.1 / 93.2
w/o V-V     11.2 / 97.7  29.9 / 92.9  37.1 / 90.4  34.9 / 90.4  28.1 / 92.9
w/o Proj    11.2 / 97.8  24.8 / 93.9  31.1 / 92.0  28.0 / 93.1  23.8 / 94.2
"""
BENCHMARK = ["iNaturalist", "SUN", "Places", "Textures"]


def printed_row(line):
    """A line of TABLE_3 in the form of a row of ours."""
    text = next(text for text in TABLE_3.splitlines() if text.startswith(line))
    numbers = [float(word) for word in text[len(line):].split() if word != "/"]
    pairs = zip([*BENCHMARK, "mean"], numbers[::2], numbers[1::2], strict=True)
    return {name: {"fpr95": fpr, "auroc": auc} for name, fpr, auc in pairs}


CONFIG = dict(method="sotglp", dataset="imagenet", model="ViT-B/16", shots=16, vv_attention=True,
              local_projection=True, class_specific=True)


@pytest.mark.parametrize("changes, line", [
    ({}, "SOT-GLP"), ({"vv_attention": False}, "w/o V-V"), ({"local_projection": False}, "w/o Proj"),
    ({"class_specific": False}, ""), ({"vv_attention": False, "local_projection": False}, ""), ({"shots": 8}, ""),
    ({"vv_attention": False, "class_specific": False}, "")])
def test_the_papers_numbers_stand_beside_what_they_belong_to(changes, line):
    rows = {"zero_shot_mcm": printed_row("CLIP (MCM)"), "zero_shot_gl_mcm": printed_row("CLIP (GL)")}
    rows |= {"gl_mcm": printed_row(line)} if line else {}
    assert ood.paper_rows({**CONFIG, **changes}, dict.fromkeys(["ID", *BENCHMARK])) == rows


@pytest.mark.parametrize("changes, sets", [
    ({"model": "ViT-B/32"}, BENCHMARK), ({"dataset": "caltech101"}, BENCHMARK), ({}, [*BENCHMARK, "mine"]),
    ({}, BENCHMARK[:3])])
def test_the_papers_numbers_stand_beside_nothing_else(changes, sets):
    assert ood.paper_rows({**CONFIG, **changes}, dict.fromkeys(["ID", *sets])) == {}


def test_zero_shot_clip_has_the_papers_two_rows():
    rows = ood.paper_rows(dict(dataset="imagenet", model="ViT-B/16"), dict.fromkeys(["ID", *BENCHMARK]))
    assert rows == {"zero_shot_mcm": printed_row("CLIP (MCM)"), "zero_shot_gl_mcm": printed_row("CLIP (GL)")}


def test_table_is_in_percent_with_the_mean_over_sets_by_hand():
    # FPR95 1/2 and AUROC 7/8 on "near" (worked out above), 0 and 1 on "far" and "farther":
    # means 1/6 = 16.67 % and (7/8 + 2) / 3 = 23/24 = 95.83 %. L-MCM is the wrong way round: 1 and 0 everywhere.
    table = ood.measure({"ID": {"mcm": [.9, .8, .7, .6], "l_mcm": [3., 4]},
                         "near": {"mcm": [.65, .5], "l_mcm": [5., 6]}, "far": {"mcm": [.1, .2], "l_mcm": [5., 6]},
                         "farther": {"mcm": [0., .1], "l_mcm": [5., 6]}})
    found = {row: {name: (round(cell["fpr95"], 2), round(cell["auroc"], 2)) for name, cell in cells.items()}
             for row, cells in table.items()}
    assert found == {"mcm": {"near": (50, 87.5), "far": (0, 100), "farther": (0, 100), "mean": (16.67, 95.83)},
                     "l_mcm": dict.fromkeys(("near", "far", "farther", "mean"), (100, 0))}


# ---- the command

COLOURS = {"red_clay": (200, 60, 40), "sea": (30, 80, 200), "wood": (90, 140, 30)}
CLASSES = ["red clay", "sea", "wood"]


@pytest.fixture(scope="module")
def world(clip_file, tmp_path_factory):
    """A run on three colours of one's own, and two OOD sets: more of the first colour, and something grey.

    What the run learned is replaced by noise, so that no prompt equals another one and the projection is no identity.
    """
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("world")
    for split, count in {"train": 2, "test": 4}.items():
        for name, colour in COLOURS.items():
            draw(root / "data" / split / name, count, colour)
    draw(root / "clay", 5, (200, 60, 40))
    draw(root / "grey/deep/down", 4)
    options = ("--dataset", "folder", "--data-root", root / "data", "--model", clip_file, "--shots", 2, "--epochs", 1,
               "--n-support", 5, "--device", "cpu", "--output-dir", root / "run")
    train.main(train.parse_args([*map(str, options)]))
    checkpoint = torch.load(root / "run/last.pt", weights_only=True)
    for tensor in checkpoint["learned"].values():
        tensor.add_(0.3 * torch.randn(tensor.shape))
    torch.save(checkpoint, root / "run/last.pt")
    return root


def call(*arguments):
    """The command, in this process."""
    ood.main(ood.parse_args([*map(str, arguments), "--device", "cpu"]))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scores_by_hand(clip_model, paths, temperature, weight, learned=None):
    """Every row of the table for these pictures, each prompt's cosines by themselves, then their mean."""
    proj = clip_model.visual.proj
    with torch.no_grad():
        images = torch.stack([clip.preprocess(32)(data.read_image(path)) for path in paths])
        image = unit(clip_model.encode_image(images))
        text = unit(clip_model.encode_text(clip.tokenize([f"a photo of a {name}" for name in CLASSES])))
        tokens = {stream: clip_model.encode_patches(images, stream)[1] for stream in ("vv", "value")}
        cosines = decisive = image @ text.T
        rows = {"zero_shot_mcm": ood.mcm(cosines, temperature)} | {
            row: ood.gl_mcm(cosines, unit(tokens[stream] @ proj) @ text.T, temperature, weight)
            for row, stream in {"zero_shot_gl_mcm": "value", "zero_shot_gl_mcm_vv": "vv"}.items()}
        if learned:
            model = SOTGLP(clip_model, CLASSES, n_support=5).eval()
            for name, tensor in model.learned_state().items():
                tensor.copy_(learned[name])
            global_text, local_text = model.encode_prompts()                       # (C, G, D), (C, L, D)
            patches = unit(tokens["vv"] @ learned["local_projection"] @ proj)
            g, l = model(images)
            decisive = g + 0.25 * l                                                # the fused score, Sec. 3.5
            cosines = torch.stack([image @ prompt.T for prompt in global_text.unbind(1)]).mean(dim=0)
            patch_cosines = torch.stack([patches @ prompt.T for prompt in local_text.unbind(1)]).mean(dim=0)
            rows |= {"mcm": ood.mcm(cosines, temperature), "l_mcm": ood.l_mcm(patch_cosines, temperature),
                     "gl_mcm": ood.gl_mcm(cosines, patch_cosines, temperature, weight)}
    return rows, [CLASSES[label] for label in decisive.argmax(dim=1).tolist()]


@pytest.mark.parametrize("temperature, weight, options", [
    (1.0, 1.0, ()), (0.02, 0.5, ("--temperature", 0.02, "--local-weight", 0.5)),
    (0.05, 0.0, ("--temperature", 0.05, "--local-weight", 0))])
def test_table_and_csv_hold_the_scores_of_averaged_prompts(temperature, weight, options, world, tmp_path, clip_file,
                                                           capsys):
    call(world / "run", "--ood-root", f"grey={world}/grey", "--ood-root", f"clay={world}/clay",
         "--csv", tmp_path / "new/scores.csv", *options)
    rows = read_csv(tmp_path / "new/scores.csv")
    paths = {"ID": [f"{world}/data/test/{name}/{i}.jpg" for name in COLOURS for i in range(4)],
             "grey": [f"{world}/grey/deep/down/{i}.jpg" for i in range(4)],
             "clay": [f"{world}/clay/{i}.jpg" for i in range(5)]}
    assert [(row["set"], row["path"]) for row in rows] == [(name, path) for name in paths for path in paths[name]]

    learned = torch.load(world / "run/last.pt", weights_only=True)["learned"]
    clip_model, expected, classes = clip.load(str(clip_file), "cpu")[0], {}, []
    for name in paths:
        expected[name], predicted = scores_by_hand(clip_model, paths[name], temperature, weight, learned)
        classes += predicted
    assert [float(row["score"]) for row in rows] == pytest.approx(
        [score for name in paths for score in expected[name]["gl_mcm"].tolist()], abs=2e-6)
    assert [row["predicted"] for row in rows] == classes

    report = json.loads((world / "run/ood.json").read_text())
    assert (report["dataset"], report["model"], report["paper_table_3"]) == ("folder", str(clip_file), {})
    assert (report["temperature"], report["local_weight"]) == (temperature, weight)
    assert report["images"] == {"ID": 12, "grey": 4, "clay": 5} and 0 < report["seconds"] < 600
    first, head, *lines = capsys.readouterr().out.splitlines()
    assert first == (f"{world}/run: model {clip_file}, ID folder, 12 test images, OOD grey 4, clay 5; "
                     f"temperature {temperature:g}, local weight {weight:g}")
    assert head.split("percent")[1].split() == ["grey", "clay", "mean"]
    assert list(report["table"]) == list(expected["ID"])
    for line, (row, cells) in zip(lines, report["table"].items()):
        for name in ("grey", "clay"):
            inside, outside = expected["ID"][row], expected[name][row]
            assert cells[name]["auroc"] == pytest.approx(100 * ood.auroc(inside, outside))
            assert cells[name]["fpr95"] == pytest.approx(100 * ood.fpr95(inside, outside))
        for metric in ("fpr95", "auroc"):
            assert cells["mean"][metric] == pytest.approx((cells["grey"][metric] + cells["clay"][metric]) / 2)
        assert line[:38].strip() == ood_table.ROWS[row]
        assert line[38:].replace(" / ", "/").split() == [f"{cells[name]['fpr95']:.1f}/{cells[name]['auroc']:.1f}"
                                                         for name in ("grey", "clay", "mean")]


def test_zero_shot_scores_the_data_set_with_the_model_that_are_named(world, tmp_path, clip_file, capsys, monkeypatch):
    # 103 pictures of two kinds: more than go through the model at once
    draw(tmp_path / "many/a", 50, COLOURS["wood"])
    draw(tmp_path / "many/b", 53)
    monkeypatch.setenv("DATA_ROOT", str(world / "data"))                           # no --data-root needed
    call("--zero-shot", "--dataset", "folder", "--model", clip_file, "--ood-root", f"many={tmp_path}/many",
         "--csv", tmp_path / "scores.csv", "--temperature", 0.02, "--local-weight", 2)
    rows = read_csv(tmp_path / "scores.csv")
    assert [row["set"] for row in rows] == 12 * ["ID"] + 103 * ["many"]
    expected, classes = scores_by_hand(clip.load(str(clip_file), "cpu")[0], [row["path"] for row in rows], 0.02, 2)
    assert [float(row["score"]) for row in rows] == pytest.approx(expected["zero_shot_gl_mcm"].tolist(), abs=1e-5)
    assert [row["predicted"] for row in rows] == classes and len({*classes[12:]}) > 1
    first, overlap, _, *lines = capsys.readouterr().out.splitlines()
    assert overlap.startswith("warning: many holds ")    # the two sets are drawn alike
    assert first == (f"zero-shot: model {clip_file}, ID folder, 12 test images, OOD many 103; "
                     "temperature 0.02, local weight 2")
    assert [line[:38].strip() for line in lines[:3]] == [ood_table.ROWS[row] for row in expected]
    assert not any("this run" in line or "benchmark" in line for line in lines)


def test_zero_shot_without_options_is_the_embedded_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(critters, "OOD_SIZE", 2)
    monkeypatch.setattr(critters, "POOL", {"train": 1, "val": 1, "test": 2})
    call("--zero-shot", "--csv", tmp_path / "scores.csv")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"zero-shot: model tiny, ID critters, {2 * len(critters.CLASSES)} test images")
    assert lines[0].endswith("; temperature 1, local weight 1")
    rows = read_csv(tmp_path / "scores.csv")
    assert [row["set"] for row in rows] == ["ID"] * 2 * len(critters.CLASSES) + [name for name in critters.OOD_SETS
                                                                                 for _ in range(2)]
    assert rows[-1]["path"] == f"critters/ood/{critters.OOD_SETS[-1]}/1"


def test_a_run_takes_its_pictures_from_the_root_that_is_named(world, tmp_path, capsys):
    for name in COLOURS:
        draw(tmp_path / "moved/train" / name, 2)
        draw(tmp_path / "moved/test" / name, 1)
    call(world / "run", "--data-root", tmp_path / "moved", "--ood-root", f"clay={world}/clay")
    assert "ID folder, 3 test images, OOD clay 5;" in capsys.readouterr().out
    assert json.loads((world / "run/ood.json").read_text())["images"] == {"ID": 3, "clay": 5}
    (tmp_path / "moved/test/sea").rename(tmp_path / "moved/test/lake")
    (tmp_path / "moved/train/sea").rename(tmp_path / "moved/train/lake")
    with pytest.raises(SystemExit, match="trained for other classes"):
        call(world / "run", "--data-root", tmp_path / "moved", "--ood-root", f"clay={world}/clay")


def test_the_command_says_what_it_found(world, capsys):
    call(world / "run", "--ood-root", f"clay={world}/clay")
    printed = capsys.readouterr().out
    assert "12 test images, OOD clay 5;" in printed and ood_table.ROWS["gl_mcm"] in printed


def test_what_is_missing_is_one_error(world, tmp_path):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        return str(stop.value)

    assert "OOD sets are missing\ngrey: no pictures in" in error(world / "run", "--ood-root", f"grey={tmp_path}")
    assert "no OOD sets are known to go with folder" in error(world / "run")
    assert "holds no last.pt" in error(tmp_path)
    assert "\niNaturalist: no pictures" in error("--zero-shot", "--dataset", "imagenet", "--data-root", tmp_path)


@pytest.mark.parametrize("arguments, complaint", [
    ((), "either a RUN or --zero-shot"), (("RUN", "--zero-shot"), "either a RUN or --zero-shot"),
    (("RUN", "--temperature", "0"), "must be positive .* got 0.0 and 1.0"),
    (("RUN", "--temperature", "-1"), "must be positive"), (("RUN", "--temperature", "inf"), "must be positive"),
    (("RUN", "--temperature", "nan"), "must be positive"), (("RUN", "--local-weight", "nan"), "finite"),
    (("RUN", "--local-weight", "inf"), "finite, got 1.0 and inf"),
    *[(("RUN", "--ood-root", text), "takes NAME=DIR") for text in ("grey", "grey=", "=DIR", "ID=x", "mean=x")],
    (("RUN", "--ood-root", "a=x", "--ood-root", "a=y"), "every NAME another one"),
    (("RUN", "--dataset", "mnist"), "invalid choice: 'mnist'"),
    (("RUN", "--activation", "gelu"), "--activation are for --zero-shot: a RUN has its own")])
def test_options_that_make_no_sense_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        ood.parse_args([*arguments])
    assert stop.value.code == 2
    assert re.search(complaint, capsys.readouterr().err.replace("\n", " "))


def test_options_that_make_sense_are_taken():
    args = ood.parse_args(["RUN", "--ood-root", "a=x=y", "--ood-root", "b=z", "--local-weight", "0"])
    assert args.ood_root == {"a": "x=y", "b": "z"} and (args.temperature, args.local_weight) == (None, 0)
    args = ood.parse_args(["--zero-shot", "--temperature", "1000", "--local-weight", "-1"])
    assert (args.temperature, args.local_weight, args.workers) == (1000, -1, 0)
    assert (args.dataset, args.ood_root) == ("critters", {})
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_imagenet_is_checked_against_the_benchmark(clip_file, tmp_path, capsys, monkeypatch):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            draw(tmp_path / "imagenet/images" / split / wnid, 1)
    (tmp_path / "imagenet/classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    for folder in ("iNaturalist", "SUN", "Places", "dtd/images"):
        draw(tmp_path / folder, 1)
    call("--zero-shot", "--dataset", "imagenet", "--data-root", tmp_path, "--model", clip_file)
    printed = capsys.readouterr().out
    assert "warning: ID has 2 pictures, the benchmark 50,000" in printed and printed.count("half unpacked") == 5
    assert "paper" not in printed                            # a random CLIP is none of Table 3's

    # without --model it is ViT-B/16, which has the paper's rows below its own
    monkeypatch.setattr(clip, "load", lambda name, device, activation: {"ViT-B/16": (random_clip(), None)}[name])
    call("--zero-shot", "--dataset", "imagenet", "--data-root", tmp_path)
    *_, mcm, paper_mcm, gl, paper_gl, vv = [line for line in capsys.readouterr().out.splitlines() if " / " in line][1:]
    assert mcm.startswith(ood_table.ROWS["zero_shot_mcm"]) and gl.startswith(ood_table.ROWS["zero_shot_gl_mcm"])
    assert vv.startswith(ood_table.ROWS["zero_shot_gl_mcm_vv"])
    for line, row in ((paper_mcm, "CLIP (MCM)"), (paper_gl, "CLIP (GL)")):
        label, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert label == "the paper's Table 3"
        assert cells == [f"{cell['fpr95']} / {cell['auroc']}" for cell in printed_row(row).values()]


def test_worse_than_chance_is_a_warning(capsys):
    inside, inverted = {"mcm": tensor(1, 2, 3), "l_mcm": tensor(4, 5, 6)}, {"mcm": tensor(7, 8), "l_mcm": tensor(1, 2)}
    ood.show(ood.measure({"ID": inside, "odd": inverted}), {"mcm": {"odd": {"fpr95": 12.3, "auroc": 45.6}}})
    printed = capsys.readouterr().out
    assert "warning: odd: AUROC below 50 %, worse than chance: this run's MCM 0.0; is" in printed
    assert printed.count("warning") == 1 and "100.0 / 0.0" in printed
    assert printed.count("the paper's Table 3") == 1 and "12.3 / 45.6" in printed


def test_chance_itself_is_no_warning(capsys):
    cells = {name: {"fpr95": 95, "auroc": auroc} for name, auroc in {"even": 50, "odd": 49.9, "mean": 50}.items()}
    ood.show({"mcm": cells, "l_mcm": {**cells, "odd": cells["even"]}}, {})
    warning, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: odd: ") and "chance: this run's MCM 49.9;" in warning


def test_a_run_on_critters_needs_no_folder_and_takes_none(capsys):
    config = vars(train.parse_args([]))
    checkpoint = {"config": config, "class_names": critters.class_names(), "training": [], "epoch": config["epochs"]}
    sets, class_names = ood.find_pictures(ood.parse_args(["RUN", "--temperature", "1"]), checkpoint)
    assert {name: len(items) for name, items in sets.items()} == {
        "ID": 960, **dict.fromkeys(critters.OOD_SETS, critters.OOD_SIZE)} and class_names == critters.class_names()
    with pytest.raises(ValueError, match="--data-root is not used for critters"):
        ood.find_pictures(ood.parse_args(["RUN", "--temperature", "1", "--data-root", "somewhere"]), checkpoint)
