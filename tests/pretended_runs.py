"""Runs of extras/compare.py that take no time: each command writes at once what it would write in the end."""

import argparse
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

import train as script
from extras import ablations, children, compare, linear_probe, reuse
from harness.configuration import configuration

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


@pytest.fixture
def no_pictures(monkeypatch):
    """What runs are made from, where there are neither pictures nor weights."""
    monkeypatch.setattr(reuse, "made_from", lambda config: {"class_names": [], "data": {}, "clip_sha256": ""})


@pytest.fixture
def mine(pictures, tmp_path):
    """A copy of the pictures, to be moved and changed."""
    return Path(shutil.copytree(pictures, tmp_path / "first/mine"))


def on_mine(root, *options):
    """The options of one run on one's own pictures."""
    return ("--dataset", "folder", "--data-root", str(root), "--model", "tiny", "--methods", "coop",
            "--seeds", "1", "--shots", "2", *options)
