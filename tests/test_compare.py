"""extras/compare.py: what is missing is run once, and the table has the means of what the runs wrote."""

import json
import shutil
from pathlib import Path

import pytest

import train as script
from extras import ablations, compare
from methods import METHODS
from pretended_runs import ACCURACY, AUROC, mine, no_pictures, on_mine, run, started


def test_what_is_missing_runs_once_and_the_table_has_its_means(started, tmp_path, capsys):
    run(tmp_path, "--methods", "zero_shot", "linear_probe", "coop", "sotglp")
    assert [name for name, *_ in started].count("train.py") == 6         # two methods, three seeds
    assert [name for name, *_ in started].count("ood.py") == 6
    assert [name for name, *_ in started].count("extras.linear_probe") == 1    # nothing in it is random
    printed = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()}
    # sd of 80, 90, 85: (25 + 25 + 0) / 2 = 25, its root 5; of 70, 71, 72: 1; the median of 9, 1, 2 s is 2 s
    assert rows["CoOp"] == ["85.00", "+-", "5.00", "65.00", "+-", "0.00", "75.00", "+-", "0.00", "2.00", "+-",
                            "0.00", "2,048"]
    assert rows["SOT-GLP"][:3] == ["71.00", "+-", "1.00"]
    assert rows["zero-shot CLIP"] == ["31.00", "50.00", "55.00", "0"]
    assert rows["linear probe"] == ["60.00", "2,048"]                   # no epochs
    assert "7 runs, 0 finished already" in printed and "7 of 7" in printed and "about 0 min left" in printed
    assert "the paper's" not in printed                    # the tiny model is none of the paper's

    started.clear()
    run(tmp_path, "--methods", "coop", "sotglp", "--seeds", "1", "2")
    assert started == [] and "4 runs, 4 finished already" in capsys.readouterr().out
    (tmp_path / "coop-critters-16shot-seed2/ood.json").unlink()          # stopped between the two commands
    run(tmp_path, "--methods", "coop")
    assert [name for name, *_ in started] == ["ood.py"]
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved[0]["row"] == "coop" and saved[0]["accuracy"] == [80, 90, 85]


def test_nothing_runs_where_the_table_would_replace_a_file_of_somebodys_own(started, tmp_path):
    (tmp_path / "compare.json").write_text("mine")
    with pytest.raises(SystemExit, match="compare.json is no table of this program"):
        run(tmp_path, "--methods", "coop")
    assert started == [] and (tmp_path / "compare.json").read_text() == "mine"


def test_all_seeds_of_plotpp_start_from_one_first_stage(started, tmp_path, capsys):
    run(tmp_path, "--methods", "plotpp", "--seeds", "2", "3", "--epochs", "7")
    first, *others = [script.parse_args(command[1:]) for command in started if command[0] == "train.py"]
    assert (first.stage, first.seed, first.epochs, first.start_from) == (1, 1, 7, None) and first.resume
    assert [(args.stage, args.seed, args.epochs) for args in others] == [(2, 2, 7), (2, 3, 7)]
    assert {args.start_from for args in others} == {first.output_dir}
    assert others[0].output_dir == f"{tmp_path}/plotpp-critters-16shot-epochs7-seed2"
    assert "PLOT++" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 1
    started.clear()
    run(tmp_path, "--methods", "plotpp", "--seeds", "2", "--epochs", "7")
    assert started == []


def test_without_its_first_stage_a_run_does_not_start(started, tmp_path, monkeypatch):
    monkeypatch.setitem(ACCURACY, ("fail", 1), None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--methods", "plotpp", "coop", "--seeds", "2")
    assert str(stop.value).splitlines()[1:] == [
        "plotpp, stage 1, critters, 16 shots, seed 1: KeyError: 'no such luck'",
        "plotpp, critters, 16 shots, seed 2: the run that it starts from failed"]
    assert (tmp_path / "coop-critters-16shot-seed2/result.json").exists()


def test_a_score_of_a_methods_own_has_a_column(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(AUROC, "own", 12.5)
    run(tmp_path, "--methods", "lsn", "--seeds", "1")
    lines = capsys.readouterr().out.splitlines()
    heads, = [line for line in lines if "AUROC, own" in line]
    row, = [line for line in lines if line.startswith("LSN ")]
    assert heads.split("AUROC, ")[-1].split() == ["own", "s/epoch", "parameters"]
    assert row.split()[-3:-1] == ["12.50", "2.00"]


def test_base_to_new_has_the_mean_of_each_half_and_the_harmonic_mean_of_the_two(started, tmp_path, capsys):
    run(tmp_path, "--classes", "base", "--methods", "zero_shot", "coop", "--seeds", "1", "2")
    commands = [name for name, *_ in started]
    assert commands.count("evaluate.py") == 2 and "ood.py" not in commands
    assert (tmp_path / "coop-critters-base-16shot-seed1/evaluation-new.json").exists()
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    # base 80 and 90, new 60 and 70: means 85 and 65, so 2 * 85 * 65 / 150 = 73.67; the runs' own are 68.57
    # and 78.75, of which the sd is 10.18 / sqrt(2)
    assert rows["CoOp"][:9] == ["85.00", "+-", "7.07", "65.00", "+-", "7.07", "73.67", "+-", "7.20"]
    assert rows["zero-shot CLIP"][:3] == ["31.00", "41.00", "35.31"]      # 2 * 31 * 41 / 72
    started.clear()
    run(tmp_path, "--classes", "base", "--methods", "coop", "--seeds", "1", "2")
    assert started == []


def test_base_to_new_has_rows_of_its_own(capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(["--classes", "base", "--methods", "linear_probe"])
    assert "no row linear_probe: choose from zero_shot, coop, ivlp" in capsys.readouterr().err
    assert {"cocoop", "maple", "promptsrc"} < {*compare.parse_args(["--classes", "base"]).methods}


def test_the_papers_column_stands_beside_vit_b16_at_16_shots_alone(started, no_pictures, tmp_path, capsys):
    run(tmp_path, "--dataset", "dtd", "--methods", "coop", "sotglp", "zero_shot", "--seeds", "1",
        "--shots", "16", "8")
    sixteen, eight = capsys.readouterr().out.split("dtd, 8 shots, model ViT-B/16")
    rows = {line[:26].strip(): line[26:].split() for line in sixteen.splitlines()}
    assert (rows["CoOp"][-1], rows["SOT-GLP"][-1], rows["zero-shot CLIP"][-1]) == ("69.9", "77.1", "44.1")
    assert "the paper's" in sixteen and "the paper's" not in eight
    assert {name for name, *_ in started} == {"train.py"}                # no OOD sets go with DTD


def test_tables_with_other_options_stand_side_by_side(started, no_pictures, tmp_path):
    run(tmp_path, "--methods", "coop", "--seeds", "1", "--epochs", "7")
    run(tmp_path, "--methods", "coop", "--seeds", "1", "--model", "ViT-B/32")
    run(tmp_path, "--methods", "coop", "--seeds", "1")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "coop-critters-16shot-epochs7-seed1", "coop-critters-ViT-B-32-16shot-seed1",
        "coop-critters-16shot-seed1"}
    assert [name for name, *_ in started].count("train.py") == 3


def test_results_among_class_folders_are_refused(started, mine):
    shutil.rmtree(mine / "test")
    with pytest.raises(SystemExit, match="whose folders are classes: name an --output-dir elsewhere"):
        run(mine / "train/out", *on_mine(mine / "train"))
    assert not started and not (mine / "train/out").exists()


def test_two_rows_are_never_one_run_and_keep_their_own_options(started, tmp_path):
    with pytest.raises(SystemExit, match="the rows coop and coop_class_specific are one run with these"):
        run(tmp_path, "--methods", "coop", "coop_class_specific", "--class-specific")
    run(tmp_path, "--ablations", "--methods", "support_5", "--n-support", "7", "--seeds", "1")
    trained = [script.parse_args(command[1:]) for command in started if command[0] == "train.py"]
    assert [args.n_support for args in trained] == [7, 5]


def test_options_are_the_same_for_all_rows_or_refused(started, tmp_path, capsys):
    run(tmp_path, "--methods", "linear_probe", "coop", "--seeds", "1", "--split-seed", "2")
    trainings = [command for command in started if command[0] in ("train.py", "extras.linear_probe")]
    assert [command[command.index("--split-seed") + 1] for command in trainings] == ["2", "2"]
    for options, complaint in ((["--sampler", "proportional"], "the linear probe has no --sampler"),
                               (["--seed", "7"], "--seed would be the same for all rows and seeds"),
                               (["--method=coop"], "--method would be the same"),
                               (["--seeds", "1", "1"], "--seeds has 1 more than once"),
                               (["--shots", "1", "16", "1"], "--shots has 1 more than once"),
                               (["--methods", "coop", "plot", "coop"], "--methods has coop more than once"),
                               (["--dataset", "dtd", "dtd"], "--dataset has dtd more than once"),
                               (["--methods", "linear_probe", "--lr", "1"], "the linear probe has no --lr"),
                               (["--output-dir", ""], "--output-dir is empty"),
                               (["--weights", "run", "--epochs", "2"], "--weights has no use for --epochs 2"),
                               (["--shots", "-1"], "--shots must not be negative"),
                               (["--methods", "zero_shot"], "is measured by the runs of another row"),
                               (["--test-split=val", "--classes", "base"], "base has no --test-split")):
        with pytest.raises(SystemExit):
            compare.parse_args(options)
        assert complaint in capsys.readouterr().err


def test_runs_go_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip.pt").touch()
    args = compare.parse_args(["--output-dir", "out", "--data-root", "pictures", "--model", "clip.pt"])
    assert [args.output_dir, args.data_root, args.model] == [
        str(tmp_path / name) for name in ("out", "pictures", "clip.pt")]


def test_a_run_that_fails_is_named_and_the_others_are_done(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ACCURACY, ("fail", 2), None)
    failed = "1 runs failed.*\ncoop, critters, 16 shots, seed 2: KeyError: 'no such luck'"
    with pytest.raises(SystemExit, match=failed):
        run(tmp_path, "--methods", "coop")
    results = [tmp_path / f"coop-critters-16shot-seed{seed}/result.json" for seed in (1, 2, 3)]
    assert [path.exists() for path in results] == [True, False, True]


def test_a_row_that_does_not_exist_is_refused(capsys):
    for options, row in ((["--methods", "no_vv"], "no_vv"), (["--ablations", "--methods", "coop"], "coop")):
        with pytest.raises(SystemExit):
            compare.parse_args(options)
        assert f"--methods has no row {row}" in capsys.readouterr().err


def test_the_time_is_foretold_by_the_runs_that_are_finished(started, tmp_path, capsys):
    # a finished run says 60 s: two more make two minutes, one where two go at a time
    run(tmp_path, "--methods", "coop", "--seeds", "1")
    capsys.readouterr()
    run(tmp_path, "--methods", "coop")
    at_once = min(2, compare.os.cpu_count())
    printed = capsys.readouterr().out
    assert f"3 runs, 1 finished already; {at_once} at a time, about {2 / at_once:.0f} min" in printed


def test_every_option_of_a_row_is_one_of_train_py():
    for row in (*compare.ROWS.values(), *compare.SLOW.values(), *compare.BASE_ROWS.values(),
                *compare.BASE_SLOW.values(), *ablations.ROWS.values()):
        if row.options is not None:
            script.parse_args([*row.options])


def test_every_method_can_be_compared():
    for name in METHODS:
        assert compare.parse_args(["--methods", name]).rows[name].options[:2] == ("--method", name)
