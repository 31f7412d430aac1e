"""A picture that is drawn together with its mask: figures, patterns, light and noise.

It knows no words: a figure is a list of polygons in coordinates of its own. All chance is that of one Random.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from sources.figures import COLOURS, INK, PATTERNS

SIZE = 64                                             # of a picture; drawn at twice that, for smooth edges


class Canvas:
    """A picture at twice its size. Its fourth channel is the mask: a number for what a pixel shows, first 0.

    why there: one stroke of the pen draws both.
    """

    def __init__(self, colour, rng):
        self.rng = rng
        self.image = Image.new("RGBA", (2 * SIZE, 2 * SIZE), (*self.shade(colour, 24), 0))
        self.pen = ImageDraw.Draw(self.image)
        self.turn = 1 + 0j                            # of the figure: its point z lies at z * turn + shift
        self.shift = 0j

    @property
    def mask(self):
        """The fourth channel, as a picture of its own."""
        return self.image.getchannel("A")

    def shade(self, colour, spread=16):
        """A colour, or one by name, a little changed."""
        channels = COLOURS.get(colour, colour)
        return tuple(min(255, max(0, c + self.rng.randint(-spread, spread))) for c in channels)

    def place(self, smallest, largest, about=0j):
        """Begins a figure: a random size and turn, and its point `about` somewhere well inside."""
        size = self.rng.uniform(smallest, largest)
        angle = self.rng.uniform(-.2, .2)
        room = max(SIZE - 1.6 * size, SIZE / 8)
        x = SIZE + self.rng.uniform(-1, 1) * room
        y = SIZE + self.rng.uniform(-1, 1) * room
        self.turn = size * complex(math.cos(angle), math.sin(angle))
        self.shift = complex(x, y) - about * self.turn

    def draw(self, polygons, colour, value, origin=0j, scale=1, mirrored=False, edge=INK):
        """Fills the polygons and outlines them; without a colour, the outline alone. value: for the mask."""
        for polygon in polygons:
            points = [complex(x, y) * scale + origin for x, y in polygon]
            self.draw_polygon(points, colour, value, edge)
            if mirrored:
                self.draw_polygon([-z.conjugate() for z in points], colour, value, edge)

    def draw_polygon(self, points, colour, value, edge):
        """One polygon, in the figure's coordinates."""
        placed = [z * self.turn + self.shift for z in points]
        pixels = [(round(z.real), round(z.imag)) for z in placed]
        if colour:
            self.pen.polygon(pixels, (*colour, value))
        self.pen.line([*pixels, pixels[0]], (*edge, value), 3)

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
        light = self.rng.uniform(.8, 1.15) + self.rng.uniform(-.15, .15) * x
        light = light + self.rng.uniform(-.15, .15) * x[:, None]         # (SIZE, SIZE): it comes from a side

        pixels = np.asarray(self.image.convert("RGB").reduce(2)) * light[..., None]
        pixels += noise.normal(0, self.rng.uniform(2, 9), pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
        return picture, np.asarray(self.mask)[::2, ::2]
