"""Scores a trained run on its test split, averages runs over seeds, or names the content of one's own pictures.

    python evaluate.py runs/eurosat-16shot-seed1                      the accuracies of one run, and per_class.csv
    python evaluate.py runs/eurosat-16shot-seed*                      several: mean and standard deviation
    python evaluate.py runs/eurosat-16shot-seed1 --images a.jpg b.png the five likeliest classes of each picture
    python evaluate.py --zero-shot --dataset eurosat                  the hand-written template, no run needed
    python evaluate.py --table runs/                                  the paper's Tables 1 and 4, ours beside them

Read it from `accuracy` (the numbers) through `load_run` (where a model comes from) to `main`.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

import data
from sotglp import SOTGLP, fuse, global_logits, unit

SCORES = ("fused", "global", "local", "zero_shot")
EVAL_BATCH = 100
PRACTICAL = {"data_root", "output_dir", "device", "workers", "amp", "text_chunk", "checkpoint_text"}  # not of method


# ---- accuracy ------------------------------------------------------------------------------------------------

@torch.no_grad()
def accuracy(model, loader, lambda_local, zero_shot_text):
    """Counts what each score gets right, in one pass over the images.

    loader gives (images (B, 3, R, R), labels (B,)); zero_shot_text (C, D) are unit vectors
    -> correct (4, C) in the order of SCORES, seen (C,), int64, per true class.
    """
    C, device = len(zero_shot_text), zero_shot_text.device
    correct = torch.zeros(len(SCORES), C, dtype=torch.int64, device=device)
    seen = torch.zeros(C, dtype=torch.int64, device=device)
    model.eval()
    texts = model.encode_prompts()                       # why: once, the prompts do not change between images
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        image, patches = model.encode_images(images)
        g, l = model.score(image, patches, *texts)
        seen += torch.bincount(labels, minlength=C)
        zero_shot = global_logits(image, zero_shot_text[:, None], 1.0)
        for row, score in zip(correct, (fuse(g, l, lambda_local), g, l, zero_shot)):
            row += torch.bincount(labels[score.argmax(dim=1) == labels], minlength=C)
    return correct, seen


def percentages(correct, seen):
    """The counts of `accuracy` as the fields of result.json: percent of all images right, per score."""
    fused, *others = (100 * correct.sum(dim=1) / seen.sum()).tolist()
    return {"accuracy": fused, **{f"{name}_accuracy": value for name, value in zip(SCORES[1:], others)}}


@torch.no_grad()
def zero_shot_text(clip_model, class_names, template):
    """Unit text features (C, D) of the data set's hand-written template, underscores as spaces."""
    device = clip_model.logit_scale.device
    prompts = [template.format(name.replace("_", " ")) for name in class_names]
    return torch.cat([unit(clip_model.encode_text(clip.tokenize(chunk).to(device)))
                      for chunk in (prompts[i : i + 256] for i in range(0, len(prompts), 256))])


def write_per_class(path, class_names, correct, seen):
    """per_class.csv: accuracy of every score for each class, in percent."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", "class", "images", *SCORES])
        for label, name in enumerate(class_names):
            n = int(seen[label])
            table.writerow([label, name, n, *(f"{100 * c / n:.2f}" if n else "" for c in correct[:, label].tolist())])


# ---- runs ----------------------------------------------------------------------------------------------------

def make_model(clip_model, class_names, config):
    """The SOTGLP that a configuration (the options of train.py, as a dict) describes."""
    return SOTGLP(clip_model, class_names, n_global=config["n_global"], n_local=config["n_local"],
                  n_support=config["n_support"], epsilon=config["epsilon"], n_iters=config["n_iters"],
                  prompt_dropout=config["prompt_dropout"], local_projection=not config["no_local_projection"],
                  vv_attention=not config["no_vv"], class_specific=not config["shared_local"],
                  plan_gradient=not config["no_plan_gradient"], text_chunk=config["text_chunk"],
                  checkpoint_text=config["checkpoint_text"])


def read_run(run):
    """The contents of a run's last.pt. Raises FileNotFoundError for a folder that holds none."""
    path = Path(run) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no last.pt: name a folder that train.py wrote, such as "
                                "runs/critters-16shot-seed1")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_run(run, device="cpu"):
    """A run's folder -> its model with the learned prompts, in evaluation mode.

    Raises FileNotFoundError where there is no run, ValueError where its CLIP is not the one it was trained with.
    """
    checkpoint = read_run(run)
    clip_model, _ = clip.load(checkpoint["config"]["model"], device)
    model = make_model(clip_model, checkpoint["class_names"], checkpoint["config"])
    restore(run, checkpoint, model, clip.weights_hash(clip_model))
    return model.eval()


def restore(run, checkpoint, model, clip_sha256):
    """Puts the learned tensors of a checkpoint into a model. Raises ValueError where they do not belong together."""
    if checkpoint["clip_sha256"] != clip_sha256:
        raise ValueError(f"{run} was trained with other CLIP weights: those of {checkpoint['config']['model']} have "
                         f"SHA-256 {clip_sha256[:12]}... now, {checkpoint['clip_sha256'][:12]}... then")
    learned = model.learned_state()
    if {name: p.shape for name, p in learned.items()} != {name: p.shape for name, p in checkpoint["learned"].items()}:
        raise ValueError(f"{run}/last.pt does not hold the tensors that its configuration asks for: "
                         f"found {sorted(checkpoint['learned'])}, expected {sorted(learned)}")
    for name, tensor in learned.items():
        tensor.copy_(checkpoint["learned"][name])


def changes(before, now):
    """In which options, those of mere practice aside, two configurations differ: a list of texts."""
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in now
            if name not in PRACTICAL and before.get(name) != now[name]]


def check_classes(run, trained, found):
    """Raises ValueError, with the first class that differs, where a run knows other classes than the data has."""
    if trained != found:
        pairs = itertools.zip_longest(trained, found)
        label, (then, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(f"{run} was trained for other classes: label {label} of {len(trained)} was {then!r}, "
                         f"in the data it is {now!r}, of {len(found)}")


def evaluate_run(run, device, data_root=None, workers=0):
    """Scores a run on its own test split; writes evaluation.json and per_class.csv into it -> the fields written."""
    checkpoint, start = read_run(run), time.time()
    config = checkpoint["config"]
    model = load_run(run, device)
    _, _, test, class_names = data.load(config["dataset"], data_root or config["data_root"], config["shots"],
                                        config["split_seed"], config["sampler"])
    check_classes(run, checkpoint["class_names"], class_names)
    preprocess = clip.preprocess(model.clip.visual.resolution)
    loader = data.test_loader(data.Pictures(test, preprocess), EVAL_BATCH, workers, device)
    text = zero_shot_text(model.clip, class_names, data.template(config["dataset"]))
    correct, seen = accuracy(model, progress(loader, "test"), config["lambda_local"], text)
    result = {**percentages(correct, seen), "test_images": int(seen.sum()), "epoch": checkpoint["epoch"],
              "dataset": config["dataset"], "model": config["model"], "shots": config["shots"], "seed": config["seed"],
              "seconds": round(time.time() - start, 1)}
    write_json(Path(run) / "evaluation.json", result)
    write_per_class(Path(run) / "per_class.csv", class_names, correct, seen)
    return result


# ---- the paper's tables --------------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
TABLE_1 = ("CLIP", "CoOp (Table 1)", "GalLoP (Table 1)", "SOT-GLP")
TABLE_4 = ("CoOp", "GalLoP", "SOT-GLP")
# The paper's own printed numbers, ViT-B/16: the columns of Table 1 above, at 16 shots, then for each method of Table 4
# its five shots. The paper's two tables disagree on CoOp and GalLoP in places.
PAPER = """
imagenet       66.7 71.7 75.1 75.5  66.5 67.8 69.0 70.8 71.7  71.0 71.8 72.5 73.8 75.1  71.2 72.1 72.9 74.3 75.5
caltech101     92.2 95.6 96.7 97.4  79.9 89.0 92.1 93.4 95.4  94.7 95.1 95.5 96.0 96.7  95.0 95.3 95.7 96.1 97.4
oxford_pets    88.4 91.9 94.1 94.8  44.1 58.4 71.2 78.4 85.3  92.2 93.2 93.4 93.4 94.1  92.4 93.2 93.7 93.4 94.8
stanford_cars  65.5 83.1 89.2 89.2  67.4 70.5 74.5 79.3 83.1  71.0 76.1 78.3 84.9 89.2  71.4 74.4 80.0 84.3 89.2
oxford_flowers 70.7 97.1 98.8 99.2  69.7 85.1 92.0 96.1 97.4  84.9 92.5 95.2 98.5 98.8  86.4 93.5 96.6 98.6 99.2
food101        84.8 84.2 86.5 87.8  71.2 73.4 77.1 80.2 82.2  83.9 84.5 85.0 86.6 87.3  85.9 86.2 86.6 87.3 87.8
fgvc_aircraft  24.8 43.4 58.3 57.6  19.6 26.4 32.3 39.4 45.4  32.8 36.2 44.1 51.0 58.3  30.0 34.5 41.4 49.8 57.6
sun397         62.3 74.7 77.2 78.2  66.8 66.5 69.9 71.5 74.7  68.3 71.6 73.8 75.7 77.2  71.6 72.9 74.6 76.1 78.2
dtd            44.1 69.9 75.5 77.1  34.6 40.8 55.7 63.5 69.9  56.0 61.3 66.9 72.4 75.5  57.0 62.4 67.3 73.5 77.1
eurosat        48.3 84.9 90.1 91.7  49.2 62.0 77.1 84.4 87.2  68.5 72.1 82.7 86.9 90.1  70.7 74.6 83.3 88.7 91.7
ucf101         64.7 82.2 86.9 87.5  71.2 73.4 77.1 80.2 82.2  74.5 78.2 81.9 85.0 86.9  75.4 79.6 82.5 86.2 87.5
"""


def paper_numbers():
    """{(data set, shots, method): [accuracy]} of the paper's Tables 1 and 4, in percent."""
    numbers = {}
    for dataset, *row in map(str.split, PAPER.strip().splitlines()):
        row = list(map(float, row))
        numbers |= {(dataset, 16, method): [value] for method, value in zip(TABLE_1, row)}
        keys = [(dataset, shots, method) for method in TABLE_4 for shots in SHOTS]
        numbers |= {key: [value] for key, value in zip(keys, row[len(TABLE_1):])}
    return numbers


def our_numbers(folder):
    """{(data set, shots, "ours"): accuracies over seeds} of the finished runs below a folder, and notes on them.

    why: a run whose options, seeds aside, are not those of the first one found for its data set and shots, or that
    repeats a seed, is left out by name: an ablation must not be averaged in.
    """
    numbers, first, seeds, notes = {}, {}, set(), []
    for path in sorted(Path(folder).rglob("result.json")):
        result = json.loads(path.read_text())
        key = (result["dataset"], result["shots"], "ours")
        config = first.setdefault(key, result["config"])
        seed = {name: result[name] for name in ("seed", "split_seed")}
        differs = changes({**config, **seed}, result["config"])
        if differs or (key, *seed.values()) in seeds:
            notes.append(f"left out: {path.parent} ({', '.join(differs) or 'seed %d again' % result['seed']})")
            continue
        seeds.add((key, *seed.values()))
        numbers.setdefault(key, []).append(result["accuracy"])
        notes.append(f"{path.parent}: {result['accuracy']:.2f} %, model {result['model']}, seed {result['seed']}"
                     + ", NOT CoOp's published split" * (result["split_matches_published"] is False))
    return numbers, notes


def print_tables(folder):
    """Tables 1 and 4 with ours beside the paper's numbers, blank where nothing ran; also table.csv in the folder."""
    ours, notes = our_numbers(folder)
    numbers = paper_numbers()
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in numbers))
    numbers |= ours
    for shots in SHOTS:                                 # averages of every method, over the data sets alone that ran
        ran = [dataset for dataset in datasets if (dataset, shots, "ours") in ours]
        for method in dict.fromkeys((*TABLE_1, *TABLE_4, "ours")):
            values = [statistics.mean(numbers[d, shots, method]) for d in ran if (d, shots, method) in numbers]
            numbers |= {("average", shots, method): [statistics.mean(values)]} if values else {}

    def row(label, keys):
        cells = [mean_and_spread(numbers.get(key, []), 2 if key[2] == "ours" else 1) for key in keys]
        print(f"{label:15s}" + "".join(f"{cell:>18s}" for cell in cells))

    print("All columns but ours are the paper's printed numbers; averages are over the data sets that ran here.")
    print("\nTable 1, 16 shots" + "".join(f"{name:>18s}" for name in (*TABLE_1, "ours"))[2:])
    for dataset in (*datasets, "average"):
        row(dataset, [(dataset, 16, method) for method in (*TABLE_1, "ours")])
    print("\nTable 4, shots " + "".join(f"{shots:>18d}" for shots in SHOTS))
    for dataset in (*datasets, "average"):
        print(dataset)
        for method in (*TABLE_4, "ours"):
            row(f"  {method}", [(dataset, shots, method) for shots in SHOTS])
    print("\n" + "\n".join(notes or [f"no result.json below {folder}: nothing ran yet"]))
    with open(Path(folder) / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["dataset", "shots", "method", "accuracy", "standard deviation", "runs"])
        for key, values in numbers.items():
            mine = key[2] == "ours"
            mean, _, sd = mean_and_spread(values, 2 if mine else 1).partition(" +- ")
            table.writerow([*key, mean, sd, len(values) if mine else ""])


def mean_and_spread(values, digits=2):
    """Several values as "84.21 +- 0.32", one as "84.21", none as ""."""
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


# ---- what every script of this project prints and writes with ------------------------------------------------

def progress(steps, label, rank=0):
    """Passes the steps on; where stderr is a terminal, a line of rank 0 there says how far they are."""
    start, shown = time.time(), 0.0
    for i, step in enumerate(steps, 1):
        yield step
        if rank == 0 and sys.stderr.isatty() and time.time() - shown > 0.5:
            shown = time.time()
            left = (shown - start) / i * (len(steps) - i)
            print(f"\r{label} {i}/{len(steps)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def write_whole(path, write):
    """Calls write(temporary path), then renames: a reader never sees half a file."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, fields):
    """A dict as indented JSON, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(fields, indent=2) + "\n"))


@contextlib.contextmanager
def plain_errors(rank=0):
    """What is wrong with the user's input ends the program with one line on stderr, from rank 0 alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}" if rank == 0 else 1)


def accuracies_line(result):
    """The four accuracies as one line of text."""
    return (f"accuracy {result['accuracy']:.2f} %  (global {result['global_accuracy']:.2f}, "
            f"local {result['local_accuracy']:.2f}, zero-shot {result['zero_shot_accuracy']:.2f})  "
            f"on {result['test_images']} test images")


def default_model(dataset):
    """The CLIP that goes with a data set where none is named."""
    return "tiny" if dataset == "critters" else "ViT-B/16"


def default_device():
    """The first GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- the script ----------------------------------------------------------------------------------------------

def report_runs(args):
    """Each run's accuracies; for several also mean and standard deviation."""
    results = []
    for run in args.runs:
        results.append(evaluate_run(run, args.device, args.data_root, args.workers))
        print(f"{run}: {accuracies_line(results[-1])}", flush=True)
    if len(results) > 1:
        for field in ("accuracy", "global_accuracy", "local_accuracy", "zero_shot_accuracy"):
            print(f"{field:18s} {mean_and_spread([result[field] for result in results])}  over {len(results)} runs")


@torch.no_grad()
def predict_images(args):
    """The five likeliest classes of each picture, with the probabilities of the fused score (Sec. 3.5)."""
    run, = args.runs
    checkpoint, model = read_run(run), load_run(run, args.device)
    preprocess = clip.preprocess(model.clip.visual.resolution)
    texts = model.encode_prompts()
    for path in args.images:
        images = preprocess(data.read_image(path))[None].to(args.device)
        logits = fuse(*model.score(*model.encode_images(images), *texts), checkpoint["config"]["lambda_local"])
        top = logits.softmax(dim=1)[0].topk(min(5, logits.shape[1]))
        print(path + ":  " + "   ".join(f"{p:.1%} {checkpoint['class_names'][c]}"
                                        for p, c in zip(top.values.tolist(), top.indices.tolist())))


def zero_shot(args):
    """The hand-written template on a data set's test split, beside the published value where there is one."""
    name = args.model or default_model(args.dataset)
    *_, test, class_names = data.load(args.dataset, args.data_root, shots=0, seed=1)
    model, preprocess = clip.load(name, args.device)
    text = zero_shot_text(model, class_names, data.template(args.dataset))
    right = 0
    loader = data.test_loader(data.Pictures(test, preprocess), EVAL_BATCH, args.workers, args.device)
    with torch.no_grad():
        for images, labels in progress(loader, "test"):
            right += int(((unit(model.encode_image(images.to(args.device))) @ text.T).argmax(1).cpu() == labels).sum())
    published = data.DATASETS[args.dataset].zero_shot
    beside = f"; published for ViT-B/16: {published} %" if published else ""
    print(f"zero-shot {name} on {args.dataset}: {100 * right / len(test):.2f} % of {len(test)} test images{beside}")


def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="pictures to name with the one RUN given")
    parser.add_argument("--zero-shot", action="store_true", help="score the template; shows a wrong class order")
    parser.add_argument("--table", metavar="FOLDER", help="the paper's Tables 1 and 4 beside the runs below FOLDER")
    parser.add_argument("--dataset", choices=sorted(data.DATASETS), default="critters", help="for --zero-shot")
    parser.add_argument("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16)")
    parser.add_argument("--data-root", help="folder of the data sets (the run's own, else $DATA_ROOT, else ./data)")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (%(default)s)")
    args = parser.parse_args(argv)
    if not (args.runs or args.zero_shot or args.table):
        parser.error("name at least one RUN, or --zero-shot --dataset NAME, or --table FOLDER")
    if args.images and len(args.runs) != 1:
        parser.error("--images goes with exactly one RUN")
    return args


def main(args):
    """Zero-shot accuracy, the paper's tables, one's own pictures, or the accuracies of runs."""
    with plain_errors():
        if args.zero_shot:
            args.data_root = args.data_root or data.default_root()
            zero_shot(args)
        elif args.table:
            print_tables(args.table)
        elif args.images:
            predict_images(args)
        else:
            report_runs(args)


if __name__ == "__main__":
    main(parse_args())
