"""Trains the compared methods on the same draws and prints one table: accuracy, OOD detection, time, parameters.

    python -m extras.compare                                                 every method on the embedded default, 3 seeds
    python -m extras.compare --dataset eurosat dtd --shots 1 16 --data-root DIR --model ViT-B/16
    python -m extras.compare --methods coop sotglp --epochs 20               what it does not know itself goes to train.py
    python -m extras.compare --classes base                                  trained on half of the classes, tested on both
    python -m extras.compare --ablations                                     variants of SOT-GLP beside it

Each run is one of train.py (or of extras/linear_probe.py) in a folder of its own below --output-dir. Stop it when you
like: what is finished is not run again, and an interrupted run goes on where it was. Without a GPU two runs go at a
time, each with one thread. Read it from `main`: the runs, what is missing of them, the table.

Ablations: the branches share no learned parameter, so each alone, and any weight of their sum, is scored without
training. A difference is judged on the validation shots, so that the test decides nothing; both are shown.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import data
from sources import files
import evaluate
import ood
from harness import machine, runs
from harness.parser import Parser
import train
import paper
from extras import linear_probe
from extras.tables import base_new_cells
from methods import METHODS
from sotglp import SOTGLP, fuse

# Name of a row: its label, its options of train.py, its column of Table 1. None: it has a command of its own.
ROWS = {"zero_shot": ("zero-shot CLIP", None, "CLIP"), "linear_probe": ("linear probe", None, "Linear Probe"),
        "coop": ("CoOp", ["--method", "coop"], "CoOp"),
        "coop_class_specific": ("CoOp, a context per class", ["--method", "coop", "--class-specific"], ""),
        "plot": ("PLOT on patches", ["--method", "plot"], ""),     # why none: Table 1's PLOT is PLOT++
        "proda": ("ProDA", ["--method", "proda"], "ProDA"), "locoop": ("LoCoOp", ["--method", "locoop"], "LoCoOp"),
        "lsn": ("LSN", ["--method", "lsn"], ""), "gallop": ("GalLoP", ["--method", "gallop"], "GalLoP"),
        "sotglp": ("SOT-GLP", ["--method", "sotglp"], "SOT-GLP")}
# The rows that take long, trained where --methods names them, or all.
SLOW = {"cocoop": ("CoCoOp", ["--method", "cocoop"], "CoCoOp"), "maple": ("MaPLe", ["--method", "maple"], "MaPLe"),
        "promptsrc": ("PromptSRC", ["--method", "promptsrc"], "PromptSRC"),
        "plotpp": ("PLOT++, stage 2", ["--method", "plotpp"], "PLOT")}
# The rows of --classes base.
BASE_ROWS = {"zero_shot": ROWS["zero_shot"], "coop": ROWS["coop"],
             "ivlp": ("IVLP", ["--method", "promptot", "--lambda-transport", "0"], ""),
             "promptot_image": ("Prompt-OT, images alone", ["--method", "promptot", "--modality", "image"], ""),
             "promptot_text": ("Prompt-OT, texts alone", ["--method", "promptot", "--modality", "text"], ""),
             "promptot": ("Prompt-OT, joint", ["--method", "promptot"], "")}

# The rows of --ablations; the first one is what the others are compared with.
ABLATIONS = {"full": ("SOT-GLP", []),
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
        "released": ("released recipe", ["--method", "released"])}
WEIGHTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)         # of the local branch in the fused score
ABLATION_COLUMNS = {"validation": "validation", "accuracy": "test", "gl_mcm": "AUROC, GL-MCM"}
# The paper's columns of Table 2 and rows of Table 3 that are rows here.
PAPER_COLUMNS = {"no_vv": "w/o V-V", "no_projection": "w/o Proj", "shared_local": "w/o Class-Spec"}

SECONDS = 120             # about what a run of the embedded default takes on one thread of an AMD EPYC (Zen 3)


class Job(NamedTuple):
    """One run."""
    row: str
    dataset: str
    shots: int
    seed: int
    folder: Path
    commands: dict        # {file that it writes: command}, in this order: the run, then what is measured of it;
                          # before it, the run that it starts from
    options: argparse.Namespace    # those of the run

    def __str__(self):
        return f"{self.row}, {self.dataset}, {self.shots} shots, seed {self.seed}"


# ---- the runs ------------------------------------------------------------------------------------------------

def make_jobs(args):
    """All runs that the table needs."""
    jobs = []
    for dataset in args.dataset:
        measure_ood = args.classes == "all" and has_ood_sets(dataset, args.data_root)
        for shots in args.shots:
            for row in args.methods:
                if row == "zero_shot":                     # every run measures it
                    continue
                # why one seed of the linear probe: with a fixed draw there is nothing random in it
                seeds = args.seeds[:1] if row == "linear_probe" else args.seeds
                jobs += [make_job(args, row, dataset, shots, seed, measure_ood) for seed in seeds]
    return jobs


def make_job(args, row, dataset, shots, seed, measure_ood):
    """One run, in the folder that it would have by itself, below --output-dir, and what is measured of it."""
    device = ["--device", args.device]
    which = ["--dataset", dataset, "--shots", str(shots), "--seed", str(seed), "--split-seed", str(args.split_seed),
             *device]
    if dataset != "critters":
        which += ["--data-root", args.data_root]
    if args.model:
        which += ["--model", args.model]
    if row == "linear_probe":
        script = ["-m", "extras.linear_probe"]
        wanted = linear_probe.parse_args(which)
    else:
        script = ["train.py"]
        which = [*args.rows[row][1], *which, "--classes", args.classes, *args.more]
        wanted = train.parse_args(which)
    folder = Path(args.output_dir, Path(wanted.output_dir).name)
    commands = {}
    if row == "plotpp":     # differs: published, stage 2 of all seeds starts from stage 1 of the first
        first = folder.with_name(f"{folder.name}-stage1")
        commands[str(first / "result.json")] = [*script, *which, "--stage", "1", "--output-dir", str(first), "--resume"]
        which += ["--start-from", str(first)]
        wanted = train.parse_args(which)
    commands["result.json"] = [*script, *which, "--output-dir", str(folder)]
    if row != "linear_probe":
        commands["result.json"].append("--resume")
    if measure_ood and row != "linear_probe":
        commands["ood.json"] = ["ood.py", str(folder), *device]
    if args.classes == "base":
        commands["evaluation-new.json"] = ["evaluate.py", str(folder), "--classes", "new", *device]
    if args.ablations:
        commands["weights.json"] = ["-m", "extras.compare", "--weights", str(folder), *device]
    return Job(row, dataset, shots, seed, folder, commands, wanted)


def has_ood_sets(dataset, root):
    """Whether there are pictures of something else to tell apart from a dataset."""
    try:
        return bool(ood.ood_sets(dataset, root))
    except (ValueError, FileNotFoundError):
        return False


def check_finished(jobs, threads):
    """Raises ValueError where a folder holds a run, or a table of ood.py, that the commands of this table do not make.

    threads: how many the runs have here, on a CPU; 0 on a GPU, where they matter little. why: else the times of a
    table could not be compared.
    """
    for job in jobs:
        if (job.folder / "result.json").exists():
            result = runs.read_result(job.folder)
            wanted = {name: value for name, value in vars(job.options).items() if name in result["config"]}
            differs = runs.changes(result["config"], wanted)
            if threads and result.get("threads") != threads:
                differs.append(f"threads were {result.get('threads')}, are {threads}")
            if differs:
                raise ValueError(f"{job.folder} holds a run with other options ({'; '.join(differs)}): "
                                 f"--output-dir {runs.unused(job.folder.parent)} leaves it alone")
        if "ood.json" in job.commands and (job.folder / "ood.json").exists():
            check_ood(job)


def check_ood(job):
    """Raises ValueError where a run's ood.json is not what ood.py writes without options."""
    path = job.folder / "ood.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    temperature = METHODS[job.options.method].ood_temperature
    usual = {"temperature": temperature, "local_weight": 1.0, "ood_root": {}}
    differs = [f"{name} {found.get(name)}, here {usual[name]}" for name in usual if found.get(name) != usual[name]]
    if differs:
        raise ValueError(f"{path} was made with other options ({'; '.join(differs)}): remove it, and it is made again")


def missing(job):
    """The commands of a job that have not been run to their end."""
    return [command for file, command in job.commands.items() if not (job.folder / file).exists()]


def run_job(job, threads):
    """Runs what is missing of a job, its output in RUN/output.txt -> the error's last line, or "" without error."""
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = machine.alone() | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    for command in missing(job):
        with open(job.folder / "output.txt", "a", encoding="utf-8") as file:
            process = subprocess.run([sys.executable, *command], cwd=Path(__file__).parent.parent, stdout=file,
                                     stderr=subprocess.STDOUT, env=environment)
        if process.returncode:
            return (job.folder / "output.txt").read_text(encoding="utf-8").splitlines()[-1]
    return ""


def foresee(jobs, left, at_once):
    """How long the runs that are left will take, by the median time of those that are finished."""
    seconds = [runs.read_result(job.folder)["seconds"] for job in jobs if (job.folder / "result.json").exists()]
    seconds = seconds or [SECONDS for job in left if (job.dataset, job.shots) == ("critters", 16)]
    return f", about {statistics.median(seconds) * len(left) / at_once / 60:.0f} min" if left and seconds else ""


def run_all(jobs, at_once, threads):
    """Runs what is missing, `at_once` jobs at a time, and says after each how long the rest will take.

    Raises ValueError, when all others are done, where runs failed.
    """
    left = [job for job in jobs if missing(job)]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} finished already; {at_once} at a time"
          + foresee(jobs, left, at_once), flush=True)
    began, failed = time.time(), []
    pool = ThreadPoolExecutor(at_once)
    try:
        results = [pool.submit(run_job, job, threads) for job in left]
        for i, (job, result) in enumerate(zip(left, results), 1):
            error = result.result()
            if error:
                failed.append(f"{job}: {error}")
            minutes = (time.time() - began) / i * (len(left) - i) / 60
            print(f"{i} of {len(left)}: {job}: {error or evaluate.accuracies_line(runs.read_result(job.folder))}; "
                  f"about {minutes:.0f} min left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)                 # why: after Ctrl-C none of the others must start
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the others are kept; RUN/output.txt has more:\n"
                         + "\n".join(failed))


# ---- the table -----------------------------------------------------------------------------------------------

def measure(jobs):
    """What finished runs of one row show: {column: [a value per seed]}."""
    values = {}
    for job in jobs:
        result, log = runs.read_result(job.folder), job.folder / "log.jsonl"
        found = {"accuracy": result["accuracy"], "zero-shot": result["zero_shot_accuracy"],
                 "parameters": result["learned_parameters"]}
        if log.exists():
            found["s/epoch"] = statistics.median(line["seconds"] for line in runs.read_log(job.folder))
        if "ood.json" in job.commands:
            table = json.loads((job.folder / "ood.json").read_text(encoding="utf-8"))["table"]
            found |= {row: cells["mean"]["auroc"] for row, cells in table.items()}
        if "evaluation-new.json" in job.commands:
            new = json.loads((job.folder / "evaluation-new.json").read_text(encoding="utf-8"))
            found |= {"new": new["accuracy"], "zero-shot, new": new["zero_shot_accuracy"]}
        if "weights.json" in job.commands:
            validation = read_weights(job.folder)["val"]
            found |= {"validation": validation["fused"]} if validation else {}
        for column, value in found.items():
            values.setdefault(column, []).append(value)
    return values


def make_table(args, jobs):
    """{(dataset, shots): {row: {column: [a value per seed]}}} of the runs."""
    table = {}
    for dataset in args.dataset:
        for shots in args.shots:
            rows = {row: measure([job for job in jobs if job[:3] == (row, dataset, shots)]) for row in args.methods}
            trained = next((row for row in rows.values() if row), None)
            if "zero_shot" in rows and trained:            # every run measures it; OOD rows come with those of ood.py
                scores = next((row for row in rows.values() if "zero_shot_mcm" in row), {})
                rows["zero_shot"] = {"accuracy": trained["zero-shot"][:1], "parameters": [0],
                                     "new": trained.get("zero-shot, new", [])[:1],
                                     "mcm": scores.get("zero_shot_mcm", [])[:1],
                                     "gl_mcm": scores.get("zero_shot_gl_mcm", [])[:1]}
            table[dataset, shots] = rows
    return table


def print_table(args, table):
    """The rows, a column for each measure; the paper's column stands beside ViT-B/16 at 16 shots alone."""
    published = {row["dataset"]: row for row in paper.table(1)}
    for (dataset, shots), rows in table.items():
        model = args.model or machine.default_model(dataset)
        printed = published.get(dataset, {}) if (model, shots) == ("ViT-B/16", 16) else {}
        print(f"\n{dataset}, {shots} shots, model {model}, seeds {' '.join(map(str, args.seeds))}: mean +- standard "
              "deviation; AUROC is the mean over the OOD sets")
        columns = {"accuracy": "accuracy", "mcm": "AUROC, MCM", "l_mcm": "AUROC, L-MCM", "gl_mcm": "AUROC, GL-MCM",
                   "own": "AUROC, own", "s/epoch": "s/epoch"}
        if not any("own" in values for values in rows.values()):       # few methods have a score of their own
            del columns["own"]
        heads = [*columns.values(), "parameters"]
        heads += ["the paper's"] if printed else []
        print(f"{'':26s}" + "".join(f"{head:>16s}" for head in heads))
        for row, values in rows.items():
            cells = [evaluate.mean_and_spread(values.get(column, [])) for column in columns]
            cells.append(f"{values['parameters'][0]:,}" if values else "")
            cells += [printed.get(args.rows[row][2], "")] if printed else []
            print(f"{args.rows[row][0]:26s}" + "".join(f"{cell:>16}" for cell in cells))
    print("\nA method's epochs, rate and batch are its own (train.py --method NAME --help). An OOD cell is empty where "
          "a method has no such score.")


def print_base_to_new(args, table):
    """Accuracies on base and new classes and their harmonic mean, in percent."""
    for (dataset, shots), rows in table.items():
        print(f"\n{dataset}, base to new, {shots} shots, model {args.model or machine.default_model(dataset)}, seeds "
              f"{' '.join(map(str, args.seeds))}: mean +- standard deviation")
        heads = ("base", "new", "harmonic mean", "s/epoch", "parameters")
        print(f"{'':26s}" + "".join(f"{head:>16s}" for head in heads))
        for row, values in rows.items():
            cells = [*base_new_cells([*zip(values["accuracy"], values["new"])]).values(),
                     evaluate.mean_and_spread(values.get("s/epoch", [])), f"{values['parameters'][0]:,}"]
            print(f"{args.rows[row][0]:26s}" + "".join(f"{cell:>16}" for cell in cells))
    print("\nThe harmonic mean is that of the two means; its deviation is that of the seeds' own.")


# ---- the ablations -------------------------------------------------------------------------------------------

def score_weights(run, device):
    """Writes a run's accuracies in percent by its own scores and by each of WEIGHTS, in one pass over each part.

    RUN/weights.json: {"val": {score: accuracy}, "test": {score: accuracy}}; "val" is empty without validation pictures.
    Raises ValueError for a run of a method whose two scores are not added in this way.
    """
    checkpoint = runs.read_checkpoint(run)
    model = runs.build(run, checkpoint, device)
    if not isinstance(model, SOTGLP):
        raise ValueError(f"{run} is a run of {checkpoint['config']['method']}: --weights is for sotglp and its "
                         "variants")
    config, own = checkpoint["config"], model.scores
    _, *parts, _ = runs.load_pictures(config)
    model.scores = lambda outputs: {**own(outputs), **{str(weight): fuse(*outputs, weight) for weight in WEIGHTS}}
    found = {"val": {}, "test": {}}
    for part, items in zip(found, parts):
        if items:
            counts = evaluate.test(model, items, config["dataset"], machine.usable_amp(config["amp"], device))
            found[part] = {score: 100 * n.sum().item() / len(items) for score, n in counts.n_correct.items()}
    machine.write_json(run / "weights.json", found)
    print(f"wrote {run}/weights.json")


def read_weights(folder):
    """weights.json of a run's folder."""
    return json.loads((folder / "weights.json").read_text(encoding="utf-8"))


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
    if row not in PAPER_COLUMNS:
        return ""
    accuracy = next(line for line in paper.table(2) if line["dataset"] == "average")
    auroc = {line["method"]: line["mean AUROC"] for line in paper.table(3)}
    return ", ".join(f"{table[PAPER_COLUMNS[row]] - table['SOT-GLP']:+.1f}" for table in (accuracy, auroc)
                     if PAPER_COLUMNS[row] in table)


def print_ablations(args, table, jobs):
    """A table for each dataset and number of shots; table: {(dataset, shots): {row: {column: [a value per seed]}}}."""
    seeds = " ".join(map(str, args.seeds))
    print(f"\nMean and standard deviation over seeds {seeds}; the difference to the full method, paired by seed, with "
          "its standard\nerror; ~ not larger than twice that. Validation shots judge, the test is shown. Last column: "
          "the paper's differences,\naccuracy on eleven datasets (Table 2), AUROC on ImageNet (Table 3).")
    for (dataset, shots), rows in table.items():
        model = args.model or machine.default_model(dataset)
        folders = [job.folder for job in jobs if job[:3] == ("full", dataset, shots)]
        print_ablation_table(f"{dataset}, {shots} shots, model {model}", {**rows, **weight_rows(folders)})


def print_ablation_table(heading, rows):
    """The rows, each beside the row "full", which has the same seeds."""
    full = rows["full"]
    print(f"\n{heading}")
    heads = "".join(f"{head:>16s}{'difference':>18s}" for head in ABLATION_COLUMNS.values())
    print(f"{'':32s}{heads}{'paper':>12s}")
    for name, values in rows.items():
        cells = ""
        for column in ABLATION_COLUMNS:
            found = values.get(column, [])
            cells += f"{evaluate.mean_and_spread(found):>16s}"
            cells += f"{difference(found, full[column]) if found and name != 'full' else '':>18s}"
        print(f"{ABLATIONS.get(name, [name])[0]:32s}{cells}{paper_difference(name):>12s}".rstrip())


# ---- the script ----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options; what is not among them goes to train.py and is checked there."""
    parser = Parser("python -m extras.compare [options] [options of train.py]", __doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", choices=sorted(data.DATASETS), default=["critters"], metavar="NAME",
        help="datasets, a table for each (critters)")
    add("--shots", nargs="+", type=int, default=[16], help="training images per class, a table for each (16)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="runs of each method; the shots stay the same (1 2 3)")
    add("--split-seed", type=int, default=1, help="draws the shots (1)")
    add("--ablations", action="store_true", help="compare SOT-GLP with variants of itself")
    add("--weights", type=Path, metavar="RUN",
        help="score this run with several weights of the local branch, into RUN/weights.json, as --ablations does")
    add("--methods", nargs="+", metavar="ROW",
        help=f"rows (all): {', '.join(ROWS)}; with --ablations {', '.join(ABLATIONS)}; with --classes base "
             + ", ".join(BASE_ROWS))
    add("--classes", choices=("all", "base"), default="all",
        help="base: train on the first half of the classes, test on each half (%(default)s)")
    add("--data-root", help="folder that holds the datasets' folders ($DATA_ROOT, else ./data)")
    add("--model", help="a CLIP name or a weights file (tiny for critters, else ViT-B/16)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--output-dir", help="the runs are folders of it (comparison, with --ablations ablations)")
    args, args.more = parser.parse_known_args(argv)
    if args.ablations and args.classes == "base":
        parser.error("--ablations and --classes base do not go together")
    if args.ablations:
        args.rows, usual = ABLATIONS, [*ABLATIONS]
    elif args.classes == "base":
        args.rows, usual = {**BASE_ROWS, **SLOW}, [*BASE_ROWS]
    else:
        args.rows, usual = {**ROWS, **SLOW}, [*ROWS]
    args.methods = args.methods or usual
    if args.methods == ["all"]:
        args.methods = [*args.rows]
    if not args.ablations:
        for name in METHODS:                               # your own method, say, has the row of its name
            args.rows.setdefault(name, (name, ["--method", name], ""))
    # why apart: evaluate.py --table averages what is in runs/, and runs there may have other threads than these
    args.output_dir = args.output_dir or ("ablations" if args.ablations else "comparison")
    unknown = {*args.methods} - {*args.rows}
    if unknown:
        parser.error(f"--methods has no row {', '.join(sorted(unknown))}: choose from {', '.join(args.rows)}")
    check_more(parser, args)
    # why absolute: the runs start in the folder of this program
    args.output_dir = os.path.abspath(args.output_dir)
    args.data_root = files.absolute(args.data_root or data.default_root())
    args.model = os.path.abspath(args.model) if args.model and os.path.exists(args.model) else args.model
    if args.ablations and "full" not in args.methods:
        args.methods = ["full", *args.methods]             # why: the others are compared with it
    return args


def check_more(parser, args):
    """Ends the program where rows, seeds and shots, or what goes to train.py, would spoil the table."""
    given = {option.partition("=")[0] for option in args.more}
    own = given & {"--method", "--seed", "--resume", "--overwrite"}
    if own:
        parser.error(f"{', '.join(sorted(own))} would be the same for all rows and seeds: --methods and --seeds name "
                     "those")
    if len({*args.seeds}) < len(args.seeds) or min(args.shots) < 0 or args.methods == ["zero_shot"]:
        parser.error("--seeds must differ, --shots must not be negative, and zero_shot is measured by the runs of "
                     "another row")
    lacks = given & {"--sampler", "--test-split", "--held-out", "--template", "--activation"}
    if lacks and "linear_probe" in args.methods:
        parser.error(f"the linear probe has no {', '.join(sorted(lacks))}: name the other rows by --methods")
    if "--test-split" in lacks and args.classes == "base":
        parser.error("--classes base has no --test-split: both halves of the classes are scored on their test pictures")


def how_to_go_on():
    """The command that goes on with what is missing."""
    return f"python -m extras.compare {shlex.join(sys.argv[1:])} goes on with what is missing"


@machine.plain_errors(how_to_go_on)
def main(args):
    """The runs, what is missing of them, the table."""
    machine.refuse_torchrun()
    machine.check_device(args.device, n_processes=1)
    if args.weights:
        machine.use_device(args.device)
        return score_weights(args.weights, args.device)
    jobs = make_jobs(args)
    on_gpu = args.device.startswith("cuda")
    at_once = 1 if on_gpu else min(2, os.cpu_count() or 1)
    threads = 0 if on_gpu else 1
    check_finished(jobs, threads)
    run_all(jobs, at_once, threads)
    table = make_table(args, jobs)
    if args.ablations:
        print_ablations(args, table, jobs)
    elif args.classes == "base":
        print_base_to_new(args, table)
    else:
        print_table(args, table)
    machine.write_json(Path(args.output_dir) / "compare.json",
                    [{"dataset": dataset, "shots": shots, "row": row, **values}
                     for (dataset, shots), rows in table.items() for row, values in rows.items()])
    print(f"wrote {args.output_dir}/compare.json")


if __name__ == "__main__":
    main(parse_args())
