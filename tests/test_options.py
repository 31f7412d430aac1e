"""The options of train.py: a short help without torch, a wrong option ends in one line that says what is near."""

import shlex

import pytest

import clip
from conftest import run
from harness import options
from harness.parser import Parser
from methods import METHODS, OPTIONS


def test_the_help_of_the_paper_is_that_of_its_method():
    # torch is not needed for the help, so it has values of its own
    assert options.PAPER_OPTIONS == OPTIONS["sotglp"]
    assert options.PAPER_RECIPE == METHODS["sotglp"].recipe("critters")
    assert options.method_names() == [*METHODS]


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        options.parse_args([*arguments, "--help"], "What it does.\n\nAn example.\n\nHow it is written.")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_fits_two_screens_and_lists_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys)
    common, own = text.split("options of sotglp:")
    assert len(common.splitlines()) <= 66 and common.count("oxford_pets") == 1
    assert "An example." in common and "How it is written." not in text
    assert all(name in common for name in (*METHODS, *clip.ACTIVATIONS, *clip.available_models()))
    assert "--n-support" in own and "--n-context" not in text


@pytest.mark.parametrize("method, told, others", [
    ("coop", "a context of its own for each class", "one set of local prompts"),
    ("locoop", "classes among which the own label", "patches that"),
    ("gallop", "a number for each", "foreground")])
def test_a_method_has_the_texts_of_its_own_options(method, told, others, capsys):
    text = " ".join(help_of(capsys, "--method", method).split())
    assert told in text and others not in text


@pytest.mark.parametrize("method", [name for name in METHODS if "n_iters" in OPTIONS[name]])
def test_the_help_names_the_row_error_where_the_log_has_it(method, capsys):
    assert ("row error" in help_of(capsys, "--method", method)) == hasattr(METHODS[method], "diagnostics")


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_explained(method):
    parser = options.make_parser(method, "critters")
    texts = {action.dest: action.help for action in parser._actions}
    assert all(texts[name].strip(" (%default)s") for name in OPTIONS[method])


@pytest.mark.parametrize("arguments, complaint", [
    ("--shot 3",
     "error: sotglp has no --shot 3: did you mean --shots? --method sotglp --help lists what it has"),
    ("--learning-rate=3", "error: sotglp has no --learning-rate=3: --method sotglp --help lists what it has"),
    ("--method coop --n-contxt 4",
     "error: coop has no --n-contxt 4: did you mean --n-context? --method coop --help lists what it has"),
    ("--epochs many", "error: argument --epochs: invalid int value: 'many'"),
    ("--model ''", "error: --model is empty"),
    ("--method gallo",
     "error: no method is called 'gallo': did you mean gallop? there are " + ", ".join(METHODS))])
def test_a_wrong_option_ends_in_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse_args(shlex.split(arguments))
    assert (stop.value.code, capsys.readouterr().err) == (2, complaint + "\n")


def test_other_commands_name_what_is_near_too(capsys):
    parser = Parser("python it.py", "It.")
    parser.add_argument("--images")
    with pytest.raises(SystemExit):
        parser.parse_args(["--image", "a.png"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --image a.png; did you mean --images? --help lists what there is\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--shot", "3"]])
def test_help_and_a_wrong_option_need_no_torch(arguments, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    process = run("train.py", *arguments, PYTHONPATH=str(tmp_path))
    assert "torch was imported" not in process.stderr and process.stdout + process.stderr
    assert process.returncode == (0 if arguments == ["--help"] else 2)
