"""Names the classes of pictures; `evaluate.py RUN --images` and these lines use it.

    from evaluate import load_run, predict
    model = load_run("runs/folder-8shot-seed1")
    for path, top in predict(model, ["a.jpg", "b.jpg"]):
        print(path, top)

A probability is the softmax of a score. The first score of a method decides, for SOT-GLP the fused one (Sec. 3.5).
"""

import csv
import functools
import os
import sys

import clip  # before torch: it bounds how long torch's threads wait

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
import folder
import runs

BATCH = 100


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


# ---- which pictures ------------------------------------------------------------------------------------------

def find(arguments):
    """Files and folders -> the files, with all pictures below the folders; then one line on each thing left out."""
    paths, notes = [], []
    for argument in arguments:
        if not os.path.isdir(argument):
            paths.append(argument)
            continue
        pictures, others = folder.walk(argument)
        paths += pictures
        if not pictures:
            notes.append(f"{argument}: no picture in this folder")
        if others:
            notes.append(f"{argument}: left out {folder.kinds(others)}, not read as pictures, first {others[0]}")
    return paths, notes


def unseen_pictures(run, checkpoint, data_root=None, split="test"):
    """The test or validation pictures of a run, without those that it was trained on -> items, class names.

    why: what is held out of a folder of one's own pictures is drawn from what the folder holds now, not then. Says how
    many are left out. Raises ValueError where none are left, or the classes are others.
    """
    config = checkpoint["config"]
    root, trained = data_root or config["data_root"], {*checkpoint["training"]}
    _, val, test, class_names = data.load(config["dataset"], root, config["shots"], config["split_seed"],
                                          config["sampler"], config["held_out"], config["classes"])
    runs.check_classes(run, checkpoint["class_names"], class_names)
    items = choose(split, val, test)
    if config["dataset"] == "folder" and not trained:
        print(f"note: {run} is of an earlier version, which did not keep what it was trained on: if pictures were "
              "added since, some of those may count here", flush=True)
    unseen = [item for item in items if runs.below(item[0], root) not in trained]
    if len(unseen) < len(items):
        print(f"note: {run} was trained on {len(items) - len(unseen)} of the {len(items)} {split} pictures of today: "
              f"they are left out, {len(unseen)} count", flush=True)
    if not unseen:
        raise ValueError(f"{run} was trained on all pictures that are in its {split} part now")
    return unseen, class_names


def choose(split, val, test):
    """The split that accuracies are measured on, "test" or "val". Raises ValueError where it is empty."""
    if split == "val" and not val:
        raise ValueError("there are no validation pictures: all are trained on. Give --shots, or a folder val/")
    return {"val": val, "test": test}[split]


# ---- from pictures to predictions ----------------------------------------------------------------------------

def predict(model, paths, top=5, batch_size=BATCH):
    """Yields (path, [(class name, probability), ...]), the likeliest class first, for pictures read as people see them.

    model: from `evaluate.load_run`. paths: of files, or PIL images. Raises ValueError that names a file which cannot be
    read, when its turn comes.
    """
    for path, said in predictions(model, paths, top, batch_size):
        if isinstance(said, ValueError):
            raise said
        yield path, [(model.class_names[label], p) for label, p in said[0]]


@torch.no_grad()
def predictions(model, pictures, top=5, batch_size=BATCH, workers=0, progress=iter):
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
            return self.transform(folder.as_seen(picture) if isinstance(picture, Image.Image)
                                  else folder.read_image(os.fspath(picture), own=True))
        except ValueError as error:
            return error


# ---- from the shell ------------------------------------------------------------------------------------------

def name_files(model, arguments, csv_file=None, batch_size=BATCH, workers=0):
    """The likeliest classes of each picture, on the screen or as a CSV file; see `find` for the arguments.

    Raises ValueError, when all others are done, where pictures could not be read.
    """
    paths, notes = find(arguments)
    rows, faults = [], []
    progress = functools.partial(runs.progress, label="pictures") if csv_file else iter
    for path, said in predictions(model, paths, batch_size=batch_size, workers=workers, progress=progress):
        if isinstance(said, ValueError):
            faults.append(said)
            continue
        rows.append(csv_row(path, said, model.class_names))
        if not csv_file:
            print(f"{path}:  " + "   ".join(f"{p:.1%} {model.class_names[label]}" for label, p in said[0]), flush=True)
    if csv_file and rows:
        runs.write_whole(csv_file, lambda temporary: write_csv(temporary, rows))
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
