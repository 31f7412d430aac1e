"""Scores a trained run on its test split, averages runs over seeds, or classifies your own pictures.

    python evaluate.py runs/eurosat-16shot-seed1                      the accuracies of one run
    python evaluate.py runs/eurosat-16shot-seed*                      several: mean and standard deviation
    python evaluate.py runs/eurosat-16shot-seed1 --images DIR a.jpg   the five likeliest classes of each picture
    python evaluate.py runs/eurosat-16shot-seed1 --csv all.csv        the same for each picture of the test split
    python evaluate.py --base-to-new runs/coop-eurosat-base-16shot-*  trained with --classes base, tested on all classes
    python evaluate.py runs/coop-imagenet-16shot-seed1 --on imagenet_v2    on the pictures of another dataset
    python evaluate.py --zero-shot --dataset eurosat                  the hand-written template, no run needed
    python evaluate.py --table runs/                                  the paper's Tables 1 and 4, ours beside them

RUN/evaluation.json and RUN/evaluation.csv keep the numbers; what training wrote stays as it is. Read it from
`count_right` (one pass over the images) through `test` (a split) to `main`.
"""

import argparse
import csv
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import clip  # before torch: it bounds how long torch's threads wait

if not hasattr(clip, "weights_hash"):
    raise ImportError(f"another package called clip was imported first, {clip.__file__}: import evaluate before it, or "
                      "leave it out; this project brings a clip of its own")

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
from sources import files
from harness import machine, runs
from methods import released
from sotglp import global_logits, project, unit

__all__ = ["load_run", "predict"]  # what one's own programs need; the rest serves the scripts
EVAL_BATCH = 32      # why no more: the activations of a larger batch leave a processor's cache


# ---- accuracy ------------------------------------------------------------------------------------------------

class Counts(NamedTuple):
    """How many test images each score gets right, and how many there are, for each true class."""
    right: dict           # {score: (C,) int64}; the first score decides, the last one is "zero_shot"
    seen: torch.Tensor    # (C,) int64


@torch.no_grad()
def count_right(model, loader, zero_shot_text, said=None):
    """Counts what each score of a model gets right, and the zero-shot template beside them, in one pass.

    loader gives (images (B, 3, R, R), labels (B,)); zero_shot_text (C, D): unit vectors of the template -> Counts.
    said: a list that gets what `likeliest` says of each image.
    """
    C, device = len(zero_shot_text), zero_shot_text.device
    right, seen = {}, torch.zeros(C, dtype=torch.int64, device=device)
    model.eval()
    texts = model.encode_prompts()                       # why here: the prompts do not change between images
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        cls, patches = model.clip.encode_patches(images, model.stream or "qk")     # (B, W), (B, P, W)
        scores = model.scores(model((cls, patches) if model.stream else images, texts=texts))
        if said is not None:
            said += likeliest(scores)
        scores["zero_shot"] = global_logits(project(cls, model.clip.visual.proj), zero_shot_text[:, None], 1.0)
        for name, score in scores.items():
            if not score.isfinite().all():
                raise ValueError(f"the {name} scores of some test images are not finite numbers: the weights or the "
                                 "precision do not serve")
            hits = torch.bincount(labels[score.argmax(dim=1) == labels], minlength=C)
            right[name] = right.get(name, 0) + hits
        seen += torch.bincount(labels, minlength=C)
    return Counts(right, seen)


def test(model, items, dataset, amp="off", workers=0, rank=0, world=1, template=None, said=None):
    """Scores a test split once, each image on one of the processes -> Counts over all of them.

    amp: the precision of the towers; `machine.usable_amp` says which one a device has. template: in place of the dataset's
    own. said: as in `count_right`, of this process's images.
    """
    device, preprocess = model.clip.logit_scale.device, clip.preprocess(model.clip.visual.resolution)
    pictures = data.Pictures(items, preprocess, own=dataset == "folder")
    loader = data.test_loader(pictures, EVAL_BATCH, workers, device, rank, world)
    with machine.autocast(amp, device):
        text = zero_shot_text(model.clip, model.class_names, data.template(dataset, template))
        counts = count_right(model, machine.progress(loader, "test", rank), text, said)
    if world > 1:
        for numbers in (*counts.right.values(), counts.seen):
            dist.all_reduce(numbers)
    assert counts.seen.sum() == len(items), f"tested {counts.seen.sum()} of {len(items)} images"
    return counts


def percentages(counts):
    """Counts as the fields of result.json: percent of all images right, by each score."""
    fields = ("accuracy", *(f"{name}_accuracy" for name in [*counts.right][1:]))
    return {field: 100 * right.sum().item() / counts.seen.sum().item()
            for field, right in zip(fields, counts.right.values())}


@torch.no_grad()
def zero_shot_text(clip_model, class_names, template):
    """Unit text features (C, D) of the dataset's hand-written template; underscores become spaces."""
    device = clip_model.logit_scale.device
    prompts = [template.format(name.replace("_", " ")) for name in class_names]
    return torch.cat([unit(clip_model.encode_text(clip.tokenize(chunk).to(device)))
                      for chunk in (prompts[i : i + 256] for i in range(0, len(prompts), 256))])


def write_per_class(path, class_names, counts):
    """A CSV file with the accuracy of every score for each class, in percent; empty where a class has no image."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["label", "class", "images", *counts.right])
            for label, (name, n) in enumerate(zip(class_names, counts.seen.tolist())):
                cells = [f"{100 * right[label].item() / n:.2f}" if n else "" for right in counts.right.values()]
                table.writerow([label, name, n, *cells])
    machine.write_whole(path, write)


def report(folder, model, counts, config, started, **more):
    """Writes result.json and per_class.csv of a run that began at `started`, and prints the accuracies."""
    figures = {**percentages(counts), "split": config["test_split"], "test_images": int(counts.seen.sum()),
               "learned_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
               "threads": torch.get_num_threads(), "precision": machine.precision(config["amp"]),
               "seconds": round(time.time() - started, 1), **more}
    named = {name: config[name] for name in ("method", "recipe", "dataset", "model", "shots", "seed", "split_seed")
             if name in config}                          # why: one method alone has a choice of recipes
    write_per_class(folder / "per_class.csv", model.class_names, counts)
    machine.write_json(folder / "result.json", {**figures, **named, "config": config, "versions": machine.versions()})
    written = [name for name in ("result.json", "per_class.csv", "log.jsonl", "last.pt") if (folder / name).exists()]
    print(f"{accuracies_line(figures)}, {figures['seconds']:.0f} s\nwrote {folder}/{', '.join(written)}")


def accuracies_line(result):
    """The accuracies of a run as one line of text."""
    others = ", ".join(f"{name.removesuffix('_accuracy').replace('_', '-')} {value:.2f}"
                       for name, value in result.items() if name.endswith("_accuracy"))
    images = f"{result['test_images']} {result.get('split', 'test')} images"
    return f"accuracy {result['accuracy']:.2f} %  ({others})  on {images}"


# ---- from scores to probabilities ----------------------------------------------------------------------------

def likeliest(scores, top=5):
    """Scores of a batch, {name: (B, C)}, the first of which decides -> for each image a pair.  Sec. 3.5

    [(label, probability), ...] of its likeliest classes, and {name: probability of the first of them by each score}.
    """
    probabilities = {name: score.float().softmax(dim=1) for name, score in scores.items()}             # (B, C) each
    best = next(iter(probabilities.values())).topk(min(top, len(next(iter(scores.values()))[0])))      # (B, top)
    first = {name: p.gather(1, best.indices[:, :1])[:, 0].tolist() for name, p in probabilities.items()}
    return [([*zip(labels, values)], {name: first[name][i] for name in first})
            for i, (labels, values) in enumerate(zip(best.indices.tolist(), best.values.tolist()))]


def calibration_error(said, labels, bins=15):
    """How far the probability of the predicted class is from how often it is right, in [0, 1]: the ECE of Guo et al.

    said: pairs of `likeliest`, of all images; labels: what they show. Equal bins (i/bins, (i+1)/bins]; the mean over
    the images of |accuracy - mean probability| of an image's bin.
    """
    top = [classes[0] for classes, _ in said]
    p = torch.tensor([p for _, p in top], dtype=torch.float64)                                         # (n,)
    right = torch.tensor([predicted == label for (predicted, _), label in zip(top, labels)], dtype=torch.float64)
    place = (p * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - p).abs().sum().item() / len(p)


# ---- runs ----------------------------------------------------------------------------------------------------

def load_run(run, device="cpu"):
    """A run's folder -> its model with the learned prompts, in evaluation mode.

    Raises FileNotFoundError where there is no run, ValueError where its CLIP is not the one it was trained with.
    """
    return runs.open_run(run, device)[1]


def load_pictures(config, data_root=None, classes=None):
    """What `data.load` gives for a run's configuration. data_root, classes: in place of the run's own."""
    return data.load(config["dataset"], root_of(config, data_root), config["shots"], config["split_seed"],
                     config["sampler"], config["held_out"], classes or config["classes"])


def root_of(config, data_root=None, dataset=None):
    """The folder of a run's dataset, or of another one: the one given, else the run's own."""
    return data.find_root(dataset or config["dataset"], data_root) if data_root else config["data_root"]


def unseen_pictures(run, checkpoint, data_root=None, split="test", on=None, classes=None):
    """What a run is tested on, see `asked_pictures`, without the pictures that it was trained on -> items, class names.

    why: what is held out of a folder of one's own pictures is drawn from what the folder holds now, not then. Says how
    many are left out, and where a run is not finished. Raises ValueError where no picture is left.
    """
    config, trained = checkpoint["config"], {*checkpoint["training"]}
    dataset, root = on or config["dataset"], root_of(config, data_root, on)
    items, class_names = asked_pictures(run, checkpoint, data_root, split, on, classes)
    if checkpoint["epoch"] < config.get("epochs", 0):
        print(f"note: {run} is not finished: it stands at epoch {checkpoint['epoch']} of {config['epochs']}",
              flush=True)
    if dataset != config["dataset"]:                       # why: equal names then do not mean equal pictures
        trained = set()
    elif dataset == "folder" and not trained:
        print(f"note: {run} is of an earlier version, which did not keep what it was trained on: if pictures were "
              "added since, some of those may count here", flush=True)
    unseen = [item for item in items if runs.below(item[0], root) not in trained]
    if len(unseen) < len(items):
        print(f"note: {run} was trained on {len(items) - len(unseen)} of the {len(items)} {split} pictures of today: "
              f"they are left out, {len(unseen)} count", flush=True)
    if not unseen:
        raise ValueError(f"{run} was trained on all pictures that are in its {split} part now")
    return unseen, class_names


def asked_pictures(run, checkpoint, data_root, split, on, classes):
    """A run's own test or validation pictures; on: those of another dataset; classes "new": of those that it lacks.

    -> items, class names. Raises ValueError where the run's own classes are others now, or it lacks none.
    """
    config = checkpoint["config"]
    if on:                                                 # why 0 shots: no training images are needed
        items, class_names = data.load(on, root_of(config, data_root, on), 0, config["split_seed"])[2:]
        published = (data.DATASETS[on].sizes or [len(items)])[-1]
        if len(items) != published:
            print(f"note: {on} has {len(items)} test pictures here, {published} as published", flush=True)
        return items, class_names
    if classes and config["classes"] != "base":
        raise ValueError(f"{run} was trained on all classes: --classes new is for runs of train.py --classes base")
    _, val, test, class_names = load_pictures(config, data_root)
    runs.check_classes(run, checkpoint["class_names"], class_names)
    return load_pictures(config, data_root, classes)[2:] if classes else (choose(split, val, test), class_names)


def choose(split, val, test):
    """The split that accuracies are measured on, "test" or "val". Raises ValueError where it is empty."""
    if split == "val" and not val:
        raise ValueError("there are no validation pictures: all are trained on. Give --shots, or a folder val/")
    return {"val": val, "test": test}[split]


def evaluate_run(run, checkpoint, device, data_root=None, workers=0, split="test", csv_file=None, on=None,
                 classes=None, amp=None):
    """Scores a run on its own test or validation split -> the fields that evaluation.json gets.

    csv_file: where `csv_row` of each image is written. on: another dataset, classes: "new", in place of its own. amp:
    the precision; the run's own where None.
    """
    start = time.time()
    config = checkpoint["config"]
    machine.check_writable(run)
    items, class_names = unseen_pictures(run, checkpoint, data_root, split, on, classes)
    model = runs.build(run, checkpoint, device, class_names)
    amp, asked = amp or machine.usable_amp(config["amp"], device), amp
    if amp != config["amp"] and not asked:
        print(f"note: {run} was trained in {config['amp']}, which needs a GPU; it is tested in float32", flush=True)
    if amp in machine.HALF:
        model.clip.store_matrices(machine.HALF[amp])
    said = []
    dataset, template = (on, None) if on else (config["dataset"], config["template"])
    counts = test(model, items, dataset, amp, workers, template=template, said=said)
    result = {**percentages(counts),
              "calibration_error": 100 * calibration_error(said, [label for _, label, _ in items]),
              "split": split, "test_images": int(counts.seen.sum()), "epoch": checkpoint["epoch"],
              **{name: config[name] for name in ("method", "dataset", "model", "shots", "seed")}, "tested_on": dataset,
              "precision": machine.precision(amp), "seconds": round(time.time() - start, 1)}
    name = f"evaluation-{on or classes}" if on or classes else "evaluation"
    machine.write_json(Path(run) / f"{name}.json", result)
    write_per_class(Path(run) / f"{name}.csv", class_names, counts)
    if csv_file:
        rows = [csv_row(path, words, class_names, label) for (path, label, _), words in zip(items, said)]
        machine.write_whole(csv_file, lambda path: write_csv(path, rows))
    return result


# ---- predictions for any pictures ----------------------------------------------------------------------------

def find(arguments):
    """Files and folders -> the files, with all pictures below the folders; then one line on each thing left out."""
    paths, notes = [], []
    for argument in arguments:
        if not os.path.isdir(argument):
            paths.append(argument)
            continue
        pictures, others = files.walk(argument)
        paths += pictures
        if not pictures:
            notes.append(f"{argument}: no picture in this folder")
        if others:
            notes.append(f"{argument}: left out {files.kinds(others)}, not read as pictures, first {others[0]}")
    return paths, notes


def predict(model, paths, top=5, batch_size=100):
    """Yields (path, [(class name, probability), ...]), the likeliest class first, for pictures read as people see them.

    model: from `evaluate.load_run`. paths: of files, or PIL images. Raises ValueError that names a file which cannot be
    read, when its turn comes.
    """
    for path, said in predictions(model, paths, top, batch_size):
        if isinstance(said, ValueError):
            raise said
        yield path, [(model.class_names[label], p) for label, p in said[0]]


@torch.no_grad()
def predictions(model, pictures, top=5, batch_size=100, workers=0, progress=iter):
    """Yields (picture, what `likeliest` says of it), or (picture, ValueError) for one that cannot be read."""
    device = model.clip.logit_scale.device
    pictures = [pictures] if isinstance(pictures, (str, os.PathLike, Image.Image)) else [*pictures]
    model.eval()
    texts = model.encode_prompts()                           # why here: the prompts do not change between images
    files = Files(pictures, clip.preprocess(model.clip.visual.resolution))
    loader, turn = DataLoader(files, batch_size, num_workers=workers, collate_fn=list), iter(pictures)
    for batch in progress(loader):
        images = [image for image in batch if torch.is_tensor(image)]
        scores = model.scores(model(torch.stack(images).to(device), texts=texts)) if images else {}
        said = iter(likeliest(scores, top) if images else [])
        yield from ((picture, next(said) if torch.is_tensor(image) else image) for image, picture in zip(batch, turn))


class Files(Dataset):
    """Paths or PIL images as tensors (3, R, R), or as the ValueError that says why one cannot be read."""

    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        picture = self.pictures[i]
        try:
            return self.transform(data.as_seen(picture) if isinstance(picture, Image.Image)
                                  else data.read_image(os.fspath(picture), own=True))
        except ValueError as error:
            return error


def name_files(model, arguments, csv_file=None, batch_size=100, workers=0):
    """The likeliest classes of each picture, on the screen or as a CSV file; see `find` for the arguments.

    Raises ValueError, when all others are done, where pictures could not be read.
    """
    paths, notes = find(arguments)
    rows, faults = [], []
    progress = functools.partial(machine.progress, label="pictures") if csv_file else iter
    for path, said in predictions(model, paths, batch_size=batch_size, workers=workers, progress=progress):
        if isinstance(said, ValueError):
            faults.append(said)
            continue
        rows.append(csv_row(path, said, model.class_names))
        if not csv_file:
            print(f"{path}:  " + "   ".join(f"{p:.1%} {model.class_names[label]}" for label, p in said[0]), flush=True)
    if csv_file and rows:
        machine.write_whole(csv_file, lambda temporary: write_csv(temporary, rows))
        print(f"wrote {csv_file}: {len(rows)} pictures", flush=True)
    for line in (*notes, *faults):
        print(line, file=sys.stderr)
    if faults:
        raise ValueError(f"{len(faults)} of {len(paths)} pictures could not be read")
    if not paths:
        raise ValueError("there is no picture to name")


def csv_row(path, said, class_names, label=None):
    """A picture's line of the CSV file, {column: value}; with a label also what it shows."""
    classes, by_score = said
    truth = {} if label is None else {"label": label, "class": class_names[label]}
    columns = {"path": path, **truth, "predicted_label": classes[0][0], "predicted": class_names[classes[0][0]],
               **{name: f"{p:.6f}" for name, p in by_score.items()}}
    for place, (label, p) in enumerate(classes, start=1):
        columns |= {f"class_{place}": class_names[label], f"probability_{place}": f"{p:.6f}"}
    return columns


def write_csv(path, rows):
    """Rows as a CSV file. why surrogateescape: a file name need not be text in any encoding."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.DictWriter(file, [*rows[0]])
        table.writeheader()
        table.writerows(rows)


# ---- the paper's tables --------------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
# Columns here: the columns of paper/table1.csv, and the methods of paper/table4.csv.
TABLE_1 = {"CLIP": "CLIP", "CoOp (Table 1)": "CoOp", "GalLoP (Table 1)": "GalLoP", "SOT-GLP": "SOT-GLP"}
TABLE_4 = ("CoOp", "GalLoP", "SOT-GLP")


def paper_table(number):
    """One of the paper's Tables 1 to 4 as printed, misprints too: a dict for each line of paper/table<number>.csv."""
    with open(Path(__file__).parent / "paper" / f"table{number}.csv", newline="", encoding="utf-8") as file:
        return [{name: cell if name in ("dataset", "method") else float(cell) for name, cell in line.items()}
                for line in csv.DictReader(file)]


def paper_numbers():
    """{(dataset, shots, method): [accuracy]} of the paper's Tables 1 and 4, in percent, without their averages.

    The two tables disagree on CoOp and GalLoP in places, so these two have another name in Table 1.
    """
    numbers = {(row["dataset"], 16, name): [row[column]] for row in paper_table(1) for name, column in TABLE_1.items()}
    numbers |= {(row["dataset"], shots, row["method"]): [row[str(shots)]]
                for row in paper_table(4) for shots in SHOTS if row["method"] in TABLE_4}
    return {key: value for key, value in numbers.items() if key[0] != "average"}


def our_numbers(folder):
    """{(dataset, shots, "ours"): accuracies over seeds} of the finished runs below a folder, their options, and notes.

    The methods other than SOT-GLP are called "our <method>". A run of the tiny model, on validation images, with other
    options than the first one of its method, dataset and shots, or with a repeated seed, is left out by name. Runs with
    a method's own defaults come first, then the order is that of the names.
    why: an ablation must not be averaged in, and the tiny model is none of the paper's.
    """
    numbers, first, seeds, notes = {}, {}, set(), []
    results = [(run, runs.read_result(run)) for run in runs.finished_runs(folder)]
    for run, result in sorted(results, key=lambda pair: runs.is_variant(pair[1]["config"])):
        if result["model"] == "tiny":
            notes.append(f"left out: {run} (model tiny; the paper has ViT-B/16)")
            continue
        if result.get("split", "test") != "test":
            notes.append(f"left out: {run} (measured on validation images)")
            continue
        method = result["config"]["method"]
        name = ("ours" if method == "sotglp" else f"our {method}") + " base" * (result["config"]["classes"] == "base")
        key = (result["dataset"], result["shots"], name)
        config = first.setdefault(key, result["config"])
        seed = {name: result[name] for name in ("seed", "split_seed")}
        differs = runs.changes({**config, **seed}, result["config"])
        if differs or (key, *seed.values()) in seeds:
            notes.append(f"left out: {run} ({', '.join(differs) or 'seed %d again' % result['seed']})")
            continue
        seeds.add((key, *seed.values()))
        numbers.setdefault(key, []).append(result["accuracy"])
        notes.append(f"{run}: {result['accuracy']:.2f} %, model {result['model']}, seed {result['seed']}"
                     + ", NOT CoOp's published split" * (result["split_matches_published"] is False))
    return numbers, first, notes


def mixed_options(configs):
    """What differs between the options of some cells, dataset, shots and seeds aside: a list of texts.

    The released recipe counts as one configuration, though it sets other values for each dataset.
    """
    def general(config):
        recipe = released.options(config["dataset"]) if config.get("recipe") == "released" else {}
        config = {name: "the recipe's" if name in recipe and recipe[name] == value else value
                  for name, value in config.items()}
        return {**config, **dict.fromkeys(("dataset", "shots", "seed", "split_seed"))}

    first, *others = map(general, configs or [{}])
    return [text for other in others for text in runs.changes(first, other)]


def print_tables(folder):
    """Tables 1 and 4 with ours beside the paper's numbers, blank where nothing ran; also table.csv in the folder."""
    ours, configs, notes = our_numbers(folder)
    our_methods = list(dict.fromkeys(["ours", *(method for _, _, method in ours)]))
    numbers = paper_numbers()
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in numbers))
    numbers |= ours
    for shots in SHOTS:                                 # averages of every method, over the datasets alone that ran
        ran = [dataset for dataset in datasets if any((dataset, shots, method) in ours for method in our_methods)]
        for method in dict.fromkeys((*TABLE_1, *TABLE_4, *our_methods)):
            keys = [(dataset, shots, method) for dataset in ran if (dataset, shots, method) in numbers]
            mixed = mixed_options([configs[key] for key in keys if key in configs])
            if mixed:
                notes.append(f"no average of {method} at {shots} shots: the datasets ran with different options "
                             f"({mixed[0]})")
            elif keys:
                numbers["average", shots, method] = [statistics.mean(statistics.mean(numbers[key]) for key in keys)]

    def row(label, keys):
        cells = [mean_and_spread(numbers.get(key, []), 2 if key[2] in our_methods else 1) for key in keys]
        print(f"{label:15s}" + "".join(f"{cell:>18s}" for cell in cells))

    print("All columns but our own are the paper's printed numbers; averages are over the datasets that ran here.\n"
          "A cell of ours is the mean of runs of one configuration: the method's own defaults, else that of the first\n"
          "by name; so is an average over datasets. Runs of model tiny are left out.")
    print("\nTable 1, 16 shots" + "".join(f"{name:>18s}" for name in (*TABLE_1, *our_methods))[2:])
    for dataset in (*datasets, "average"):
        row(dataset, [(dataset, 16, method) for method in (*TABLE_1, *our_methods)])
    print("\nTable 4, shots " + "".join(f"{shots:>18d}" for shots in SHOTS))
    for dataset in (*datasets, "average"):
        print(dataset)
        for method in (*TABLE_4, *our_methods):
            row(f"  {method}", [(dataset, shots, method) for shots in SHOTS])
    print("\n" + "\n".join(notes or [f"no result.json below {folder}: nothing ran yet"]))
    with open(Path(folder) / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["dataset", "shots", "method", "accuracy", "standard deviation", "runs"])
        for key, values in numbers.items():
            mine = key[2] in our_methods
            mean, _, sd = mean_and_spread(values, 2 if mine else 1).partition(" +- ")
            table.writerow([*key, mean, sd, len(values) if mine else ""])


def mean_and_spread(values, digits=2):
    """Several values as "84.21 +- 0.32", one as "84.21", none as ""."""
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


# ---- the script ----------------------------------------------------------------------------------------------

def read_alike(folders):
    """The checkpoints of runs that differ in their seeds alone. Raises ValueError for others, and for equal seeds."""
    checkpoints, seen = [runs.read_checkpoint(run) for run in folders], {}
    for run, checkpoint in zip(folders, checkpoints):
        runs.check_kind(folders[0], checkpoints[0], run, checkpoint)
        seeds = checkpoint["config"]["seed"], checkpoint["config"]["split_seed"]
        if seeds in seen:
            raise ValueError(f"{run} has the seeds of {seen[seeds]}: a mean over equal runs says nothing; name one of "
                             "them")
        seen[seeds] = run
    return checkpoints


def report_runs(args):
    """Each run's accuracies; for several also mean and standard deviation."""
    results = []
    for run, checkpoint in zip(args.runs, read_alike(args.runs)):
        results.append(evaluate_run(run, checkpoint, args.device, args.data_root, args.workers, args.split, args.csv,
                                    args.on, args.classes, args.amp))
        print(f"{run}: {accuracies_line(results[-1])}, {results[-1]['precision']}, expected calibration error "
              f"{results[-1]['calibration_error']:.2f} %", flush=True)
    if len(results) > 1:
        for field in (name for name in results[0] if name.endswith(("accuracy", "calibration_error"))):
            print(f"{field:18s} {mean_and_spread([result[field] for result in results])}  over {len(results)} runs")


def base_to_new(args):
    """Accuracies on the base and the new classes of runs with --classes base, and their harmonic means; zero-shot too.

    As in the literature the last lines have the harmonic mean of the two means; the deviation is that of the runs' own.
    """
    rows = {"accuracy": [], "zero_shot_accuracy": []}    # (base, new) of each run
    for run, checkpoint in zip(args.runs, read_alike(args.runs)):
        new, base = (evaluate_run(run, checkpoint, args.device, args.data_root, args.workers, classes=classes,
                                  amp=args.amp)
                     for classes in ("new", None))
        for field, pairs in rows.items():
            pairs.append((base[field], new[field]))
            print(f"{run}: {field:18s} base {base[field]:.2f}  new {new[field]:.2f}  "
                  f"harmonic mean {statistics.harmonic_mean(pairs[-1]):.2f}", flush=True)
    for field, pairs in rows.items():
        print(f"{field:18s} " + "  ".join(f"{name} {cell}" for name, cell in base_new_cells(pairs).items())
              + f"  over {len(pairs)} run{'s' * (len(pairs) > 1)}")


def base_new_cells(pairs):
    """Accuracies (base, new) of several runs -> {"base", "new", "harmonic mean": "mean +- deviation"}."""
    base, new = map(list, zip(*pairs))
    _, _, spread = mean_and_spread([statistics.harmonic_mean(pair) for pair in pairs]).partition(" +- ")
    mean = f"{statistics.harmonic_mean([statistics.mean(base), statistics.mean(new)]):.2f}"
    return {"base": mean_and_spread(base), "new": mean_and_spread(new),
            "harmonic mean": f"{mean} +- {spread}" if spread else mean}


def zero_shot(args):
    """The hand-written template on a dataset's test split, beside the published value where there is one."""
    name = clip.full_name(args.model or machine.default_model(args.dataset))
    template, root = data.template(args.dataset, args.template), data.find_root(args.dataset, args.data_root)
    *_, items, class_names = data.load(args.dataset, root, shots=0, seed=1)
    model, preprocess = clip.load(name, args.device, args.activation or "quickgelu")
    amp, right = args.amp or machine.default_amp(args.device), 0
    if amp in machine.HALF:
        model.store_matrices(machine.HALF[amp])
    pictures = data.Pictures(items, preprocess, own=args.dataset == "folder")
    loader = data.test_loader(pictures, EVAL_BATCH, args.workers, args.device)
    with torch.no_grad(), machine.autocast(amp, args.device):
        text = zero_shot_text(model, class_names, template)
        for images, labels in machine.progress(loader, "test"):
            scores = global_logits(unit(model.encode_image(images.to(args.device))), text[:, None], 1.0)      # (B, C)
            right += int((scores.argmax(1).cpu() == labels).sum())
    published = data.DATASETS[args.dataset].zero_shot
    beside = f"; published for ViT-B/16: {published} %" if published else ""
    print(f"zero-shot {name} on {args.dataset}: {100 * right / len(items):.2f} % of {len(items)} test images{beside}")


def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--images", nargs="+", metavar="PATH", help="pictures, or folders of pictures, to name with the one RUN given")
    add("--csv", metavar="FILE", help="write what the one RUN given says of each image, with probabilities")
    add("--split", choices=("test", "val"), help="score the test or the validation images of a RUN (test)")
    add("--classes", choices=("new",), help="test a RUN of train.py --classes base on the classes that it lacks")
    add("--on", choices=sorted(data.DATASETS), metavar="NAME", help="test a RUN on the pictures of another dataset")
    add("--base-to-new", action="store_true", help="RUNs on their base and on new classes, and the harmonic mean")
    add("--zero-shot", action="store_true", help="score the template; shows a wrong class order")
    add("--table", metavar="FOLDER", help="the paper's Tables 1 and 4 beside the runs below FOLDER")
    add("--dataset", choices=sorted(data.DATASETS), help="for --zero-shot (critters)")
    add("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16)")
    add("--activation", choices=clip.ACTIVATIONS, help="for --zero-shot with a file: that of its towers (quickgelu)")
    add("--template", metavar="TEXT", help="for --zero-shot: a prompt with {} for the class name (the dataset's own)")
    add("--data-root", help="folder of the datasets; for `folder` that of your pictures (the run's own, else "
        "$DATA_ROOT, else ./data)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF),
        help="mixed precision (a run's own; for --zero-shot fp16 on CUDA, off on CPU)")
    args = parser.parse_args(argv)
    if not (args.runs or args.zero_shot or args.table):
        parser.error("name at least one RUN, or --zero-shot --dataset NAME, or --table FOLDER")
    mode, used = (("--zero-shot", "dataset model activation template data_root amp") if args.zero_shot else
                  ("--table", "table") if args.table else
                  ("--images", "runs images csv") if args.images else
                  ("--base-to-new", "runs base_to_new data_root amp") if args.base_to_new else
                  ("--classes", "runs classes csv data_root amp") if args.classes else
                  ("--on", "runs on csv data_root amp") if args.on else ("a RUN", "runs csv split data_root amp"))
    unused = [name for name, value in vars(args).items()
              if value and name not in (*used.split(), "zero_shot", "device", "workers")]
    if unused:
        names = ("RUN" if name == "runs" else "--" + name.replace("_", "-") for name in unused)
        parser.error(f"with {mode} there is no use for {', '.join(names)}")
    if (args.images or args.csv) and len(args.runs) != 1:
        parser.error("--images and --csv go with exactly one RUN")
    machine.refuse_empty(parser, args)
    args.split, args.dataset = args.split or "test", args.dataset or "critters"
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    return args


@machine.plain_errors()
def main(args):
    """Zero-shot accuracy, the paper's tables, one's own pictures, or the accuracies of runs."""
    machine.check_device(args.device, args.amp or "off")
    if args.csv:
        runs.check_csv(args.csv)
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    if args.zero_shot:
        zero_shot(args)
    elif args.table:
        print_tables(args.table)
    elif args.images:
        name_files(load_run(args.runs[0], args.device), args.images, args.csv, EVAL_BATCH, args.workers)
    elif args.base_to_new:
        base_to_new(args)
    else:
        report_runs(args)


if __name__ == "__main__":
    main(parse_args())
