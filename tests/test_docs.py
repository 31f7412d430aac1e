"""PAPER.md and README.md name what exists: functions, tests, options, files."""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch

import clip
import methods
from conftest import PROJECT, read, train
from extras import visualize
from harness import runs

CELL = r"`([\w.]+)`"
ROWS = re.findall(r"^\| ((?:Sec\. |Figure )?[\d.-]+) \| .* \| " + CELL + r" \| .* \| " + CELL + r" \|$",
                  (PROJECT / "PAPER.md").read_text(), re.MULTILINE)


def resolve(dotted):
    """The object that `module.name` or `module.Class.name` stands for; modules may be in packages."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def equations(text):
    """Every number that the Eq. n and Eq. n-m of a text cover."""
    spans = re.findall(r"Eq\. (\d+)(?:-(\d+))?", text)
    return {n for first, last in spans for n in range(int(first), int(last or first) + 1)}


def test_every_equation_has_a_row():
    numbered = [label for label, _, _ in ROWS if label[0].isdigit()]
    assert equations(" ".join(f"Eq. {label}" for label in numbered)) == set(range(1, 12))


@pytest.mark.parametrize("label, where, test", ROWS, ids=[f"{r[0]} {r[1]}" for r in ROWS])
def test_row_names_a_function_that_carries_its_number_and_a_test(label, where, test):
    docstring = resolve(where).__doc__
    assert equations(f"Eq. {label}") <= equations(docstring) if label[0].isdigit() else label in docstring
    assert callable(resolve(test))


# ---- commands and code of the pages --------------------------------------------------------------------------

PAGES = ["README.md", "PAPER.md", "clip/README.md", *sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun)\b[^\n`|]*?(?:-m (?P<module>(?:extras|sources|methods)\.\w+)|(?P<file>[\w/]+\.py))"
                     r"(?P<words>[^\n`]*)")


def commands(page):
    """The commands of a page: (script, its words)."""
    for found in COMMAND.finditer((PROJECT / page).read_text()):
        script = found["file"] or found["module"].replace(".", "/") + ".py"
        yield script, shlex.split(found["words"].rstrip(".,;:"), comments=True)


@functools.cache
def options_of(script, method):
    """The options that a command's --help shows, of train.py those of a method."""
    argv = [script, *(("--method", method) if method else ()), "--help"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
    assert stop.value.code == 0
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist_with_their_options(page):
    for script, words in commands(page):
        assert (PROJECT / script).exists(), f"{page} calls {script}"
        method = words[words.index("--method") + 1] if script == "train.py" and "--method" in words else None
        method = None if method in ("NAME", "mean") else method   # one of yours: the shared options
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options_of(script, method), f"{page}: {script} {' '.join(words)}"


def test_the_readme_has_commands_of_each_kind():
    scripts = {script for script, _ in commands("README.md")}
    assert scripts >= {"train.py", "evaluate.py", "data.py", "ood.py", "extras/compare.py", "extras/visualize.py",
                       "extras/explore.py", "extras/tables.py"}


def test_the_ten_lines_of_the_readme_print_what_they_say(capsys):
    code, = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert len([line for line in code.splitlines() if line]) <= 11
    assert code.rstrip().endswith("# " + capsys.readouterr().out.rstrip())


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", (PROJECT / page).read_text()):
            path = (PROJECT / page).parent / target if target else PROJECT / page
            assert path.exists(), f"{page} links to {target}"
            if anchor and path.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
                assert anchor[1:] in slugs, f"{page} links to {target}{anchor}"


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "ood.py", "extras/visualize.py", "data.py",
                                    "harness/runs.py", "sotglp.py", "clip/__init__.py"])
def test_the_wait_of_threads_is_bounded_before_torch_is_imported(script):
    # torch reads the variable once, when it is imported; clip/__init__.py sets it
    body = [ast.unparse(node) for node in ast.parse((PROJECT / script).read_text()).body]
    bounded = next(i for i, line in enumerate(body) if line == "import clip" or "GOMP_SPINCOUNT" in line)
    assert bounded < min(i for i, line in enumerate(body) if line.startswith(("import torch", "from torch", "from .")))


@pytest.mark.parametrize("given, expected", [({}, "3000"), ({"GOMP_SPINCOUNT": "5"}, "5"),
                                             ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_what_the_user_says_of_waiting_stays(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(clip)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_readme_names_files_that_exist():
    named = set(re.findall(r"`((?:clip|tests)?/?[\w/]+\.(?:py|md|gz))`", (PROJECT / "README.md").read_text()))
    missing = [name for name in named if not (PROJECT / name).exists()]
    assert named and not missing


def test_ones_own_method_runs_as_it_is_pasted(options, tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", (PROJECT / "docs/own_method.md").read_text(), re.DOTALL)[1]
    pasted = {"__name__": "mean"}
    exec(snippet, pasted)
    monkeypatch.setitem(methods.METHODS, "mean", pasted["MeanOfKept"])
    monkeypatch.setitem(methods.OPTIONS, "mean", methods.constructor_options(pasted["MeanOfKept"]))
    at = options.index("--n-iters")
    train(*options[:at], *options[at + 2:], "--method", "mean", "--epochs", 1, "--output-dir", tmp_path / "run")
    result, log, _ = read(tmp_path / "run")
    assert result["config"]["n_support"] == 5 and "epsilon" not in result["config"]
    assert "overlap" in log[0] and not {"plan_entropy", "row_error"} & {*log[0]}   # it has no plan
    model = runs.load_run(tmp_path / "run")
    seen = visualize.look(model, torch.randn(1, 3, 32, 32), model.encode_prompts())
    assert len(seen.support) == 5 and seen.plan is None


def test_the_code_for_own_pictures_runs_as_it_is_pasted(trained, pictures, capsys):
    page = (PROJECT / "docs/own_pictures.md").read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(pictures / "test/sea/0.png", name)
    exec(code.replace("runs/folder-photos-8shot-cache-features-seed1", str(trained)), {})
    printed = capsys.readouterr().out
    assert printed.startswith("a.jpg [(") and "tensor([" in printed
