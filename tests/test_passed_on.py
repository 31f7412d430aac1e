"""What commands pass on: each option reaches the function that acts on it, under its own name.

A value here is neither the default nor what a stub returns, and no two are equal. Where a run is needed, one
run serves; elsewhere the function behind the command says what it was given.
"""

import argparse
import inspect
import json

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import clip
import data
import evaluate
import ood
import sotglp
from conftest import copy, random_clip, read, train
from extras import tables
from harness import configuration, predict, run_pictures, runs
from harness import options as train_options
from methods import METHODS, OPTIONS
from methods.zero_shot import ZeroShot
from sources import reading

NAMES = ["red clay", "sea", "wood"]


class Stop(Exception):
    """Ends a command where the test has seen enough."""


def handed(monkeypatch, owner, name, call, *arguments):
    """What a call hands to a function, by the names of its parameters; the call ends there."""
    signature = inspect.signature(getattr(owner, name))

    def spy(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        raise Stop(bound.arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop) as stop:
        patch.setattr(owner, name, spy)
        call(*arguments)
    return stop.value.args[0]


def command(module, *arguments):
    module.main(module.parse_args([*map(str, arguments), "--device", "cpu"]))


# ---- train.py: from the command line to the method ---------------------------------------------------------

def other_value(option, default):
    """The words of a command line for another value than the default, and this value."""
    flag = "--" + option.replace("_", "-")
    if default is True:
        return [train_options.SWITCHES.get(option, "--no-" + flag[2:])], False
    if default is False:
        return [flag], True
    if isinstance(default, tuple):
        values = [f"{one} b" if isinstance(one, str) else one + 1 for one in default]
        return [flag, *map(str, values)], values
    if default is None:
        return ([flag, "a big cat"], "a big cat") if option == "words" else ([flag, "3"], 3)
    value = f"{default} b" if isinstance(default, str) else default + 1
    return [flag, str(value)], value


@pytest.mark.parametrize("name", METHODS)
def test_each_option_of_a_method_goes_from_the_command_line_to_its_constructor(name, monkeypatch):
    words, values = [], {}
    for option, default in OPTIONS[name].items():
        flags, values[option] = other_value(option, default)
        words += flags
    args = train_options.parse_args(["--method", name, *words, "--text-chunk", "3", "--checkpoint-text"])
    assert {option: getattr(args, option) for option in values} == values
    assert all(type(getattr(args, option)) is type(value) for option, value in values.items())

    monkeypatch.setitem(METHODS, name, lambda *given, **kwargs: (given, kwargs))
    given, kwargs = runs.make_model("a CLIP", NAMES, configuration.configuration(args), ranks=(1, 2))
    assert given == ("a CLIP", NAMES)
    assert kwargs == {**values, "text_chunk": 3, "checkpoint_text": True, "ranks": (1, 2)}


# ---- train.py: seeds, template, and the draws of each epoch ------------------------------------------------

TEMPLATE = "the {} on a hill"


@pytest.fixture(scope="module")
def seeded(options, tmp_path_factory):
    """Two epochs that learn nothing, with prompts that differ, so that each draw shows in the losses."""
    folder, init = tmp_path_factory.mktemp("seeded") / "run", sotglp.SOTGLP.__init__

    def unlike(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.global_prompts.data.normal_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sotglp.SOTGLP, "__init__", unlike)
        train(*options, "--lr", 0, "--epochs", 2, "--seed", 5, "--split-seed", 3, "--template", TEMPLATE,
              "--prompt-dropout", 0.5, "--output-dir", folder)
    return folder


def test_split_seed_draws_the_shots(seeded, pictures):
    items, *_ = data.load("folder", str(pictures), 3, 3)
    assert read(seeded)[2]["training"] == [str(path).removeprefix(f"{pictures}/") for path, *_ in items]
    assert items != data.load("folder", str(pictures), 3, 5)[0]


@torch.no_grad()
def test_every_draw_of_an_epoch_is_the_one_of_its_seed(seeded, pictures):
    # the order of the images, their crops and the prompts that they keep, in both epochs
    model = evaluate.load_run(seeded)
    items, *_ = data.load("folder", str(pictures), 3, 3)
    crops = data.Pictures(items, data.train_transform(clip.preprocess(32)), 5, as_people_see=True)
    for epoch, entry in enumerate(read(seeded)[1]):
        generator = torch.Generator().manual_seed(5 * 100_003 + epoch)
        sums = torch.zeros(2)
        for batch in data.Batches(9, 4, 5, epochs=[epoch]):
            pictures_of_step = [crops[index] for index in batch]
            images = torch.stack([image for image, _ in pictures_of_step])
            labels = torch.tensor([label for _, label in pictures_of_step])
            kept = sotglp.draw_prompts(len(batch), 4, 0.5, generator)          # two of four
            outputs = model(images, kept)
            sums += torch.stack([cross_entropy(logits, labels, reduction="sum") for logits in outputs])
        assert [entry["global_loss"], entry["local_loss"]] == pytest.approx((sums / 9).tolist(), rel=1e-4)
    first, second = read(seeded)[1]
    assert first["global_loss"] != pytest.approx(second["global_loss"], rel=1e-3)


@torch.no_grad()
def right_of_zero_shot(run, pictures, template):
    """How many test pictures zero-shot CLIP names rightly, counted one by one."""
    model = ZeroShot(evaluate.load_run(run).clip, NAMES, template).eval()
    paths = [(path, label) for label, name in enumerate(NAMES)
             for path in sorted((pictures / "test" / name.replace(" ", "_")).iterdir())]
    images = torch.stack([clip.preprocess(32)(data.read_image(str(path))) for path, _ in paths])
    return int((model(images)[0].argmax(dim=1) == torch.tensor([label for _, label in paths])).sum())


def test_the_template_is_asked_in_training_and_evaluation(seeded, pictures, tmp_path):
    own, usual = (right_of_zero_shot(seeded, pictures, text) for text in (TEMPLATE, "a photo of a {}."))
    assert own != usual
    run = copy(seeded, tmp_path / "run")
    command(evaluate, run)
    for file in ("result.json", "evaluation.json"):
        result = json.loads((run / file).read_text())
        assert result["zero_shot_accuracy"] == pytest.approx(100 * own / 7)


# ---- train.py: what goes on --------------------------------------------------------------------------------

def test_the_time_before_an_interruption_counts(trained, tmp_path):
    run = copy(trained, tmp_path / "run", seconds=1000.0)
    (run / "result.json").unlink()
    train("--resume", run)
    assert 1000 < read(run)[0]["seconds"] < 1100


def test_a_run_does_not_go_on_with_pictures_of_other_labels(trained, tmp_path):
    training = read(trained)[2]["data"]["training"]
    relabelled = {**read(trained)[2]["data"], "training": [training[0], "0" * 64]}
    run = copy(trained, tmp_path / "run", data=relabelled)
    with pytest.raises(SystemExit, match="was started with other training pictures .9 then, 9 now, of other"):
        train("--resume", run)
    items = [("a.png", 0, "sea"), ("b.png", 1, "wood")]
    names = [(path, 1 - label, name) for path, label, name in items]
    labels = [("b.png", 0, "sea"), ("a.png", 1, "wood")]
    digests = [run_pictures.digest(some, "/data") for some in (items, names, labels)]
    assert [count for count, _ in digests] == [2, 2, 2] and len({digest for _, digest in digests}) == 3


def test_the_pictures_of_a_run_are_drawn_again_as_it_drew_them(tmp_path, monkeypatch):
    config = {"dataset": "folder", "data_root": str(tmp_path), "shots": 7, "seed": 5, "split_seed": 3,
              "sampler": "up-to", "held_out": 0.2, "classes": "base"}
    own = {"name": "folder", "root": str(tmp_path), "shots": 7, "seed": 3, "sampler": "up-to",
           "held_out": 0.2}
    found = handed(monkeypatch, data, "load", run_pictures.load_pictures, config)
    assert found == {**own, "classes": "base"}
    found = handed(monkeypatch, data, "load", run_pictures.load_pictures, config, "/moved", "new")
    assert found == {**own, "root": "/moved", "classes": "new"}
    checkpoint = {"config": config}
    found = handed(monkeypatch, data, "load", run_pictures.asked_pictures, "RUN", checkpoint, "/moved",
                   "test", "dtd", None)
    assert (found["name"], found["root"], found["shots"], found["seed"]) == ("dtd", "/moved", 0, 3)


@pytest.mark.parametrize("split, shown", [("val", "b"), ("test", "c")])
def test_the_split_that_is_asked_for_is_tested_without_training_pictures(split, shown, monkeypatch, capsys):
    # the run was trained on "a"; it lies among the pictures of both splits now
    lists = [[(name, 0, "sea") for name in names] for names in ("a", "ab", "ca")]
    monkeypatch.setattr(data, "load", lambda *_: (*lists, ["sea"]))
    checkpoint = {"config": {"dataset": "critters", "data_root": "", "shots": 1, "split_seed": 1,
                             "sampler": "exact", "held_out": None, "classes": "all", "epochs": 4},
                  "class_names": ["sea"], "training": ["a"], "epoch": 4}
    items, class_names = run_pictures.unseen_pictures("RUN", checkpoint, split=split)
    assert [path for path, *_ in items] == [shown] and class_names == ["sea"]
    printed = capsys.readouterr().out
    assert f"trained on 1 of the 2 {split} pictures of today" in printed and "is not finished" not in printed
    run_pictures.unseen_pictures("RUN", {**checkpoint, "epoch": 3}, split=split)
    assert "RUN is not finished: it stands at epoch 3 of 4" in capsys.readouterr().out


# ---- evaluate.py -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, changed", [
    (("--split", "val"), dict(split="val")), (("--on", "imagenet_v2"), dict(on="imagenet_v2")),
    (("--classes", "new"), dict(classes="new"))])
def test_evaluate_hands_on_what_it_was_asked(more, changed, monkeypatch):
    monkeypatch.setattr(evaluate, "read_alike", lambda folders: ["a checkpoint" for _ in folders])
    words = ("RUN", "--data-root", "/moved", "--workers", 3, "--csv", "all.csv", "--amp", "bf16",
             "--model", "other.pt", *more)
    found = handed(monkeypatch, evaluate, "evaluate_run", command, evaluate, *words)
    assert found == {"folder": "RUN", "checkpoint": "a checkpoint", "device": "cpu", "data_root": "/moved",
                     "workers": 3, "csv_file": "all.csv", "amp": "bf16", "model_file": "other.pt",
                     "split": "test", "on": None, "classes": None, **changed}


def test_evaluate_hands_on_what_own_pictures_need(monkeypatch):
    words = ("RUN", "--images", "a.png", "b.png", "--csv", "all.csv", "--workers", 3, "--model", "other.pt")
    found = handed(monkeypatch, evaluate, "load_run", command, evaluate, *words)
    assert found == {"run": "RUN", "device": "cpu", "model": "other.pt"}
    monkeypatch.setattr(evaluate, "load_run", lambda *_: "a model")
    found = handed(monkeypatch, evaluate, "name_files", command, evaluate, *words)
    assert found == {"model": "a model", "arguments": ["a.png", "b.png"], "csv_file": "all.csv",
                     "batch_size": data.TEST_BATCH, "workers": 3}


def test_zero_shot_hands_on_what_it_was_asked(monkeypatch):
    words = ("--zero-shot", "--dataset", "dtd", "--data-root", "/moved", "--model", "ViT-L/14",
             "--amp", "bf16", "--template", TEMPLATE, "--workers", 3, "--activation", "gelu")
    found = handed(monkeypatch, data, "load", command, evaluate, *words)
    assert (found["name"], found["root"], found["shots"]) == ("dtd", "/moved", 0)
    monkeypatch.setattr(data, "load", lambda *_, **__: ([], [], ["items"], NAMES))
    found = handed(monkeypatch, clip, "load", command, evaluate, *words)
    assert list(found.values()) == ["ViT-L/14", "cpu", "gelu"]
    monkeypatch.setattr(clip, "load", lambda *_: (random_clip(), None))
    found = handed(monkeypatch, evaluate, "test", command, evaluate, *words)
    assert {name: found[name] for name in ("items", "dataset", "amp", "workers", "template")} == {
        "items": ["items"], "dataset": "dtd", "amp": "bf16", "workers": 3, "template": TEMPLATE}
    assert found["model"].template == TEMPLATE


@pytest.mark.parametrize("split, on, amp, template, dataset", [
    ("val", None, None, TEMPLATE, "folder"), ("test", "critters", "off", None, "critters")])
def test_an_evaluation_does_what_it_was_asked_and_says_so(split, on, amp, template, dataset, tmp_path,
                                                          monkeypatch):
    # label 1 with probability .75 is right, with .6 it is wrong: errors .25 and .6 of two bins, mean .425
    items = [(f"{tmp_path}/data/a.png", 1, "sea"), (f"{tmp_path}/data/b.png", 0, "red clay")]
    said = [predict.Prediction([(1, p), (0, 1 - p)], {"fused": p}) for p in (0.75, 0.6)]
    asked = {}

    def test(*args, template, predictions):
        asked.update(args=args, template=template)
        predictions += said
        return evaluate.Counts({"fused": torch.tensor([0, 1, 0]), "zero_shot": torch.tensor([1, 1, 0])},
                               torch.tensor([1, 1, 0]))

    def build(*args):
        asked["build"] = args
        clip_model = argparse.Namespace(store_matrices=lambda dtype: asked.update(half=dtype))
        return argparse.Namespace(clip=clip_model)

    monkeypatch.setattr(run_pictures, "unseen_pictures",
                        lambda *args: asked.update(pictures=args) or (items, NAMES))
    monkeypatch.setattr(runs, "build", build)
    monkeypatch.setattr(evaluate, "test", test)
    config = {"amp": "bf16", "dataset": "folder", "template": TEMPLATE, "method": "coop", "model": "m.pt",
              "shots": 2, "seed": 4, "epochs": 9, "data_root": str(tmp_path)}
    checkpoint = {"config": config, "epoch": 7}
    root = None if on else f"{tmp_path}/data"
    result = evaluate.evaluate_run(str(tmp_path), checkpoint, "cpu", root, 3, split, tmp_path / "all.csv", on,
                                   None, amp, "other.pt")
    assert asked["pictures"] == (str(tmp_path), checkpoint, root, split, on, None)
    assert asked["build"] == (str(tmp_path), checkpoint, "cpu", NAMES, "other.pt")
    assert asked["args"][1:] == (items, dataset, amp or "bf16", 3) and asked["template"] == template
    assert asked.get("half") == (None if amp else torch.bfloat16)
    assert result.items() >= {"accuracy": 50, "zero_shot_accuracy": 100, "split": split, f"{split}_images": 2,
                              "epoch": 7, "seed": 4, "shots": 2, "method": "coop", "dataset": "folder",
                              "tested_on": dataset}.items()
    assert result["calibration_error"] == pytest.approx(42.5)
    assert result["data"] == {split: run_pictures.digest(items, root or tmp_path)}
    head, first, second = (tmp_path / "all.csv").read_text().splitlines()
    assert head.startswith("path,label,class,predicted_label,predicted,fused,class_1,probability_1,")
    assert first.split(",")[1:6] == ["1", "sea", "1", "sea", "0.750000"]
    assert second.split(",")[1:6] == ["0", "red clay", "1", "sea", "0.600000"]
    written = [path.name for path in tmp_path.glob("evaluation*.json")]
    assert written == ["evaluation-critters.json" if on else "evaluation.json"]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_test_reads_all_pictures_in_the_precision_that_it_was_asked(amp, monkeypatch):
    model = sotglp.SOTGLP(random_clip(), NAMES, n_support=5)
    features, asked, half = model.features, [], []
    batch = torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr(data, "test_batches", lambda *args: asked.append(args) or [batch])
    monkeypatch.setattr(model, "features", lambda images: half.append(torch.is_autocast_enabled("cpu")) or
                        features(images))
    predictions = []
    counts = evaluate.test(model.train(), "abcd", "critters", amp, 3, predictions=predictions)
    assert asked == [("abcd", "critters", 32, 3, torch.device("cpu"), 0, 1)] and {*half} == {amp == "bf16"}
    assert len(predictions) == 4 and counts.n_images.tolist() == [2, 1, 1] and not model.training
    monkeypatch.setattr(data, "test_batches", lambda *args: [batch] * 2)
    with pytest.raises(RuntimeError, match="tested 8 of 4 images"):
        evaluate.test(model, "abcd", "critters")


def test_one_score_that_is_no_number_is_enough(monkeypatch):
    model = sotglp.SOTGLP(random_clip(), NAMES, n_support=5)
    scores = {"fused": torch.zeros(4, 3), "local": torch.zeros(4, 3)}
    monkeypatch.setattr(model, "scores", lambda outputs: dict(scores))
    loader = [(torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    zero_shot = ZeroShot(model.clip, NAMES)
    assert evaluate.count_correct(model, loader, zero_shot).n_correct["local"].tolist() == [2, 0, 0]
    scores["local"][2, 1] = float("nan")
    with pytest.raises(ValueError, match="the local scores of some test images are not finite"):
        evaluate.count_correct(model, loader, zero_shot)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_line_of_the_csv_file_has_the_predicted_class_by_every_score(name):
    # the probability of the class that the deciding score predicts, which need not be another score's best
    small = {"sotglp": dict(n_support=5), "gallop": dict(top_k=(1, 2, 3, 4)), "proda": dict(n_context=3)}
    torch.manual_seed(1)
    model = METHODS[name](random_clip(), NAMES, **small.get(name, {}))
    for tensor in model.learned_state().values():
        tensor.add_(0.2 * torch.randn(tensor.shape))
    noise = torch.randint(256, (6, 40, 40, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    own = [Image.fromarray(pixels.numpy()) for pixels in noise]
    found = [prediction for _, prediction in predict.predictions(model.train(), own, top=2, batch_size=4)]

    images = torch.stack([clip.preprocess(32)(picture) for picture in own])
    scores = model.eval().scores(model(images))
    best = model.logits(model(images)).argmax(dim=1).tolist()
    for i, (prediction, label) in enumerate(zip(found, best, strict=True)):
        row = predict.csv_row("a.png", prediction, NAMES, label=0)
        assert (row["predicted_label"], row["predicted"], row["class"]) == (label, NAMES[label], "red clay")
        assert len(prediction.classes) == 2 and "class_3" not in row
        for score, values in scores.items():
            assert float(row[score]) == pytest.approx(values.softmax(dim=1)[i, label].item(), abs=2e-6)


# ---- ood.py, tables ----------------------------------------------------------------------------------------

def test_ood_hands_on_what_it_was_asked(monkeypatch, tmp_path):
    words = ("--zero-shot", "--dataset", "dtd", "--data-root", "/moved", "--model", "ViT-L/14",
             "--amp", "bf16", "--ood-root", "mine=/mine", "--workers", 3, "--activation", "gelu",
             "--temperature", 2, "--local-weight", 0.5, "--csv", tmp_path / "scores.csv")
    found = handed(monkeypatch, ood, "ood_sets", command, ood, *words)
    assert found == {"dataset": "dtd", "root": "/moved", "own": {"mine": "/mine"}}
    inside, outside = [("a", 0, "sea"), ("b", 1, "wood")], [("c", -1, "")]
    monkeypatch.setattr(ood, "ood_sets", lambda *_: {"mine": outside})
    monkeypatch.setattr(reading, "check_pictures", lambda *_: None)
    found = handed(monkeypatch, data, "load", command, ood, *words)
    assert (found["name"], found["root"], found["shots"]) == ("dtd", "/moved", 0)
    monkeypatch.setattr(data, "load", lambda *_, **__: ([], [], inside, NAMES))
    found = handed(monkeypatch, clip, "load", command, ood, *words)
    assert list(found.values()) == ["ViT-L/14", "cpu", "gelu"]
    monkeypatch.setattr(clip, "load", lambda *_: (random_clip(), None))
    found = handed(monkeypatch, data, "test_batches", command, ood, *words)
    assert {name: found[name] for name in ("items", "dataset", "resolution", "workers")} == {
        "items": inside, "dataset": "dtd", "resolution": 32, "workers": 3}
    monkeypatch.setattr(data, "test_batches", lambda *_: [(torch.zeros(1, 3, 32, 32), None)])
    found = handed(monkeypatch, ood, "confidences", command, ood, *words)
    assert (found["temperature"], found["local_weight"], [*found["methods"]]) == (2, 0.5, ["value", "vv"])


@pytest.mark.parametrize("rows, chosen", [
    (["mcm", "l_mcm", "gl_mcm"], "gl_mcm"), (["l_mcm"], "l_mcm"), (["mcm", "l_mcm", "gl_mcm", "own"], "own")])
def test_the_csv_file_of_ood_has_the_score_of_the_methods_last_row(rows, chosen, tmp_path, monkeypatch):
    config = {"dataset": "critters", "model": "tiny", "method": "released", "shots": 2, "data_root": "/gone"}
    sets = {"ID": [("a", 0, "sea"), ("b", 1, "wood")], "out": [("c", -1, "")]}
    names = ["zero_shot_mcm", "zero_shot_gl_mcm", *rows]
    scores = {name: {row: torch.tensor([10.0 * place + i for i in range(len(items))])
                     for place, row in enumerate(names)} for name, items in sets.items()}
    asked = {}
    monkeypatch.setattr(runs, "read_checkpoint", lambda run: {"config": config})
    monkeypatch.setattr(ood, "find_pictures", lambda args, checkpoint: (sets, NAMES))

    def build(*args, model):
        asked["model"] = model
        return argparse.Namespace(clip=random_clip())

    def score_sets(sets, dataset, methods, args):
        asked.update(dataset=dataset, temperature=args.temperature, half=torch.is_autocast_enabled("cpu"))
        return scores, {"ID": torch.tensor([2, 1]), "out": torch.tensor([0])}

    monkeypatch.setattr(runs, "build", build)
    monkeypatch.setattr(ood, "score_sets", score_sets)
    command(ood, tmp_path, "--csv", tmp_path / "scores.csv", "--amp", "bf16", "--model", "other.pt",
            "--local-weight", 0.5, "--ood-root", "out=/out")
    value = 10 * names.index(chosen)
    assert (tmp_path / "scores.csv").read_text().splitlines() == [
        "path,set,score,predicted", f"a,ID,{value}.0,wood", f"b,ID,{value + 1}.0,sea",
        f"c,out,{value}.0,red clay"]
    # the temperature is the method's own where none is given
    assert asked == {"model": "other.pt", "dataset": "critters", "temperature": 1000.0, "half": True}
    report = json.loads((tmp_path / "ood.json").read_text())
    assert report.items() >= {"temperature": 1000.0, "local_weight": 0.5, "ood_root": {"out": "/out"},
                              "precision": "bf16", "images": {"ID": 2, "out": 1}}.items()


@pytest.mark.parametrize("metric", [ood.fpr95, ood.auroc])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_score_among_good_ones_is_refused(metric, bad):
    for scores in (([0.1, bad, 0.3], [0.2]), ([0.2], [0.1, bad, 0.3])):
        with pytest.raises(ValueError, match="of 3 (ID|OOD) scores 2 are finite"):
            metric(*scores)


def test_base_to_new_hands_on_what_it_was_asked(monkeypatch, capsys):
    asked = []

    def evaluate_run(run, checkpoint, device, data_root, workers, classes, amp):
        asked.append((run, checkpoint, device, data_root, workers, classes, amp))
        new, right = classes == "new", {"A": 0, "B": 4}[run]
        return {"accuracy": 60 + 20 * new + right, "zero_shot_accuracy": 30 + 10 * new}

    monkeypatch.setattr(tables, "evaluate_run", evaluate_run)
    monkeypatch.setattr(tables, "read_alike", lambda folders: [f"checkpoint of {run}" for run in folders])
    command(tables, "--base-to-new", "A", "B", "--data-root", "/moved", "--workers", 3, "--amp", "bf16")
    assert {call[-2] for call in asked} == {"new", None} and len(asked) == 4
    assert {call[:-2] + call[-1:] for call in asked} == {
        (run, f"checkpoint of {run}", "cpu", "/moved", 3, "bf16") for run in ("A", "B")}
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # 2 * 60 * 80 / 140 = 68.57, 2 * 30 * 40 / 70 = 34.29; 64 and 84: 72.65; of the means 62 and 82: 70.61
    assert lines[0] == "A: accuracy base 60.00 new 80.00 harmonic mean 68.57"
    assert lines[1] == "A: zero_shot_accuracy base 30.00 new 40.00 harmonic mean 34.29"
    assert lines[4] == "accuracy base 62.00 +- 2.83 new 82.00 +- 2.83 harmonic mean 70.61 +- 2.88 over 2 runs"
