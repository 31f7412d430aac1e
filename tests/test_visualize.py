"""Pictures of a run: patches lie on their pixels, and what is drawn is what the model computed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from sources import critters
import data
from harness import runs
from extras import draw_critters, looking, panels, visualize
from conftest import copy, random_clip
from methods import METHODS
from sotglp import SOTGLP

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def towers():
    return random_clip()


@pytest.fixture(scope="module")
def model():
    """Patch tokens that depend on the pixels of their patch alone: attention and positions add nothing."""
    clip_model = random_clip()
    clip_model.visual.positional_embedding.data.zero_()
    for block in clip_model.visual.transformer.resblocks:
        block.attn.out_proj.weight.data.zero_()
    return SOTGLP(clip_model, ["sea", "red_clay"], n_support=3).eval()


@pytest.fixture(scope="module")
def white_square(model):
    """A wide black picture with a white square where the centre crop has its patch in row 1, column 2, and texts.

    The crop takes columns 16 to 48 of 64; patches are 8 wide, so the square begins at 16 + 2 * 8 and 1 * 8. The first
    local prompt of class 0 is the feature of white, so that no place is named here by a patch's number.
    """
    picture = Image.new("RGB", (64, 32))
    picture.paste(WHITE, (32, 8, 40, 16))
    image, white = (clip.preprocess(32)(p) for p in (picture, Image.new("RGB", (32, 32), WHITE)))
    with torch.no_grad():
        texts = tuple(text.clone() for text in model.encode_prompts())
        texts[1][0, 0] = model.encode_images(white[None])[1][0, 0]
    return image, texts


# ---- patches on pixels

def test_the_model_sees_the_centre_of_the_picture(white_square):
    seen = np.asarray(panels.picture_of(white_square[0]))
    rows, columns = np.nonzero(seen.min(axis=2) == 255)
    assert seen.shape == (32, 32, 3) and set(seen.flatten()) == {0, 255}
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (16, 8, 24, 16)


def test_the_best_patch_of_a_prompt_is_framed_on_its_own_pixels(model, white_square):
    image, texts = white_square
    similarity = looking.patch_cosines(model, image[None], texts, 0)
    assert similarity[:, 0].max() > 0.999 > similarity[:, 0].topk(2).values[1]
    panel = panels.heat_map(panels.picture_of(image), similarity[:, 0], (-1, 1), 448, [similarity[:, 0].argmax()])
    # 448 / 32 = 14 pixels for one: (16, 8, 24, 16) becomes (224, 112, 336, 224); the map itself is never pure white
    rows, columns = np.nonzero(np.asarray(panel).min(axis=2) == 255)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (224, 112, 336, 224)


def test_the_map_is_warmest_in_the_middle_of_the_best_patch():
    values = torch.zeros(64)
    values[3 * 8 + 4] = 1
    panel = panels.heat_map(Image.new("RGB", (32, 32), (128, 128, 128)), values, (0, 1), 448)
    # the patch in row 3, column 4 of 8 has its middle at ((4 + 1/2) / 8, (3 + 1/2) / 8) of 448: (252, 196)
    warm = np.asarray(panel, dtype=int).sum(axis=2)
    around = warm[196 - 56 : 196 + 56, 252 - 56 : 252 + 56]
    assert warm[196, 252] == warm.max() > around[0, 0] + 100
    assert (around == around[::-1]).all() and (around == around[:, ::-1]).all()
    assert len(np.unique(around)) > 10                   # smooth, not one square


def test_the_three_best_patches_of_each_prompt_are_framed(monkeypatch):
    similarity, framed = torch.rand(16, 2), []
    monkeypatch.setattr(panels, "heat_map", lambda *args: framed.append(args[-1]) or Image.new("RGB", (99, 9)))
    panels.prompt_maps(None, similarity, (0, 1), 99)
    assert [patches.tolist() for patches in framed] == similarity.T.argsort(descending=True)[:, :3].tolist()


@pytest.mark.parametrize("grid, side", [(4, 448), (14, 336), (7, 224), (16, 250)])
def test_patch_boxes_tile_the_picture(grid, side):
    covered = np.zeros((side, side), dtype=int)
    for patch in range(grid * grid):
        left, top, right, bottom = panels.patch_box(patch, grid, side)
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    assert panels.patch_box(grid, grid, side)[:2] == [0, round(side / grid)]       # the second row


# ---- what is drawn is what the model computed

def test_support_and_plan_give_the_local_score(model):
    torch.manual_seed(1)
    images, (global_text, local_text) = torch.randn(1, 3, 32, 32), model.encode_prompts()
    with torch.no_grad():
        outputs = model(images, text_features=(global_text, local_text))
    for label in (0, 1):
        seen = visualize.look(model, images, (global_text, local_text), label)
        kept = seen.similarity[seen.support]
        # Eq. 10-11: s = sum_kl plan_kl similarity_kl / tau
        torch.testing.assert_close(model.scale * (seen.plan * kept).sum(), outputs[1][0, label])
        means = seen.similarity.mean(dim=1)
        assert seen.support.tolist() == means.argsort(descending=True)[:3].tolist()    # Eq. 8, the best one first
    fused = outputs[0] + 0.25 * outputs[1]
    torch.testing.assert_close(seen.probabilities["fused"], fused.softmax(dim=1)[0])
    assert visualize.look(model, images, (global_text, local_text)).label == fused.argmax()


def test_each_class_is_shown_with_its_own_prompts(model, white_square):
    image, texts = white_square
    first, second = (visualize.look(model, image[None], texts, label).similarity for label in (0, 1))
    _, patches = model.encode_images(image[None])
    torch.testing.assert_close(second, patches[0] @ texts[1][1].T)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("plan, times", [([[0.25, 0.25], [0.25, 0.25]], [[1, 1], [1, 1]]),
                                         ([[0.5, 0.0], [0.0, 0.5]], [[2, 0], [0, 2]])])
def test_shades_of_the_plan_run_from_0_to_4_times_uniform(plan, times):
    panel = panels.plan_table(torch.tensor(plan))
    # cells begin at x = 74, 231 and y = 26, 222: (448 - 74 - 60) / 2 = 157 wide, (448 - 26 - 30) / 2 = 196 high
    shades = [[panel.getpixel((x, y)) for x in (84, 241)] for y in (36, 232)]
    assert shades == [[tuple(panels.colours(t / 4, panels.SHADE)) for t in row] for row in times]


def test_long_names_and_paths_are_broken_not_cut():
    text = "/a/long/folder/" + "deeper/" * 40 + "picture.jpg, with the prompts of a class"
    panel = panels.text_panel(text, width=300, size=24)
    assert panel.height > 8 * 24 and (np.asarray(panel)[:, 299] == 255).all()
    assert panels.text_panel(text, 10**4).height == panels.text_panel("a").height


def test_colours_lie_between_their_anchors_and_end_with_the_scale():
    scale = np.array([(0, 0, 0), (100, 50, 0), (200, 50, 0)])
    shown = panels.colours(np.array([-1, 0, 0.25, 0.5, 1, 2]), scale)
    assert shown.tolist() == [[0, 0, 0], [0, 0, 0], [50, 25, 0], [100, 50, 0], [200, 50, 0], [200, 50, 0]]


@pytest.mark.parametrize("scale", [panels.HEAT, panels.SHADE[::-1]])
def test_scales_rise_in_lightness_so_that_grey_print_keeps_their_order(scale):
    grey = Image.fromarray(panels.colours(np.linspace(0, 1, 50), scale)[None]).convert("L")
    assert (np.diff(np.asarray(grey)[0].astype(int)) > 0).all()


def test_a_method_without_patches_gets_picture_and_bars(white_square):
    class Method(SimpleNamespace):
        has_plan = False

        def __call__(self, images, drawn, text_features):
            return self.answer
    scores, texts = torch.tensor([[2.0, 1.0]]), torch.rand(2, 32)
    method = Method(scores=lambda outputs: {"text": outputs}, logits=lambda outputs: outputs, answer=scores, class_names=["sea", "red_clay"],
                    cosines=lambda images, texts: (scores, None))
    seen = visualize.look(method, white_square[0][None], texts)
    assert seen.label == 0 and seen.similarity is seen.support is seen.plan is None
    few = visualize.figure_2(method, texts, white_square[0], "a.png", truth=1)
    method.cosines = lambda images, texts: (scores, torch.rand(1, 16, len(texts)))
    more = visualize.figure_2(method, texts, white_square[0], "a.png", truth=1)
    assert panels.WIDE < few.height < more.height - panels.SMALL


@pytest.mark.parametrize("method", ["gallop", "locoop", "independent", "plot", "dense"])
def test_each_method_shows_its_own_prompts_and_its_own_plan_or_none(method, towers):
    model, image = METHODS[method](towers, ["sea", "red clay"]).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        texts = model.encode_prompts()
        seen = visualize.look(model, image, texts, 1)
        _, mean = model.cosines(image, texts)
        scores = model.scores(model(image, text_features=texts))
    torch.testing.assert_close(seen.similarity.mean(dim=1), mean[0, :, 1])
    assert seen.similarity.shape == (16, 1 if method == "locoop" else 4)
    if method not in ("plot", "dense"):
        assert seen.support is seen.plan is None
    else:                                                # all patches take part, and the plan gives the score
        score = model.scale * (seen.plan * seen.similarity[seen.support]).sum()
        torch.testing.assert_close(score, scores["local"][0, 1])


def test_streams_show_the_same_prompts_on_each_stream(towers, monkeypatch):
    model, shown, prompt_maps = SOTGLP(towers, ["sea", "red clay"], n_support=3).eval(), [], panels.prompt_maps
    with torch.no_grad():
        texts = model.encode_prompts()
    image = torch.randn(3, 32, 32)
    monkeypatch.setattr(visualize, "prompt_maps", lambda *args: shown.append(args[1]) or prompt_maps(*args))
    visualize.streams(model, texts, image, "a.png", label=1)
    for model.stream, similarity in zip(("vv", "qk", "value"), shown, strict=True):
        torch.testing.assert_close(similarity, model.encode_images(image[None])[1][0] @ texts[1][1].T)


@pytest.mark.parametrize("truth, shown, names", [
    (0, 0, ["predicted and true: a"]), (None, 0, ["predicted: a"]), (1, 0, ["predicted: a", "true: b"]),
    (1, 2, ["predicted: a", "true: b", "shown: c"]), (0, 1, ["predicted and true: a", "shown: b"])])
def test_bars_show_the_predicted_class_by_every_score(truth, shown, names, monkeypatch):
    probabilities = {"fused": torch.tensor([0.5, 0.25, 0.125]), "local": torch.tensor([0.25, 0.5, 0.125])}
    written, shares = [], []
    monkeypatch.setattr(visualize, "text_panel", lambda text, *_: written.append(text) or Image.new("RGB", (9, 9)))
    monkeypatch.setattr(visualize, "bar", lambda share: shares.append(share) or Image.new("RGB", (9, 9)))
    monkeypatch.setattr(visualize, "titled", lambda panel, *_: panel)
    visualize.bars(looking.Look(probabilities, shown, None), ["a", "b", "c"], truth)
    labels = ["abc".index(name[-1]) for name in names]
    assert written == names * 2          # for each score the classes that the first score and the arguments name
    assert shares == [score[label].item() for score in probabilities.values() for label in labels]


# ---- curves

@pytest.mark.parametrize("low, high, ticks", [(0, 3.8, [0, 1, 2, 3, 4]), (0, 0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
                                              (-0.3, 0.9, [-0.5, 0, 0.5, 1]), (0, 100, [0, 20, 40, 60, 80, 100])])
def test_axes_have_round_numbers(low, high, ticks):
    assert panels.axis(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("values, first", [((0.96, 1.0), 0.96), ((2.5, 1.8), 0.0), ((-0.1, -0.102), -0.102),
                                           ((0.3, 0.3), 0.0)])
def test_the_axis_shows_a_quantity_that_hardly_moves(values, first, monkeypatch):
    seen, axis = [], panels.axis
    monkeypatch.setattr(panels, "axis", lambda low, high: seen.append(low) or axis(low, high))
    panels.chart({("A", (0, 0, 0)): [*enumerate(values, 1)]})
    assert seen == [first]


def test_prompts_that_are_nearly_alike_are_said_to_be():
    # unit vectors: 0.6 * 0.8 + 0.8 * 0.6 = 0.96 is the cosine of the last two, 0.6 and 0.8 are the others
    prompts = torch.tensor([[[1, 0], [0.6, 0.8], [0.8, 0.6]], [[0, 1.0], [0, 1], [0, 1]]])
    cosines = looking.prompt_cosines(None, (None, prompts), 0)
    torch.testing.assert_close(cosines, torch.tensor([[1, 0.6, 0.8], [0.6, 1, 0.96], [0.8, 0.96, 1]]))
    assert visualize.told_of_prompts(cosines).endswith("their maps: prompts 2 and 3 (0.96)")
    assert visualize.told_of_prompts(cosines[:2, :2]) == visualize.told_of_prompts(None) == ""
    assert visualize.told_of_prompts(looking.prompt_cosines(None, prompts, 1)).count("(1.00)") == 3
    for one in (prompts[:, :1], prompts[:, 0]):
        assert looking.prompt_cosines(None, one, 0) is None


def test_an_axis_of_zeros_has_a_length():
    assert panels.axis(0, 0)[-1] >= 1


def test_a_curve_passes_through_its_points():
    panel = panels.chart({("A", (200, 0, 0)): [(1, 1.0), (2, 1.0)], ("B", (0, 0, 200)): [(1, 3.0), (2, 4.0)]})
    # 0 to 2 epochs lie at x = 62 to 436, values 0 to 4 at y = 220 to 10: epoch 1.5 at 342, 1.0 at 167, 3.5 at 36
    assert panel.getpixel((342, 167)) == (200, 0, 0)
    assert panel.getpixel((342, 36)) == (0, 0, 200)


def test_every_number_of_every_log_has_a_chart(monkeypatch):
    old, new = [{"epoch": 1, "seconds": 2.0, "loss": 3.0}], [{"epoch": 1, "loss": 2.0, "overlap": 0.5, "lr": 0.1}]
    drawn = []
    monkeypatch.setattr(panels, "chart", lambda points: drawn.append(points) or Image.new("RGB", (9, 9)))
    panels.curves({"one": old, "two": new})
    blue, orange = zip("AB", panels.CURVES)
    assert drawn == [{blue: [(1, 3.0)], orange: [(1, 2.0)]}, {orange: [(1, 0.5)]}, {orange: [(1, 0.1)]}]


# ---- the script

def draw(*options):
    visualize.main(visualize.parse_args([*map(str, options), "--device", "cpu"]))


def test_the_script_draws_test_pictures_at_equal_distances(trained, tmp_path, capsys):
    draw(trained, "--count", 2, "--output", tmp_path)
    names = [name.removeprefix(f"wrote {tmp_path}/") for name in capsys.readouterr().out.split("\n")[:-1]]
    # 7 test pictures: numbers 0 and 3, the first of each of the first two classes
    assert names == ["figure2-1-test-red_clay-0.png", "figure2-2-test-sea-0.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    config = runs.read_checkpoint(trained)["config"]
    shown = panels.picture_of(clip.preprocess(32)(data.read_image(f"{config['data_root']}/test/sea/0.png")))
    with Image.open(tmp_path / names[1]) as drawn:
        left, top = 24, 24 + 32 + 16 + 27 + 6        # margin; title of 24, gap, title of 20, small gap
        panel = drawn.crop((left, top, left + 448, top + 448))
        assert np.array_equal(panel, shown.resize((448, 448), Image.NEAREST))


def test_the_script_draws_streams_of_own_pictures_read_as_people_see_them(trained, pictures, tmp_path, monkeypatch):
    read, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, own=False: read.append(own) or read_image(path, own))
    draw(trained, "--streams", "--images", pictures / "test/sea/1.png", "--class", "wood", "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["streams-1-test-sea-1.png"]
    assert read == [True]


def test_a_finished_run_is_looked_at_with_other_settings(trained, pictures, tmp_path, monkeypatch):
    seen, look = [], visualize.look
    monkeypatch.setattr(visualize, "look", lambda *args: seen.append(look(*args)) or seen[-1])
    picture = ("--images", pictures / "test/sea/1.png", "--output", tmp_path)
    draw(trained, *picture)
    draw(trained, *picture, "--n-support", 3, "--epsilon", 0.01, "--n-iters", 200)
    assert [look.plan.shape for look in seen] == [(5, 4), (3, 4)]
    assert seen[1].support.tolist() == seen[0].support[:3].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "figure2-1-test-sea-1.png", "figure2-n-support3-epsilon0.01-n-iters200-1-test-sea-1.png"]
    for options, complaint in ((("--epsilon", 0), "--epsilon must be at least 1e-6, got 0"),
                               (("--n-support", 17), "cannot keep 17 of 16 patches")):
        with pytest.raises(SystemExit, match=complaint):
            draw(trained, *picture, *options)


def test_settings_of_a_plan_are_refused_where_there_is_none(towers):
    for method, option in (("independent", "epsilon"), ("coop", "n_support")):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}: the method of this run has none"):
            visualize.look_otherwise(METHODS[method](towers, ["sea", "red clay"]), {option: 2})


def test_the_batch_is_what_training_sees_first(trained):
    checkpoint = runs.read_checkpoint(trained)
    config = checkpoint["config"]
    train, *_ = data.load("folder", config["data_root"], config["shots"], config["split_seed"])
    sheet = visualize.training_batch("run", config, train)
    loader = data.train_loader(data.Pictures(train, data.train_transform(clip.preprocess(32)), config["seed"]),
                               data.Batches(len(train), config["batch_size"], config["seed"]))
    images, labels = next(iter(loader))
    side, top = 160, 24 + 32 + 16                    # (1392 - 7 * 16) / 8 = 160; margin, title of 24, gap
    for i, image in enumerate(images):
        cell = sheet.crop((24 + 176 * i, top, 24 + 176 * i + side, top + side))
        assert np.array_equal(cell, panels.picture_of(image).resize((side, side), Image.NEAREST))


def test_the_script_draws_curves_of_several_runs(trained, tmp_path):
    folder = copy(trained, tmp_path / "other")
    log = [{**line, "plan_entropy": 0.9} for line in runs.read_log(folder)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    draw("--curves", trained, folder, "--output", tmp_path / "drawn")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["curves.png"]


@pytest.mark.parametrize("text", ["", "{", "3\n", '{"seconds": 1, "loss": 1}\n',
                                  '{"epoch": 1, "seconds": 1, "loss": "low"}\n',
                                  '{"epoch": 1, "seconds": 1, "loss": NaN}\n'])
def test_a_damaged_log_is_named(text, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        visualize.read_curves(tmp_path)


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path} holds no log.jsonl"):
        draw("--curves", tmp_path)


def test_an_unknown_class_is_refused_with_names_like_it(trained, tmp_path):
    with pytest.raises(SystemExit, match="--class 'red_clay' is none of the 3 classes of .*; near: 'red clay', "):
        draw(trained, "--class", "red_clay", "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_of_other_classes_is_refused(trained, tmp_path):
    with pytest.raises(SystemExit, match="trained for other classes"):
        draw(copy(trained, tmp_path, class_names=["a", "b", "c"]), "--split", "train")


@pytest.mark.parametrize("options", [["a", "b"], ["a", "--batch", "--class", "x"], ["a", "--curves", "--images", "x"],
                                     ["a", "--count", "0"], ["a", "--streams", "--batch"], []])
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(SystemExit, match="2"):
        visualize.parse_args(options)


# ---- the drawings

def test_the_sheet_shows_every_class(tmp_path):
    draw_critters.main(draw_critters.parse_args(["--output", str(tmp_path / "sheet.png")]))
    with Image.open(tmp_path / "sheet.png") as drawn:
        sheet = np.asarray(drawn.convert("RGB"), dtype=int)
    for label in range(16):
        x, y = label % 8 * 132, label // 8 * 152 + 20
        shown = np.asarray(critters.picture("train", label, 0), dtype=int)
        assert abs(sheet[y : y + 128 : 2, x : x + 128 : 2] - shown).mean() < 10        # 256 colours serve all of them


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_critters, "sheet", lambda: Image.new("RGB", (4, 4)))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: .*file"):
        draw_critters.main(draw_critters.parse_args(["--output", str(tmp_path / "file" / "sheet.png")]))


def test_the_training_batch_has_no_other_split(capsys):
    with pytest.raises(SystemExit):
        visualize.parse_args(["a", "--batch", "--split", "val"])
    assert "--images, --split and --class do not go with --batch" in capsys.readouterr().err
