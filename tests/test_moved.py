"""Runs, their pictures and their CLIP after a move to another folder or another system."""

import shutil
import unicodedata

import pytest
import torch

import evaluate
import ood
from conftest import copy, read, train
from extras import explore, visualize
from harness import run_pictures, runs
from harness.options import parse_args


@pytest.fixture
def moved(trained, clip_file, tmp_path):
    """A run whose CLIP has moved: the run in tmp_path/runs/run, the file in tmp_path/elsewhere/other.pt."""
    config = {**read(trained)[2]["config"], "model": "C:\\models\\mine.pt"}
    run = copy(trained, tmp_path / "runs/run", config=config)
    (tmp_path / "elsewhere").mkdir()
    return run, shutil.copy(clip_file, tmp_path / "elsewhere/other.pt")


def commands(run, pictures, *more):
    """Each command that needs the run's model, as a function."""
    named = [str(run), "--device", "cpu", *map(str, more)]
    sea = str(pictures / "test/sea")
    return {
        "evaluate": lambda: evaluate.main(evaluate.parse_args(named)),
        "images": lambda: evaluate.main(evaluate.parse_args([*named, "--images", sea])),
        "ood": lambda: ood.main(ood.parse_args([*named, "--ood-root", f"x={sea}"])),
        "visualize": lambda: visualize.main(visualize.parse_args([*named, "--count", "1"])),
        "batch": lambda: visualize.main(visualize.parse_args([*named, "--batch"])),
        "explore": lambda: explore.main(explore.parse_args([*named, "--count", "1"])),
        "resume": lambda: train("--resume", *named)}


@pytest.mark.parametrize("command", ["evaluate", "images", "ood", "visualize", "batch", "explore", "resume"])
def test_the_clip_of_a_run_may_be_named_anew(command, moved, pictures):
    run, file = moved
    with pytest.raises(SystemExit, match=r"was trained with the weights C:\\models\\mine.pt, which are not there, and "
                                         "mine.pt lies neither in .*run nor beside it: .*--model FILE"):
        commands(run, pictures)[command]()
    commands(run, pictures, "--model", file)[command]()


@pytest.mark.parametrize("place", ["runs/run", "runs"])
def test_a_file_of_its_name_in_or_beside_the_run_is_found(place, moved, trained, tmp_path):
    run, file = moved
    shutil.copy(file, tmp_path / place / "mine.pt")
    found, expected = (evaluate.load_run(folder).learned_state() for folder in (run, trained))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert parse_args(["--resume", str(run)]).model == str(tmp_path / place / "mine.pt")


def test_other_weights_are_not_taken_for_those_of_the_run(moved, tmp_path):
    run, file = moved
    state = torch.load(file)
    state["logit_scale"] += 1
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="was trained with other CLIP weights: .*--model FILE names others"):
        evaluate.load_run(run, model=tmp_path / "wrong.pt")
    assert evaluate.load_run(run, model=file).class_names == ["red clay", "sea", "wood"]


def test_two_runs_may_have_the_same_weights_in_two_places(trained, tmp_path):
    checkpoint = read(trained)[2]
    other = {**checkpoint, "config": {**checkpoint["config"], "model": "/elsewhere/mine.pt", "seed": 2}}
    runs.check_kind("a", checkpoint, "b", other)
    with pytest.raises(ValueError, match="b is another kind of run than a: it has other CLIP weights"):
        runs.check_kind("a", checkpoint, "b", {**other, "clip_sha256": "0"})
    named = {**other, "config": {**other["config"], "model": "ViT-B/16"}}
    with pytest.raises(ValueError, match="model was .*random.pt, is ViT-B/16"):
        runs.check_kind("a", checkpoint, "b", named)


# ---- pictures ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stored", [
    lambda path: path, lambda path: path.replace("/", "\\"), lambda path: unicodedata.normalize("NFD", path)])
def test_what_was_trained_on_another_system_does_not_count(stored, trained, pictures, tmp_path, capsys):
    for folder in pictures.iterdir():                    # "sea" is now called "Fläche", here composed
        shutil.copytree(folder, tmp_path / "photos" / folder.name)
        (tmp_path / "photos" / folder.name / "sea").rename(tmp_path / "photos" / folder.name / "Fläche")
    checkpoint = read(trained)[2]
    run = copy(trained, tmp_path / "run", training=[stored("test/Fläche/0.png"), stored("test/wood/1.png")],
               class_names=[stored("Fläche"), "red clay", "wood"],
               config={**checkpoint["config"], "data_root": "D:\\photos"})
    items, class_names = run_pictures.unseen_pictures(run, runs.read_checkpoint(run), tmp_path / "photos")
    # 7 test pictures, two of which the run has seen
    assert len(items) == 5 and class_names == ["Fläche", "red clay", "wood"]
    assert "was trained on 2 of the 7 test pictures of today" in capsys.readouterr().out


def test_a_class_may_be_named_in_either_spelling(trained, pictures, tmp_path):
    run = copy(trained, tmp_path / "run", class_names=["Fläche", "sea", "wood"])
    visualize.main(visualize.parse_args([
        str(run), "--device", "cpu", "--images", str(pictures / "test/sea/0.png"), "--class",
        unicodedata.normalize("NFD", "Fläche")]))
    assert len([*(run / "pictures").glob("*.png")]) == 1


def test_a_picture_may_have_a_name_of_255_bytes(trained, pictures, tmp_path):
    name = tmp_path / ("ä" * 125 + "x.png")              # 250 bytes of letters, then x and .png
    shutil.copy(pictures / "test/sea/0.png", name)
    run = copy(trained, tmp_path / "run")
    visualize.main(visualize.parse_args([str(run), "--device", "cpu", "--images", str(name)]))
    assert len([*(run / "pictures").glob("*.png")]) == 1
