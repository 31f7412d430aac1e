"""From the rows of a table to its runs: the folder of each, its commands, and about how long it takes.

A `Row` is what a table compares, a `Job` is one run of it. Read it from `make_jobs`.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from extras import linear_probe
from harness.configuration import configuration
from harness.options import parse_args
from methods import METHODS
from sources.ood_sets import ood_sets

AROUND = 10         # seconds that a run takes before and after its training
FIRST_SEED = 1      # of the run that all seeds of a row start from, whichever seeds are asked for


class Row(NamedTuple):
    """What a table compares."""
    label: str
    options: tuple | None     # of train.py; None: it has a command of its own
    column: str = ""          # of the paper's Table 1
    seconds: int = 100        # about what training takes on the embedded default, on one CPU thread
    first: tuple = ()         # options of a run that all its runs start from


class Job(NamedTuple):
    """One run."""
    row: str
    dataset: str
    shots: int
    seed: int
    folder: Path
    config: dict                   # its options, as result.json has them
    commands: dict                 # {file: the command that writes it}: the run, then what is measured of it
    after: Path | None = None      # the folder of the run that it starts from
    seconds: float | None = None   # about what it takes; None: unknown

    def __str__(self):
        return f"{self.row}, {self.dataset}, {self.shots} shots, seed {self.seed}"

    @property
    def is_trained(self):
        return (self.folder / "result.json").exists()

    @property
    def missing(self):
        """Those of `commands` that were not run to their end."""
        return {file: command for file, command in self.commands.items() if not (self.folder / file).exists()}


# ---- the runs of a table -----------------------------------------------------------------------------------

def make_jobs(args):
    """All runs that a table needs. Raises ValueError where two of its rows are one run."""
    has_ood_sets.cache_clear()                             # why: files may have changed since
    jobs = []
    for dataset in args.dataset:
        for shots in args.shots:
            for name in args.methods:
                jobs += jobs_of_row(args, name, dataset, shots)

    first = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if other is not job:
            raise ValueError(f"the rows {other.row} and {job.row} are one run with these options: leave one "
                             "out by --methods")
    return jobs


def jobs_of_row(args, name, dataset, shots):
    """The runs of a row. why none of zero-shot CLIP: every run measures it."""
    if name == "zero_shot":
        return []
    if name == "linear_probe":
        # why one seed: with a fixed draw nothing in it is random
        jobs = [probe_job(args, (dataset, shots, args.seeds[0]))]
    else:
        jobs = trained_jobs(args, name, dataset, shots)
    seconds = args.rows[name].seconds
    return [job._replace(seconds=foresee(seconds, job.config)) for job in jobs]


def trained_jobs(args, name, dataset, shots):
    """The runs of a row of train.py: one for each seed, behind the one that all start from, if any."""
    row = args.rows[name]
    jobs = []
    start = None
    if row.first:
        jobs = [training_job(args, f"{name}, stage 1", row.first, (dataset, shots, FIRST_SEED))]
        start = jobs[0].folder
    for seed in args.seeds:
        job = training_job(args, name, row.options, (dataset, shots, seed), start)
        jobs.append(job._replace(commands={**job.commands, **measurements(args, job)}))
    return jobs


def training_job(args, name, row_options, which, start=None):
    """A run of train.py, in the folder that it has by itself, but below --output-dir.

    which: dataset, shots, seed; start: the folder of the run that it starts from, or None.
    """
    # why the row's own options last: its label stays true, whatever all rows are given
    options = [*shared_options(args, *which), "--classes", args.classes, *args.more, *row_options]
    folder = Path(args.output_dir, Path(parse_args(options).output_dir).name)
    if start:
        options += ["--start-from", str(start)]
    config = configuration(parse_args(options))
    command = ["train.py", *options, "--output-dir", str(folder), "--resume"]
    return Job(name, *which, folder, config, {"result.json": command}, start)


def probe_job(args, which):
    """A run of the linear probe; which: dataset, shots, seed."""
    options = shared_options(args, *which)
    wanted = linear_probe.parse_args(options)
    folder = Path(args.output_dir, Path(wanted.output_dir).name)
    command = ["-m", "extras.linear_probe", *options, "--output-dir", str(folder)]
    return Job("linear_probe", *which, folder, linear_probe.configuration(wanted), {"result.json": command})


def measurements(args, job):
    """What is measured of a trained run, as the commands of a `Job`."""
    folder = str(job.folder)
    where = place(args, job.dataset)
    commands = {}
    if args.classes == "base":
        commands["evaluation-new.json"] = ["evaluate.py", folder, "--classes", "new", *where]
    elif has_ood_sets(job.dataset, args.data_root):
        commands["ood.json"] = ["ood.py", folder, *where]
    if args.ablations:
        commands["weights.json"] = ["-m", "extras.compare", "--weights", folder, *where]
    return commands


def shared_options(args, dataset, shots, seed):
    """The options of a run that all rows have."""
    options = ["--dataset", dataset, "--shots", str(shots)]
    options += ["--seed", str(seed), "--split-seed", str(args.split_seed)]
    if args.activation:
        options += ["--activation", args.activation]
    return options + place(args, dataset)


def place(args, dataset):
    """The options that say where pictures and weights are and what computes, for every command of a row."""
    options = ["--device", args.device]
    if dataset != "critters":
        options += ["--data-root", args.data_root]
    if args.model:
        options += ["--model", args.model]
    return options


@functools.cache
def has_ood_sets(dataset, root):
    """Whether there are pictures of something else to tell apart from a dataset."""
    try:
        return bool(ood_sets(dataset, root))
    except (ValueError, FileNotFoundError):
        return False


def foresee(seconds, config):
    """About the seconds of a run, from those of training on the embedded default, by images and epochs.

    None on other data, with another model and on a GPU, where nothing is known.
    """
    is_alike = (config["dataset"], config["model"], config["device"]) == ("critters", "tiny", "cpu")
    if not is_alike or not config["shots"]:
        return None
    seconds *= config["shots"] / 16
    if config["classes"] == "base":
        seconds /= 2
    if "epochs" in config:
        seconds *= config["epochs"] / METHODS[config["method"]].recipe("critters")["epochs"]
    return AROUND + seconds
