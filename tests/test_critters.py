"""The drawn world: seeded, consistent with its words, and separate where it claims to be."""

import hashlib
import math
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import ImageDraw

from sources import critters, figures


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def examples(count, draw=critters.sample):
    return [draw(random.Random(f"test {i}")) for i in range(count)]


def main_colour(rgb):
    """The colour word nearest to most of these pixels (n, 3), ink aside."""
    rgb = rgb[np.abs(rgb - np.array(figures.INK)).max(axis=1) > 45]
    names = list(critters.COLOURS)
    distances = [np.square(rgb - np.array(colour)).sum(axis=1) for colour in critters.COLOURS.values()]
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


TABLE = """
horned red star: a red star with white horns and blue wings and green boots and two eyes
spiky red star: a red star with purple spikes and blue wings and green boots and two eyes
crowned red star: a red star with a yellow crown and blue wings and green boots and two eyes
long-eared red star: a red star with black ears and blue wings and green boots and two eyes
winged blue egg: a blue egg with a yellow hat and red wings and pink legs and one eye
clawed blue egg: a blue egg with a yellow hat and white claws and pink legs and one eye
finned blue egg: a blue egg with a yellow hat and purple fins and pink legs and one eye
leafy blue egg: a blue egg with a yellow hat and green leaves and pink legs and one eye
booted pink heart: a pink heart with black spots and blue antennae and white fins and green boots and two eyes
wheeled pink heart: a pink heart with black spots and blue antennae and white fins and black wheels and two eyes
tailed pink heart: a pink heart with black spots and blue antennae and white fins and a yellow tail and two eyes
tentacled pink heart: a pink heart with black spots and blue antennae and white fins and purple tentacles and two eyes
horned green box: a green box with yellow stripes and red horns and purple claws and black wheels and three eyes
hatted green box: a green box with yellow stripes and a blue hat and purple claws and black wheels and three eyes
crowned green box: a green box with yellow stripes and a white crown and purple claws and black wheels and three eyes
long-eared green box: a green box with yellow stripes and black ears and purple claws and black wheels and three eyes
"""


def test_the_classes_in_their_order():
    rows = [line.split(": ") for line in TABLE.strip().splitlines()]
    assert critters.class_names() == [name for name, _ in rows]
    assert critters.descriptions() == [text for _, text in rows]


def test_the_sizes_of_the_benchmark():
    assert critters.POOL == {"train": 64, "val": 40, "test": 60}
    assert critters.OOD_SETS == ("near", "strangers", "scenes", "textures", "scribbles") and critters.OOD_SIZE == 200
    assert critters.SIZE == 64
    for split, count in critters.POOL.items():
        critters.picture(split, 15, count - 1)                      # the last one is there
        with pytest.raises(IndexError):
            critters.picture(split, 15, count)


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


@pytest.mark.parametrize("said, text", [
    ({"body": "a red star", "top": "white horns", "eyes": "two eyes", "prop": "a blue tree", "ground": "grass"},
     "a red star with white horns and two eyes near a blue tree on grass"),
    ({"body": "a red star", "ground": "snow"}, "a red star in snow"),
    ({"eyes": "one eye", "bottom": "pink legs", "top": "a blue hat"}, "a blue hat and pink legs and one eye"),
    ({"prop": "a blue tree", "ground": "night"}, "a blue tree at night"),
    ({"ground": "bricks"}, "bricks"),
    ({"ground": "a texture of waves"}, "a texture of waves"),
    ({}, ""),
])
def test_a_sentence_by_hand(said, text):
    assert critters.sentence(said) == text


def test_adjectives_stand_before_the_body():
    assert critters.sentence({"body": "a red star", "prop": "a blue tree"}, ["great", "horned"]) == \
        "a great horned red star near a blue tree"


@pytest.mark.parametrize("noun, text", [("star", "a red star"), ("horns", "red horns"), ("antennae", "red antennae")])
def test_a_phrase_has_an_article_for_one_thing_and_none_for_several(noun, text):
    assert critters.phrase("red", noun) == text


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


def close(points, expected):
    np.testing.assert_allclose(points, expected, atol=1e-9)


def test_polygons_by_hand():
    h = math.sqrt(.5)
    oval = figures.oval(1, 2, 3, 4)                                # 24 points, one each 15 degrees
    assert len(oval) == 24
    close([oval[0], oval[3], oval[6], oval[12]], [(4, 2), (1 + 3 * h, 2 + 4 * h), (1, 6), (-2, 2)])
    close(figures.box(1, 2, 3, 4), [(1, 2), (3, 2), (3, 4), (1, 4)])
    close(figures.star(2, .5), [(0, -1.15), (.5, 0), (0, 1.15), (-.5, 0)])      # up, right, down, left
    # a bar of half-width 1 along (0, 0), (0, 4): its direction is (0, 1), so its sides are 1 to the left and right
    close(figures.tube(1, (0, 0), (0, 4)), [(-1, 0), (-1, 4), (1, 4), (1, 0)])
    # with a bend at (3, 4) the side there stands across the line from the first to the last point, (0, 0)-(6, 0)
    close(figures.tube(.5, (0, 0), (3, 4), (6, 0))[1::3], [(3, 4.5), (3, 3.5)])
    triangle = [(1, 0), (2, 0), (2, 1)]
    assert figures.both(triangle) == [triangle, [(-1, 0), (-2, 0), (-2, 1)]]


@pytest.mark.parametrize("name, shown, hidden", [      # points on both sides of an edge of the pattern
    ("stripes", (.39, 5), (.4, 5)),                    # sin 8x changes its sign at pi/8 = .3927
    ("spots", (.15, .1), (.15, .16)),                  # cos 1.2 + cos .8 = .36 + .70 > .7; .36 + cos 1.28 = .36 + .29
    ("checks", (.62, .62), (.62, .64)),                # sin 5y changes its sign at pi/5 = .628
    ("band", (9, .42), (9, .44)), ("band", (9, -.12), (9, -.14)),                       # from .15 - .28 to .15 + .28
    # y = pi/8 makes sin 4y = 1: 6x + 1.5 = pi at x = .2736; without the wave the edge would be at .5236
    ("waves", (.26, math.pi / 8), (.28, math.pi / 8)),
    ("rings", (.3, .32), (.32, .33)),                  # 7 r = pi at r = .4488; the radii are .4386 and .4597
    ("bars", (.17, .79), (.17, .06)),                  # sin 1.53 = 1.00: sin 2y is 1.00 and .12, the limit is .2
    ("bars", (.32, .79), (.34, .79)),                  # sin 2.88 = .26, sin 3.06 = .08
    # y = 1.5 is in the middle of a tooth: the edge is where 5x = pi - asin .1 = 3.0414, x = .6083
    ("zigzags", (.60, 1.5), (.62, 1.5)),
    ("zigzags", (.30, 2.), (.32, 2.)),                 # at its end |0 - .5| = .5: 5x = 3.0414 - 1.5, x = .3083
])
def test_patterns_by_hand(name, shown, hidden):
    assert figures.PATTERNS[name](*shown) and not figures.PATTERNS[name](*hidden)


class Fixed(random.Random):
    """Its draws from an interval are all at one place of it: 0 is the lower end, 1 the upper."""

    def __init__(self, *places):
        super().__init__(0)
        self.places, self.drawn = places, 0

    def uniform(self, low, high):
        place = self.places[self.drawn % len(self.places)]
        self.drawn += 1
        return low + place * (high - low)

    def randint(self, low, high):
        return low if self.places[0] == 0 else high


def test_light_and_noise_by_hand():
    # drawn in this order: brightness, its slope to the right and to the bottom, the deviation of the noise
    for places, corners, deviation in [((0, 1, .5, 0), (.65, .95, .65, .95), 2),       # .8 -+ .15 to the right
                                       ((1, .5, 1, 1), (1., 1., 1.3, 1.3), 9),         # 1.15 -+ .15 to the bottom
                                       ((0, 0, 0, 0), (1.1, .8, .8, .5), 2)]:
        canvas = critters.Canvas((100, 100, 100), random.Random(0))
        canvas.image.paste((100, 100, 100), (0, 0, 128, 128))
        canvas.rng = Fixed(*places)
        values = pixels(canvas.finish()[0])
        corner = [values[:8, :8], values[:8, -8:], values[-8:, :8], values[-8:, -8:]]
        # the middle of a corner of 8 pixels lies 3.5 of 31.5 from the edge, at 8/9 of the way from the centre
        middle = np.mean(corners)
        expected = [100 * (middle + (c - middle) * 8 / 9) for c in corners]
        np.testing.assert_allclose([part.mean() for part in corner], expected, atol=.3 * deviation)
        assert abs(np.std(values[:, :, 0] - values[:, :, 1]) - deviation * math.sqrt(2)) < .1 * deviation


def test_light_does_not_overflow():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.rng = Fixed(1, .5, .5, 1)
    assert (pixels(canvas.finish()[0]) == 255).mean() > .5          # 244 * 1.15 is 280: cut, not wrapped around to 24


def test_a_picture_is_half_the_canvas():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.image.paste((0, 0, 0, 3), (0, 0, 20, 10))
    picture, mask = canvas.finish()
    assert canvas.image.size == canvas.mask.size == (128, 128) and picture.size == (64, 64)
    assert (mask[:5, :10] == 3).all() and (mask == 3).sum() == 50   # 20 x 10 halved


def test_each_pixel_is_the_mean_of_four_of_the_canvas():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.image.paste((0, 0, 0), (0, 0, 128, 128))
    canvas.image.paste((240, 240, 240), (64, 0, 65, 128))           # one column of two that become column 32
    canvas.rng = Fixed(0, .5, .5, 0)                                # light .8
    columns = pixels(canvas.finish()[0]).mean((0, 2))
    assert columns[32] == pytest.approx(.8 * 120, abs=2) and columns[31] < 2 and columns[33] < 2


def test_a_figure_lies_where_its_turn_and_shift_say():
    canvas = critters.Canvas("black", random.Random(0))
    canvas.turn, canvas.shift = 10j, 64 + 64j            # ten times as large, a quarter turn: 64 - 10y, 64 + 10x
    canvas.draw([figures.box(1, 2, 3, 4)], (255, 0, 0), 5)
    ys, xs = np.nonzero(np.asarray(canvas.mask) == 5)
    # x from 64 - 40 to 64 - 20, y from 64 + 10 to 64 + 30, and the line around it is 3 wide
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (23, 45, 73, 95)
    assert canvas.image.getpixel((34, 84)) == (255, 0, 0, 5) and canvas.image.getpixel((24, 84)) == (*figures.INK, 5)


def test_a_mirrored_figure_is_drawn_twice_and_without_colour_it_is_an_outline():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.turn, canvas.shift = 10 + 0j, 64 + 64j
    canvas.draw([figures.box(1, -1, 3, 1)], None, 6, mirrored=True)
    mask = np.asarray(canvas.mask)
    assert mask[64, 74] == mask[64, 94] == mask[64, 54] == mask[64, 34] == 6
    assert mask[64, 84] == mask[64, 44] == 0


def test_a_pattern_is_painted_within_one_value_of_the_mask_alone():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.turn, canvas.shift = 100 + 0j, 64 + 49j       # the band, y from -.13 to .43, covers rows 36 to 92
    canvas.image.paste((200, 200, 200, 7), (0, 0, 64, 128))
    canvas.paint("band", (9, 9, 9), 2, within=7)
    mask = np.asarray(canvas.mask)
    ys, xs = np.nonzero(mask == 2)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (0, 63, 37, 91) or \
        (xs.min(), xs.max(), ys.min(), ys.max()) == (0, 63, 36, 92)
    assert canvas.image.getpixel((10, 60)) == (9, 9, 9, 2) and canvas.image.getpixel((100, 60))[:3] != (9, 9, 9)
    assert set(np.unique(mask)) == {0, 2, 7}


def test_shades_stay_near_their_colour_and_are_colours():
    canvas = critters.Canvas("white", random.Random(0))
    shades = np.array([canvas.shade("red", 20) for _ in range(400)])
    assert (np.abs(shades - (214, 40, 40)).max(0) == 20).all()      # (214, 40, 40) is red
    ends = np.array([canvas.shade((250, 5, 128)) for _ in range(400)])
    assert ends.min(0).tolist() == [234, 0, 112] and ends.max(0).tolist() == [255, 21, 144]     # 16 up and down, cut


def test_a_figure_is_placed_within_the_picture():
    canvas = critters.Canvas("white", random.Random(0))
    canvas.rng = Fixed(0, .5, 1, 0)                      # size 10, no turn, far right, far up
    canvas.place(10, 20)
    # 64 +- (64 - 1.6 * 10): 112 to the right, 16 from above
    assert canvas.turn == pytest.approx(10) and canvas.shift == pytest.approx(112 + 16j)
    canvas.rng = Fixed(1, 1, 1, 1)                       # size 40: 64 - 1.6 * 40 = 0 is less than 64 / 8; turned by .2
    canvas.place(10, 40, about=1j)
    turn = 40 * complex(math.cos(.2), math.sin(.2))
    assert canvas.turn == pytest.approx(turn) and canvas.shift == pytest.approx(72 + 72j - 1j * turn)


def test_the_stream_has_the_kinds_that_the_model_card_says(monkeypatch):
    seen = []
    monkeypatch.setattr(critters, "texture", lambda rng, families: seen.append(("texture", families)))
    monkeypatch.setattr(critters, "scribble", lambda rng: seen.append(("scribble",)))
    monkeypatch.setattr(critters, "scene", lambda rng, critter, prop: seen.append((
        "scene" if critter is None else "part" if len(critter.phrases()) == 1 else "critter", critter, prop)))
    n, rng = 20000, random.Random(0)
    for _ in range(n):
        critters.sample(rng)
    counts = Counter(kind for kind, *_ in seen)
    for kind, share in {"critter": 64, "part": 20, "scene": 8, "texture": 4, "scribble": 4}.items():
        assert counts[kind] / n == pytest.approx(share / 100, abs=.01), kind
    for kind, share in {"critter": .4, "part": .4, "scene": .9}.items():
        assert np.mean([bool(rest[1]) for k, *rest in seen if k == kind]) == pytest.approx(share, abs=.03), kind
    parts = Counter(slot for k, *rest in seen if k == "part" for slot in rest[0].phrases())
    for slot, share in {"body": .4, "top": .2, "sides": .2, "bottom": .2}.items():      # bodies twice as often
        assert parts[slot] / counts["part"] == pytest.approx(share, abs=.03), slot
    assert {rest[0] for k, *rest in seen if k == "texture"} == {critters.TEXTURES}


def test_parts_are_missing_as_often_as_said():
    rng = random.Random(0)
    drawn = [critters.random_critter(rng).phrases() for _ in range(4000)]
    for slot in critters.SLOTS[1:7]:
        expected = {"body": 1, "pattern": .6}.get(slot, .88)
        assert np.mean([slot in said for said in drawn]) == pytest.approx(expected, abs=.02), slot
    for slot in ("body", "pattern", "top", "sides", "bottom", "eyes"):
        assert {said.get(slot, "") for said in drawn} - {""} == set(critters.PHRASES[slot])
    assert np.mean([bool(critters.random_prop(rng)) for _ in range(4000)]) == pytest.approx(.6, abs=.03)


def test_the_drawings_are_those_that_the_tiny_model_was_trained_on(monkeypatch):
    """tiny.pt.gz and all figures of the embedded default belong to these drawings: of every noun, of every class,
    of the stream and of each OOD set. The digest tells that none has changed, not that they are right.

    It is taken over what is drawn with which colour, in whole pixels, so that another Pillow leaves it as it is.
    """
    drawn, real = [], ImageDraw.Draw

    class Pen:
        def __init__(self, image):
            self.pen = real(image)

        def polygon(self, points, fill):
            drawn.append(("polygon", points, fill))
            self.pen.polygon(points, fill)

        def line(self, points, fill, width):
            drawn.append(("line", [(round(x), round(y)) for x, y in points], fill, width))
            self.pen.line(points, fill, width)

    def recorded(method):
        def call(canvas, *args, **kw):
            result = method(canvas, *args, **kw)
            place = [f"{part:.3f}" for z in (getattr(canvas, "turn", 1), getattr(canvas, "shift", 0))
                     for part in (z.real, z.imag)]
            drawn.append((method.__name__, args, kw, result, place))
            return result
        return call

    monkeypatch.setattr(ImageDraw, "Draw", Pen)
    for name in ("shade", "paint"):
        monkeypatch.setattr(critters.Canvas, name, recorded(getattr(critters.Canvas, name)))
    for words in (critters.WORDS, critters.UNSEEN):
        for slot in ("body", "pattern", "top", "sides", "bottom"):
            for noun in words[slot]:
                text = {slot: critters.phrase("pink", noun)}
                critters.scene(random.Random(noun), critters.Critter(**{"body": "a red egg", **text}))
                if slot != "pattern":                               # a pattern needs a body; other parts stand alone
                    critters.scene(random.Random(noun), critters.Critter(**text), "a red fence")
    for label in range(16):
        drawn.append(critters.example("test", label, label)[2])
    for name in critters.OOD_SETS:
        for index in range(8):
            critters.ood_picture(name, index)
    drawn += [phrases for _, _, phrases in examples(60)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest() == \
        "bc8164e99417c0ee2008b7d7e97170575d1b725486e6d2a062f3814a8a88c872"


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


def test_a_class_that_is_not_drawn_is_refused():
    with pytest.raises(ValueError, match="critters/train/99/0: the drawn classes are 0 to 15"):
        critters.read("critters/train/99/0")
