"""The drawn world: seeded, consistent with its words, and separate where it claims to be."""

import random
from itertools import combinations

import numpy as np
import pytest

import critters


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def examples(count, draw=critters.sample):
    return [draw(random.Random(f"test {i}")) for i in range(count)]


def main_colour(rgb):
    """The colour word nearest to most of these pixels (n, 3), ink aside."""
    rgb = rgb[np.abs(rgb - np.array(critters.INK)).max(axis=1) > 45]
    names, distances = list(critters.COLOURS), [np.square(rgb - np.array(c)).sum(axis=1) for c in critters.COLOURS.values()]
    return names[np.bincount(np.argmin(distances, axis=0), minlength=8).argmax()]


def test_same_seed_same_picture_whatever_was_drawn_before():
    first, again = critters.picture("train", 3, 5), None
    critters.picture("val", 0, 0)
    again = critters.picture("train", 3, 5)
    assert first.size == (critters.SIZE, critters.SIZE) and first.mode == "RGB"
    np.testing.assert_array_equal(pixels(first), pixels(again))


def test_pools_do_not_overlap():
    seen = {critters.picture(split, label, index).tobytes() for split in critters.POOL for label in (0, 7, 15)
            for index in range(6)}
    assert len(seen) == 3 * 3 * 6


@pytest.mark.parametrize("index", [-1, critters.POOL["val"]])
def test_a_picture_outside_the_pool_is_an_error(index):
    with pytest.raises(IndexError, match=str(index)):
        critters.picture("val", 0, index)


def test_sixteen_classes_of_four_kinds_with_names_of_their_own():
    names, kinds = critters.class_names(), {critter.body for _, critter in critters.CLASSES}
    assert len(names) == len(set(names)) == len(set(critters.descriptions())) == 16
    assert len(kinds) == 4
    for name, critter in critters.CLASSES:
        assert name.endswith(critter.body.removeprefix("a "))       # the name tells the kind


def test_near_twins_differ_in_exactly_one_part():
    for (_, one), (_, other) in combinations(critters.CLASSES, 2):
        differing = [slot for slot in critters.SLOTS[1:7] if getattr(one, slot) != getattr(other, slot)]
        assert len(differing) == 1 if one.body == other.body else len(differing) > 1


def test_every_phrase_of_a_class_belongs_to_the_words_of_the_stream():
    for _, critter in critters.CLASSES:
        assert all(text in critters.PHRASES[slot] for slot, text in critter.phrases().items())


def test_description_names_every_part():
    for name, critter in critters.CLASSES:
        assert all(text in critters.describe(critter) for text in critter.phrases().values())
    assert critters.describe(critters.Critter(body="a red star")) == "a red star"


def test_mask_and_phrases_name_the_same_slots():
    for _, mask, phrases in examples(60):
        shown = {critters.SLOTS[value] for value in np.unique(mask) if value != critters.CLUTTER}
        assert shown <= {"ground", *phrases}                        # what is drawn is said
        assert set(phrases) <= set(critters.SLOTS)
        assert mask.shape == (critters.SIZE, critters.SIZE)


def test_pixels_of_a_part_have_the_colour_that_its_phrase_says():
    right = []
    for image, mask, phrases in examples(80):
        for slot in ("body", "top", "sides", "bottom", "prop"):
            inside, said = pixels(image)[mask == critters.SLOTS.index(slot)], phrases.get(slot, "black").split()[-2:][0]
            if len(inside) > 40 and said != "black":                # black is the colour of the ink as well
                right.append(main_colour(inside) == said)
    assert len(right) > 50 and np.mean(right) > .9                 # in the light of a picture, white may look pink


def test_every_seen_and_unseen_noun_can_be_drawn():
    for words in (critters.WORDS, critters.UNSEEN):
        for slot in ("body", "top", "sides", "bottom"):
            for noun in words[slot]:
                critter = critters.Critter(**{slot: critters.phrase("red", noun)})
                _, mask, _ = critters.scene(random.Random(noun), critter)
                assert (mask == critters.SLOTS.index(slot)).sum() > 20, noun


def test_unseen_words_never_enter_the_stream():
    told = {word for _, _, phrases in examples(150) for text in phrases.values() for word in text.split()}
    for slot in ("body", "top", "sides", "bottom"):
        assert not set(critters.UNSEEN[slot]) & (told | set(critters.WORDS[slot]))
    assert not set(critters.UNSEEN_TEXTURES) & (told | set(critters.TEXTURES))


def test_words_and_looks_are_the_same_nouns():
    for slot in ("top", "sides", "bottom"):
        assert {*critters.WORDS[slot], *critters.UNSEEN[slot]} == set(critters.PARTS[slot])
    assert {*critters.WORDS["body"], *critters.UNSEEN["body"]} == set(critters.BODIES)


def test_near_pictures_have_a_body_of_a_class_and_nothing_else_of_its_twins():
    for critter in examples(50, critters.relative):
        twins = [twin for _, twin in critters.CLASSES if twin.body == critter.body]
        assert twins and not any(critter.phrases()[slot] == text for twin in twins
                                 for slot, text in twin.phrases().items() if slot != "body")


@pytest.mark.parametrize("name", critters.OOD_SETS)
def test_ood_pictures_are_seeded_and_all_different(name):
    seen = {critters.ood_picture(name, index).tobytes() for index in range(12)}
    assert len(seen) == 12 and critters.ood_picture(name, 0).tobytes() in seen
    assert critters.ood_picture(name, critters.OOD_SIZE - 1).size == (critters.SIZE, critters.SIZE)
