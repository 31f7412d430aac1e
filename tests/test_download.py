"""Downloading and checking, against a server on this machine and torchvision data sets that are made up."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torchvision
from PIL import Image

import data
import download
from conftest import PROJECT

CONTENT = b'{"train": [], "val": [], "test": []}'
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/good/* is the file, /short/* breaks off half-way, /other/* is another file, anything else is not there."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        body = {"good": CONTENT, "short": CONTENT, "other": CONTENT[::-1]}.get(kind)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[:len(CONTENT) // 2 if kind == "short" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def run(monkeypatch, capsys, *args):
    """The command, in this process -> exit status, what it printed."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    with pytest.raises(SystemExit) as status:
        download.main(data.DATASETS, data.read_lists, data.read_image)
    return status.value.code, capsys.readouterr().out


def folder_tree(root, classes=("cat", "dog"), count=4):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i, i, i)).save(root / name / f"{i}.jpg")
    return root


# ---- one file ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("digest", [SHA256, BLOB])
def test_a_complete_file_is_kept(server, tmp_path, digest):
    path = tmp_path / "new/split.json"
    download.fetch([f"{server}/good/split.json"], str(path), digest)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["split.json"]


@pytest.mark.parametrize("kind, message", [("short", "IncompleteRead"), ("other", f"expected {SHA256}"),
                                           ("none", "HTTP Error 404")])
def test_anything_else_leaves_no_file_and_is_explained(server, tmp_path, kind, message):
    address, path = f"{server}/{kind}/split.json", tmp_path / "split.json"
    with pytest.raises(OSError) as error:
        download.fetch([address], str(path), SHA256)
    assert f"could not get {path} from\n  {address}: " in str(error.value) and message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_next_address_is_tried(server, tmp_path):
    addresses = [f"{server}/{kind}/split.json" for kind in ("none", "short", "other", "good")]
    download.fetch(addresses, str(tmp_path / "split.json"), SHA256)
    assert (tmp_path / "split.json").read_bytes() == CONTENT


def test_a_closed_port_is_explained(tmp_path):
    with pytest.raises(OSError, match="http://127.0.0.1:1/split.json: URLError"):
        download.fetch(["http://127.0.0.1:1/split.json"], str(tmp_path / "split.json"), SHA256)


# ---- a whole data set ----------------------------------------------------------------------------------------

SPLIT = b'{"train": [["a/0.jpg", 0, "a"]], "val": [], "test": [["a/1.jpg", 0, "a"]]}'


@pytest.fixture
def made_up(server, monkeypatch):
    """EuroSAT with two pictures, which torchvision 'downloads'; its split file comes from the server."""
    class EuroSAT:
        def __init__(self, root, download):
            assert download
            folder_tree(Path(root) / "eurosat/2750", ["a"], 2)

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", EuroSAT)
    monkeypatch.setattr(download, "SPLITS", (f"{server}/good",))
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", SPLIT)
    row = data.DATASETS["eurosat"]._replace(digest=hashlib.sha256(SPLIT).hexdigest(), classes=1, sizes=(1, 0, 1))
    monkeypatch.setitem(data.DATASETS, "eurosat", row)


def test_download_gets_pictures_and_split_file_and_checks_them(made_up, tmp_path, monkeypatch, capsys):
    status, out = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert status == 0 and "all as expected" in out and "train: 1 images, 1 to 1 per class" in out
    assert data.split_matches_published("eurosat", tmp_path) is True
    status, out = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert status == 0 and "split_zhou_EuroSAT.json is there already" in out and "torchvision" not in out


def test_a_failure_of_torchvision_shows_the_tree(made_up, tmp_path, monkeypatch, capsys):
    def fail(root, download):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", fail)
    status, _ = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert "eurosat: torchvision could not download the pictures: File not found or corrupted.\nexpected:" in status


def test_another_digest_stops_the_download(made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "eurosat", data.DATASETS["eurosat"]._replace(digest=SHA256))
    status, _ = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert "could not get" in status and f"expected {SHA256}" in status


@pytest.mark.parametrize("name", list(download.BY_HAND))
def test_what_cannot_be_downloaded_says_where_it_is(server, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(download, "SPLITS", (f"{server}/good",))
    monkeypatch.setattr(download, "CLASSNAMES", (f"{server}/good",))
    monkeypatch.setattr(download, "CLASSNAMES_DIGEST", SHA256)
    if name != "imagenet":
        monkeypatch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(digest=SHA256))
    status, out = run(monkeypatch, capsys, "--dataset", name, "--data-root", tmp_path, "--download")
    assert status not in (0, None) and download.BY_HAND[name] in out
    assert f"expected:\n  {tmp_path}/{data.DATASETS[name].layouts[0][0]}/{data.DATASETS[name].lists[0]}" in out


def test_torchvision_has_what_we_ask_it_for():
    assert all(hasattr(torchvision.datasets, name) for name in download.TORCHVISION.values())
    rows = {name for name, row in data.DATASETS.items() if row.lists}
    assert rows == {*download.TORCHVISION, *download.BY_HAND}


# ---- checking ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault, line", [
    ("missing", "1 of 1 test images missing, first: {root}/eurosat/2750/a/1.jpg"),
    ("truncated", "cannot read picture {root}/eurosat/2750/a/0.jpg: OSError"),
    ("truncated", "1 of 1 train images cannot be read"),
    ("sizes", "train: 1 images (expected 13500), 1 to 1 per class"),
    ("classes", "eurosat in {root}: 1 classes (expected 10)"),
    ("digest", "split_zhou_EuroSAT.json is not CoOp's published file"),
])
def test_check_names_what_is_wrong_and_fails(made_up, tmp_path, monkeypatch, capsys, fault, line):
    ask, a = ("--dataset", "eurosat", "--data-root", tmp_path), tmp_path / "eurosat/2750/a"
    assert run(monkeypatch, capsys, *ask, "--download")[0] == 0
    if fault == "missing":
        (a / "1.jpg").unlink()
    elif fault == "truncated":
        (a / "0.jpg").write_bytes((a / "0.jpg").read_bytes()[:-200])
    else:
        other = {"sizes": (13500, 0, 1), "classes": 10, "digest": SHA256}[fault]
        monkeypatch.setitem(data.DATASETS, "eurosat", data.DATASETS["eurosat"]._replace(**{fault: other}))
    status, out = run(monkeypatch, capsys, *ask, "--check")
    assert status == 1 and line.format(root=tmp_path) in out
    assert out.endswith(download.tree("eurosat", data.DATASETS["eurosat"], tmp_path) + "\n")


def test_critters_check_themselves_and_need_no_download(monkeypatch, capsys):
    monkeypatch.setattr(data.critters, "POOL", {"train": 2, "val": 1, "test": 1})
    C = len(data.critters.CLASSES)
    monkeypatch.setitem(data.DATASETS, "critters", data.DATASETS["critters"]._replace(sizes=(2 * C, C, C)))
    status, out = run(monkeypatch, capsys, "--dataset", "critters", "--check")
    assert status == 0 and f"{C} classes" in out
    assert run(monkeypatch, capsys, "--dataset", "critters", "--download")[0] == "error: critters needs no download"


def test_the_command_checks_a_folder(tmp_path):
    folder_tree(tmp_path / "mine")
    command = [sys.executable, PROJECT / "data.py", "--dataset", "folder", "--data-root", "mine", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"folder in {tmp_path}/mine: 2 classes\ntrain: 4 images, 2 to 2 per class\nval: 0 images\n"
                           "test: 4 images, 2 to 2 per class\nall as expected\n")
