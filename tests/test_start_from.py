"""--start-from: a run begins with what another one has learned. PLOT++'s second stage needs it."""

import shutil

import pytest
import torch

import clip
import train as script
from conftest import copy, read, train

PLOTPP = ("--method", "plotpp", "--words", "a photo of", "this is my", "--n-image-prompts", 2)
TESTED = "test/sea/0.png"           # one of the pictures of the test


@pytest.fixture(scope="module")
def plotpp_options(options):
    """The options of the run in conftest.py that PLOT++ has."""
    place = options.index("--n-support")
    return [*options[:place], *options[place + 2:], *PLOTPP, "--epochs", 2]


@pytest.fixture(scope="module")
def stages(plotpp_options, tmp_path_factory):
    """The folders of a run of each stage."""
    folder = tmp_path_factory.mktemp("stages")
    train(*plotpp_options, "--stage", 1, "--output-dir", folder / "1")
    train(*plotpp_options, "--start-from", folder / "1", "--output-dir", folder / "2")
    return folder / "1", folder / "2"


def learned(folder):
    return read(folder)[2]["learned"]


def test_a_run_begins_with_what_the_other_has_learned(trained, options, tmp_path):
    # with a rate of 0 it ends so too
    train(*options, "--lr", 0, "--epochs", 1, "--seed", 2, "--start-from", trained, "--output-dir", tmp_path)
    torch.testing.assert_close(learned(tmp_path), learned(trained), atol=0, rtol=0)
    result, log, checkpoint = read(tmp_path)
    assert result["config"]["start_from"] == str(trained) and len(log) == checkpoint["epoch"] == 1
    torch.testing.assert_close(result["accuracy"], read(trained)[0]["accuracy"])


def test_optimizer_and_schedule_begin_anew(trained, options, tmp_path):
    # the first step of a run from this run: momentum is its gradient alone, the rate is in its warm-up
    train(*options, "--batch-size", 9, "--epochs", 1, "--start-from", trained, "--output-dir", tmp_path)
    before, after, checkpoint = learned(trained), learned(tmp_path), read(tmp_path)[2]
    rate = read(tmp_path)[1][0]["lr"]
    momentum = checkpoint["optimizer"]["state"][0]["momentum_buffer"]
    torch.testing.assert_close(after["global_prompts"], before["global_prompts"] - rate * momentum)


def test_stage_1_learns_image_prompts_and_stage_2_goes_on_with_both(stages, clip_file):
    first, second = map(learned, stages)
    model, _ = clip.load(str(clip_file))
    words = model.token_embedding.weight[clip.tokenize(["a photo of", "this is my"])[:, 1:4]]
    assert torch.equal(first["text_prompts"], words)
    assert all((second[name] - first[name]).abs().max() > 0 for name in ("text_prompts", "image_prompts"))


def test_stage_2_resumes_bit_for_bit_when_stage_1_is_gone(stages, plotpp_options, tmp_path, monkeypatch):
    other, finish = copy(stages[0], tmp_path / "other"), script.finish_epoch
    options = [*plotpp_options, "--start-from", other, "--output-dir", tmp_path / "run"]

    def stop(run, epoch, fields):
        finish(run, epoch, fields)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finish_epoch", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        train(*options)
    monkeypatch.setattr(script, "finish_epoch", finish)
    shutil.rmtree(other)
    train(*options, "--resume")
    torch.testing.assert_close(learned(tmp_path / "run"), learned(stages[1]), atol=0, rtol=0)


@pytest.mark.parametrize("changes, complaint", [
    (dict(class_names=["red clay", "sea", "steel"]), "trained for other classes: label 2 of 3 was 'steel'"),
    (dict(clip_sha256="0" * 64), "trained with other CLIP weights"),
    (dict(learned={}), "does not hold the tensors that the configuration asks for"),
    (dict(training=["train/sea/0.png", TESTED]), f"on 1 of the 7 pictures of this test, such as {TESTED}")])
def test_a_run_that_does_not_fit_is_refused(changes, complaint, trained, options, tmp_path):
    other = copy(trained, tmp_path / "other", **changes)
    with pytest.raises(SystemExit, match=complaint):
        train(*options, "--start-from", other, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run/last.pt").exists()


def test_tensors_of_another_shape_are_named_with_both_shapes(trained, options, tmp_path):
    with pytest.raises(SystemExit, match=r"global_prompts': \(4, 4, 128\).*global_prompts': \(3, 4, 128\)"):
        train(*options, "--n-global", 3, "--start-from", trained, "--output-dir", tmp_path / "run")


def test_another_method_and_a_missing_run_are_refused_at_once(trained, options, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "set_up", None)
    options = [*options[:options.index("--n-support")], "--method", "coop", "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match=f"--start-from {trained}: its method is sotglp, not coop"):
        train(*options, "--start-from", trained)
    with pytest.raises(SystemExit, match="there is no folder"):
        train(*options, "--start-from", tmp_path / "nothing")
    # and where --resume has nothing to go on with
    with pytest.raises(SystemExit, match="its method is sotglp"):
        train(*options, "--start-from", trained, "--resume")


def test_the_pictures_of_the_other_run_count_in_no_later_test(trained, options, tmp_path, monkeypatch):
    other = copy(trained, tmp_path / "other", training=["train/sea/0.png", "elsewhere.png"])
    run, finish = tmp_path / "run", script.finish_epoch

    def stop(*arguments):
        finish(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finish_epoch", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        train(*options, "--epochs", 2, "--start-from", other, "--output-dir", run)
    monkeypatch.setattr(script, "finish_epoch", finish)
    own = read(trained)[2]["training"]
    assert read_training(run) == {*own, "train/sea/0.png", "elsewhere.png"}
    train("--resume", run)
    assert read_training(run) == {*own, "train/sea/0.png", "elsewhere.png"}


def read_training(folder):
    return {*torch.load(folder / "last.pt", weights_only=True)["training"]}
