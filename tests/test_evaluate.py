"""evaluate.py: counts, percentages and tables worked by hand; runs read again; one's own pictures; zero-shot."""

import argparse
import csv
import json
import statistics

import pytest
import torch
from PIL import Image
from torch import nn

import clip
from extras import tables
import data
import evaluate
from harness import machine, results, runs
import sotglp
from methods.zero_shot import template_features
import train as train_script
from conftest import copy, read, train


def command(*arguments):
    """evaluate.py with these arguments, in this process."""
    evaluate.main(evaluate.parse_args([*map(str, arguments)]))


# ---- accuracies by hand --------------------------------------------------------------------------------------

# Seven test images of classes 0, 1, 2 and none of class 3. Beside each: what the fused score g + l/2 takes it for.
LOGITS = [  # label, global logits, local logits
    (0, (2, 0, 0, 0), (0, 1, 0, 0)),     # global 0, local 1; 2 against 1/2: 0
    (0, (0, 1, 0, 0), (3, 0, 0, 0)),     # global 1, local 0; 1.5 against 1: 0 (lambda 1/4 would leave 1)
    (0, (1, 0, 0, 0), (0, 3, 0, 0)),     # global 0, local 1; 1 against 1.5: 1 (lambda 1/4 would leave 0)
    (0, (1, 0, 0, 0), (0, 0, 0, 3)),     # global 0, local 3; 1 against 1.5: 3
    (1, (0, 1, 0, 0), (0, 1, 0, 0)),     # all 1
    (1, (1, 0, 0, 0), (0, 4, 0, 0)),     # global 0, local 1; 1 against 2: 1
    (2, (0, 0, 1, 0), (3, 0, 0, 0))]     # global 2, local 0; 1.5 against 1: 0
ZERO_SHOT = (1, 1, 1, 3, 1, 0, 2)        # what the template takes each image for: right for one of class 1, and class 2
# right of class 0, 1, 2:  fused 2 2 0,  global 3 1 1,  local 1 2 0,  zero-shot 0 1 1;  seen 4 2 1
CORRECT, SEEN = [[2, 2, 0, 0], [3, 1, 1, 0], [1, 2, 0, 0], [0, 1, 1, 0]], [4, 2, 1, 0]


class Known(nn.Module):
    """A model whose image number i, a picture of the value i, has the logits of row i of LOGITS."""

    class_names = ["ant", "bee", "moth", "wasp"]
    clip = argparse.Namespace(logit_scale=torch.zeros([]))
    lambda_local = 0.5
    logits = sotglp.SOTGLP.logits
    scores = sotglp.SOTGLP.scores

    def features(self, images):
        return "features", images[:, 0, 0, 0].long().tolist()

    def encode_prompts(self):
        return "text features"

    def forward(self, features, drawn, text_features):
        assert (features[0], drawn, text_features) == ("features", None, "text features") and not self.training
        rows = [LOGITS[i] for i in features[1]]
        return tuple(torch.tensor([row[part] for row in rows], dtype=torch.float32) for part in (1, 2))


class KnownTemplate:
    """Zero-shot CLIP of these images: it predicts class ZERO_SHOT[i] for image number i."""

    def encode_prompts(self):
        return "template features"

    def __call__(self, features, drawn, text_features):
        assert (features[0], drawn, text_features) == ("features", None, "template features")
        return (torch.eye(4)[[ZERO_SHOT[i] for i in features[1]]],)

    def logits(self, outputs):
        return outputs[0]


@pytest.fixture
def counts():
    images = torch.arange(7.0)[:, None, None, None].expand(7, 3, 2, 2)
    labels = torch.tensor([label for label, _, _ in LOGITS])
    return evaluate.count_correct(Known(), zip(images.split(4), labels.split(4)), KnownTemplate())


def test_right_images_are_counted_by_their_true_class(counts):
    assert [right.tolist() for right in counts.n_correct.values()] == CORRECT and counts.n_images.tolist() == SEEN
    assert [*counts.n_correct] == ["fused", "global", "local", "zero_shot"]


def test_percentages_are_of_all_images(counts):
    # 4 of 7, 5 of 7, 3 of 7, 2 of 7; a mean over the classes would be another number
    assert results.percentages(counts) == pytest.approx({
        "accuracy": 400 / 7, "global_accuracy": 500 / 7, "local_accuracy": 300 / 7, "zero_shot_accuracy": 200 / 7})


def test_per_class_file_by_hand(counts, tmp_path):
    results.write_per_class(tmp_path / "per_class.csv", ["ant", "bee, wild", "moth", "wasp"], counts)
    assert (tmp_path / "per_class.csv").read_text().splitlines() == [
        "label,class,images,fused,global,local,zero_shot", "0,ant,4,50.00,75.00,25.00,0.00",
        '1,"bee, wild",2,100.00,50.00,100.00,50.00', "2,moth,1,0.00,100.00,0.00,100.00", "3,wasp,0,,,,"]


def test_confusion_by_hand(counts, tmp_path):
    # by the fused score, as LOGITS says beside each image: class 0 is taken for 0, 0, 1, 3; class 1 for 1, 1;
    # class 2 for 0
    assert counts.confusion.tolist() == [[2, 1, 0, 1], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    results.write_confusion(tmp_path / "confusion.csv", ["ant", "bee, wild", "moth", "ant"], counts.confusion)
    first, *rows = csv.reader((tmp_path / "confusion.csv").open())
    assert first == ["true class", "0 ant", "1 bee, wild", "2 moth", "3 ant"]
    assert rows[0] == ["0 ant", "2", "1", "0", "1"] and rows[3] == ["3 ant", "0", "0", "0", "0"]


def counted(run, pictures, lambda_local):
    """Images that a run gets right by each score, counted one by one."""
    model = evaluate.load_run(run)
    names = ["red clay", "sea", "wood"]
    with torch.no_grad():
        text = sotglp.unit(model.clip.encode_text(clip.tokenize([f"a photo of a {name}." for name in names])))
        right = {"accuracy": 0, "global_accuracy": 0, "local_accuracy": 0, "zero_shot_accuracy": 0}
        for label, name in enumerate(names):
            for path in sorted((pictures / "test" / name.replace(" ", "_")).iterdir()):
                with Image.open(path) as picture:
                    image = clip.preprocess(32)(picture)[None]
                g, l = model(image)
                zero_shot = model.clip.encode_image(image) @ text.T
                for score, logits in zip(right, (g + lambda_local * l, g, l, zero_shot)):
                    right[score] += int(logits.argmax() == label)
    return right


@pytest.mark.parametrize("lambda_local, seed", [(0.25, 1), (1, 2)])
def test_training_and_evaluation_report_what_is_counted_one_by_one(lambda_local, seed, options, tmp_path, pictures,
                                                                   capsys):
    run = tmp_path / "run"
    train(*options, "--lr", 0.2, "--epochs", 1, "--lambda-local", lambda_local, "--seed", seed, "--output-dir", run)
    command(run, "--device", "cpu")
    right = counted(run, pictures, lambda_local)
    assert len(set(right.values())) > 2 and max(right.values()) < 7      # else a mix-up of scores would not show
    for file in ("result.json", "evaluation.json"):
        found = json.loads((run / file).read_text())
        assert {score: found[score] for score in right} == pytest.approx({k: 100 * n / 7 for k, n in right.items()})
        assert found["test_images"] == 7
    assert (f"accuracy {100 * right['accuracy'] / 7:.2f} %  (global {100 * right['global_accuracy'] / 7:.2f}, "
            f"local {100 * right['local_accuracy'] / 7:.2f}, zero-shot {100 * right['zero_shot_accuracy'] / 7:.2f})  "
            "on 7 test images, float32") in capsys.readouterr().out.splitlines()[-1]
    assert (run / "evaluation.csv").read_text() == (run / "per_class.csv").read_text()
    with open(run / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["class"], row["images"]) for row in rows] == [
        ("0", "red clay", "3"), ("1", "sea", "2"), ("2", "wood", "2")]
    for column, n in zip(("fused", "global", "local", "zero_shot"), right.values()):
        assert sum(float(row[column]) * int(row["images"]) for row in rows) == pytest.approx(100 * n, abs=0.05)


# ---- runs ----------------------------------------------------------------------------------------------------

def test_evaluation_is_written_beside_what_training_wrote(trained, tmp_path):
    run = copy(trained, tmp_path)
    (run / "per_class.csv").write_text("as training left it")
    command(run, "--device", "cpu")
    fields = json.loads((run / "evaluation.json").read_text())
    assert {"epoch": 3, "dataset": "folder", "shots": 3, "seed": 1, "test_images": 7,
            "precision": "float32"}.items() <= fields.items()
    assert read(run)[0] == read(trained)[0] and (run / "per_class.csv").read_text() == "as training left it"


def test_a_run_is_tested_in_the_precision_that_it_was_trained_in(options, tmp_path, capsys):
    train(*options, "--amp", "bf16", "--epochs", 1, "--output-dir", tmp_path)
    command(tmp_path, "--device", "cpu")
    result, again = (json.loads((tmp_path / name).read_text()) for name in ("result.json", "evaluation.json"))
    assert result["precision"] == again["precision"] == "bf16"
    assert (tmp_path / "evaluation.csv").read_text() == (tmp_path / "per_class.csv").read_text()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "on 7 test images, bf16, " in line
    command(tmp_path, "--device", "cpu", "--amp", "off")                 # what is asked for comes first
    assert json.loads((tmp_path / "evaluation.json").read_text())["precision"] == "float32"


def test_a_precision_that_the_device_lacks_becomes_float32_and_is_said(trained, tmp_path, capsys):
    config = {**read(trained)[2]["config"], "amp": "fp16"}
    command(copy(trained, tmp_path, config=config), "--device", "cpu")
    assert "was trained in fp16, which needs a GPU; it is tested in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text())["precision"] == "float32"


def test_the_precision_is_that_of_matrix_products():
    a = torch.ones(2, 2)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        with machine.autocast(amp, "cpu"):
            assert (a @ a).dtype == dtype


def test_loaded_run_is_ready_to_use(trained):
    model = evaluate.load_run(trained)
    learned = read(trained)[2]["learned"]
    assert not model.training and model.class_names == ["red clay", "sea", "wood"]
    assert all(torch.equal(tensor, learned[name]) for name, tensor in model.learned_state().items())
    assert [logits.shape for logits in model(torch.zeros(2, 3, 32, 32))] == [(2, 3), (2, 3)]


def test_loaded_run_has_the_options_that_it_was_trained_with(options, tmp_path):
    option = ("--epsilon", 0.3, "--n-iters", 9, "--n-support", 7, "--no-vv", "--shared-local", "--no-plan-gradient")
    train(*options, *option, "--epochs", 1, "--output-dir", tmp_path)
    model = evaluate.load_run(tmp_path)
    assert (model.epsilon, model.n_iters, model.n_support) == (0.3, 9, 7)
    assert (model.stream, model.plan_gradient) == ("qk", False)
    assert model.local_prompts.shape == (4, 4, 128)


@pytest.mark.parametrize("change, complaint", [
    ({"clip_sha256": "0" * 64}, "was trained with other CLIP weights: those of .*random.pt"),
    ({"class_names": ["red clay", "lake", "wood"]}, "label 1 of 3 was 'lake', in the data it is 'sea', of 3"),
    ({"class_names": ["red clay", "sea"]}, "label 2 of 2 was None, in the data it is 'wood', of 3"),
    ({"learned": {"global_prompts": torch.zeros(4, 4, 128)}}, "does not hold the tensors that the configuration asks")])
def test_a_checkpoint_of_something_else_is_refused_by_name(change, complaint, trained, tmp_path):
    with pytest.raises(SystemExit, match=complaint):
        command(copy(trained, tmp_path, **change), "--device", "cpu")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no last.pt"):
        command(tmp_path)


@pytest.mark.parametrize("arguments, complaint", [
    ((), "name at least one RUN"), (("--dataset", "critters"), "name at least one RUN"),
    (("--images", "c.png"), "name at least one RUN"), (("a", "b", "--images", "c.png"), "exactly one RUN"),
    (("a", "b", "--csv", "c.csv"), "exactly one RUN"), (("a", "--csv", ""), "--csv is empty"),
    (("a", "--dataset", "dtd", "--template", "a {}"), "with RUN there is no use for --dataset, --template"),
    (("a", "--images", "c.png", "--split", "val", "--data-root", "d"), "no use for --split, --data-root"),
    (("a", "--zero-shot"), "with --zero-shot there is no use for RUN")])
def test_arguments_that_do_not_go_together_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args([*arguments])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_several_runs_are_averaged(options, tmp_path, capsys):
    runs = []
    for seed in (1, 2, 3):
        runs.append(tmp_path / str(seed))
        train(*options, "--lr", 0.002, "--epochs", 1, "--seed", seed, "--split-seed", seed, "--output-dir", runs[-1])
    command(*runs, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    values = [json.loads((run / "result.json").read_text()) for run in runs]
    assert len({value["accuracy"] for value in values} | {value["local_accuracy"] for value in values}) > 2
    for line, field in zip(lines[-5:-1], ("accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy")):
        numbers = [value[field] for value in values]
        assert line.split() == [field, f"{sum(numbers) / 3:.2f}", "+-", f"{statistics.stdev(numbers):.2f}",
                                "over", "3", "runs"]


def test_mean_and_spread_by_hand():
    # mean of 1, 2, 6: 3 (the median is 2); deviations -2, -1, 3: sqrt((4 + 1 + 9) / 2) = sqrt 7 = 2.6458
    assert results.mean_and_spread([1, 2, 6]) == "3.00 +- 2.65"
    assert results.mean_and_spread([1, 2, 6], 1) == "3.0 +- 2.6"
    assert results.mean_and_spread([84.214]) == "84.21" and results.mean_and_spread([]) == ""


# ---- one's own pictures --------------------------------------------------------------------------------------

def test_own_pictures_are_named(trained, pictures, capsys):
    paths = pictures / "test/sea/0.png", pictures / "test/wood/0.png"
    command(trained, "--device", "cpu", "--images", *paths)
    lines = capsys.readouterr().out.splitlines()
    model = evaluate.load_run(trained)
    for path, line in zip(paths, lines, strict=True):
        with Image.open(path) as picture, torch.no_grad():
            g, l = model(clip.preprocess(32)(picture)[None])
        likeliest = (g + 0.25 * l).softmax(1)[0].sort(descending=True)   # the fused score, of Sec. 3.5
        names = [("red clay", "sea", "wood")[i] for i in likeliest.indices.tolist()]
        assert line == f"{path}:  " + "   ".join(f"{p:.1%} {name}" for p, name in zip(likeliest.values.tolist(), names))


# ---- zero-shot -----------------------------------------------------------------------------------------------

class Painter:
    """A stand-in for CLIP: an image's feature is its mean colour, and it knows three texts, by their tokens."""

    texts = {"a centered satellite photo of deep red.": (1, 0, 0), "a centered satellite photo of green.": (0, 1, 0),
             "a centered satellite photo of blue.": (0, 0, 1)}
    logit_scale = torch.zeros([])
    context_length = 77
    visual = argparse.Namespace(resolution=16, proj=torch.eye(3))

    def encode_patches(self, images, stream):
        return images.mean(dim=(2, 3)), None

    def encode_text(self, tokens):
        known = {tuple(clip.tokenize(text)[0].tolist()): feature for text, feature in self.texts.items()}
        return torch.tensor([known[tuple(row)] for row in tokens.tolist()], dtype=torch.float32)


@pytest.fixture
def painted(tmp_path, monkeypatch):
    """EuroSAT with three classes, six test pictures of one colour each; two of them have another class's colour."""
    colours = {"deep_red": (250, 20, 10), "green": (30, 240, 10), "blue": (10, 30, 230)}
    test = [("deep_red", "deep_red"), ("deep_red", "blue"), ("green", "green"), ("green", "green"),
            ("green", "deep_red"), ("blue", "blue")]
    items = {"train": [], "val": [], "test": []}
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    for part, pairs in (("train", [(name, name) for name in colours]), ("test", test)):
        for i, (name, shown) in enumerate(pairs):
            Image.new("RGB", (20, 20), colours[shown]).save(tmp_path / f"eurosat/2750/{part}{i}.png")
            items[part].append([f"{part}{i}.png", list(colours).index(name), name])
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(items))
    monkeypatch.setattr(clip, "load", lambda name, *_: (Painter(), clip.preprocess(16)))
    return tmp_path


def test_zero_shot_asks_the_template_of_the_data_set(painted, monkeypatch, capsys):
    # right: one of two red, two of three green, the blue one: 4 of 6
    asked = ("--zero-shot", "--dataset", "eurosat", "--data-root", painted, "--device", "cpu")
    command(*asked)
    assert capsys.readouterr().out == "zero-shot ViT-B/16 on eurosat: 66.67 % of 6 test images\n"
    whole = data.DATASETS["eurosat"]._replace(sizes=(3, 0, 6))     # as if these were all that are published
    monkeypatch.setitem(data.DATASETS, "eurosat", whole)
    command(*asked)
    assert capsys.readouterr().out.endswith(" of 6 test images; published for ViT-B/16: 48.3 %\n")
    command(*asked, "--model", "ViT-B/32")
    assert "published" not in capsys.readouterr().out


def test_zero_shot_asks_the_template_that_is_given(painted, monkeypatch, capsys):
    monkeypatch.setattr(Painter, "texts", {"a deep red thing.": (1, 0, 0), "a blue thing.": (0, 1, 0),
                                           "a green thing.": (0, 0, 1)})
    # green and blue have changed places: one of two red is right, none of three green, not the blue one, 1 of 6
    command("--zero-shot", "--dataset", "eurosat", "--data-root", painted, "--template", "a {} thing.")
    assert "eurosat: 16.67 % of 6 test images" in capsys.readouterr().out


@pytest.mark.parametrize("option, complaint", [
    (("--data-root", "d"), "--data-root is not used for critters"),
    *((("--template", text), "must have one {} for the class name") for text in ("a {0}", "a bird", "{} and {}"))])
def test_an_option_that_would_do_nothing_is_refused(option, complaint):
    for script, arguments in ((evaluate, ["--zero-shot"]), (train_script, [])):
        with pytest.raises(SystemExit, match=complaint):
            script.main(script.parse_args([*arguments, *option]))


def test_zero_shot_takes_the_model_that_is_named(monkeypatch):
    asked = []

    def load(name, device, activation):
        asked.append(name)
        raise ValueError("enough")

    monkeypatch.setattr(clip, "load", load)
    for arguments in ((), ("--model", "ViT-L/14")):
        with pytest.raises(SystemExit, match="enough"):
            command("--zero-shot", *arguments)
    assert asked == ["tiny", "ViT-L/14"]


def test_zero_shot_text_is_unit_and_in_the_order_of_the_classes():
    names = ["deep_red" if i % 3 == 0 else ("green", "blue")[i % 3 - 1] for i in range(300)]    # more than one chunk
    text = template_features(Painter(), names, "a centered satellite photo of {}.")
    assert torch.equal(text, torch.eye(3).repeat(100, 1))
