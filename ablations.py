"""What each part of SOT-GLP does: the rows of `compare.py --ablations`, and the weight of the local branch in one run.

    python compare.py --ablations                  trains what is missing of ROWS and prints the table
    python ablations.py RUN                        one run: RUN/weights.json (compare.py does this for every run)

The branches share no learned parameter, so each alone, and any weight of their sum, can be scored without training. A
difference is judged on the validation shots, so that the test decides nothing; both are shown.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import data
import evaluate
import runs
from sotglp import fuse

# Name of a row: its label, its options of train.py. The first one is what the others are compared with.
ROWS = {"full": ("SOT-GLP", []),
        "no_vv": ("w/o V-V", ["--no-vv"]),
        "no_projection": ("w/o local projection", ["--no-local-projection"]),
        "shared_local": ("shared local prompts", ["--shared-local"]),
        "independent": ("independent top-K per prompt", ["--method", "independent"]),
        "dense": ("dense transport, K = P", ["--method", "dense"]),
        "uniform_plan": ("uniform plan", ["--epsilon", "10000"]),
        "constant_plan": ("plan held constant", ["--no-plan-gradient"]),
        **{f"support_{k}": (f"K = {k}", ["--n-support", str(k)]) for k in (1, 5, 20)},
        **{f"n_local_{n}": (f"L = {n}", ["--n-local", str(n)]) for n in (1, 2, 8)},
        **{f"n_global_{n}": (f"G = {n}", ["--n-global", str(n)]) for n in (1, 2, 8)},
        "no_dropout": ("prompt dropout 0", ["--prompt-dropout", "0"]),
        # why 100: at 0.01 the default 20 leave larger row errors, and the row would show those
        "epsilon_0.01": ("epsilon = 0.01, 100 iterations", ["--epsilon", "0.01", "--n-iters", "100"]),
        "epsilon_1": ("epsilon = 1", ["--epsilon", "1"]),
        "released": ("released recipe", ["--recipe", "released"])}
WEIGHTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)         # of the local branch in the fused score
COLUMNS = {"validation": "validation", "accuracy": "test", "gl_mcm": "AUROC, GL-MCM"}
# The paper's columns of Table 2 and rows of Table 3 that are rows here.
PAPER = {"no_vv": "w/o V-V", "no_projection": "w/o Proj", "shared_local": "w/o Class-Spec"}


def score_weights(run, device):
    """Writes a run's accuracies in percent by its own scores and by each of WEIGHTS, in one pass over each part.

    RUN/weights.json: {"val": {score: accuracy}, "test": {score: accuracy}}; "val" is empty without validation pictures.
    """
    checkpoint, model = runs.open_run(run, device)
    config, own = checkpoint["config"], model.scores
    _, *parts, _ = data.load(config["dataset"], config["data_root"], config["shots"], config["split_seed"],
                             config["sampler"], config["held_out"], config["classes"])
    model.scores = lambda outputs: {**own(outputs), **{str(weight): fuse(*outputs, weight) for weight in WEIGHTS}}
    found = {"val": {}, "test": {}}
    for part, items in zip(found, parts):
        if items:
            counts = evaluate.test(model, items, config["dataset"], runs.usable_amp(config["amp"], device))
            found[part] = {score: 100 * right.sum().item() / len(items) for score, right in counts.right.items()}
    runs.write_json(run / "weights.json", found)


def read_weights(folder):
    """weights.json of a run's folder."""
    return json.loads((folder / "weights.json").read_text(encoding="utf-8"))


# ---- the table -----------------------------------------------------------------------------------------------

def weight_rows(folders):
    """The rows that need no training, from the runs of the full method: {label: {column: [a value per seed]}}."""
    scores = [read_weights(folder) for folder in folders]
    labels = {"global": "global branch alone", "local": "local branch alone",
              **{str(weight): f"weight of the local branch {weight}" for weight in WEIGHTS}}
    return {label: {"validation": [score["val"][name] for score in scores if score["val"]],
                    "accuracy": [score["test"][name] for score in scores]} for name, label in labels.items()}


def difference(values, full):
    """The mean difference of two lists, paired by seed, its standard error and a mark: "-5.73 +- 1.20 ~".

    ~ marks a difference that is not larger than twice its standard error. One pair has none, and is marked too.
    """
    differences = [value - base for value, base in zip(values, full, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    mean = statistics.mean(differences)
    return f"{mean:+.2f} +- {error:.2f}" + (" ~" if abs(mean) <= 2 * error else "  ")


def paper_difference(row):
    """What the paper prints for a row, against its full method: accuracy (Table 2, average), AUROC (Table 3, mean)."""
    if row not in PAPER:
        return ""
    accuracy = next(line for line in evaluate.paper_table(2) if line["dataset"] == "average")
    auroc = {line["method"]: line["mean AUROC"] for line in evaluate.paper_table(3)}
    return ", ".join(f"{table[PAPER[row]] - table['SOT-GLP']:+.1f}" for table in (accuracy, auroc)
                     if PAPER[row] in table)


def print_tables(args, table, jobs):
    """A table for each dataset and number of shots; table: {(dataset, shots): {row: {column: [a value per seed]}}}."""
    seeds = " ".join(map(str, args.seeds))
    print(f"\nMean and standard deviation over seeds {seeds}; the difference to the full method, paired by seed, with "
          "its standard\nerror; ~ not larger than twice that. Validation shots judge, the test is shown. Last column: "
          "the paper's differences,\naccuracy on eleven datasets (Table 2), AUROC on ImageNet (Table 3).")
    for (dataset, shots), rows in table.items():
        model = args.model or runs.default_model(dataset)
        folders = [job.folder for job in jobs if job[:3] == ("full", dataset, shots)]
        print_table(f"{dataset}, {shots} shots, model {model}", {**rows, **weight_rows(folders)})


def print_table(heading, rows):
    """The rows, each beside the row "full", which has the same seeds."""
    full = rows["full"]
    print(f"\n{heading}")
    print(f"{'':32s}" + "".join(f"{head:>16s}{'difference':>18s}" for head in COLUMNS.values()) + f"{'paper':>12s}")
    for name, values in rows.items():
        cells = ""
        for column in COLUMNS:
            found = values.get(column, [])
            cells += f"{evaluate.mean_and_spread(found):>16s}"
            cells += f"{difference(found, full[column]) if found and name != 'full' else '':>18s}"
        print(f"{ROWS.get(name, [name])[0]:32s}{cells}{paper_difference(name):>12s}".rstrip())


# ---- the script ----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py wrote with SOT-GLP or a variant")
    parser.add_argument("--device", default=runs.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    return parser.parse_args(argv)


@runs.plain_errors()
def main(args):
    """The weights of one run."""
    runs.check_device(args.device)
    score_weights(args.run, args.device)


if __name__ == "__main__":
    main(parse_args())
