"""train.py: the recipe of Sec. 4, each option's way to where it acts, what an epoch's line says, faults, resumption.

All in this process, on nine pictures; test_scripts.py runs the commands themselves.
"""

import inspect
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import clip
import data
import evaluate
import ood
from harness import configuration, machine, runs
import sotglp
import train as script
from conftest import EPOCHS, copy, random_clip, read, train

RECIPE = {"shots": 16, "seed": 1, "split_seed": 1, "sampler": "exact", "epochs": 50, "warmup_epochs": 5,
          "batch_size": 32, "lr": 0.05, "weight_decay": 0.01, "n_global": 4, "n_local": 4, "n_support": 10,
          "epsilon": 0.1, "n_iters": 20, "lambda_local": 0.25, "prompt_dropout": 0.75, "local_projection": True,
          "vv_attention": True, "class_specific": True, "plan_gradient": True, "cache_features": False,
          "checkpoint_text": False, "text_chunk": 200, "compile": False}


# ---- the recipe ----------------------------------------------------------------------------------------------

def test_defaults_are_the_papers():
    # Sec. 4: SGD, lr 0.05, 50 epochs with 5 of warm-up, batch 32, N_g = N_l = 4, K = 10, lambda 0.25
    assert vars(script.parse_args([])).items() >= {**RECIPE, "dataset": "critters", "model": "tiny"}.items()
    assert script.parse_args(["--dataset", "dtd"]).model == "ViT-B/16"


@pytest.mark.parametrize("arguments, field, value", [
    ((), "output_dir", "runs/critters-16shot-seed1"),
    (("--dataset", "dtd", "--shots", "2", "--seed", "3"), "output_dir", "runs/dtd-2shot-seed3"),
    (("--epochs", "20"), "warmup_epochs", 2),               # a tenth of the epochs
    (("--epochs", "80"), "warmup_epochs", 5),
    (("--device", "cpu"), "amp", "off"), (("--device", "cpu"), "workers", 0),
    (("--device", "cuda:1"), "amp", "fp16"), (("--device", "cuda", "--amp", "bf16"), "amp", "bf16"),
    (("--device", "cuda", "--workers", "0"), "workers", 0),
    (("--device", "cuda:1"), "text_chunk", 1000), (("--device", "cpu"), "text_chunk", 200),
    (("--device", "cuda", "--text-chunk", "50"), "text_chunk", 50),
    (("--dataset", "dtd", "--data-root", "/here"), "data_root", "/here"), ((), "data_root", "/from the environment"),
    (("--model", "vit-b-32"), "model", "ViT-B/32"), (("--model", "ViT-B/16"), "model", "ViT-B/16")])
def test_what_is_not_given_follows_from_the_rest(arguments, field, value, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/from the environment")
    assert getattr(script.parse_args([*arguments]), field) == value


@pytest.mark.parametrize("arguments, name", [
    ("", "critters-16shot-seed1"), ("--shots 0", "critters-allshot-seed1"),
    ("--method coop --classes base", "coop-critters-base-16shot-seed1"),
    ("--method released", "released-critters-16shot-seed1"), ("--method sotglp", "critters-16shot-seed1"),
    ("--model tiny", "critters-16shot-seed1"), ("--model vit-b-32", "critters-ViT-B-32-16shot-seed1"),
    ("--dataset dtd --model tiny", "dtd-tiny-16shot-seed1"), ("--model mine.v2.pt", "critters-mine.v2-16shot-seed1"),
    ("--dataset folder --data-root my/photos --shots 4", "folder-photos-4shot-seed1"),
    ("--epochs 20", "critters-16shot-epochs20-seed1"), ("--epochs 50", "critters-16shot-seed1"),
    ("--method coop --epochs 50", "coop-critters-16shot-epochs50-seed1"),
    ("--warmup-epochs 2 --seed 3 --split-seed 2", "critters-16shot-split-seed2-warmup-epochs2-seed3"),
    ("--method released --epochs 50 --n-global 4", "released-critters-16shot-epochs50-n-global4-seed1"),
    ("--no-vv --lambda-local 1 --lr 1e-3", "critters-16shot-lr0.001-lambda-local1-no-vv-seed1"),
    ("--method gallop --top-k 5 10", "gallop-critters-16shot-top-k5+10-seed1"),
    ("--method coop --words 'a photo of a'", "coop-critters-16shot-words-a-photo-of-a-seed1"),
    ("--template 'my {}/it.'", "critters-16shot-template-my-it.-seed1"),
    ("--sampler proportional", "critters-16shot-sampler-proportional-seed1"),
    ("--template 'this is a rather long template for a {}'",                  # 30 letters of it
     "critters-16shot-template-this-is-a-rather-long-template-seed1"),
    ("--lr 0.0123456 --epsilon 0.25", "critters-16shot-lr0.0123456-epsilon0.25-seed1"),
    ("--device cpu --amp bf16 --workers 2 --text-chunk 3 --checkpoint-text --compile", "critters-16shot-seed1")])
def test_the_name_of_a_folder_says_what_differs(arguments, name):
    Path("mine.v2.pt").touch()
    assert script.parse_args(shlex.split(arguments)).output_dir == f"runs/{name}"


def test_folders_and_files_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("mine.pt").touch()
    args = script.parse_args(["--dataset", "dtd", "--data-root", "../there", "--model", "mine.pt"])
    assert (args.data_root, args.model) == (str(tmp_path / "there"), str(tmp_path / "here/mine.pt"))


@pytest.mark.parametrize("cpus, processes, workers", [(64, "1", 8), (12, "4", 3), (2, "4", 0), (9, None, 8)])
def test_workers_share_the_processors(cpus, processes, workers, monkeypatch):
    # up to 8, and no more than processors / processes
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: range(cpus), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert script.parse_args(["--device", "cuda"]).workers == workers


@pytest.mark.parametrize("module", [script, evaluate, ood])
def test_scripts_share_the_rules_for_workers_and_precision(module, monkeypatch):
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: range(6), raising=False)
    run = [] if module is script else ["RUN"]
    for device, workers in (("cpu", 0), ("cuda", 6), ("cuda:1", 6)):
        assert module.parse_args([*run, "--device", device]).workers == workers
    assert module.parse_args([*run, "--device", "cuda", "--workers", "1", "--amp", "bf16"]).workers == 1
    assert module.parse_args([*run, "--device", "cuda"]).amp == (None if module is evaluate else "fp16")  # None: a run's
    with pytest.raises(SystemExit, match="--amp fp16 needs a GPU"):
        module.main(module.parse_args([*run, "--device", "cpu", "--amp", "fp16"]))


def test_the_gpu_that_is_named_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    args = script.parse_args(["--device", "cuda:1"])
    assert machine.start_processes(args) == (0, 1, torch.device("cuda:1")) and chosen == [torch.device("cuda:1")]


def test_learning_rate_warms_up_and_falls_to_zero():
    # half of the warm-up: 0.05 / 2; its end: 0.05; half of the rest, 5 + 22.5: (1 + cos(pi / 2)) / 2 = 1/2; the end: 0
    args = script.parse_args([])
    rates = {2.5: 0.025, 5: 0.05, 27.5: 0.025, 50: 0.0}
    assert [script.learning_rate(epoch, args) for epoch in rates] == pytest.approx([*rates.values()], abs=1e-12)


def test_the_rate_changes_in_every_step(trained):
    # 9 images in batches of 4: 3 steps, the last one in the middle of the last third: progress epoch + 2.5 / 3.
    # Warm-up is 3 / 10 epochs, so that done = (progress - 0.3) / 2.7.
    done = [(epoch + 2.5 / 3 - 0.3) / 2.7 for epoch in range(EPOCHS)]
    expected = [0.5 * (1 + math.cos(math.pi * x)) / 2 for x in done]
    assert [entry["lr"] for entry in read(trained)[1]] == pytest.approx(expected)


def test_first_step_has_a_rate_of_its_own(options, tmp_path):
    # one step per epoch at progress 0.5 of 0.5 / 2 warm-up epochs at most a tenth: 5 epochs, warm-up 0.5, rate = peak
    train(*options, "--batch-size", 9, "--epochs", 5, "--output-dir", tmp_path / "run")
    assert read(tmp_path / "run")[1][0]["lr"] == pytest.approx(0.5)


def test_sgd_with_momentum_and_weight_decay_acts_on_all_that_is_learned(trained):
    group, = read(trained)[2]["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], len(group["params"])) == (0.9, 0.01, 3)
    assert not group["nesterov"] and group["dampening"] == 0


def test_weight_decay_acts_in_a_step(options, tmp_path):
    # One step from p with gradient g and decay 1: p - lr (g + p). lambda 0 leaves the local prompts without a gradient:
    # p - lr p = (1 - lr) p.
    train(*options, "--batch-size", 9, "--epochs", 1, "--lambda-local", 0, "--weight-decay", 1,
          "--output-dir", tmp_path / "run")
    _, (entry,), last = read(tmp_path / "run")
    start = initial(seed=1)
    torch.testing.assert_close(last["learned"]["local_prompts"], (1 - entry["lr"]) * start["local_prompts"])


def initial(seed):
    """The learned tensors as they are before training, on the classes of the pictures."""
    clip_model = random_clip_of_the_file()
    torch.manual_seed(seed)
    return sotglp.SOTGLP(clip_model, ["red clay", "sea", "wood"], n_support=5).learned_state()


# ---- each option reaches where it acts -----------------------------------------------------------------------

class Stop(Exception):
    """Ends a run where the test has seen enough."""


def arguments_of(monkeypatch, owner, name, options):
    """What a run gives to a function, by the names of its parameters; the run ends there."""
    signature = inspect.signature(getattr(owner, name))

    def spy(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        raise Stop({**bound.arguments, **bound.arguments.get("text_options", {})})

    monkeypatch.setattr(owner, name, spy)
    with pytest.raises(Stop) as stop:
        train(*options)
    return stop.value.args[0]


def test_options_reach_the_model(options, tmp_path, monkeypatch):
    # from a configuration to each method's constructor: test_passed_on.py
    more = ("--n-support", 7, "--n-iters", 9, "--text-chunk", 2, "--no-vv", "--output-dir", tmp_path)
    found = arguments_of(monkeypatch, sotglp.SOTGLP, "__init__", (*options, *more))
    expected = {"n_support": 7, "n_iters": 9, "text_chunk": 2, "vv_attention": False, "class_specific": True,
                "checkpoint_text": False, "ranks": (0, 1), "class_names": ["red clay", "sea", "wood"]}
    assert found.items() >= expected.items()


@pytest.mark.parametrize("more, expected", [
    ((), {"shots": 3, "seed": 1, "sampler": "exact", "held_out": None, "classes": "all"}),
    (("--shots", 0, "--split-seed", 5, "--seed", 4, "--sampler", "proportional", "--held-out", 0.2,
      "--classes", "base"),
     {"shots": 0, "seed": 5, "sampler": "proportional", "held_out": 0.2, "classes": "base"})])
def test_options_reach_the_data(more, expected, options, pictures, monkeypatch):
    found = arguments_of(monkeypatch, data, "load", (*options, *more))
    assert found == {"name": "folder", "root": str(pictures), **expected}


def test_options_reach_the_batches(options, tmp_path, monkeypatch):
    more = ("--seed", 4, "--split-seed", 5, "--batch-size", 2, "--output-dir", tmp_path)
    found = arguments_of(monkeypatch, data.Batches, "__init__", (*options, *more))
    assert found.items() >= {"n": 9, "seed": 4, "batch_size": 2, "rank": 0, "world": 1}.items()


def test_the_seed_draws_the_initial_prompts(options, tmp_path):
    # a learning rate of 0 leaves them as they were drawn
    train(*options, "--lr", 0, "--epochs", 1, "--seed", 2, "--output-dir", tmp_path / "run")
    learned = read(tmp_path / "run")[2]["learned"]
    for name, tensor in initial(2).items():
        assert torch.equal(learned[name], tensor)
    assert not torch.equal(learned["local_prompts"], initial(3)["local_prompts"])


def test_a_run_without_projection_keeps_the_identity(options, tmp_path):
    train(*options, "--no-local-projection", "--epochs", 1, "--output-dir", tmp_path / "run")
    learned = read(tmp_path / "run")[2]["learned"]
    assert torch.equal(learned["local_projection"], torch.eye(128))
    assert not torch.equal(learned["local_prompts"], initial(1)["local_prompts"])


# ---- an epoch ------------------------------------------------------------------------------------------------

def test_cached_features_are_those_of_the_test_transform(options, tmp_path, pictures, capsys):
    # without crops, learning and dropout each epoch has the same losses: those of the pictures as the test shows them
    train(*options, "--cache-features", "--prompt-dropout", 0, "--lr", 0, "--output-dir", tmp_path / "run")
    seen = [(entry["global_loss"], entry["local_loss"]) for entry in read(tmp_path / "run")[1]]
    assert "MiB for 9 images; the paper's random crops and flips are dropped" in capsys.readouterr().out
    assert all(entry == pytest.approx(seen[0], rel=1e-5) for entry in seen)
    items, _, _, names = data.load("folder", pictures, 3, 1)
    clip_model = random_clip_of_the_file()
    torch.manual_seed(1)
    model = sotglp.SOTGLP(clip_model, names, n_support=5, n_iters=2).eval()
    images = torch.stack([clip.preprocess(32)(data.read_image(path)) for path, *_ in items])
    labels = torch.tensor([label for _, label, _ in items])
    with torch.no_grad():
        g, l = model(images)
        expected = [torch.nn.functional.cross_entropy(logits, labels).item() for logits in (g, l)]
    assert seen[0] == pytest.approx(expected, rel=1e-4)
    _, (entry, *_), _ = read(tmp_path / "run")
    assert entry["loss"] == pytest.approx(expected[0] + 0.25 * expected[1], rel=1e-4)
    right = (sotglp.fuse(g, l).argmax(1) == labels).float().mean().item()
    assert entry["train_accuracy"] == pytest.approx(100 * right)


def random_clip_of_the_file():
    """The random CLIP as it is read from its file of half-precision weights."""
    return clip.build_model({name: tensor.half() for name, tensor in random_clip().state_dict().items()})


def test_cached_features_are_kept_in_the_precision_of_the_towers(options, tmp_path, monkeypatch):
    kept, original = [], script.CachedFeatures.__iter__
    monkeypatch.setattr(script.CachedFeatures, "__iter__", lambda self: kept.append(self) or original(self))
    train(*options, "--cache-features", "--amp", "bf16", "--epochs", 1, "--output-dir", tmp_path / "run")
    features, = kept
    assert features.cls.dtype == features.patches.dtype == torch.bfloat16
    assert (features.cls.shape, features.patches.shape) == ((9, 128), (9, 16, 128))
    assert features.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and features.patches.isfinite().all()


def test_lambda_weighs_the_local_loss(options, tmp_path):
    train(*options, "--lambda-local", 0.5, "--epochs", 1, "--output-dir", tmp_path / "run")
    _, (entry,), _ = read(tmp_path / "run")
    assert entry["loss"] == pytest.approx(entry["global_loss"] + 0.5 * entry["local_loss"])


def test_the_log_has_the_diagnostics_of_the_last_batch_as_the_epoch_left_the_model(options, tmp_path, monkeypatch):
    calls, original = [], sotglp.SOTGLP.diagnostics

    def spy(model, images, labels):
        calls.append((model, images, original(model, images, labels)))
        return calls[-1][2]

    monkeypatch.setattr(sotglp.SOTGLP, "diagnostics", spy)
    train(*options, "--epochs", 1, "--batch-size", 5, "--output-dir", tmp_path)
    _, (entry,), last = read(tmp_path)
    (model, images, found), = calls                                      # 9 images in batches of 5: once, on the last 4
    assert images.shape == (4, 3, 32, 32)
    assert all(torch.equal(tensor, last["learned"][name]) for name, tensor in model.learned_state().items())
    for name in ("plan_entropy", "row_error", "overlap", "prompt_cosine"):
        assert entry[name] == pytest.approx(found[name].mean().item())


def test_a_method_without_diagnostics_trains(options, tmp_path, monkeypatch):
    monkeypatch.delattr(sotglp.SOTGLP, "diagnostics")
    train(*options, "--epochs", 1, "--output-dir", tmp_path)
    assert "plan_entropy" not in read(tmp_path)[1][0]


def test_training_says_what_it_uses_and_how_it_goes(options, clip_file, tmp_path, capsys):
    train(*options, "--output-dir", tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (f"sotglp, model {clip_file}, data folder: 3 classes, 9 training and 7 test images; 1 process on "
                        f"cpu, 1 thread, precision float32, writing to {tmp_path}/run")
    options, others = lines[1].removeprefix("options: ").rsplit("  ", 1)
    assert set(options.split("  ")) >= {"lr=0.5", "n_support=5", "batch_size=4", "shots=3"}
    assert "seed" not in options and "weight_decay" not in options and others.startswith("all others have their defaults")
    result, log, _ = read(tmp_path / "run")
    epochs = [line for line in lines if line.startswith("epoch")]
    for entry, line in zip(log, epochs, strict=True):
        assert line.startswith("epoch {epoch:3d}  loss {loss:.4f} (global {global_loss:.4f}, local {local_loss:.4f})  "
                               "train {train_accuracy:5.1f} %  lr {lr:.2e}".format(**entry))
        assert "left" in line and len(line) <= 120 and "plan_entropy" in entry
    assert lines[-2].startswith("accuracy {accuracy:.2f} %  (global {global_accuracy:.2f}, local {local_accuracy:.2f}, "
                                "zero-shot {zero_shot_accuracy:.2f})  on 7 test images".format(**result))
    assert lines[-1] == f"wrote {tmp_path}/run/result.json, per_class.csv, confusion.csv, log.jsonl, last.pt"


# ---- what a run writes ---------------------------------------------------------------------------------------

def test_a_run_writes_what_is_needed_to_read_it(trained, options):
    assert {p.name for p in trained.iterdir()} == {"log.jsonl", "last.pt", "result.json", "per_class.csv", "confusion.csv", "lock"}
    result, log, checkpoint = read(trained)
    assert {"accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy", "seconds", "versions"} <= set(result)
    facts = {"test_images": 7, "train_images": 9, "world_size": 1, "threads": 1, "dataset": "folder", "shots": 3,
             "seed": 1, "split_seed": 1, "split_matches_published": None, "precision": "float32"}
    assert facts.items() <= result.items()
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert all(0 <= entry["seconds"] < 60 for entry in log) and 0 < result["seconds"] < 60
    assert set(checkpoint["learned"]) == {"global_prompts", "local_prompts", "local_projection"}
    assert checkpoint["class_names"] == ["red clay", "sea", "wood"] and checkpoint["config"] == result["config"]
    assert (checkpoint["epoch"], checkpoint["clip_sha256"]) == (3, clip.weights_hash(random_clip_of_the_file()))
    assert [path[:-5] for path in checkpoint["training"]] == 3 * ["train/red_clay/"] + 3 * ["train/sea/"] + 3 * [
        "train/wood/"] and len({*checkpoint["training"]}) == 9
    commit = result["versions"]["commit"]                  # none where the project was not cloned
    assert commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", commit)
    versions = {"python", "torch", "torchvision", "numpy", "pillow", "commit", "cuda", "gpu"}
    assert set(result["versions"]) == versions and result["versions"]["torch"] == torch.__version__
    assert set(result["config"]) == set(vars(script.parse_args([]))) - {"resume", "overwrite"}


def test_a_split_file_that_is_not_published_is_noted(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "split_matches_published", lambda *_: False)
    train(*options, "--epochs", 1, "--output-dir", tmp_path / "run")
    assert "note: the split file of folder is not CoOp's published one" in capsys.readouterr().out
    assert read(tmp_path / "run")[0]["split_matches_published"] is False


# ---- interruption and resumption -----------------------------------------------------------------------------

def stop_after(epoch, monkeypatch, *options):
    """A run that ends like a killed one, while it saves the checkpoint of the next epoch."""
    original = torch.save

    def save(state, path):
        if state["epoch"] > epoch:
            path.write_bytes(b"half")
            raise Stop
        original(state, path)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch, "save", save)
        train(*options)


def test_a_resumed_run_ends_as_an_undisturbed_one(trained, options, tmp_path, monkeypatch):
    options = (*options, "--output-dir", tmp_path)
    stop_after(2, monkeypatch, *options)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "last.pt", "lock"}          # no half-written file
    train(*options, "--resume")
    (whole, log_whole, last_whole), (result, log, last) = read(trained), read(tmp_path)
    fields = ("epoch", "loss", "global_loss", "local_loss", "train_accuracy", "lr", "row_error", "plan_entropy",
              "overlap", "prompt_cosine")
    assert [[entry[f] for f in fields] for entry in log] == [[entry[f] for f in fields] for entry in log_whole]
    assert (tmp_path / "per_class.csv").read_text() == (trained / "per_class.csv").read_text()
    assert {k: v for k, v in result.items() if k.endswith("accuracy")} == \
        {k: v for k, v in whole.items() if k.endswith("accuracy")}
    for name, tensor in last_whole["learned"].items():
        assert torch.equal(last["learned"][name], tensor)


def test_a_run_of_a_gpu_goes_on_without_one(trained, options, tmp_path):
    # on a GPU the optimizer is the fused one, and its checkpoint says so
    optimizer = read(trained)[2]["optimizer"]
    optimizer["param_groups"][0]["fused"] = True
    copy(trained, tmp_path, optimizer=optimizer)
    args = script.parse_args([*map(str, options), "--output-dir", str(tmp_path), "--resume"])
    group, = script.set_up(args, 0, 1, torch.device("cpu")).optimizer.param_groups
    assert group["fused"] is False


@pytest.mark.parametrize("option, complaint", [
    (("--lambda-local", 0.5), "lambda_local was 0.25, is 0.5"), (("--seed", 2), "seed was 1, is 2"),
    (("--lr", 0.1), "lr was 0.5, is 0.1"), (("--no-vv",), "vv_attention was True, is False")])
def test_resume_with_other_options_is_refused(option, complaint, trained, options):
    before = (trained / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match=f"was started with other options .{complaint}"):
        train(*options, "--output-dir", trained, "--resume", *option)
    assert (trained / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name, value, complaint", [
    ("clip_sha256", "0" * 64, "other CLIP weights"),
    ("class_names", ["red clay", "lake", "wood"], "label 1 of 3 was 'lake', in the data it is 'sea'"),
    ("learned", {}, "does not hold the tensors")])
def test_resume_refuses_a_checkpoint_of_something_else(name, value, complaint, trained, options, tmp_path):
    checkpoint = read(trained)[2]
    torch.save({**checkpoint, name: value}, tmp_path / "last.pt")
    with pytest.raises(SystemExit, match=complaint):
        train(*options, "--output-dir", tmp_path, "--resume")


# ---- what cannot work ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("option, complaint", [
    (("--batch-size", 0), "--batch-size 0"), (("--amp", "fp16"), "fp16 needs a GPU"),
    (("--n-support", 17), "keep 17 of 16 patches"),
    *((("--epsilon", value), "--epsilon must be positive, and at least 1e-6") for value in (0, 1e-9)),
    (("--prompt-dropout", 1.1), "--prompt-dropout must lie in"),
    (("--prompt-dropout", -0.1), "--prompt-dropout must be"),
    (("--shots", 5), "has 4 images, fewer than the 5 shots .*--shots 4 is the most .*--shots 0 takes all"),
    (("--shots", -1), "--shots must be a finite number and not negative"),
    (("--held-out", 0.5), "--held-out is for class folders alone, but .* has train and test"),
    (("--held-out", 1), "--held-out must lie between 0 and 1, got 1.0"),
    (("--shots", 0, "--test-split", "val"), "there are no validation pictures: all are trained on"),
    (("--template", "word " * 80 + "{}"), "does not fit with the template"),
    *(((f"--{name}", 0), f"--{name} must be at least 1, got 0") for name in
      ("epochs", "n-global", "n-local", "n-support", "n-iters", "text-chunk"))])
def test_options_that_cannot_work_end_in_one_line_and_leave_nothing(options, tmp_path, option, complaint):
    with pytest.raises(SystemExit, match=complaint):
        train(*options, *option, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_data_is_one_error_with_the_tree_expected(tmp_path):
    with pytest.raises(SystemExit) as stop:
        train("--dataset", "eurosat", "--data-root", tmp_path)
    assert all(text in str(stop.value) for text in (str(tmp_path / "eurosat"), "split_zhou_EuroSAT.json", "2750"))


@pytest.mark.parametrize("option, value", [("--n-global", 1), ("--n-local", 1), ("--n-support", 1), ("--n-iters", 1),
                                           ("--shots", 1), ("--text-chunk", 1), ("--prompt-dropout", 1),
                                           ("--batch-size", 1)])
def test_the_least_that_can_work_works(options, tmp_path, option, value):
    train(*options, "--epochs", 1, option, value, "--output-dir", tmp_path / "run")
    assert math.isfinite(read(tmp_path / "run")[1][0]["loss"])


def test_fewer_images_than_processes_are_refused():
    args = script.parse_args(["--batch-size", "3", "--device", "cpu"])
    configuration.check_args(args, 3)
    with pytest.raises(ValueError, match="--batch-size 3 leaves some of the 4 processes without images"):
        configuration.check_args(args, 4)


def test_a_loss_that_is_no_number_stops_the_run(options, tmp_path):
    # the one step of an epoch leads to prompts whose cosines are no numbers, though its own loss is one
    with pytest.raises(SystemExit, match="epoch 1: plan_entropy nan, .*: try a smaller --lr"):
        train(*options, "--lr", 1e30, "--batch-size", 9, "--output-dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_bfloat16_stays_near_float32_and_is_used(trained, options, tmp_path):
    train(*options, "--amp", "bf16", "--output-dir", tmp_path / "run")
    half, full = read(tmp_path / "run")[1][0]["loss"], read(trained)[1][0]["loss"]
    assert half == pytest.approx(full, rel=0.05) and half != pytest.approx(full, rel=1e-6)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def half(temporary):
        temporary.write_text("aft")
        assert path.read_text() == "before"
        raise Stop

    with pytest.raises(Stop):
        machine.write_whole(path, half)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]
    machine.write_whole(path, lambda temporary: temporary.write_text("after"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "after")]
