"""The real commands, run as a user runs them: each once. Their parts are tested in test_train.py and its like."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import torch

from conftest import COLOURS, PROJECT, copy, read, run, train
from methods import METHODS

NAMES = ("b é", "crab 🦀", "wood")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}     # a locale that lacks two of these names


def test_a_killed_run_resumes_to_the_same_end_in_another_locale(options, pictures, tmp_path):
    root, folder = tmp_path / "pictures", tmp_path / "killed"
    for split in ("train", "test"):
        for old, new in zip(COLOURS, NAMES):
            shutil.copytree(pictures / split / old, root / split / new)
    options = (*options, "--data-root", root)
    command = [sys.executable, PROJECT / "train.py", *map(str, options), "--output-dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", **ASCII})
    limit = threading.Timer(120, process.kill)
    limit.start()
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL and limit.is_alive()
    limit.cancel()
    assert not (folder / "result.json").exists()
    train(*options, "--output-dir", folder, "--resume")                  # in UTF-8, with the same names and pictures
    train(*options, "--output-dir", tmp_path / "whole")
    (whole, log_whole, last_whole), (result, log, last) = read(tmp_path / "whole"), read(folder)
    assert result["accuracy"] == whole["accuracy"] and [e["epoch"] for e in log] == [1, 2, 3]
    assert [e["loss"] for e in log] == [e["loss"] for e in log_whole] and last["class_names"] == [*NAMES]
    for name, tensor in last_whole["learned"].items():
        assert torch.equal(last["learned"][name], tensor)
    assert (folder / "per_class.csv").read_text(encoding="utf-8").splitlines()[2].startswith("1,crab 🦀,2,")


def test_evaluate_reads_a_run_and_names_pictures_in_any_locale(trained, pictures, tmp_path):
    run_folder, picture = copy(trained, tmp_path / "run", class_names=[*NAMES]), pictures / "test/sea/0.png"
    process = run("evaluate.py", run_folder, "--device", "cpu", "--images", picture, "--csv", tmp_path / "a.csv",
                  **ASCII)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"wrote {tmp_path}/a.csv: 1 pictures\n"
    line = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1]
    assert line.startswith(f"{picture},") and all(name in line for name in NAMES)


def test_a_file_that_is_no_command_says_in_one_line_what_is(tmp_path):
    paths = [*PROJECT.glob("methods/*.py"), *PROJECT.glob("clip/*.py")]
    assert len(paths) > 20
    for path in paths:
        # -S: none of its imports is reached
        process = subprocess.run([sys.executable, "-S", path], cwd=tmp_path, capture_output=True, text=True)
        line = process.stderr.removesuffix("\n")
        assert process.returncode == 1 and "\n" not in line, process.stderr
        assert line.startswith(f"{path.relative_to(PROJECT).as_posix()} is no command: ")
        assert path.stem not in METHODS or line.endswith(f"python train.py --method {path.stem}")
