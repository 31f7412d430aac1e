"""One's own pictures: their layouts, what is held out, what is left out, how odd pictures are read."""

import warnings

import numpy as np
import pytest
from PIL import Image

import data
from sources import files, folders, reading
from test_data import picture


# ---- layouts, and what is held out ---------------------------------------------------------------------------

def folder_tree(root, classes, count=5):
    for name in classes:
        for i in range(count):
            picture(root / name / f"{i}.png")


def test_a_folder_with_train_and_test(tmp_path):
    folder_tree(tmp_path / "train", ["great_white-shark", "Zebra"])
    folder_tree(tmp_path / "test", ["great_white-shark", "Zebra"], 2)
    (tmp_path / "test/Zebra/notes.txt").write_text("not a picture")
    (tmp_path / "test/Zebra/._0.png").write_text("nor this")
    train, val, test, class_names = data.load("folder", tmp_path, 4, 1)
    assert class_names == ["Zebra", "great white shark"]
    # of 5 training pictures per class 4 are drawn; the other one serves for validation
    assert (len(train), len(val), len(test)) == (8, 2, 4) and not set(train) & set(val)


def test_half_of_each_class_is_held_out_where_there_is_no_test_folder(tmp_path):
    folder_tree(tmp_path, ["cat", "dog"], 5)
    train, _, test, _ = data.load("folder", tmp_path, 0, 1)
    assert [sum(label == c for _, label, _ in train) for c in (0, 1)] == [3, 3]
    assert [sum(label == c for _, label, _ in test) for c in (0, 1)] == [2, 2]
    assert not set(train) & set(test)
    assert data.load("folder", tmp_path, 0, 1)[2] == test
    assert any(data.load("folder", tmp_path, 0, seed)[2] != test for seed in (2, 3, 4))
    picture(tmp_path / "emu/only.png")
    with pytest.raises(ValueError, match="class 'emu' has 1 picture, .*only.png: two are needed"):
        data.load("folder", tmp_path, 0, 1)


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_a_folder_may_bring_class_names(tmp_path, parts):
    for part in parts:
        folder_tree(tmp_path / part, ["a", "b", "c_d"])
    (tmp_path / "classnames.txt").write_text("\ufeffb\tBoxer  dog\n\n  a Abyssinian \nc_d\n", encoding="utf-8")
    # labels by folder, not by line; as it is written; who has no name is called as the folder is
    assert data.load("folder", tmp_path, 1, 1)[3] == ["Abyssinian", "Boxer  dog", "c_d"]
    for part in parts:
        (tmp_path / part / "a").rename(tmp_path / part / "Gebänderte Fläche")
    (tmp_path / "classnames.txt").write_text("Gebänderte Fläche\tbanded\nb boxer\nc_d", encoding="utf-8")
    assert data.load("folder", tmp_path, 1, 1)[3] == ["banded", "boxer", "c_d"]     # a tab, as the folder has a blank


@pytest.mark.parametrize("more, message", [("c", "c$"), ("ecd", "c, d, e$"), ("fcde", r"c, d, e \.\.\.$")])
def test_class_names_without_a_folder_are_named(tmp_path, more, message):
    folder_tree(tmp_path, ["a", "b"], 2)
    (tmp_path / "classnames.txt").write_text("\n".join("ab" + more))
    with pytest.raises(ValueError, match=f"{2 + len(more)} class names for 2 class folders in .*; "
                                         f"without counterpart: {message}"):
        data.load("folder", tmp_path, 1, 1)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_be_called_train_or_test(tmp_path, name):
    folder_tree(tmp_path, ["bus", name], 4)
    train, _, test, class_names = data.load("folder", tmp_path, 0, 1)
    assert class_names == ["bus", name] and (len(train), len(test)) == (4, 4)


def test_only_pictures_and_class_folders_that_can_be_seen_count(tmp_path):
    for part in ("train", "test"):
        folder_tree(tmp_path / part, ["b", "z", ".git", "__MACOSX"], 2)
        for name in ("x.JPG", "x.jfif", "x.jp2", "x.jpeg", "x.png", "x.bmp", "x.gif", "x.webp", "x.tif", "x.TIFF",
                     "x.ppm", ".x.png", "x.txt", "png"):
            (tmp_path / part / "b" / name).touch()
        (tmp_path / part / "notes.txt").touch()
    items, *_, class_names = data.load("folder", tmp_path, 0, 1)
    assert class_names == ["b", "z"]
    assert [path.removeprefix(f"{tmp_path}/train/b/") for path, label, _ in items if label == 0] == [
        "0.png", "1.png", "x.JPG", "x.TIFF", "x.bmp", "x.gif", "x.jfif", "x.jp2", "x.jpeg", "x.png", "x.ppm", "x.tif",
        "x.webp"]


def test_a_class_without_a_test_folder_is_named(tmp_path):
    folder_tree(tmp_path / "train", ["a", "b"])
    folder_tree(tmp_path / "test", ["b"])
    with pytest.raises(ValueError, match="2 class names for 1 class folders in .*/test; without counterpart: a$"):
        data.load("folder", tmp_path, 1, 1)


@pytest.mark.parametrize("parts, counts", [
    (("train", "test"), (6, 0, 4)), (("train", "val"), (6, 0, 4)), (("train", "val", "test"), (6, 4, 4)),
    (("",), (4, 0, 2))])                                   # of 3 pictures per class, 1 is held out
def test_every_layout_has_its_parts(parts, counts, tmp_path):
    for i, part in enumerate(parts):
        folder_tree(tmp_path / part, ["cat", "dog"], 2 if i else 3)
    train, val, test, class_names = data.load("folder", tmp_path, 0, 1)
    assert (len(train), len(val), len(test)) == counts and class_names == ["cat", "dog"]
    assert all(path.startswith(f"{tmp_path}/{parts[-1]}") for path, *_ in test)
    assert ("no folder test/: val/ is the test" in folders.remarks(str(tmp_path))) == (parts == ("train", "val"))


@pytest.mark.parametrize("count, share, test", [
    (10, 0.5, 5), (5, 0.5, 2), (10, 0.3, 3), (100, 0.29, 29),      # 29 %, though 0.29 * 100 is 28.999... in a computer
    (5, 0.1, 1), (2, 0.1, 1), (4, 0.99, 3)])                       # at least one, never all
def test_the_share_that_is_held_out_by_hand(count, share, test):
    items = [(f"{label}/{i}", label, "ab"[label]) for label in (0, 1) for i in range(count)]
    parts = folders.hold_out(items, 1, share)
    assert [len(part) for part in parts] == [2 * (count - test), 0, 2 * test] and {*parts[0], *parts[2]} == {*items}


def test_a_share_that_holds_nothing_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--held-out is for one's own pictures, --dataset folder; critters has a test"):
        data.load("critters", tmp_path, 1, 1, held_out=0.5)
    for part in ("train", "val"):
        folder_tree(tmp_path / part, ["a", "b"], 1)
    with pytest.raises(ValueError, match="--held-out is for class folders alone, but .* has train and val"):
        data.load("folder", tmp_path, 1, 1, held_out=0.5)


def test_one_class_is_refused(tmp_path):
    folder_tree(tmp_path / "all", ["cat", "dog"])
    with pytest.raises(ValueError, match="^1 class: .* has one class folder, 'all', .* one level too high"):
        data.load("folder", tmp_path, 1, 1)
    with pytest.raises(ValueError, match="cat is flat: 5 pictures .* one level too low"):
        data.load("folder", tmp_path / "all/cat", 1, 1)


@pytest.mark.parametrize("lines, complaint", [
    ("cat kitten\n", "1 class names for 2 class folders in .*; without counterpart: dog$"),
    ("bird\n", "1 class names for 2 class folders in .*; without counterpart: bird, cat, dog$")])
def test_one_name_for_two_folders_is_no_case_of_one_class(lines, complaint, tmp_path):
    folder_tree(tmp_path, ["cat", "dog"])
    (tmp_path / "classnames.txt").write_text(lines)
    with pytest.raises(ValueError, match=complaint):
        data.load("folder", tmp_path, 1, 1)


def test_validation_takes_what_training_left_where_there_is_no_other_part(tmp_path):
    folder_tree(tmp_path, ["few", "many"], 4)
    for i in range(4, 20):
        picture(tmp_path / f"many/{i}.png")
    train, val, test, _ = data.load("folder", tmp_path, 2, 1)      # "few": 2 held out, 2 trained on, none left
    assert [label for _, label, _ in val] == [1, 1] and len({*train, *val, *test}) == 4 + 2 + 12
    assert len(data.load("folder", tmp_path, 1, 1)[1]) == 2        # one of each class, as there is one shot


# ---- what is left out ----------------------------------------------------------------------------------------

def test_nothing_is_left_out_without_a_word(tmp_path):
    folder_tree(tmp_path, ["Ä b", "cat"], 2)
    assert folders.remarks(str(tmp_path)) == []
    for name in ("cat/2021/deep/1.jpg", "loose.jpg", ".hidden/1.jpg", "__MACOSX/1.jpg", "cat/__MACOSX/1.jpg"):
        picture(tmp_path / name)
    for name in ("cat/1.heic", "cat/2.HEIC", "cat/notes", "cat/.DS_Store", "classnames.txt"):
        (tmp_path / name).write_text("Ä\ncat\n")
    assert len(folders.class_folders(tmp_path)["cat"]) == 3         # the one in a folder below it counts
    assert folders.remarks(str(tmp_path)) == [
        f"left out: 2 .heic, 1 without a suffix, not read as pictures, first {tmp_path}/cat/1.heic",
        "left out: of systems and programs: 2 '__MACOSX', 1 '.hidden', 1 '.DS_Store', "
        f"first {tmp_path}/.hidden",
        f"left out: 1 .jpg, outside of the class folders, first {tmp_path}/loose.jpg"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new/1.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no picture in .*/new \(1 .heic\)"):
        folders.class_folders(tmp_path)


def test_every_picture_that_cannot_be_read_is_named(tmp_path):
    folder_tree(tmp_path, ["a"], 25)
    items = [(str(tmp_path / f"a/{i}.png"), 0, "a") for i in range(25)]
    reading.check_pictures(items)
    for i in range(1, 25):
        (tmp_path / f"a/{i}.png").write_bytes((tmp_path / f"a/{i}.png").read_bytes()[:-60])
    with pytest.raises(ValueError) as error:
        reading.check_pictures(items)
    first, *names = str(error.value).splitlines()
    assert first.startswith("24 of 25 pictures cannot be read")
    assert [name.split(": ")[0] for name in names] == [f"cannot read picture {path}" for path, *_ in items[1:]]
    reading.check_pictures(items, rank=0, world=25)         # the first process of 25 reads the first one alone


# ---- as people see them --------------------------------------------------------------------------------------

def read(tmp_path, image, name="a.png", **options):
    """A PIL image, written and read as one's own -> pixels (h, w, 3)."""
    image.save(tmp_path / name, **options)
    image = data.read_image(str(tmp_path / name), as_people_see=True)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255                                           # left half white
    exif = Image.Exif()
    exif[0x0112] = 6                                               # orientation 6: turn clockwise by 90 degrees
    seen = read(tmp_path, Image.fromarray(pixels), exif=exif)
    assert seen.shape == (20, 10, 3) and seen[:10].min() == 255 and seen[10:].max() == 0       # upper half white
    assert data.read_image(str(tmp_path / "a.png")).size == (20, 10)                   # published data: as it is
    plain, own = (data.Pictures([(str(tmp_path / "a.png"), 0, "a")], np.asarray, as_people_see=own)[0][0] for own in (0, 1))
    assert np.array_equal(plain, pixels) and np.array_equal(own, seen)


@pytest.mark.parametrize("name, values, seen", [
    ("a.png", np.uint16([[0, 1000, 32896, 65535]]), [0, 4, 128, 255]),       # 65535 / 255 = 257; 1000 / 257 = 3.9
    ("a.tif", np.uint16([[0, 1000, 32896, 65535]]), [0, 4, 128, 255]),
    ("a.tif", np.int32([[-100, 0, 100, 300]]), [0, 64, 128, 255]),           # 400 steps to 255: 0, 63.75, 127.5, 255
    ("a.tif", np.float32([[0, 0.25, 0.5, 1]]), [0, 64, 128, 255]),
    ("a.tif", np.float32([[3, 3, 3, 3]]), [0, 0, 0, 0])])
def test_grey_of_many_bits_is_scaled_by_hand(name, values, seen, tmp_path):
    assert read(tmp_path, Image.fromarray(values), name)[0, :, 0].tolist() == seen


def test_white_lies_behind_what_is_transparent(tmp_path):
    image = Image.fromarray(np.uint8([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]]))
    # a fifth of the colour and four fifths of white: 200/5 + 204 = 244, 100/5 + 204 = 224, 204
    assert read(tmp_path, image).tolist() == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    palette = Image.fromarray(np.uint8([[0, 1]])).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert read(tmp_path, palette, "a.gif", transparency=0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert read(tmp_path, Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "a.tif").tolist() == [[[255, 0, 0]]]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    picture(tmp_path / "cat/1.png")
    picture(tmp_path / "dog/1.png")
    (tmp_path / "cat/up").symlink_to(tmp_path)
    (tmp_path / "cat/dogs").symlink_to(tmp_path / "dog")             # one to a folder beside it is
    assert folders.class_folders(tmp_path)["cat"] == [f"{tmp_path}/cat/1.png", f"{tmp_path}/cat/dogs/1.png"]


def test_a_file_of_names_must_be_utf8_and_name_each_folder_once(tmp_path):
    path = tmp_path / "classnames.txt"
    path.write_text("a cat\n", encoding="utf-16")
    with pytest.raises(ValueError, match=f"{path} is no text in UTF-8: save it as such"):
        folders.read_names(path)
    path.write_text("a cat\nb dog\na bird\n")
    with pytest.raises(ValueError, match=f"{path} has two lines for 'a'"):
        folders.read_names(path)


def test_the_same_picture_in_two_parts_or_two_classes_is_a_warning(tmp_path, capsys):
    for i, name in enumerate(("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png")):
        picture(tmp_path / name, seed=i)
    lists, _ = data.read_lists("folder", tmp_path)
    assert files.twins(lists) == []
    (tmp_path / "test/cat/e.png").write_bytes((tmp_path / "train/cat/a.png").read_bytes())
    (tmp_path / "train/dog/f.png").write_bytes((tmp_path / "train/cat/a.png").read_bytes())
    (tmp_path / "train/cat/z.png").write_bytes((tmp_path / "train/cat/a.png").read_bytes())    # no matter
    with pytest.raises(SystemExit, match="^0$"):
        data.main(data.parse_args(["--dataset", "folder", "--data-root", str(tmp_path), "--check"]))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"warning: one picture, byte by byte, is in two parts: {tmp_path}/train/cat/a.png and "
        f"{tmp_path}/test/cat/e.png",
        f"warning: one picture, byte by byte, is in two classes: {tmp_path}/train/cat/a.png and "
        f"{tmp_path}/train/dog/f.png", "all as expected"]
