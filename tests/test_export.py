"""A run's text features in a NumPy file: the lines of docs/export.md give the run's global logits with them."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import evaluate
import methods
from conftest import PROJECT, copy, random_clip
from harness import export
from methods.linear_probe import LinearProbe


@pytest.fixture
def texts(trained, tmp_path, capsys):
    path = tmp_path / "texts.npz"
    evaluate.main(evaluate.parse_args([str(trained), "--export", str(path), "--device", "cpu"]))
    assert capsys.readouterr().out.startswith(f"wrote {path}: class_names (3,), global_text (3, 4, 32), local_text (3, 4")
    return path


def test_the_lines_of_the_page_give_the_global_logits(texts, trained, clip_file, pictures, monkeypatch, capsys):
    monkeypatch.chdir(texts.parent)
    shutil.copy(pictures / "test/sea/0.png", "a.jpg")    # what is inside counts, not the suffix
    code, = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL)
    said = {}
    # our clip stands for OpenAI's: the same calls, the same features
    exec(code.replace('"ViT-B/16"', repr(str(clip_file))), said)
    run = evaluate.load_run(trained)
    with Image.open("a.jpg") as image, torch.no_grad():
        expected, _ = run(clip.preprocess(32)(image)[None])
    torch.testing.assert_close(said["logits"], expected)
    assert capsys.readouterr().out.strip() == run.class_names[expected.argmax()]


def test_the_file_says_what_it_holds(texts, trained):
    run, file = evaluate.load_run(trained), np.load(texts)             # no pickle is in it
    global_text, local_text = run.encode_prompts()
    assert file["class_names"].tolist() == run.class_names and str(file["clip"]) == "random.pt"
    for name, expected in (("global_text", global_text), ("local_text", local_text),
                           ("local_projection", run.local_projection), ("scale", run.scale)):
        assert np.array_equal(file[name], expected.detach().numpy()), name


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_exported_or_refused(name):
    torch.manual_seed(0)
    with torch.no_grad():
        model = methods.METHODS[name](random_clip(), ["red_clay", "sea"]).eval()
        if not model.frozen_tower or model.encode_prompts() is None:
            with pytest.raises(ValueError, match="cannot be exported: its (texts|image tower)"):
                export.text_arrays(model)
            return
        arrays = export.text_arrays(model)
        texts = {name: array for name, array in arrays.items() if name.endswith("_text")}
        assert [*texts] == [f"{name}_text" for name in model.text_names]
        for text in texts.values():
            assert text.shape[0] == 2 and text.shape[2] == 32
            np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, atol=1e-5)


def test_a_probe_has_no_texts():
    with pytest.raises(ValueError, match="LinearProbe cannot be exported"):
        export.text_arrays(LinearProbe(random_clip(), ["a", "b"], torch.zeros(2, 32), torch.zeros(2)))


@pytest.mark.parametrize("options, complaint", [
    (["a", "--export", "b.txt"], "--export must end in .npz, got b.txt"),
    (["a", "b", "--export", "c.npz"], "go with exactly one RUN"),
    (["a", "--export", "c.npz", "--csv", "d.csv"], "there is no use for"), (["--export", "c.npz"], "at least one RUN")])
def test_export_is_for_one_run(options, complaint, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(options)
    assert complaint in capsys.readouterr().err


def test_a_run_on_another_system_is_exported_under_its_files_name(trained, clip_file, tmp_path):
    from conftest import read
    config = {**read(trained)[2]["config"], "model": "C:\\models\\mine.pt"}
    run = copy(trained, tmp_path / "run", config=config)
    export.export(run, tmp_path / "texts.npz", model_file=clip_file)
    assert str(np.load(tmp_path / "texts.npz")["clip"]) == "mine.pt"
