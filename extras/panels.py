"""Panels: pictures with text, colour scales, bars, charts, maps of patches, the table of a transport plan.

They know no model and no run: each function takes numbers or pictures and gives a picture. `stack` puts
panels together, `titled` writes above and below one of them, `sheet` makes a page.
"""

import functools
import math
import re
import string

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip.loader import MEAN, STD

WIDE = 448                             # sides of panels in pixels: three wide ones fill a row,
SMALL = 336                            # or four small ones
GAP = 16                               # between panels
WIDTH = 4 * SMALL + 3 * GAP            # of a row

PAPER = (255, 255, 255)
INK = (26, 22, 30)
FAINT = (110, 106, 114)

# Colours at equal distances, from low to high. why steadily lighter or darker: grey print keeps their order.
HEAT = np.array([(24, 20, 92), (36, 92, 156), (40, 156, 140), (150, 206, 80), (255, 236, 90)])  # cosines
SHADE = np.array([(255, 255, 255), (150, 172, 214), (24, 34, 92)])                              # plans
CURVES = ((24, 34, 92), (214, 90, 20), (20, 130, 90), (160, 40, 130), (120, 120, 120), (180, 140, 0))


# ---- text, and panels side by side -------------------------------------------------------------------------

@functools.cache
def font(size):
    """Pillow's own font, read once for each size."""
    return ImageFont.load_default(size)


def write(panel, xy, text, size=16, fill=INK, anchor="la"):
    """Writes a line of text. The anchor says, in Pillow's letters, which of its points lies at xy."""
    ImageDraw.Draw(panel).text(xy, str(text), fill, font(size), anchor)


def text_panel(text, width=WIDTH, size=16, fill=INK):
    """A paragraph whose lines are broken after spaces and slashes to fit the width."""
    lines = [""]
    for piece in re.findall(r"[^\s/]*/|[^\s/]+\s*|\s+", text):
        longer = lines[-1] + piece
        if lines[-1] and font(size).getlength(longer.rstrip()) > width:
            lines.append(piece)
        else:
            lines[-1] = longer

    height = round(1.35 * size)
    panel = Image.new("RGB", (width, height * len(lines)), PAPER)
    for i, line in enumerate(lines):
        write(panel, (0, height * i), line, size, fill)
    return panel


def stack(panels, across=1, gap=GAP):
    """Panels in rows of `across`; with 1, below each other."""
    rows = [panels[i : i + across] for i in range(0, len(panels), across)]
    widths = [sum(panel.width for panel in row) + gap * (len(row) - 1) for row in rows]
    heights = [max(panel.height for panel in row) for row in rows]
    stacked = Image.new("RGB", (max(widths), sum(heights) + gap * (len(rows) - 1)), PAPER)

    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for panel in row:
            stacked.paste(panel, (x, y))
            x += panel.width + gap
        y += height + gap
    return stacked


def titled(panel, title, caption=""):
    """A panel with a title above it and a caption below."""
    parts = [text_panel(title, panel.width, 20), panel]
    if caption:
        parts.append(text_panel(caption, panel.width, fill=FAINT))
    return stack(parts, gap=6)


def sheet(title, parts):
    """A page: a title, the parts below it, and a margin around them."""
    return ImageOps.expand(stack([text_panel(title, size=24), *parts]), 24, PAPER)


# ---- colours and bars --------------------------------------------------------------------------------------

def colours(values, scale):
    """Numbers from 0 to 1 in the colours of a scale: (...) -> uint8 (..., 3). Others are clipped."""
    at = np.linspace(0, 1, len(scale))
    channels = [np.interp(values, at, channel) for channel in scale.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarged(picture, side):
    """A picture of side x side pixels. why nearest: it shows the pixels that a small picture really has."""
    return picture.resize((side, side), Image.NEAREST if 2 * picture.width < side else Image.BICUBIC)


def over(picture, colour):
    """Colour over a grey copy of the picture."""
    blended = Image.blend(picture.convert("L").convert("RGB"), colour, 0.65)
    return ImageOps.posterize(blended, 5)      # why fewer bits: a third of the file, and nobody sees it


def scale_bar(scale, low, high, width=WIDTH, digits=2):
    """The colours of a scale, and the numbers that five of them stand for."""
    strip = Image.fromarray(np.tile(colours(np.linspace(0, 1, width - 60), scale), (18, 1, 1)))
    if scale is HEAT:                          # why: in the maps these colours lie over a picture
        strip = over(Image.new("L", strip.size, 128), strip)
    panel = Image.new("RGB", (width, 46), PAPER)
    panel.paste(strip, (30, 0))

    for i in range(5):
        x = 30 + (width - 61) * i / 4
        ImageDraw.Draw(panel).line((x, 18, x, 23), INK)
        write(panel, (x, 25), f"{low + (high - low) * i / 4:.{digits}f}", 15, anchor="ma")
    return panel


def bar(share):
    """A bar for a number from 0 to 1, with the number in percent."""
    panel = Image.new("RGB", (WIDE, 26), PAPER)
    for length, colour in ((1, (230, 230, 234)), (share, INK)):
        ImageDraw.Draw(panel).rectangle((0, 0, (WIDE - 70) * length, 16), colour)
    write(panel, (WIDE - 62, 8), f"{share:.1%}", anchor="lm")
    return panel


# ---- charts ------------------------------------------------------------------------------------------------

def chart(series):
    """Curves in one panel, {(letter, colour): [(epoch, value)]}. The letters serve print without colours.

    The axis contains 0, except where the values would then be a flat line, such as values from 0.96 to 1.
    """
    panel = Image.new("RGB", (2 * WIDE, 500), PAPER)     # why twice the size: reduced, the lines are smooth
    draw = ImageDraw.Draw(panel)
    left, right = 124, 2 * WIDE - 24
    top, bottom = 20, 440
    epochs, values = zip(*(point for points in series.values() for point in points))
    last = max(epochs)
    ticks = axis(*axis_ends(values))

    def at(epoch, value):
        up = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + (right - left) * epoch / last, bottom - (bottom - top) * up

    for value in ticks:
        draw.line((at(0, value), at(last, value)), (222, 222, 226), 2)
        write(panel, (left - 16, at(0, value)[1]), f"{value:.4g}", 30, FAINT, "rm")
    for epoch, word in ((0, 0), (last / 2, "epoch"), (last, last)):
        write(panel, (at(epoch, 0)[0], bottom + 12), word, 30, FAINT, "ma")

    for (_, colour), points in series.items():
        draw.line([at(*point) for point in points], colour, 5, "curve")
    # why the letters stand along the curves: at their ends curves meet
    for i, ((letter, colour), points) in enumerate(series.items(), 1):
        xy = at(*points[len(points) * i // (len(series) + 1)])
        draw.text(xy, letter, colour, font(36), "mm", stroke_width=6, stroke_fill=PAPER)
    return panel.reduce(2)


def axis_ends(values):
    """The lowest and the highest value that the axis of a chart must contain."""
    low, high = min(values), max(values)
    if 0 < high - low < 0.2 * max(abs(low), abs(high)):
        return low, high
    return min(0, low), max(0, high)


def axis(low, high):
    """Round numbers at equal distances, at most seven, that enclose low and high."""
    spread = high - low or 1
    unit = 10.0 ** math.floor(math.log10(spread / 5))
    step = unit * next(m for m in (1, 2, 5, 10) if spread / (unit * m) <= 5)
    return [i * step for i in range(math.floor(low / step), math.ceil((low + spread) / step) + 1)]


def curves(logs):
    """A chart for each number in log.jsonl, {run: its lines}. Every run has a letter and a colour."""
    styles = dict(zip(logs, zip(string.ascii_uppercase, CURVES * 5)))              # {run: (letter, colour)}
    names = [text_panel(f"{letter}: {run}, {len(logs[run])} epochs", size=18, fill=colour)
             for run, (letter, colour) in styles.items()]

    fields = dict.fromkeys(field for log in logs.values() for line in log for field in line)
    charts = [titled(chart(points_of(field, logs, styles)), field.replace("_", " "))
              for field in fields if field not in ("epoch", "seconds")]
    return sheet("training curves", [stack(names, gap=0), stack(charts, 3)])


def points_of(field, logs, styles):
    """One number of all logs that have it, as `chart` takes it: {style of the run: [(epoch, value)]}."""
    points = {}
    for run, log in logs.items():
        found = [(line["epoch"], line[field]) for line in log if field in line]
        if found:
            points[styles[run]] = found
    return points


# ---- patches on pixels -------------------------------------------------------------------------------------

def picture_of(image):
    """What the model gets, as a picture again: (3, R, R) after CLIP's transform -> R x R RGB."""
    pixels = image.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return Image.fromarray((255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def patch_box(patch, grid, side):
    """Left, top, right, bottom of a patch in a picture of side x side pixels. Patches run row by row."""
    row, column = divmod(int(patch), grid)
    return [round(side * i / grid) for i in (column, row, column + 1, row + 1)]


def heat_map(picture, values, bounds, side, framed=()):
    """Values of the patches (P,) over the picture, smooth between their middles.

    bounds: the values at the ends of the colour scale. framed: the patches that get a frame and a number.
    """
    grid = math.isqrt(len(values))
    low, high = bounds
    # why resize of "F": Pillow takes a pixel for a square, so the middle of each patch stays its middle
    values = values.cpu().float().view(grid, grid).numpy()
    smooth = Image.fromarray(values).resize((side, side), Image.BICUBIC)
    shown = colours((np.asarray(smooth) - low) / max(high - low, 1e-9), HEAT)
    panel = over(enlarged(picture, side), Image.fromarray(shown))

    draw = ImageDraw.Draw(panel)
    boxes = [patch_box(patch, grid, side) for patch in framed]
    for inset, width, colour in ((0, 4, PAPER), (1, 2, INK)):
        for left, top, right, bottom in boxes:
            corners = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
            draw.rectangle(corners, outline=colour, width=width)

    number_font = font(min(18, side // grid // 2))
    for i, (left, top, *_) in enumerate(boxes, 1):
        draw.text((left + 6, top + 4), str(i), PAPER, number_font, stroke_width=2, stroke_fill=INK)
    return panel


def bounds_of(similarity):
    """The ends of the colour scale that all maps of a class share: its lowest and highest cosine."""
    return similarity.min().item(), similarity.max().item()


def prompt_maps(picture, similarity, bounds, side):
    """A map for each prompt, in common colours, with the three best patches framed: (P, L) -> L panels."""
    maps = []
    for i, column in enumerate(similarity.T, 1):
        best = column.topk(min(3, len(column))).indices
        title = f"local prompt {i}" if similarity.shape[1] > 1 else "the prompt"
        maps.append(titled(heat_map(picture, column, bounds, side, best), title))
    return maps


# ---- the plan ----------------------------------------------------------------------------------------------

def plan_table(plan):
    """A plan (K, L) as a table with its marginals. Its shades run from 0 to 4 times the uniform plan."""
    K, L = plan.shape
    panel = Image.new("RGB", (WIDE, WIDE), PAPER)
    x = np.linspace(74, WIDE - 60, L + 1)      # the edges of the cells
    y = np.linspace(26, WIDE - 30, K + 1)
    size = int(min(16, 0.7 * (y[1] - y[0]), 0.4 * (x[1] - x[0])))

    draw_cells(panel, plan, x, y, size)
    label_prompts(panel, plan.sum(dim=0), x)
    if is_readable(size):
        label_patches(panel, plan.sum(dim=1), y, size)
    return stack([panel, scale_bar(SHADE, 0, 4, WIDE, digits=0)], gap=0)


def is_readable(size):
    """Whether text of this size can be read. Numbers in smaller cells are left out."""
    return size > 8


def draw_cells(panel, plan, x, y, size):
    """The shades of a plan (K, L), in units of the uniform plan, between the edges x (L + 1,), y (K + 1,)."""
    draw = ImageDraw.Draw(panel)
    readable = is_readable(size)
    outline = (200, 200, 206) if readable else None
    apart = 1 if readable else 0

    for u, v in np.ndindex(*plan.shape):
        times = plan[u, v].item() * plan.numel()
        cell = (x[v], y[u], x[v + 1] - apart, y[u + 1] - apart)
        draw.rectangle(cell, tuple(colours(times / 4, SHADE)), outline)
        if readable:
            middle = (x[v] + (x[1] - x[0]) / 2, y[u] + (y[1] - y[0]) / 2)
            write(panel, middle, f"{times:.2f}", size, PAPER if times > 2 else INK, "mm")


def label_prompts(panel, sums, x):
    """The number of each prompt above its column, and the sum (L,) of the column below it."""
    width = x[1] - x[0]
    for v, total in enumerate(sums):
        middle = x[v] + width / 2
        write(panel, (middle, 4), f"prompt {v + 1}" if width > 70 else v + 1, 15, FAINT, "ma")
        write(panel, (middle, WIDE - 14), f"{total:.3f}", min(16, int(0.35 * width)), anchor="mm")
    write(panel, (66, WIDE - 14), "sum", 15, FAINT, "rm")


def label_patches(panel, sums, y, size):
    """The number of each patch left of its row, and the sum (K,) of the row right of it."""
    write(panel, (WIDE, 4), "sum", 15, FAINT, "ra")
    for u, total in enumerate(sums):
        middle = y[u] + (y[1] - y[0]) / 2
        write(panel, (66, middle), f"patch {u + 1}", size, FAINT, "rm")
        write(panel, (WIDE, middle), f"{total:.3f}", size, anchor="rm")
