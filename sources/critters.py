"""A synthetic dataset: drawn critters made of parts, on cluttered grounds, with words for everything shown.

Read top to bottom: words -> a creature and its sentence -> drawing -> the stream of pictures that the tiny
CLIP learns from -> the few-shot benchmark -> pictures out of distribution -> paths. figures.py has what the
nouns look like, canvas.py draws, extras/draw_critters.py shows one picture of each class.

Everything that has a word is named by a phrase, such as "a red star" or "white horns". The phrase says how it
is drawn and stands in captions; a mask says where it is. Each picture has its own random.Random: it depends
on its seed, not on what was drawn before.
"""

import functools
import math
import random
import re
from dataclasses import dataclass, fields, replace

from sources.canvas import SIZE, Canvas
from sources.figures import BODIES, COLOURS, GROUNDS, PARTS, box, oval, star, tube


# ---- words ----

WORDS = {  # those of the stream and of the benchmark
    "body": ("blob", "box", "cone", "egg", "star", "heart", "gem"),
    "pattern": ("stripes", "spots", "checks", "band"),
    "top": ("horns", "ears", "antennae", "crown", "spikes", "hat"),
    "sides": ("wings", "claws", "fins", "leaves"),
    "bottom": ("legs", "boots", "wheels", "tail", "tentacles"),
    "prop": tuple(PARTS["prop"])}
UNSEEN = {  # those of the strangers alone
    "body": ("cross", "moon", "vase"),
    "pattern": WORDS["pattern"],
    "top": ("bow", "flames"),
    "sides": ("bolts", "oars"),
    "bottom": ("spring", "skis")}
TEXTURES = ("stripes", "spots", "checks", "waves")
UNSEEN_TEXTURES = ("rings", "bars", "zigzags")


def phrase(colour, noun):
    """A noun in a colour, with an article where it is one thing."""
    return f"{colour} {noun}" if noun.endswith(("s", "ae")) else f"a {colour} {noun}"


PHRASES = {slot: [phrase(colour, noun) for colour in COLOURS for noun in nouns]
           for slot, nouns in WORDS.items()}
PHRASES["eyes"] = ["one eye", "two eyes", "three eyes"]
PHRASES["ground"] = [*GROUNDS, *(f"a texture of {noun}" for noun in TEXTURES), "a scribble"]


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
        """The phrases of the parts that are there, by slot."""
        return {field.name: text for field in fields(self) if (text := getattr(self, field.name))}


SLOTS = ("ground", *(field.name for field in fields(Critter)), "prop")    # a mask holds places in this,
CLUTTER = 255                                                             # or this for things without a word


def sentence(said, adjectives=()):
    """Phrases by slot -> "a red star with white horns and two eyes near a blue tree on grass"."""
    things = []                                       # bodies, their parts, props: those that are said
    if "body" in said:
        things.append(" ".join(["a", *adjectives, said["body"].removeprefix("a ")]))
    parts = " and ".join(said[slot] for slot in SLOTS[2:7] if slot in said)
    if parts:
        things = [" with ".join([*things, parts])]
    if "prop" in said:
        things.append(said["prop"])

    ground = said.get("ground", "")
    if not things:
        return ground
    if ground in GROUNDS:
        return f"{' near '.join(things)} {GROUNDS[ground][0]}"
    return " near ".join(things)


# ---- drawing ----

def draw_ground(canvas, noun):
    """Marks all over, then some things without a word."""
    rng = canvas.rng
    _, colour, mark = GROUNDS[noun]
    tint = tuple(int(c * .8 + rng.choice((0, 50))) for c in colour)
    for _ in range(rng.randint(15, 35)):
        canvas.place(4, 9)
        canvas.draw([mark], tint, SLOTS.index("ground"), edge=tint)

    clutter = (oval(0, 0, 1, .8), box(-1, -.7, 1, .7), star(3, .6), tube(.2, (-2, 0), (2, 0)))
    for _ in range(rng.randint(0, 5)):
        canvas.place(3, 8)
        figure = rng.choice(clutter)
        canvas.draw([figure], canvas.shade((128, 128, 128), 108), CLUTTER)


def draw_part(canvas, slot, text, origin=0j):
    """A part or a prop, with its own origin at a point of the figure."""
    colour, noun = text.split()[-2:]
    direction = 1j if slot == "sides" else 1          # parts at the sides move up and down, others sideways
    origin += canvas.rng.uniform(-.1, .1) * direction
    shade = canvas.shade(colour)
    scale = canvas.rng.uniform(.85, 1.2)
    canvas.draw(PARTS[slot][noun], shade, SLOTS.index(slot), origin, scale, mirrored=slot == "sides")


EYES = {"one eye": (0,), "two eyes": (-.25, .25), "three eyes": (-.46, 0, .46)}     # where they are


def draw_face(canvas, eyes):
    """Eyes and a mouth."""
    value = SLOTS.index("eyes")
    for x in EYES[eyes]:
        canvas.draw([oval(x, -.1, .23, .23)], (250, 250, 250), value)
        pupil = x + canvas.rng.uniform(-.06, .06)
        canvas.draw([oval(pupil, -.08, .07, .07)], (10, 10, 10), value)
    canvas.draw([tube(.04, (-.2, .28), (0, .38), (.2, .28))], (60, 20, 30), value)


def draw_critter(canvas, critter):
    """Back to front. A part without a body is drawn larger, and in its own middle."""
    outline, top, side, bottom = BODIES[critter.body.split()[-1] if critter.body else "blob"]
    origins = {"bottom": bottom * 1j, "sides": side + 0j, "top": top * 1j}
    shown = critter.phrases()
    if critter.body:
        canvas.place(24, 34)
    else:
        canvas.place(20, 40, origins[next(iter(shown))].imag * 1j)

    for slot in ("bottom", "sides", "body", "pattern", "top", "eyes"):
        if slot not in shown:
            continue
        text = shown[slot]
        value = SLOTS.index(slot)
        if slot in origins:
            draw_part(canvas, slot, text, origins[slot])
        elif slot == "body":
            canvas.draw([outline], canvas.shade(text.split()[-2]), value)
        elif slot == "pattern":
            colour, noun = text.split()[-2:]
            canvas.paint(noun, canvas.shade(colour), value, within=SLOTS.index("body"))
            canvas.draw([outline], None, SLOTS.index("body"))
        else:
            draw_face(canvas, text)


def scene(rng, critter=None, prop=""):
    """A ground, and a prop and a creature where given -> picture, mask, every phrase that is true by slot."""
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
    family = rng.choice(families)
    first, second = rng.sample(list(COLOURS), 2)
    ground = SLOTS.index("ground")
    canvas = Canvas(first, rng)
    canvas.place(12, 40)
    canvas.turn *= 1j ** rng.uniform(0, 4)
    canvas.paint(family, canvas.shade(second), ground, within=ground)
    return *canvas.finish(), {"ground": f"a texture of {family}"}


def scribble(rng, sharp=False):
    """Wandering lines, smooth or sharp."""
    canvas = Canvas(rng.choice(list(COLOURS)), rng)
    for _ in range(rng.randint(2, 6)):
        points = wander(rng, sharp)
        colour = (*canvas.shade(rng.choice(list(COLOURS))), SLOTS.index("ground"))
        canvas.pen.line([(z.real, z.imag) for z in points], colour, rng.randint(2, 6))
    return *canvas.finish(), {"ground": "a scribble"}


def wander(rng, sharp):
    """The points of one line: short steps that turn a little, or sharp turns after long ones."""
    points = [complex(rng.uniform(0, 2 * SIZE), rng.uniform(0, 2 * SIZE))]
    angle = rng.uniform(0, 6)
    for _ in range(rng.randint(8, 30)):
        angle += rng.uniform(1, 5) if sharp else rng.gauss(0, .5)
        length = rng.uniform(12, 40) if sharp else 8
        points.append(points[-1] + length * complex(math.cos(angle), math.sin(angle)))
    return points


# ---- the stream that the tiny CLIP learns from ----

def random_critter(rng, words=WORDS, missing=.12):
    """A creature of random words; each part but the body may be missing, the pattern more often."""
    parts = {slot: phrase(rng.choice(list(COLOURS)), rng.choice(words[slot])) for slot in SLOTS[1:6]}
    parts["eyes"] = rng.choice(PHRASES["eyes"])
    chances = {"body": 0, "pattern": .4}              # of being missing
    for slot in parts:
        if rng.random() < chances.get(slot, missing):
            parts[slot] = ""
    return Critter(**parts)


def random_prop(rng, chance=.6):
    """A prop, or none."""
    return rng.choice(PHRASES["prop"]) if rng.random() < chance else ""


def sample(rng):
    """One example of the stream -> picture, mask (SIZE, SIZE), phrases by slot; `sentence` makes captions.

    Whole creatures; single parts and bodies; scenes without a creature; textures; scribbles.
    """
    kind = rng.choices(("critter", "part", "scene", "texture", "scribble"), (64, 20, 8, 4, 4))[0]
    if kind == "texture":
        return texture(rng, TEXTURES)
    if kind == "scribble":
        return scribble(rng)
    slot = rng.choice(("body", "body", "top", "sides", "bottom"))
    # why both, whatever the kind: without one of them all pictures of the stream would be others
    whole = random_critter(rng)
    part = Critter(**{slot: rng.choice(PHRASES[slot])})
    critter = {"critter": whole, "part": part, "scene": None}[kind]
    return scene(rng, critter, random_prop(rng, .9 if kind == "scene" else .4))


# ---- the benchmark: 4 kinds, and of each 4 near-twins that differ in one part ----

KINDS = (
    (Critter("a red star", "", "", "blue wings", "green boots", "two eyes"), "top",
     {"horned": "white horns", "spiky": "purple spikes", "crowned": "a yellow crown",
      "long-eared": "black ears"}),
    (Critter("a blue egg", "", "a yellow hat", "", "pink legs", "one eye"), "sides",
     {"winged": "red wings", "clawed": "white claws", "finned": "purple fins", "leafy": "green leaves"}),
    (Critter("a pink heart", "black spots", "blue antennae", "white fins", "", "two eyes"), "bottom",
     {"booted": "green boots", "wheeled": "black wheels", "tailed": "a yellow tail",
      "tentacled": "purple tentacles"}),
    (Critter("a green box", "yellow stripes", "", "purple claws", "black wheels", "three eyes"), "top",
     {"horned": "red horns", "hatted": "a blue hat", "crowned": "a white crown",
      "long-eared": "black ears"}))
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
    """Those of the classes, by label."""
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
    parts = {}
    for slot in ("pattern", "top", "sides", "bottom", "eyes"):
        parts[slot] = rng.choice([text for text in PHRASES[slot] if text not in taken])
    return replace(critter, **parts)


OOD = {
    "near": lambda rng: scene(rng, relative(rng), random_prop(rng)),
    "strangers": lambda rng: scene(rng, random_critter(rng, UNSEEN), random_prop(rng)),
    "scenes": lambda rng: scene(rng, None, random_prop(rng, 1)),
    "textures": lambda rng: texture(rng, UNSEEN_TEXTURES),
    "scribbles": lambda rng: scribble(rng, sharp=True)}
OOD_SETS = tuple(OOD)
OOD_SIZE = 200                                        # pictures of each


def ood_picture(name, index):
    """Picture number `index` < OOD_SIZE of an OOD set, SIZE x SIZE RGB."""
    return OOD[name](random.Random(f"{name}/{index}"))[0]


# ---- paths: a picture has no file, it is drawn when it is read ----

PATH = re.compile(r"critters/(train|val|test)/(\d+)/(\d+)|critters/ood/(\w+)/(\d+)")


def paths(name):
    """Paths and labels of all pictures of a split, or of an OOD set, where the label is -1."""
    if name in OOD_SETS:
        return [(f"critters/ood/{name}/{index}", -1) for index in range(OOD_SIZE)]
    return [(f"critters/{name}/{label}/{index}", label)
            for label in range(len(CLASSES)) for index in range(POOL[name])]


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
    if odd and int(odd_index) >= OOD_SIZE:
        raise ValueError(f"{path}: there is no picture {odd_index}: each OOD set has {OOD_SIZE}")
    try:
        if odd:
            return ood_picture(odd, int(odd_index))
        return picture(split, int(label), int(index))
    except IndexError as error:
        raise ValueError(f"{path}: {error}") from error
