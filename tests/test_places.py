"""Nobody's own file is replaced or removed: what a run, a table or a picture is written over."""

import errno
import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import train as script
from conftest import copy, read, train
from harness import agreement, machine, places, runs
from test_faults import command, error_of, everything

OWN = ("notes.tmp", "notes.tmp123", "last.pt.tmp", "evaluation.json.tmp77", "evaluation-of-mine.csv",
       "ood.json", "weights.json", "evaluation.json", "data.csv")


def test_a_run_leaves_what_is_somebodys_own_in_its_folder(options, tmp_path, monkeypatch):
    for name in OWN:
        (tmp_path / name).write_text(f"mine: {name}")
    (tmp_path / "result.json.tmp5").write_text("half")           # of an earlier run that was killed
    monkeypatch.chdir(tmp_path)
    train(*options, "--epochs", 1, "--output-dir", ".")
    assert all((tmp_path / name).read_text() == f"mine: {name}" for name in OWN)
    assert not (tmp_path / "result.json.tmp5").exists()


@pytest.mark.parametrize("name", ["log.jsonl", "per_class.csv", "lock"])
def test_somebodys_own_file_with_the_name_of_one_of_a_run_is_refused(name, options, tmp_path):
    (tmp_path / name).write_text("mine")
    message = error_of(train, *options, "--output-dir", tmp_path)
    assert str(tmp_path / name) in message and "--output-dir" in message
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "last.pt").exists()


def test_where_no_run_stood_overwrite_removes_no_report(options, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"of another program")
    (tmp_path / "ood.json").write_text("mine")
    train(*options, "--epochs", 1, "--output-dir", tmp_path, "--overwrite")
    assert (tmp_path / "ood.json").read_text() == "mine" and read(tmp_path)[2]["epoch"] == 1


def test_the_lock_is_given_back_however_a_run_ends(options, tmp_path, monkeypatch):
    options = (*options, "--lr", 3e38, "--weight-decay", 1000, "--batch-size", 9)
    error_of(train, *options, "--output-dir", tmp_path)
    with open(tmp_path / "lock", "a+") as file:
        places.lock_file(file)


def test_a_folder_of_results_is_no_class(options, pictures, tmp_path):
    flat = tmp_path / "flat"
    (flat / "a").mkdir(parents=True)
    for inside, root in ((flat / "runs/one", flat), (pictures / "train/runs", pictures), (flat, flat)):
        message = error_of(train, *options, "--data-root", root, "--output-dir", inside)
        assert f"{inside} lies in " in message and "name an --output-dir elsewhere" in message
    assert not (flat / "runs").exists() and not (pictures / "train/runs").exists()
    places.check_apart(pictures / "runs", pictures)              # beside train/ and test/ it is no class


# ---- a file that an option names ---------------------------------------------------------------------------

def test_a_link_is_followed_and_stays(trained, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "all.csv"
    link.symlink_to(tmp_path / "real/there.csv")
    command(evaluate, copy(trained, tmp_path / "run"), "--csv", link)
    assert link.is_symlink() and (tmp_path / "real/there.csv").read_text().startswith("path,label,")
    assert len([*(tmp_path / "real").iterdir()]) == 1


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    places.check_file(tmp_path / "pipe", "--csv")
    machine.write_csv(tmp_path / "pipe", [{"a": 1}])
    reader.join()
    assert found == ["a\n1\n"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_device_and_standard_output_are_written_into(capfd):
    machine.write_text("/dev/null", "text")
    machine.write_text("/dev/stdout", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and capfd.readouterr().out == "text"
    with pytest.raises(OSError, match="cannot write into /dev/full: No space left"):
        machine.write_text("/dev/full", "text")


def test_a_file_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "read-only.csv").write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: "read-only" not in str(path))
    monkeypatch.setattr(runs, "build", None)                     # nothing is computed
    for path, complaint in ((tmp_path, "is a folder"), (f"{tmp_path}/new/", "is a folder"),
                            (tmp_path / "file/a.csv", f"nothing can be written into {tmp_path}/file"),
                            (tmp_path / "read-only/a.csv", f"nothing can be written into {tmp_path}/read-only"),
                            (tmp_path / "read-only.csv", "is read-only"), (tmp_path / "last.pt", "a file of a run")):
        assert complaint in error_of(command, evaluate, trained, "--csv", path)
    assert (tmp_path / "read-only.csv").read_text() == "mine"


def test_a_read_only_place_names_the_option(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="nothing can be written into .*: name another place by --output-dir"):
        places.lock(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"new cannot be made \(Read-only.*: name another place by --output-dir"):
        places.lock(tmp_path / "new")


def test_a_name_of_255_bytes_is_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")
    machine.write_json(path, {})
    assert path.read_text() == "{}\n"


# ---- processes that work together --------------------------------------------------------------------------

@pytest.mark.parametrize("what, changed", [
    ("--seed", {"config": {"seed": 2, "device": "cpu"}}), ("training pictures", {"data": {"training": [9, "b"]}}),
    ("classes", {"class_names": ["b"]}), ("CLIP weights", {"clip_sha256": "d"})])
def test_processes_that_differ_refuse_with_what_differs(what, changed, monkeypatch):
    fingerprint = {"config": {"seed": 1, "device": "cpu"}, "data": {"training": [9, "a"]}, "class_names": ["a"],
                   "clip_sha256": "c"}
    elsewhere = {**fingerprint, "config": {"seed": 1, "device": "cuda"}}         # this may differ

    def gather(found, mine):
        found[:] = [mine, agreement.facts(other, {}, 3)]

    monkeypatch.setattr(agreement.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
    other = elsewhere
    agreement.check_agreement(agreement.facts(fingerprint, {}, 3))
    other = {**fingerprint, **changed}
    with pytest.raises(ValueError, match=f"the processes differ in {what}: .* in process 0, .* in process 1"):
        agreement.check_agreement(agreement.facts(fingerprint, {}, 3))
    other = fingerprint
    with pytest.raises(ValueError, match="differ in epochs done: 2 in process 0, 3 in process 1"):
        agreement.check_agreement(agreement.facts(fingerprint, {}, 2))


def test_processes_compare_the_pictures_that_they_train_on(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(script, "check_agreement", found.append)
    model = SimpleNamespace(learned_state=dict)
    args = SimpleNamespace(resume=None, start_from=None, epochs=1)
    fingerprint = {"config": {}, "data": {}, "class_names": ["a"], "clip_sha256": ""}
    for text in ("one", "two"):
        (tmp_path / "a.jpg").write_text(text)
        script.begin(SimpleNamespace(args=args, rank=1, world=2, folder=tmp_path, fingerprint=fingerprint, model=model,
                                     epochs_done=0, train_set=[(str(tmp_path / "a.jpg"), 0, "a")], test_set=[]))
    one, two = found
    assert [what for what in one if one[what] != two[what]] == ["content of the training pictures"]


def test_processes_compare_the_test_pictures_and_whether_the_test_is_done(tmp_path):
    fingerprint = {"config": {}, "data": {}, "class_names": ["a"], "clip_sha256": ""}
    run = SimpleNamespace(args=SimpleNamespace(epochs=1), folder=tmp_path, fingerprint=fingerprint, epochs_done=1,
                          model=SimpleNamespace(learned_state=dict), train_set=[], test_set=[])
    one = agreement.facts_of(run)
    (tmp_path / "result.json").write_text("{}")
    run.test_set = [("critters/test/0/1", 0, "a")]
    two = agreement.facts_of(run)
    assert [what for what in one if one[what] != two[what]] == ["content of the test pictures", "test done"]


def test_equal_names_of_other_files_are_other_contents(tmp_path):
    found = []
    for text in ("one", "two", "one"):
        (tmp_path / "a.jpg").write_text(text)
        found.append(agreement.contents([(str(tmp_path / "a.jpg"), 0, "a"), ("critters/train/0/1", 1, "b")]))
    assert found[0] == found[2] != found[1]
