"""Trains SOT-GLP (arXiv 2603.08347 v1), or a method compared with it, on a few images per class.

    python train.py                                             the embedded default: tiny CLIP, drawings
    python train.py --dataset eurosat --data-root DIR           one GPU (or CPU), CLIP ViT-B/16
    torchrun --nproc_per_node=4 train.py --dataset eurosat      four GPUs, the same batches
    python train.py --method coop                               another method; its --help lists its options
    python train.py --resume runs/eurosat-16shot-seed1          go on after an interruption

The number of processes changes only the order in which numbers are summed: the global batches, the crops and
the prompt draws are the same. Each draw has its own seed, made of (seed, epoch, image) or (seed, epoch), so
no random state has to be saved. Read it from `main`: set up, train epoch by epoch, test once.
"""

from harness.options import parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)   # why before the imports: --help and a wrong option need no torch

import argparse
import contextlib
import math
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
from harness import machine, places, processes, results, run_pictures, runs
from harness.agreement import check_agreement, facts_of, together
from harness.cached_features import CachedFeatures
from harness.checkpoints import is_done, resume, save_checkpoint, start_from, write_log
from harness.configuration import check_args, configuration, goes_on
from harness.messages import announce, how_to_go_on, plain_memory_error
from methods.zero_shot import ZeroShot
from sources import reading


# ---- set up ------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """One run on one process: options, pictures, model, optimizer and log."""
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
    fingerprint: dict               # configuration, pictures, classes and CLIP weights, as last.pt keeps them
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

    # the pictures
    train_set, val_set, test_set, class_names = data.load(
        args.dataset, args.data_root, args.shots, args.split_seed, args.sampler, args.held_out, args.classes)
    test_set = run_pictures.choose(args.test_split, val_set, test_set)
    if data.DATASETS[args.dataset].as_people_see:
        reading.check_pictures(train_set + test_set, rank, world)
    published = data.split_matches_published(args.dataset, args.data_root)

    # CLIP and what is learned. why a seed here: the same initial prompts on every process
    clip_model, preprocess = clip.load(args.model, device, args.activation)
    torch.manual_seed(args.seed)
    model = runs.make_model(clip_model, class_names, config, (rank, world))
    check_model(model, args)
    optimizer, scaler = make_optimizer(model, args, device)

    # what the run was made from
    digests = {"training": run_pictures.digest(train_set, args.data_root),
               "test": run_pictures.digest(test_set, args.data_root)}
    fingerprint = {"config": config, "class_names": class_names, "clip_sha256": clip.weights_hash(clip_model),
                   "data": digests, "threads": torch.get_num_threads(),
                   "training": [run_pictures.relative_path(path, args.data_root) for path, *_ in train_set]}
    machine.store_matrices(clip_model, args.amp)
    return Run(args, rank, world, device, train_set, test_set, published, preprocess, model, optimizer,
               scaler, fingerprint, started)


def check_model(model, args):
    """Raises ValueError for options that do not go with a method, and names too long for the test."""
    ZeroShot(model.clip, model.class_names, data.template(args.dataset, args.template))
    if args.classes == "base":
        runs.check_shared(model, "--classes base is for a test on new classes")
    if args.cache_features and not model.frozen_tower:
        raise ValueError(f"--cache-features: {args.method} learns prompts of the image tower, so that the "
                         "features of an image change with every step; leave the option out")


def begin(run):
    """Restores the run with --resume. Raises ValueError where the processes would not train the same."""
    args = run.args
    if run.rank == 0:
        # why again: another process may have had the folder until now
        places.check_free(run.folder, run.fingerprint["config"], args.resume, args.overwrite)
    if goes_on(args):
        resume(run)
    else:
        if args.resume and run.rank == 0:
            print(f"nothing to resume in {run.folder}, which has no last.pt: the run starts anew")
        if args.start_from:
            start_from(run, args.start_from)
    if run.world > 1:
        check_agreement(facts_of(run))


def make_optimizer(model, args, device):
    """SGD on all that is learned, and the scaler of its loss in fp16."""
    learned = [p for p in model.parameters() if p.requires_grad]
    # why fused on a GPU: it skips a step of overflowed gradients by itself, without a word to the host
    optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    # why: where the fused optimizer skips its first step, it leaves the momentum uninitialised
    for parameter in learned:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")


def make_loader(run):
    """The loader of the training images of all epochs to come, or of their features with --cache-features."""
    args = run.args
    batches = data.Batches(len(run.train_set), args.batch_size, args.seed, run.rank, run.world,
                           range(run.epochs_done, args.epochs))
    if args.cache_features:
        return CachedFeatures(run, batches)
    return data.train_batches(run.train_set, args.dataset, run.preprocess, batches, args.seed, args.workers,
                              run.device)


# ---- the loop ----------------------------------------------------------------------------------------------

def learning_rate(epoch, args):
    """Linear warm-up, then cosine to 0.  Sec. 4

    epoch: a number with a fraction, in [0, epochs). why per step: a run of one epoch sees the whole schedule.
    differs: Sec. 4 does not say that the warm-up is linear, where the cosine ends, or how often it changes.
    """
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    done = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_epoch(run, network, batches, epoch):
    """One pass over the few-shot images -> the fields of its line in log.jsonl.

    batches: an iterator of which this epoch takes the next ones.
    """
    args = run.args
    model = run.model
    began = time.monotonic()
    sums = 0
    skipped = 0
    draws = torch.Generator().manual_seed((args.seed * 100_003 + epoch) % 2**63)
    n_steps = math.ceil(len(run.train_set) / args.batch_size)
    network.train()
    steps = machine.progress(range(n_steps), f"epoch {epoch + 1}", run.rank)

    for step, (images, labels) in zip(steps, batches):
        run.optimizer.param_groups[0]["lr"] = learning_rate(epoch + (step + 0.5) / n_steps, args)

        # the random choices of the method. why for the images of all ranks: each takes the rows of its own
        n_batch = min(args.batch_size, len(run.train_set) - step * args.batch_size)
        drawn = model.draw(n_batch, draws)
        if drawn is not None:
            drawn = drawn[run.rank::run.world]

        # forward: the towers in mixed precision, the loss in float32
        images, labels, drawn = (to_device(part, run.device) for part in (images, labels, drawn))
        with machine.autocast(args.amp, run.device):
            outputs = network(images, drawn)
        loss, terms = model.loss(outputs, labels, n_batch)

        # backward. why times world: DDP averages gradients over the ranks, but the parts of the loss add up
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss * run.world).backward()
        if run.scaler.is_enabled():
            skipped = skipped + overflowed(run.optimizer)
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # what the log gets. why a sum on the device: the host need not wait for each step
        sums = sums + batch_sums(model, outputs, labels, {"loss": loss, **terms}, n_batch)

    names = ["loss", *(f"{term}_loss" for term in terms)]
    return {**epoch_means(run, sums, names), **skipped_steps(run, skipped, n_steps, epoch),
            **diagnose(run, images, labels), "lr": run.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - began, 2)}


def to_device(tensor, device):
    """A tensor on the device. None and cached features, which are there already, stay as they are."""
    return tensor.to(device, non_blocking=True) if torch.is_tensor(tensor) else tensor


@torch.no_grad()
def batch_sums(model, outputs, labels, losses, n_batch):
    """Sums over the images of a step: each loss, the number of right predictions, the number of images."""
    n_correct = (model.logits(outputs).argmax(dim=1) == labels).sum()
    losses = [loss.detach() * n_batch for loss in losses.values()]
    return torch.stack([*losses, n_correct, torch.ones_like(labels).sum()])


def overflowed(optimizer):
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
        raise ValueError(f"epoch {epoch + 1}: all {n_steps} steps were skipped, their gradients overflowed "
                         "in fp16: try --amp bf16 or --amp off; last.pt, if there is one, holds the epoch "
                         "before")
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
    """What the method says of the last batch, as means over the images of all ranks: {name: number}."""
    if not hasattr(run.model, "diagnostics"):
        return {}
    with machine.autocast(run.args.amp, run.device):
        values = run.model.diagnostics(images, labels)                      # {name: (b,)}, this rank's images
    sums = torch.stack([torch.ones_like(labels, dtype=torch.float32), *values.values()]).sum(dim=1)
    if run.world > 1:
        dist.all_reduce(sums)
    seen, *sums = sums.tolist()
    return {name: total / seen for name, total in zip(values, sums)}


def finish_epoch(run, epoch, fields):
    """last.pt, the log, then a line on the screen. Raises ValueError for a number that is not finite."""
    fields = {"epoch": epoch + 1, **fields}
    losses = [name for name in fields if name.endswith("_loss")]
    terms = ", ".join(f"{name.removesuffix('_loss')} {fields[name]:.4f}" for name in losses)
    infinite = [f"{name} {value}" for name, value in fields.items() if not math.isfinite(value)]
    if infinite:
        raise ValueError(f"epoch {epoch + 1}: {', '.join(infinite)}: try a smaller --lr, or --amp off; "
                         "last.pt, if there is one, holds the epoch before")
    run.log.append(fields)
    save_checkpoint(run)
    write_log(run)

    # why last: what is printed is saved
    skipped = f"skipped steps {fields['skipped_steps']}  " if "skipped_steps" in fields else ""
    left = fields["seconds"] * (run.args.epochs - epoch - 1)
    line = ("epoch {epoch:3d}  loss {loss:.4f} ({terms})  train {train_accuracy:5.1f} %  {skipped}"
            "lr {lr:.2e}  {seconds:.1f} s  left {left:.0f} s")
    print(line.format(terms=terms, skipped=skipped, left=left, **fields), flush=True)


# ---- the run from its options to its result ----------------------------------------------------------------

def main(args):
    """A run from its options to its result; errors and interruptions end it with one line."""
    with machine.plain_errors(partial(how_to_go_on, args)):
        train(args)


def train(args):
    """Set up, train epoch by epoch, test once."""
    _, world = processes.rank_and_world()
    check_args(args, world)
    with together():
        rank, world, device = machine.start_processes(args)
        run = set_up(args, rank, world, device)
        with places.lock(run.folder) if rank == 0 else contextlib.nullcontext():
            begin(run)
            if not is_done(run):
                train_and_test(run)
            elif rank == 0:
                print(f"{run.folder} is finished\n{results.accuracies_line(runs.read_result(run.folder))}")


def train_and_test(run):
    """All epochs that are left, then the test and its report."""
    args = run.args
    if run.rank == 0:
        announce(run)

    # the model as the steps call it; the test takes it uncompiled, or each of its shapes would be compiled
    network = machine.compiled(run.model) if args.compile else run.model
    network = DistributedDataParallel(network) if run.world > 1 else network
    batches = iter(make_loader(run))

    # train epoch by epoch
    for epoch in range(run.epochs_done, args.epochs):
        with plain_memory_error(run.model):
            fields = train_epoch(run, network, batches, epoch)
        run.model.after_epoch(epoch + 1, args.epochs)
        if run.rank == 0:
            finish_epoch(run, epoch, fields)
    del batches                                          # why: its workers end before those of the test start

    # test once
    counts = evaluate.test(run.model, run.test_set, args.dataset, args.amp, args.workers, run.rank, run.world,
                           args.template)
    if run.rank == 0:
        results.report(run.folder, run.model, counts, run.fingerprint["config"], run.started,
                       train_images=len(run.train_set), data=run.fingerprint["data"],
                       split_matches_published=run.published, world_size=run.world)


if __name__ == "__main__":
    main(ARGS)
