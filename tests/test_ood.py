"""OOD detection (Sec. 3.5): scores and metrics worked by hand, the sets and their counts, and the command."""

import csv
import json
import time
from math import log, sqrt

import numpy
import pytest
import torch
from PIL import Image

import critters
import data
import ood
import train
from conftest import random_clip, run
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

@pytest.mark.parametrize("vv_attention", [True, False])
def test_rows_are_the_scores_of_averaged_cosines(clip_model, vv_attention):
    model = SOTGLP(clip_model, ["red clay", "sea"], n_support=5, vv_attention=vv_attention).eval()
    images, text = torch.randn(3, 3, 32, 32), unit(torch.randn(2, 32))
    with torch.no_grad():
        model.local_projection.add_(0.1 * torch.randn(128, 128))
        prompts = model.encode_prompts()
        rows, predicted = ood.confidences(clip_model, images, text, model, [p.mean(dim=1) for p in prompts],
                                          local_weight=0.5)
        alone, nearest = ood.confidences(clip_model, images, text, local_weight=0.5)
        image, patches = model.encode_images(images)
        cosines = torch.einsum("bd,cgd->bcg", image, prompts[0]).mean(dim=-1)
        patch_cosines = torch.einsum("bpd,cld->bpcl", patches, prompts[1]).mean(dim=-1)
    assert list(rows) == list(ood.ROWS) and list(alone) == list(ood.ROWS)[:3]
    for row, expected in {"mcm": ood.mcm(cosines), "l_mcm": ood.l_mcm(patch_cosines),
                          "gl_mcm": ood.gl_mcm(cosines, patch_cosines, 1, 0.5)}.items():
        torch.testing.assert_close(rows[row], expected, atol=1e-6, rtol=0)
    assert all(torch.equal(alone[row], rows[row]) for row in alone)
    assert torch.equal(predicted, cosines.argmax(dim=1)) and torch.equal(nearest, (image @ text.T).argmax(dim=1))


def test_controls_take_clips_own_features(clip_model):
    images, text = torch.randn(2, 3, 32, 32), unit(torch.randn(5, 32))
    rows, _ = ood.confidences(clip_model, images, text)
    cosines = unit(clip_model.encode_image(images)) @ text.T
    torch.testing.assert_close(rows["zero_shot_mcm"], ood.mcm(cosines), atol=1e-6, rtol=0)
    for row, stream in {"zero_shot_gl_mcm": "value", "zero_shot_gl_mcm_vv": "vv"}.items():
        _, patches = clip_model.encode_patches(images, stream)
        expected = ood.gl_mcm(cosines, unit(patches @ clip_model.visual.proj) @ text.T)
        torch.testing.assert_close(rows[row], expected, atol=1e-6, rtol=0)


def test_scores_of_a_picture_do_not_depend_on_its_batch(clip_model):
    model = SOTGLP(clip_model, ["red clay", "sea"], n_support=5).eval()
    images, text = torch.randn(5, 3, 32, 32), unit(torch.randn(2, 32))
    with torch.no_grad():
        prompts = [p.mean(dim=1) for p in model.encode_prompts()]
        together, _ = ood.confidences(clip_model, images, text, model, prompts)
        for i, image in enumerate(images):
            alone, _ = ood.confidences(clip_model, image[None], text, model, prompts)
            for row in together:
                torch.testing.assert_close(alone[row][0], together[row][i], atol=1e-6, rtol=0)


# ---- the sets

def draw(folder, count, colour=(128, 128, 128)):
    """`count` pictures of noise about a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = (torch.tensor(colour) + torch.randint(-30, 30, (40, 40, 3))).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


@pytest.mark.parametrize("home, textures", [("ood_data", "dtd/images"), ("", "Texture/images"), ("", "dtd/dtd/images")])
def test_benchmark_is_found_in_every_layout_and_at_every_depth(tmp_path, home, textures):
    for count, folder in enumerate(("iNaturalist/images", "SUN", "Places/a/b", textures + "/banded"), start=1):
        draw(tmp_path / home / folder, count)
    (tmp_path / home / "SUN" / "readme.txt").write_text("no picture")
    (tmp_path / home / "SUN" / "._0.jpg").write_text("what macOS leaves in archives")
    sets = ood.ood_sets("imagenet", tmp_path)
    assert {name: len(items) for name, items in sets.items()} == dict(iNaturalist=1, SUN=2, Places=3, Textures=4)
    assert all(data.read_image(path).size == (40, 40) for items in sets.values() for path, *_ in items)


def test_every_missing_or_empty_set_is_named_with_where_it_was_looked_for(tmp_path):
    draw(tmp_path / "SUN", 1)
    (tmp_path / "ood_data/Places").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        ood.ood_sets("imagenet", tmp_path)
    message = str(error.value)
    assert f"Places: no pictures in {tmp_path}/ood_data/Places, {tmp_path}/Places" in message
    assert "iNaturalist: no" in message and "Texture/images" in message and "SUN:" not in message
    assert "iNaturalist, SUN and Places from http" in message
    with pytest.raises(FileNotFoundError, match="mine: no pictures in .*nowhere"):
        ood.ood_sets("eurosat", tmp_path, {"mine": str(tmp_path / "nowhere")})
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


def test_the_papers_numbers_stand_beside_what_they_belong_to():
    config = dict(dataset="imagenet", model="ViT-B/16", no_vv=False, no_local_projection=False, shared_local=False)
    sets = ["ID", "iNaturalist", "SUN", "Places", "Textures"]

    def mean(row, **changes):
        return ood.paper_rows({**config, **changes}, sets).get(row, {}).get("mean")

    assert mean("zero_shot_gl_mcm") == {"fpr95": 35.5, "auroc": 90.8} and mean("zero_shot_gl_mcm_vv") is None
    assert mean("gl_mcm") == {"fpr95": 28.1, "auroc": 93.2} and mean("mcm") is None
    assert mean("gl_mcm", no_local_projection=True) == {"fpr95": 23.8, "auroc": 94.2}
    assert mean("gl_mcm", no_vv=True) == {"fpr95": 28.1, "auroc": 92.9}
    assert mean("gl_mcm", no_vv=True, no_local_projection=True) is None and mean("gl_mcm", shared_local=True) is None
    assert mean("zero_shot_mcm", model="ViT-B/32") is None and ood.paper_rows(config, [*sets, "mine"]) == {}
    for cells in ood.TABLE_3.values():    # why: a slip of our pen would show; one average of the paper's is 0.2 off
        assert numpy.mean(cells[:4], axis=0) == pytest.approx(numpy.array(cells[4]), abs=0.2)


# ---- the command

@pytest.fixture(scope="module")
def world(clip_file, tmp_path_factory):
    """A run on two colours of one's own, and two OOD sets: more of the first colour, and something grey."""
    root = tmp_path_factory.mktemp("world")
    for split, count in {"train": 2, "test": 6}.items():
        draw(root / "data" / split / "red_clay", count, (200, 60, 40))
        draw(root / "data" / split / "sea", count, (30, 80, 200))
    draw(root / "clay", 5, (200, 60, 40))
    draw(root / "grey/deep/down", 4)
    options = ("--dataset", "folder", "--data-root", root / "data", "--model", clip_file, "--shots", 2, "--epochs", 1,
               "--n-support", 5, "--device", "cpu", "--output-dir", root / "run")
    train.main(train.parse_args([*map(str, options)]))
    return root


def test_command_prints_the_table_and_writes_what_it_is_made_of(world, tmp_path):
    process = run("ood.py", world / "run", "--ood-root", f"clay={world}/clay", "--ood-root", f"grey={world}/grey",
                  "--csv", tmp_path / "new/scores.csv", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    first, head, *lines = process.stdout.splitlines()
    assert "12 test images" in first and "clay 5, grey 4" in first and head.split()[-3:] == ["clay", "grey", "mean"]
    assert [line[:38].strip() for line in lines[:6]] == list(ood.ROWS.values())

    report = json.loads((world / "run/ood.json").read_text())
    assert report["images"] == {"ID": 12, "clay": 5, "grey": 4} and report["paper_table_3"] == {}
    cells = report["table"]["gl_mcm"]
    assert lines[5].split()[-1] == f"{cells['mean']['auroc']:.1f}"
    assert cells["mean"]["auroc"] == pytest.approx((cells["clay"]["auroc"] + cells["grey"]["auroc"]) / 2)
    with open(tmp_path / "new/scores.csv") as file:
        rows = list(csv.DictReader(file))
    scores = {name: [float(row["score"]) for row in rows if row["set"] == name] for name in ("ID", "clay", "grey")}
    assert [len(values) for values in scores.values()] == [12, 5, 4]
    for name in ("clay", "grey"):
        assert 100 * ood.auroc(scores["ID"], scores[name]) == pytest.approx(cells[name]["auroc"])
        assert 100 * ood.fpr95(scores["ID"], scores[name]) == pytest.approx(cells[name]["fpr95"])
    assert {row["predicted"] for row in rows} <= {"red clay", "sea"}
    assert rows[-1]["path"] == f"{world}/grey/deep/down/3.jpg"


def test_what_is_missing_is_one_error(world, tmp_path):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            ood.main(ood.parse_args([*map(str, arguments), "--device", "cpu"]))
        return str(stop.value)

    assert "OOD sets are missing\ngrey: no pictures in" in error(world / "run", "--ood-root", f"grey={tmp_path}")
    assert "no OOD sets are known to go with folder" in error(world / "run")
    assert "holds no last.pt" in error(tmp_path)
    assert "\niNaturalist: no pictures" in error("--zero-shot", "--dataset", "imagenet", "--data-root", tmp_path)
    for wrong in ((), ("RUN", "--zero-shot"), ("RUN", "--temperature", "0"), ("RUN", "--ood-root", "grey"),
                  ("RUN", "--ood-root", "mean=x"), ("RUN", "--ood-root", "a=x", "--ood-root", "a=y")):
        assert error(*wrong) == "2"                          # argparse, which prints the usage


def test_zero_shot_needs_no_run(clip_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(critters, "OOD_SIZE", 2)
    monkeypatch.setattr(critters, "POOL", {"train": 1, "val": 1, "test": 2})
    table = tmp_path / "scores.csv"
    ood.main(ood.parse_args(["--zero-shot", "--model", str(clip_file), "--device", "cpu", "--csv", str(table)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"zero-shot: model {clip_file}, ID critters, {2 * len(critters.CLASSES)} test images")
    assert [line[:38].strip() for line in lines[2:5]] == list(ood.ROWS.values())[:3]
    assert len(table.read_text().splitlines()) == 1 + 2 * len(critters.CLASSES) + 2 * len(critters.OOD_SETS)


def test_imagenet_is_checked_against_the_benchmark(clip_file, tmp_path, capsys):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            draw(tmp_path / "imagenet/images" / split / wnid, 1)
    (tmp_path / "imagenet/classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    for folder in ("iNaturalist", "SUN", "Places", "dtd/images"):
        draw(tmp_path / folder, 1)
    ood.main(ood.parse_args(["--zero-shot", "--dataset", "imagenet", "--data-root", str(tmp_path),
                             "--model", str(clip_file), "--device", "cpu"]))
    printed = capsys.readouterr().out
    assert "warning: ID has 2 pictures, the benchmark 50,000" in printed and printed.count("half unpacked") == 5
    assert "paper" not in printed                            # a random CLIP is none of Table 3's


def test_worse_than_chance_is_a_warning(capsys):
    inside, inverted = {"mcm": tensor(1, 2, 3), "l_mcm": tensor(4, 5, 6)}, {"mcm": tensor(7, 8), "l_mcm": tensor(1, 2)}
    ood.show(ood.measure({"ID": inside, "odd": inverted}), {"mcm": {"odd": {"fpr95": 12.3, "auroc": 45.6}}})
    printed = capsys.readouterr().out
    assert "this run's MCM: AUROC below 50 %, worse than chance, on odd 0.0, mean 0.0" in printed
    assert printed.count("warning") == 1 and "100.0 / 0.0" in printed
    assert printed.count("the paper's Table 3") == 1 and "12.3 / 45.6" in printed
