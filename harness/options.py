"""The options of train.py: those that all methods share, each method's own, and what is refused."""

import argparse
import math
import os
import re
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

import data
from harness import machine, runs
from methods import METHODS, OPTIONS, promptot
from sources import files

# Flags whose name is not that of the parameter: they switch it off.
SWITCHES = {"vv_attention": "--no-vv", "class_specific": "--shared-local"}

# What is known about the options of the methods. Their defaults stand in the constructors.
HELP = {
    "n_global": "global prompts, shared by all classes",
    "n_local": "local prompts, per class in sotglp, shared by all classes in the other methods",
    "n_support": "K, patches kept per class; the paper finds 5-20 about equal, 1 and 100 worse",
    "epsilon": "entropy weight of the transport (Eq. 9); smaller is sharper and needs more --n-iters",
    "n_iters": "Sinkhorn iterations; log.jsonl of sotglp has the row error they leave",
    "lambda_local": "weight of the local branch in loss and fusion",
    "prompt_dropout": "share of the global prompts that each training image drops; with 0 they stay alike",
    "local_projection": "keep the identity; in the paper -0.9 accuracy, better OOD",
    "vv_attention": "ordinary patch tokens in place of the V-V stream (Table 2)",
    "plan_gradient": "hold the transport plan constant, as the released code",
    "n_context": "learned vectors in front of a class name",
    "words": "what the context starts from, such as 'a photo of a'; it fixes how many vectors there are",
    "class_specific": "a context of its own for each class (coop, locoop); one set of local prompts for all (sotglp)",
    "top_k": "patches that each local prompt keeps (gallop); classes among which the own label is foreground (locoop)",
    "lambda_entropy": "weight of the entropy of background patches",
    "lambda_transport": "weight of the transport to the frozen CLIP; 0 is IVLP",
    "lambda_image": "weight of the distance of image features from those of the frozen CLIP",
    "lambda_text": "weight of the distance of text features from those of the frozen CLIP",
    "average_mean": "epoch that weighs most in the averaged prompts; published: 30 (deviation 30) for ImageNet, "
                    "Caltech101, Pets, Food101, UCF101, SUN397, 45 (5) for Cars, Flowers, Aircraft, DTD, EuroSAT, all "
                    "with 50 epochs; 15 (1) for base to new, with 20",
    "average_std": "standard deviation, in epochs, of these weights",
    "modality": "what the transport compares: joint, image or text",
    "plan": "exact: permutations of up to 8 images; sinkhorn: entropic, for batches of any size",
    "depth": "blocks with prompts, from the first; a tower with fewer blocks has them in all"}


def parse_args(argv=None, description=None):
    """The options of the method that --method names. Defaults are the method's recipe.

    Defaults that depend on other options or on the machine are filled in here, so that the saved configuration is
    complete.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=METHODS, default="sotglp")
    first.add_argument("--dataset", default="critters")
    first.add_argument("--resume", nargs="?", const=True)
    known, _ = first.parse_known_args(argv)
    saved = saved_options(known.resume) if isinstance(known.resume, str) else {}
    parser = make_parser(saved.get("method", known.method), known.dataset, description)
    args, unknown = parser.parse_known_args(argv, argparse.Namespace(**saved))

    if saved and args.method != saved["method"]:
        parser.error(f"--resume {known.resume}: its method is {saved['method']}, not {args.method}")
    if saved and Path(args.output_dir) != Path(known.resume):
        parser.error(f"--resume {known.resume} goes on in this folder: leave out --output-dir {args.output_dir}")
    machine.refuse_empty(parser, args)
    if unknown:
        parser.error(f"{args.method} has no {' '.join(unknown)}: --method {args.method} --help lists what it has")
    with machine.plain_errors():
        restarted = machine.from_environment("TORCHELASTIC_RESTART_COUNT")
    if restarted and not args.overwrite:                 # why: torchrun gave the same command again, after a failure
        args.resume = args.resume or True
    fill_in(args, is_new=not saved)
    args.output_dir = str(args.output_dir or folder_name(vars(args), vars(parser.parse_args([]))))
    if args.warmup_epochs < math.inf:                    # else check_args refuses it
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    return args


def saved_options(run):
    """The options of a run that --resume RUN goes on with."""
    with machine.plain_errors():
        return {**runs.read_checkpoint(run)["config"], "output_dir": run}


def fill_in(args, is_new=True):
    """Puts in the defaults that depend on other options or on the machine; is_new: the run does not go on."""
    args.model = clip.full_name(args.model or machine.default_model(args.dataset))
    args.amp = args.amp or machine.default_amp(args.device)
    if is_new:
        with machine.plain_errors():
            args.data_root = data.find_root(args.dataset, args.data_root)
    args.data_root = files.absolute(args.data_root)
    if args.workers is None:
        args.workers = machine.default_workers(args.device)


# ---- the parser ----------------------------------------------------------------------------------------------

def make_parser(method, dataset, description=None):
    """The options that all methods share, and this method's own, with its defaults for the dataset."""
    # why no abbreviations: --method is looked for before the other options are known
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add_data_options(parser.add_argument_group("what is trained on what").add_argument, method)
    add_recipe_options(parser.add_argument_group("recipe, Sec. 4").add_argument)
    add_machine_options(parser.add_argument_group("machine").add_argument)
    add_folder_options(parser.add_argument_group("folder of the run"))
    add_method_options(parser.add_argument_group(f"options of {method}").add_argument, method)
    parser.set_defaults(**METHODS[method].recipe(dataset))
    return parser


def add_data_options(add, method):
    add("--method", choices=METHODS, default=method, help="what is trained; it decides the defaults (%(default)s)")
    add("--dataset", choices=sorted(data.DATASETS), default="critters", help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the datasets' folders; for `folder` that of your own pictures, with "
        "train/ and test/ or with class folders ($DATA_ROOT, else ./data)")
    add("--model", help="%s or a weights file (tiny for critters, else ViT-B/16)" % ", ".join(clip.available_models()))
    add("--activation", choices=clip.ACTIVATIONS, default="quickgelu",
        help="of a --model that is somebody's file; weights do not show it (%(default)s)")
    add("--template", metavar="TEXT",
        help="prompt of the zero-shot row, with {} for the class name (the dataset's own)")
    add("--classes", choices=("all", "base"), default="all",
        help="base: train and test on the first half of the classes; evaluate.py --classes new tests the other half")
    add("--shots", type=int, default=16,
        help="training images per class, 0 for all; the paper has 1, 2, 4, 8, 16 (%(default)s)")
    add("--held-out", type=float, metavar="SHARE",
        help="share of each class that is kept for the test where `folder` has class folders alone (0.5)")
    add("--test-split", choices=("test", "val"), default="test",
        help="what the accuracies are measured on; val leaves the test unread, for choices (%(default)s)")
    add("--seed", type=int, default=1, help="initial prompts, order and crops; the paper averages 3 (%(default)s)")
    add("--split-seed", type=int, default=1, help="draws the shots: fixed in the paper, 1-3 in CoOp (%(default)s)")
    add("--sampler", choices=("exact", "proportional"), default="exact",
        help="exact: the same number per class; proportional: as the released code, by class frequency (%(default)s)")


def add_recipe_options(add):
    add("--epochs", type=int, help="all epochs, warm-up included (%(default)s)")
    add("--warmup-epochs", type=float, help="linear warm-up, never more than a tenth of the epochs (%(default)s)")
    add("--batch-size", type=int, help="global batch, split over the processes (%(default)s)")
    add("--lr", type=float, help="peak learning rate of SGD (%(default)s)")
    add("--weight-decay", type=float, help="acts on all that is learned (%(default)s)")


def add_machine_options(add):
    add("--amp", choices=("off", "fp16", "bf16"), help="mixed precision (fp16 on CUDA, off on CPU; bf16 also on CPU)")
    add("--device", default=machine.default_device(),
        help="cpu or cuda; with torchrun each process takes its own GPU (%(default)s)")
    add("--workers", type=int, help="processes that read pictures, per process (up to 8 on CUDA, 0 on CPU)")
    add("--cache-features", action="store_true",
        help="compute image features once and keep them: far faster, but without the paper's augmentation")
    add("--text-chunk", type=int, default=200, help="classes that go through the text tower at once (%(default)s)")
    add("--checkpoint-text", action="store_true",
        help="recompute text activations, chunk by chunk, in the backward pass: less memory, more time")


def add_folder_options(group):
    group.add_argument("--output-dir",
                       help="where the run is written (runs/<dataset>-<shots>shot-seed<seed>, with the method "
                            "and the options that are not the usual ones)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const=True, default=False, metavar="RUN",
                        help="continue the run in the output folder; with RUN, a folder, all options are that run's "
                             "(--data-root, --device and --workers may be given anew)")
    either.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")


def add_method_options(add, method):
    for option, default in OPTIONS[method].items():
        flag = "--" + option.replace("_", "-")
        text = HELP.get(option, "")
        if default is True:
            add(SWITCHES.get(option, "--no-" + flag[2:]), dest=option, action="store_false", help=text)
        elif default is False:
            add(flag, action="store_true", help=text)
        elif isinstance(default, tuple):
            add(flag, type=type(default[0]), nargs="+", default=[*default], help=f"{text} (%(default)s)")
        elif default is None:       # of a text in --words, of a number elsewhere
            add(flag, type=str if option == "words" else int, help=f"{text} (%(default)s)")
        else:
            add(flag, type=type(default), default=default, help=f"{text} (%(default)s)")


# ---- what is refused -----------------------------------------------------------------------------------------

def check_args(args, world):
    """Raises ValueError for options that cannot work, alone or together, before any long work starts."""
    machine.check_device(args.device, args.amp)
    for name in ("lr", "weight_decay", "epsilon", "lambda_local", "lambda_entropy", "lambda_transport",
                 "lambda_image", "lambda_text", "average_mean", "average_std", "warmup_epochs", "prompt_dropout",
                 "workers", "shots"):
        if not 0 <= getattr(args, name, 0) <= torch.finfo(torch.float32).max:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number and not negative, "
                             f"got {getattr(args, name)}")
    for name in ("seed", "split_seed"):
        if not -2**63 <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name.replace('_', '-')} must have 64 bits at most, got {getattr(args, name)}")
    if args.batch_size < world:
        raise ValueError(f"--batch-size {args.batch_size} leaves some of the {world} processes without images: "
                         f"it is the global batch, give at least {world}")
    for name in ("epochs", "n_global", "n_local", "n_support", "n_context", "n_iters", "depth", "text_chunk"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if getattr(args, "epsilon", 1) < 1e-6:               # why: cost / epsilon must leave float32 some digits
        raise ValueError(f"--epsilon must be positive, and at least 1e-6, got {args.epsilon}")
    if getattr(args, "average_std", 1) < 1e-6:           # why: epochs are divided by it
        raise ValueError(f"--average-std must be positive, and at least 1e-6, got {args.average_std}")
    if getattr(args, "prompt_dropout", 0) > 1:
        raise ValueError(f"--prompt-dropout must lie in [0, 1], got {args.prompt_dropout}")
    if getattr(args, "plan", "") == "exact" and args.lambda_transport and args.batch_size > promptot.LARGEST_EXACT:
        raise ValueError(f"--plan exact tries all orders of a batch of at most {promptot.LARGEST_EXACT} images, got "
                         f"--batch-size {args.batch_size}: give a smaller one, or --plan sinkhorn")
    data.template(args.dataset, args.template)
    if args.held_out is not None and not 0 < args.held_out < 1:
        raise ValueError(f"--held-out must lie between 0 and 1, got {args.held_out}")
    runs.check_free(args.output_dir, configuration(args), args.resume, args.overwrite)


def unusual(args):
    """The options that differ from what they are where method, dataset and model alone are given: {name: value}."""
    usual = vars(parse_args(["--method", args.method, "--dataset", args.dataset, "--model", args.model]))
    apart = ("output_dir", "resume", "overwrite")
    return {name: value for name, value in vars(args).items() if name not in apart and value != usual[name]}


def configuration(args):
    """The options that belong to a run, as result.json and last.pt have them."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}


# ---- the folder of a run -----------------------------------------------------------------------------------

# Options that have a place of their own in the name of a run's folder, and those that are no part of a configuration.
NAMED = {"method", "dataset", "model", "classes", "shots", "seed", "resume", "overwrite"}


def folder_name(options, defaults):
    """Where a run is written if nobody says otherwise, such as runs/released-eurosat-ViT-B-32-16shot-epochs20-seed1.

    The name has all in which a run is not the usual one of its dataset. options: as given, with method, model and
    data_root filled in; defaults: what the other ones are where they are not given.
    """
    method, dataset, model = (options[name] for name in ("method", "dataset", "model"))
    parts = [method] if method != "sotglp" else []
    parts += [dataset, os.path.basename(options["data_root"])] if dataset == "folder" else [dataset]
    if model != machine.default_model(dataset):
        parts.append(Path(model).stem if os.path.isabs(model) else model)
    parts += ["base"] if options["classes"] == "base" else []
    parts.append(f"{options['shots'] or 'all'}shot")
    parts += [in_words(name, options[name]) for name, default in defaults.items()
              if name not in NAMED | runs.IGNORED_WHEN_COMPARING and options[name] != default]
    # why: a blank or a slash would need quotes, or make folders
    return "runs/" + "-".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts) + f"-seed{options['seed']}"


def in_words(name, value):
    """An option and its value in the name of a folder: epochs20, no-vv, plan-sinkhorn, top-k5+10."""
    if value is False:
        return SWITCHES.get(name, f"no-{name}").removeprefix("--").replace("_", "-")
    name = name.replace("_", "-")
    if value is True:
        return name
    if isinstance(value, str):
        return f"{name}-{value[:30]}"
    numbers = value if isinstance(value, list) else [value]
    return name + "+".join(f"{number:.10g}" for number in numbers)
