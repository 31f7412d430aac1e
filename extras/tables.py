"""The paper's Tables 1 and 4 with our runs beside them, and accuracies on base and on new classes.

    python -m extras.tables runs/                  Tables 1 and 4, ours beside them, also as runs/table.csv
    python -m extras.tables --base-to-new runs/coop-eurosat-base-*       runs of train.py --classes base
"""

import os
import statistics
from pathlib import Path

import paper
from evaluate import evaluate_run
from harness import machine, runs
from harness.parser import Parser
from harness.results import mean_and_spread
from harness.runs import read_alike
from methods import METHODS


# ---- the paper's tables ------------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
# Columns here: the columns of paper/table1.csv, and the methods of paper/table4.csv.
TABLE_1 = {"CLIP": "CLIP", "CoOp (Table 1)": "CoOp", "GalLoP (Table 1)": "GalLoP", "SOT-GLP": "SOT-GLP"}
TABLE_4 = ("CoOp", "GalLoP", "SOT-GLP")
# The columns of table.csv.
COLUMNS = ("dataset", "shots", "method", "accuracy", "standard deviation", "runs")


def paper_numbers():
    """{(dataset, shots, method): [accuracy]} of the paper's Tables 1 and 4, in percent, without averages.

    The two tables disagree on CoOp and GalLoP in places, so these two have another name in Table 1.
    """
    numbers = {(row["dataset"], 16, name): [row[column]]
               for row in paper.table(1) for name, column in TABLE_1.items()}
    numbers |= {(row["dataset"], shots, row["method"]): [row[str(shots)]]
                for row in paper.table(4) for shots in SHOTS if row["method"] in TABLE_4}
    return {key: value for key, value in numbers.items() if key[0] != "average"}


def our_results(folder):
    """{(dataset, shots, "ours"): results of the runs that a cell averages} below a folder; notes on all runs.

    The methods other than SOT-GLP are called "our <method>". What must not be averaged is left out by name.
    Runs with a method's own defaults come first, then the order is that of the names. why: an ablation must
    not be averaged in.
    """
    cells = {}
    notes = []
    results = [(run, runs.read_result(run)) for run in runs.finished_runs(folder)]
    for run, result in sorted(results, key=lambda pair: runs.is_variant(pair[1]["config"])):
        cell = cells.setdefault((result["dataset"], result["shots"], our_name(result["config"])), [])
        reason = why_left_out(result, cell)
        if reason:
            notes.append(f"left out: {run} ({reason})")
            continue
        cell.append(result)
        published = ", NOT CoOp's published split" if result.get("split_matches_published") is False else ""
        notes.append(f"{run}: {result['accuracy']:.2f} %, model {result['model']}, seed {result['seed']}"
                     f"{published}")
    return {key: cell for key, cell in cells.items() if cell}, notes


def our_name(config):
    """The column of a run's method."""
    name = "ours" if config["method"] == "sotglp" else f"our {config['method']}"
    return f"{name} base" if config["classes"] == "base" else name


def why_left_out(result, cell):
    """Why a run does not count beside those of its cell, or ""; the first one decides on the options."""
    if result["model"] == "tiny":
        return "model tiny; the paper has ViT-B/16"
    if result.get("split", "test") != "test":
        return "measured on validation images"
    if not cell:
        return ""

    seeds = {name: result[name] for name in ("seed", "split_seed")}
    differs = runs.changes({**cell[0]["config"], **seeds}, result["config"])
    if differs:
        return ", ".join(differs)
    if any(seeds.items() <= other.items() for other in cell):
        return f"seed {result['seed']} again"
    # why only with the same split seed: another one draws other pictures
    alike = [other for other in cell if other["split_seed"] == result["split_seed"]]
    if alike and alike[0].get("data") != result.get("data"):
        return "other pictures"
    if cell[0].get("split_matches_published") != result.get("split_matches_published"):
        return "another split file"
    return ""


def add_averages(numbers, ours):
    """Adds the averages of every method over the paper's datasets that ran here -> notes on those missing."""
    datasets = {dataset for dataset, _, method in numbers if not is_ours(method)}
    methods = list(dict.fromkeys(method for _, _, method in numbers))
    notes = []
    for shots in SHOTS:
        ran = {dataset for dataset, n, _ in ours if n == shots and dataset in datasets}
        for method in methods:
            keys = [key for key in numbers if key[0] in ran and key[1:] == (shots, method)]
            mixed = mixed_options([ours[key][0]["config"] for key in keys if key in ours])
            if mixed:
                notes.append(f"no average of {method} at {shots} shots: the datasets ran with different "
                             f"options ({mixed[0]})")
            elif keys:
                means = [statistics.mean(numbers[key]) for key in keys]
                numbers["average", shots, method] = [statistics.mean(means)]
    return notes


def mixed_options(configs):
    """What differs between the options of some cells, dataset, shots and seeds aside: a list of texts."""
    if not configs:
        return []
    first, *others = map(general_options, configs)
    return [text for other in others for text in runs.changes(first, other)]


def general_options(config):
    """A configuration without dataset, shots and seeds.

    A method's recipe counts as one value, though it may set other ones for each dataset.
    """
    method = METHODS.get(config["method"])                 # why get: the linear probe is not among them
    recipe = method.recipe(config["dataset"]) if method else {}
    general = {name: "the recipe's" if name in recipe and recipe[name] == value else value
               for name, value in config.items()}
    # why only whether: each dataset has a run of its own to start from
    general["start_from"] = bool(config.get("start_from"))
    return {**general, **dict.fromkeys(("dataset", "shots", "seed", "split_seed"))}


def print_tables(folder):
    """Tables 1 and 4 with ours beside the paper's numbers, blank where nothing ran; also FOLDER/table.csv."""
    check_replaceable(Path(folder) / "table.csv")
    ours, notes = our_results(folder)
    numbers = paper_numbers() | {key: [result["accuracy"] for result in cell] for key, cell in ours.items()}
    notes += add_averages(numbers, ours)
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in paper_numbers()))
    our_methods = list(dict.fromkeys(["ours", *(method for _, _, method in ours)]))

    print("All columns but our own are the paper's printed numbers; averages are over the datasets that ran\n"
          "here. A cell of ours is the mean of runs of one configuration: the method's own defaults, else\n"
          "that of the first by name; so is an average over datasets. Runs of model tiny are left out.")
    print("\nTable 1, 16 shots" + "".join(f"{name:>18s}" for name in (*TABLE_1, *our_methods))[2:])
    for dataset in (*datasets, "average"):
        print_row(dataset, numbers, [(dataset, 16, method) for method in (*TABLE_1, *our_methods)])
    print("\nTable 4, shots " + "".join(f"{shots:>18d}" for shots in SHOTS))
    for dataset in (*datasets, "average"):
        print(dataset)
        for method in (*TABLE_4, *our_methods):
            print_row(f"  {method}", numbers, [(dataset, shots, method) for shots in SHOTS])
    print("\n" + "\n".join(notes or [f"no result.json below {folder}: nothing ran yet"]))
    if os.access(folder, os.W_OK):
        machine.write_csv(Path(folder) / "table.csv", csv_rows(numbers))
        print(f"wrote {Path(folder) / 'table.csv'}")
    else:
        print(f"note: {folder} is read-only here: table.csv is not written")


def print_row(label, numbers, keys):
    """One line of the table: mean and spread of the numbers under each key."""
    cells = [mean_and_spread(numbers.get(key, []), digits_of(key[2])) for key in keys]
    print(f"{label:15s}" + "".join(f"{cell:>18s}" for cell in cells))


def is_ours(method):
    """Whether numbers were measured here; the others are the paper's."""
    return method.startswith("our")


def digits_of(method):
    """How many decimals are shown: the paper prints one."""
    return 2 if is_ours(method) else 1


def csv_rows(numbers):
    """The lines of table.csv, with the columns of COLUMNS."""
    rows = []
    for (dataset, shots, method), values in numbers.items():
        mean, _, deviation = mean_and_spread(values, digits_of(method)).partition(" +- ")
        n_runs = len(values) if is_ours(method) else ""
        rows.append(dict(zip(COLUMNS, (dataset, shots, method, mean, deviation, n_runs))))
    return rows


def check_replaceable(path):
    """Raises ValueError where table.csv is somebody else's: it does not begin with our line of columns."""
    if path.is_symlink() or path.exists():
        ours = path.is_file() and not path.is_symlink()
        if not ours or path.read_bytes().partition(b"\n")[0].rstrip() != ",".join(COLUMNS).encode():
            raise ValueError(f"{path} is no table of this program, which writes its own there: give it "
                             "another name")


# ---- base to new -------------------------------------------------------------------------------------------


def base_to_new(args):
    """Accuracies of runs with --classes base on base and new classes, and harmonic means; zero-shot too.

    As in the literature the last lines have the harmonic mean of the two means; the deviation is that of the
    runs' own.
    """
    rows = {"accuracy": [], "zero_shot_accuracy": []}    # (base, new) of each run
    for run, checkpoint in zip(args.base_to_new, read_alike(args.base_to_new)):
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


# ---- the script --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = Parser("python -m extras.tables [folder] [options]", __doc__)
    add = parser.add_argument
    add("folder", nargs="?", help="the folder below which the runs are, for Tables 1 and 4")
    add("--base-to-new", nargs="+", metavar="RUN",
        help="runs of train.py --classes base, tested on their own and on the new classes")
    add("--data-root", help="folder of the datasets (the run's own)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF), help="mixed precision (a run's own)")
    args = parser.parse_args(argv)
    parser.refuse_empty(args)
    if bool(args.folder) == bool(args.base_to_new):
        parser.error("name either the folder of the runs, or --base-to-new and runs")
    if args.folder and (args.data_root or args.workers is not None or args.amp):
        parser.error("--data-root, --workers and --amp are for --base-to-new: the tables read results alone")
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    return args


@machine.plain_errors()
def main(args):
    """The tables, or base to new."""
    machine.use_device(args.device, args.amp or "off")
    if args.folder:
        print_tables(args.folder)
    else:
        base_to_new(args)


if __name__ == "__main__":
    main(parse_args())
