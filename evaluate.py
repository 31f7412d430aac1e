"""Scores a trained run on its test split, averages runs over seeds, or classifies your own pictures.

    python evaluate.py runs/eurosat-16shot-seed1                     the accuracies of one run
    python evaluate.py runs/eurosat-16shot-seed*                     several: mean and standard deviation
    python evaluate.py runs/eurosat-16shot-seed1 --images DIR a.jpg  five likeliest classes of each picture
    python evaluate.py runs/eurosat-16shot-seed1 --csv all.csv       the same for each test picture
    python evaluate.py runs/eurosat-16shot-seed1 --export texts.npz  class names and texts, for other programs
    python evaluate.py runs/coop-imagenet-16shot-seed1 --on imagenet_v2   on the pictures of another dataset
    python evaluate.py --zero-shot --dataset eurosat                 the hand-written template, no run needed

RUN/evaluation.json and RUN/evaluation.csv keep the numbers; what training wrote stays as it is. Read it from
`count_correct` (one pass over the pictures) through `test` (a split) to `main`.
"""

import os
import runpy
import time
from pathlib import Path
from typing import NamedTuple

# why before all others: one's own program, which imports this file, may have other packages of our names
runpy.run_path(f"{Path(__file__).parent}/harness/other_packages.py")["refuse_others"]()

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist

import data
from harness import machine, places, run_pictures, runs
from harness.export import export
from harness.parser import Parser
from harness.predict import csv_row, likeliest, name_files, predict
from harness.results import accuracies_line, mean_and_spread, percentages, write_per_class
from harness.runs import load_run, read_alike
from methods.zero_shot import ZeroShot

__all__ = ["load_run", "predict"]  # what one's own programs need; the rest serves the scripts


# ---- one pass over pictures --------------------------------------------------------------------------------

class Counts(NamedTuple):
    """How many test images each score gets right, and how many there are, for each true class."""
    n_correct: dict                  # {score: (C,) int64}; the first score decides, the last is "zero_shot"
    n_images: torch.Tensor           # (C,) int64
    confusion: torch.Tensor = None   # (C, C) int64: rows true classes, columns predicted ones


@torch.no_grad()
def count_correct(model, loader, zero_shot, predictions=None):
    """Counts what each score of a method gets right, and zero-shot CLIP beside them -> Counts.

    loader gives (images (B, 3, R, R), labels (B,)); zero_shot: a `ZeroShot` of the same classes.
    predictions: a list that gets what `likeliest` says of each image.
    """
    device = model.clip.logit_scale.device
    C = len(model.class_names)
    n_correct = {}
    n_images = torch.zeros(C, dtype=torch.int64, device=device)
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)

    model.eval()
    # why here: the prompts do not change between images
    text_features = model.encode_prompts()
    template_features = zero_shot.encode_prompts()

    for images, labels in loader:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)

        features = model.features(images)
        outputs = model(features, None, text_features)
        scores = model.scores(outputs)                                             # {name: (B, C)}
        if predictions is not None:
            predictions += likeliest(model.logits(outputs), scores)
        scores["zero_shot"] = zero_shot.logits(zero_shot(features, None, template_features))

        for name, score in scores.items():
            if not score.isfinite().all():
                raise ValueError(f"the {name} scores of some test images are not finite numbers: check the "
                                 "weights, or use --amp off")
            correct = labels[score.argmax(dim=1) == labels]
            n_correct[name] = n_correct.get(name, 0) + torch.bincount(correct, minlength=C)

        n_images += torch.bincount(labels, minlength=C)
        pairs = C * labels + model.logits(outputs).argmax(dim=1)                   # (B,): cells of confusion
        confusion += torch.bincount(pairs, minlength=C * C).view(C, C)
    return Counts(n_correct, n_images, confusion)


def test(model, items, dataset, amp="off", workers=0, rank=0, world=1, template=None, predictions=None):
    """Scores a test split once, each image on one of the processes -> Counts over all of them.

    amp: the precision of the towers; `machine.usable_amp` says which one a device has. template: in place of
    the dataset's own. predictions: as in `count_correct`, of this process's images.
    """
    device = model.clip.logit_scale.device
    zero_shot = ZeroShot(model.clip, model.class_names, data.template(dataset, template))
    loader = data.test_batches(items, dataset, model.clip.visual.resolution, workers, device, rank, world)
    with machine.autocast(amp, device):
        counts = count_correct(model, machine.progress(loader, "test", rank), zero_shot, predictions)

    if world > 1:
        counts = add_up(counts)
    if counts.n_images.sum() != len(items):
        raise RuntimeError(f"tested {counts.n_images.sum()} of {len(items)} images")
    return counts


def add_up(counts):
    """The counts of all processes together.

    why the names of the first process: one without images has no scores, and all must add up tensors of one
    shape.
    """
    names = [[*counts.n_correct]]
    dist.broadcast_object_list(names, src=0)
    none = torch.zeros_like(counts.n_images)                                       # (C,)
    n_correct = [counts.n_correct.get(name, none) for name in names[0]]
    table = torch.stack([*n_correct, counts.n_images])                             # (scores + 1, C)
    dist.all_reduce(table)
    *n_correct, n_images = table
    dist.all_reduce(counts.confusion)
    return Counts(dict(zip(names[0], n_correct)), n_images, counts.confusion)


# ---- the accuracies of a run -------------------------------------------------------------------------------

def calibration_error(predictions, labels, bins=15):
    """How far the probability of the predicted class is from how often it is right: the ECE of Guo et al.

    predictions: of all images, from `likeliest`; labels: what they show -> a float in [0, 1]. Equal bins
    (i/bins, (i+1)/bins]; the mean over the images of |accuracy - mean probability| of an image's bin.
    """
    best = [prediction.classes[0] for prediction in predictions]             # (label, probability) of each
    probability = torch.tensor([p for _, p in best], dtype=torch.float64)    # (n,)
    predicted = torch.tensor([label for label, _ in best])
    correct = (predicted == torch.tensor(labels)).double()

    bin_of_image = (probability * bins).ceil().long().clamp(1, bins) - 1
    # of a bin: the sum of (correct - probability), so that the sum of absolute values over n is the mean
    differences = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of_image, correct - probability)
    return differences.abs().sum().item() / len(best)


def evaluate_run(folder, checkpoint, device, data_root=None, workers=0, split="test", csv_file=None, on=None,
                 classes=None, amp=None, model_file=None):
    """Scores a run on its own test or validation split -> the fields that evaluation.json gets.

    csv_file: where `csv_row` of each image is written. on: another dataset, classes: "new", in place of its
    own. amp: the precision, model_file: the file of the CLIP; the run's own where None.
    """
    start = time.monotonic()
    config = checkpoint["config"]
    writable = os.access(folder, os.W_OK)
    if not writable:
        print(f"note: {folder} is read-only here: evaluation.json is not written; --csv FILE can be "
              "elsewhere", flush=True)
    items, class_names = run_pictures.unseen_pictures(folder, checkpoint, data_root, split, on, classes)
    model = runs.build(folder, checkpoint, device, class_names, model_file)
    amp = usable_amp(folder, config, device) if amp is None else amp
    machine.store_matrices(model.clip, amp)

    dataset = on or config["dataset"]
    template = None if on else config["template"]
    predictions = []
    counts = test(model, items, dataset, amp, workers, template=template, predictions=predictions)

    error = calibration_error(predictions, [label for _, label, _ in items])
    root = run_pictures.root_of(config, data_root, on)
    result = {
        **percentages(counts),
        "calibration_error": 100 * error,
        "split": split,
        f"{split}_images": int(counts.n_images.sum()),
        "epoch": checkpoint["epoch"],
        **{name: config[name] for name in ("method", "dataset", "model", "shots", "seed")},
        "tested_on": dataset,
        "precision": machine.precision(amp),
        "data": {split: run_pictures.digest(items, root)},
        "seconds": round(time.monotonic() - start, 1)}

    name = "-".join(["evaluation", *filter(None, [on or classes])])
    if writable:
        machine.write_json(Path(folder) / f"{name}.json", result)
        write_per_class(Path(folder) / f"{name}.csv", class_names, counts)
        print(f"wrote {folder}/{name}.json, {name}.csv", flush=True)
    if csv_file:
        machine.write_csv(csv_file, [csv_row(path, prediction, class_names, label)
                                     for (path, label, _), prediction in zip(items, predictions)])
        print(f"wrote {csv_file}: {len(items)} pictures", flush=True)
    return result


def usable_amp(folder, config, device):
    """The precision of a run's training, or float32 where the device does not have it, which is printed."""
    amp = machine.usable_amp(config["amp"], device)
    if amp != config["amp"]:
        print(f"note: {folder} was trained in {config['amp']}, which needs a GPU; it is tested in float32",
              flush=True)
    return amp


# ---- the script --------------------------------------------------------------------------------------------

def report_runs(args):
    """Each run's accuracies; for several also mean and standard deviation."""
    results = []
    for folder, checkpoint in zip(args.runs, read_alike(args.runs)):
        result = evaluate_run(folder, checkpoint, args.device, args.data_root, args.workers, args.split,
                              args.csv, args.on, args.classes, args.amp, args.model)
        print(f"{folder}: {accuracies_line(result)}, {result['precision']}, expected calibration error "
              f"{result['calibration_error']:.2f} %", flush=True)
        results.append(result)

    if len(results) > 1:
        for field in (name for name in results[0] if name.endswith(("accuracy", "calibration_error"))):
            values = [result[field] for result in results]
            print(f"{field:18s} {mean_and_spread(values)}  over {len(results)} runs")


def report_zero_shot(args):
    """The hand-written template on a dataset's test split, beside the published value where there is one."""
    name = clip.full_name(args.model or machine.default_model(args.dataset))
    template = data.template(args.dataset, args.template)
    root = data.find_root(args.dataset, args.data_root)
    *_, items, class_names = data.load(args.dataset, root, shots=0, seed=1)
    clip_model, _ = clip.load(name, args.device, args.activation or "quickgelu")
    amp = args.amp or machine.default_amp(args.device)
    machine.store_matrices(clip_model, amp)

    model = ZeroShot(clip_model, class_names, template)
    counts = test(model, items, args.dataset, amp, args.workers, template=args.template)
    accuracy = percentages(counts)["accuracy"]
    row = data.DATASETS[args.dataset]
    beside = ""
    # why: the published value is that of one model with one template on the whole test split
    if row.zero_shot and name == "ViT-B/16" and template == row.template and len(items) == row.sizes[2]:
        beside = f"; published for ViT-B/16: {row.zero_shot} %"
    print(f"zero-shot {name} on {args.dataset}: {accuracy:.2f} % of {len(items)} test images{beside}")


def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not (args.runs or args.zero_shot):
        parser.error("name at least one RUN, or --zero-shot --dataset NAME")
    check_together(parser, args)
    parser.refuse_empty(args)
    args.split = args.split or "test"
    args.dataset = args.dataset or "critters"
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    return args


def make_parser():
    """The options, unchecked."""
    parser = Parser("python evaluate.py [RUN ...] [options]", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--images", nargs="+", metavar="PATH",
        help="pictures, or folders of pictures, to name with the one RUN given")
    add("--csv", metavar="FILE", help="write what the one RUN given says of each image, with probabilities")
    add("--export", metavar="FILE.npz", help="write class names and unit text features of the one RUN given")
    add("--split", choices=("test", "val"), help="score the test or the validation images of a RUN (test)")
    add("--classes", choices=("new",),
        help="test a RUN of train.py --classes base on the classes that it lacks")
    add("--on", choices=sorted(data.DATASETS), metavar="NAME",
        help="test a RUN on the pictures of another dataset")
    add("--zero-shot", action="store_true", help="score the template; shows a wrong class order")
    add("--dataset", choices=data.DATASETS, metavar="NAME", help="for --zero-shot (critters)")
    add("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16); for a RUN: "
        "the file of its CLIP, where it has moved")
    add("--activation", choices=clip.ACTIVATIONS,
        help="for --zero-shot with a file: that of its towers (quickgelu)")
    add("--template", metavar="TEXT",
        help="for --zero-shot: a prompt with {} for the class name (the dataset's own)")
    add("--data-root", help="folder of the datasets; for `folder` that of your pictures (the run's own, else "
        "$DATA_ROOT, else ./data)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF),
        help="mixed precision (a run's own; for --zero-shot fp16 on CUDA, off on CPU)")
    return parser


# What each kind of call uses; the first one that was asked for decides.
USES = {
    "zero_shot": "dataset model activation template data_root amp",
    "images": "runs csv model",
    "export": "runs model",
    "classes": "runs csv data_root amp model",
    "on": "runs csv data_root amp model",
    "runs": "csv split data_root amp model",
}


def check_together(parser, args):
    """Ends the program where an option was given that this kind of call does not use."""
    mode = next(name for name in USES if getattr(args, name))
    used = {mode, "device", "workers", *USES[mode].split()}
    flags = {name: "--" + name.replace("_", "-") for name in vars(args)} | {"runs": "RUN"}
    unused = [flags[name] for name, value in vars(args).items() if value and name not in used]
    if unused:
        parser.error(f"with {flags[mode]} there is no use for {', '.join(unused)}")
    if (args.images or args.csv or args.export) and len(args.runs) != 1:
        parser.error("--images, --csv and --export go with exactly one RUN")
    if args.export and not args.export.endswith(".npz"):
        parser.error(f"--export must end in .npz, got {args.export}")


@machine.plain_errors()
def main(args):
    """Zero-shot accuracy, one's own pictures, or the accuracies of runs."""
    machine.use_device(args.device, args.amp or "off")
    for option in ("csv", "export"):
        if getattr(args, option):
            places.check_file(getattr(args, option), f"--{option}")
    if args.zero_shot:
        report_zero_shot(args)
    elif args.export:
        export(args.runs[0], args.export, args.device, args.model)
    elif args.images:
        model = load_run(args.runs[0], args.device, args.model)
        name_files(model, args.images, args.csv, data.TEST_BATCH, args.workers)
    else:
        report_runs(args)


if __name__ == "__main__":
    main(parse_args())
