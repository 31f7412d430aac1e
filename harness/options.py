"""The options of train.py: those that all methods share, and each method's own.

`python train.py --help`, or a wrong option, needs no torch, whose import takes long. So this file imports
what needs torch only for another method than the paper's, or when all options are right.
"""

import argparse
import re
from pathlib import Path

from harness.parser import Parser, near
from sources import DATASETS, VARIANTS

# What --help says of the paper's method without asking its class, which has these values too (Sec. 4).
PAPER_RECIPE = {"lr": 0.05, "epochs": 50, "warmup_epochs": 5, "batch_size": 32, "weight_decay": 0.01}
PAPER_OPTIONS = {"n_global": 4, "n_local": 4, "n_support": 10, "epsilon": 0.1, "n_iters": 20,
                 "lambda_local": 0.25, "prompt_dropout": 0.75, "local_projection": True, "vv_attention": True,
                 "class_specific": True, "plan_gradient": True}

# Flags whose name is not that of the parameter: they switch it off.
SWITCHES = {"vv_attention": "--no-vv", "class_specific": "--shared-local"}

# What --help calls a value of each kind.
METAVARS = {int: "N", float: "X", str: "TEXT"}

# The help of the methods' options, by flag. Where one method needs other words, its name stands before the
# flag.
HELP = {
    "--n-global": "global prompts, shared by all classes",
    "--n-local": "local prompts of each class",
    "gallop --n-local": "local prompts, shared by all classes",
    "plot --n-local": "prompts of each class",
    "--n-support": "K, patches kept per class; the paper: 5-20 alike, 1 and 100 worse",
    "--epsilon": "entropy weight of the plan (Eq. 9); a smaller one needs more --n-iters",
    "--n-iters": "Sinkhorn iterations; log.jsonl has the row error that they leave",
    "plot --n-iters": "Sinkhorn iterations",
    "plotpp --n-iters": "Sinkhorn iterations",
    "promptot --n-iters": "Sinkhorn iterations of --plan sinkhorn",
    "--lambda-local": "weight of the local branch in loss and fusion",
    "--prompt-dropout": "share of global prompts that an image drops; with 0 they stay alike",
    "--no-local-projection": "keep the identity; in the paper -0.9 accuracy, better OOD",
    "--no-vv": "ordinary patch tokens in place of the V-V stream (Table 2)",
    "--shared-local": "one set of local prompts for all classes (Table 2)",
    "--no-plan-gradient": "hold the transport plan constant, as the released code",
    "--n-context": "learned vectors in front of a class name",
    "--words": "what the context starts from, such as 'a photo of a'; it fixes how many vectors there are",
    "plotpp --words": "texts of equally many tokens, a text prompt starts from each; docs/methods.md has "
                      "more",
    "--class-specific": "a context of its own for each class",
    "gallop --top-k": "patches that the local prompts keep, a number for each",
    "locoop --top-k": "classes among which the own label makes a patch foreground",
    "--lambda-entropy": "weight of the entropy of background patches",
    "--lambda-transport": "weight of the transport to the frozen CLIP; 0 is IVLP",
    "--lambda-image": "weight of the distance of image features from those of the frozen CLIP",
    "--lambda-text": "weight of the distance of text features from those of the frozen CLIP",
    "--average-mean": "epoch that weighs most in the averaged prompts; published: 30 (deviation 30) for "
                      "ImageNet, Caltech101, Pets, Food101, UCF101, SUN397, 45 (5) for Cars, Flowers, "
                      "Aircraft, DTD, EuroSAT, all with 50 epochs; 15 (1) for base to new, with 20",
    "--average-std": "standard deviation, in epochs, of these weights",
    "--modality": "what the transport compares: joint, image or text",
    "--plan": "exact: permutations of up to 8 images; sinkhorn: entropic, any batch",
    "--depth": "blocks with prompts, from the first; a tower with fewer has them in all",
    "--stage": "1: learn the image prompts alone, with the score of pooled features; 2: learn both prompts. "
               "Published: 2 with --start-from a run of 1; 2 alone is a run of its own",
    "--n-image-prompts": "prompts of the image tower, each with a pass of its own",
    "--n-image-tokens": "tokens of an image prompt",
    "--n-drawn": "prompts that a step takes, of --n-global",
    "--lambda-orthogonal": "weight of the likeness of the prompts",
    "--n-negative": "negative contexts of each class",
    "--lambda-diversity": "weight of the likeness of a class's negative texts",
    "--double-softmax": "take the softmax of the logits for logits, as the released code"}


def parse_args(argv=None, description=None):
    """The options of the method that --method names. Defaults are the method's recipe.

    Defaults that depend on other options or on the machine are filled in here. So the saved configuration is
    complete.
    """
    first = Parser("", "", add_help=False)
    first.add_argument("--method", default="sotglp")
    first.add_argument("--dataset", default="critters")
    first.add_argument("--resume", nargs="?", const=True)
    known, _ = first.parse_known_args(argv)
    saved = {}
    if isinstance(known.resume, str) and known.resume.strip():
        from harness.configuration import saved_options  # why here and below: it needs torch
        saved = saved_options(known.resume)

    parser = make_parser(saved.get("method", known.method), known.dataset, description)
    args, unknown = parser.parse_known_args(argv, argparse.Namespace(**saved))

    if saved and args.method != saved["method"]:
        parser.error(f"--resume {known.resume}: its method is {saved['method']}, not {args.method}")
    if saved and Path(args.output_dir) != Path(known.resume):
        parser.error(f"--resume {known.resume} goes on in this folder: leave out --output-dir "
                     f"{args.output_dir}")
    parser.refuse_empty(args)
    if unknown:
        parser.error(f"{args.method} has no {' '.join(unknown)}: {parser.near(unknown)}"
                     f"--method {args.method} --help lists what it has")

    from harness.configuration import fill_in
    fill_in(args, parser.parse_args([]), given(parser, argv), is_new=not saved)
    return args


def given(parser, argv):
    """The names of the options that stand in argv, their defaults or not."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    args, _ = parser.parse_known_args(argv, unset)
    return {name for name, value in vars(args).items() if value is not None}


# ---- the parser --------------------------------------------------------------------------------------------

def make_parser(method, dataset, description=None):
    """The options that all methods share, and this method's own, with its defaults for the dataset."""
    parser = Parser("python train.py [options]", description)
    methods = method_names()
    if method not in methods:
        from methods import METHODS  # why here: it needs torch
        methods = [*METHODS]
    if method not in methods:
        parser.error(f"no method is called {method!r}: {near([method], methods)}there are "
                     + ", ".join(methods))

    options, recipe = options_of(method, dataset)
    add_data_options(parser.add_argument_group("what is trained on what").add_argument, method, methods)
    add_recipe_options(parser.add_argument_group("recipe, Sec. 4").add_argument)
    add_machine_options(parser.add_argument_group("machine").add_argument)
    add_folder_options(parser.add_argument_group("folder of the run"))
    add_method_options(parser.add_argument_group(f"options of {method}").add_argument, method, options)
    parser.set_defaults(**recipe)
    return parser


def method_names():
    """The names in METHODS, from the text of methods/__init__.py. why: to import it, torch is needed."""
    text = (Path(__file__).parent.parent / "methods/__init__.py").read_text(encoding="utf-8")
    return re.findall(r'"(\w+)":', text.partition("METHODS = {")[2].partition("}")[0])


def options_of(method, dataset):
    """A method's own options and its recipe, {option: default} each."""
    if method == "sotglp":
        return PAPER_OPTIONS, PAPER_RECIPE
    from methods import METHODS, OPTIONS  # why here: they need torch
    return OPTIONS[method], METHODS[method].recipe(dataset)


def add_data_options(add, method, methods):
    """The options that say what is trained on which pictures."""
    trained = [name for name in DATASETS if name not in VARIANTS]
    add("--method", metavar="NAME", choices=methods, default=method,
        help=", ".join(methods) + " (%(default)s)")
    add("--dataset", metavar="NAME", choices=DATASETS, default="critters",
        help=f"critters, which needs no files, or {', '.join(trained[1:])} (%(default)s)")
    add("--data-root", metavar="DIR",
        help="folder that holds the datasets' folders; for `folder` that of your own pictures ($DATA_ROOT, "
             "else ./data)")
    add("--model", metavar="NAME",
        help="ViT-B/16, ViT-B/32, ViT-L/14, tiny, or a weights file (tiny for critters, else ViT-B/16)")
    add("--activation", choices=("quickgelu", "gelu"), default="quickgelu",
        help="of somebody's weights file (%(default)s)")

    add("--template", metavar="TEXT", help="prompt of the zero-shot row, {} is the class (the dataset's)")
    add("--classes", choices=("all", "base"), default="all",
        help="base: the first half; evaluate.py --classes new tests the others")
    add("--shots", metavar="N", type=int, default=16,
        help="training images per class, 0 for all (%(default)s)")
    add("--held-out", type=float, metavar="SHARE",
        help="of `folder` without test/, kept for the test (0.5)")
    add("--test-split", choices=("test", "val"), default="test",
        help="val leaves the test unread (%(default)s)")

    add("--seed", metavar="N", type=int, default=1,
        help="initial prompts, order, crops; the paper averages 3 (%(default)s)")
    add("--split-seed", metavar="N", type=int, default=1, help="draws the shots (%(default)s)")
    add("--sampler", choices=("exact", "up-to", "proportional"), default="exact",
        help="--shots of each class, fewer of small ones, or by frequency (%(default)s)")


def add_recipe_options(add):
    """The options of the optimisation; a method's recipe has their defaults."""
    add("--epochs", metavar="N", type=int, help="all epochs, warm-up included (%(default)s)")
    add("--warmup-epochs", metavar="X", type=float,
        help="linear warm-up (%(default)s, but at most a tenth of the epochs)")
    add("--batch-size", metavar="N", type=int, help="global batch, split over the processes (%(default)s)")
    add("--lr", metavar="X", type=float, help="peak learning rate of SGD (%(default)s)")
    add("--weight-decay", metavar="X", type=float, help="acts on all that is learned (%(default)s)")
    add("--start-from", metavar="RUN",
        help="begin with what a run of the same method and classes has learned")


def add_machine_options(add):
    """The options of the machine: precision, device, memory and speed."""
    add("--amp", choices=("off", "fp16", "bf16"), help="mixed precision (fp16 on CUDA, else off)")
    add("--device", metavar="NAME",
        help="cpu, cuda, cuda:1; torchrun gives each process its GPU (a GPU if any)")
    add("--workers", metavar="N", type=int, help="processes that read pictures (CUDA: up to 8, else 0)")
    add("--cache-features", action="store_true", help="image features once: fast, no random crops")
    add("--text-chunk", metavar="N", type=int, help="classes encoded at once (1000 on CUDA, else 200)")
    add("--checkpoint-text", action="store_true", help="less memory for texts, more time")
    add("--compile", action="store_true", help="torch.compile: a slow start, then fewer kernels")


def add_folder_options(group):
    """The options that say where a run is written, and what becomes of one that is there."""
    group.add_argument("--output-dir", metavar="DIR",
                       help="(runs/<dataset>-<shots>shot-seed<seed>, with the method and the options that "
                            "are not the usual ones)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const=True, default=False, metavar="RUN",
                        help="go on with the run in the output folder, or with RUN and its options "
                             "(--data-root, --device and --workers may be given anew)")
    either.add_argument("--overwrite", action="store_true",
                        help="replace the run that the output folder holds")


def add_method_options(add, method, options):
    """A flag for each option of a method; its kind follows from the default."""
    for option, default in options.items():
        name = option.replace("_", "-")
        flag = f"--{name}"
        if default is True:
            flag = SWITCHES.get(option, f"--no-{name}")
        text = HELP.get(f"{method} {flag}", HELP.get(flag, ""))

        if default is True:
            add(flag, dest=option, action="store_false", help=text)
        elif default is False:
            add(flag, action="store_true", help=text)
        elif isinstance(default, tuple):
            kind = type(default[0])
            add(flag, type=kind, nargs="+", metavar=METAVARS[kind], default=[*default],
                help=f"{text} (%(default)s)")
        elif default is None:       # of a text in --words, of a number elsewhere
            kind = str if option == "words" else int
            add(flag, type=kind, metavar=METAVARS[kind], help=text)
        else:
            kind = type(default)
            add(flag, type=kind, metavar=METAVARS[kind], default=default, help=f"{text} (%(default)s)")
