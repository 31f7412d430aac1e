"""Configurations: the first value that is refused and the last that works, ablations, averages."""

import pytest

import evaluate
from harness import configuration, places, runs
from harness.options import parse_args
from methods import METHODS, OPTIONS


def parse(words):
    """The options of train.py for a command line."""
    return parse_args([*words.split(), "--device", "cpu"])


# ---- what is refused ---------------------------------------------------------------------------------------

NUMBERS = [(name, option, default) for name in METHODS for option, default in OPTIONS[name].items()
           if type(default) in (int, float) and option != "stage"]


@pytest.mark.parametrize("name, option, default", NUMBERS)
def test_a_number_that_cannot_work_is_refused_by_its_name(name, option, default):
    flag = "--" + option.replace("_", "-")
    value, complaint = "0", "at least 1"
    if type(default) is float:
        value, complaint = "-0.1", "finite number and not negative"
    args = parse(f"--method {name} {flag} {value}")
    with pytest.raises(ValueError, match=f"{flag} must be .*{complaint}"):
        configuration.check_args(args, 1)


@pytest.mark.parametrize("words, complaint", [
    ("--seed 9223372036854775808", "--seed must have 64 bits"),
    ("--split-seed -9223372036854775809", "--split-seed must have 64 bits"),
    ("--held-out 0", "--held-out must lie between"),
    ("--prompt-dropout 1.01", r"--prompt-dropout must lie in \[0, 1\]"),
    ("--method promptot --batch-size 9", "--plan exact tries all orders of a batch of at most 8"),
    ("--method promptsrc --average-std 0", "--average-std must be positive"),
    ("--method plotpp --stage 3", "--stage must be 1 or 2, got 3"),
    ("--method maple --n-context 5", "--n-context must lie between 1 and 4"),
    ("--method proda --n-drawn 33", "--n-drawn must lie between 1 and --n-global, 32: got 33"),
    ("--template a{}b}", "no other brace"), ("--template {}{}", "one {}"),
    ("--lr inf", "--lr must be a finite")])
def test_the_first_value_beyond_the_last_is_refused(words, complaint):
    args = parse(words)
    with pytest.raises(ValueError, match=complaint):
        configuration.check_args(args, 1)


@pytest.mark.parametrize("words", [
    "--seed 9223372036854775807", "--split-seed -9223372036854775808", "--prompt-dropout 1 --epsilon 1e-6",
    "--method promptot --batch-size 8", "--method promptot --batch-size 9 --plan sinkhorn",
    "--method promptot --batch-size 9 --lambda-transport 0", "--template a{}b", "--method plotpp --stage 1",
    "--method maple --n-context 4", "--method proda --n-drawn 32", "--method coop --n-context 5",
    "--workers 0 --shots 0 --lr 0"])
def test_the_last_value_that_works_is_taken(words):
    configuration.check_args(parse(words), 1)


def test_files_of_somebodys_own_are_not_replaced(tmp_path):
    places.check_free(tmp_path, {})
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="log.jsonl would be replaced, but no run stands there: --output-dir"):
        places.check_free(tmp_path, {})
    places.check_free(tmp_path, {}, overwrite=True)


# ---- what is an ablation, and what another configuration ---------------------------------------------------

@pytest.mark.parametrize("method, changed, variant", [
    ("gallop", {}, False), ("gallop", {"top_k": [5, 10, 15, 20]}, False),
    ("gallop", {"top_k": [5, 10, 15, 25]}, True), ("sotglp", {"lr": 0.1}, False),
    ("sotglp", {"n_support": 11}, True), ("sotglp", {"plan_gradient": False}, True),
    # the scripts of the release have 4 local prompts for EuroSAT and DTD, 6 for Food101
    ("released", {"n_local": 4}, False), ("released", {"n_local": 6}, True),
    ("released", {"n_local": 6, "dataset": "dtd"}, True),
    ("released", {"n_local": 6, "dataset": "food101"}, False),
    ("linear_probe", {}, False)])
def test_an_ablation_differs_from_the_methods_defaults_for_its_dataset(method, changed, variant):
    config = {"method": method, "dataset": "eurosat", "lr": 0.05, **OPTIONS.get(method, {}), **changed}
    assert runs.is_variant(config) == variant


def test_all_but_practical_options_make_another_configuration():
    before = vars(parse(""))
    practical = ("data_root", "output_dir", "device", "workers", "amp", "text_chunk", "checkpoint_text",
                 "compile")
    for option in before:
        now = {**before, option: "another"}
        assert runs.changes(before, now) == (
            [] if option in practical else [f"{option} was {before[option]}, is another"])


@pytest.mark.parametrize("fields, complaint", [
    ({"class_names": ["sea", "red clay", "wood"]}, "it has other classes"),
    ({"clip_sha256": "1"}, "it has other CLIP weights"),
    ({"epoch": 2}, "it stands at epoch 2, the first one at epoch 3"),
    ({"config": {"lr": 2}}, "lr was 1, is 2")])
def test_runs_that_differ_in_one_thing_are_not_averaged(fields, complaint):
    one = {"config": {"lr": 1, "seed": 1, "split_seed": 1}, "class_names": ["red clay", "sea", "wood"],
           "epoch": 3, "clip_sha256": "0"}
    runs.check_kind("A", one, "B", {**one, "config": {**one["config"], "seed": 2, "split_seed": 3}})
    other = {**one, **fields, "config": {**one["config"], **fields.get("config", {})}}
    with pytest.raises(ValueError, match=f"B is another kind of run than A: .*{complaint}"):
        runs.check_kind("A", one, "B", other)


def test_equal_runs_are_those_whose_seeds_are_both_equal(monkeypatch):
    seeds = {"A": (1, 1), "B": (1, 2), "C": (2, 1), "D": (1, 2)}
    monkeypatch.setattr(runs, "read_checkpoint", lambda run: {
        "config": dict(zip(("seed", "split_seed"), seeds[run])), "class_names": [], "clip_sha256": "",
        "epoch": 1})
    assert len(evaluate.read_alike(["A", "B", "C"])) == 3
    with pytest.raises(ValueError, match="D has the seeds of B"):
        evaluate.read_alike(["A", "B", "C", "D"])
