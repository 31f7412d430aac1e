"""Numbers and words in the figures: what is written, where it stands, and whose numbers they are.

test_visualize.py looks at colours and places; here each text that is drawn is caught with its place.
"""

import pytest
import torch
from PIL import Image, ImageDraw

import data
from conftest import random_clip
from extras import panels, visualize
from harness import runs
from sotglp import SOTGLP, sparse_transport

GREY = Image.new("RGB", (32, 32), (128, 128, 128))


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn from here on, in their order: [(x, y, text), ...]."""
    found, text = [], ImageDraw.ImageDraw.text

    def spy(self, xy, words, *args, **kwargs):
        found.append((*xy, words))
        return text(self, xy, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return found


def words(drawn):
    return [text for *_, text in drawn]


def paragraph(drawn):
    """All of them as one text, whose lines are no longer broken."""
    return " ".join(" ".join(words(drawn)).split())


@pytest.fixture(scope="module")
def model():
    """Settings that are no defaults, and prompts that differ; its three classes have other prompts each."""
    torch.manual_seed(1)
    names = ["sea", "red_clay", "wood"]
    model = SOTGLP(random_clip(), names, n_local=3, n_support=5, epsilon=0.02, n_iters=2)
    for tensor in model.learned_state().values():
        tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


def picture():
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))


def texts_of(model):
    with torch.no_grad():
        return model.encode_prompts()


# ---- scales, bars, axes

@pytest.mark.parametrize("low, high, digits, numbers", [
    (-1, 3, 2, ["-1.00", "0.00", "1.00", "2.00", "3.00"]), (0, 4, 0, ["0", "1", "2", "3", "4"]),
    (0.1, 0.3, 2, ["0.10", "0.15", "0.20", "0.25", "0.30"])])
def test_a_scale_has_five_numbers_from_low_to_high(low, high, digits, numbers, drawn):
    panels.scale_bar(panels.HEAT, low, high, width=461, digits=digits)
    # the strip lies at x = 30 to 431, so that its quarters are 100 pixels wide
    assert [(x, text) for x, _, text in drawn] == [*zip((30, 130, 230, 330, 430), numbers)]


@pytest.mark.parametrize("share, percent", [(0.375, "37.5%"), (0.999, "99.9%"), (0.0004, "0.0%")])
def test_a_bar_is_as_long_as_its_percentage(share, percent, drawn):
    panel = panels.bar(share)
    row = [panel.getpixel((x, 8)) for x in range(panels.WIDE - 70)]
    assert words(drawn) == [percent]
    assert row.count(panels.INK) == pytest.approx(share * (448 - 70), abs=1)
    assert set(row[row.count(panels.INK):]) <= {(230, 230, 234)}


def test_a_chart_has_the_numbers_of_its_ticks_and_epochs(drawn):
    panels.chart({("A", (200, 0, 0)): [(1, 1.0), (6, 3.5)], ("B", (0, 0, 200)): [(2, 0.5)]})
    # 0 to 4 from y = 440 up to 20, in a panel of twice the size; epochs 0, half, and the last of all curves
    height = [440, 335, 230, 125, 20]
    assert [(y, text) for _, y, text in drawn[:5]] == [*zip(height, "01234")]
    right = 2 * 448 - 24
    below = [(x, text) for x, _, text in drawn[5:8]]
    assert below == [(124, "0"), ((124 + right) / 2, "epoch"), (right, "6")]
    assert words(drawn[8:]) == ["A", "B"]


def test_curves_name_each_run_with_its_own_epochs(drawn):
    line = {"loss": 1.0, "lr": 0.1, "train_accuracy": 90.0}
    panels.curves({"one": [{"epoch": 1, **line}, {"epoch": 2, **line}], "two": [{"epoch": 5, **line}] * 3})
    written = words(drawn)
    assert "A: one, 2 epochs" in written and "B: two, 3 epochs" in written
    assert {"loss", "lr", "train accuracy"} <= {*written} and written.count("epoch") == 3


# ---- the plan

def test_sums_of_rows_and_of_columns_of_a_plan_that_is_not_square(drawn):
    # In 24ths: the rows have 12, 8 and 4, the columns 18 and 6; in the uniform plan each of 6 cells has 4.
    plan = torch.tensor([[9, 3], [7, 1], [2, 2]]) / 24
    panels.plan_table(plan)
    numbers = words(drawn)
    assert numbers[:6] == ["2.25", "0.75", "1.75", "0.25", "0.50", "0.50"]
    places = {text: (x, y) for x, y, text in drawn}
    rows, columns = {"0.500": 1, "0.333": 2, "0.167": 3}, {"0.750": 1, "0.250": 2}
    assert all(places[total][1] == places[f"patch {row}"][1] for total, row in rows.items())
    assert all(places[total][0] == places[f"prompt {column}"][0] for total, column in columns.items())
    assert places["0.500"][1] < places["0.333"][1] < places["0.167"][1]
    assert places["0.750"][0] < places["0.250"][0]
    assert numbers[-5:] == ["0", "1", "2", "3", "4"]                               # of the scale


def test_shades_of_a_plan_that_is_not_square_are_in_units_of_the_uniform_plan():
    # 3 x 2 cells, the uniform plan has 1/6 in each: 1/3 is twice that, the middle of the scale, 2/3 its end
    panel = panels.plan_table(torch.tensor([[2, 0], [4, 0], [0, 0]]) / 6)
    white, middle, end = (tuple(colour.tolist()) for colour in panels.SHADE)
    # cells begin at x = 74 and 231, y = 26, 156 and 287
    shades = [[panel.getpixel((x, y)) for x in (84, 241)] for y in (36, 166, 297)]
    assert shades == [[middle, white], [end, white], [white, white]]


# ---- figure 2

def test_the_plan_is_that_of_the_runs_own_settings(model):
    texts = texts_of(model)
    for label in (None, 1):
        seen = visualize.look(model, picture()[None], texts, label)
        patches = model.encode_images(picture()[None])[1][0]
        similarity = patches @ texts[1][seen.label].T                      # (P, L)
        kept, plan, patch_ids = (part[0, 0] for part in sparse_transport(similarity[None, None], 5, 0.02, 2))
        order = kept.mean(dim=1).argsort(descending=True)
        assert torch.equal(seen.support, patch_ids[order])
        torch.testing.assert_close(seen.plan, plan[order])
        usual = sparse_transport(similarity[None, None], 5)[1][0, 0]
        assert not torch.allclose(seen.plan, usual[order], atol=1e-3)


def test_figure_2_names_its_class_and_counts_what_it_shows(model, drawn):
    texts = texts_of(model)
    seen = visualize.look(model, picture()[None], texts, 2)
    predicted = int(next(iter(seen.probabilities.values())).argmax())
    truth = next(label for label in (0, 1) if label != predicted)
    visualize.figure_2(model, texts, picture(), "a.png", truth, label=2)
    written = paragraph(drawn)
    assert 'a.png, with the prompts of "wood"' in written
    assert "the 5 best patches" in written and "1 / 15 (Eq. 9)" in written         # 5 patches, 3 prompts
    assert f"true: {model.class_names[truth]}" in written
    assert f"predicted: {model.class_names[predicted]}" in written
    bounds = f"{seen.similarity.min():.2f}", f"{seen.similarity.max():.2f}"
    heat = [text for text in words(drawn) if text in bounds]
    assert heat[0] == bounds[0] and heat[-1] == bounds[1]
    probabilities = [f"{values[label]:.1%}"
                     for values in seen.probabilities.values() for label in (truth, predicted)]
    assert {*probabilities} <= {*words(drawn)}
    assert words(drawn).count("5") == 1                                    # the last frame of the support


def test_streams_name_their_class_and_the_runs_own_stream(model, drawn):
    visualize.streams(model, texts_of(model), picture(), "a.png", label=1)
    written = paragraph(drawn)
    assert 'a.png, with the prompts of "red_clay"' in written
    assert written.count("the run's own: ") == 1 and "the run's own: V-V patch tokens (Eq. 2)" in written


@pytest.mark.parametrize("n_patches, framed", [(1, 1), (4, 3)])
def test_fewer_than_three_patches_are_all_framed(n_patches, framed, drawn):
    panels.prompt_maps(GREY, torch.rand(n_patches, 2), (0, 1), 160)
    numbers = [str(i + 1) for i in range(framed)]
    assert words(drawn) == [*numbers, "local prompt 1", *numbers, "local prompt 2"]


def test_numbers_of_frames_lie_in_their_patches(drawn):
    panels.heat_map(GREY, torch.rand(16), (0, 1), 400, framed=[6, 0, 11])   # 4 x 4 patches of 100 pixels
    assert drawn == [(206, 104, "1"), (6, 4, "2"), (306, 204, "3")]


def test_prompts_are_nearly_alike_from_the_pair_on_that_is():
    # cosines .96, .94 and .5 of prompts 1 and 2, 1 and 3, 2 and 3: only the first is above .95
    cosines = torch.tensor([[1, 0.96, 0.94], [0.96, 1, 0.5], [0.94, 0.5, 1]])
    assert visualize.told_of_prompts(cosines).endswith("prompts 1 and 2 (0.96)")
    assert visualize.told_of_prompts(cosines.clamp(max=0.95)) == visualize.told_of_prompts(None) == ""


# ---- the script hands on what it was asked for

def draw(*options):
    visualize.main(visualize.parse_args([*map(str, options), "--device", "cpu"]))


def spy_on(monkeypatch, name):
    """The arguments of a drawing function behind the model and the texts, which draws nothing now."""
    calls = []
    monkeypatch.setattr(visualize, name, lambda *args: calls.append(args[2:]) or Image.new("RGB", (9, 9)))
    return calls


def test_a_picture_comes_with_its_true_class_and_the_class_that_is_asked_for(trained, tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, "figure_2")
    draw(trained, "--count", 3, "--class", "wood", "--output", tmp_path)
    # 7 test pictures of classes 0 0 0 1 1 2 2: numbers 0, 2 and 4
    names = ["test/red_clay/0.png", "test/red_clay/2.png", "test/sea/1.png"]
    assert [name[-len(end):] for (_, name, *_), end in zip(calls, names)] == names
    assert [(truth, label) for *_, truth, label in calls] == [(0, 2), (0, 2), (1, 2)]


def test_own_pictures_have_no_true_class_and_all_are_drawn(trained, pictures, tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, "streams")
    own = [pictures / f"test/wood/{i}.png" for i in (1, 0)]
    draw(trained, "--streams", "--count", 1, "--images", *own, "--n-iters", 7, "--output", tmp_path)
    assert [(name, *rest) for _, name, *rest in calls] == [
        (f"{path}, n_iters 7 in place of 2", None, None) for path in own]


def test_a_split_is_the_one_that_is_asked_for(trained, tmp_path, monkeypatch):
    calls = spy_on(monkeypatch, "figure_2")
    draw(trained, "--split", "train", "--count", 9, "--output", tmp_path)
    config = runs.read_checkpoint(trained)["config"]
    train, *_ = data.load("folder", config["data_root"], 3, 1)
    assert [(name, truth) for _, name, truth, _ in calls] == [(path, label) for path, label, _ in train]


def test_the_training_batch_has_the_seed_and_the_size_of_the_run(trained, monkeypatch):
    config = {**runs.read_checkpoint(trained)["config"], "seed": 7, "batch_size": 5}
    train, *_ = data.load("folder", config["data_root"], 3, 1)
    made, seen = {}, []
    for name in ("Pictures", "Batches"):
        original = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *args, name=name, original=original:
                            made.setdefault(name, args) and original(*args))
    monkeypatch.setattr(visualize, "picture_of", lambda image: seen.append(image) or GREY)
    visualize.training_batch("run", config, train)
    assert made["Pictures"][2:] == (7, True) and made["Batches"] == (9, 5, 7) and len(seen) == 5


@pytest.mark.parametrize("name, least", [("n_support", 1), ("n_iters", 1), ("epsilon", 1e-6)])
def test_the_least_setting_that_can_work_is_taken(name, least, model):
    before = getattr(model, name)
    settings = {"n_support": None, "epsilon": None, "n_iters": None, name: least}
    assert visualize.look_otherwise(model, settings) == {name: least} and getattr(model, name) == least
    setattr(model, name, before)


def test_one_bad_number_in_a_log_is_enough(tmp_path):
    lines = ['{"epoch": %d, "loss": 3.0, "seconds": 1.0}\n' % epoch for epoch in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    assert len(visualize.read_curves(tmp_path)) == 3
    lines[1] = lines[1].replace("3.0", "Infinity")
    (tmp_path / "log.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        visualize.read_curves(tmp_path)
