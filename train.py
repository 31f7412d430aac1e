"""Trains SOT-GLP (arXiv 2603.08347 v1) on a few images per class, on one process or on several.

    python train.py                                                   the embedded default: tiny CLIP, drawn critters
    python train.py --dataset eurosat --data-root DIR                 one GPU (or CPU), CLIP ViT-B/16
    torchrun --nproc_per_node=4 train.py --dataset eurosat            four GPUs, the same result
    python train.py --dataset eurosat --resume                        go on after an interruption

The number of processes changes nothing: the global batches, the crops and the prompt draws are the same. Each draw has
a seed of its own, made of (seed, epoch, image) or (seed, epoch), so there is no random state to save and to restore.
Read it from `main`: set up, train epoch by epoch, test once.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import runs
from sotglp import SOTGLP


# ---- options -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options. Defaults are those of Sec. 4, the same for every data set and model.

    Defaults that depend on other options or on the machine are filled in here, so that the saved configuration is
    complete.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, recipe = parser.add_argument, SOTGLP.DEFAULTS
    add("--dataset", choices=sorted(data.DATASETS), default="critters", help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the data sets' folders ($DATA_ROOT, else ./data)")
    add("--model", help="%s or a weights file (tiny for critters, else ViT-B/16)" % ", ".join(clip.available_models()))
    add("--shots", type=int, default=16, help="training images per class; the paper has 1, 2, 4, 8, 16 (%(default)s)")
    add("--seed", type=int, default=1, help="initial prompts, order and crops; the paper averages 3 (%(default)s)")
    add("--split-seed", type=int, default=1, help="draws the shots: fixed in the paper, 1-3 in CoOp (%(default)s)")
    add("--sampler", choices=("exact", "proportional"), default="exact",
        help="exact: the same number per class; proportional: as the released code, by class frequency (%(default)s)")
    add("--epochs", type=int, default=recipe["epochs"], help="all epochs, warm-up included (%(default)s)")
    add("--warmup-epochs", type=float, default=recipe["warmup_epochs"],
        help="linear warm-up, never more than a tenth of the epochs (%(default)s)")
    add("--batch-size", type=int, default=recipe["batch_size"],
        help="global batch, split over the processes (%(default)s)")
    add("--lr", type=float, default=recipe["lr"], help="peak learning rate of SGD (%(default)s)")
    add("--weight-decay", type=float, default=recipe["weight_decay"],
        help="acts on prompts and projection alike (%(default)s)")
    add("--n-global", type=int, default=4, help="global prompts, shared by all classes (%(default)s)")
    add("--n-local", type=int, default=4, help="local prompts per class (%(default)s)")
    add("--n-support", type=int, default=10,
        help="K, patches kept per class; the paper finds 5-20 about equal, 1 and 100 worse (%(default)s)")
    add("--epsilon", type=float, default=0.1,
        help="entropy weight of Eq. 9; smaller is sharper and needs more --n-iters (%(default)s)")
    add("--n-iters", type=int, default=20,
        help="Sinkhorn iterations; log.jsonl has the row error they leave (%(default)s)")
    add("--lambda-local", type=float, default=0.25, help="weight of the local branch in loss and fusion (%(default)s)")
    add("--prompt-dropout", type=float, default=0.75,
        help="share of the global prompts that each training image drops; with 0 they stay alike (%(default)s)")
    add("--no-local-projection", action="store_true", help="keep the identity; in the paper -0.9 accuracy, better OOD")
    add("--no-vv", action="store_true", help="ordinary patch tokens in place of the V-V stream (Table 2)")
    add("--shared-local", action="store_true", help="one set of local prompts for all classes (Table 2)")
    add("--no-plan-gradient", action="store_true", help="hold the transport plan constant, as the released code")
    add("--amp", choices=("off", "fp16", "bf16"), help="mixed precision (fp16 on CUDA, off on CPU; bf16 also on CPU)")
    add("--device", default=runs.default_device(),
        help="cpu or cuda; with torchrun each process takes its own GPU (%(default)s)")
    add("--workers", type=int, help="processes that read pictures, per process (up to 8 on CUDA, 0 on CPU)")
    add("--cache-features", action="store_true",
        help="compute image features once and keep them: far faster, but without the paper's augmentation")
    add("--text-chunk", type=int, default=200, help="classes that go through the text tower at once (%(default)s)")
    add("--checkpoint-text", action="store_true",
        help="recompute text activations, chunk by chunk, in the backward pass: less memory, more time")
    add("--output-dir", help="where the run is written (runs/<dataset>-<shots>shot-seed<seed>)")
    add("--resume", action="store_true", help="go on from last.pt in the output folder")
    args = parser.parse_args(argv)

    args.model = args.model or runs.default_model(args.dataset)
    on_cuda = args.device.startswith("cuda")
    args.amp = args.amp or ("fp16" if on_cuda else "off")
    args.data_root = args.data_root or data.default_root()
    args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    args.output_dir = args.output_dir or f"runs/{args.dataset}-{args.shots}shot-seed{args.seed}"
    if args.workers is None:
        args.workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if on_cuda else 0
    return args


def check_args(args, world):
    """Raises ValueError for options that cannot work together, before any long work starts."""
    if args.batch_size < world:
        raise ValueError(f"--batch-size {args.batch_size} leaves some of the {world} processes without images: "
                         f"it is the global batch, give at least {world}")
    if args.amp == "fp16" and not args.device.startswith("cuda"):
        raise ValueError("--amp fp16 needs a GPU (on CPU it is many times slower than float32): use bf16 or off")
    for name in ("epochs", "n_global", "n_local", "n_support", "n_iters", "shots", "text_chunk"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.epsilon <= 0 or not 0 <= args.prompt_dropout <= 1:
        raise ValueError(f"--epsilon must be positive and --prompt-dropout lie in [0, 1], "
                         f"got {args.epsilon} and {args.prompt_dropout}")


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
    published: bool | None            # whether the split file is CoOp's; None where a data set has none
    preprocess: Callable              # CLIP's test transform
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: dict                    # configuration, classes and CLIP weights, as last.pt keeps them
    started: float
    epochs_done: int = 0

    @property
    def folder(self):
        return Path(self.args.output_dir)


def start_processes(args):
    """Joins the processes that torchrun started -> rank, world size, device; alone without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=60))
    return rank, world, device


def set_up(args, rank, world, device):
    """Everything that can fail before the first step -> the run, at its start or where --resume goes on."""
    started, config = time.time(), {name: value for name, value in vars(args).items() if name != "resume"}
    check_args(args, world)
    train_set, _, test_set, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed,
                                                    args.sampler)
    published = data.split_matches_published(args.dataset, args.data_root)
    clip_model, preprocess = clip.load(args.model, device)
    torch.manual_seed(args.seed)                         # why: the same initial prompts on every process
    model = runs.make_model(clip_model, class_names, config, (rank, world))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    identity = {"config": config, "class_names": class_names, "clip_sha256": clip.weights_hash(clip_model)}
    if args.amp in runs.HALF:
        clip_model.store_matrices(runs.HALF[args.amp])
    run = Run(args, rank, world, device, train_set, test_set, published, preprocess, model, optimizer, scaler, identity,
              started)
    if args.resume:
        resume(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def resume(run):
    """Puts what stands in last.pt into the run.

    Raises ValueError where the run was started with other options, classes or CLIP weights.
    """
    checkpoint = runs.read_checkpoint(run.folder)
    changed = runs.changes(checkpoint["config"], run.identity["config"])
    if changed:
        raise ValueError(f"{run.folder} was started with other options ({'; '.join(changed)}): give the same ones, or "
                         "another --output-dir without --resume")
    runs.check_classes(run.folder, checkpoint["class_names"], run.identity["class_names"])
    runs.restore(run.folder, checkpoint, run.model, run.identity["clip_sha256"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:                             # empty where the run had no need of one, say on CPU
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.epochs_done = checkpoint["epoch"]
    run.started -= checkpoint["seconds"]                 # why: the time before the interruption counts too


def announce(run):
    """Prints what is trained on what, the configuration, and a note on a split file that is not the published one."""
    args, threads = run.args, torch.get_num_threads()
    print(f"model {args.model}, data {args.dataset}: {len(run.model.class_names)} classes, {len(run.train_set)} "
          f"training and {len(run.test_set)} test images; {run.world} process{'es' * (run.world > 1)} on "
          f"{run.device.type}, {threads} thread{'s' * (threads > 1)}{' each' * (run.world > 1)}, "
          f"precision {runs.precision(args.amp)}, writing to {run.folder}")
    print("  ".join(f"{name}={value}" for name, value in sorted(run.identity["config"].items())))
    if run.published is False:
        print(f"note: the split file of {args.dataset} is not CoOp's published one: do not compare with published "
              "numbers")


def clear_folder(run):
    """Leaves nothing of an earlier run in the folder; of a resumed run's log the epochs that are done."""
    if not run.args.resume:
        for name in ("last.pt", "result.json", "per_class.csv", "evaluation.json", "evaluation.csv"):
            (run.folder / name).unlink(missing_ok=True)
    # why not the whole log: the line of an interrupted epoch may stand there, but that epoch is done again
    done = runs.read_log(run.folder)[:run.epochs_done] if run.epochs_done else []
    runs.write_whole(run.folder / "log.jsonl",
                     lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in done)))


def make_loader(run):
    """The loader of training images, or of their features with --cache-features."""
    args = run.args
    batches = data.Batches(len(run.train_set), args.batch_size, args.seed, run.rank, run.world)
    if args.cache_features:
        return CachedFeatures(run, batches)
    pictures = data.Pictures(run.train_set, data.train_transform(run.preprocess), args.seed)
    return data.train_loader(pictures, batches, args.workers, run.device)


class CachedFeatures:
    """Takes the place of the training loader: batches of what the frozen image tower makes of the few-shot images."""

    @torch.no_grad()
    def __init__(self, run, batches):
        self.batch_sampler, features, labels = batches, [], []
        pictures = data.Pictures(run.train_set, run.preprocess)
        loader = data.test_loader(pictures, evaluate.EVAL_BATCH, run.args.workers, run.device)
        for images, batch_labels in runs.progress(loader, "features", run.rank):
            with runs.autocast(run.args.amp, run.device):
                features.append(run.model.clip.encode_patches(images.to(run.device), run.model.stream))
            labels.append(batch_labels)
        dtype = runs.HALF.get(run.args.amp, torch.float32)
        self.cls, self.patches = (torch.cat(part).to(dtype) for part in zip(*features))   # (N, W), (N, P, W)
        self.labels = torch.cat(labels).to(run.device)
        if run.rank == 0:
            print(f"cached features: {self.patches.nbytes / 2**20:.0f} MiB for {len(pictures)} images; the paper's "
                  "random crops and flips are dropped", flush=True)

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for batch in self.batch_sampler:
            chosen = torch.tensor([i for _, i in batch], dtype=torch.int64, device=self.labels.device)
            yield (self.cls[chosen], self.patches[chosen]), self.labels[chosen]


# ---- the loop ------------------------------------------------------------------------------------------------

def learning_rate(progress, args):
    """Linear warm-up, then cosine to 0.  Sec. 4

    progress: epochs done, with its fraction, in [0, epochs). why per step: a run of one epoch sees the whole schedule.
    """
    if progress < args.warmup_epochs:
        return args.lr * progress / args.warmup_epochs
    done = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_epoch(run, network, loader, epoch):
    """One pass over the few-shot images -> the fields of its line in log.jsonl."""
    args, model, began, sums = run.args, run.model, time.time(), 0
    draws = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    loader.batch_sampler.epoch = epoch
    network.train()
    for step, (images, labels) in enumerate(runs.progress(loader, f"epoch {epoch + 1}", run.rank)):
        run.optimizer.param_groups[0]["lr"] = learning_rate(epoch + (step + 0.5) / len(loader), args)
        n_batch = min(args.batch_size, len(run.train_set) - step * args.batch_size)   # images of this step, all ranks
        drawn = model.draw(n_batch, draws)               # why for all ranks: each takes the rows of its own images
        images, labels, drawn = to_device(images, run), to_device(labels, run), to_device(drawn, run, share=True)
        with runs.autocast(args.amp, run.device):
            outputs = network(images, drawn)
        loss, terms = model.loss(outputs, labels, n_batch)
        run.optimizer.zero_grad(set_to_none=True)
        # why times world: DDP averages gradients over the ranks, but the parts of the loss add up
        run.scaler.scale(loss * run.world).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        # why a sum on the device: no step waits for the host
        sums = sums + batch_sums(model, outputs, labels, {"loss": loss, **terms}, n_batch)
    return {**epoch_means(run, sums, ["loss", *(f"{term}_loss" for term in terms)]),
            "lr": run.optimizer.param_groups[0]["lr"], "seconds": round(time.time() - began, 2)}


def to_device(tensors, run, share=False):
    """A tensor on the run's device, of a share only this rank's rows; None and cached features stay as they are."""
    if not torch.is_tensor(tensors):
        return tensors
    return (tensors[run.rank::run.world] if share else tensors).to(run.device, non_blocking=True)


@torch.no_grad()
def batch_sums(model, outputs, labels, losses, n_batch):
    """Sums over the images of a step: each loss, then how many images are right by the first score, then how many."""
    right = (next(iter(model.scores(outputs).values())).argmax(dim=1) == labels).sum()
    return torch.stack([*(loss.detach() * n_batch for loss in losses.values()), right, torch.ones_like(labels).sum()])


def epoch_means(run, sums, names):
    """The sums of all steps and ranks as means over the images, and the largest row error of all plans."""
    row_error = run.model.row_error.to(run.device)
    run.model.row_error = torch.zeros([])
    if run.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(row_error, dist.ReduceOp.MAX)
    *losses, right, seen = sums.tolist()
    assert seen == len(run.train_set), f"the epoch trained on {seen:.0f} of {len(run.train_set)} images"
    return {**{name: loss / seen for name, loss in zip(names, losses)}, "train_accuracy": 100 * right / seen,
            "row_error": row_error.item()}


def finish_epoch(run, epoch, fields):
    """A line in the log and on the screen, then last.pt. Raises RuntimeError on a loss that is not a number."""
    fields = {"epoch": epoch + 1, **fields}
    with open(run.folder / "log.jsonl", "a") as file:
        file.write(json.dumps(fields) + "\n")
    terms = ", ".join(f"{name.removesuffix('_loss')} {value:.4f}" for name, value in fields.items()
                      if name.endswith("_loss"))
    left = fields["seconds"] * (run.args.epochs - epoch - 1)
    print("epoch {epoch:3d}  loss {loss:.4f} ({terms})  train {train_accuracy:5.1f} %  lr {lr:.2e}  {seconds:.1f} s  "
          "left {left:.0f} s".format(terms=terms, left=left, **fields), flush=True)
    if not math.isfinite(fields["loss"]):
        raise RuntimeError(f"epoch {epoch + 1}: loss {fields['loss']} ({terms}): try a smaller --lr, or --amp off; "
                           "last.pt, if there is one, holds the epoch before")
    save_checkpoint(run, epoch + 1)


def save_checkpoint(run, epochs_done):
    """last.pt: what was learned, what is needed to read it, and what --resume goes on with.

    why no random state and no schedule: both follow from the configuration and the epoch.
    """
    checkpoint = {"learned": run.model.learned_state(), "optimizer": run.optimizer.state_dict(),
                  "scaler": run.scaler.state_dict(), **run.identity, "epoch": epochs_done,
                  "seconds": time.time() - run.started}
    runs.write_whole(run.folder / "last.pt", lambda path: torch.save(checkpoint, path))


# ---- report --------------------------------------------------------------------------------------------------

def report(run, counts):
    """result.json and per_class.csv, and on the screen the accuracies."""
    config = run.identity["config"]
    figures = {**evaluate.percentages(counts), "test_images": int(counts.seen.sum()),
               "train_images": len(run.train_set), "split_matches_published": run.published, "world_size": run.world,
               "threads": torch.get_num_threads(), "precision": runs.precision(run.args.amp),
               "seconds": round(time.time() - run.started, 1)}
    named = {name: config[name] for name in ("dataset", "model", "shots", "seed", "split_seed")}
    evaluate.write_per_class(run.folder / "per_class.csv", run.model.class_names, counts)
    runs.write_json(run.folder / "result.json", {**figures, **named, "config": config, "versions": runs.versions()})
    print(f"{evaluate.accuracies_line(figures)}, {figures['seconds']:.0f} s\n"
          f"wrote {run.folder}/result.json, per_class.csv, log.jsonl, last.pt")


def main(args):
    """A run from its options to its result: set up, train epoch by epoch, test once."""
    rank, world, device = start_processes(args)
    with runs.plain_errors(rank):
        run = set_up(args, rank, world, device)
    if rank == 0:
        announce(run)
        clear_folder(run)
    network = DistributedDataParallel(run.model) if world > 1 else run.model
    loader = make_loader(run)

    for epoch in range(run.epochs_done, args.epochs):
        fields = train_epoch(run, network, loader, epoch)
        if rank == 0:
            finish_epoch(run, epoch, fields)

    counts = evaluate.test(run.model, run.test_set, args.dataset, args.amp, args.workers, rank, world)
    if rank == 0:
        report(run, counts)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
