"""The accuracies of a run, from counts to percentages, files and lines of text."""

import statistics
import time

import clip  # noqa: F401  (before torch: it bounds how long torch's threads wait)

import torch

from harness import machine


def percentages(counts):
    """`evaluate.Counts` as the fields of result.json: percent of all images right, by each score."""
    _, *others = counts.n_correct
    fields = ["accuracy", *(f"{name}_accuracy" for name in others)]
    n_images = counts.n_images.sum().item()
    return {field: 100 * n_correct.sum().item() / n_images
            for field, n_correct in zip(fields, counts.n_correct.values())}


def write_per_class(path, class_names, counts):
    """A CSV file: the accuracy of every score for each class, in percent; empty where it has no image."""
    rows = []
    for label, (name, n) in enumerate(zip(class_names, counts.n_images.tolist())):
        row = {"label": label, "class": name, "images": n}
        for score, n_correct in counts.n_correct.items():
            row[score] = f"{100 * n_correct[label].item() / n:.2f}" if n else ""
        rows.append(row)
    machine.write_csv(path, rows)


def write_confusion(path, class_names, confusion):
    """A CSV file with a row for each true class and a column for each predicted one: how many images."""
    # why numbers: two classes may share a name
    names = [f"{label} {name}" for label, name in enumerate(class_names)]
    machine.write_csv(path, [{"true class": name, **dict(zip(names, counts))}
                             for name, counts in zip(names, confusion.tolist())])


def report(folder, model, counts, config, started, **more):
    """Writes result.json, per_class.csv and confusion.csv of a run, prints its accuracies.

    started: when the run began, by time.monotonic(). more: other fields of result.json.
    """
    split = config["test_split"]
    result = {
        **percentages(counts),
        "split": split,
        f"{split}_images": int(counts.n_images.sum()),
        "learned_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "threads": torch.get_num_threads(),
        "precision": machine.precision(config["amp"]),
        "seconds": round(time.monotonic() - started, 1),
        **more,
        **{name: config[name] for name in ("method", "dataset", "model", "shots", "seed", "split_seed")},
        "config": config,
        "versions": machine.versions()}
    write_per_class(folder / "per_class.csv", model.class_names, counts)
    write_confusion(folder / "confusion.csv", model.class_names, counts.confusion)
    machine.write_json(folder / "result.json", result)

    files = ("result.json", "per_class.csv", "confusion.csv", "log.jsonl", "last.pt")
    written = [name for name in files if (folder / name).exists()]
    print(f"{accuracies_line(result)}, {result['seconds']:.0f} s\nwrote {folder}/{', '.join(written)}")


def accuracies_line(result):
    """The accuracies of a run as one line of text."""
    others = ", ".join(f"{name.removesuffix('_accuracy').replace('_', '-')} {value:.2f}"
                       for name, value in result.items() if name.endswith("_accuracy"))
    split = result.get("split", "test")
    images = f"{result.get(f'{split}_images', 'unknown')} {split} images"
    return f"accuracy {result['accuracy']:.2f} %  ({others})  on {images}"


def mean_and_spread(values, digits=2):
    """Several values as "84.21 +- 0.32", one as "84.21", none as ""."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
