"""Draws what a run has learned and how: the paper's Figure 2, the patch streams, a training batch, training curves.

    python -m extras.visualize RUN                                      Figure 2 for eight pictures of the test split
    python -m extras.visualize RUN --images a.jpg b.png --class NAME    for your own, with the prompts of a class you name
    python -m extras.visualize RUN --streams                            the same prompts on all three kinds of patch tokens
    python -m extras.visualize RUN --batch                              the first training batch, after augmentation
    python -m extras.visualize --curves RUN [RUN ...]                   every number of log.jsonl over the epochs

PNG files go to RUN/pictures. Read Figure 2 beside Sec. 3.4: `look` computes what `figure_2` shows. A method without
patches or a plan gets the panels that it has. Before them come the panels themselves, which know no model: `stack` puts
them together, `sheet` puts them under a title.
"""

import difflib
import functools
import math
import re
import string
from pathlib import Path
from typing import NamedTuple

import clip  # before torch: it bounds how long torch's threads wait

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from harness import machine, places, run_pictures, runs
from harness.parser import Parser
from clip.loader import MEAN, STD
from clip.precision import unit
from methods.lsn import LSN
from methods.variants import IndependentTopK
from sources.listing import normal
from sotglp import SOTGLP, check_support, saliency, sparse_transport

WIDE, SMALL, GAP = 448, 336, 16        # sides of the panels in pixels: three wide or four small ones fill a row,
WIDTH = 4 * SMALL + 3 * GAP            # which has this width
PAPER, INK, FAINT = (255, 255, 255), (26, 22, 30), (110, 106, 114)
# Colours at equal distances, from low to high. why steadily lighter or darker: their order survives print in grey.
HEAT = np.array([(24, 20, 92), (36, 92, 156), (40, 156, 140), (150, 206, 80), (255, 236, 90)])   # cosines
SHADE = np.array([(255, 255, 255), (150, 172, 214), (24, 34, 92)])                               # mass in the plan
CURVES = ((24, 34, 92), (214, 90, 20), (20, 130, 90), (160, 40, 130), (120, 120, 120), (180, 140, 0))


# ---- panels: images with text, colour scales, bars, charts ---------------------------------------------------

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
    """Curves {(letter, colour): [(epoch, value)]}; the letters serve print without colours.

    The axis contains 0 unless the values, such as some between 0.96 and 1, would then be a flat line.
    """
    panel = Image.new("RGB", (2 * WIDE, 500), PAPER)           # why twice the size: reduced, the lines are smooth
    draw, left, top, right, bottom = ImageDraw.Draw(panel), 124, 20, 2 * WIDE - 24, 440
    epochs, values = zip(*(point for points in curves.values() for point in points))
    low, high = min(values), max(values)
    if not 0 < high - low < 0.2 * max(abs(low), abs(high)):
        low, high = min(0, low), max(0, high)
    last, ticks = max(epochs), axis(low, high)

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


# ---- patches on pixels ---------------------------------------------------------------------------------------

def picture_of(image):
    """What the model gets, as a picture again: (3, R, R) after CLIP's transform -> R x R RGB."""
    pixels = image.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return Image.fromarray((255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def patch_box(patch, grid, side):
    """Left, top, right, bottom of a patch in a picture of side x side pixels; patches run row by row."""
    row, column = divmod(int(patch), grid)
    return [round(side * i / grid) for i in (column, row, column + 1, row + 1)]


def heat_map(picture, values, bounds, side, framed=()):
    """Values of the patches (P,) over the picture, smooth between their middles; some patches framed and numbered.

    bounds: the values at the ends of the colour scale.
    """
    grid = math.isqrt(len(values))
    # why resize of "F": Pillow takes a pixel for a square, so the middle of each patch stays its middle
    smooth = Image.fromarray(values.cpu().float().view(grid, grid).numpy()).resize((side, side), Image.BICUBIC)
    shown = colours((np.asarray(smooth) - bounds[0]) / max(bounds[1] - bounds[0], 1e-9), HEAT)
    panel = over(enlarged(picture, side), Image.fromarray(shown))
    boxes = [patch_box(patch, grid, side) for patch in framed]
    for inset, width, colour in ((0, 4, PAPER), (1, 2, INK)):
        for left, top, right, bottom in boxes:
            corners = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
            ImageDraw.Draw(panel).rectangle(corners, outline=colour, width=width)
    for i, (left, top, *_) in enumerate(boxes, 1):
        ImageDraw.Draw(panel).text((left + 6, top + 4), str(i), PAPER, font(min(18, side // grid // 2)),
                                   stroke_width=2, stroke_fill=INK)
    return panel


# ---- what the model makes of a picture -----------------------------------------------------------------------

class Look(NamedTuple):
    """What is drawn of one picture. None: the method has no such thing."""
    probabilities: dict                  # {score: (C,)}; the first score decides
    label: int                           # the class whose prompts are shown
    similarity: torch.Tensor             # (P, L): cosines of the patches with its prompts
    support: torch.Tensor = None         # (K,): the patches kept, the most salient one first
    plan: torch.Tensor = None            # (K, L), rows in this order
    prompt_cosines: torch.Tensor = None  # (L, L), of the prompts of the class


@torch.no_grad()
def look(model, images, text_features, label=None):
    """The scores of a picture (1, 3, R, R), and what its patches say of a class: of `label`, else the predicted one."""
    outputs = model(images, None, text_features)
    probabilities = {name: score[0].softmax(dim=0) for name, score in model.scores(outputs).items()}
    if label is None:
        label = int(model.logits(outputs)[0].argmax())
    similarity = patch_cosines(model, images, text_features, label)                # (P, L)
    alike = prompt_cosines(model, text_features, label)
    if not model.has_plan and not shares_support(model):
        return Look(probabilities, label, similarity, prompt_cosines=alike)
    n_support = getattr(model, "n_support", len(similarity))
    support, plan = transport(similarity, n_support, model.epsilon, model.n_iters) # (K,), (K, L)
    return Look(probabilities, label, similarity, support, plan if model.has_plan else None, alike)


def shares_support(model):
    """Whether all prompts of a class look at the same patches: SOT-GLP and what is built on it."""
    return isinstance(model, SOTGLP) and not isinstance(model, IndependentTopK)


@torch.no_grad()
def patch_cosines(model, images, text_features, label):
    """Cosines of a picture's patches with the prompts of a class that patches are compared with: (P, L).  Sec. 3.4

    images: (1, 3, R, R), or the pair that `clip.encode_patches` made of them. None of a method that uses no patches.
    """
    if text_features is None:                                                      # each picture has its own
        return model.cosines(images, None)[1][0, :, [label]]                       # (P, 1)
    prompts = patch_prompts(model, text_features)[[label]]                         # (1, L, D), or (1, D) where L is 1
    cosines = []
    # why one by one: a method's `cosines` averages over the prompts that it is given
    for prompt in prompts.split(1, dim=1) if prompts.dim() == 3 else [prompts]:
        given = prompt
        if isinstance(text_features, tuple):
            kinds = [*text_features]
            kinds[patch_kind(model)] = prompt
            given = tuple(kinds)
        cosines.append(model.cosines(images, given)[1])                            # (1, P, 1)
    return None if cosines[0] is None else torch.cat(cosines, dim=2)[0]


def patch_kind(model):
    """Which of several kinds of text features patches are compared with: the last; of LSN the positive ones."""
    return 0 if isinstance(model, LSN) else -1


def patch_prompts(model, text_features):
    """The text features that patches are compared with: (C, L, D), or (C, D) where L is 1."""
    return text_features[patch_kind(model)] if isinstance(text_features, tuple) else text_features


def prompt_cosines(model, text_features, label):
    """The cosines of the prompts of a class that patches are compared with: (L, L); None where it has one prompt."""
    if text_features is None:
        return None
    prompts = patch_prompts(model, text_features)
    if prompts.dim() < 3 or prompts.shape[1] < 2:
        return None
    prompts = unit(prompts[label])         # why: PLOT++ has raw text features
    return prompts @ prompts.T


def transport(similarity, n_support, epsilon=0.1, n_iters=20):
    """The support, the most salient patch first, and its plan: (P, L) -> patches (K,), plan (K, L).  Eq. 8-9"""
    kept, plan, patches = (part[0, 0] for part in sparse_transport(similarity[None, None], n_support, epsilon, n_iters))
    order = saliency(kept).argsort(descending=True)
    return patches[order], plan[order]


# ---- Figure 2 ------------------------------------------------------------------------------------------------

def figure_2(model, text_features, image, name, truth=None, label=None):
    """All panels of one picture (3, R, R). truth: its label, where known; label: whose prompts are shown.  Figure 2"""
    seen, picture = look(model, image[None], text_features, label), picture_of(image)
    top, maps = [titled(enlarged(picture, WIDE), "the picture", "as the model saw it")], []
    if seen.similarity is not None:
        bounds = seen.similarity.min().item(), seen.similarity.max().item()
        maps = [stack(prompt_maps(picture, seen.similarity, bounds, SMALL), 4), scale_bar(HEAT, *bounds),
                text_panel("cosine of a patch and a prompt, in the same colours in all maps; framed: the three best "
                           f"patches of each prompt{told_of_prompts(seen.prompt_cosines)}", fill=FAINT)]
    if seen.support is not None:
        support = heat_map(picture, saliency(seen.similarity), bounds, WIDE, seen.support)
        top.append(titled(support, "the support", f"mean cosine over the prompts (Eq. 7); framed: the "
                          f"{len(seen.support)} best patches, which all prompts share (Eq. 8)"))
    if seen.plan is not None:
        top.append(titled(plan_table(seen.plan), "the transport plan", "how much of each patch goes to each prompt, "
                          f"in units of the uniform plan, 1 / {seen.plan.numel()} (Eq. 9)"))
    return sheet(f"{name}, with the prompts of \"{model.class_names[seen.label]}\"",
                 [stack(top, 3, (WIDTH - 3 * WIDE) // 2), *maps, bars(seen, model.class_names, truth)])


def told_of_prompts(cosines):
    """What the caption of the maps says of prompts that are nearly alike: else equal maps would look like a fault."""
    if cosines is None:
        return ""
    first, second = torch.triu_indices(len(cosines), len(cosines), 1)
    pairs = [f"{i + 1} and {j + 1} ({cosines[i, j]:.2f})" for i, j in zip(first.tolist(), second.tolist())
             if cosines[i, j] > 0.95]
    return f"; nearly alike by their cosine, and so are their maps: prompts {', '.join(pairs)}" if pairs else ""


def prompt_maps(picture, similarity, bounds, side):
    """A map for each prompt, in common colours, with the three best patches framed: (P, L) -> L panels."""
    return [titled(heat_map(picture, column, bounds, side, column.topk(min(3, len(column))).indices),
                   f"local prompt {i}" if similarity.shape[1] > 1 else "the prompt")
            for i, column in enumerate(similarity.T, 1)]


def plan_table(plan):
    """A plan (K, L) as a table in shades from 0 to 4 times uniform, whatever it holds, and its marginals."""
    K, L = plan.shape
    panel = Image.new("RGB", (WIDE, WIDE), PAPER)
    x, y = np.linspace(74, WIDE - 60, L + 1), np.linspace(26, WIDE - 30, K + 1)    # the edges of the cells
    width, height = x[1] - x[0], y[1] - y[0]
    size = int(min(16, 0.7 * height, 0.4 * width))
    readable = size > 8                                                            # else the numbers are left out
    for u, v in np.ndindex(K, L):
        times, cell = plan[u, v].item() * K * L, (x[v], y[u], x[v + 1] - readable, y[u + 1] - readable)
        ImageDraw.Draw(panel).rectangle(cell, tuple(colours(times / 4, SHADE)), (200, 200, 206) if readable else None)
        if readable:
            write(panel, (x[v] + width / 2, y[u] + height / 2), f"{times:.2f}", size, PAPER if times > 2 else INK, "mm")
    for v in range(L):
        write(panel, (x[v] + width / 2, 4), f"prompt {v + 1}" if width > 70 else v + 1, 15, FAINT, "ma")
        write(panel, (x[v] + width / 2, WIDE - 14), f"{plan[:, v].sum():.3f}", min(16, int(0.35 * width)), anchor="mm")
    write(panel, (66, WIDE - 14), "sum", 15, FAINT, "rm")
    if readable:
        write(panel, (WIDE, 4), "sum", 15, FAINT, "ra")
        for u in range(K):
            write(panel, (66, y[u] + height / 2), f"patch {u + 1}", size, FAINT, "rm")
            write(panel, (WIDE, y[u] + height / 2), f"{plan[u].sum():.3f}", size, anchor="rm")
    return stack([panel, scale_bar(SHADE, 0, 4, WIDE, digits=0)], gap=0)


def bars(seen, class_names, truth):
    """The probabilities of the predicted class, the true one and the one shown, by each score."""
    equations = {"fused": " (Sec. 3.5)", "global": " (Eq. 4-5)", "local": " (Eq. 10-11)"}
    words = {int(next(iter(seen.probabilities.values())).argmax()): "predicted"}   # {label: what it is}
    if truth is not None:
        words[truth] = "predicted and true" if truth in words else "true"
    words.setdefault(seen.label, "shown")
    panels = []
    for name, probability in seen.probabilities.items():
        lines = [part for label, word in words.items()
                 for part in (text_panel(f"{word}: {class_names[label]}", WIDE), bar(probability[label].item()))]
        panels.append(titled(stack(lines, gap=2), f"softmax of the {name} score"
                             + equations.get(name, "") * (seen.plan is not None)))
    return stack(panels, 3)


# ---- the streams, a training batch, curves -------------------------------------------------------------------

STREAMS = {"vv": "V-V patch tokens (Eq. 2)", "released_vv": "V-V patch tokens of the released code",
           "qk": "ordinary patch tokens (Table 2, w/o V-V)",
           "value": "value-path patch tokens (GL-MCM): in the last block each patch attends to itself alone"}


def streams(model, text_features, image, name, truth=None, label=None):
    """The same prompts on the run's own patch tokens and on CLIP's other streams. Arguments as of `figure_2`."""
    picture, side = picture_of(image), (WIDTH - 5 * GAP) // 6
    seen, parts = look(model, image[None], text_features, label), []
    if seen.similarity is None:
        raise ValueError("--streams: the method of this run compares no patches")
    label = seen.label
    for stream in dict.fromkeys((model.stream, "vv", "qk", "value")):
        tokens = model.clip.encode_patches(image[None], stream)                    # (1, W), (1, P, W)
        similarity = patch_cosines(model, tokens, text_features, label)                    # (P, L)
        bounds = similarity.min().item(), similarity.max().item()
        maps = prompt_maps(picture, similarity, bounds, side)
        if shares_support(model):
            support, _ = transport(similarity, model.n_support)
            maps.insert(0, titled(heat_map(picture, saliency(similarity), bounds, side, support), "support (Eq. 7-8)"))
        parts += [text_panel("the run's own: " * (stream == model.stream) + STREAMS[stream], size=20),
                  stack([titled(enlarged(picture, side), "the picture"), *maps], 6), scale_bar(HEAT, *bounds)]
    return sheet(f"{name}, with the prompts of \"{model.class_names[label]}\"", parts)


def training_batch(name, config, items, model=None):
    """The first batch that a run of this configuration sees of its training items, cropped and flipped at random.

    model: the file of its CLIP, where it has moved.
    """
    _, preprocess = clip.load(runs.model_file(name, config, model), activation=config["activation"])
    pictures = data.Pictures(items, data.train_transform(preprocess), config["seed"],
                             data.DATASETS[config["dataset"]].as_people_see)
    batch = next(iter(data.Batches(len(items), config["batch_size"], config["seed"])))   # (epoch, i) of each picture
    side = (WIDTH - 7 * GAP) // 8
    cells = [stack([enlarged(picture_of(pictures[index][0]), side), text_panel(items[index[1]][2], side)], gap=4)
             for index in batch]
    return sheet(f"{name}: the first training batch", [stack(cells, 8)])


def curves(logs):
    """A chart for each number in log.jsonl, {run: its lines}; every run has a letter and a colour."""
    styles = dict(zip(logs, zip(string.ascii_uppercase, CURVES * 5)))
    names = [text_panel(f"{letter}: {run}, {len(logs[run])} epochs", size=18, fill=colour)
             for run, (letter, colour) in styles.items()]
    charts = []
    for field in dict.fromkeys(field for log in logs.values() for line in log for field in line):
        points = {styles[run]: [(line["epoch"], line[field]) for line in log if field in line]
                  for run, log in logs.items() if any(field in line for line in log)}
        if field not in ("epoch", "seconds"):
            charts.append(titled(chart(points), field.replace("_", " ")))
    return sheet("training curves", [stack(names, gap=0), stack(charts, 3)])


# ---- the script ----------------------------------------------------------------------------------------------

def read_curves(run):
    """The lines of a run's log.jsonl. Raises ValueError, with the file's name, where it holds anything else."""
    try:
        log = runs.read_log(run)
        if not log or not all(math.isfinite(line[field]) for line in log for field in ("epoch", *line)):
            raise ValueError("no numbers")
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} holds no log.jsonl: name a folder that train.py wrote") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{run}/log.jsonl is damaged, or not a file of train.py: {error!r}") from error
    return log


def run_items(run, checkpoint, data_root, split):
    """The pictures that a run was trained on, or those of its other parts that it was not trained on."""
    if split == "train":
        return run_pictures.training_pictures(run, checkpoint, data_root)
    items, _ = run_pictures.unseen_pictures(run, checkpoint, data_root, split)
    return items


def chosen(run, checkpoint, model, args):
    """Yields path, label or None, and what the model gets, (3, R, R), of each picture that the options ask for."""
    items = [(path, None) for path in args.images or ()] or run_items(run, checkpoint, args.data_root, args.split)
    count = len(items) if args.images else min(args.count, len(items))
    as_people_see = bool(args.images) or data.DATASETS[checkpoint["config"]["dataset"]].as_people_see
    preprocess = clip.preprocess(model.clip.visual.resolution)

    for i in range(count):
        path, truth, *_ = items[i * len(items) // count]
        yield path, truth, preprocess(data.read_image(path, as_people_see)).to(args.device)


def picture_options(parser):
    """Adds the options that choose pictures, see `chosen`, and the device."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", nargs="+", metavar="FILE", help="your own pictures")
    which.add_argument("--split", choices=("train", "val", "test"), help="of the run (test)")
    add = parser.add_argument
    add("--count", type=int, default=8, help="pictures of the split, at equal distances (%(default)s)")
    add("--data-root", help="folder of the datasets (the run's own)")
    add("--model", metavar="FILE", help="the file of the run's CLIP, where it has moved")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")


def check_picture_options(parser, args):
    """Ends the program for a --count of no pictures. The split is the test split where none is given."""
    parser.refuse_empty(args)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")
    args.split = args.split or "test"


def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = Parser("python -m extras.visualize RUN [RUN ...] [options]", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a folder that train.py wrote; several with --curves")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--streams", action="store_true", help="V-V, ordinary and value-path patches side by side")
    mode.add_argument("--batch", action="store_true", help="the first training batch, after augmentation")
    mode.add_argument("--curves", action="store_true", help="log.jsonl over the epochs, all RUNs in one picture")
    picture_options(parser)
    add("--class", dest="class_name", metavar="NAME", help="whose prompts are shown (those of the predicted class)")
    add("--n-support", type=int, metavar="N", help="K to look with, in place of the run's own")
    add("--epsilon", type=float, metavar="X", help="entropy weight to look with")
    add("--n-iters", type=int, metavar="N", help="Sinkhorn iterations to look with")
    add("--output", metavar="DIR", help="where the PNG files go (RUN/pictures)")
    args = parser.parse_args(argv)
    if len(args.runs) > (26 if args.curves else 1):
        parser.error("one RUN, or with --curves up to 26")
    if (args.batch or args.curves) and (args.images or args.class_name or args.split):
        parser.error("--images, --split and --class do not go with --batch and --curves")
    check_picture_options(parser, args)
    return args


def look_otherwise(model, settings):
    """Changes what a finished run transports with: {attribute: value or None} -> those that are given.

    Raises ValueError for what the method does not have and for values that cannot work.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if not hasattr(model, name) or not (model.has_plan or name == "n_support"):
            raise ValueError(f"{option}: the method of this run has none")
        if value < (1e-6 if name == "epsilon" else 1):
            raise ValueError(f"{option} must be at least {'1e-6' if name == 'epsilon' else 1}, got {value}")
        setattr(model, name, value)
    check_support(getattr(model, "n_support", 1), len(model.clip.visual.positional_embedding) - 1)
    return given


@machine.plain_errors()
def main(args):
    """Draws what the options ask for, and prints which files that made."""
    run, folder = args.runs[0], Path(args.output or Path(args.runs[0]) / "pictures")

    def save(name, drawing):
        machine.write_whole(folder / f"{name}.png", lambda path: drawing.save(path, "PNG"))
        print(f"wrote {folder / name}.png", flush=True)

    if args.curves:
        logs = {run: read_curves(run) for run in args.runs}
        places.check_folder(folder, "--output")
        return save("curves", curves(logs))
    machine.use_device(args.device)
    checkpoint = runs.read_checkpoint(run)
    config, class_names = checkpoint["config"], checkpoint["class_names"]
    args.class_name = args.class_name and normal(args.class_name)
    if args.class_name not in (None, *class_names):
        near = difflib.get_close_matches(args.class_name, class_names, cutoff=0)
        raise ValueError(f"--class {args.class_name!r} is none of the {len(class_names)} classes of {run}; near: "
                         + ", ".join(map(repr, near)))
    if config["dataset"] == "folder":
        places.check_apart(folder, args.data_root or config["data_root"], "--output")
    places.check_folder(folder, "--output")
    if args.batch:
        items = run_items(run, checkpoint, args.data_root, "train")
        return save("batch", training_batch(run, config, items, args.model))
    label = class_names.index(args.class_name) if args.class_name else None
    model = runs.build(run, checkpoint, args.device, model=args.model)
    changed = look_otherwise(model, {name: getattr(args, name) for name in ("n_support", "epsilon", "n_iters")})
    with torch.no_grad():
        text_features = model.encode_prompts()
    kind, draw = ("streams", streams) if args.streams else ("figure2", figure_2)
    kind = "-".join([kind, *(f"{name.replace('_', '-')}{value:g}" for name, value in changed.items())])
    for i, (path, truth, image) in enumerate(chosen(run, checkpoint, model, args), 1):
        name = re.sub(r"[^\w.]+", "-", "-".join(Path(path).with_suffix("").parts[-3:])).strip("-")
        # why: a file's name has 255 bytes at most; errors: it need not be text in any encoding
        name = name.encode(errors="replace")[-180:].decode(errors="ignore")
        told = ", ".join([path, *(f"{name} {value:g} in place of {config[name]:g}" for name, value in changed.items())])
        save(f"{kind}-{i}-{name}", draw(model, text_features, image, told, truth, label))


if __name__ == "__main__":
    main(parse_args())
