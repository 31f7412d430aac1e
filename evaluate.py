"""Scores a trained run on its test split, averages runs over seeds, or classifies your own pictures.

    python evaluate.py runs/eurosat-16shot-seed1                      the accuracies of one run
    python evaluate.py runs/eurosat-16shot-seed*                      several: mean and standard deviation
    python evaluate.py runs/eurosat-16shot-seed1 --images DIR a.jpg   the five likeliest classes of each picture
    python evaluate.py runs/eurosat-16shot-seed1 --csv all.csv        the same for each picture of the test split
    python evaluate.py runs/eurosat-16shot-seed1 --export texts.npz  class names and text features for other programs
    python evaluate.py runs/coop-imagenet-16shot-seed1 --on imagenet_v2    on the pictures of another dataset
    python evaluate.py --zero-shot --dataset eurosat                  the hand-written template, no run needed

RUN/evaluation.json and RUN/evaluation.csv keep the numbers; what training wrote stays as it is. Read it from
`count_correct` (one pass over the pictures) through `test` (a split) to `main`.
"""

import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

# why: one's own program, which imports this file, may have others of these names
for name in ("clip", "data", "harness", "methods", "sinkhorn", "sotglp", "sources"):
    imported = getattr(sys.modules.get(name), "__spec__", None) or sys.modules.get(name)
    found = imported or importlib.util.find_spec(name)
    places = [getattr(found, "origin", None) or getattr(found, "__file__", None),
              *(getattr(found, "submodule_search_locations", None) or ())]
    place = next(filter(None, places), "built in")
    if found and not Path(place).resolve().is_relative_to(Path(__file__).resolve().parent):
        how = "was imported first" if imported else "comes first on the path"
        raise ImportError(f"another package called {name} {how}, {place}: import evaluate before it, or leave it out; "
                          f"this project brings a {name} of its own")

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist

import data
from harness import machine, places, run_pictures, runs
from harness.parser import Parser
from harness.export import export
from harness.predict import csv_row, likeliest, name_files, predict
from harness.runs import load_run
from methods.zero_shot import ZeroShot

__all__ = ["load_run", "predict"]  # what one's own programs need; the rest serves the scripts


# ---- one pass over pictures ----------------------------------------------------------------------------------

class Counts(NamedTuple):
    """How many test images each score gets right, and how many there are, for each true class."""
    n_correct: dict          # {score: (C,) int64}; the first score decides, the last one is "zero_shot"
    n_images: torch.Tensor   # (C,) int64
    confusion: torch.Tensor = None   # (C, C) int64: of the class of the row, those taken for that of the column


@torch.no_grad()
def count_correct(model, loader, zero_shot, predictions=None):
    """Counts what each score of a method gets right, and zero-shot CLIP beside them -> Counts.

    loader gives (images (B, 3, R, R), labels (B,)); zero_shot: a `ZeroShot` of the same classes. predictions: a
    list that gets what `likeliest` says of each image.
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
                raise ValueError(f"the {name} scores of some test images are not finite numbers: the weights or the "
                                 "precision do not serve")
            correct = labels[score.argmax(dim=1) == labels]
            n_correct[name] = n_correct.get(name, 0) + torch.bincount(correct, minlength=C)
        n_images += torch.bincount(labels, minlength=C)
        pairs = C * labels + model.logits(outputs).argmax(dim=1)
        confusion += torch.bincount(pairs, minlength=C * C).view(C, C)
    return Counts(n_correct, n_images, confusion)


def test(model, items, dataset, amp="off", workers=0, rank=0, world=1, template=None, predictions=None):
    """Scores a test split once, each image on one of the processes -> Counts over all of them.

    amp: the precision of the towers; `machine.usable_amp` says which one a device has. template: in place of the
    dataset's own. predictions: as in `count_correct`, of this process's images.
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

    why the names of the first process: one without images has no scores, and all must add up tensors of one shape.
    """
    names = [[*counts.n_correct]]
    dist.broadcast_object_list(names, src=0)
    none = torch.zeros_like(counts.n_images)                                       # (C,)
    table = torch.stack([*(counts.n_correct.get(name, none) for name in names[0]), counts.n_images])
    dist.all_reduce(table)                                                         # (scores + 1, C)
    *n_correct, n_images = table
    dist.all_reduce(counts.confusion)
    return Counts(dict(zip(names[0], n_correct)), n_images, counts.confusion)


# ---- the accuracies of a run ---------------------------------------------------------------------------------

def percentages(counts):
    """Counts as the fields of result.json: percent of all images right, by each score."""
    _, *others = counts.n_correct
    fields = ["accuracy", *(f"{name}_accuracy" for name in others)]
    n_images = counts.n_images.sum().item()
    return {field: 100 * n_correct.sum().item() / n_images
            for field, n_correct in zip(fields, counts.n_correct.values())}


def calibration_error(predictions, labels, bins=15):
    """How far the probability of the predicted class is from how often it is right, in [0, 1]: the ECE of Guo et al.

    predictions: of all images, from `likeliest`; labels: what they show. Equal bins (i/bins, (i+1)/bins]; the mean
    over the images of |accuracy - mean probability| of an image's bin.
    """
    best = [prediction.classes[0] for prediction in predictions]                   # (label, probability) of each
    probability = torch.tensor([p for _, p in best], dtype=torch.float64)          # (n,)
    predicted = torch.tensor([label for label, _ in best])
    correct = (predicted == torch.tensor(labels)).double()

    bin_of_image = (probability * bins).ceil().long().clamp(1, bins) - 1
    differences = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of_image, correct - probability)
    return differences.abs().sum().item() / len(best)


def write_per_class(path, class_names, counts):
    """A CSV file with the accuracy of every score for each class, in percent; empty where a class has no image."""
    rows = []
    for label, (name, n) in enumerate(zip(class_names, counts.n_images.tolist())):
        row = {"label": label, "class": name, "images": n}
        for score, n_correct in counts.n_correct.items():
            row[score] = f"{100 * n_correct[label].item() / n:.2f}" if n else ""
        rows.append(row)
    machine.write_csv(path, rows)


def write_confusion(path, class_names, confusion):
    """A CSV file with a row for each true class and a column for each predicted one: how many images."""
    names = [f"{label} {name}" for label, name in enumerate(class_names)]   # why numbers: two classes may share a name
    machine.write_csv(path, [{"true class": name, **dict(zip(names, counts))}
                             for name, counts in zip(names, confusion.tolist())])


def report(folder, model, counts, config, started, **more):
    """Writes result.json, per_class.csv and confusion.csv of a run that began at `started`, prints the accuracies."""
    split = config["test_split"]
    figures = {**percentages(counts), "split": split, f"{split}_images": int(counts.n_images.sum()),
               "learned_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
               "threads": torch.get_num_threads(), "precision": machine.precision(config["amp"]),
               "seconds": round(time.monotonic() - started, 1), **more}
    named = {name: config[name] for name in ("method", "dataset", "model", "shots", "seed", "split_seed")}
    write_per_class(folder / "per_class.csv", model.class_names, counts)
    write_confusion(folder / "confusion.csv", model.class_names, counts.confusion)
    machine.write_json(folder / "result.json", {**figures, **named, "config": config,
                                                "versions": machine.versions()})
    files = ("result.json", "per_class.csv", "confusion.csv", "log.jsonl", "last.pt")
    written = [name for name in files if (folder / name).exists()]
    print(f"{accuracies_line(figures)}, {figures['seconds']:.0f} s\nwrote {folder}/{', '.join(written)}")


def accuracies_line(result):
    """The accuracies of a run as one line of text."""
    others = ", ".join(f"{name.removesuffix('_accuracy').replace('_', '-')} {value:.2f}"
                       for name, value in result.items() if name.endswith("_accuracy"))
    split = result.get("split", "test")
    images = f"{result.get(f'{split}_images', 'unknown')} {split} images"
    return f"accuracy {result['accuracy']:.2f} %  ({others})  on {images}"


def evaluate_run(run, checkpoint, device, data_root=None, workers=0, split="test", csv_file=None, on=None,
                 classes=None, amp=None, model_file=None):
    """Scores a run on its own test or validation split -> the fields that evaluation.json gets.

    csv_file: where `csv_row` of each image is written. on: another dataset, classes: "new", in place of its own.
    amp: the precision, model_file: the file of the CLIP; the run's own where None.
    """
    start = time.monotonic()
    config = checkpoint["config"]
    writable = os.access(run, os.W_OK)
    if not writable:
        print(f"note: {run} is read-only here: evaluation.json is not written; --csv FILE can be elsewhere",
              flush=True)
    items, class_names = run_pictures.unseen_pictures(run, checkpoint, data_root, split, on, classes)
    model = runs.build(run, checkpoint, device, class_names, model_file)
    if amp is None:
        amp = machine.usable_amp(config["amp"], device)
        if amp != config["amp"]:
            print(f"note: {run} was trained in {config['amp']}, which needs a GPU; it is tested in float32", flush=True)
    if amp in machine.HALF:
        model.clip.store_matrices(machine.HALF[amp])

    dataset = on or config["dataset"]
    template = None if on else config["template"]
    predictions = []
    counts = test(model, items, dataset, amp, workers, template=template, predictions=predictions)

    error = calibration_error(predictions, [label for _, label, _ in items])
    result = {**percentages(counts), "calibration_error": 100 * error,
              "split": split, f"{split}_images": int(counts.n_images.sum()), "epoch": checkpoint["epoch"],
              **{name: config[name] for name in ("method", "dataset", "model", "shots", "seed")},
              "tested_on": dataset, "precision": machine.precision(amp),
              "data": {split: run_pictures.digest(items, run_pictures.root_of(config, data_root, on))},
              "seconds": round(time.monotonic() - start, 1)}
    name = "-".join(["evaluation", *filter(None, [on or classes])])
    if writable:
        machine.write_json(Path(run) / f"{name}.json", result)
        write_per_class(Path(run) / f"{name}.csv", class_names, counts)
        print(f"wrote {run}/{name}.json, {name}.csv", flush=True)
    if csv_file:
        machine.write_csv(csv_file, [csv_row(path, prediction, class_names, label)
                                     for (path, label, _), prediction in zip(items, predictions)])
        print(f"wrote {csv_file}: {len(items)} pictures", flush=True)
    return result


def read_alike(folders):
    """The checkpoints of runs that differ in their seeds alone. Raises ValueError for others, and for equal seeds."""
    checkpoints = [runs.read_checkpoint(run) for run in folders]
    seen = {}
    for run, checkpoint in zip(folders, checkpoints):
        runs.check_kind(folders[0], checkpoints[0], run, checkpoint)
        seeds = checkpoint["config"]["seed"], checkpoint["config"]["split_seed"]
        if seeds in seen:
            raise ValueError(f"{run} has the seeds of {seen[seeds]}: a mean over equal runs says nothing; name one of "
                             "them")
        seen[seeds] = run
    return checkpoints


def mean_and_spread(values, digits=2):
    """Several values as "84.21 +- 0.32", one as "84.21", none as ""."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# ---- the script ----------------------------------------------------------------------------------------------

def report_runs(args):
    """Each run's accuracies; for several also mean and standard deviation."""
    results = []
    for run, checkpoint in zip(args.runs, read_alike(args.runs)):
        result = evaluate_run(run, checkpoint, args.device, args.data_root, args.workers, args.split, args.csv,
                              args.on, args.classes, args.amp, args.model)
        print(f"{run}: {accuracies_line(result)}, {result['precision']}, expected calibration error "
              f"{result['calibration_error']:.2f} %", flush=True)
        results.append(result)
    if len(results) > 1:
        for field in (name for name in results[0] if name.endswith(("accuracy", "calibration_error"))):
            print(f"{field:18s} {mean_and_spread([result[field] for result in results])}  over {len(results)} runs")


def report_zero_shot(args):
    """The hand-written template on a dataset's test split, beside the published value where there is one."""
    name = clip.full_name(args.model or machine.default_model(args.dataset))
    template = data.template(args.dataset, args.template)
    root = data.find_root(args.dataset, args.data_root)
    *_, items, class_names = data.load(args.dataset, root, shots=0, seed=1)
    clip_model, _ = clip.load(name, args.device, args.activation or "quickgelu")
    amp = args.amp or machine.default_amp(args.device)
    if amp in machine.HALF:
        clip_model.store_matrices(machine.HALF[amp])

    counts = test(ZeroShot(clip_model, class_names, template), items, args.dataset, amp, args.workers,
                  template=args.template)
    accuracy = percentages(counts)["accuracy"]
    row = data.DATASETS[args.dataset]
    # why: the published value is that of one model with one template on the whole test split
    comparable = row.zero_shot and name == "ViT-B/16" and template == row.template and len(items) == row.sizes[2]
    beside = f"; published for ViT-B/16: {row.zero_shot} %" if comparable else ""
    print(f"zero-shot {name} on {args.dataset}: {accuracy:.2f} % of {len(items)} test images{beside}")


def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = Parser("python evaluate.py [RUN ...] [options]", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--images", nargs="+", metavar="PATH", help="pictures, or folders of pictures, to name with the one RUN given")
    add("--csv", metavar="FILE", help="write what the one RUN given says of each image, with probabilities")
    add("--export", metavar="FILE.npz", help="write class names and unit text features of the one RUN given")
    add("--split", choices=("test", "val"), help="score the test or the validation images of a RUN (test)")
    add("--classes", choices=("new",), help="test a RUN of train.py --classes base on the classes that it lacks")
    add("--on", choices=sorted(data.DATASETS), metavar="NAME", help="test a RUN on the pictures of another dataset")
    add("--zero-shot", action="store_true", help="score the template; shows a wrong class order")
    add("--dataset", choices=data.DATASETS, metavar="NAME", help="for --zero-shot (critters)")
    add("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16); for a RUN: the file of "
        "its CLIP, where it has moved")
    add("--activation", choices=clip.ACTIVATIONS, help="for --zero-shot with a file: that of its towers (quickgelu)")
    add("--template", metavar="TEXT", help="for --zero-shot: a prompt with {} for the class name (the dataset's own)")
    add("--data-root", help="folder of the datasets; for `folder` that of your pictures (the run's own, else "
        "$DATA_ROOT, else ./data)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF),
        help="mixed precision (a run's own; for --zero-shot fp16 on CUDA, off on CPU)")
    args = parser.parse_args(argv)
    if not (args.runs or args.zero_shot):
        parser.error("name at least one RUN, or --zero-shot --dataset NAME")
    check_together(parser, args)
    parser.refuse_empty(args)
    args.split = args.split or "test"
    args.dataset = args.dataset or "critters"
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    return args


# What each kind of call uses; the first one that was asked for decides.
USES = {"zero_shot": "dataset model activation template data_root amp", "images": "runs csv model",
        "export": "runs model",
        "classes": "runs csv data_root amp model", "on": "runs csv data_root amp model",
        "runs": "csv split data_root amp model"}


def check_together(parser, args):
    """Ends the program where an option was given that this kind of call does not use."""
    mode = next(name for name in USES if getattr(args, name))
    used = {mode, "device", "workers", *USES[mode].split()}
    flags = {name: "RUN" if name == "runs" else "--" + name.replace("_", "-") for name in vars(args)}
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
