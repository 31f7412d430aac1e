"""The real commands, run as a user runs them: each once. Their parts are tested in test_train.py and its like."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from conftest import PROJECT, TORCHRUN, read, run, train


def test_a_killed_run_resumes_to_the_same_end(trained, options, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "train.py", *map(str, options), "--output-dir", str(folder)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = threading.Timer(120, process.kill)
    limit.start()
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL and limit.is_alive()
    limit.cancel()
    assert not (folder / "result.json").exists()
    train(*options, "--output-dir", folder, "--resume")
    (whole, log_whole, last_whole), (result, log, last) = read(trained), read(folder)
    assert result["accuracy"] == whole["accuracy"] and [e["epoch"] for e in log] == [1, 2, 3]
    assert log[-1]["loss"] == log_whole[-1]["loss"]
    for name, tensor in last_whole["learned"].items():
        assert torch.equal(last["learned"][name], tensor)


def test_evaluate_reads_a_run_and_names_pictures(trained, pictures):
    process = run("evaluate.py", trained, "--device", "cpu", "--images", pictures / "test/sea/0.png")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{pictures}/test/sea/0.png:  ")


@pytest.mark.cuda
def test_fp16_on_a_gpu_agrees_with_float32(options, tmp_path):
    results = []
    for amp in ("off", "fp16"):
        process = run("train.py", *options, "--device", "cuda", "--amp", amp, "--output-dir", tmp_path / amp)
        assert process.returncode == 0, process.stderr
        results.append(read(tmp_path / amp)[1])
    assert results[0][-1]["loss"] == pytest.approx(results[1][-1]["loss"], rel=0.02)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_process_does(trained, options, tmp_path):
    process = run(*TORCHRUN, "train.py", *options, "--device", "cuda", "--amp", "off", "--output-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert read(tmp_path / "run")[1][-1]["loss"] == pytest.approx(read(trained)[1][-1]["loss"], rel=1e-3)
