"""From train.py's options to a run: what follows from the machine, what is refused, where it is written."""

import os
import re
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait
from clip import tokenizer

import torch

import data
from harness import machine, places, processes, run_pictures, runs
from harness.options import SWITCHES, parse_args
from methods import promptot
from sources import files


# ---- what follows from other options and the machine -------------------------------------------------------

def saved_options(run):
    """The options of a run that --resume RUN goes on with."""
    with machine.plain_errors():
        return {**runs.read_checkpoint(run)["config"], "output_dir": run}


def fill_in(args, defaults, given, is_new=True):
    """Puts in what depends on other options or on the machine.

    given: the names of the options that were given; is_new: the run does not go on.
    """
    if args.device is None:
        args.device = machine.default_device()
    with machine.plain_errors():
        own = args.model or machine.default_model(args.dataset)
        args.model = clip.full_name(own if is_new else runs.model_file(args.output_dir, vars(args)))
    args.amp = args.amp or machine.default_amp(args.device)
    if is_new:
        with machine.plain_errors():
            args.data_root = data.find_root(args.dataset, args.data_root)
    args.data_root = files.absolute(args.data_root)

    if args.workers is None:
        with machine.plain_errors():
            args.workers = machine.default_workers(args.device)
    if args.text_chunk is None:
        args.text_chunk = machine.default_text_chunk(args.device)

    with machine.plain_errors():
        restarted = processes.from_environment("TORCHELASTIC_RESTART_COUNT")
    if restarted and not args.overwrite:                 # why: torchrun repeats the command after a failure
        args.resume = args.resume or True
    args.output_dir = str(args.output_dir or folder_name(vars(args), vars(defaults)))

    if is_new and "warmup_epochs" not in given:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    if is_new and "n_context" not in given and getattr(args, "words", None) and hasattr(args, "n_context"):
        args.n_context = len(tokenizer.encode(args.words))     # why: the words fix how many vectors there are


# ---- what is refused ---------------------------------------------------------------------------------------

# Options of train.py and of the methods, whose values must not be negative.
NOT_NEGATIVE = ("lr", "weight_decay", "epsilon", "lambda_local", "lambda_entropy", "lambda_transport",
                "lambda_image", "lambda_text", "lambda_orthogonal", "lambda_diversity", "average_mean",
                "average_std", "warmup_epochs", "prompt_dropout", "workers", "shots")
# Those of which there must be one at least.
AT_LEAST_ONE = ("epochs", "n_global", "n_local", "n_support", "n_context", "n_iters", "n_image_prompts",
                "n_image_tokens", "n_drawn", "n_negative", "depth", "text_chunk")


def check_args(args, world):
    """Raises ValueError for options that cannot work, alone or together, before any long work starts."""
    machine.check_device(args.device, args.amp)
    check_numbers(args)
    check_method(args)
    check_batch(args, world)
    check_context(args)
    data.template(args.dataset, args.template)
    check_start(args)

    if args.resume:
        run_pictures.root_of(vars(args))
    if args.dataset == "folder":
        places.check_apart(args.output_dir, args.data_root)
    places.check_free(args.output_dir, configuration(args), args.resume, args.overwrite)


def check_numbers(args):
    """Raises ValueError for a number out of its option's range. A method lacks some of these options."""
    for name in NOT_NEGATIVE:
        value = getattr(args, name, 0)
        if not 0 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"{flag(name)} must be a finite number and not negative, got {value}")
    for name in AT_LEAST_ONE:
        value = getattr(args, name, 1)
        if value < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {value}")
    for name in ("seed", "split_seed"):
        if not -2**63 <= getattr(args, name) < 2**63:
            raise ValueError(f"{flag(name)} must have 64 bits at most, got {getattr(args, name)}")

    if getattr(args, "epsilon", 1) < 1e-6:               # why: cost / epsilon must leave float32 some digits
        raise ValueError(f"--epsilon must be positive, and at least 1e-6, got {args.epsilon}")
    if getattr(args, "average_std", 1) < 1e-6:           # why: epochs are divided by it
        raise ValueError(f"--average-std must be positive, and at least 1e-6, got {args.average_std}")
    if getattr(args, "prompt_dropout", 0) > 1:
        raise ValueError(f"--prompt-dropout must lie in [0, 1], got {args.prompt_dropout}")
    if args.held_out is not None and not 0 < args.held_out < 1:
        raise ValueError(f"--held-out must lie between 0 and 1, got {args.held_out}")


def check_method(args):
    """Raises ValueError for what a method's constructor would refuse, but before CLIP is loaded."""
    if args.method == "plotpp" and args.stage not in (1, 2):
        raise ValueError(f"--stage must be 1 or 2, got {args.stage}")
    if args.method == "maple" and args.n_context > 4:
        raise ValueError(f"--n-context must lie between 1 and 4 for --method maple, got {args.n_context}")
    if args.method == "proda" and args.n_drawn > args.n_global:
        raise ValueError(f"--n-drawn must lie between 1 and --n-global, {args.n_global}: got {args.n_drawn}")


def flag(name):
    """An option as one writes it: n_iters -> --n-iters."""
    return f"--{name.replace('_', '-')}"


def check_batch(args, world):
    """Raises ValueError for a batch with fewer images than processes, or more than --plan exact can take."""
    if args.batch_size < world:
        raise ValueError(f"--batch-size {args.batch_size} leaves some of the {world} processes without "
                         f"images: it is the global batch, give at least {world}")
    is_exact = getattr(args, "plan", "") == "exact" and args.lambda_transport
    if is_exact and args.batch_size > promptot.LARGEST_EXACT:
        raise ValueError(f"--plan exact tries all orders of a batch of at most {promptot.LARGEST_EXACT} "
                         f"images, got --batch-size {args.batch_size}: give a smaller one, or --plan "
                         "sinkhorn")


def check_context(args):
    """Raises ValueError for a warm-up longer than the run, and for words that are not --n-context vectors."""
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g} is longer than the run, --epochs "
                         f"{args.epochs}")
    if getattr(args, "words", None) and hasattr(args, "n_context") and not goes_on(args):
        n_tokens = len(tokenizer.encode(args.words))
        if args.n_context != n_tokens:
            raise ValueError(f"--words {args.words!r} are {n_tokens} vectors, but --n-context is "
                             f"{args.n_context}: leave one out")


def goes_on(args):
    """Whether there is a run to go on with; --resume alone does not say that."""
    return args.resume and (Path(args.output_dir) / "last.pt").exists()


def check_start(args):
    """Raises ValueError where --start-from names a run of another method, FileNotFoundError for no run."""
    if args.start_from and not goes_on(args):            # why not: that run may be gone by then
        method = runs.read_checkpoint(args.start_from)["config"]["method"]
        if method != args.method:
            raise ValueError(f"--start-from {args.start_from}: its method is {method}, not {args.method}")


def unusual(args):
    """{name: value} of the options that are not what method, dataset and model alone would make them."""
    usual = vars(parse_args(["--method", args.method, "--dataset", args.dataset, "--model", args.model]))
    usual["warmup_epochs"] = min(usual["warmup_epochs"], args.epochs / 10)    # why: it follows from --epochs
    apart = ("output_dir", "resume", "overwrite")
    return {name: value for name, value in vars(args).items() if name not in apart and value != usual[name]}


def configuration(args):
    """The options that belong to a run, as result.json and last.pt have them."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}


# ---- the folder of a run -----------------------------------------------------------------------------------

# Options that have a place of their own in the name of a run's folder, or no place in it.
NAMED = {"method", "dataset", "model", "classes", "shots", "seed", "resume", "overwrite"}


def folder_name(options, defaults):
    """Where a run is written by default, such as runs/coop-eurosat-ViT-B-32-16shot-epochs20-seed1.

    The name has all in which a run is not the usual one of its dataset. options: as given, with method, model
    and data_root filled in; defaults: what the other ones are where they are not given.
    """
    dataset = options["dataset"]
    model = options["model"]
    parts = []
    if options["method"] != "sotglp":
        parts.append(options["method"])
    parts.append(dataset)
    if dataset == "folder":
        parts.append(os.path.basename(options["data_root"]))
    if model != machine.default_model(dataset):
        parts.append(Path(model).stem if os.path.isabs(model) else model)
    if options["classes"] == "base":
        parts.append("base")
    parts.append(f"{options['shots'] or 'all'}shot")
    parts += [in_words(name, options[name]) for name, default in defaults.items()
              if name not in NAMED | runs.IGNORED_WHEN_COMPARING and options[name] != default]

    # why: a blank or a slash would need quotes, or make folders
    parts = [re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts]
    return f"runs/{'-'.join(parts)}-seed{options['seed']}"


def in_words(name, value):
    """An option and its value in the name of a folder: epochs20, no-vv, plan-sinkhorn, top-k5+10."""
    if value is False:
        return SWITCHES.get(name, f"no-{name}").removeprefix("--").replace("_", "-")
    name = name.replace("_", "-")
    if value is True:
        return name
    if isinstance(value, str):
        return f"{name}-{value[:30]}"                    # why 30: the name of a folder has 255 bytes at most
    if isinstance(value, list) and isinstance(value[0], str):
        return f"{name}-{' '.join(value)[:30]}"
    numbers = value if isinstance(value, list) else [value]
    return name + "+".join(f"{number:.10g}" for number in numbers)
