"""Trains the compared methods on the same draws and prints one table: accuracy, OOD detection, time, size.

    python -m extras.compare                               the fast methods on the embedded default, 3 seeds
    python -m extras.compare --methods all                 every row; it says first how long each takes
    python -m extras.compare --methods coop sotglp --epochs 20     what it does not know goes to train.py
    python -m extras.compare --dataset eurosat dtd --shots 1 16 --data-root DIR --model ViT-B/16
    python -m extras.compare --classes base                trained on half of the classes, tested on both
    python -m extras.compare --ablations                   SOT-GLP beside variants of itself

Each run is one of train.py (or of extras/linear_probe.py) in a folder of its own below --output-dir. Stop it
when you like: what is finished is not run again, and an interrupted run goes on where it was. Without a GPU
two runs go at a time, each with one thread. Read it from `main`: the runs (jobs.py), whether finished ones
may stand in (reuse.py), what is missing (children.py), the table (measures.py, ablations.py).
"""

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import data
from extras import ablations
from extras.children import run_all
from extras.jobs import Row, make_jobs
from extras.measures import make_table, print_base_to_new, print_table
from extras.reuse import check_finished
from harness import machine, places
from harness.parser import Parser
from methods import METHODS
from sources import files
from sources.listing import check_regular

ROWS = {
    "zero_shot": Row("zero-shot CLIP", None, "CLIP"),
    "linear_probe": Row("linear probe", None, "Linear Probe", 20),
    "coop": Row("CoOp", ("--method", "coop"), "CoOp", 180),
    "coop_class_specific": Row("CoOp, a context per class", ("--method", "coop", "--class-specific"),
                               seconds=180),
    # why no column: Table 1's PLOT is PLOT++
    "plot": Row("PLOT on patches", ("--method", "plot"), seconds=40),
    "proda": Row("ProDA", ("--method", "proda"), "ProDA", 130),
    "locoop": Row("LoCoOp", ("--method", "locoop"), "LoCoOp", 40),
    "lsn": Row("LSN", ("--method", "lsn"), seconds=220),
    "gallop": Row("GalLoP", ("--method", "gallop"), "GalLoP", 180),
    "sotglp": Row("SOT-GLP", ("--method", "sotglp"), "SOT-GLP", 60),
}
# With large images or many classes these take long: they run where --methods names them, or all.
SLOW = {
    "cocoop": Row("CoCoOp", ("--method", "cocoop"), "CoCoOp", 40),
    "maple": Row("MaPLe", ("--method", "maple"), "MaPLe", 15),
    "promptsrc": Row("PromptSRC", ("--method", "promptsrc"), "PromptSRC", 120),
    "plotpp": Row("PLOT++", ("--method", "plotpp", "--stage", "2"), "PLOT", 700,
                  first=("--method", "plotpp", "--stage", "1")),
}

PROMPTOT = ("--method", "promptot")
BASE_ROWS = {
    "zero_shot": ROWS["zero_shot"],
    "coop": ROWS["coop"],
    "ivlp": Row("IVLP", (*PROMPTOT, "--lambda-transport", "0")),
    "promptot_image": Row("Prompt-OT, images alone", (*PROMPTOT, "--modality", "image")),
    "promptot_text": Row("Prompt-OT, texts alone", (*PROMPTOT, "--modality", "text")),
    "promptot": Row("Prompt-OT, joint", PROMPTOT),
    "cocoop": SLOW["cocoop"],
    "maple": SLOW["maple"],
    # for base to new other options are published
    "promptsrc": SLOW["promptsrc"]._replace(options=(
        "--method", "promptsrc", "--epochs", "20", "--average-mean", "15", "--average-std", "1")),
}
# The others whose prompts are shared; their papers have no new classes.
BASE_SLOW = {
    "plotpp": SLOW["plotpp"],
    "proda": ROWS["proda"],
}


# ---- the options -------------------------------------------------------------------------------------------

def make_parser():
    """The options; what is not among them goes to train.py and is checked there."""
    parser = Parser("python -m extras.compare [options] [options of train.py]", __doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", choices=data.DATASETS, default=["critters"], metavar="NAME",
        help="datasets, a table for each (critters)")
    add("--shots", nargs="+", type=int, default=[16], metavar="N",
        help="training images per class, a table for each (16)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N",
        help="runs of each method; the shots stay the same (1 2 3)")
    add("--split-seed", type=int, default=1, metavar="N", help="draws the shots (1)")
    add("--methods", nargs="+", metavar="ROW",
        help=f"rows ({' '.join(ROWS)}); all: also {' '.join(SLOW)}; any other --method of train.py is one, "
             f"too. With --classes base ({' '.join(BASE_ROWS)}); all: also {' '.join(BASE_SLOW)}. With "
             f"--ablations ({' '.join(ablations.ROWS)})")
    add("--classes", choices=("all", "base"), default="all",
        help="base: train on the first half of the classes, test on each half (%(default)s)")
    add("--ablations", action="store_true", help="compare SOT-GLP with variants of itself")
    add("--weights", metavar="RUN",
        help="score this run with several weights of the local branch, as --ablations does: RUN/weights.json")
    add("--data-root", metavar="DIR",
        help="folder that holds the datasets' folders ($DATA_ROOT, else ./data; for --weights the run's own)")
    add("--model", metavar="NAME", help="a CLIP name or a weights file (tiny for critters, else ViT-B/16)")
    add("--activation", choices=clip.ACTIVATIONS, help="of a --model that is somebody's file (quickgelu)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--output-dir", metavar="DIR",
        help="the runs are folders of it (comparison, with --ablations ablations)")
    return parser


def parse_args(argv=None):
    """The options, with the rows that there are and those asked for, checked for what goes together."""
    parser = make_parser()
    args, args.more = parser.parse_known_args(argv)
    parser.refuse_empty(args)
    if args.weights:
        if args.more:
            parser.error(f"--weights has no use for {' '.join(args.more)}")
        return args

    choose_rows(parser, args)
    check_repeats(parser, args)
    check_together(parser, args)
    # why apart: extras/tables.py averages what is in runs/, and runs there may have other threads than these
    folder = args.output_dir or ("ablations" if args.ablations else "comparison")
    # why absolute: the runs start in the folder of this program
    args.output_dir = files.absolute(folder)
    args.data_root = files.absolute(args.data_root or data.default_root())
    args.model = clip.full_name(args.model) if args.model else None
    return args


def choose_rows(parser, args):
    """Sets args.rows, {name: Row} of the rows that there are, and args.methods, the names of those wanted."""
    if args.ablations:
        usual = args.rows = ablations.ROWS
    elif args.classes == "base":
        usual = BASE_ROWS
        args.rows = BASE_ROWS | BASE_SLOW
    else:
        usual = ROWS
        args.rows = ROWS | SLOW
    args.methods = args.methods or [*usual]
    if args.methods == ["all"]:
        args.methods = [*args.rows]

    if args.ablations and "full" not in args.methods:
        args.methods = ["full", *args.methods]             # why: the others are compared with it
    for name in args.methods:
        if name in METHODS and name not in args.rows and not args.ablations:
            args.rows = {**args.rows, name: Row(name, ("--method", name))}
    unknown = [name for name in args.methods if name not in args.rows]
    if unknown:
        parser.error(f"--methods has no row {', '.join(unknown)}: choose from {', '.join(args.rows)}")


def check_repeats(parser, args):
    """Ends the program where something is asked for twice, which would count twice."""
    for name in ("dataset", "shots", "seeds", "methods"):
        values = getattr(args, name)
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            parser.error(f"--{name} has {repeated[0]} more than once")


def check_together(parser, args):
    """Ends the program where options do not go together, or what goes to train.py would spoil the table."""
    if args.ablations and args.classes == "base":
        parser.error("--ablations and --classes base do not go together")
    if min(args.shots) < 0:
        parser.error(f"--shots must not be negative, got {min(args.shots)}")
    if args.methods == ["zero_shot"]:
        parser.error("zero_shot is measured by the runs of another row: name one by --methods")

    given = [option.partition("=")[0] for option in args.more if option.startswith("--")]
    own = ("--method", "--seed", "--resume", "--overwrite", "--start-from")
    own = [name for name in own if name in given]
    if own:
        parser.error(f"{', '.join(own)} would be the same for all rows and seeds: --methods and --seeds name "
                     "those")
    if "--test-split" in given and args.classes == "base":
        parser.error("--classes base has no --test-split: both halves of the classes are scored on their "
                     "test pictures")
    if "linear_probe" in args.methods:
        check_probe(parser, args, given)


def check_probe(parser, args, given):
    """Ends the program where options of train.py would part the linear probe from the other rows."""
    lacks = [name for name in ("--sampler", "--test-split", "--held-out", "--template")
             if name in given]
    if not {*args.methods} - {"linear_probe", "zero_shot"}:
        lacks = given                                      # why: there is no run of train.py that has them
    if lacks:
        parser.error(f"the linear probe has no {', '.join(lacks)}: name the other rows by --methods")


# ---- the script --------------------------------------------------------------------------------------------

def how_to_go_on():
    """The command that goes on with what is missing."""
    return f"python -m extras.compare {shlex.join(sys.argv[1:])} goes on with what is missing"


def check_replaceable(path):
    """Raises ValueError where compare.json is somebody else's: it is no list of rows."""
    if not path.exists():
        return
    check_regular(path)
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        if all({"dataset", "shots", "row"} <= row.keys() for row in json.loads(path.read_bytes())):
            return
    raise ValueError(f"{path} is no table of this program, which writes its own there: give it another name, "
                     "or name another --output-dir")


@machine.plain_errors(how_to_go_on)
def main(args):
    """The runs, what is missing of them, the table."""
    if args.weights:
        machine.use_device(args.device)
        return ablations.score_weights(Path(args.weights), args.device, args.data_root, args.model)

    machine.refuse_torchrun()
    machine.check_device(args.device, n_processes=1)
    on_gpu = args.device.startswith("cuda")
    at_once = 1 if on_gpu else min(2, os.cpu_count() or 1)
    threads = 0 if on_gpu else 1
    if "folder" in args.dataset:
        places.check_apart(args.output_dir, args.data_root)
    jobs = make_jobs(args)
    check_finished(jobs, threads)
    places.check_folder(args.output_dir, "--output-dir")
    check_replaceable(Path(args.output_dir) / "compare.json")
    run_all(jobs, at_once, threads)

    table = make_table(args, jobs)
    if args.ablations:
        ablations.print_ablations(args, table, jobs)
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
