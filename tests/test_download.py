"""Downloading and checking, against a server on this machine and torchvision datasets that are made up."""

import hashlib
import http.server
import itertools
import os
import sys
import threading
from pathlib import Path

import pytest
import torchvision
from PIL import Image

import data
from clip import download
from sources import critters, files

CONTENT = b'{"train": [], "val": [], "test": []}'
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/good/* is the file, /short/* breaks off half-way, /other/* is another file, anything else is not there."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        body = {"good": CONTENT, "short": CONTENT, "other": CONTENT[::-1]}.get(kind)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[:len(CONTENT) // 2 if kind == "short" else None])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True          # no answer keeps the tests waiting


@pytest.fixture(scope="module")
def httpd():
    with Server(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join(10)


@pytest.fixture
def asked(httpd):
    """The paths that this test has asked the server for."""
    httpd.asked = []
    return httpd.asked


@pytest.fixture
def server(httpd, asked):
    return f"http://127.0.0.1:{httpd.server_port}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """What is on this machine is asked for directly, whatever proxy the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# What may move when the files are rearranged stands here once.

def fetch(addresses, path, digest):
    download.fetch(addresses, str(path), digest, files.LIST_LIMIT)


def tree(name, root):
    return files.tree(name, data.DATASETS[name], root)


def change(monkeypatch, name, **columns):
    """Replaces columns of a dataset's row."""
    monkeypatch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(**columns))


def main(monkeypatch, *args):
    """The command, in this process -> its exit status."""
    with pytest.raises(SystemExit) as status:
        data.main(data.parse_args([*map(str, args)]))
    return status.value.code


def run(monkeypatch, capsys, *args):
    """The command, in this process -> exit status, what it printed."""
    return main(monkeypatch, *args), capsys.readouterr().out


numbers = itertools.count()


def folder_tree(root, classes=("cat", "dog"), count=4):
    """Pictures of which no two are the same."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            number = next(numbers)
            Image.new("RGB", (20, 20), (number % 16 * 16, number // 16 % 16 * 16, number // 256 * 16)).save(
                root / name / f"{i}.jpg")
    return root


# ---- one file ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("digest", [SHA256, BLOB])
def test_a_complete_file_is_kept(server, tmp_path, digest):
    path = tmp_path / "new/split.json"
    fetch([f"{server}/good/split.json"], path, digest)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["split.json"]


@pytest.mark.parametrize("kind, message", [("short", "only 18 of 36 bytes came"), ("other", f"expected {SHA256}"),
                                           ("none", "HTTP Error 404")])
def test_anything_else_leaves_no_file_and_is_explained(server, tmp_path, kind, message):
    address, path = f"{server}/{kind}/split.json", tmp_path / "split.json"
    with pytest.raises(OSError) as error:
        fetch([address], path, SHA256)
    assert f"cannot download {address} to {path}: " in str(error.value) and message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_next_address_is_tried(server, asked, tmp_path):
    addresses = [f"{server}/{kind}/split.json" for kind in ("none", "short", "other", "good")]
    fetch([*addresses, f"{server}/good/again"], tmp_path / "split.json", SHA256)
    assert (tmp_path / "split.json").read_bytes() == CONTENT
    assert asked == [f"/{kind}/split.json" for kind in ("none", "short", "other", "good")]     # and none after it


def test_a_closed_port_is_explained(tmp_path):
    with pytest.raises(OSError, match="http://127.0.0.1:1/split.json to .*split.json: URLError"):
        fetch(["http://127.0.0.1:1/split.json"], tmp_path / "split.json", SHA256)


def test_a_download_does_not_wait_for_ever(tmp_path, monkeypatch):
    def answer(address, timeout=None):
        asked.append(timeout)
        raise TimeoutError("nothing came")

    asked = []
    monkeypatch.setattr(download, "urlopen", answer)
    with pytest.raises(OSError, match="TimeoutError: nothing came"):
        fetch(["http://127.0.0.1/split.json"], tmp_path / "split.json", SHA256)
    assert asked == [60]


def test_the_addresses_have_a_fixed_content():
    github = "https://raw.githubusercontent.com"
    assert files.SPLITS == (
        f"{github}/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a/splits",
        f"{github}/MarcLafon/gallop/f75999e1601cc66e44bc6ff6faa8612021055ff3/gallop/datasets/files")
    assert files.CLASSNAMES == (f"{github}/ChongQingNoSubway/Prompt-OT/f042f02394f9f38c7d4e4ff2dca2a6f27bb2ae59",)
    assert files.CLASSNAMES_DIGEST == "89e0b642c6697a3a43a06a2bb65f9fefb3ca295ccc5f4ba9ce385f1a3a58c629"


# ---- where things lie ----------------------------------------------------------------------------------------

def test_the_first_layout_that_is_there_is_taken(tmp_path):
    row = data.DATASETS["dtd"]
    coop = (f"{tmp_path}/dtd", f"{tmp_path}/dtd/images")
    assert files.locate(row, tmp_path) == coop                              # none is there
    (tmp_path / "dtd/dtd/images").mkdir(parents=True)
    assert files.locate(row, tmp_path) == (f"{tmp_path}/dtd", f"{tmp_path}/dtd/dtd/images")
    (tmp_path / "dtd/images").mkdir()
    assert files.locate(row, tmp_path) == coop                              # both are


def test_a_root_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for root in ("~/here", "here", "./x/../here"):
        assert files.locate(data.DATASETS["eurosat"], root)[1] == f"{tmp_path}/here/eurosat/2750"


@pytest.mark.parametrize("name, lines", [
    ("dtd", """expected:
  /root/dtd/split_zhou_DescribableTextures.json
  /root/dtd/images/<class>/*.jpg
or:
  /root/dtd/split_zhou_DescribableTextures.json
  /root/dtd/dtd/images/<class>/*.jpg
to get it: python data.py --dataset dtd --data-root /root --download"""),
    ("imagenet", f"""expected:
  /root/imagenet/classnames.txt
  /root/imagenet/images/{{train,val}}/<wnid>/*.JPEG
or:
  /root/imagenet/classnames.txt
  /root/imagenet/{{train,val}}/<wnid>/*.JPEG
the pictures: {files.BY_HAND["imagenet"]}
the list: python data.py --dataset imagenet --data-root /root --download"""),
    ("folder", "expected:\n  /root/{train,val,test}/<class>/*.jpg (val or test may be absent)   or only <class>/*.jpg   "
               "(remove the folder of a class without pictures)"),
])
def test_the_tree_that_is_expected(name, lines):
    assert tree(name, "/root") == lines


# ---- a whole dataset ----------------------------------------------------------------------------------------

SPLIT = b'{"train": [["a/0.jpg", 0, "a"]], "val": [], "test": [["a/1.jpg", 0, "a"]]}'


@pytest.fixture
def made_up(server, monkeypatch):
    """EuroSAT with two pictures, which torchvision 'downloads'; its split file comes from the server."""
    class EuroSAT:
        def __init__(self, root, download):
            assert download
            folder_tree(Path(root) / "eurosat/2750", ["a"], 2)

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", EuroSAT)
    monkeypatch.setattr(files, "SPLITS", (f"{server}/good",))
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", SPLIT)
    change(monkeypatch, "eurosat", digest=hashlib.sha256(SPLIT).hexdigest(), classes=1, sizes=(1, 0, 1))


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


def test_a_disk_that_is_full_while_torchvision_works_shows_the_tree(made_up, tmp_path, monkeypatch, capsys):
    def fail(root, download):
        raise OSError("no space left")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", fail)
    status, _ = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert "pictures: no space left\nexpected:" in status


def test_lists_go_where_torchvision_puts_the_pictures(server, tmp_path, monkeypatch, capsys):
    class Flowers102:
        def __init__(self, root, download):
            folder_tree(Path(root) / "flowers-102", ["jpg"], 2)
            raise ModuleNotFoundError("no scipy")              # it reads the labels with it, when all is there

    content = b'{"train": [["0.jpg", 0, "a"]], "val": [], "test": [["1.jpg", 0, "a"]]}'
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", content)
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Flowers102)
    monkeypatch.setattr(files, "SPLITS", (f"{server}/good",))
    change(monkeypatch, "oxford_flowers", digest=hashlib.sha256(content).hexdigest(), classes=1, sizes=(1, 0, 1))
    status, out = run(monkeypatch, capsys, "--dataset", "oxford_flowers", "--data-root", tmp_path, "--download")
    assert status == 0 and f"oxford_flowers: torchvision downloads the pictures into {tmp_path}\n" in out
    assert (tmp_path / "flowers-102/split_zhou_OxfordFlowers.json").read_bytes() == content


def test_aircraft_brings_its_own_lists(server, asked, tmp_path, monkeypatch, capsys):
    class FGVCAircraft:
        def __init__(self, root, download):
            home = Path(root) / "fgvc-aircraft-2013b/data"
            folder_tree(home, ["images"], 3)
            (home / "variants.txt").write_text("A/B\n")
            for i, part in enumerate(("train", "val", "test")):
                (home / f"images_variant_{part}.txt").write_text(f"{i} A/B\n")

    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", FGVCAircraft)
    change(monkeypatch, "fgvc_aircraft", classes=1, sizes=(1, 1, 1))
    status, out = run(monkeypatch, capsys, "--dataset", "fgvc_aircraft", "--data-root", tmp_path, "--download")
    assert status == 0 and asked == [] and out.count("is there already") == 4


def test_another_digest_stops_the_download(made_up, tmp_path, monkeypatch, capsys):
    change(monkeypatch, "eurosat", digest=SHA256)
    status, _ = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert "cannot download" in status and f"expected {SHA256}" in status


@pytest.mark.parametrize("name", list(files.BY_HAND))
def test_what_cannot_be_downloaded_says_where_it_is(server, asked, tmp_path, monkeypatch, capsys, name):
    names = "imagenet" in name                                 # it has class names, the others have a split file
    monkeypatch.setattr(files, "SPLITS", () if names else (f"{server}/good",))
    monkeypatch.setattr(files, "CLASSNAMES", (f"{server}/good",) if names else ())
    monkeypatch.setattr(files, "CLASSNAMES_DIGEST", SHA256)
    if not names:
        change(monkeypatch, name, digest=SHA256)
    status, out = run(monkeypatch, capsys, "--dataset", name, "--data-root", tmp_path, "--download")
    assert status not in (0, None) and files.BY_HAND[name] in out
    file = tmp_path / data.DATASETS[name].layouts[0][0] / data.DATASETS[name].lists[0]
    assert file.read_bytes() == CONTENT and asked == [f"/good/{file.name}"]
    assert f"{file} downloaded, digest as expected" in out and f"expected:\n  {file}" in out


def test_torchvision_has_what_we_ask_it_for():
    assert files.TORCHVISION == {
        "caltech101": "Caltech101", "oxford_pets": "OxfordIIITPet", "oxford_flowers": "Flowers102",
        "food101": "Food101", "fgvc_aircraft": "FGVCAircraft", "sun397": "SUN397", "dtd": "DTD", "eurosat": "EuroSAT"}
    assert all(hasattr(torchvision.datasets, name) for name in files.TORCHVISION.values())
    rows = {name for name, row in data.DATASETS.items() if row.lists}
    assert rows == {*files.TORCHVISION, *files.BY_HAND}


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
        change(monkeypatch, "eurosat", **{fault: other})
    status, out = run(monkeypatch, capsys, *ask, "--check")
    assert status == 1 and line.format(root=tmp_path) in out
    assert out.endswith(tree("eurosat", tmp_path) + "\n") and "all as expected" not in out


def test_the_report_of_a_check(tmp_path, monkeypatch, capsys):
    folder_tree(tmp_path / "train", ["cat"], 1)
    folder_tree(tmp_path / "train", ["dog"], 7)
    folder_tree(tmp_path / "test", ["cat", "dog"], 1)
    for i in range(6):
        (tmp_path / f"train/dog/{i}.jpg").write_text("?")
    status, out = run(monkeypatch, capsys, "--dataset", "folder", "--data-root", tmp_path, "--check")
    lines = out.splitlines()
    assert lines[:2] == [f"folder in {tmp_path}: 2 classes", "train: 8 images, 1 to 7 per class"]
    assert [line.split(": ")[0] for line in lines[2:7]] == [
        f"cannot read picture {tmp_path}/train/dog/{i}.jpg" for i in range(5)]            # the sixth is counted alone
    assert lines[7:10] == ["6 of 8 train images cannot be read", "val: 0 images", "test: 2 images, 1 to 1 per class"]
    assert lines[10] == "expected:" and status == 1


@pytest.mark.parametrize("count, shown", [(3, [3]), (100, [100]), (101, [100, 101])])
def test_a_terminal_shows_how_many_pictures_are_read(tmp_path, monkeypatch, capsys, count, shown):
    for name, n in (("a", 1), ("b", count - 1)):
        folder_tree(tmp_path / "train", [name], 1)
        folder_tree(tmp_path / "test", [name], n)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        main(monkeypatch, "--dataset", "folder", "--data-root", tmp_path, "--check")
        lines = [f"\r{i} of {n} pictures read" + "\n" * (i == n)
                 for n, parts in ((2, [2]), (count, shown)) for i in parts]
        assert capsys.readouterr().err == "".join(lines) * terminal


@pytest.mark.parametrize("args, message", [
    ((), "--dataset"), (("--dataset", "eurosat"), "one of the arguments --download --check is required"),
    (("--dataset", "eurosat", "--check", "--download"), "not allowed with"),
    (("--dataset", "mnist", "--check"), "mnist"),
])
def test_an_incomplete_question_is_refused(monkeypatch, capsys, args, message):
    assert main(monkeypatch, *args) == 2 and message in capsys.readouterr().err


def test_the_root_is_the_environments_unless_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "there"))
    folder_tree(tmp_path / "there")
    assert run(monkeypatch, capsys, "--dataset", "folder", "--check")[0] == 0
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.chdir(tmp_path)
    status, _ = run(monkeypatch, capsys, "--dataset", "folder", "--check")
    assert status.startswith(f"error: folder: there is no {tmp_path}/data\nexpected:")


def test_critters_check_themselves_and_need_no_download(monkeypatch, capsys):
    monkeypatch.setattr(critters, "POOL", {"train": 2, "val": 1, "test": 1})
    C = len(critters.CLASSES)
    change(monkeypatch, "critters", sizes=(2 * C, C, C))
    status, out = run(monkeypatch, capsys, "--dataset", "critters", "--check")
    assert status == 0 and f"{C} classes" in out
    assert run(monkeypatch, capsys, "--dataset", "critters", "--download")[0] == "error: critters needs no download"


def test_the_command_checks_a_folder(tmp_path, monkeypatch, capsys):
    folder_tree(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    status, out = run(monkeypatch, capsys, "--dataset", "folder", "--data-root", "mine", "--check")
    assert status == 0
    assert out == (f"folder in {tmp_path}/mine: 2 classes\ntrain: 4 images, 2 to 2 per class\nval: 0 images\n"
                           "test: 4 images, 2 to 2 per class\nall as expected\n")


# ---- bounds --------------------------------------------------------------------------------------------------

def test_a_list_that_is_too_large_is_cut_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIST_LIMIT", 5)
    with pytest.raises(OSError, match="good/split.json to .*split.json: OSError: more than the 5 bytes .*fetch the file on another"):
        fetch([f"{server}/good/split.json"], tmp_path / "split.json", SHA256)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_no_part(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        fetch([f"{server}/good/split.json"], tmp_path / "split.json", SHA256)
    assert os.listdir(tmp_path) == []


def test_a_failed_download_does_not_advise_itself(made_up, tmp_path, monkeypatch, capsys):
    def fail(root, download):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", fail)
    status, _ = run(monkeypatch, capsys, "--dataset", "eurosat", "--data-root", tmp_path, "--download")
    assert "--download" not in status and "pictures: <urlopen" in status
    assert "fetch the files on another machine and put them there" in status
