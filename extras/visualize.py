"""Draws what a run has learned and how: the paper's Figure 2, patch streams, a training batch, its curves.

    python -m extras.visualize RUN                                    Figure 2 of eight test pictures
    python -m extras.visualize RUN --images a.jpg b.png --class NAME  of your own, with the prompts of a class
    python -m extras.visualize RUN --streams                          the same prompts on all patch tokens
    python -m extras.visualize RUN --batch                            the first training batch, augmented
    python -m extras.visualize --curves RUN [RUN ...]                 each number of log.jsonl over the epochs

PNG files go to RUN/pictures. `look`, in looking.py, computes what `figure_2` shows; panels.py draws panels.
A method without patches or a plan gets the panels that it has.
"""

import difflib
import math
import re
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

import data
from extras.looking import look, patch_cosines, shares_support, transport
from extras.panels import (FAINT, GAP, HEAT, SMALL, WIDE, WIDTH, bar, bounds_of, curves, enlarged, heat_map,
                           picture_of, plan_table, prompt_maps, scale_bar, sheet, stack, text_panel, titled)
from harness import machine, places, run_pictures, runs
from harness.parser import Parser
from sources.listing import normal
from sotglp import check_support, saliency


# ---- Figure 2 ----------------------------------------------------------------------------------------------

def figure_2(model, text_features, image, name, truth=None, label=None):
    """All panels of one picture (3, R, R).  Figure 2

    truth: its label, where it is known. label: of the class whose prompts are shown, None: the predicted one.
    """
    seen = look(model, image[None], text_features, label)
    picture = picture_of(image)

    first_row = [titled(enlarged(picture, WIDE), "the picture", "as the model saw it")]
    if seen.support is not None:
        first_row.append(support_panel(picture, seen))
    if seen.plan is not None:
        first_row.append(plan_panel(seen))

    parts = [stack(first_row, 3, (WIDTH - 3 * WIDE) // 2)]
    if seen.similarity is not None:
        parts += map_panels(picture, seen)
    parts.append(bars(seen, model.class_names, truth))
    return sheet(f"{name}, with the prompts of \"{model.class_names[seen.label]}\"", parts)


def support_panel(picture, seen):
    """The saliency of the patches over the picture, and the support framed.  Eq. 7-8"""
    panel = heat_map(picture, saliency(seen.similarity), bounds_of(seen.similarity), WIDE, seen.support)
    caption = (f"mean cosine over the prompts (Eq. 7); framed: the {len(seen.support)} best patches, which "
               "all prompts share (Eq. 8)")
    return titled(panel, "the support", caption)


def plan_panel(seen):
    """The plan as a table.  Eq. 9"""
    caption = ("how much of each patch goes to each prompt, in units of the uniform plan, "
               f"1 / {seen.plan.numel()} (Eq. 9)")
    return titled(plan_table(seen.plan), "the transport plan", caption)


def map_panels(picture, seen):
    """The maps of all prompts of the class, their colour scale and a caption."""
    bounds = bounds_of(seen.similarity)
    caption = ("cosine of a patch and a prompt, in the same colours in all maps; framed: the three best "
               f"patches of each prompt{told_of_prompts(seen.prompt_cosines)}")
    return [stack(prompt_maps(picture, seen.similarity, bounds, SMALL), 4), scale_bar(HEAT, *bounds),
            text_panel(caption, fill=FAINT)]


def told_of_prompts(cosines):
    """What the caption says of prompts that are nearly alike. why: equal maps would look like a fault."""
    if cosines is None:
        return ""
    pairs = torch.triu_indices(len(cosines), len(cosines), 1).T.tolist()
    alike = [f"{i + 1} and {j + 1} ({cosines[i, j]:.2f})" for i, j in pairs if cosines[i, j] > 0.95]
    if not alike:
        return ""
    return f"; nearly alike by their cosine, and so are their maps: prompts {', '.join(alike)}"


EQUATIONS = {"fused": " (Sec. 3.5)", "global": " (Eq. 4-5)", "local": " (Eq. 10-11)"}    # of SOT-GLP's scores


def bars(seen, class_names, truth):
    """The probabilities of the predicted class, of the true one and of the one shown, by each score."""
    predicted = int(next(iter(seen.probabilities.values())).argmax())
    roles = {predicted: "predicted"}                              # {label: what it is}
    if truth == predicted:
        roles[truth] = "predicted and true"
    elif truth is not None:
        roles[truth] = "true"
    roles.setdefault(seen.label, "shown")

    panels = []
    for name, probability in seen.probabilities.items():
        parts = []
        for label, role in roles.items():
            parts += [text_panel(f"{role}: {class_names[label]}", WIDE), bar(probability[label].item())]
        equation = EQUATIONS.get(name, "") if seen.plan is not None else ""
        panels.append(titled(stack(parts, gap=2), f"softmax of the {name} score{equation}"))
    return stack(panels, 3)


# ---- the streams, a training batch -------------------------------------------------------------------------

STREAMS = {"vv": "V-V patch tokens (Eq. 2)", "released_vv": "V-V patch tokens of the released code",
           "qk": "ordinary patch tokens (Table 2, w/o V-V)",
           "value": "value-path patch tokens (GL-MCM): in the last block each patch attends to itself alone"}


def streams(model, text_features, image, name, truth=None, label=None):
    """The same prompts on the run's own patch tokens and on CLIP's other streams. Arguments: `figure_2`."""
    seen = look(model, image[None], text_features, label)
    if seen.similarity is None:
        raise ValueError("--streams: the method of this run compares no patches")
    picture = picture_of(image)

    parts = []
    for stream in dict.fromkeys((model.stream, "vv", "qk", "value")):
        tokens = model.clip.encode_patches(image[None], stream)                    # (1, W), (1, P, W)
        similarity = patch_cosines(model, tokens, text_features, seen.label)       # (P, L)
        own = "the run's own: " if stream == model.stream else ""
        parts += [text_panel(own + STREAMS[stream], size=20), stream_maps(model, picture, similarity),
                  scale_bar(HEAT, *bounds_of(similarity))]
    return sheet(f"{name}, with the prompts of \"{model.class_names[seen.label]}\"", parts)


def stream_maps(model, picture, similarity):
    """Six small panels a row: the picture, the support where the method has one, a map for each prompt."""
    side = (WIDTH - 5 * GAP) // 6
    bounds = bounds_of(similarity)
    panels = [titled(enlarged(picture, side), "the picture")]
    if shares_support(model):
        support, _ = transport(similarity, model.n_support)
        panel = heat_map(picture, saliency(similarity), bounds, side, support)
        panels.append(titled(panel, "support (Eq. 7-8)"))
    return stack([*panels, *prompt_maps(picture, similarity, bounds, side)], 6)


def training_batch(name, config, items, model=None):
    """The first batch that a run of this configuration sees, cropped and flipped at random.

    items: its training items. model: the file of its CLIP, where it has moved.
    """
    _, preprocess = clip.load(runs.model_file(name, config, model), activation=config["activation"])
    pictures = data.Pictures(items, data.train_transform(preprocess), config["seed"],
                             data.DATASETS[config["dataset"]].as_people_see)
    batch = next(iter(data.Batches(len(items), config["batch_size"], config["seed"])))

    side = (WIDTH - 7 * GAP) // 8
    cells = []
    for epoch, i in batch:
        image, _ = pictures[epoch, i]
        cells.append(stack([enlarged(picture_of(image), side), text_panel(items[i][2], side)], gap=4))
    return sheet(f"{name}: the first training batch", [stack(cells, 8)])


# ---- the pictures, the options -----------------------------------------------------------------------------

def run_items(run, checkpoint, data_root, split):
    """The pictures that a run was trained on, or those of its other parts that it was not trained on."""
    if split == "train":
        return run_pictures.training_pictures(run, checkpoint, data_root)
    items, _ = run_pictures.unseen_pictures(run, checkpoint, data_root, split)
    return items


def chosen(run, checkpoint, model, args):
    """Yields path, label or None, and what the model gets (3, R, R), of each picture that is asked for."""
    if args.images:
        items = [(path, None) for path in args.images]
        count = len(items)
        as_people_see = True
    else:
        items = run_items(run, checkpoint, args.data_root, args.split)
        count = min(args.count, len(items))
        as_people_see = data.DATASETS[checkpoint["config"]["dataset"]].as_people_see
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
    mode.add_argument("--streams", action="store_true",
                      help="V-V, ordinary and value-path patches side by side")
    mode.add_argument("--batch", action="store_true", help="the first training batch, after augmentation")
    mode.add_argument("--curves", action="store_true",
                      help="log.jsonl over the epochs, all RUNs in one picture")
    picture_options(parser)
    add("--class", dest="class_name", metavar="NAME",
        help="whose prompts are shown (those of the predicted class)")
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


# ---- the script --------------------------------------------------------------------------------------------

LEAST = {"n_support": "1", "epsilon": "1e-6", "n_iters": "1"}      # that can work


def look_otherwise(model, settings):
    """Changes what a finished run transports with: {attribute: value or None} -> those that are given.

    Raises ValueError for what the method does not have and for values that cannot work.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if not hasattr(model, name) or not (model.has_plan or name == "n_support"):
            raise ValueError(f"{option}: the method of this run has none")
        if value < float(LEAST[name]):
            raise ValueError(f"{option} must be at least {LEAST[name]}, got {value}")
        setattr(model, name, value)
    check_support(getattr(model, "n_support", 1), len(model.clip.visual.positional_embedding) - 1)
    return given


def label_of(name, class_names, run):
    """The label of the class that --class names, or None. Raises ValueError where there is no such class."""
    if name is None:
        return None
    name = normal(name)
    if name not in class_names:
        near = difflib.get_close_matches(name, class_names, cutoff=0)
        raise ValueError(f"--class {name!r} is none of the {len(class_names)} classes of {run}; near: "
                         + ", ".join(map(repr, near)))
    return class_names.index(name)


def read_curves(run):
    """The lines of a run's log.jsonl. Raises ValueError, which names the file, where it is damaged."""
    try:
        log = runs.read_log(run)
        if not log or not all(math.isfinite(line[field]) for line in log for field in ("epoch", *line)):
            raise ValueError("no numbers")
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} holds no log.jsonl: name a folder that train.py wrote") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{run}/log.jsonl is damaged, or not a file of train.py: {error!r}") from error
    return log


def save(drawing, folder, name):
    """Writes folder/NAME.png, whole or not at all, and says so."""
    machine.write_whole(folder / f"{name}.png", lambda path: drawing.save(path, "PNG"))
    print(f"wrote {folder / name}.png", flush=True)


def draw_pictures(args, run, checkpoint, label, folder):
    """Draws Figure 2, or the streams, of each picture that the options ask for."""
    model = runs.build(run, checkpoint, args.device, model=args.model)
    changed = look_otherwise(model, {name: getattr(args, name) for name in LEAST})
    with torch.no_grad():
        text_features = model.encode_prompts()

    draw = streams if args.streams else figure_2
    kind = "streams" if args.streams else "figure2"
    kind = "-".join([kind, *(f"{name.replace('_', '-')}{value:g}" for name, value in changed.items())])
    config = checkpoint["config"]
    notes = [f"{name} {value:g} in place of {config[name]:g}" for name, value in changed.items()]
    for i, (path, truth, image) in enumerate(chosen(run, checkpoint, model, args), 1):
        drawing = draw(model, text_features, image, ", ".join([path, *notes]), truth, label)
        save(drawing, folder, f"{kind}-{i}-{short_name(path)}")


def short_name(path):
    """The end of a picture's path, as a part of a file's name."""
    name = re.sub(r"[^\w.]+", "-", "-".join(Path(path).with_suffix("").parts[-3:])).strip("-")
    # why: a file's name has 255 bytes at most; errors: it need not be text in any encoding
    return name.encode(errors="replace")[-180:].decode(errors="ignore")


@machine.plain_errors()
def main(args):
    """Draws what the options ask for, and prints which files that made."""
    machine.refuse_torchrun()
    run = args.runs[0]
    folder = Path(args.output or Path(run) / "pictures")
    if args.curves:
        logs = {name: read_curves(name) for name in args.runs}
        places.check_folder(folder, "--output")
        return save(curves(logs), folder, "curves")

    machine.use_device(args.device)
    checkpoint = runs.read_checkpoint(run)
    config = checkpoint["config"]
    label = label_of(args.class_name, checkpoint["class_names"], run)
    if config["dataset"] == "folder":
        places.check_apart(folder, args.data_root or config["data_root"], "--output")
    places.check_folder(folder, "--output")

    if args.batch:
        items = run_items(run, checkpoint, args.data_root, "train")
        return save(training_batch(run, config, items, args.model), folder, "batch")
    draw_pictures(args, run, checkpoint, label, folder)


if __name__ == "__main__":
    main(parse_args())
