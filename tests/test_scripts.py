"""The real commands, run as a user runs them: on pictures made here, with a small CLIP of random weights.

Nine training images in batches of four leave a last batch of one, so that of two processes one is idle there;
seven test images do not divide by two either.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import evaluate
import train
from conftest import PROJECT, TORCHRUN, run

EPOCHS = 3


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of one's own: three classes of coloured noise, 3 training images each, 7 test images in all."""
    root = tmp_path_factory.mktemp("pictures")
    colours = {"red_clay": (200, 60, 40), "sea": (30, 80, 200), "wood": (90, 140, 30)}
    generator = torch.Generator().manual_seed(0)
    for split, counts in {"train": (3, 3, 3), "test": (3, 2, 2)}.items():
        for (name, colour), count in zip(colours.items(), counts):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-30, 30, (40, 40, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def options(clip_file, pictures):
    return ("--dataset", "folder", "--data-root", pictures, "--model", clip_file, "--shots", 3, "--batch-size", 4,
            "--epochs", EPOCHS, "--n-support", 5, "--lr", 0.5, "--device", "cpu")


@pytest.fixture(scope="session")
def trained(options, tmp_path_factory):
    """A finished run of one process: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    process = run("train.py", *options, "--output-dir", folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def read(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), log, torch.load(folder / "last.pt", weights_only=True)


def test_training_says_what_it_uses_and_how_it_goes(trained, clip_file):
    folder, printed = trained
    lines = printed.splitlines()
    assert lines[0].startswith(f"model {clip_file}, data folder: 3 classes, 9 training and 7 test images; 1 process on")
    assert "lr=0.5" in lines[1] and "n_support=5" in lines[1]
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == EPOCHS and all("global" in line and "local" in line and "left" in line for line in epochs)


def test_a_run_writes_what_is_needed_to_read_it(trained):
    folder, _ = trained
    assert {p.name for p in folder.iterdir()} == {"log.jsonl", "last.pt", "result.json", "per_class.csv"}
    result, log, checkpoint = read(folder)
    assert {"accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy", "test_images", "train_images",
            "dataset", "model", "shots", "seed", "split_seed", "split_matches_published", "world_size", "seconds",
            "config", "versions"} <= set(result)
    assert (result["test_images"], result["train_images"], result["world_size"]) == (7, 9, 1)
    assert [entry["epoch"] for entry in log] == [1, 2, 3] and log[-1]["lr"] < log[1]["lr"]
    assert set(checkpoint["learned"]) == {"global_prompts", "local_prompts", "local_projection"}
    assert checkpoint["class_names"] == ["red clay", "sea", "wood"] and checkpoint["config"] == result["config"]


def test_two_processes_do_what_one_does(trained, options, tmp_path):
    folder = tmp_path / "two"
    process = run(*TORCHRUN, "train.py", *options, "--output-dir", folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch   1") == 1                        # rank 0 alone prints
    (one, log_one, last_one), (two, log_two, last_two) = read(trained[0]), read(folder)
    assert two["world_size"] == 2 and two["test_images"] == 7
    for field in ("accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy"):
        assert one[field] == two[field]
    for a, b in zip(log_one, log_two):
        for field in ("loss", "global_loss", "local_loss"):
            assert a[field] == pytest.approx(b[field], rel=1e-4)
        assert a["train_accuracy"] == pytest.approx(b["train_accuracy"])
    for name, tensor in last_one["learned"].items():
        torch.testing.assert_close(last_two["learned"][name], tensor, atol=1e-4, rtol=1e-3)
    for i, state in last_one["optimizer"]["state"].items():               # SGD's momentum: the gradients, summed up
        torch.testing.assert_close(last_two["optimizer"]["state"][i]["momentum_buffer"], state["momentum_buffer"],
                                   atol=1e-4, rtol=1e-2)


def test_a_killed_run_resumes_to_the_same_end(trained, options, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "train.py", *map(str, options), "--output-dir", str(folder)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    process = run("train.py", *options, "--output-dir", folder, "--resume")
    assert process.returncode == 0, process.stderr
    (whole, log_whole, last_whole), (result, log, last) = read(trained[0]), read(folder)
    assert result["accuracy"] == whole["accuracy"] and [e["epoch"] for e in log] == [1, 2, 3]
    assert log[-1]["loss"] == log_whole[-1]["loss"]
    for name, tensor in last_whole["learned"].items():
        assert torch.equal(last["learned"][name], tensor)


def test_resume_with_other_options_is_refused(trained, options):
    process = run("train.py", *options, "--output-dir", trained[0], "--resume", "--lambda-local", 0.5)
    assert process.returncode == 1 and "lambda_local was 0.25, is 0.5" in process.stderr
    assert "Traceback" not in process.stderr


def test_evaluate_repeats_the_accuracies_of_training(trained):
    folder, _ = trained
    process = run("evaluate.py", folder, folder, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    result, again = (json.loads((folder / name).read_text()) for name in ("result.json", "evaluation.json"))
    for field in ("accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy", "test_images"):
        assert again[field] == result[field]
    assert f"accuracy           {result['accuracy']:.2f} +- 0.00  over 2 runs" in process.stdout
    (folder / "evaluation.json").unlink()
    with open(folder / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["images"]) for row in rows] == [("red clay", "3"), ("sea", "2"), ("wood", "2")]
    fused = sum(float(row["fused"]) * int(row["images"]) for row in rows) / 7
    assert fused == pytest.approx(result["accuracy"], abs=0.01)


def test_own_pictures_are_named(trained, pictures):
    two = pictures / "test/sea/0.png", pictures / "test/wood/0.png"
    process = run("evaluate.py", trained[0], "--device", "cpu", "--images", *two)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2 and "sea/0.png:" in lines[0]
    shares = [float(word.rstrip("%")) for word in lines[0].split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)


def test_loaded_run_is_ready_to_use(trained):
    model = evaluate.load_run(trained[0])
    learned = torch.load(trained[0] / "last.pt", weights_only=True)["learned"]
    assert not model.training
    assert all(torch.equal(tensor, learned[name]) for name, tensor in model.learned_state().items())
    assert [logits.shape for logits in model(torch.zeros(2, 3, 32, 32))] == [(2, 3), (2, 3)]


def test_another_clip_and_other_classes_are_refused_by_name(trained, tmp_path, pictures):
    checkpoint = torch.load(trained[0] / "last.pt", weights_only=True)
    torch.save({**checkpoint, "clip_sha256": "0" * 64}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="other CLIP weights"):
        evaluate.load_run(tmp_path)
    torch.save({**checkpoint, "class_names": ["red clay", "lake", "wood"]}, tmp_path / "last.pt")
    process = run("evaluate.py", tmp_path, "--device", "cpu")
    assert process.returncode == 1 and "label 1 of 3 was 'lake', in the data it is 'sea'" in process.stderr


def test_missing_data_is_one_error_with_the_tree_expected(tmp_path):
    process = run("train.py", "--dataset", "eurosat", "--data-root", tmp_path)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert all(text in process.stderr for text in (str(tmp_path / "eurosat"), "split_zhou_EuroSAT.json", "2750"))


@pytest.mark.parametrize("option, complaint", [
    (("--batch-size", "0"), "--batch-size 0"), (("--amp", "fp16", "--device", "cpu"), "fp16 needs a GPU"),
    (("--n-support", "17"), "keep 17 of 16 patches"), (("--epsilon", "0"), "--epsilon must be positive"),
    (("--shots", "4"), "has 3 images, fewer than the 4 shots"), (("--n-local", "0"), "--n-local must be at least 1")])
def test_options_that_cannot_work_end_in_one_line_and_leave_nothing(options, tmp_path, option, complaint):
    command = [*map(str, options), *option, "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=complaint):
        train.main(train.parse_args(command))
    assert not (tmp_path / "run").exists()


def test_bfloat16_stays_near_float32(trained, options, tmp_path):
    train.main(train.parse_args([*map(str, options), "--amp", "bf16", "--output-dir", str(tmp_path / "run")]))
    _, log, _ = read(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(read(trained[0])[1][0]["loss"], rel=0.05)


def test_what_an_earlier_run_left_in_the_folder_is_not_taken_for_this_ones(options, tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("{}\n{}\n")
    train.main(train.parse_args([*map(str, options), "--epochs", "1", "--output-dir", str(tmp_path)]))
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "last.pt", "result.json", "per_class.csv"}
    assert len(read(tmp_path)[1]) == 1


def test_cached_features_train_without_augmentation(options, tmp_path, capsys):
    train.main(train.parse_args([*map(str, options), "--cache-features", "--output-dir", str(tmp_path / "run")]))
    assert "MiB for 9 images; the paper's random crops and flips are dropped" in capsys.readouterr().out
    result, log, _ = read(tmp_path / "run")
    assert result["config"]["cache_features"] and result["test_images"] == 7 and len(log) == EPOCHS


def test_table_puts_runs_beside_the_papers_numbers_and_leaves_blank_what_did_not_run(tmp_path, capsys):
    config = {"lr": 0.05, "split_seed": 1}
    runs = (("a", 1, 90.0, {}), ("b", 2, 92.0, {}), ("c", 3, 10.0, {"lr": 1.0}), ("d", 2, 11.0, {}))
    for folder, seed, accuracy, change in runs:
        (tmp_path / folder).mkdir()
        result = {"dataset": "eurosat", "shots": 16, "seed": seed, "split_seed": 1, "accuracy": accuracy,
                  "model": "tiny", "split_matches_published": False, "config": {**config, **change, "seed": seed}}
        (tmp_path / folder / "result.json").write_text(json.dumps(result))
    evaluate.main(evaluate.parse_args(["--table", str(tmp_path)]))
    printed = capsys.readouterr().out
    table_1 = {line.split()[0]: line.split() for line in printed.split("Table 4")[0].splitlines() if line}
    assert table_1["eurosat"][1:] == ["48.3", "84.9", "90.1", "91.7", "91.00", "+-", "1.41"]     # sd of 90 and 92
    assert table_1["dtd"][1:] == ["44.1", "69.9", "75.5", "77.1"]
    assert table_1["average"][1:] == ["48.3", "84.9", "90.1", "91.7", "91.00"]                   # of EuroSAT alone
    assert "left out: %s (lr was 0.05, is 1.0)" % (tmp_path / "c") in printed and "(seed 2 again)" in printed
    assert "NOT CoOp's published split" in printed
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    ours, = (row for row in rows if row["method"] == "ours" and row["dataset"] == "eurosat")
    assert [*ours.values()] == ["eurosat", "16", "ours", "91.00", "1.41", "2"]


def test_papers_numbers_average_to_the_papers_averages():
    # the averages printed in the paper: Table 1 (where CLIP's, 75.7, is a misprint: its column averages 64.8), Table 4
    means = {}
    for (_, shots, method), (value,) in evaluate.paper_numbers().items():
        means.setdefault((method, shots), []).append(value)
    means = {key: sum(values) / 11 for key, values in means.items() if len(values) == 11}
    printed = {("CLIP", 16): 64.8, ("CoOp (Table 1)", 16): 79.9, ("GalLoP (Table 1)", 16): 84.4}
    printed |= {("CoOp", k): v for k, v in zip(evaluate.SHOTS, (58.2, 64.8, 71.6, 76.1, 79.5))}
    printed |= {("GalLoP", k): v for k, v in zip(evaluate.SHOTS, (72.5, 75.7, 79.0, 82.2, 84.4))}
    printed |= {("SOT-GLP", k): v for k, v in zip(evaluate.SHOTS, (73.4, 76.3, 79.5, 82.6, 85.1))}
    assert means == pytest.approx(printed, abs=0.08)


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
    assert read(tmp_path / "run")[1][-1]["loss"] == pytest.approx(read(trained[0])[1][-1]["loss"], rel=1e-3)
