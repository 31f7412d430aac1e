"""compare.py: what is missing is run once, and the table has the means of what the runs wrote. Runs are pretended."""

import json
import subprocess
from pathlib import Path

import pytest

import compare
import methods.linear_probe
import train as script

ACCURACY = {("coop", 1): 80.0, ("coop", 2): 90.0, ("coop", 3): 85.0, ("sotglp", 1): 70.0, ("sotglp", 2): 71.0,
            ("sotglp", 3): 72.0, ("linear_probe", 1): 60.0}
AUROC = {"zero_shot_mcm": 50.0, "zero_shot_gl_mcm": 55.0, "mcm": 65.0, "gl_mcm": 75.0}


@pytest.fixture
def started(monkeypatch):
    """The commands that compare.py starts. Instead of a run they write what a run writes."""
    commands = []

    def pretend(command, cwd, stdout, stderr, env):
        _, name, *options = command
        commands.append((name, *options))
        if name == "ood.py":
            table = {row: {"near": {"auroc": 1.0}, "mean": {"auroc": value}} for row, value in AUROC.items()}
            (Path(options[0]) / "ood.json").write_text(json.dumps({"table": table}))
            return subprocess.CompletedProcess(command, 0)
        args = methods.linear_probe.parse_args(options[1:]) if name == "-m" else script.parse_args(options)
        config = {"method": "linear_probe", **vars(args)}
        if ("fail", args.seed) in ACCURACY:
            stdout.write("Traceback\nerror: no such luck\n")
            return subprocess.CompletedProcess(command, 1)
        folder = Path(args.output_dir)
        (folder / "log.jsonl").write_text("".join(json.dumps({"seconds": s}) + "\n" for s in (9, 1, 2)))
        (folder / "result.json").write_text(json.dumps({
            **{key: config[key] for key in ("dataset", "model", "shots", "seed", "split_seed")}, "config": config,
            "accuracy": ACCURACY[config["method"], args.seed], "zero_shot_accuracy": 31.0, "test_images": 960,
            "learned_parameters": 2048}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", pretend)
    return commands


def run(folder, *options):
    compare.main(compare.parse_args(["--device", "cpu", "--output-dir", str(folder), *options]))


def test_what_is_missing_runs_once_and_the_table_has_its_means(started, tmp_path, capsys):
    run(tmp_path, "--methods", "zero_shot", "linear_probe", "coop", "sotglp")
    assert [name for name, *_ in started].count("train.py") == 6         # two methods, three seeds
    assert [name for name, *_ in started].count("ood.py") == 6
    assert [name for name, *_ in started].count("-m") == 1               # nothing random in it: one seed
    printed = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()}
    # sd of 80, 90, 85: (25 + 25 + 0) / 2 = 25, its root 5; of 70, 71, 72: 1; the median of 9, 1, 2 s is 2 s
    assert rows["CoOp"] == ["85.00", "+-", "5.00", "65.00", "+-", "0.00", "75.00", "+-", "0.00", "2.00", "+-", "0.00",
                            "2,048"]
    assert rows["SOT-GLP"][:3] == ["71.00", "+-", "1.00"]
    assert rows["zero-shot CLIP"] == ["31.00", "50.00", "55.00", "0"]
    assert rows["linear probe"] == ["60.00", "2.00", "2,048"]
    assert "7 runs, 0 finished already" in printed and "7 of 7" in printed and "about 0 min left" in printed
    assert "the paper's" not in printed                                  # the tiny model is none of the paper's

    started.clear()
    run(tmp_path, "--methods", "coop", "sotglp", "--seeds", "1", "2")
    assert started == [] and "4 runs, 4 finished already" in capsys.readouterr().out
    (tmp_path / "coop-critters-16shot-seed2/ood.json").unlink()          # stopped between the two commands
    run(tmp_path, "--methods", "coop")
    assert [name for name, *_ in started] == ["ood.py"]
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved[0]["row"] == "coop" and saved[0]["accuracy"] == [80, 90, 85]


def test_the_papers_column_stands_beside_vit_b16_at_16_shots_alone(started, tmp_path, capsys):
    options = ["--dataset", "dtd", "--methods", "coop", "sotglp", "zero_shot", "--seeds", "1", "--shots", "16", "8"]
    run(tmp_path, *options)
    sixteen, eight = capsys.readouterr().out.split("dtd, 8 shots, model ViT-B/16")
    rows = {line[:26].strip(): line[26:].split() for line in sixteen.splitlines()}
    assert (rows["CoOp"][-1], rows["SOT-GLP"][-1], rows["zero-shot CLIP"][-1]) == ("69.9", "77.1", "44.1")
    assert "the paper's" in sixteen and "the paper's" not in eight
    assert {name for name, *_ in started} == {"train.py"}                # no OOD sets go with DTD


def test_a_run_with_other_options_is_refused_before_anything_starts(started, tmp_path):
    run(tmp_path, "--methods", "coop", "--seeds", "1", "--epochs", "7")
    started.clear()
    with pytest.raises(SystemExit, match=r"holds a run with other options \(epochs was 7, is 200"):
        run(tmp_path, "--methods", "sotglp", "coop", "--seeds", "1")
    assert started == []


def test_a_run_that_fails_is_named_and_the_others_are_done(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ACCURACY, ("fail", 2), None)
    with pytest.raises(SystemExit, match="1 runs failed.*\ncoop, critters, 16 shots, seed 2: error: no such luck"):
        run(tmp_path, "--methods", "coop")
    assert [(tmp_path / f"coop-critters-16shot-seed{seed}/result.json").exists() for seed in (1, 2, 3)] == [1, 0, 1]


def test_every_method_has_a_row_and_every_row_a_method():
    # the options of each row are options of train.py, and each method stands in the table
    trained = [script.parse_args(options).method for _, options, _ in compare.ROWS.values() if options]
    assert {*trained} == {*compare.train.METHODS}
