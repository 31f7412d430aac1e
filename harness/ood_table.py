"""The table of ood.py: our rows and the paper's Table 3, as text, as JSON, and a line for each picture."""

from pathlib import Path

import paper
from harness import machine, run_pictures
from sources.ood_sets import BENCHMARK

# The rows, controls first. GL-MCM was published on the value path of the last block, not on V-V.
ROWS = {
    "zero_shot_mcm": "zero-shot MCM",
    "zero_shot_gl_mcm": "zero-shot GL-MCM, value path",
    "zero_shot_gl_mcm_vv": "zero-shot GL-MCM, V-V, none published",
    "mcm": "this run's MCM",
    "l_mcm": "this run's L-MCM",
    "gl_mcm": "this run's GL-MCM",
    "own": "this method's own score",
}


def paper_rows(config, sets):
    """The rows that Table 3 has, in the form of `ood.measure`.

    There are none unless ViT-B/16 meets ImageNet's four OOD sets.
    """
    if config["dataset"] != "imagenet" or config["model"] != "ViT-B/16" or [*sets] != ["ID", *BENCHMARK]:
        return {}

    rows = {"zero_shot_mcm": "CLIP (MCM)", "zero_shot_gl_mcm": "CLIP (GL)"}
    switches = tuple(config.get(name) for name in ("vv_attention", "local_projection", "class_specific"))
    variants = {
        (True, True, True): "SOT-GLP",
        (False, True, True): "w/o V-V",
        (True, False, True): "w/o Proj",
    }
    if switches in variants and config["shots"] == 16 and config["method"] == "sotglp":
        rows["gl_mcm"] = variants[switches]

    lines = {line["method"]: line for line in paper.table(3)}
    names = (*BENCHMARK, "mean")
    return {row: {name: {"fpr95": lines[label][f"{name} FPR95"], "auroc": lines[label][f"{name} AUROC"]}
                  for name in names} for row, label in rows.items()}


def show(table, published):
    """Prints the rows, the paper's below ours, and a warning for each set with rows below chance."""
    names = [*next(iter(table.values()))]
    print_row("FPR95 / AUROC in percent", {name: name for name in names})
    for row, cells in table.items():
        print_row(ROWS[row], as_text(cells))
        if row in published:
            print_row("    the paper's Table 3", as_text(published[row]))

    for name in names:
        worse = [f"{ROWS[row]} {cells[name]['auroc']:.1f}" for row, cells in table.items()
                 if cells[name]["auroc"] < 50]
        if worse and name != "mean":
            print(f"warning: {name}: AUROC below 50 %, worse than chance: {', '.join(worse)}; "
                  "is the set what it should be? --csv lists its pictures")


def as_text(cells):
    """The two metrics of each set as text."""
    return {name: f"{cell['fpr95']:.1f} / {cell['auroc']:.1f}" for name, cell in cells.items()}


def print_row(label, cells):
    """Prints a row: a column for each set, wide enough for its name."""
    print(f"{label:38s}" + "".join(f"{cell:>{max(15, len(name) + 2)}s}" for name, cell in cells.items()))


def csv_rows(sets, scores, predicted, row, class_names):
    """One line per picture: path, set, score, predicted class."""
    return [{"path": path, "set": name, "score": score, "predicted": class_names[label]}
            for name, items in sets.items()
            for (path, *_), score, label in zip(items, scores[name][row].tolist(), predicted[name].tolist())]


def write_table(args, config, sets, table, published, seconds):
    """Writes RUN/ood.json: the table, and all that its numbers depend on."""
    root = run_pictures.root_of(config, args.data_root)
    machine.write_json(Path(args.run) / "ood.json", {
        **{name: config[name] for name in ("method", "dataset", "model")},
        "temperature": args.temperature,
        "local_weight": args.local_weight,
        "ood_root": args.ood_root,
        "precision": machine.precision(args.amp),
        "images": {name: len(items) for name, items in sets.items()},
        "data": {name: run_pictures.digest(items, root) for name, items in sets.items()},
        "table": table,
        "paper_table_3": published,
        "seconds": round(seconds, 1)})
    print(f"wrote {args.run}/ood.json")
