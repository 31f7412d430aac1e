"""Panels: images with text, in rows, under a title; colour scales, bars and charts. Pillow draws all of it.

No model is known here. `stack` puts panels together, `sheet` puts them under a title.
"""

import functools
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

WIDE, SMALL, GAP = 448, 336, 16        # sides of the panels in pixels: three wide or four small ones fill a row,
WIDTH = 4 * SMALL + 3 * GAP            # which has this width
PAPER, INK, FAINT = (255, 255, 255), (26, 22, 30), (110, 106, 114)
# Colours at equal distances, from low to high. why steadily lighter or darker: their order survives print in grey.
HEAT = np.array([(24, 20, 92), (36, 92, 156), (40, 156, 140), (150, 206, 80), (255, 236, 90)])   # cosines
SHADE = np.array([(255, 255, 255), (150, 172, 214), (24, 34, 92)])                               # mass in the plan
CURVES = ((24, 34, 92), (214, 90, 20), (20, 130, 90), (160, 40, 130), (120, 120, 120), (180, 140, 0))


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def write(panel, xy, text, size=16, fill=INK, anchor="la"):
    """A line of text; the anchor tells, in Pillow's letters, which of its points lies at xy."""
    ImageDraw.Draw(panel).text(xy, str(text), fill, font(size), anchor)


def text_panel(text, width=WIDTH, size=16, fill=INK):
    """A paragraph, its lines broken after spaces and slashes to fit the width."""
    lines = [""]
    for piece in re.findall(r"[^\s/]*/|[^\s/]+\s*|\s+", text):
        if lines[-1] and font(size).getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    panel = Image.new("RGB", (width, round(1.35 * size) * len(lines)), PAPER)
    for i, line in enumerate(lines):
        write(panel, (0, round(1.35 * size) * i), line, size, fill)
    return panel


def stack(panels, across=1, gap=GAP):
    """Panels in rows of `across`; with 1, below each other."""
    rows = [panels[i : i + across] for i in range(0, len(panels), across)]
    width = max(sum(panel.width + gap for panel in row) for row in rows) - gap
    heights = [max(panel.height for panel in row) for row in rows]
    joined, y = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), PAPER), 0
    for row, height in zip(rows, heights):
        x = 0
        for panel in row:
            joined.paste(panel, (x, y))
            x += panel.width + gap
        y += height + gap
    return joined


def titled(panel, title, caption=""):
    """A panel with a title above it and a caption below."""
    below = [text_panel(caption, panel.width, fill=FAINT)] if caption else []
    return stack([text_panel(title, panel.width, 20), panel, *below], gap=6)


def sheet(title, parts):
    """Parts below a title, with a margin."""
    return ImageOps.expand(stack([text_panel(title, size=24), *parts]), 24, PAPER)


def colours(values, scale):
    """Numbers in [0, 1], those beyond it clipped, in the colours of a scale: (...) -> uint8 (..., 3)."""
    at = np.linspace(0, 1, len(scale))
    return np.stack([np.interp(values, at, channel) for channel in scale.T], axis=-1).round().astype(np.uint8)


def enlarged(picture, side):
    """A picture of side x side pixels. why nearest: it shows the pixels that a small picture really has."""
    return picture.resize((side, side), Image.NEAREST if 2 * picture.width < side else Image.BICUBIC)


def over(picture, colour):
    """Colour over a grey copy of the picture."""
    # why fewer bits: the file is a third as large, and the eye sees no difference
    return ImageOps.posterize(Image.blend(picture.convert("L").convert("RGB"), colour, 0.65), 5)


def scale_bar(scale, low, high, width=WIDTH, digits=2):
    """The colours of a scale, and the numbers that five of them stand for."""
    panel = Image.new("RGB", (width, 46), PAPER)
    strip = Image.fromarray(np.tile(colours(np.linspace(0, 1, width - 60), scale), (18, 1, 1)))
    panel.paste(over(Image.new("L", strip.size, 128), strip) if scale is HEAT else strip, (30, 0))
    for i in range(5):
        x = 30 + (width - 61) * i / 4
        ImageDraw.Draw(panel).line((x, 18, x, 23), INK)
        write(panel, (x, 25), f"{low + (high - low) * i / 4:.{digits}f}", 15, anchor="ma")
    return panel


def bar(share):
    """A bar for a number in [0, 1], with the number in percent."""
    panel = Image.new("RGB", (WIDE, 26), PAPER)
    for length, colour in ((1, (230, 230, 234)), (share, INK)):
        ImageDraw.Draw(panel).rectangle((0, 0, (WIDE - 70) * length, 16), colour)
    write(panel, (WIDE - 62, 8), f"{share:.1%}", anchor="lm")
    return panel


def chart(curves):
    """Curves {(letter, colour): [(epoch, value)]} on axes that contain 0; the letters serve print without colours."""
    panel = Image.new("RGB", (2 * WIDE, 500), PAPER)           # why twice the size: reduced, the lines are smooth
    draw, left, top, right, bottom = ImageDraw.Draw(panel), 124, 20, 2 * WIDE - 24, 440
    epochs, values = zip(*(point for points in curves.values() for point in points))
    last, ticks = max(epochs), axis(min(0, *values), max(0, *values))

    def at(epoch, value):
        up = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + (right - left) * epoch / last, bottom - (bottom - top) * up

    for value in ticks:
        draw.line((at(0, value), at(last, value)), (222, 222, 226), 2)
        write(panel, (left - 16, at(0, value)[1]), f"{value:.4g}", 30, FAINT, "rm")
    for epoch, word in ((0, 0), (last / 2, "epoch"), (last, last)):
        write(panel, (at(epoch, 0)[0], bottom + 12), word, 30, FAINT, "ma")
    for (letter, colour), points in curves.items():
        draw.line([at(*point) for point in points], colour, 5, "curve")
    for i, ((letter, colour), points) in enumerate(curves.items(), 1):   # why not at their ends: there curves meet
        xy = at(*points[len(points) * i // (len(curves) + 1)])
        draw.text(xy, letter, colour, font(36), "mm", stroke_width=6, stroke_fill=PAPER)
    return panel.reduce(2)


def axis(low, high):
    """Round numbers at equal distances, at most seven, that enclose low and high."""
    spread = high - low or 1
    unit = 10.0 ** math.floor(math.log10(spread / 5))
    step = unit * next(m for m in (1, 2, 5, 10) if spread / (unit * m) <= 5)
    return [i * step for i in range(math.floor(low / step), math.ceil((low + spread) / step) + 1)]
