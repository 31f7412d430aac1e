"""Trains SOT-GLP (arXiv 2603.08347 v1), or a method compared with it, on a few images per class.

    python train.py                                                   the embedded default: tiny CLIP, drawn critters
    python train.py --dataset eurosat --data-root DIR                 one GPU (or CPU), CLIP ViT-B/16
    torchrun --nproc_per_node=4 train.py --dataset eurosat            four GPUs, the same result
    python train.py --method coop                                     another method; its --help lists its options
    python train.py --resume runs/eurosat-16shot-seed1                go on after an interruption

The number of processes changes only the order in which numbers are summed: the global batches, the crops and the prompt
draws are the same. Each draw has its own seed, made of (seed, epoch, image) or (seed, epoch), so no random state has to
be saved.
Read it from `main`: set up, train epoch by epoch, test once.
"""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from sources import files
import evaluate
from harness import machine, runs
from methods import HELP, METHODS, OPTIONS, promptot, released


# ---- options -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options of the method that --method names. Defaults are the method's, the same for every dataset and model.

    Defaults that depend on other options or on the machine are filled in here, so that the saved configuration is
    complete.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=METHODS, default="sotglp")
    first.add_argument("--recipe")
    first.add_argument("--dataset")
    first.add_argument("--resume", nargs="?", const=True)
    known, _ = first.parse_known_args(argv)
    saved = {}
    if isinstance(known.resume, str):
        with machine.plain_errors():
            saved = {**runs.read_checkpoint(known.resume)["config"], "output_dir": known.resume}
    parser = make_parser(saved.get("method", known.method))
    if known.recipe == "released":
        parser.set_defaults(**released.options(known.dataset))
    args, unknown = parser.parse_known_args(argv, argparse.Namespace(**saved))
    if saved and args.method != saved["method"]:
        parser.error(f"--resume {known.resume}: its method is {saved['method']}, not {args.method}")
    if saved and Path(args.output_dir) != Path(known.resume):
        parser.error(f"--resume {known.resume} goes on in this folder: leave out --output-dir {args.output_dir}")
    machine.refuse_empty(parser, args)
    if unknown:
        parser.error(f"{args.method} has no {' '.join(unknown)}: --method {args.method} --help lists what it has")
    args.model = clip.full_name(args.model or machine.default_model(args.dataset))
    args.amp = args.amp or machine.default_amp(args.device)
    if not saved:
        with machine.plain_errors():
            args.data_root = data.find_root(args.dataset, args.data_root)
    args.data_root = files.absolute(args.data_root)
    args.output_dir = str(args.output_dir or runs.folder_name(vars(args), defaults_of(parser)))
    if args.warmup_epochs < math.inf:                    # else check_args refuses it
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    return args


def defaults_of(parser):
    """{option: what it is where it is not given}."""
    return vars(parser.parse_args([]))


def make_parser(method):
    """The options that all methods share, and this method's own."""
    # why no abbreviations: --method is looked for before the other options are known
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    recipe = METHODS[method].DEFAULTS
    add = parser.add_argument_group("what is trained on what").add_argument
    add("--method", choices=METHODS, default=method, help="what is trained; it decides the defaults (%(default)s)")
    if method == "sotglp":
        add("--recipe", choices=("paper", "released"), default="paper",
            help="defaults of the paper, or of the authors' script for the dataset (methods/released.py); a switch "
                 "that it sets has an opposite, such as --no-vv-alias, --plan-gradient (%(default)s)")
    add("--dataset", choices=sorted(data.DATASETS), default="critters", help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the datasets' folders; for `folder` that of your own pictures, with "
        "train/ and test/ or with class folders ($DATA_ROOT, else ./data)")
    add("--model", help="%s or a weights file (tiny for critters, else ViT-B/16)" % ", ".join(clip.available_models()))
    add("--activation", choices=clip.ACTIVATIONS, default="quickgelu",
        help="of a --model that is somebody's file; weights do not show it (%(default)s)")
    add("--template", metavar="TEXT",
        help="prompt of the zero-shot row, with {} for the class name (the dataset's own)")
    add("--classes", choices=("all", "base"), default="all",
        help="base: train and test on the first half of the classes; evaluate.py --base-to-new tests the other half")
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
    add = parser.add_argument_group("recipe, Sec. 4").add_argument
    add("--epochs", type=int, default=recipe["epochs"], help="all epochs, warm-up included (%(default)s)")
    add("--warmup-epochs", type=float, default=recipe["warmup_epochs"],
        help="linear warm-up, never more than a tenth of the epochs (%(default)s)")
    add("--batch-size", type=int, default=recipe["batch_size"],
        help="global batch, split over the processes (%(default)s)")
    add("--lr", type=float, default=recipe["lr"], help="peak learning rate of SGD (%(default)s)")
    add("--weight-decay", type=float, default=recipe["weight_decay"], help="acts on all that is learned (%(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--amp", choices=("off", "fp16", "bf16"), help="mixed precision (fp16 on CUDA, off on CPU; bf16 also on CPU)")
    add("--device", default=machine.default_device(),
        help="cpu or cuda; with torchrun each process takes its own GPU (%(default)s)")
    add("--workers", type=int, help="processes that read pictures, per process (up to 8 on CUDA, 0 on CPU)")
    add("--cache-features", action="store_true",
        help="compute image features once and keep them: far faster, but without the paper's augmentation")
    add("--text-chunk", type=int, default=200, help="classes that go through the text tower at once (%(default)s)")
    add("--checkpoint-text", action="store_true",
        help="recompute text activations, chunk by chunk, in the backward pass: less memory, more time")
    place = parser.add_argument_group("folder of the run")
    place.add_argument("--output-dir",
                       help="where the run is written (runs/<dataset>-<shots>shot-seed<seed>, with the method "
                            "and the options that are not the usual ones)")
    either = place.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const=True, default=False, metavar="RUN",
                        help="continue the run in the output folder; with RUN, a folder, all options are that run's "
                             "(--data-root, --device and --workers may be given anew)")
    either.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    add = parser.add_argument_group(f"options of {method}").add_argument
    for option, (_, default) in OPTIONS[method].items():
        flag, text = "--" + option.replace("_", "-"), HELP.get(option, "")
        if default is False:
            add(flag, action="store_true", help=text)
            # why: what a recipe switches on can be switched off
            add("--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:], action="store_false", dest=option,
                default=False, help=argparse.SUPPRESS)
        else:       # None stands for a text in --words, for a number elsewhere
            several = isinstance(default, tuple)
            kind = str if option == "words" else int if several or default is None else type(default)
            add(flag, type=kind, nargs="+" if several else None, default=[*default] if several else default,
                help=f"{text} (%(default)s)")
    return parser


def check_args(args, world):
    """Raises ValueError for options that cannot work, alone or together, before any long work starts."""
    machine.check_device(args.device, args.amp)
    for name in ("lr", "weight_decay", "epsilon", "lambda_local", "lambda_entropy", "lambda_transport", "warmup_epochs",
                 "prompt_dropout", "workers", "shots"):
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
    if getattr(args, "prompt_dropout", 0) > 1:
        raise ValueError(f"--prompt-dropout must lie in [0, 1], got {args.prompt_dropout}")
    if getattr(args, "plan", "") == "exact" and args.lambda_transport and args.batch_size > promptot.LARGEST_EXACT:
        raise ValueError(f"--plan exact tries all orders of a batch of at most {promptot.LARGEST_EXACT} images, got "
                         f"--batch-size {args.batch_size}: give a smaller one, or --plan sinkhorn")
    data.template(args.dataset, args.template)
    if args.held_out is not None and not 0 < args.held_out < 1:
        raise ValueError(f"--held-out must lie between 0 and 1, got {args.held_out}")
    runs.check_free(args.output_dir, configuration(args), args.resume, args.overwrite)


def configuration(args):
    """The options that belong to a run, as result.json and last.pt have them."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}


# ---- set up --------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What belongs to a run."""
    args: argparse.Namespace
    rank: int
    world: int
    device: torch.device
    train_set: list                   # items: (path, label, class name)
    test_set: list
    published: bool | None            # whether the split file is CoOp's; None where a dataset has none
    preprocess: Callable              # CLIP's test transform
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    fingerprint: dict                 # configuration, pictures, classes and CLIP weights, as last.pt keeps them
    started: float
    lock: object = None               # the file that keeps other processes out of the folder; rank 0 has it
    log: list = field(default_factory=list)    # a dict for each epoch that is done

    @property
    def epochs_done(self):
        return len(self.log)

    @property
    def folder(self):
        return Path(self.args.output_dir)


def start_processes(args):
    """Joins the processes that torchrun started -> rank, world size, device; alone without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if world > 1 else device
        torch.cuda.set_device(device)                    # why: what names no GPU, result.json among it, means this one
    if world > 1:
        machine.end_with_parent()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=60))
    return rank, world, device


def set_up(args, rank, world, device):
    """Builds the run; restores it with --resume. Whatever can fail before the first step fails here."""
    started = time.time()
    config = configuration(args)
    train_set, val_set, test_set, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed,
                                                          args.sampler, args.held_out, args.classes)
    test_set = evaluate.choose(args.test_split, val_set, test_set)
    if args.dataset == "folder":
        data.check_pictures(train_set + test_set, rank, world)
    published = data.split_matches_published(args.dataset, args.data_root)
    clip_model, preprocess = clip.load(args.model, device, args.activation)
    torch.manual_seed(args.seed)                         # why: the same initial prompts on every process
    model = runs.make_model(clip_model, class_names, config, (rank, world))
    if args.classes == "base":
        runs.check_shared(model, "--classes base is for a test on new classes")
    if args.cache_features and not model.stream:
        raise ValueError(f"--cache-features: {args.method} learns prompts of the image tower, so that the features of "
                         "an image change with every step; leave the option out")
    optimizer, scaler = make_optimizer(model, args, device)
    fingerprint = {"config": config, "class_names": class_names, "clip_sha256": clip.weights_hash(clip_model),
                   "data": {part: runs.digest(items, args.data_root)
                            for part, items in (("training", train_set), ("test", test_set))},
                   "training": [runs.below(path, args.data_root) for path, *_ in train_set],
                   "threads": torch.get_num_threads()}
    if args.amp in machine.HALF:
        clip_model.store_matrices(machine.HALF[args.amp])
    run = Run(args, rank, world, device, train_set, test_set, published, preprocess, model, optimizer, scaler,
              fingerprint, started)
    if rank == 0:
        run.lock = runs.lock(run.folder)
        # why again: another process had the folder till now
        runs.check_free(run.folder, config, args.resume, args.overwrite)
    if args.resume and (run.folder / "last.pt").exists():
        resume(run)
    elif args.resume and rank == 0:
        print(f"nothing to resume in {run.folder}, which has no last.pt: the run starts anew")
    return run


def make_optimizer(model, args, device):
    """SGD on all that is learned, and the scaler of its loss in fp16."""
    learned = [p for p in model.parameters() if p.requires_grad]
    # why fused on a GPU: it skips a step of overflown gradients by itself; else the host would wait to know of them
    optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    # why: the fused one leaves the momentum as the memory happens to be where it skips the very first step
    for parameter in learned:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")


def resume(run):
    """Restores the run from last.pt.

    Raises ValueError where the run was started with other options, pictures, classes or CLIP weights.
    """
    checkpoint = runs.read_checkpoint(run.folder)
    changed = runs.changes(checkpoint["config"], run.fingerprint["config"])
    if changed:
        raise ValueError(f"{run.folder} was started with other options ({'; '.join(changed)}): python train.py "
                         f"--resume {run.folder} goes on with its own; --output-dir {runs.unused(run.folder)} without "
                         "--resume leaves it alone")
    runs.check_classes(run.folder, checkpoint["class_names"], run.fingerprint["class_names"])
    runs.check_data(run.folder, checkpoint["data"], run.fingerprint["data"])
    runs.restore(run.folder, checkpoint, run.model, run.fingerprint["clip_sha256"])
    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.optimizer.param_groups[0]["fused"] = run.device.type == "cuda"    # why: the device may be another one
        if checkpoint["scaler"]:                         # empty where the run had no need of one, say on CPU
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{run.folder}/last.pt is damaged: its optimizer state does not fit") from error
    run.log = checkpoint["log"]
    run.started -= checkpoint["seconds"]                 # why: the time before the interruption counts too
    if run.rank == 0:
        write_log(run)                                   # why: the file may be missing, too short or too long
        for name, then, now in (("precision", checkpoint["config"]["amp"], run.args.amp),
                                ("threads", checkpoint["threads"], torch.get_num_threads())):
            if then != now:
                print(f"note: {name} was {then}, is {now}: the last digits may differ")


def announce(run):
    """Prints what is trained on what, the configuration, and a note on a split file that is not the published one."""
    args, threads = run.args, torch.get_num_threads()
    print(f"{args.method}, model {args.model}, data {args.dataset}: {len(run.model.class_names)} classes, "
          f"{len(run.train_set)} training and {len(run.test_set)} {args.test_split} images; "
          f"{run.world} process{'es' * (run.world > 1)} on "
          f"{run.device.type}, {threads} thread{'s' * (threads > 1)}{' each' * (run.world > 1)}, "
          f"precision {machine.precision(args.amp)}, writing to {run.folder}")
    print("  ".join(f"{name}={value}" for name, value in sorted(run.fingerprint["config"].items())))
    for line in data.remarks(args.data_root) if args.dataset == "folder" else ():
        print(line)
    if run.published is False:
        print(f"note: the split file of {args.dataset} is not CoOp's published one: do not compare with published "
              "numbers")
    texts = run.model.encode.different_names()
    if texts < len(run.model.class_names):
        print(f"warning: {len(run.model.class_names)} class names are only {texts} different texts to this model "
              "(compared as embeddings): global prompts, and shared local ones, cannot tell such classes apart")


def make_loader(run):
    """The loader of the training images of all epochs to come, or of their features with --cache-features."""
    args = run.args
    batches = data.Batches(len(run.train_set), args.batch_size, args.seed, run.rank, run.world,
                           range(run.epochs_done, args.epochs))
    if args.cache_features:
        return CachedFeatures(run, batches)
    pictures = data.Pictures(run.train_set, data.train_transform(run.preprocess), args.seed, args.dataset == "folder")
    return data.train_loader(pictures, batches, args.workers, run.device)


class CachedFeatures:
    """Replaces the training loader: batches of cached features of the frozen image tower."""

    @torch.no_grad()
    def __init__(self, run, batches):
        pictures = data.Pictures(run.train_set, run.preprocess, own=run.args.dataset == "folder")
        tower = run.model.clip.visual
        loader = data.test_loader(pictures, evaluate.EVAL_BATCH, run.args.workers, run.device)
        n, P, W = len(pictures), len(tower.positional_embedding) - 1, len(tower.proj)
        # why reserved: autocast returns float32, which must not pile up, and joining batches would take it all twice
        dtype = machine.HALF.get(run.args.amp, torch.float32)
        self.cls, self.patches = (torch.empty(shape, dtype=dtype, device=run.device) for shape in ((n, W), (n, P, W)))
        self.batches, self.labels, done = batches, torch.empty(n, dtype=torch.int64, device=run.device), 0
        for images, labels in machine.progress(loader, "features", run.rank):
            with machine.autocast(run.args.amp, run.device):
                cls, patches = run.model.clip.encode_patches(images.to(run.device), run.model.stream)
            here = slice(done, done := done + len(images))
            self.cls[here], self.patches[here], self.labels[here] = cls, patches, labels
        if run.rank == 0:
            print(f"cached features: {self.patches.nbytes / 2**20:.0f} MiB for {len(pictures)} images; the paper's "
                  "random crops and flips are dropped", flush=True)

    def __iter__(self):
        for batch in self.batches:
            chosen = torch.tensor([i for _, i in batch], dtype=torch.int64, device=self.labels.device)
            yield (self.cls[chosen], self.patches[chosen]), self.labels[chosen]


# ---- the loop ------------------------------------------------------------------------------------------------

def learning_rate(epoch, args):
    """Linear warm-up, then cosine to 0.  Sec. 4

    epoch: a number with a fraction, in [0, epochs). why per step: a run of one epoch sees the whole schedule.
    """
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    done = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_epoch(run, network, batches, epoch):
    """One pass over the few-shot images, the next ones of an iterator -> the fields of its line in log.jsonl."""
    args, model, began, sums, skipped = run.args, run.model, time.time(), 0, 0
    draws = torch.Generator().manual_seed((args.seed * 100_003 + epoch) % 2**63)
    n_steps = math.ceil(len(run.train_set) / args.batch_size)
    network.train()
    for step, (images, labels) in zip(machine.progress(range(n_steps), f"epoch {epoch + 1}", run.rank), batches):
        run.optimizer.param_groups[0]["lr"] = learning_rate(epoch + (step + 0.5) / n_steps, args)
        n_batch = min(args.batch_size, len(run.train_set) - step * args.batch_size)   # images of this step, all ranks
        drawn = model.draw(n_batch, draws)               # why for all ranks: each takes the rows of its own images
        drawn = None if drawn is None else drawn[run.rank::run.world]
        images, labels, drawn = (to_device(part, run.device) for part in (images, labels, drawn))
        with machine.autocast(args.amp, run.device):
            outputs = network(images, drawn)
        loss, terms = model.loss(outputs, labels, n_batch)
        run.optimizer.zero_grad(set_to_none=True)
        # why times world: DDP averages gradients over the ranks, but the parts of the loss add up
        run.scaler.scale(loss * run.world).backward()
        if run.scaler.is_enabled():
            skipped = skipped + overflown(run.optimizer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        # why a sum on the device: the host need not wait for each step
        sums = sums + batch_sums(model, outputs, labels, {"loss": loss, **terms}, n_batch)
    return {**epoch_means(run, sums, ["loss", *(f"{term}_loss" for term in terms)]),
            **skipped_steps(run, skipped, n_steps, epoch), **diagnose(run, images, labels),
            "lr": run.optimizer.param_groups[0]["lr"], "seconds": round(time.time() - began, 2)}


def to_device(tensor, device):
    """A tensor on the device. None and cached features, which are there already, stay as they are."""
    return tensor.to(device, non_blocking=True) if torch.is_tensor(tensor) else tensor


@torch.no_grad()
def batch_sums(model, outputs, labels, losses, n_batch):
    """Sums over the images of a step: each loss, then how many images are right by the first score, then how many."""
    right = (next(iter(model.scores(outputs).values())).argmax(dim=1) == labels).sum()
    return torch.stack([*(loss.detach() * n_batch for loss in losses.values()), right, torch.ones_like(labels).sum()])


def overflown(optimizer):
    """1 where a gradient is not finite, so that the scaler will skip the step, else 0; on the device."""
    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    return 1 - torch.stack([gradient.isfinite().all() for gradient in gradients]).all().long()


def skipped_steps(run, skipped, n_steps, epoch):
    """How many steps of an epoch fp16 skipped, for the log. Raises ValueError where no step was made.

    why: the losses of such an epoch look like those of any other, but nothing was learned.
    """
    if not run.scaler.is_enabled():
        return {}
    skipped = int(skipped)
    if skipped == n_steps:
        raise ValueError(f"epoch {epoch + 1}: all {n_steps} steps were skipped, their gradients overflowed in fp16: "
                         "try --amp bf16 or --amp off; last.pt, if there is one, holds the epoch before")
    return {"skipped_steps": skipped}


def epoch_means(run, sums, names):
    """The sums of all steps and ranks as means over the images."""
    if run.world > 1:
        dist.all_reduce(sums)
    *losses, right, seen = sums.tolist()
    assert seen == len(run.train_set), f"the epoch trained on {seen:.0f} of {len(run.train_set)} images"
    return {**{name: loss / seen for name, loss in zip(names, losses)}, "train_accuracy": 100 * right / seen}


def diagnose(run, images, labels):
    """What the method says of the last batch after its step, as means over the images of all ranks: {name: number}."""
    if not hasattr(run.model, "diagnostics"):
        return {}
    with machine.autocast(run.args.amp, run.device):
        values = run.model.diagnostics(images, labels)                             # {name: (b,)}, this rank's images
    sums = torch.stack([torch.ones_like(labels, dtype=torch.float32), *values.values()]).sum(dim=1)
    if run.world > 1:
        dist.all_reduce(sums)
    seen, *sums = sums.tolist()
    return {name: total / seen for name, total in zip(values, sums)}


def finish_epoch(run, epoch, fields):
    """A line in the log and on the screen, then last.pt. Raises ValueError on a loss that is not a number."""
    fields = {"epoch": epoch + 1, **fields}
    losses = [name for name in fields if name.endswith("_loss")]
    terms = ", ".join(f"{name.removesuffix('_loss')} {fields[name]:.4f}" for name in losses)
    diagnosis = "".join(f"{name.replace('_', ' ')} {value:.3g}  " for name, value in fields.items()
                        if name not in ("epoch", "loss", "train_accuracy", "lr", "seconds", *losses))
    left = fields["seconds"] * (run.args.epochs - epoch - 1)
    print("epoch {epoch:3d}  loss {loss:.4f} ({terms})  train {train_accuracy:5.1f} %  {diagnosis}lr {lr:.2e}  "
          "{seconds:.1f} s  left {left:.0f} s".format(terms=terms, diagnosis=diagnosis, left=left, **fields),
          flush=True)
    if not math.isfinite(fields["loss"]):
        raise ValueError(f"epoch {epoch + 1}: loss {fields['loss']} ({terms}): try a smaller --lr, or --amp off; "
                         "last.pt, if there is one, holds the epoch before")
    run.log.append(fields)
    save_checkpoint(run)
    write_log(run)


def save_checkpoint(run):
    """last.pt: what was learned, what is needed to read it, and what --resume goes on with.

    why no random state and no schedule: both follow from the configuration and the epoch. Raises ValueError for learned
    tensors that are not finite; the last good last.pt stays. The first one of a run removes what an earlier run left.
    """
    learned = run.model.learned_state()
    clip.check_finite(learned, f"epoch {run.epochs_done}: training failed, try a smaller --lr, or --amp off")
    checkpoint = {"learned": learned, "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                  **run.fingerprint, "epoch": run.epochs_done, "seconds": time.time() - run.started, "log": run.log}
    machine.write_whole(run.folder / "last.pt", lambda path: torch.save(checkpoint, path))
    if run.epochs_done == 1:
        runs.remove(run.folder)


def write_log(run):
    """log.jsonl, whole, as last.pt has it."""
    machine.write_text(run.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))


# ---- report --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def plain_memory_error(model):
    """Says what takes the memory of a GPU, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError("out of GPU memory: the text tower encodes every prompt of "
                          f"{len(model.class_names)} classes in each step. --checkpoint-text --text-chunk 50 "
                          "helps, or more GPUs; a smaller batch does not, unless the image tower has learned prompts "
                          "too") from error


def report_finished(run):
    """Says that a resumed run has nothing left to do, and its result."""
    if run.rank == 0:
        print(f"{run.folder} is finished\n{evaluate.accuracies_line(runs.read_result(run.folder))}")
    if run.world > 1:
        dist.destroy_process_group()


@machine.plain_errors("--resume goes on after the last epoch that was finished")
def main(args):
    """A run from its options to its result: set up, train epoch by epoch, test once."""
    check_args(args, int(os.environ.get("WORLD_SIZE", 1)))
    rank, world, device = start_processes(args)
    run = set_up(args, rank, world, device)
    if run.epochs_done == args.epochs and (run.folder / "result.json").exists():
        return report_finished(run)
    if rank == 0:
        announce(run)
    network = DistributedDataParallel(run.model) if world > 1 else run.model
    batches = iter(make_loader(run))

    for epoch in range(run.epochs_done, args.epochs):
        with plain_memory_error(run.model):
            fields = train_epoch(run, network, batches, epoch)
        if rank == 0:
            finish_epoch(run, epoch, fields)
    del batches                                          # why: its workers end before those of the test start

    counts = evaluate.test(run.model, run.test_set, args.dataset, args.amp, args.workers, rank, world, args.template)
    if rank == 0:
        evaluate.report(run.folder, run.model, counts, run.fingerprint["config"], run.started,
                        train_images=len(run.train_set), split_matches_published=run.published, world_size=world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
