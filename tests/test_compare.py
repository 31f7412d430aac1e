"""extras/compare.py: what is missing is run once, and the table has the means of what the runs wrote.

Most runs are pretended; the tests of how commands end start small programs.
"""

import argparse
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train as script
from conftest import copy, read
from extras import ablations, children, compare, linear_probe, reuse
from harness.configuration import configuration
from methods import METHODS

ACCURACY = {("coop", 1): 80.0, ("coop", 2): 90.0, ("coop", 3): 85.0, ("sotglp", 1): 70.0, ("sotglp", 2): 71.0,
            ("sotglp", 3): 72.0, ("linear_probe", 1): 60.0}
AUROC = {"zero_shot_mcm": 50.0, "zero_shot_gl_mcm": 55.0, "mcm": 65.0, "gl_mcm": 75.0}


@pytest.fixture
def started(monkeypatch):
    """The commands that compare.py starts. Instead of a run they write what a run writes."""
    commands = []

    def pretend(command, stdout, env, **_):
        name, *options = [part for part in command[1:] if part != "-m"]
        commands.append((name, *options))
        pretended = {"train.py": train, "extras.linear_probe": probe, "ood.py": score_ood,
                     "evaluate.py": score_new, "extras.compare": weigh}
        code = pretended[name](options, stdout, env)
        return argparse.Namespace(poll=lambda: code or 0)

    monkeypatch.setattr(children.subprocess, "Popen", pretend)
    monkeypatch.setattr(children, "PAUSE", 0)
    # why: to read them takes longer than all else here
    monkeypatch.setattr(reuse, "weights_hash", functools.cache(lambda model, activation: f"hash of {model}"))
    return commands


def write(path, fields):
    path.write_text(json.dumps(fields))


def train(options, stdout, env):
    args = script.parse_args(options)
    if ("fail", args.seed) in ACCURACY:
        stdout.write(b"epoch 1\nTraceback (most recent call last):\n  File\nKeyError: 'no such luck'\n")
        return 1
    folder = Path(args.output_dir)
    (folder / "log.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in (9, 1, 2)))
    config = configuration(args)
    torch.save({"learned": {}, "optimizer": {}, "scaler": {}, "config": config, "training": [], "threads": 1,
                "epoch": 1, "seconds": 60.0, "log": [], **reuse.made_from(config)}, folder / "last.pt")
    penalty = 0 if config.get("vv_attention", True) else 10 * args.seed
    report(folder, config, env, ACCURACY.get((args.method, args.seed), 50.0) - penalty)


def probe(options, stdout, env):
    args = linear_probe.parse_args(options)
    config = linear_probe.configuration(args)
    report(Path(args.output_dir), config, env, ACCURACY["linear_probe", args.seed], **reuse.made_from(config))


def report(folder, config, env, accuracy, **more):
    named = {name: config[name] for name in ("dataset", "model", "shots", "seed", "split_seed")}
    write(folder / "result.json", {
        **named, "config": config, "accuracy": accuracy, "zero_shot_accuracy": 31.0, "test_images": 960,
        "seconds": 60.0, "learned_parameters": 2048, "threads": int(env["OMP_NUM_THREADS"]), **more})


def job_in(folder, options):
    """As much of a `Job` as `reuse.expected_fields` reads."""
    config = json.loads((folder / "result.json").read_text())["config"]
    if "--data-root" in options:
        config["data_root"] = options[options.index("--data-root") + 1]
    return argparse.Namespace(folder=folder, config=config, dataset=config["dataset"])


def score_ood(options, stdout, env):
    folder = Path(options[0])
    table = {row: {"near": {"auroc": 1.0}, "mean": {"auroc": value}} for row, value in AUROC.items()}
    write(folder / "ood.json", {**reuse.expected_fields(job_in(folder, options), "ood.json"), "table": table})


def score_new(options, stdout, env):
    folder = Path(options[0])
    result = json.loads((folder / "result.json").read_text())
    found = reuse.expected_fields(job_in(folder, options), "evaluation-new.json")
    found |= {"accuracy": result["accuracy"] - 20, "zero_shot_accuracy": 41.0}
    write(folder / "evaluation-new.json", found)


def weigh(options, stdout, env):
    folder = Path(options[options.index("--weights") + 1])
    seed = int(folder.name[-1])
    test = {score: 50.0 + seed for score in ("fused", "global", "local", *map(str, ablations.WEIGHTS))}
    val = {**{score: value + 5 for score, value in test.items()}, "fused": 40.0}
    found = reuse.expected_fields(job_in(folder, options), "weights.json")
    write(folder / "weights.json", {**found, "val": val, "test": test})


def run(folder, *options):
    compare.main(compare.parse_args(["--device", "cpu", "--output-dir", str(folder), *options]))


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


@pytest.fixture
def no_pictures(monkeypatch):
    """What runs are made from, where there are neither pictures nor weights."""
    monkeypatch.setattr(reuse, "made_from", lambda config: {"class_names": [], "data": {}, "clip_sha256": ""})


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


@pytest.mark.parametrize("name, value, complaint", [
    ("config", {"epochs": 7}, "epochs was 7, is 200"), ("threads", 2, "threads were 2, are 1")])
def test_a_run_with_other_options_is_refused_before_any_starts(name, value, complaint, started, tmp_path):
    run(tmp_path, "--methods", "coop", "--seeds", "1")
    path = tmp_path / "coop-critters-16shot-seed1/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, name: {**result[name], **value} if name == "config" else value}))
    started.clear()
    with pytest.raises(SystemExit, match=rf"holds another run \({complaint}\): --output-dir .*-2 leaves"):
        run(tmp_path, "--methods", "sotglp", "coop", "--seeds", "1")
    assert started == []


@pytest.mark.parametrize("name, value, complaint", [
    ("temperature", 1000.0, r"temperature 1000\.0, here 1\.0"),
    ("local_weight", 0.5, r"local_weight 0\.5, here 1\.0"),
    ("ood_root", {"near": "/mine"}, r"ood_root {'near': '/mine'}, here {}"), ("data", {}, "other pictures")])
def test_a_table_of_ood_with_other_options_is_refused(name, value, complaint, started, tmp_path):
    run(tmp_path, "--methods", "coop", "--seeds", "1")
    path = tmp_path / "coop-critters-16shot-seed1/ood.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(SystemExit, match=r"ood.json was made otherwise \(" + complaint):
        run(tmp_path, "--methods", "coop", "--seeds", "1")


@pytest.fixture
def mine(pictures, tmp_path):
    """A copy of the pictures, to be moved and changed."""
    return Path(shutil.copytree(pictures, tmp_path / "first/mine"))


def on_mine(root, *options):
    """The options of one run on one's own pictures."""
    return ("--dataset", "folder", "--data-root", str(root), "--model", "tiny", "--methods", "coop",
            "--seeds", "1", "--shots", "2", *options)


def test_a_run_on_other_pictures_is_refused(started, mine, tmp_path):
    run(tmp_path / "out", *on_mine(mine))
    other = shutil.copytree(mine, tmp_path / "second/mine")
    run(tmp_path / "out", *on_mine(other))                 # the same pictures at another place
    assert len(started) == 1
    (other / "test/sea/1.png").unlink()
    with pytest.raises(SystemExit, match=r"2shot-seed1 holds another run \(it has other pictures\)"):
        run(tmp_path / "out", *on_mine(other))
    (mine / "classnames.txt").write_text("red_clay red earth\nsea lake\nwood oak\n")
    with pytest.raises(SystemExit, match=r"\(it has other class names\)"):
        run(tmp_path / "out", *on_mine(mine))
    assert len(started) == 1


def test_a_run_with_other_weights_is_refused(started, tmp_path, monkeypatch):
    run(tmp_path, "--methods", "linear_probe", "--seeds", "1")
    monkeypatch.setattr(reuse, "weights_hash", functools.cache(lambda model, activation: "another"))
    with pytest.raises(SystemExit, match=r"holds another run \(it has other CLIP weights\)"):
        run(tmp_path, "--methods", "linear_probe", "--seeds", "1")
    path = tmp_path / "linear_probe-critters-16shot-seed1/result.json"
    result = json.loads(path.read_text())
    del result["clip_sha256"]
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="it does not say which CLIP weights it has"):
        run(tmp_path, "--methods", "linear_probe", "--seeds", "1")


def test_what_is_compared_is_what_a_run_says(trained):
    _, _, checkpoint = read(trained)
    assert reuse.made_from(checkpoint["config"]) == {name: checkpoint[name] for name in reuse.MADE_FROM}


def test_every_command_of_a_row_finds_data_that_moved(started, mine, tmp_path):
    options = ("--classes", "base")
    run(tmp_path / "out", *on_mine(mine, *options))
    (tmp_path / "out/coop-folder-mine-tiny-base-2shot-seed1/evaluation-new.json").unlink()
    moved = mine.rename(tmp_path / "mine")
    started.clear()
    run(tmp_path / "out", *on_mine(moved, *options))
    (command, *words), = started
    assert command == "evaluate.py" and words[words.index("--data-root") + 1] == str(moved)
    assert words[words.index("--model") + 1] == "tiny"
    run(tmp_path / "out", *on_mine(moved, "--ablations", "--methods", "full"))
    for command in started:
        assert command[command.index("--data-root") + 1] == str(moved)


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


def test_a_table_of_ood_that_was_not_asked_for_is_not_shown(started, no_pictures, tmp_path, capsys):
    # no OOD sets go with DTD; the user scored one run against pictures of her own
    options = ("--dataset", "dtd", "--methods", "coop", "--seeds", "1", "2")
    run(tmp_path, *options)
    write(tmp_path / "coop-dtd-16shot-seed1/ood.json", {"table": {"mcm": {"mean": {"auroc": 77.7}}}})
    run(tmp_path, *options)
    assert "77.7" not in capsys.readouterr().out


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


def test_every_option_of_a_row_is_one_of_train_py():
    for row in (*compare.ROWS.values(), *compare.SLOW.values(), *compare.BASE_ROWS.values(),
                *compare.BASE_SLOW.values(), *ablations.ROWS.values()):
        if row.options is not None:
            script.parse_args([*row.options])


def test_every_method_can_be_compared():
    for name in METHODS:
        assert compare.parse_args(["--methods", name]).rows[name].options[:2] == ("--method", name)
