"""Folders as people really have them: parts by any name, what systems leave behind, names in other spellings."""

import unicodedata

import pytest
from PIL import Image

import data
from harness import predict
from sources import folders, listing


def touch(root, *paths):
    """Empty files of these names, whose folders are made."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def part(root, name, classes=("cat", "dog"), count=2):
    touch(root, *(f"{name}/{label}/{i}.jpg" for label in classes for i in range(count)))


# ---- parts ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("train, val, test", [
    ("train", "valid", "test"), ("Training", "Validation", "Testing"), ("TRAIN", None, "evaluation"),
    ("train", "dev", "eval"), ("seg_train", None, "seg_test"), ("pets-train", "pets-val", "pets-test"),
    ("training_set", None, "test_set"), ("trainset", None, "testset"), ("train2017", "val2017", None),
    ("my data.train", "my data.valid", None)])
def test_parts_are_known_by_the_names_that_people_use(train, val, test, tmp_path):
    for name, count in ((train, 3), (val, 2), (test, 1)):
        if name:
            part(tmp_path, name, count=count)
    items, others, tested, class_names = data.load("folder", tmp_path, 0, 1)
    assert class_names == ["cat", "dog"] and {path.split("/")[-3] for path, *_ in items} == {train}
    assert {path.split("/")[-3] for path, *_ in tested} == {test or val}
    # three pictures of each class are trained on; val/ is the test where there is no other
    assert (len(items), len(others), len(tested)) == (6, 4 if val and test else 0, 2 if test else 4)
    said = " ".join(folders.remarks(str(tmp_path)))
    assert f"read as train: {tmp_path}/{train}, " in said and f": {tmp_path}/{test or val}" in said


def test_a_part_may_hold_a_folder_of_its_own_name(tmp_path):
    part(tmp_path, "seg_train/seg_train")
    part(tmp_path, "seg_test/seg_test")
    train, _, test, class_names = data.load("folder", tmp_path, 0, 1)
    assert class_names == ["cat", "dog"] and len(train) == len(test) == 4


@pytest.mark.parametrize("beside", ["bird/1.jpg", "bird/2021/1.jpg", "seg_pred/seg_pred/1.jpg", "holdout/cat/1.jpg"])
def test_pictures_beside_a_part_are_refused_with_both_names(beside, tmp_path):
    part(tmp_path, "train")
    part(tmp_path, "valid")
    touch(tmp_path, "labels/1.txt", "docs/deep/readme.md", beside)       # folders without pictures do not matter
    with pytest.raises(ValueError, match=f"has pictures in {beside.split('/')[0]} beside the part train"):
        data.load("folder", tmp_path, 0, 1)


@pytest.mark.parametrize("names, message", [
    (("val", "test"), "has test and val, but no folder to train on"),
    (("train", "Training", "test"), "has two folders for one part, (train and Training|Training and train)"),
    (("train", "photos"), "has train, which looks like a part with the classes cat, dog, beside photos")])
def test_parts_that_say_nothing_clear_are_refused(names, message, tmp_path):
    for name in names:
        part(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        data.load("folder", tmp_path, 0, 1)


def test_parts_in_the_class_folders_are_refused(tmp_path):
    touch(tmp_path, *(f"{name}/{part}/1.jpg" for name in ("cat", "dog") for part in ("Train", "test")))
    with pytest.raises(ValueError, match="has the parts in the class folders: put (Train/cat in place of cat/Train|"
                                         "test/cat in place of cat/test), and so on"):
        data.load("folder", tmp_path, 0, 1)
    touch(tmp_path, "bird/1.jpg", "bird/2.jpg")          # a class without them: then they are folders like others
    assert data.load("folder", tmp_path, 0, 1)[3] == ["bird", "cat", "dog"]


def test_a_root_one_level_too_high_is_told_so(tmp_path):
    part(tmp_path / "export", "train")
    part(tmp_path / "export", "valid")
    with pytest.raises(ValueError, match="one class folder, 'export', .* one level too high"):
        data.load("folder", tmp_path, 0, 1)


def test_flat_parts_are_no_classes(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("train", "test") for i in range(3)))
    with pytest.raises(ValueError, match="train is flat: 3 pictures and no class folder"):
        data.load("folder", tmp_path, 0, 1)


@pytest.mark.parametrize("paths", [
    ("bus/{}.jpg", "train/{}.jpg"),                                       # pictures of its own
    ("bus/2021/{}.jpg", "train/2021/{}.jpg"),                             # a single folder
    ("bus/a/{}.jpg", "bus/b/{}.jpg", "car/a/{}.jpg", "car/b/{}.jpg", "train/a/{}.jpg", "train/b/{}.jpg"),
    ("train_station/{}.jpg", "test_tube/{}.jpg"), ("steam train/{}.jpg", "contest/{}.jpg")])
def test_what_is_really_a_class_stays_one(paths, tmp_path):
    touch(tmp_path, *(path.format(i) for path in paths for i in range(2)))
    assert data.load("folder", tmp_path, 0, 1)[3] == sorted({path.split("/")[0].replace("_", " ") for path in paths})


def test_classnames_txt_says_what_is_a_class(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("bus", "train", "test") for i in range(2)))
    with pytest.raises(ValueError, match="has pictures in bus beside the part train.*; if train is a class, classn"):
        data.load("folder", tmp_path, 0, 1)
    (tmp_path / "classnames.txt").write_text("bus\ntrain\ntest exam\n")
    assert data.load("folder", tmp_path, 0, 1)[3] == ["bus", "exam", "train"]


def test_years_in_class_folders_are_no_parts(tmp_path):
    touch(tmp_path, *(f"{name}/{year}/{i}.jpg" for name in ("cat", "dog") for year in (2021, 2022) for i in (1, 2)))
    train, _, test, class_names = data.load("folder", tmp_path, 0, 1)
    assert class_names == ["cat", "dog"] and (len(train), len(test)) == (4, 4)


# ---- systems -------------------------------------------------------------------------------------------------

LEFT_BEHIND = ("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/a.jpg", "@Recycle/a.jpg", ".@__thumb/a.jpg",
               "$RECYCLE.BIN/S-1-5/a.jpg", "System Volume Information/a.jpg", "RECYCLER/a.jpg", "FOUND.000/a.jpg",
               "lost+found/a.jpg", "LOST.DIR/a.jpg", ".Trash-1000/files/a.jpg", ".thumbnails/a.jpg", "__MACOSX/a.jpg",
               ".Spotlight-V100/a.jpg", "Network Trash Folder/a.jpg", "iPod Photo Cache/a.jpg", "__pycache__/a.jpg",
               "My Previews.lrdata/a.jpg", "Photos.photoslibrary/a.jpg", "._a.jpg", "AlbumArtSmall.jpg", "Thumbs.db",
               "desktop.ini", ".picasaoriginals/a.jpg", "cache/a.jpg")


@pytest.mark.parametrize("path", LEFT_BEHIND)
def test_what_systems_leave_behind_is_no_picture_and_no_class(path, tmp_path):
    root = tmp_path / "photos"
    part(root, ".")
    expected = data.load("folder", root, 0, 1)
    touch(root, path, f"cat/{path}", f"dog/deep/{path}")
    assert data.load("folder", root, 0, 1) == expected
    name = path.split("/")[0]
    line, = folders.remarks(str(root))
    assert line == f"left out: of systems and programs: 3 {name!r}, first {root}/{name}"
    found, notes = predict.find([str(root)])
    assert len(found) == 4 and notes == [f"{root}: {line.replace(': ', ' ', 1)}"]


def test_the_root_may_be_a_disk_of_its_own(tmp_path):
    for name in ("train", "test"):
        part(tmp_path, name)
    touch(tmp_path, "System Volume Information/a.jpg", "$RECYCLE.BIN/a.jpg", ".fseventsd/a")
    (tmp_path / "lost+found").mkdir(mode=0)                               # nobody but root may look into it
    assert data.load("folder", tmp_path, 0, 1)[3] == ["cat", "dog"]


def test_a_folder_may_be_a_path(tmp_path):
    touch(tmp_path, "a/1.jpg")
    assert listing.walk(tmp_path).pictures == listing.walk(str(tmp_path)).pictures == [f"{tmp_path}/a/1.jpg"]


# ---- names ---------------------------------------------------------------------------------------------------

def test_both_spellings_give_the_same_names_in_the_same_order(tmp_path):
    # "é" sorts behind "z"; written as e and an accent it would come before
    texts = {}
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, name) for name in ("café", "cafz", "Zoë")]
        part(tmp_path / form, "train", names)
        part(tmp_path / form, "test", [unicodedata.normalize("NFC", name) for name in names])
        train, _, test, texts[form] = data.load("folder", tmp_path / form, 0, 1)
        assert [label for _, label, _ in train] == [label for _, label, _ in test] == [0, 0, 1, 1, 2, 2]
    assert texts["NFC"] == texts["NFD"] == ["Zoë", "cafz", unicodedata.normalize("NFC", "café")]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classnames_txt_may_be_written_in_either_spelling(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    part(tmp_path, ".", [unicodedata.normalize(form, "Fläche"), "b"])
    lines = unicodedata.normalize(other, "Fläche\tgebänderte Fläche\nb\n")
    (tmp_path / "classnames.txt").write_text(lines, encoding="utf-8")
    assert data.load("folder", tmp_path, 0, 1)[3] == [unicodedata.normalize("NFC", "gebänderte Fläche"), "b"]


@pytest.mark.parametrize("inside", ["", "cat/"])
def test_two_spellings_of_one_name_are_named(inside, tmp_path):
    part(tmp_path, ".")
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        touch(tmp_path, f"{inside}{name}.jpg" if inside else f"{name}/1.jpg")
    with pytest.raises(ValueError, match=r"one name in two spellings, '.*e\\u0301.*' and '.*\\xe9.*'|"
                                         r"one name in two spellings, '.*\\xe9.*' and '.*e\\u0301.*'"):
        data.load("folder", tmp_path, 0, 1)


def test_the_suffixes_are_those_that_pillow_reads_by_itself():
    Image.init()
    foreign = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC", "FITS"}   # not by itself, or not right
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    read = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in foreign}
    assert read <= {*listing.SUFFIXES} and {*listing.SUFFIXES} <= known | {".mpo"}
