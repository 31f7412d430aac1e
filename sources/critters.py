"""A synthetic dataset: drawn critters made of parts, on cluttered grounds, with words for everything shown.

Read top to bottom: words -> a creature and its sentence -> drawing -> the stream of pictures that the tiny
CLIP learns from -> the few-shot benchmark -> pictures out of distribution. figures.py has what the nouns look
like, extras/draw_critters.py draws one picture of each class.

Everything that has a word is named by a phrase, such as "a red star" or "white horns". The phrase says how it
is drawn and stands in captions; a mask says where it is. Each picture has its own random.Random: it depends
on its seed, not on what was drawn before.
"""

import functools
import math
import random
import re
from dataclasses import dataclass, fields, replace

import numpy as np
from PIL import Image, ImageDraw
from sources.figures import BODIES, COLOURS, GROUNDS, INK, PARTS, PATTERNS, box, both, oval, star, tube

SIZE = 64                                             # of a picture; drawn at twice that, for smooth edges


# ---- words ----

WORDS = {  # those of the stream and of the benchmark
    "body": ("blob", "box", "cone", "egg", "star", "heart", "gem"), "pattern": ("stripes", "spots", "checks", "band"),
    "top": ("horns", "ears", "antennae", "crown", "spikes", "hat"), "sides": ("wings", "claws", "fins", "leaves"),
    "bottom": ("legs", "boots", "wheels", "tail", "tentacles"), "prop": tuple(PARTS["prop"])}
UNSEEN = {  # those of the strangers alone
    "body": ("cross", "moon", "vase"), "pattern": WORDS["pattern"], "top": ("bow", "flames"),
    "sides": ("bolts", "oars"), "bottom": ("spring", "skis")}
TEXTURES, UNSEEN_TEXTURES = ("stripes", "spots", "checks", "waves"), ("rings", "bars", "zigzags")


def phrase(colour, noun):
    return f"{colour} {noun}" if noun.endswith(("s", "ae")) else f"a {colour} {noun}"


PHRASES = {slot: [phrase(colour, noun) for colour in COLOURS for noun in nouns] for slot, nouns in WORDS.items()}
PHRASES |= {"eyes": ["one eye", "two eyes", "three eyes"],
            "ground": [*GROUNDS, *(f"a texture of {noun}" for noun in TEXTURES), "a scribble"]}


@dataclass(frozen=True)
class Critter:
    """A creature in words; an empty phrase is a missing part."""
    body: str = ""
    pattern: str = ""
    top: str = ""
    sides: str = ""
    bottom: str = ""
    eyes: str = ""

    def phrases(self):
        return {field.name: text for field in fields(self) if (text := getattr(self, field.name))}


SLOTS = ("ground", *(field.name for field in fields(Critter)), "prop")    # a mask holds places in this, or
CLUTTER = 255                                                             # for things without a word


def sentence(said, adjectives=()):
    """Phrases by slot -> "a red star with white horns and two eyes near a blue tree on grass"."""
    body = " ".join(["a", *adjectives, said["body"].removeprefix("a ")]) if "body" in said else ""
    parts = " and ".join(said[slot] for slot in SLOTS[2:7] if slot in said)
    things = " near ".join(filter(None, [" with ".join(filter(None, [body, parts])), said.get("prop")]))
    ground = said.get("ground", "")
    return f"{things} {GROUNDS[ground][0]}" if things and ground in GROUNDS else things or ground


# ---- drawing ----

class Canvas:
    """A picture at twice its size. Its fourth channel is the mask: which slot each pixel shows.

    why there: one stroke of the pen draws both.
    """

    def __init__(self, colour, rng):
        self.rng = rng
        self.image = Image.new("RGBA", (2 * SIZE, 2 * SIZE), (*self.shade(colour, 24), SLOTS.index("ground")))
        self.pen = ImageDraw.Draw(self.image)
        self.turn, self.shift = 1 + 0j, 0j            # of the figure: its point z lies at z * turn + shift

    @property
    def mask(self):
        return self.image.getchannel("A")

    def shade(self, colour, spread=16):
        """A colour, or one by name, a little changed."""
        return tuple(min(255, max(0, c + self.rng.randint(-spread, spread))) for c in COLOURS.get(colour, colour))

    def place(self, smallest, largest, about=0j):
        """Begins a figure: a random size and turn, and its point `about` somewhere well inside the picture."""
        size, angle = self.rng.uniform(smallest, largest), self.rng.uniform(-.2, .2)
        x, y = (SIZE + self.rng.uniform(-1, 1) * max(SIZE - 1.6 * size, SIZE / 8) for _ in "xy")
        self.turn = size * complex(math.cos(angle), math.sin(angle))
        self.shift = complex(x, y) - about * self.turn

    def draw(self, polygons, colour, value, origin=0j, scale=1, mirrored=False, edge=INK):
        """Fills the polygons and outlines them; with no colour, the outline alone."""
        for polygon in polygons:
            points = [complex(x, y) * scale + origin for x, y in polygon]
            for zs in (points, [-z.conjugate() for z in points]) if mirrored else (points,):
                zs = [z * self.turn + self.shift for z in zs]
                zs = [(round(z.real), round(z.imag)) for z in zs]
                if colour:
                    self.pen.polygon(zs, (*colour, value))
                self.pen.line([*zs, zs[0]], (*edge, value), 3)

    def paint(self, pattern, colour, value, within):
        """Paints a pattern, in the figure's coordinates, over the pixels whose mask is `within`."""
        shown = np.asarray(self.mask) == within
        y, x = shown.nonzero()
        z = (x + 1j * y - self.shift) / self.turn
        shown[shown] = PATTERNS[pattern](z.real, z.imag)
        self.image.paste((*colour, value), mask=Image.fromarray(shown.astype(np.uint8) * 255))

    def finish(self):
        """Light and noise -> the picture and its mask (SIZE, SIZE)."""
        # why this class: numpy keeps its numbers for good
        noise = np.random.RandomState(self.rng.getrandbits(32))
        x = np.linspace(-1, 1, SIZE)
        light = self.rng.uniform(.8, 1.15) + self.rng.uniform(-.15, .15) * x + self.rng.uniform(-.15, .15) * x[:, None]
        pixels = np.asarray(self.image.convert("RGB").reduce(2)) * light[..., None]
        pixels += noise.normal(0, self.rng.uniform(2, 9), pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)), np.asarray(self.mask)[::2, ::2]


def draw_ground(canvas, noun):
    """Marks all over, then some things without a word."""
    _, colour, mark = GROUNDS[noun]
    tint = tuple(int(c * .8 + canvas.rng.choice((0, 50))) for c in colour)
    for _ in range(canvas.rng.randint(15, 35)):
        canvas.place(4, 9)
        canvas.draw([mark], tint, 0, edge=tint)
    for _ in range(canvas.rng.randint(0, 5)):
        canvas.place(3, 8)
        figure = canvas.rng.choice((oval(0, 0, 1, .8), box(-1, -.7, 1, .7), star(3, .6), tube(.2, (-2, 0), (2, 0))))
        canvas.draw([figure], canvas.shade((128, 128, 128), 108), CLUTTER)


def draw_part(canvas, slot, text, origin=0j):
    """A part or a prop, with its own origin at a point of the figure."""
    colour, noun = text.split()[-2:]
    polygons = PARTS[slot][noun]
    jitter = canvas.rng.uniform(-.1, .1) * (1j if slot == "sides" else 1)
    canvas.draw(polygons, canvas.shade(colour), SLOTS.index(slot), origin + jitter, canvas.rng.uniform(.85, 1.2),
                mirrored=slot == "sides")


def draw_face(canvas, eyes):
    value = SLOTS.index("eyes")
    for x in {"one eye": (0,), "two eyes": (-.25, .25), "three eyes": (-.46, 0, .46)}[eyes]:
        canvas.draw([oval(x, -.1, .23, .23)], (250, 250, 250), value)
        canvas.draw([oval(x + canvas.rng.uniform(-.06, .06), -.08, .07, .07)], (10, 10, 10), value)
    canvas.draw([tube(.04, (-.2, .28), (0, .38), (.2, .28))], (60, 20, 30), value)


def draw_critter(canvas, critter):
    """Back to front. A part without a body is drawn larger, and in its own middle."""
    outline, top, side, bottom = BODIES[critter.body.split()[-1] if critter.body else "blob"]
    origins = {"bottom": bottom * 1j, "sides": side + 0j, "top": top * 1j}
    shown = critter.phrases()
    canvas.place(*((24, 34) if critter.body else (20, 40)), 0j if critter.body else origins[[*shown][0]].imag * 1j)
    for slot in ("bottom", "sides", "body", "pattern", "top", "eyes"):
        text, value = shown.get(slot), SLOTS.index(slot)
        if text and slot in origins:
            draw_part(canvas, slot, text, origins[slot])
        elif text and slot == "body":
            canvas.draw([outline], canvas.shade(text.split()[-2]), value)
        elif text and slot == "pattern":
            canvas.paint(text.split()[-1], canvas.shade(text.split()[-2]), value, within=SLOTS.index("body"))
            canvas.draw([outline], None, SLOTS.index("body"))
        elif text:
            draw_face(canvas, text)


def scene(rng, critter=None, prop=""):
    """A ground, a prop or none, a creature or none -> picture, mask, and by slot every phrase that is true of it."""
    ground = rng.choice(list(GROUNDS))
    canvas = Canvas(GROUNDS[ground][1], rng)
    draw_ground(canvas, ground)
    said = {"ground": ground}
    if prop:
        canvas.place(12, 18 if critter else 28)
        draw_part(canvas, "prop", prop)
        said["prop"] = prop
    if critter:
        draw_critter(canvas, critter)
        said |= critter.phrases()
    return *canvas.finish(), said


def texture(rng, families):
    """A pattern in two colours all over."""
    family, (first, second) = rng.choice(families), rng.sample(list(COLOURS), 2)
    canvas = Canvas(first, rng)
    canvas.place(12, 40)
    canvas.turn *= 1j ** rng.uniform(0, 4)
    canvas.paint(family, canvas.shade(second), 0, within=0)
    return *canvas.finish(), {"ground": f"a texture of {family}"}


def scribble(rng, sharp=False):
    """Wandering lines, smooth or sharp."""
    canvas = Canvas(rng.choice(list(COLOURS)), rng)
    for _ in range(rng.randint(2, 6)):
        line, angle = [complex(rng.uniform(0, 2 * SIZE), rng.uniform(0, 2 * SIZE))], rng.uniform(0, 6)
        for _ in range(rng.randint(8, 30)):
            angle += rng.uniform(1, 5) if sharp else rng.gauss(0, .5)
            line.append(line[-1] + (rng.uniform(12, 40) if sharp else 8) * complex(math.cos(angle), math.sin(angle)))
        colour = canvas.shade(rng.choice(list(COLOURS)))
        canvas.pen.line([(z.real, z.imag) for z in line], (*colour, SLOTS.index("ground")), rng.randint(2, 6))
    return *canvas.finish(), {"ground": "a scribble"}


# ---- the stream that the tiny CLIP learns from ----

def random_critter(rng, words=WORDS, missing=.12):
    """A creature of random words; each part but the body may be missing, the pattern more often."""
    parts = {slot: phrase(rng.choice(list(COLOURS)), rng.choice(words[slot])) for slot in SLOTS[1:6]}
    parts["eyes"] = rng.choice(PHRASES["eyes"])
    chance = {"body": 0, "pattern": .4}
    return Critter(**{slot: "" if rng.random() < chance.get(slot, missing) else text for slot, text in parts.items()})


def random_prop(rng, chance=.6):
    return rng.choice(PHRASES["prop"]) if rng.random() < chance else ""


def sample(rng):
    """One example of the stream -> picture, mask (SIZE, SIZE), phrases by slot; `sentence` makes a caption of these.

    Whole creatures; single parts and bodies; scenes without a creature; textures; scribbles.
    """
    kind = rng.choices(("critter", "part", "scene", "texture", "scribble"), (64, 20, 8, 4, 4))[0]
    if kind == "texture":
        return texture(rng, TEXTURES)
    if kind == "scribble":
        return scribble(rng)
    slot = rng.choice(("body", "body", "top", "sides", "bottom"))
    critter = {"critter": random_critter(rng), "part": Critter(**{slot: rng.choice(PHRASES[slot])})}.get(kind)
    return scene(rng, critter, random_prop(rng, .9 if kind == "scene" else .4))


# ---- the benchmark: 4 kinds, and of each 4 near-twins that differ in one part ----

KINDS = (
    (Critter("a red star", "", "", "blue wings", "green boots", "two eyes"), "top",
     {"horned": "white horns", "spiky": "purple spikes", "crowned": "a yellow crown", "long-eared": "black ears"}),
    (Critter("a blue egg", "", "a yellow hat", "", "pink legs", "one eye"), "sides",
     {"winged": "red wings", "clawed": "white claws", "finned": "purple fins", "leafy": "green leaves"}),
    (Critter("a pink heart", "black spots", "blue antennae", "white fins", "", "two eyes"), "bottom",
     {"booted": "green boots", "wheeled": "black wheels", "tailed": "a yellow tail", "tentacled": "purple tentacles"}),
    (Critter("a green box", "yellow stripes", "", "purple claws", "black wheels", "three eyes"), "top",
     {"horned": "red horns", "hatted": "a blue hat", "crowned": "a white crown", "long-eared": "black ears"}))
CLASSES = tuple((f"{hint} {kind.body.removeprefix('a ')}", replace(kind, **{slot: part}))
                for kind, slot, twins in KINDS for hint, part in twins.items())
POOL = {"train": 64, "val": 40, "test": 60}           # pictures per class


def class_names():
    """The names by label; each hints at the part by which it differs from its near-twins."""
    return [name for name, _ in CLASSES]


def describe(critter):
    """All that is to be said of a creature, in the grammar of the captions."""
    return sentence(critter.phrases())


def descriptions():
    return [describe(critter) for _, critter in CLASSES]


def example(split, label, index):
    """Picture number `index` < POOL[split] of a class, its mask and its phrases by slot; always the same."""
    if not 0 <= index < POOL[split]:
        raise IndexError(f"there is no {split} picture {index}: each class has {POOL[split]}")
    rng = random.Random(f"{split}/{label}/{index}")
    return scene(rng, CLASSES[label][1], random_prop(rng))


def picture(split, label, index):
    """That picture alone, SIZE x SIZE RGB."""
    return example(split, label, index)[0]


# ---- out of distribution, from near to far ----

def relative(rng):
    """A class's body, shape and colour; all else is drawn anew, and no near-twin has any of it."""
    critter = rng.choice(CLASSES)[1]
    taken = {text for _, twin in CLASSES if twin.body == critter.body for text in twin.phrases().values()}
    return replace(critter, **{slot: rng.choice([text for text in PHRASES[slot] if text not in taken])
                               for slot in ("pattern", "top", "sides", "bottom", "eyes")})


OOD = {
    "near": lambda rng: scene(rng, relative(rng), random_prop(rng)),
    "strangers": lambda rng: scene(rng, random_critter(rng, UNSEEN), random_prop(rng)),
    "scenes": lambda rng: scene(rng, None, random_prop(rng, 1)),
    "textures": lambda rng: texture(rng, UNSEEN_TEXTURES),
    "scribbles": lambda rng: scribble(rng, sharp=True)}
OOD_SETS, OOD_SIZE = tuple(OOD), 200


def ood_picture(name, index):
    """Picture number `index` < OOD_SIZE of an OOD set, SIZE x SIZE RGB."""
    return OOD[name](random.Random(f"{name}/{index}"))[0]


# ---- paths: a picture has no file, it is drawn when it is read ----

PATH = re.compile(r"critters/(train|val|test)/(\d+)/(\d+)|critters/ood/(\w+)/(\d+)")


def paths(name):
    """Paths and labels of all pictures of a split, or of an OOD set, where the label is -1."""
    if name in OOD_SETS:
        return [(f"critters/ood/{name}/{index}", -1) for index in range(OOD_SIZE)]
    return [(f"critters/{name}/{label}/{index}", label) for label in range(len(CLASSES)) for index in range(POOL[name])]


def is_path(path):
    """Whether `read` knows this path."""
    return PATH.fullmatch(path) is not None


@functools.lru_cache(maxsize=4096)   # why: an epoch reads them again, and 4096 of them take 50 MB
def read(path):
    """The picture that one of `paths` stands for. Raises ValueError for a path that is none of them."""
    split, label, index, odd, odd_index = PATH.fullmatch(path).groups()
    if label and int(label) >= len(CLASSES):
        raise ValueError(f"{path}: the drawn classes are 0 to {len(CLASSES) - 1}")
    if odd and odd not in OOD:
        raise ValueError(f"{path}: the drawn OOD sets are {', '.join(OOD)}")
    try:
        return ood_picture(odd, int(odd_index)) if odd else picture(split, int(label), int(index))
    except IndexError as error:
        raise ValueError(f"{path}: {error}") from error
