"""What the finished runs of a table show: a line for each row, a column for each measure.

Each measure has one value for each seed; the mean and the standard deviation are printed.
"""

import statistics

import paper
from extras.reuse import read_measurement
from extras.tables import base_new_cells
from harness import machine, results, runs

# The columns of OOD scores: what ood.py calls its rows, the heads.
AUROC = {"mcm": "AUROC, MCM", "l_mcm": "AUROC, L-MCM", "gl_mcm": "AUROC, GL-MCM", "own": "AUROC, own"}


# ---- from files to values ----------------------------------------------------------------------------------

def make_table(args, jobs):
    """{(dataset, shots): {row: {column: [a value per seed]}}} of the finished runs."""
    table = {}
    for dataset in args.dataset:
        for shots in args.shots:
            rows = {name: measure([job for job in jobs if job[:3] == (name, dataset, shots)])
                    for name in args.methods}
            if "zero_shot" in rows:
                rows["zero_shot"] = zero_shot([row for row in rows.values() if row])
            table[dataset, shots] = rows
    return table


def measure(jobs):
    """What the finished runs of one row show: {column: [a value per seed]}."""
    values = {}
    for job in jobs:
        for column, value in measure_run(job).items():
            values.setdefault(column, []).append(value)
    return values


def measure_run(job):
    """What one finished run shows: {column: value}."""
    result = runs.read_result(job.folder)
    found = {"accuracy": result["accuracy"], "zero-shot": result["zero_shot_accuracy"],
             "parameters": result["learned_parameters"]}
    if (job.folder / "log.jsonl").exists():
        found["s/epoch"] = statistics.median(line["seconds"] for line in runs.read_log(job.folder))

    # why only these files: others were not asked for, and may be the user's
    measured = {file: read_measurement(job.folder / file) for file in job.commands if file != "result.json"}
    if "ood.json" in measured:
        found |= {row: cells["mean"]["auroc"] for row, cells in measured["ood.json"]["table"].items()}
    if "evaluation-new.json" in measured:
        new = measured["evaluation-new.json"]
        found |= {"new": new["accuracy"], "zero-shot, new": new["zero_shot_accuracy"]}
    if "weights.json" in measured and measured["weights.json"]["val"]:
        found["validation"] = measured["weights.json"]["val"]["fused"]
    return found


def zero_shot(rows):
    """The row of zero-shot CLIP: every run measures its accuracy, those with OOD sets its scores."""
    columns = {"zero-shot": "accuracy", "zero-shot, new": "new", "zero_shot_mcm": "mcm",
               "zero_shot_gl_mcm": "gl_mcm"}
    found = {"parameters": [0]}
    for measured, column in columns.items():
        values = next((row[measured] for row in rows if measured in row), [])
        found[column] = values[:1]                         # why: it is the same for all seeds
    return found


# ---- from values to text -----------------------------------------------------------------------------------

def print_table(args, table):
    """The rows, a column for each measure; the paper's column stands beside ViT-B/16 at 16 shots alone."""
    published = {line["dataset"]: line for line in paper.table(1)}
    for (dataset, shots), rows in table.items():
        is_papers = (model_of(args, dataset), shots) == ("ViT-B/16", 16)
        printed = published.get(dataset, {}) if is_papers else {}
        scores = [column for column in AUROC if any(values.get(column) for values in rows.values())]
        heads = ["accuracy", *(AUROC[column] for column in scores), "s/epoch", "parameters"]
        if printed:
            heads.append("the paper's")
        print(f"\n{heading(args, dataset, shots)}: mean +- standard deviation")
        print_line("", heads)

        for name, values in rows.items():
            columns = ("accuracy", *scores, "s/epoch")
            cells = [results.mean_and_spread(values.get(column, [])) for column in columns]
            cells.append(f"{values['parameters'][0]:,}")
            if printed:
                cells.append(printed.get(args.rows[name].column, ""))
            print_line(args.rows[name].label, cells)
    print("\nA method's epochs, rate and batch are its own (train.py --method NAME --help). AUROC is the mean"
          " over the OOD\nsets, where there are any, and empty where a method has no such score.")


def print_base_to_new(args, table):
    """Accuracies on base and new classes and their harmonic mean, in percent."""
    for (dataset, shots), rows in table.items():
        print(f"\n{heading(args, dataset, shots)}, base to new: mean +- standard deviation")
        print_line("", ("base", "new", "harmonic mean", "s/epoch", "parameters"))
        for name, values in rows.items():
            cells = [*base_new_cells([*zip(values["accuracy"], values["new"])]).values()]
            cells.append(results.mean_and_spread(values.get("s/epoch", [])))
            cells.append(f"{values['parameters'][0]:,}")
            print_line(args.rows[name].label, cells)
    print("\nThe harmonic mean is that of the two means; its deviation is that of the seeds' own.")


def heading(args, dataset, shots):
    """What a table is of."""
    seeds = " ".join(map(str, args.seeds))
    return f"{dataset}, {shots} shots, model {model_of(args, dataset)}, seeds {seeds}"


def model_of(args, dataset):
    """The CLIP that is asked for, else the usual one of a dataset."""
    return args.model or machine.default_model(dataset)


def print_line(label, cells):
    """One line of the table: its label, then its cells."""
    print(f"{label:26s}" + "".join(f"{cell:>16}" for cell in cells))
