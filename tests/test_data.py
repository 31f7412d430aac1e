"""The data: which pictures are drawn, from where, and that a crop depends on its seed, epoch and number alone."""

import collections
import hashlib
import itertools
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from sources import critters
import data
from sources import files


def picture(path, mode="RGB", size=(40, 30), seed=0):
    """A small noisy picture at `path`, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def to_rgb(image):
    return image.convert("RGB")


PREPROCESS = transforms.Compose([transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
                                 transforms.CenterCrop(16), to_rgb, transforms.ToTensor(),
                                 transforms.Normalize((0.5,) * 3, (0.25,) * 3)])

# Labels appear in the order 2, 0, 1, interleaved; sorting the names would give another order than the labels do.
NAMES = {0: "zebra_fish", 1: "Ant", 2: "moth"}
SPLIT = {part: [[f"{part}/{NAMES[label]}_{i}.jpg", label, NAMES[label]] for i in range(count) for label in (2, 0, 1)]
         for part, count in (("train", 6), ("val", 5), ("test", 3))}


@pytest.fixture
def eurosat(tmp_path):
    """A data root with the small split in EuroSAT's place, and its pictures."""
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(SPLIT))
    for items in SPLIT.values():
        for path, *_ in items:
            picture(tmp_path / "eurosat/2750" / path)
    return tmp_path


@pytest.fixture
def imagenet(tmp_path):
    """Three classes in ImageNet's layout, two of the same name."""
    home = tmp_path / "imagenet"
    for part, count in (("train", 3), ("val", 2)):
        for wnid in ("n03", "n01", "n02"):
            for i in reversed(range(count)):
                picture(home / "images" / part / wnid / f"{wnid}_{i}.JPEG")
    (home / "classnames.txt").write_text("n01 missile\nn02 great white shark\nn03 missile\n")
    return tmp_path


# ---- the draws -----------------------------------------------------------------------------------------------

def reference_draw(parts, shots, seed):
    """CoOp's draw as its authors' code does it, with the global generator and one pass per list."""
    random.seed(seed)
    drawn = []
    for items, k in ((parts["train"], shots), (parts["val"], min(shots, 4))):
        tracker = collections.defaultdict(list)
        for path, label, name in items:
            tracker[label].append(path)
        drawn.append([path for paths in tracker.values() for path in random.sample(paths, k)])
    return drawn


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 5])
def test_the_draw_is_coops(eurosat, shots, seed):
    train, val, _, _ = data.load("eurosat", eurosat, shots, seed)
    root = f"{eurosat}/eurosat/2750/"
    assert [[path.removeprefix(root) for path, *_ in items] for items in (train, val)] == \
        reference_draw(SPLIT, shots, seed)


def test_the_draw_stays_what_it_was():
    # classes in the order of first appearance, 2 0 1, two of each; the digest was taken from reference_draw
    drawn = [path for path, *_ in data.few_shot(SPLIT["train"], 2, 1)]
    assert [path[6:-6] for path in drawn] == ["moth"] * 2 + ["zebra_fish"] * 2 + ["Ant"] * 2
    assert hashlib.sha256("\n".join(drawn).encode()).hexdigest() == \
        "a8a36f99f291e7817ae897e8dbf8a26ffa9d89f7d33cef2452b1ca531b7c05e2"


def test_a_generator_goes_on_drawing():
    rng = random.Random(1)
    first, second = data.few_shot(SPLIT["train"], 2, rng), data.few_shot(SPLIT["train"], 2, rng)
    assert first == data.few_shot(SPLIT["train"], 2, 1) != second


def test_too_few_images_are_an_error_with_class_count_and_shots():
    with pytest.raises(ValueError, match="class 'moth' has 6 images, fewer than the 7 shots asked for"):
        data.few_shot(SPLIT["train"], 7, 1)


def test_the_smallest_class_is_named_wherever_it_stands():
    items = [(f"{name}{i}.png", label, name)
             for label, (name, count) in enumerate([("ant", 3), ("bee", 1), ("cat", 2)]) for i in range(count)]
    with pytest.raises(ValueError, match="class 'bee' has 1 images, fewer than the 2 .*--shots 1 is the most"):
        data.few_shot(items, 2, 1)


def test_no_shots_means_all(eurosat):
    for shots in (None, 0):
        train, val, test, _ = data.load("eurosat", eurosat, shots, 1)
        assert (len(train), len(val), len(test)) == (18, 15, 9)


def test_up_to_takes_all_of_a_small_class():
    items = [(f"{label}/{i}", label, str(label)) for label, count in enumerate((2, 5)) for i in range(count)]
    drawn = data.up_to(items, 3, 1)
    assert [label for _, label, _ in drawn] == [0, 0, 1, 1, 1] and len({*drawn}) == 5
    assert data.up_to(items, 2, 7) == data.few_shot(items, 2, 7)         # where every class has enough
    with pytest.raises(ValueError, match="--sampler up-to takes up to 3 of each class"):
        data.few_shot(items, 3, 1)


def test_proportional_by_hand():
    # 2 shots of 3 classes are 6 of 12 images: half of each class, 7 : 4 : 1 -> 3.5, 2, 0.5 -> floors 3, 2, 0;
    # the sixth image goes to the first or to the last class, whose remainders are equal
    items = [(f"{label}/{i}", label, str(label)) for label, count in enumerate((7, 4, 1)) for i in range(count)]
    seen = set()
    for seed in range(20):
        drawn = data.proportional(items, 2, seed)
        assert len(set(drawn)) == 6 and set(drawn) <= set(items)
        seen.add(tuple(sum(label == c for _, label, _ in drawn) for c in range(3)))
    assert seen == {(4, 2, 0), (3, 2, 1)}
    with pytest.raises(ValueError, match="5 shots of 3 classes are 15 images, but there are 12"):
        data.proportional(items, 5, 1)


def test_all_images_of_the_smallest_class_may_be_drawn():
    assert sorted(data.few_shot(SPLIT["train"], 6, 1)) == sorted(SPLIT["train"])
    items = [(str(i), i % 3, "c") for i in range(12)]
    assert sorted(data.proportional(items, 4, 1)) == sorted(items)


@pytest.mark.parametrize("counts, shots, expected", [
    # 2 shots of 3 classes are 6 of 11 images: 30/11, 24/11, 12/11 -> floors 2, 2, 1; the sixth to the rest 8/11
    ((5, 4, 2), 2, (3, 2, 1)),
    # 1 shot of 3 classes are 3 of 12: 15/12, 18/12, 3/12 -> floors 1, 1, 0; the third to the rest 6/12
    ((5, 6, 1), 1, (1, 2, 0)),
    # 3 of 20: 2.4, 0.3, 0.3 -> floors 2, 0, 0; the third to the rest .4
    ((16, 2, 2), 1, (3, 0, 0)),
])
def test_the_largest_remainder_is_rounded_up(counts, shots, expected):
    items = [(f"{label}/{i}", label, str(label)) for label, count in enumerate(counts) for i in range(count)]
    for seed in range(8):
        drawn = [label for _, label, _ in data.proportional(items, shots, seed)]
        assert tuple(map(drawn.count, range(3))) == expected


def test_validation_goes_on_in_the_stream_of_the_training_draw(eurosat):
    for sampler, draw in (("exact", data.few_shot), ("up-to", data.up_to), ("proportional", data.proportional)):
        train, val, *_ = data.load("eurosat", eurosat, 2, 1, sampler)
        rng, names = random.Random(1), [[path.rsplit("/", 1)[1] for path, *_ in items] for items in (train, val)]
        assert names == [[path.rsplit("/", 1)[1] for path, *_ in drawn]
                         for drawn in (draw(SPLIT["train"], 2, rng), data.few_shot(SPLIT["val"], 2, rng))]


def test_proportional_and_exact_agree_on_balanced_classes(eurosat):
    train, val, *_ = data.load("eurosat", eurosat, 2, 1, sampler="proportional")
    assert [sum(label == c for _, label, _ in train) for c in range(3)] == [2, 2, 2] and len(val) == 6


# ---- lists, labels and names ---------------------------------------------------------------------------------

def test_labels_and_names_are_the_split_files(eurosat):
    train, val, test, class_names = data.load("eurosat", eurosat, 2, 1)
    assert class_names == ["zebra_fish", "Ant", "moth"]           # by label, raw; neither sorted nor as they appear
    for items in (train, val, test):
        assert all(class_names[label] == name and f"/{name}_" in path for path, label, name in items)


# As CoOp's repository (templates, folders, split files) and GalLoP's README (accuracies) have them. The columns:
# template; classes; train, val, test; zero-shot accuracy; CoOp's list folder and picture folder in it; torchvision's;
# the split file; its SHA-256, or the id of git's blob
FACTS = {
    "imagenet": ("a photo of a {}.", 1000, (1281167, 0, 50000), 66.7, ("imagenet", "images"), ("imagenet", ""),
                 "classnames.txt", None),
    "caltech101": ("a photo of a {}.", 100, (4128, 1649, 2465), 92.2, ("caltech-101", "101_ObjectCategories"),
                   ("caltech101", "101_ObjectCategories"), "split_zhou_Caltech101.json",
                   "52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5"),
    "oxford_pets": ("a photo of a {}, a type of pet.", 37, (2944, 736, 3669), 88.4, ("oxford_pets", "images"),
                    ("oxford-iiit-pet", "images"), "split_zhou_OxfordPets.json",
                    "d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e"),
    "stanford_cars": ("a photo of a {}.", 196, (6509, 1635, 8041), 65.5, ("stanford_cars", ""), None,
                      "split_zhou_StanfordCars.json",
                      "40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d"),
    "oxford_flowers": ("a photo of a {}, a type of flower.", 102, (4093, 1633, 2463), 70.7, ("oxford_flowers", "jpg"),
                       ("flowers-102", "jpg"), "split_zhou_OxfordFlowers.json",
                       "2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794"),
    "food101": ("a photo of {}, a type of food.", 101, (50500, 20200, 30300), 84.8, ("food-101", "images"), None,
                "split_zhou_Food101.json", "39557040ee6501bd32aa8b5dfd75f7941a32f0a7"),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.", 100, (3334, 3333, 3333), 24.8,
                      ("fgvc_aircraft", "images"), ("fgvc-aircraft-2013b/data", "images"), "variants.txt", None),
    "sun397": ("a photo of a {}.", 397, (15880, 3970, 19850), 62.3, ("sun397", "SUN397"), ("SUN397", ""),
               "split_zhou_SUN397.json", "8d5725db8f70bcf02245665304f863e68f96a24c"),
    "dtd": ("{} texture.", 47, (2820, 1128, 1692), 44.1, ("dtd", "images"), ("dtd", "dtd/images"),
            "split_zhou_DescribableTextures.json", "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38"),
    "eurosat": ("a centered satellite photo of {}.", 10, (13500, 5400, 8100), 48.3, ("eurosat", "2750"), None,
                "split_zhou_EuroSAT.json", "541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2"),
    "ucf101": ("a photo of a person doing {}.", 101, (7639, 1898, 3783), 64.7, ("ucf101", "UCF-101-midframes"), None,
               "split_zhou_UCF101.json", "d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8"),
    "imagenet_v2": ("a photo of a {}.", 1000, (0, 0, 10000), 60.8,
                    ("", "imagenetv2/imagenetv2-matched-frequency-format-val"), None, "imagenet/classnames.txt", None),
    "imagenet_sketch": ("a photo of a {}.", 1000, (0, 0, 50889), 46.2, ("", "imagenet-sketch/images"), None,
                        "imagenet/classnames.txt", None),
    "imagenet_a": ("a photo of a {}.", 200, (0, 0, 7500), 47.8, ("", "imagenet-adversarial/imagenet-a"), None,
                   "imagenet/classnames.txt", None),
    "imagenet_r": ("a photo of a {}.", 200, (0, 0, 30000), 74.0, ("", "imagenet-rendition/imagenet-r"), None,
                   "imagenet/classnames.txt", None),
    # 16 classes of 64, 40 and 60 drawn pictures
    "critters": ("a photo of a {}.", 16, (1024, 640, 960), None, None, None, None, None),
    "folder": ("a photo of a {}.", None, None, None, ("", ""), None, None, None),
}


@pytest.mark.parametrize("name", FACTS)
def test_the_table_has_the_published_facts(name):
    template, classes, sizes, zero_shot, coop, torchvision, first_list, digest = FACTS[name]
    row = data.DATASETS[name]
    assert row.template == data.template(name) == template
    assert (row.classes, row.sizes, row.zero_shot, row.digest) == (classes, sizes, zero_shot, digest)
    assert row.layouts == tuple(layout for layout in (coop, torchvision) if layout)
    assert row.lists[:1] == ((first_list,) if first_list else ())


def test_the_table_has_all_data_sets_and_their_lists():
    assert set(data.DATASETS) == set(FACTS)
    assert {name: row.lists[1:] for name, row in data.DATASETS.items() if row.lists[1:]} == {
        "fgvc_aircraft": tuple(f"images_variant_{part}.txt" for part in ("train", "val", "test"))}


def test_the_root_is_the_environments_or_data(monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert data.default_root() == "data"
    monkeypatch.setenv("DATA_ROOT", "/elsewhere")
    assert data.default_root() == "/elsewhere"


def test_names_and_labels_of_a_split_file_may_be_of_another_type(eurosat):
    split = {part: [[path, str(label), 10 + label] for path, label, _ in items] for part, items in SPLIT.items()}
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    train, *_, class_names = data.load("eurosat", eurosat, 1, 1)
    assert class_names == ["10", "11", "12"] and [item[1:] for item in train] == [(2, "12"), (0, "10"), (1, "11")]


def test_a_split_file_is_compared_with_the_published_one(eurosat, monkeypatch):
    assert data.split_matches_published("eurosat", eurosat) is False
    assert data.split_matches_published("critters", eurosat) is None
    content = (eurosat / "eurosat/split_zhou_EuroSAT.json").read_bytes()
    for digest in (hashlib.sha256(content).hexdigest(),
                   hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()):      # as `git hash-object`
        monkeypatch.setitem(data.DATASETS, "eurosat", data.DATASETS["eurosat"]._replace(digest=digest))
        assert data.split_matches_published("eurosat", eurosat) is True


def test_torchvisions_layout_is_found_too(tmp_path):
    (tmp_path / "flowers-102/jpg").mkdir(parents=True)
    (tmp_path / "flowers-102/split_zhou_OxfordFlowers.json").write_text(json.dumps(SPLIT))
    lists, _ = data.read_lists("oxford_flowers", tmp_path)
    assert lists["test"][0][0] == f"{tmp_path}/flowers-102/jpg/test/moth_0.jpg"


def test_imagenet_keeps_rows_of_equal_names_and_sorts_files(imagenet):
    train, val, test, class_names = data.load("imagenet", imagenet, 0, 1)
    assert class_names == ["missile", "great white shark", "missile"] and val == []
    assert [(path.rsplit("/", 1)[1], label) for path, label, _ in train] == \
        [(f"n0{label + 1}_{i}.JPEG", label) for label in range(3) for i in range(3)]
    assert len(test) == 6
    drawn, *_ = data.load("imagenet", imagenet, 1, 1)
    assert [label for _, label, _ in drawn] == [0, 1, 2]


def test_imagenets_folders_may_lie_without_images_above(imagenet):
    for part in ("train", "val"):
        (imagenet / "imagenet/images" / part).rename(imagenet / "imagenet" / part)
    (imagenet / "imagenet/images").rmdir()
    assert len(data.load("imagenet", imagenet, 0, 1)[2]) == 6


def variant(root, name, folders, classes=None):
    """A variant of ImageNet made of empty files, one in each folder; 12 classes in all, two of one name."""
    (root / "imagenet").mkdir(exist_ok=True)
    (root / "imagenet/classnames.txt").write_text("".join(f"n{i:02d} name {i % 11}\n" for i in range(12)))
    for folder in folders:
        path = root / data.DATASETS[name].layouts[0][1] / folder
        path.mkdir(parents=True)
        (path / "a.jpeg").touch()
    with pytest.MonkeyPatch.context() as patch:
        if data.DATASETS[name].classes < 1000:
            patch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(classes=classes or len(folders)))
        return data.load(name, root, 0, 1)


def test_folders_of_v2_are_called_by_label(tmp_path):
    train, val, test, class_names = variant(tmp_path, "imagenet_v2", map(str, range(12)))
    assert (train, val) == ([], []) and class_names == [f"name {i % 11}" for i in range(12)]
    assert [(path.split("/")[-2], label) for path, label, _ in test] == [(str(i), i) for i in range(12)]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_a_variant_may_have_some_of_the_classes_only(name, tmp_path):
    *_, test, class_names = variant(tmp_path, name, ("n11", "n00", "n05"))
    assert class_names == ["name 0", "name 5", "name 0"] and [label for _, label, _ in test] == [0, 1, 2]


def test_a_class_folder_that_a_variant_should_have_is_missed(tmp_path):
    with pytest.raises(ValueError, match="12 class names for 11 class folders .*: n03"):
        variant(tmp_path, "imagenet_sketch", [f"n{i:02d}" for i in range(12) if i != 3])


def test_a_variant_of_some_classes_must_have_all_of_these(tmp_path):
    with pytest.raises(ValueError, match="2 class folders in .*imagenet-a, 3 expected: is the download whole"):
        variant(tmp_path, "imagenet_a", ("n11", "n00"), classes=3)


def test_a_class_folder_that_imagenet_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="1 class names for 2 class folders .*: n99"):
        variant(tmp_path, "imagenet_a", ("n01", "n99"))


def test_variants_of_imagenet_are_for_tests_alone(tmp_path):
    variant(tmp_path, "imagenet_v2", map(str, range(12)))
    with pytest.raises(ValueError, match="imagenet_v2 has no training images.*--on imagenet_v2"):
        data.load("imagenet_v2", tmp_path, 1, 1)


def test_two_classes_have_no_base_to_train_on():
    # ceil(2 / 2) = 1 class, which cannot be missed
    with pytest.raises(ValueError, match="2 classes have too few base classes to train on"):
        data.choose_classes({"train": [("a.jpg", 0, "cat"), ("b.jpg", 1, "dog")]}, ["cat", "dog"], "base")


def test_base_and_new_classes_of_an_odd_number(eurosat):
    # three classes: ceil(3 / 2) = 2 are base, the third is new and has label 0
    whole = data.load("eurosat", eurosat, 1, 1)
    base, new = (data.load("eurosat", eurosat, 1, 1, classes=classes) for classes in ("base", "new"))
    assert base[3] == whole[3][:2] and new[3] == whole[3][2:]
    for all_items, base_items, new_items in zip(whole[:3], base[:3], new[:3]):
        assert base_items == [item for item in all_items if item[1] < 2] != []
        assert new_items == [(path, 0, name) for path, label, name in all_items if label == 2] != []


def test_aircraft_labels_are_lines_of_variants(tmp_path):
    home = tmp_path / "fgvc_aircraft"
    picture(home / "images/0000001.jpg")
    (home / "variants.txt").write_text("BAE 146-200\nF/A-18\n")
    for part in ("train", "val", "test"):
        (home / f"images_variant_{part}.txt").write_text("0000001 F/A-18\n0000001 BAE 146-200\n".replace("1 F", "2 F"))
    lists, class_names = data.read_lists("fgvc_aircraft", tmp_path)
    assert class_names == ["BAE 146-200", "F/A-18"]
    assert lists["train"] == [(f"{home}/images/0000002.jpg", 1, "F/A-18"),
                              (f"{home}/images/0000001.jpg", 0, "BAE 146-200")]
    with pytest.raises(FileNotFoundError, match="1 of 2 train images missing, first: .*0000002.jpg"):
        data.load("fgvc_aircraft", tmp_path, 0, 1)
    (home / "images_variant_val.txt").write_text("0000001 F-16\n")
    with pytest.raises(ValueError, match="images_variant_val.txt: 'F-16' is none of the 2 variants"):
        data.load("fgvc_aircraft", tmp_path, 0, 1)


def test_critters_are_drawn_and_have_no_files():
    train, val, test, class_names = data.load("critters", "nowhere", 16, 1)
    C = len(class_names)
    assert (len(train), len(val), len(test)) == (16 * C, 4 * C, 60 * C)
    assert train[0][0].startswith("critters/train/0/")
    everything = data.load("critters", "nowhere", None, 1)[:3]
    for part, items in zip(("train", "val", "test"), everything):
        assert items == [(f"critters/{part}/{label}/{i}", label, name) for label, name in enumerate(class_names)
                         for i in range(critters.POOL[part])]
    image = data.read_image(train[0][0])
    assert image.size == (64, 64) and image is data.read_image(train[0][0])                       # drawn once
    index = int(train[0][0].rsplit("/", 1)[1])
    assert np.array_equal(image, critters.picture("train", 0, index))


def test_a_drawn_picture_of_an_ood_set_has_a_path_too():
    assert np.array_equal(data.read_image("critters/ood/near/11"), critters.ood_picture("near", 11))


def test_a_file_below_a_folder_called_critters_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "critters/train/0/1.png")
    assert data.read_image("critters/train/0/1.png").size == (40, 30)


# ---- what is wrong is named ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in data.DATASETS if name != "critters"])
def test_without_data_the_error_shows_the_tree(tmp_path, name):
    root = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, root, 16, 1)
    row = data.DATASETS[name]
    for part in (f"{name}: there is no {root}", "expected:\n", row.pictures, *row.lists):
        assert part in str(error.value)


def test_missing_pictures_are_counted_and_the_first_is_named(eurosat):
    for i in (1, 2):
        (eurosat / f"eurosat/2750/test/Ant_{i}.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("eurosat", eurosat, 1, 1)
    assert str(error.value).startswith(
        f"eurosat: 2 of 9 test images missing, first: {eurosat}/eurosat/2750/test/Ant_1.jpg\nexpected:\n")


def test_only_the_pictures_that_are_used_must_be_there(eurosat):
    drawn = {path for items in data.load("eurosat", eurosat, 1, 1)[:3] for path, *_ in items}
    for path in (eurosat / "eurosat/2750").rglob("*.jpg"):
        if str(path) not in drawn:
            path.unlink()
    again = data.load("eurosat", eurosat, 1, 1)
    assert {path for items in again[:3] for path, *_ in items} == drawn


@pytest.mark.parametrize("split, message", [
    ("{", "split_zhou_EuroSAT.json should hold lists train, val and test .* JSONDecodeError"),
    (json.dumps({"train": [], "val": []}), "split_zhou_EuroSAT.json should hold lists .* KeyError: 'test'"),
    (json.dumps({**SPLIT, "val": ["a.jpg", 0]}), "should hold lists train, val and test of .path, label, class name"),
    (json.dumps({"train": [], "val": [], "test": []}), "labels should run from 0 without a gap, found \\[\\]"),
    (json.dumps({**SPLIT, "val": [["a.jpg", 4, "bee"]]}), r"labels should run .* found \[0, 1, 2\] ... \[4\]"),
    (json.dumps({**SPLIT, "val": [["a.jpg", 0, "Ant"]]}), "label 0 is 'zebra_fish' and, for .*a.jpg, 'Ant'"),
    (json.dumps({**SPLIT, "val": [["a.jpg", 3, "bee"]]}), "class 'bee' has no train image"),
    (json.dumps({**SPLIT, "val": [["a.jpg", 4, "fly"], ["a.jpg", 3, "bee"]]}), "class 'bee' has no train image"),
    (json.dumps({**SPLIT, "test": [["a.jpg", 1, "Ant"]]}), "class 'zebra_fish' has no test image"),
])
def test_a_bad_split_file_says_what_is_wrong(eurosat, split, message):
    (eurosat / "eurosat/split_zhou_EuroSAT.json").write_text(split)
    with pytest.raises(ValueError, match=message):
        data.load("eurosat", eurosat, 1, 1)


def test_a_flat_validation_folder_is_recognised(imagenet):
    val = imagenet / "imagenet/images/val"
    for path in list(val.rglob("*.JPEG")):
        path.rename(val / path.name)
    for path in list(val.iterdir()):
        path.rmdir() if path.is_dir() else None
    with pytest.raises(ValueError, match=f"{val} is flat: 6 pictures and no class folder"):
        data.load("imagenet", imagenet, 1, 1)


def test_class_names_and_class_folders_must_agree(imagenet):
    (imagenet / "imagenet/classnames.txt").write_text("n01 missile\nn03 missile\n")
    with pytest.raises(ValueError, match="2 class names for 3 class folders in .*train; without counterpart: n02"):
        data.load("imagenet", imagenet, 1, 1)


def test_an_empty_folder_is_named(imagenet, tmp_path):
    for path in (imagenet / "imagenet/images/train/n02").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="imagenet: there is no picture in .*/train/n02\nexpected:"):
        data.load("imagenet", imagenet, 1, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="folder: there is no class folder in .*/empty\nexpected:"):
        data.load("folder", tmp_path / "empty", 1, 1)


def test_an_unknown_data_set_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no dataset is called 'mnist'; there are critters, .*ucf101"):
        data.load("mnist", ".", 1, 1)


@pytest.mark.parametrize("harm", ["truncated", "empty", "no picture"])
def test_an_unreadable_picture_is_named(tmp_path, harm):
    path = picture(tmp_path / "a.jpg")
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:len(content) // 2], "empty": b"", "no picture": b"?" * 99}[harm])
    with pytest.raises(ValueError, match=f"cannot read picture {path}: "):
        data.read_image(str(path))
    with pytest.raises(ValueError, match=f"cannot read picture {tmp_path}/b.jpg: FileNotFoundError"):
        data.read_image(f"{tmp_path}/b.jpg")


# ---- pictures as tensors -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"),
                                          ("1", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("P", "gif")])
def test_any_mode_is_read_as_clip_reads_it(tmp_path, mode, suffix):
    path = picture(tmp_path / f"a.{suffix}", mode)
    # CLIP resizes and crops the picture in its own mode and converts it to RGB afterwards
    with Image.open(path) as image:
        expected = PREPROCESS(image)
    assert torch.equal(data.Pictures([(str(path), 3, "c")], PREPROCESS)[0][0], expected)
    assert expected.shape == (3, 16, 16)
    image, label = data.Pictures([(str(path), 3, "c")], data.train_transform(PREPROCESS), seed=1)[0, 0]
    assert image.shape == (3, 16, 16) and label == 3


def test_the_training_transform_crops_flips_and_ends_as_clips():
    crop, flip, *tail = data.train_transform(PREPROCESS).transforms
    assert (crop.size, crop.scale, crop.interpolation) == ((16, 16), (0.08, 1), transforms.InterpolationMode.BICUBIC)
    assert isinstance(flip, transforms.RandomHorizontalFlip) and flip.p == 0.5
    assert tail == PREPROCESS.transforms[2:]


def bytes_of(pixels):
    """Pixels as PREPROCESS normalises them -> 0 to 255."""
    return (pixels * .25 + .5) * 255


def crops(image, path, count=20):
    """Some training crops of a picture."""
    image.save(path)
    train = data.Pictures([(str(path), 0, "c")], data.train_transform(PREPROCESS), seed=1)
    return [bytes_of(train[epoch, 0][0]) for epoch in range(count)]


def test_a_crop_is_resized_by_cubics(tmp_path):
    image = Image.new("L", (9, 9), 64)
    image.paste(192, (4, 0, 9, 9))
    grey = torch.stack(crops(image, tmp_path / "a.png"))
    assert grey.min() < 62 and grey.max() > 194        # a cubic goes beyond the values at an edge; a line never does


def test_a_crop_is_resized_before_it_becomes_rgb(tmp_path):
    # Pillow takes the nearest colours of a palette; in RGB it would mix red and blue
    image = Image.new("P", (9, 9))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([i % 2 for i in range(81)])
    colours = torch.cat([crop.round().int().flatten(1).T for crop in crops(image, tmp_path / "a.png")]).unique(dim=0)
    assert colours.tolist() == [[0, 0, 255], [255, 0, 0]]


def test_half_of_the_crops_are_mirrored(tmp_path):
    image = Image.linear_gradient("L").rotate(90).convert("RGB")                   # brighter to one side
    brighter = [(crop[:, :, -1] > crop[:, :, 0]).all().item() for crop in crops(image, tmp_path / "a.png", 60)]
    assert 18 < sum(brighter) < 42


def test_each_seed_epoch_and_number_has_a_crop_of_its_own(tmp_path):
    item = (str(picture(tmp_path / "a.png")), 0, "c")
    numbers = (0, 1, 2, 11, 12)           # whose sums, products and digits in a row are often the same
    seen = {data.Pictures([item] * 13, data.train_transform(PREPROCESS), seed)[epoch, i][0].numpy().tobytes()
            for seed, epoch, i in itertools.product(numbers, repeat=3)}
    assert len(seen) == 5 ** 3


def test_each_seed_and_epoch_has_an_order_of_its_own():
    orders = set()
    for seed, epoch in itertools.product((0, 1, 2, 11, 12), repeat=2):
        batches = data.Batches(30, 7, seed, epochs=[epoch])
        orders.add(tuple(i for batch in batches for _, i in batch))
    assert len(orders) == 5 ** 2


def test_an_index_without_an_epoch_is_of_epoch_0(pictures):
    assert len(pictures) == 11 and torch.equal(pictures[3][0], pictures[0, 3][0]) and pictures[3][1] == 3


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("cuda", True), ("cuda:1", True)])
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_pin_memory_for_a_gpu(pictures, device, pinned, workers):
    for loader in (data.train_loader(pictures, data.Batches(11, 4, 1), workers, device),
                   data.test_loader(pictures, 4, workers, device)):
        assert (loader.num_workers, loader.pin_memory) == (workers, pinned)


def test_the_same_worker_reads_all_epochs():
    items = [(f"critters/train/0/{i}", 0, "c") for i in range(2)]
    pictures = data.Pictures(items, lambda image: torch.tensor(os.getpid()))
    processes = {pid for pids, _ in data.train_loader(pictures, data.Batches(2, 1, 1, epochs=range(3)), 1)
                 for pid in pids.tolist()}
    assert len(processes) == 1 and os.getpid() not in processes


@pytest.fixture
def pictures():
    items = [(f"critters/train/0/{i}", i, "c") for i in range(11)]
    return data.Pictures(items, data.train_transform(PREPROCESS), seed=5)


def epochs(pictures, batch_size, world=1, workers=0):
    """{(epoch, label): image}, of two epochs, as the ranks of a world see them together."""
    seen = {}
    for rank in range(world):
        batches = data.Batches(len(pictures), batch_size, seed=5, rank=rank, world=world, epochs=(0, 1))
        for number, (images, labels) in enumerate(data.train_loader(pictures, batches, workers)):
            epoch = number // batches.per_epoch
            for image, label in zip(images, labels.tolist()):
                assert (epoch, label) not in seen, "an image came twice"
                seen[epoch, label] = image
    assert len(seen) == 2 * len(pictures)
    return seen


@pytest.mark.parametrize("batch_size, world, workers", [(11, 1, 0), (3, 1, 0), (4, 3, 0), (4, 1, 1), (3, 2, 2)])
def test_a_crop_depends_on_seed_epoch_and_image_alone(pictures, batch_size, world, workers):
    seen = epochs(pictures, batch_size, world, workers)
    assert all(torch.equal(image, pictures[epoch, i][0]) for (epoch, i), image in seen.items())
    assert not torch.equal(seen[0, 7], seen[1, 7])
    other_seed = data.Pictures(pictures.items, pictures.transform, seed=6)
    assert not torch.equal(seen[0, 7], other_seed[0, 7][0])


def test_loading_leaves_the_global_generators_alone(pictures):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    epochs(pictures, 4)
    list(data.test_loader(pictures, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("n, batch_size, world", [(11, 4, 1), (11, 4, 4), (9, 4, 2), (3, 8, 5), (8, 4, 2)])
def test_ranks_share_the_batches_of_one_process(n, batch_size, world):
    orders = []
    for epoch in (0, 1):
        alone = data.Batches(n, batch_size, seed=1, epochs=[epoch])
        ranks = [data.Batches(n, batch_size, seed=1, rank=rank, world=world, epochs=[epoch]) for rank in range(world)]
        for batches in (alone, *ranks):
            assert len(list(batches)) == len(batches) == -(-n // batch_size)
        for whole, *shares in zip(alone, *ranks):
            assert sorted(whole) == sorted(sum(shares, []))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        orders.append([i for batch in alone for _, i in batch])
        assert sorted(orders[-1]) == list(range(n))
    assert orders[0] != orders[1] or n < 4


def test_a_rank_without_images_gets_an_empty_batch(pictures):
    batches = data.Batches(len(pictures), 5, seed=1, rank=1, world=2)              # batches of 5, 5 and 1
    images, labels = list(data.train_loader(pictures, batches))[-1]
    assert images.shape == (0, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (0,) and labels.dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_every_test_picture_is_counted_once(pictures, world):
    test = data.Pictures(pictures.items, PREPROCESS)
    labels = [label for rank in range(world) for _, batch in data.test_loader(test, 4, rank=rank, world=world)
              for label in batch.tolist()]
    assert sorted(labels) == list(range(11))
    if world == 1:
        assert labels == list(range(11))                                                  # in their order
        assert [len(batch) for _, batch in data.test_loader(test, 4)] == [4, 4, 3]


def test_one_look_at_each_folder(tmp_path, monkeypatch):
    paths = [str(picture(tmp_path / f"{c}/{i}.jpg")) for c in "ab" for i in range(3)]
    looks, listdir = [], files.os.listdir
    monkeypatch.setattr(files.os, "listdir", lambda folder: looks.append(folder) or listdir(folder))
    gone = files.missing([*paths, f"{tmp_path}/b/9.jpg", f"{tmp_path}/c/0.jpg"])
    assert gone == [f"{tmp_path}/b/9.jpg", f"{tmp_path}/c/0.jpg"] and len(looks) == 2
