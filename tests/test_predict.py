"""Predictions of evaluate.py: probabilities by hand, pictures from the shell and from Python."""

import csv
import importlib.util
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from sources import folders
from harness import predict
import data
import evaluate
import ood
from conftest import PROJECT, copy, read, train

NAMES = ["red clay", "sea", "wood"]


def command(*arguments):
    """evaluate.py with these arguments, in this process."""
    evaluate.main(evaluate.parse_args([*map(str, arguments), "--device", "cpu"]))


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- by hand -------------------------------------------------------------------------------------------------

def test_probabilities_by_hand():
    # softmax of (log 1, log 2, log 5) is (1/8, 2/8, 5/8), of (log 3, log 1, log 4) it is (3/8, 1/8, 4/8)
    fused, other = torch.tensor([[1., 2., 5.], [4., 3., 1.]]).log(), torch.tensor([[3., 1., 4.], [3., 1., 4.]]).log()
    (top, by_score), (second, _) = predict.likeliest(fused, {"fused": fused, "global": other}, top=2)
    assert [label for label, _ in top] == [2, 1] and [p for _, p in top] == pytest.approx([5 / 8, 2 / 8])
    assert by_score == pytest.approx({"fused": 5 / 8, "global": 4 / 8})              # both of class 2
    assert [label for label, _ in second] == [0, 1]
    (top, by_score), _ = predict.likeliest(fused, {"only": fused})                          # a method with a single score
    assert len(top) == 3 and [*by_score] == ["only"]


def test_calibration_error_by_hand():
    # 15 bins of 1/15. 0.62 and 0.66 share bin (9/15, 10/15]: mean 0.64, one of two right: gap 0.14, two images.
    # 0.61 is in it too: then mean 0.63, 2/3 right: gap 0.11/3 each. 1.0: right, gap 0. 0.3: wrong, gap 0.3.
    def said(*probabilities):
        return [predict.Prediction([(0, p)], {}) for p in probabilities]

    assert evaluate.calibration_error(said(0.62, 0.66), [0, 1]) == pytest.approx(0.14)
    assert evaluate.calibration_error(said(0.62, 0.66, 0.61, 1.0, 0.3), [0, 1, 0, 0, 1]) == pytest.approx(
        (3 * abs(2 / 3 - 0.63) + 0 + 0.3) / 5)
    assert evaluate.calibration_error(said(0.4, 0.6), [0, 0], bins=1) == pytest.approx(0.5)
    # of two bins the first one ends at 1/2, which it has: (1 - .5) + (0 - .25) = .25 of two images
    assert evaluate.calibration_error(said(0.5, 0.25), [0, 1], bins=2) == pytest.approx(0.125)


# ---- from Python ---------------------------------------------------------------------------------------------

def test_predictions_are_those_of_each_picture_alone(trained, pictures):
    paths = sorted((pictures / "test").rglob("*.png"))
    model = evaluate.load_run(trained)
    found = list(evaluate.predict(model, paths, batch_size=3))                       # batches of 3, 3 and 1
    assert [path for path, _ in found] == paths
    for path, top in found:
        with Image.open(path) as picture, torch.no_grad():
            g, l = model(clip.preprocess(32)(picture)[None])
            seen, = evaluate.predict(model, picture, top=2)                          # one needs no list
        p = (g + 0.25 * l).softmax(1)[0].sort(descending=True)                       # the fused score, of Sec. 3.5
        assert [name for name, _ in top] == [NAMES[i] for i in p.indices.tolist()]
        assert [value for _, value in top] == pytest.approx(p.values.tolist(), abs=1e-6)
        assert seen[0] is picture and seen[1] == [(name, pytest.approx(value, abs=1e-6)) for name, value in top[:2]]


def test_a_picture_is_turned_before_it_is_named(trained, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                                 # to be turned by 90 degrees
    with Image.open(pictures / "test/sea/0.png") as image:
        image.save(tmp_path / "a.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png")
        image.convert("RGBA").save(tmp_path / "c.png")
        image.save(tmp_path / "d.png")
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    turned, by_hand, opaque, plain, opened = (top for _, top in evaluate.predict(
        evaluate.load_run(trained), [*paths, Image.open(paths[0])], batch_size=1))
    assert turned == by_hand == opened != plain == opaque


def test_an_unreadable_picture_is_an_error_when_its_turn_comes(trained, pictures):
    found = evaluate.predict(evaluate.load_run(trained), [pictures / "test/sea/0.png", "nowhere.png"], batch_size=9)
    assert next(found)[0] == pictures / "test/sea/0.png"
    with pytest.raises(ValueError, match="cannot read picture nowhere.png"):
        next(found)


@pytest.mark.parametrize("name", ["clip", "data", "methods", "harness", "sources"])
def test_another_package_of_one_of_our_names_is_named(name, monkeypatch):
    other = types.ModuleType(name)
    other.__file__ = f"/site-packages/{name}/__init__.py"
    monkeypatch.setitem(sys.modules, name, other)
    spec = importlib.util.spec_from_file_location("again", PROJECT / "evaluate.py")
    with pytest.raises(ImportError, match=f"another package called {name} was imported first, /site-packages/{name}/"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_another_module_that_comes_first_on_the_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "data.py").write_text("")
    monkeypatch.delitem(sys.modules, "data")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    spec = importlib.util.spec_from_file_location("again", PROJECT / "evaluate.py")
    with pytest.raises(ImportError, match=f"another package called data comes first on the path, {tmp_path}/data.py"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_random_state_of_torch_stays(trained, pictures):
    before = torch.get_rng_state()
    model = evaluate.load_run(trained)
    [*evaluate.predict(model, pictures / "test/sea/0.png")]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("numbers", [{"top": 0}, {"top": -1}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(numbers, trained):
    with pytest.raises(ValueError, match="top and batch_size must be at least 1, got"):
        evaluate.predict(None, ["a.png"], **numbers)


@pytest.mark.parametrize("make", [lambda path: np.zeros((4, 4, 3), np.uint8), lambda path: [np.zeros((4, 4, 3))],
                                  lambda path: open(path, "rb"), lambda path: path.read_bytes(), lambda path: None,
                                  lambda path: [torch.zeros(3, 4, 4)], lambda path: [open(path, "rb")]])
def test_what_is_no_path_and_no_pil_image_is_refused_in_one_sentence(make, trained, pictures):
    given = make(pictures / "test/sea/0.png")
    with pytest.raises(TypeError, match=r"^a picture is a path or a PIL image, not \w+: Image.open\(file\) .*$"):
        [*evaluate.predict(evaluate.load_run(trained), given)]
    for file in given if isinstance(given, list) else [given]:
        getattr(file, "close", lambda: None)()


def test_a_pil_image_that_breaks_is_named_by_its_place(trained, pictures, tmp_path):
    good = pictures / "test/sea/0.png"
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:-99])
    with Image.open(good) as whole, Image.open(tmp_path / "half.png") as half:
        found = evaluate.predict(evaluate.load_run(trained), [whole, good, half])
        assert [next(found)[0], next(found)[0]] == [whole, good]
        with pytest.raises(ValueError, match="cannot read picture number 3, a PIL image: OSError"):
            next(found)


# ---- from the shell ------------------------------------------------------------------------------------------

def test_folders_are_walked_and_what_fails_is_named_at_the_end(trained, pictures, tmp_path, capsys):
    inbox = tmp_path / "Fotos für später"
    shutil.copytree(pictures / "test", inbox / "deep")
    (inbox / "a.jpg").write_text("no picture")
    (inbox / "b.heic").touch()
    (tmp_path / "empty").mkdir()
    single = pictures / "test/sea/0.png"
    with pytest.raises(SystemExit, match="^error: 2 of 10 pictures could not be read$"):
        command(trained, "--images", inbox, "nowhere.png", tmp_path / "empty", single, "--csv",
                tmp_path / "new/all.csv")
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path}/new/all.csv: 8 pictures\n"
    *notes, first, second = printed.err.splitlines()
    assert notes[-2:] == [f"{inbox}: left out 1 .heic, not read as pictures, first {inbox}/b.heic",
                          f"{tmp_path}/empty: no picture in this folder"]
    assert f"{inbox}/a.jpg" in first and "nowhere.png" in second
    rows = table(tmp_path / "new/all.csv")
    assert [row["path"] for row in rows] == [*map(str, sorted((inbox / "deep").rglob("*.png"))), str(single)]
    assert [*rows[0]] == ["path", "predicted_label", "predicted", "fused", "global", "local", "class_1",
                          "probability_1", "class_2", "probability_2", "class_3", "probability_3"]
    (_, top), = evaluate.predict(evaluate.load_run(trained), [single])
    assert [(rows[-1][f"class_{i}"], float(rows[-1][f"probability_{i}"])) for i in (1, 2, 3)] == [
        (name, pytest.approx(p, abs=1e-6)) for name, p in top]
    assert (rows[-1]["predicted"], rows[-1]["fused"]) == (rows[-1]["class_1"], rows[-1]["probability_1"])
    with pytest.raises(SystemExit, match="there is no picture to name"):
        command(trained, "--images", tmp_path / "empty")


def test_a_pattern_that_the_shell_left_is_expanded(pictures, tmp_path):
    for name in ("b.png", "a.png", "c.txt", "[1].png"):
        shutil.copy(pictures / "test/sea/0.png", tmp_path / name)
    assert predict.find([f"{tmp_path}/?.png"])[0] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert predict.find([f"{tmp_path}/[1].png"])[0] == [f"{tmp_path}/[1].png"]            # a file of this name
    with pytest.raises(ValueError, match=r"no file fits .*\*.jpg"):
        predict.find([f"{tmp_path}/*.jpg"])


def test_a_file_is_treated_as_in_a_folder(tmp_path):
    for name in ("a.pgm", "b.tga", "c.nef", "d.txt"):
        (tmp_path / name).touch()
    files = [str(tmp_path / name) for name in ("a.pgm", "b.tga", "c.nef", "d.txt")]
    paths, notes = predict.find(files)
    assert paths == predict.find([str(tmp_path)])[0] == files[:2]
    assert notes == [f"{file}: left out, {file[-4:]} is not read as a picture, here as in folders" for file in files[2:]]


def test_texts_are_encoded_once_for_all_pictures(trained, pictures, monkeypatch):
    model, calls = evaluate.load_run(trained), []
    encode = type(model).encode_prompts
    monkeypatch.setattr(type(model), "encode_prompts", lambda self: calls.append(1) or encode(self))
    predict.name_files(model, [pictures / "test"])
    assert calls == [1]


def test_a_csv_of_the_test_split_has_the_accuracies_and_the_calibration_in_it(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    command(run, "--csv", tmp_path / "test.csv")
    rows, found = table(tmp_path / "test.csv"), json.loads((run / "evaluation.json").read_text())
    right = [row["label"] == row["predicted_label"] for row in rows]
    assert len(rows) == 7 and 100 * sum(right) / 7 == pytest.approx(found["accuracy"])
    assert [row["class"] for row in rows] == [row["path"].split("/")[-2].replace("_", " ") for row in rows]
    assert all(row["predicted"] == NAMES[int(row["predicted_label"])] for row in rows)
    bins = {}
    for row, hit in zip(rows, right):
        bins.setdefault(int(15 * float(row["fused"])), []).append(hit - float(row["fused"]))
    error = sum(abs(sum(gaps)) for gaps in bins.values()) / 7
    assert found["calibration_error"] == pytest.approx(100 * error, abs=1e-3)
    assert found["split"] == "test"


# ---- what is read, and how -----------------------------------------------------------------------------------

def test_every_part_of_a_run_reads_pictures_as_people_see_them(options, pictures, tmp_path, monkeypatch, capsys):
    own = []
    Image.new("RGB", (40, 40)).save((tmp_path / "x").mkdir() or tmp_path / "x/0.png")

    class Spy(data.Pictures):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            own.append(self.as_people_see)

    monkeypatch.setattr(data, "Pictures", Spy)
    monkeypatch.setattr(folders, "remarks", lambda root: [f"a remark on {root}"])
    train(*options, "--epochs", 1, "--output-dir", tmp_path / "run")                            # training, test
    train(*options, "--epochs", 1, "--cache-features", "--output-dir", tmp_path / "run", "--overwrite")
    ood.main(ood.parse_args([str(tmp_path / "run"), "--device", "cpu", "--ood-root", f"x={tmp_path}/x"]))
    assert own == [True] * 6                                                                    # ID and x
    assert capsys.readouterr().out.count(f"a remark on {pictures}\n") == 2                      # once for each training


def test_a_run_is_read_with_the_activation_that_it_was_trained_with(options, trained, tmp_path):
    train(*options, "--activation", "gelu", "--epochs", 1, "--output-dir", tmp_path)
    for run, kind in ((tmp_path, "GELU"), (trained, "QuickGELU")):
        clip_model = evaluate.load_run(run).clip
        assert {type(tower.resblocks[0].mlp.gelu).__name__ for tower in (
            clip_model.transformer, clip_model.visual.transformer)} == {kind}


def test_what_cannot_be_read_is_named_before_training(options, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "all")
    for name in ("sea/0.png", "wood/1.png"):
        (tmp_path / "all/test" / name).write_bytes((pictures / "test" / name).read_bytes()[:-99])
    with pytest.raises(SystemExit, match="2 of 16 pictures cannot be read.*\n.*sea/0.png: .*\n.*wood/1.png: "):
        train(*options, "--data-root", tmp_path / "all", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what a run was trained on, and what accuracies are measured on --------------------------------------------

@pytest.fixture(scope="module")
def flat_run(pictures, clip_file, tmp_path_factory):
    """A run on class folders alone, half of 6 pictures held out; then two more pictures came."""
    root, run = tmp_path_factory.mktemp("flat"), tmp_path_factory.mktemp("flat_run")
    for path in sorted(pictures.rglob("*.png")):
        (root / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, root / path.parent.name / f"{path.parent.parent.name}{path.name}")
    train("--dataset", "folder", "--data-root", root, "--model", clip_file, "--shots", 2, "--epochs", 1,
          "--n-support", 5, "--test-split", "val", "--device", "cpu", "--output-dir", run)
    for name in ("a", "b"):
        shutil.copy(pictures / "train/sea/0.png", root / f"sea/{name}.png")
    return root, run


def test_choices_can_be_made_on_validation_pictures(flat_run):
    root, run = flat_run
    result, _, checkpoint = read(run)
    # 7, 6 and 6 pictures: 3 of each class are held out; of 4, 3 and 3 others 2 are trained on, 2, 1 and 1 are left
    assert (result["split"], result["train_images"], result["val_images"]) == ("val", 6, 4)
    assert len(checkpoint["training"]) == 6 and not any(root.name in path for path in checkpoint["training"])


def test_a_picture_that_was_trained_on_never_counts_in_a_test(flat_run, tmp_path, capsys):
    root, run = flat_run
    run, trained = copy(run, tmp_path / "run"), {str(root / path) for path in read(run)[2]["training"]}
    for split in ("test", "val"):
        lists = dict(zip(("train", "val", "test"), data.load("folder", root, 2, 1)))
        now = {path for path, *_ in lists[split]}
        command(run, "--split", split, "--csv", tmp_path / "all.csv")
        out = capsys.readouterr().out
        assert {row["path"] for row in table(tmp_path / "all.csv")} == now - trained
        assert json.loads((run / "evaluation.json").read_text())[f"{split}_images"] == len(now - trained)
        said = f"note: {run} was trained on {len(now & trained)} of the {len(now)} {split} pictures of today"
        assert (said in out) == bool(now & trained)
    assert {path for path, *_ in lists["test"]} & trained                  # else this test would show nothing
    ood.main(ood.parse_args([str(run), "--device", "cpu", "--ood-root", f"x={root}/sea", "--csv",
                             str(tmp_path / "ood.csv")]))
    kept = {row["path"] for row in table(tmp_path / "ood.csv") if row["set"] == "ID"}
    assert kept == {path for path, *_ in lists["test"]} - trained
    assert "they are left out" in capsys.readouterr().out


def test_a_split_of_nothing_but_training_pictures_is_refused(trained, pictures, tmp_path):
    everything = [f"test/{name}/{i}.png" for name in ("red_clay", "sea", "wood") for i in range(3)]
    run = copy(trained, tmp_path / "run", training=everything)
    with pytest.raises(SystemExit, match="was trained on all pictures that are in its test part now"):
        command(run)
