"""SOT-GLP without each of its parts, and with other sizes: rows of compare.py --ablations, and their table.

The branches share no learned parameter, so each alone, and any weight of their sum, is scored without
training. A difference is judged on the validation shots, so that the test decides nothing; both are shown.
"""

import math
import os
import statistics

import evaluate
import paper
from extras.jobs import Row
from extras.measures import heading
from extras.reuse import digests, read_measurement
from harness import machine, results, run_pictures, runs
from methods import METHODS
from sotglp import SOTGLP, fuse

# The first row is what the others are compared with.
ROWS = {
    "full": Row("SOT-GLP", ()),
    "no_vv": Row("w/o V-V", ("--no-vv",)),
    "no_projection": Row("w/o local projection", ("--no-local-projection",)),
    "shared_local": Row("shared local prompts", ("--shared-local",)),
    "independent": Row("independent top-K per prompt", ("--method", "independent")),
    "dense": Row("dense transport, K = P", ("--method", "dense")),
    "uniform_plan": Row("uniform plan", ("--epsilon", "10000")),
    "constant_plan": Row("plan held constant", ("--no-plan-gradient",)),
    **{f"support_{k}": Row(f"K = {k}", ("--n-support", str(k))) for k in (1, 5, 20)},
    **{f"n_local_{n}": Row(f"L = {n}", ("--n-local", str(n))) for n in (1, 2, 8)},
    **{f"n_global_{n}": Row(f"G = {n}", ("--n-global", str(n))) for n in (1, 2, 8)},
    "no_dropout": Row("prompt dropout 0", ("--prompt-dropout", "0")),
    # why 100: at 0.01 the default 20 leave larger row errors, and the row would show those
    "epsilon_0.01": Row("epsilon = 0.01, 100 iterations", ("--epsilon", "0.01", "--n-iters", "100")),
    "epsilon_1": Row("epsilon = 1", ("--epsilon", "1")),
    "released": Row("released recipe", ("--method", "released")),
}
WEIGHTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)         # of the local branch in the fused score
COLUMNS = {"validation": "validation", "accuracy": "test", "gl_mcm": "AUROC, GL-MCM"}
# The paper's columns of Table 2 and rows of Table 3 that are rows here.
PAPERS = {"no_vv": "w/o V-V", "no_projection": "w/o Proj", "shared_local": "w/o Class-Spec"}


# ---- weights of the local branch ---------------------------------------------------------------------------

def score_weights(run, device, data_root=None, model_file=None):
    """Writes a run's accuracies in percent by its own scores and by each of WEIGHTS.

    RUN/weights.json: {"val": {score: accuracy}, "test": {score: accuracy}, "data": digests of the pictures};
    "val" is empty without validation pictures. Raises ValueError for a run of a method whose two scores are
    not added in this way, and as `scored_pictures`. data_root, model_file: where they are now, if they moved.
    """
    checkpoint = runs.read_checkpoint(run)
    config = checkpoint["config"]
    if not issubclass(METHODS[config["method"]], SOTGLP):
        raise ValueError(f"{run} is a run of {config['method']}: --weights is for sotglp and its variants")
    if not os.access(run, os.W_OK):
        raise OSError(f"{run} is read-only here: weights.json is written into it")
    parts = scored_pictures(run, checkpoint, data_root)
    model = runs.build(run, checkpoint, device, model=model_file)
    own = model.scores
    model.scores = lambda outputs: own(outputs) | {str(weight): fuse(*outputs, weight) for weight in WEIGHTS}

    amp = machine.usable_amp(config["amp"], device)
    found = {"val": {}, "test": {}}
    for part, items in parts.items():
        counts = evaluate.test(model, items, config["dataset"], amp)
        found[part] = {score: 100 * n.sum().item() / len(items) for score, n in counts.n_correct.items()}
    found["data"] = digests(parts, run_pictures.root_of(config, data_root))
    machine.write_json(run / "weights.json", found)
    print(f"wrote {run}/weights.json")


def scored_pictures(run, checkpoint, data_root=None):
    """The validation pictures of a run, if it has any, and its test pictures, as evaluate.py scores them.

    {"val": items, "test": items}. Raises ValueError where the classes are no longer those of the run.
    """
    _, val, _, _ = run_pictures.load_pictures(checkpoint["config"], data_root)
    names = ("val", "test") if val else ("test",)
    return {name: run_pictures.unseen_pictures(run, checkpoint, data_root, name)[0] for name in names}


def weight_rows(folders):
    """The rows that need no training, from runs of the full method: {label: {column: [a value per seed]}}."""
    scores = [read_measurement(folder / "weights.json") for folder in folders]
    labels = {"global": "global branch alone", "local": "local branch alone",
              **{str(weight): f"weight of the local branch {weight}" for weight in WEIGHTS}}
    return {label: {"validation": [score["val"][name] for score in scores if score["val"]],
                    "accuracy": [score["test"][name] for score in scores]} for name, label in labels.items()}


# ---- the table ---------------------------------------------------------------------------------------------

def difference(values, full):
    """The mean difference of two lists, paired by seed, its standard error and a mark: "-5.73 +- 1.20 ~".

    ~ marks a difference that is not larger than twice its standard error. One pair has none, and is marked.
    """
    differences = [value - base for value, base in zip(values, full, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    mean = statistics.mean(differences)
    return f"{mean:+.2f} +- {error:.2f}" + (" ~" if abs(mean) <= 2 * error else "  ")


def paper_difference(row):
    """What the paper prints for a row, against its full method: average accuracy, mean AUROC.  Tables 2, 3"""
    if row not in PAPERS:
        return ""
    accuracy = next(line for line in paper.table(2) if line["dataset"] == "average")
    auroc = {line["method"]: line["mean AUROC"] for line in paper.table(3)}
    return ", ".join(f"{table[PAPERS[row]] - table['SOT-GLP']:+.1f}" for table in (accuracy, auroc)
                     if PAPERS[row] in table)


def print_ablations(args, table, jobs):
    """A table for each dataset and number of shots.

    table: {(dataset, shots): {row: {column: [a value per seed]}}}.
    """
    print("\nMean and standard deviation over the seeds; the difference to the full method, paired by seed, "
          "with its standard\nerror; ~ not larger than twice that. Validation shots judge, the test is "
          "shown. Last column: the paper's differences,\naccuracy on eleven datasets (Table 2), AUROC on "
          "ImageNet (Table 3).")
    for (dataset, shots), rows in table.items():
        folders = [job.folder for job in jobs if job[:3] == ("full", dataset, shots)]
        print(f"\n{heading(args, dataset, shots)}")
        print_rows({**rows, **weight_rows(folders)})


def print_rows(rows):
    """The rows, each beside the row "full", which has the same seeds."""
    full = rows["full"]
    heads = "".join(f"{head:>16s}{'difference':>18s}" for head in COLUMNS.values())
    print(f"{'':32s}{heads}{'paper':>12s}")
    for name, values in rows.items():
        cells = ""
        for column in COLUMNS:
            found = values.get(column, [])
            cells += f"{results.mean_and_spread(found):>16s}"
            cells += f"{difference(found, full[column]) if found and name != 'full' else '':>18s}"
        label = ROWS[name].label if name in ROWS else name
        print(f"{label:32s}{cells}{paper_difference(name):>12s}".rstrip())
