"""The paper's Tables 1 and 4 with our runs beside them, and accuracies on base and on new classes.

    python -m extras.tables runs/                                     Tables 1 and 4, ours beside them, also as table.csv
    python -m extras.tables --base-to-new runs/coop-eurosat-base-*    trained with --classes base, tested on all classes
"""

import statistics
from pathlib import Path

import paper
from evaluate import evaluate_run, mean_and_spread, read_alike
from harness import machine, runs
from harness.parser import Parser
from methods import METHODS


# ---- the paper's tables ------------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
# Columns here: the columns of paper/table1.csv, and the methods of paper/table4.csv.
TABLE_1 = {"CLIP": "CLIP", "CoOp (Table 1)": "CoOp", "GalLoP (Table 1)": "GalLoP", "SOT-GLP": "SOT-GLP"}
TABLE_4 = ("CoOp", "GalLoP", "SOT-GLP")


def paper_numbers():
    """{(dataset, shots, method): [accuracy]} of the paper's Tables 1 and 4, in percent, without their averages.

    The two tables disagree on CoOp and GalLoP in places, so these two have another name in Table 1.
    """
    numbers = {(row["dataset"], 16, name): [row[column]] for row in paper.table(1) for name, column in TABLE_1.items()}
    numbers |= {(row["dataset"], shots, row["method"]): [row[str(shots)]]
                for row in paper.table(4) for shots in SHOTS if row["method"] in TABLE_4}
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

    A method's recipe counts as one configuration, though it may set other values for each dataset.
    """
    def general(config):
        method = METHODS.get(config["method"])             # why get: the linear probe is not among them
        recipe = method.recipe(config["dataset"]) if method else {}
        config = {name: "the recipe's" if name in recipe and recipe[name] == value else value
                  for name, value in config.items()}
        return {**config, **dict.fromkeys(("dataset", "shots", "seed", "split_seed"))}

    if not configs:
        return []
    first, *others = map(general, configs)
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
    rows = []
    for (dataset, shots, method), values in numbers.items():
        mine = method in our_methods
        mean, _, deviation = mean_and_spread(values, 2 if mine else 1).partition(" +- ")
        rows.append({"dataset": dataset, "shots": shots, "method": method, "accuracy": mean,
                     "standard deviation": deviation, "runs": len(values) if mine else ""})
    machine.write_csv(Path(folder) / "table.csv", rows)

# ---- base to new -------------------------------------------------------------------------------------------


def base_to_new(args):
    """Accuracies on the base and the new classes of runs with --classes base, and their harmonic means; zero-shot too.

    As in the literature the last lines have the harmonic mean of the two means; the deviation is that of the runs' own.
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


# ---- the script ----------------------------------------------------------------------------------------------

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
