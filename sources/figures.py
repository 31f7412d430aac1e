"""What the nouns of the drawn critters look like: polygons, patterns and colours.

Each figure has its own coordinates. A body is about 2 wide, around (0, 0); y points down. A part is drawn
around the point of the body where it begins, a prop around its own middle. Seen and unseen nouns are listed
together.
"""

import math

import numpy as np


def oval(x, y, rx, ry):
    """24 points around (x, y), with these radii."""
    return [(x + rx * math.cos(i * math.pi / 12), y + ry * math.sin(i * math.pi / 12)) for i in range(24)]


def box(x0, y0, x1, y1):
    """The rectangle between two of its corners."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def star(points, inner):
    """So many points at 1.15 from the middle, corners between them at `inner`. The first one points up."""
    radii = [1.15, inner] * points
    angles = [i * math.pi / points for i in range(2 * points)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles)]


def tube(width, *points):
    """A bent bar along a line of points. width: half of the bar's own."""
    left = []
    right = []
    for i, (x, y) in enumerate(points):
        x0, y0 = points[max(i - 1, 0)]
        x1, y1 = points[min(i + 1, len(points) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) / width
        left.append((x + (y0 - y1) / length, y + (x1 - x0) / length))
        right.append((x - (y0 - y1) / length, y - (x1 - x0) / length))
    return left + right[::-1]


def both(*polygons):
    """The polygons and their mirror images."""
    return [*polygons, *([(-x, y) for x, y in polygon] for polygon in polygons)]


HEART = [(1.05 * math.sin(t) ** 3, .05 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 15)
         for t in (i * math.pi / 16 for i in range(32))]
CROSS = [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
         (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]
VASE = [(-.9, -1), (.9, -1), (.2, 0), (.9, 1), (-.9, 1), (-.2, 0)]

BODIES = {                                     # noun: outline, and where parts begin: top y, side x, bottom y
    "blob": (oval(0, 0, 1, .95), -.85, .9, .85),
    "box": (box(-.85, -.85, .85, .85), -.85, .82, .82),
    "cone": ([(0, -1.1), (1, .85), (-1, .85)], -.6, .5, .82),
    "egg": (oval(0, 0, .62, 1), -.85, .55, .9),
    "star": (star(5, .55), -.75, .75, .6),
    "heart": (HEART, -.6, .8, .8),
    "gem": ([(0, -1.1), (.85, 0), (0, 1.1), (-.85, 0)], -.7, .6, .75),
    "cross": (CROSS, -.85, .9, .9),
    "vase": (VASE, -.9, .3, .9),
    "moon": (oval(0, 0, 1, 1)[5:20] + [(x + .45, y) for x, y in oval(0, 0, .75, .8)[19:4:-1]], -.85, .6, .85)}

PARTS = {
    "top": {
        "horns": both([(.12, .12), (.55, .1), (.85, -.8), (.4, -.4)]),
        "ears": both(oval(.45, -.35, .27, .5)),
        "antennae": both(tube(.1, (.2, .15), (.45, -.6)), oval(.48, -.72, .2, .2)),
        "crown": [[(-.55, .12), (.55, .12), (.68, -.65), (.3, -.28), (0, -.8), (-.3, -.28), (-.68, -.65)]],
        "spikes": both([(0, .15), (.36, .15), (.2, -.65)], [(.38, .2), (.74, .25), (.62, -.5)]),
        "hat": [box(-.8, -.08, .8, .14), box(-.45, -.8, .45, -.08)],
        "bow": both([(0, -.15), (.75, -.6), (.75, .3)]),
        "flames": [[(-.6, .2), (-.75, -.5), (-.35, -.2), (-.1, -1.1), (.2, -.25), (.6, -.7), (.6, .2)]]},
    "sides": {                                        # the right one
        "wings": [[(-.15, .3), (-.1, -.1), (.6, -.75), (1, -.6), (.95, -.1), (.7, 0), (.75, .35), (.4, .3),
                   (.2, .6)]],
        "claws": [tube(.11, (-.2, .1), (.45, 0)),
                  [(.3, .1), (.35, -.35), (.65, -.55), (1, -.4), (.65, -.2), (.6, 0), (1, .15), (.75, .4),
                   (.4, .3)]],
        "fins": [[(-.2, -.35), (.75, .45), (-.2, .5)]],
        "leaves": [oval(.35, -.3, .2, .48), oval(.5, .25, .48, .2)],
        "bolts": [[(-.15, 0), (.45, -.6), (.4, -.15), (1, -.4), (.35, .4), (.4, .05)]],
        "oars": [tube(.1, (-.2, .3), (.6, -.4)), oval(.75, -.5, .32, .32)]},
    "bottom": {
        "legs": both(box(.18, -.15, .42, .8)),
        "wheels": both(oval(.48, .28, .38, .38), oval(.48, .28, .15, .15)),
        "boots": both([(.15, -.15), (.45, -.15), (.45, .3), (.85, .35), (.85, .7), (.15, .7)]),
        "tail": [tube(.14, (0, -.15), (.05, .35), (.4, .7), (.8, .65), (1.05, .3))],
        "tentacles": [tube(.11, (x, -.15), (x * 1.2 - .1, .2), (x * 1.2 + .1, .5), (x * 1.4 - .05, .8))
                      for x in (-.5, -.17, .17, .5)],
        "spring": [tube(.11, (-.3, -.1), (.4, .1), (-.4, .3), (.4, .5), (-.4, .7))],
        "skis": both(tube(.08, (.3, -.1), (.4, .5)), box(.05, .5, 1, .68))},
    "prop": {
        "flower": [*(oval(.5 * x, .5 * y, .35, .35) for x, y in star(5, 0)[::2]), oval(0, 0, .25, .25)],
        "mushroom": [box(-.2, 0, .2, .8), [(-.8, .1), (-.6, -.4), (0, -.65), (.6, -.4), (.8, .1)]],
        "fence": [box(-1, -.2, 1, 0), *(box(x - .12, -.6, x + .12, .6) for x in (-.75, -.25, .25, .75))],
        "house": [box(-.65, -.1, .65, .8), [(-.9, -.1), (0, -.85), (.9, -.1)], box(-.15, .3, .15, .8)],
        "tree": [box(-.13, .3, .13, .9), [(-.6, .4), (0, -.3), (.6, .4)],
                 [(-.45, -.1), (0, -.9), (.45, -.1)]],
        "cloud": [oval(-.5, .1, .45, .35), oval(.5, .1, .45, .35), oval(0, -.1, .55, .5)]}}

GROUNDS = {                                           # noun: said how, colour, what lies about on it
    "grass": ("on grass", (104, 160, 72), [(-.1, 0), (.15, 0), (.2, -.8)]),
    "sand": ("on sand", (214, 190, 128), oval(0, 0, .2, .2)),
    "snow": ("in snow", (224, 228, 240), star(6, .4)),
    "night": ("at night", (58, 60, 118), star(4, .2)),
    "bricks": ("by bricks", (172, 96, 80), box(-1.1, -.5, 1.1, .5)),
    "water": ("in water", (78, 138, 196), tube(.1, (-1, 0), (-.4, -.3), (.4, -.3), (1, 0)))}

PATTERNS = {                                          # true where the second colour shows
    "stripes": lambda x, y: np.sin(8 * x) > 0,
    "spots": lambda x, y: np.cos(8 * x) + np.cos(8 * y) > .7,
    "checks": lambda x, y: np.sin(5 * x) * np.sin(5 * y) > 0,
    "band": lambda x, y: abs(y - .15) < .28,
    "waves": lambda x, y: np.sin(6 * x + 1.5 * np.sin(4 * y)) > 0,
    "rings": lambda x, y: np.sin(7 * np.hypot(x, y)) > 0,
    "bars": lambda x, y: np.sin(9 * x) * np.sin(2 * y) > .2,
    "zigzags": lambda x, y: np.sin(5 * x + 3 * abs(y % 1 - .5)) > .1}

COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 84, 220),
    "green": (36, 150, 60),
    "yellow": (246, 216, 36),
    "purple": (128, 48, 172),
    "pink": (246, 128, 184),
    "white": (244, 244, 244),
    "black": (30, 30, 34)}

INK = (26, 22, 30)                                    # the outline of every figure
