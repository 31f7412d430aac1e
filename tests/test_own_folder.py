"""The tests leave the user's runs and data alone, and the project: conftest.py notices where one does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
from conftest import PROJECT, noticed, touches


@pytest.mark.parametrize("event, arguments, expected", [
    ("open", (PROJECT / "runs/a/last.pt", "rb", os.O_RDONLY), True),
    ("open", (PROJECT / "README.md", "r", os.O_RDONLY), False),
    ("open", (PROJECT / "README.md", "w", os.O_WRONLY | os.O_CREAT), True),
    ("open", (os.fsencode(PROJECT / "tests/../runs/a"), "r", os.O_RDONLY), True),
    ("open", (str(PROJECT) + "-of-another/runs/a", "w", os.O_WRONLY), False),
    ("open", ("runs/a", "w", os.O_WRONLY), False),      # in the test's own folder
    ("open", (3, "w", os.O_WRONLY), False),
    ("open", (PROJECT / "__pycache__/data.pyc", "wb", os.O_WRONLY), False),
    ("os.scandir", (PROJECT / "data",), True), ("os.scandir", (PROJECT / "tests",), False),
    ("os.scandir", (None,), False),
    ("os.mkdir", (PROJECT / "runs", 0o777, -1), True), ("os.rename", (PROJECT / "a", "b", -1, -1), True),
    ("subprocess.Popen", ("python", ["python"], PROJECT, None), True),
    ("subprocess.Popen", ("python", ["python"], None, None), False), ("import", ("data", PROJECT), False)])
def test_what_touches_the_users_folders(event, arguments, expected):
    assert touches(event, arguments) == expected


def test_a_look_and_a_program_are_noticed():
    (PROJECT / "runs/nothing").exists()                 # why not noticed: Python has no event for it
    with pytest.raises(OSError):
        open(PROJECT / "runs/nothing/result.json")
    subprocess.run([sys.executable, "-c", ""], cwd=PROJECT, check=True)
    found = [event.split()[0] for event in noticed]
    noticed.clear()
    assert found == ["open", "subprocess.Popen"]


def test_default_folders_are_the_tests_own():
    here = Path.cwd()
    assert not here.is_relative_to(PROJECT) and not [*here.iterdir()]
    assert data.find_root("eurosat") == str(here / "data")
    assert Path(train.parse_args([]).output_dir).absolute().parent == here / "runs"
