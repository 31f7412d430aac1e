"""extras/children.py: a failed command is named by its own error, the others go on, none is left over."""

import json
import time

import pytest

from extras import children
from extras.jobs import Job, foresee

RESULT = {"dataset": "critters", "model": "tiny", "shots": 16, "seed": 1, "split_seed": 1, "accuracy": 50.0,
          "seconds": 60.0, "test_images": 4,
          "config": {"method": "coop", "dataset": "critters", "classes": "all", "model": "tiny"}}


@pytest.fixture(autouse=True)
def own_project(tmp_path, monkeypatch):
    """Commands start in the folder of the program, which is none of a test's."""
    monkeypatch.setattr(children, "PROJECT", tmp_path)


def job(folder, row, program, **more):
    """A job whose one command is a small Python program."""
    return Job(row, "critters", 16, 1, folder / row, {}, {"result.json": ["-c", program]}, **more)


def test_a_failure_has_its_own_words_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(children, "PAUSE", 0.01)
    path = tmp_path / "fine/result.json"
    programs = {
        "killed": "import os; os.kill(os.getpid(), 9)",
        "ended": "import os; os.kill(os.getpid(), 15)",
        "silent": "print('epoch   1  loss 2.0'); raise SystemExit(3)",
        "long": "import sys; print('epoch 1'); sys.exit('error: 2 pictures cannot be read\\na.png\\nb.png')",
        "fault": "import json; json.loads('')",
        "latin": "import sys; sys.stdout.buffer.write(b'error: f\\xe4r\\n'); sys.exit(1)",
        "empty": "pass",
        "blocked": "pass",
        "fine": f"open({str(path)!r}, 'w').write({json.dumps(RESULT)!r})"}
    (tmp_path / "blocked").touch()                         # a file in the place of the folder
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent/output.txt").write_text("error: that of yesterday\n")
    jobs = [job(tmp_path, row, program) for row, program in programs.items()]
    with pytest.raises(ValueError, match="^8 runs failed, the others are kept") as failed:
        children.run_all(jobs, at_once=1, threads=1)
    reasons = str(failed.value).replace(", critters, 16 shots, seed 1", "").splitlines()[1:]
    assert reasons == [
        "killed: killed by signal 9; out of memory?", "ended: killed by signal 15",
        "silent: ended with code 3, without an error message",
        "long: error: 2 pictures cannot be read", "a.png", "b.png",
        "fault: json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "latin: error: f\ufffdr", "empty: ended without an error, but did not write result.json",
        f"blocked: cannot be started: [Errno 17] File exists: '{tmp_path}/blocked'"]
    assert "9 of 9: fine, critters, 16 shots, seed 1: accuracy 50.00 %" in capsys.readouterr().out


def test_an_interruption_ends_all_commands(tmp_path, monkeypatch):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
    jobs = [job(tmp_path, "stubborn", stubborn), job(tmp_path, "usual", "import time; time.sleep(60)"),
            job(tmp_path, "waiting", "")]
    ended = []

    def stop(child):
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    def end(running, end=children.end):
        ended.extend(running)
        end(running)

    monkeypatch.setattr(children.Child, "has_ended", stop)
    monkeypatch.setattr(children, "end", end)
    monkeypatch.setattr(children, "PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        children.run_all(jobs, at_once=2, threads=1)
    assert [child.process.returncode for child in ended] == [-9, -15]     # the third one never started
    assert not (tmp_path / "waiting").exists()


def test_seconds_are_foreseen_by_images_and_epochs(tmp_path, capsys):
    usual = {"dataset": "critters", "model": "tiny", "device": "cpu", "shots": 16, "classes": "all",
             "method": "coop", "epochs": 200}
    assert foresee(60, usual) == 70                        # ten are those of its start and its test
    assert foresee(60, {**usual, "shots": 8, "classes": "base", "epochs": 100}) == 17.5    # 10 + 60 / 8
    for other in ({"dataset": "dtd"}, {"model": "ViT-B/16"}, {"device": "cuda"}, {"shots": 0}):
        assert foresee(60, {**usual, **other}) is None
    two = [job(tmp_path, "a", "", seconds=90), job(tmp_path, "b", "", seconds=30)]
    unknown = job(tmp_path, "c", "")
    for jobs in (two, [unknown]):
        children.announce(jobs, jobs, at_once=2)
    assert children.minutes([*two, unknown], [unknown], at_once=1) == "about 1 min"     # the median, 60 s
    assert capsys.readouterr().out.splitlines() == [
        "2 runs, 0 finished already; 2 at a time, about 1 min",              # (90 + 30) / 2 seconds
        "  a, critters, 16 shots: 1 to run, about 90 s each",
        "  b, critters, 16 shots: 1 to run, about 30 s each",
        "1 runs, 0 finished already; 2 at a time, an unknown time",
        "  c, critters, 16 shots: 1 to run, unknown until one is finished"]
