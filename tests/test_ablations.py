"""extras/ablations.py: variants stand beside the full method; weights of the local branch take no training."""

import json
import shutil

import pytest
import torch

import evaluate
import train as script
from conftest import copy, read
from extras import ablations, compare, reuse
from pretended_runs import job_in, mine, run, started


def test_ablations_stand_beside_the_full_method_paired_by_seed(started, tmp_path, capsys):
    run(tmp_path, "--ablations", "--methods", "no_vv")
    assert [name for name, *_ in started].count("train.py") == 6     # the full method too, though not named
    assert (tmp_path / "critters-16shot-no-vv-seed3/weights.json").exists()
    printed = capsys.readouterr().out
    rows = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    # full: 70, 71, 72. w/o V-V: 60, 51, 42, so -10, -20, -30: mean -20, sd 10, standard error 10 / sqrt(3).
    # Validation 40 and AUROC 75 are the same for all. The paper: 84.8 - 85.1 (Table 2), 92.9 - 93.2 (Table 3)
    same = ["+-", "0.00", "+0.00", "+-", "0.00", "~"]
    assert rows["SOT-GLP"] == ["40.00", "+-", "0.00", "71.00", "+-", "1.00", "75.00", "+-", "0.00"]
    assert rows["w/o V-V"] == ["40.00", *same, "51.00", "+-", "9.00", "-20.00", "+-", "5.77", "75.00", *same,
                               "-0.3,", "-0.3"]
    # weights.json of the full runs: validation 56, 57, 58, so 16, 17, 18 above 40; test 51, 52, 53, 19 below
    assert rows["local branch alone"] == ["57.00", "+-", "1.00", "+17.00", "+-", "0.58", "52.00", "+-",
                                          "1.00", "-19.00", "+-", "0.00"]
    assert {f"weight of the local branch {weight}" for weight in ablations.WEIGHTS} <= {*rows}
    started.clear()
    run(tmp_path, "--ablations", "--methods", "no_vv", "--seeds", "2")
    assert not started and "-20.00 +- inf ~" in capsys.readouterr().out  # one pair: nothing to judge by


@pytest.mark.parametrize("row, changes", [
    ("full", {}), ("no_vv", {"vv_attention": False}), ("no_projection", {"local_projection": False}),
    ("shared_local", {"class_specific": False}), ("uniform_plan", {"epsilon": 10_000}),
    ("constant_plan", {"plan_gradient": False}),
    ("support_1", {"n_support": 1}), ("support_5", {"n_support": 5}),
    ("support_20", {"n_support": 20}), ("n_local_1", {"n_local": 1}), ("n_local_2", {"n_local": 2}),
    ("n_local_8", {"n_local": 8}), ("n_global_1", {"n_global": 1}), ("n_global_2", {"n_global": 2}),
    ("n_global_8", {"n_global": 8}), ("no_dropout", {"prompt_dropout": 0}), ("epsilon_1", {"epsilon": 1}),
    ("epsilon_0.01", {"epsilon": 0.01, "n_iters": 100})])
def test_an_ablation_changes_one_thing(row, changes):
    base, changed = (vars(script.parse_args(options)) for options in ([], ablations.ROWS[row].options))
    assert {name: changed[name] for name in changed
            if changed[name] != base[name] and name != "output_dir"} == changes


def test_weights_of_a_run_agree_with_its_result(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    compare.main(compare.parse_args(["--weights", str(run), "--device", "cpu"]))
    weights = json.loads((run / "weights.json").read_text())
    result, _, _ = read(run)
    assert [*weights["val"]] == [*weights["test"]]         # on what training left of the training part
    assert weights["test"]["0.25"] == weights["test"]["fused"] == result["accuracy"]
    for branch in ("global", "local"):
        assert weights["test"][branch] == result[f"{branch}_accuracy"]
    assert weights["data"] == reuse.expected_fields(job_in(run, []), "weights.json")["data"]


def test_weights_are_those_of_the_classes_and_pictures_of_the_run(trained, mine, clip_file, tmp_path, capsys):
    training = read(trained)[2]["training"]
    folder = copy(trained, tmp_path / "run", training=[*training, "test/sea/1.png"])
    options = ["--weights", str(folder), "--device", "cpu"]
    options += ["--data-root", str(mine), "--model", str(clip_file)]
    compare.main(compare.parse_args(options))
    assert "was trained on 1 of the 7 test pictures of today" in capsys.readouterr().out
    assert json.loads((folder / "weights.json").read_text())["data"]["test"][0] == 6
    for part in ("train", "test"):
        shutil.copytree(mine / part / "sea", mine / part / "zoo")
    with pytest.raises(SystemExit, match="was trained for other classes: label 3 of 3 was None"):
        compare.main(compare.parse_args(options))


def test_each_weight_weighs_the_local_branch(trained, tmp_path, monkeypatch):
    # global logits (1, 0), local ones (0, 3), class 1: from a weight above 1/3 on it wins
    def test(model, items, dataset, amp):
        scores = model.scores((torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 3]])))
        n_correct = {name: score.argmax(dim=1) * len(items) for name, score in scores.items()}
        return evaluate.Counts(n_correct, None)

    monkeypatch.setattr(evaluate, "test", test)
    ablations.score_weights(copy(trained, tmp_path / "run"), "cpu")
    found = json.loads((tmp_path / "run/weights.json").read_text())["test"]
    assert found == {"fused": 0, "global": 0, "local": 100, "0.05": 0, "0.1": 0, "0.25": 0, "0.5": 100,
                     "1.0": 100, "2.0": 100}
