"""extras/reuse.py: only the run that would be made now stands in a table, and only its own measurements."""

import functools
import json
import shutil

import pytest

from conftest import read
from extras import reuse
from pretended_runs import mine, no_pictures, on_mine, run, started, write


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


def test_a_table_of_ood_that_was_not_asked_for_is_not_shown(started, no_pictures, tmp_path, capsys):
    # no OOD sets go with DTD; the user scored one run against pictures of her own
    options = ("--dataset", "dtd", "--methods", "coop", "--seeds", "1", "2")
    run(tmp_path, *options)
    write(tmp_path / "coop-dtd-16shot-seed1/ood.json", {"table": {"mcm": {"mean": {"auroc": 77.7}}}})
    run(tmp_path, *options)
    assert "77.7" not in capsys.readouterr().out
