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

from harness.options import parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)    # why before the imports: --help and a wrong option need no torch

import argparse
import contextlib
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from harness import machine, places, runs
from harness.agreement import check_agreement, facts
from harness.configuration import check_args, configuration, unusual
from methods.zero_shot import ZeroShot
from sources import files, folders


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
    log: list = field(default_factory=list)    # a dict for each epoch that is done

    @property
    def epochs_done(self):
        return len(self.log)

    @property
    def folder(self):
        return Path(self.args.output_dir)


def set_up(args, rank, world, device):
    """Builds the run. Whatever can fail before the first step fails here, or in `begin`."""
    started = time.monotonic()
    config = configuration(args)
    train_set, val_set, test_set, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed,
                                                          args.sampler, args.held_out, args.classes)
    test_set = runs.choose(args.test_split, val_set, test_set)
    if data.DATASETS[args.dataset].as_people_see:
        data.check_pictures(train_set + test_set, rank, world)
    published = data.split_matches_published(args.dataset, args.data_root)
    clip_model, preprocess = clip.load(args.model, device, args.activation)
    torch.manual_seed(args.seed)                         # why: the same initial prompts on every process
    model = runs.make_model(clip_model, class_names, config, (rank, world))
    # why: names that are too long for the zero-shot row fail here
    ZeroShot(clip_model, class_names, data.template(args.dataset, args.template))
    if args.classes == "base":
        runs.check_shared(model, "--classes base is for a test on new classes")
    if args.cache_features and not model.frozen_tower:
        raise ValueError(f"--cache-features: {args.method} learns prompts of the image tower, so that the features of "
                         "an image change with every step; leave the option out")
    optimizer, scaler = make_optimizer(model, args, device)
    fingerprint = {"config": config, "class_names": class_names, "clip_sha256": clip.weights_hash(clip_model),
                   "data": {part: runs.digest(items, args.data_root)
                            for part, items in (("training", train_set), ("test", test_set))},
                   "training": [runs.relative_path(path, args.data_root) for path, *_ in train_set],
                   "threads": torch.get_num_threads()}
    if args.amp in machine.HALF:
        clip_model.store_matrices(machine.HALF[args.amp])
    return Run(args, rank, world, device, train_set, test_set, published, preprocess, model, optimizer,
               scaler, fingerprint, started)


def begin(run):
    """Restores the run with --resume. Raises ValueError where the processes would not train the same."""
    args = run.args
    if run.rank == 0:
        # why again: another process had the folder till now
        runs.check_free(run.folder, run.fingerprint["config"], args.resume, args.overwrite)
    if args.resume and (run.folder / "last.pt").exists():
        resume(run)
    else:
        if args.resume and run.rank == 0:
            print(f"nothing to resume in {run.folder}, which has no last.pt: the run starts anew")
        if args.start_from:
            start_from(run, args.start_from)
    if run.world > 1:
        check_agreement(facts(run.fingerprint, run.model.learned_state(), run.epochs_done))


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


def start_from(run, other):
    """Puts in what another run, a folder, has learned. Optimizer, schedule and log stay those of a new run.

    Raises ValueError where the other run has other classes, other CLIP weights or other learned tensors, and where
    it was trained on pictures of this run's test.
    """
    checkpoint = runs.read_checkpoint(other)
    runs.check_classes(other, checkpoint["class_names"], run.fingerprint["class_names"])
    runs.restore(other, checkpoint, run.model, run.fingerprint["clip_sha256"])
    if checkpoint["config"]["dataset"] != run.args.dataset:    # why: equal names then do not mean equal pictures
        return

    tested = {runs.relative_path(path, run.args.data_root) for path, *_ in run.test_set}
    seen = tested.intersection(checkpoint["training"])
    if seen:
        raise ValueError(f"--start-from {other}: it was trained on {len(seen)} of the {len(tested)} pictures of this "
                         f"test, such as {min(seen)}: give both runs the same --split-seed and --held-out")
    both = [*run.fingerprint["training"], *checkpoint["training"]]
    run.fingerprint["training"] = [*dict.fromkeys(both)]       # why: none of them may count in a later test


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
    run.fingerprint["training"] = checkpoint["training"]       # why: with the pictures of a run that it started from
    run.log = checkpoint["log"]
    run.started -= checkpoint["seconds"]                 # why: the time before the interruption counts too
    if run.rank == 0:
        write_log(run)                                   # why: the file may be missing, too short or too long
        for name, then, now in (("precision", checkpoint["config"]["amp"], run.args.amp),
                                ("threads", checkpoint["threads"], torch.get_num_threads())):
            if then != now:
                print(f"note: {name} was {then}, is {now}: the last digits may differ")


def announce(run):
    """Prints what is trained on what, the unusual options, and what is unusual about pictures and class names."""
    args, threads = run.args, torch.get_num_threads()
    print(f"{args.method}, model {args.model}, data {args.dataset}: {len(run.model.class_names)} classes, "
          f"{len(run.train_set)} training and {len(run.test_set)} {args.test_split} images; "
          f"{run.world} process{'es' * (run.world > 1)} on "
          f"{run.device.type}, {threads} thread{'s' * (threads > 1)}{' each' * (run.world > 1)}, "
          f"precision {machine.precision(args.amp)}, writing to {run.folder}")
    print("options: " + "".join(f"{name}={value}  " for name, value in unusual(args).items())
          + "all others have their defaults; result.json has them")
    if args.dataset == "folder":
        for line in (*folders.remarks(args.data_root), *files.twins({"train": run.train_set, "test": run.test_set})):
            print(line)
    if run.published is False:
        print(f"note: the split file of {args.dataset} is not CoOp's published one: do not compare with published "
              "numbers")
    warn_of_equal_names(run.model, args.model)


def warn_of_equal_names(model, model_name):
    """Prints a line about class names that are one text to the model, and one with the names of each such group."""
    groups = model.text_encoder.equal_names()
    if not groups:
        return
    n_classes = len(model.class_names)
    n_texts = n_classes - sum(len(group) - 1 for group in groups)
    knows = "; tiny knows 106 words, see clip/README.md" if model_name == "tiny" else ""
    print(f"warning: {n_classes} class names are only {n_texts} different texts to this model (compared as embeddings): "
          f"global prompts, and shared local ones, cannot tell such classes apart{knows}")
    for group in groups:
        more = f" and {len(group) - 10} more" if len(group) > 10 else ""
        print(f"  one text: {', '.join(group[:10])}{more}")


def make_loader(run):
    """The loader of the training images of all epochs to come, or of their features with --cache-features."""
    args = run.args
    batches = data.Batches(len(run.train_set), args.batch_size, args.seed, run.rank, run.world,
                           range(run.epochs_done, args.epochs))
    if args.cache_features:
        return CachedFeatures(run, batches)
    return data.train_batches(run.train_set, args.dataset, run.preprocess, batches, args.seed, args.workers,
                              run.device)


class CachedFeatures:
    """Replaces the training loader: batches of cached features of the frozen image tower.

    Of several processes each computes its share of the images, and then has those of all.
    """

    @torch.no_grad()
    def __init__(self, run, batches):
        tower = run.model.clip.visual
        loader = data.test_batches(run.train_set, run.args.dataset, tower.resolution, run.args.workers, run.device,
                                   run.rank, run.world)
        n = len(run.train_set)
        P = len(tower.positional_embedding) - 1
        W = len(tower.proj)
        # why reserved: autocast returns float32, which must not pile up, and joining batches would take it all twice
        dtype = machine.HALF.get(run.args.amp, torch.float32)
        self.cls = torch.empty(n, W, dtype=dtype, device=run.device)
        self.patches = torch.empty(n, P, W, dtype=dtype, device=run.device)
        self.labels = torch.tensor([label for _, label, _ in run.train_set], device=run.device)
        self.batches = batches

        start = run.rank
        for images, _ in machine.progress(loader, "features", run.rank):
            with machine.autocast(run.args.amp, run.device):
                cls, patches = run.model.features(images.to(run.device))
            stop = start + len(images) * run.world
            self.cls[start:stop:run.world] = cls
            self.patches[start:stop:run.world] = patches
            start = stop
        share_rows(self.cls, run.world)
        share_rows(self.patches, run.world)
        if run.rank == 0:
            print(f"cached features: {self.patches.nbytes / 2**20:.0f} MiB for {n} images; the paper's "
                  "random crops and flips are dropped", flush=True)

    def __iter__(self):
        for batch in self.batches:
            chosen = torch.tensor([i for _, i in batch], dtype=torch.int64)
            chosen = chosen.to(self.labels.device, non_blocking=True)
            yield (self.cls[chosen], self.patches[chosen]), self.labels[chosen]


def share_rows(tensor, world):
    """Process r has filled the rows r, r + world, ... of its tensor; afterwards every process has all rows."""
    for source in range(world if world > 1 else 0):
        rows = tensor[source::world].contiguous()
        dist.broadcast(rows.view(torch.uint8), source)   # why bytes: gloo does not know every type
        tensor[source::world] = rows


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
    args, model, began, sums, skipped = run.args, run.model, time.monotonic(), 0, 0
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
            "lr": run.optimizer.param_groups[0]["lr"], "seconds": round(time.monotonic() - began, 2)}


def to_device(tensor, device):
    """A tensor on the device. None and cached features, which are there already, stay as they are."""
    return tensor.to(device, non_blocking=True) if torch.is_tensor(tensor) else tensor


@torch.no_grad()
def batch_sums(model, outputs, labels, losses, n_batch):
    """Sums over the images of a step: each loss, then how many images are right, then how many."""
    n_correct = (model.logits(outputs).argmax(dim=1) == labels).sum()
    losses = [loss.detach() * n_batch for loss in losses.values()]
    return torch.stack([*losses, n_correct, torch.ones_like(labels).sum()])


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
    *losses, n_correct, n_images = sums.tolist()
    if n_images != len(run.train_set):
        raise RuntimeError(f"the epoch trained on {n_images:.0f} of {len(run.train_set)} images")
    means = {name: loss / n_images for name, loss in zip(names, losses)}
    return {**means, "train_accuracy": 100 * n_correct / n_images}


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
    """last.pt and the log, which has more, then a line on the screen. Raises ValueError on an infinite number."""
    fields = {"epoch": epoch + 1, **fields}
    losses = [name for name in fields if name.endswith("_loss")]
    terms = ", ".join(f"{name.removesuffix('_loss')} {fields[name]:.4f}" for name in losses)
    infinite = [f"{name} {value}" for name, value in fields.items() if not math.isfinite(value)]
    if infinite:
        raise ValueError(f"epoch {epoch + 1}: {', '.join(infinite)}: try a smaller --lr, or --amp off; last.pt, if "
                         "there is one, holds the epoch before")
    run.log.append(fields)
    save_checkpoint(run)
    write_log(run)

    # why last: what is printed is saved
    skipped = f"skipped steps {fields['skipped_steps']}  " if "skipped_steps" in fields else ""
    left = fields["seconds"] * (run.args.epochs - epoch - 1)
    print("epoch {epoch:3d}  loss {loss:.4f} ({terms})  train {train_accuracy:5.1f} %  {skipped}lr {lr:.2e}  "
          "{seconds:.1f} s  left {left:.0f} s".format(terms=terms, skipped=skipped, left=left, **fields), flush=True)


def save_checkpoint(run):
    """last.pt: what was learned, what is needed to read it, and what --resume goes on with.

    why no random state and no schedule: both follow from the configuration and the epoch. Raises ValueError for learned
    tensors that are not finite; the last good last.pt stays. The first one of a run removes what an earlier run left.
    """
    learned = run.model.learned_state()
    clip.check_finite(learned, f"epoch {run.epochs_done}: training failed, try a smaller --lr, or --amp off")
    checkpoint = {"learned": learned, "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                  **run.fingerprint, "epoch": run.epochs_done, "seconds": time.monotonic() - run.started,
                  "log": run.log}
    replaced = run.epochs_done == 1 and runs.holds_run(run.folder)
    machine.write_whole(run.folder / "last.pt", lambda path: torch.save(checkpoint, path))
    if replaced:
        places.remove(run.folder)


def write_log(run):
    """log.jsonl, whole, as last.pt has it."""
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in run.log]
    machine.write_text(run.folder / "log.jsonl", "".join(lines))


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


def how_to_go_on(args):
    """The command that goes on with an interrupted run."""
    if not (Path(args.output_dir) / "last.pt").exists():
        return "no epoch was finished; the same command starts anew"
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = "python" if processes == "1" else f"torchrun --nproc_per_node={processes}"
    return f"{start} train.py --resume {shlex.quote(args.output_dir)} goes on after the last epoch that was finished"


def main(args):
    """A run from its options to its result; errors and interruptions end it with one line."""
    with machine.plain_errors(partial(how_to_go_on, args)):
        train(args)


def train(args):
    """Set up, train epoch by epoch, test once."""
    _, world = machine.rank_and_world()
    check_args(args, world)
    rank, world, device = machine.start_processes(args)
    run = set_up(args, rank, world, device)
    with places.lock(run.folder) if rank == 0 else contextlib.nullcontext():
        begin(run)
        if run.epochs_done < args.epochs or not (run.folder / "result.json").exists():
            train_and_test(run)
        elif rank == 0:
            print(f"{run.folder} is finished\n{evaluate.accuracies_line(runs.read_result(run.folder))}")
    if world > 1:
        dist.destroy_process_group()


def train_and_test(run):
    """All epochs that are left, then the test and its report."""
    args = run.args
    rank = run.rank
    world = run.world
    if rank == 0:
        announce(run)
    # why not for the test: it would be compiled again, for other shapes
    network = torch.compile(run.model) if args.compile else run.model
    network = DistributedDataParallel(network) if world > 1 else network
    batches = iter(make_loader(run))

    for epoch in range(run.epochs_done, args.epochs):
        with plain_memory_error(run.model):
            fields = train_epoch(run, network, batches, epoch)
        run.model.after_epoch(epoch + 1, args.epochs)
        if rank == 0:
            finish_epoch(run, epoch, fields)
    del batches                                          # why: its workers end before those of the test start

    counts = evaluate.test(run.model, run.test_set, args.dataset, args.amp, args.workers, rank, world, args.template)
    if rank == 0:
        evaluate.report(run.folder, run.model, counts, run.fingerprint["config"], run.started,
                        train_images=len(run.train_set), data=run.fingerprint["data"],
                        split_matches_published=run.published, world_size=world)


if __name__ == "__main__":
    main(ARGS)
