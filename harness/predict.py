"""What a trained model says of any pictures: the likeliest classes, on the screen or as a CSV file."""

import functools
import glob
import itertools
import numbers
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import clip  # before torch: it bounds how long torch's threads wait

import torch
from PIL import Image

import data
from harness import machine
from sources import listing, reading
from sources.seen import as_seen


class Prediction(NamedTuple):
    """What a model says of one image."""
    classes: list      # [(label, probability), ...], the likeliest first
    by_score: dict     # {score: probability of the likeliest class by this score}


def likeliest(logits, scores, top=5):
    """The likeliest classes of each image, by the score that decides -> a list of Prediction.  Sec. 3.5

    logits (B, C): the score that decides; scores: all of them, {name: (B, C)}.
    """
    B, C = logits.shape
    best = logits.float().softmax(dim=1).topk(min(top, C))                         # (B, top)
    first = best.indices[:, :1]                                                    # (B, 1)
    by_score = {}                                                                  # {score: B probabilities}
    for name, score in scores.items():
        by_score[name] = score.float().softmax(dim=1).gather(1, first)[:, 0].tolist()

    found = []
    for i, (labels, probabilities) in enumerate(zip(best.indices.tolist(), best.values.tolist())):
        classes = [*zip(labels, probabilities)]
        found.append(Prediction(classes, {name: values[i] for name, values in by_score.items()}))
    return found


def predict(model, paths, top=5, batch_size=100):
    """Yields (path, [(class name, probability), ...]) for each picture, the likeliest class first.

    model: from `evaluate.load_run`. paths: one path or PIL image, or any number of them; they are read as
    they come, and as people see them. Raises ValueError for a top or a batch size that is no whole number
    above 0, and for a picture that cannot be read, when its turn comes; TypeError for what is neither a path
    nor a PIL image.
    """
    if not all(isinstance(number, numbers.Integral) and number >= 1 for number in (top, batch_size)):
        raise ValueError(f"top and batch_size must be at least 1, got {top!r} and {batch_size!r}: give whole "
                         "numbers")
    top, batch_size = int(top), min(int(batch_size), sys.maxsize)
    if not hasattr(paths, "__iter__") or hasattr(paths, "read") or isinstance(paths, bytes):
        check_kind(paths)
    return named(predictions(model, paths, top, batch_size), model.class_names)


def named(found, class_names):
    """What `predictions` yields, with the names of classes. Raises the ValueError of a picture."""
    for picture, prediction in found:
        if isinstance(prediction, ValueError):
            raise prediction
        yield picture, [(class_names[label], p) for label, p in prediction.classes]


def check_kind(picture):
    """Raises TypeError for what is neither a path nor a PIL image, with the call that makes one of it."""
    if not isinstance(picture, (str, os.PathLike, Image.Image)):
        raise TypeError(f"a picture is a path or a PIL image, not {type(picture).__name__}: Image.open(file) "
                        "makes one of an open file, Image.fromarray(array) of a NumPy array of uint8 "
                        "(height, width, 3)")


@torch.no_grad()
def predictions(model, pictures, top=5, batch_size=100, workers=1):
    """Yields (picture, Prediction), or (picture, ValueError) for one that cannot be read.

    workers: how many threads read pictures.
    """
    device = model.clip.logit_scale.device
    dtype = model.clip.logit_scale.dtype
    if dtype != torch.float32:
        raise ValueError(f"the model must be in float32, as load_run gives it, found {dtype}: autocast "
                         "computes in less")
    if isinstance(pictures, (str, os.PathLike, Image.Image)):
        pictures = [pictures]
    pictures = enumerate(pictures, start=1)
    read = functools.partial(read_as_tensor, transform=clip.preprocess(model.clip.visual.resolution))
    model.eval()
    text_features = model.encode_prompts()               # why here: the prompts are the same for all images

    with ThreadPoolExecutor(max(1, workers)) as pool:    # why threads: Pillow decodes outside Python's lock
        while batch := [*itertools.islice(pictures, batch_size)]:
            images = [*pool.map(read, batch)]            # (3, R, R) each, or ValueError
            readable = [image for image in images if torch.is_tensor(image)]
            found = []
            if readable:
                outputs = model(torch.stack(readable).to(device), None, text_features)
                found = likeliest(model.logits(outputs), model.scores(outputs), top)

            found = iter(found)
            for (_, picture), image in zip(batch, images):
                if torch.is_tensor(image):
                    yield picture, next(found)
                else:
                    yield picture, image


def read_as_tensor(numbered, transform):
    """(place, path or PIL image) -> a tensor (3, R, R), or a ValueError where the picture cannot be read."""
    place, picture = numbered
    check_kind(picture)
    try:
        if not isinstance(picture, Image.Image):
            image = reading.read_image(os.fspath(picture), as_people_see=True)
            return data.to_tensor(image, transform, picture)
        # why: Pillow may read its file only now
        with reading.named_errors(f"number {place}, a PIL image"):
            return transform(as_seen(picture))
    except ValueError as error:
        return error


# ---- the script --------------------------------------------------------------------------------------------

def find(arguments):
    """Files and folders -> the files and all pictures below the folders, a line on each thing left out."""
    paths = []
    notes = []
    for argument in itertools.chain(*map(expand, arguments)):
        suffix = os.path.splitext(argument)[1]
        if os.path.isdir(argument):
            pictures, others, system = listing.walk(argument)
            paths += pictures
            if not pictures:
                notes.append(f"{argument}: no picture in this folder")
            notes += [f"{argument}: left out {text}" for text in listing.left_out(others, system)]
        elif suffix and os.path.exists(argument) and not listing.is_picture(str(argument)):
            notes.append(f"{argument}: left out, {suffix} is not read as a picture, here as in folders")
        else:
            paths.append(argument)
    return paths, notes


def expand(argument):
    """A pattern such as *.jpg -> the files that fit it; a name -> itself. why: Windows expands none."""
    if os.path.exists(argument) or not glob.has_magic(str(argument)):
        return [argument]
    found = sorted(glob.glob(str(argument), recursive=True), key=listing.normal)
    if not found:
        raise ValueError(f"no file fits {argument}")
    return found


def name_files(model, arguments, csv_file=None, batch_size=100, workers=1):
    """The likeliest classes of each picture, on the screen or as a CSV file; see `find` for the arguments.

    Raises ValueError, when all others are done, where pictures could not be read.
    """
    paths, notes = find(arguments)
    if not paths:
        raise ValueError("\n".join(["there is no picture to name", *notes]))

    found = predictions(model, paths, batch_size=batch_size, workers=workers)
    if csv_file:
        found = machine.progress(found, "pictures", total=len(paths))

    rows = []
    faults = []
    for path, prediction in found:
        if isinstance(prediction, ValueError):
            faults.append(prediction)
            continue
        rows.append(csv_row(path, prediction, model.class_names))
        if not csv_file:
            classes = "   ".join(f"{p:.1%} {model.class_names[label]}" for label, p in prediction.classes)
            print(f"{path}:  {classes}", flush=True)

    if csv_file and rows:
        machine.write_csv(csv_file, rows)
        print(f"wrote {csv_file}: {len(rows)} pictures", flush=True)
    for line in (*notes, *faults):
        print(line, file=sys.stderr)
    if faults:
        raise ValueError(f"{len(faults)} of {len(paths)} pictures could not be read")


def csv_row(path, prediction, class_names, label=None):
    """A picture's line of the CSV file, {column: value}; with a label also what it shows."""
    predicted, _ = prediction.classes[0]
    row = {"path": path}
    if label is not None:
        row |= {"label": label, "class": class_names[label]}
    row |= {"predicted_label": predicted, "predicted": class_names[predicted]}
    row |= {name: f"{p:.6f}" for name, p in prediction.by_score.items()}
    for rank, (other, p) in enumerate(prediction.classes, start=1):
        row |= {f"class_{rank}": class_names[other], f"probability_{rank}": f"{p:.6f}"}
    return row
