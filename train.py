"""Trains SOT-GLP (arXiv 2603.08347 v1) on a few images per class, on one process or on several.

    python train.py                                                   the embedded default: tiny CLIP, drawn critters
    python train.py --dataset eurosat --data-root DIR                 one GPU (or CPU), CLIP ViT-B/16
    torchrun --nproc_per_node=4 train.py --dataset eurosat            four GPUs, the same result
    python train.py --dataset eurosat --resume                        go on after an interruption

The same global batches, crops and prompt draws are made whatever the number of processes: each draw is seeded by
(seed, epoch, image) or (seed, epoch), so there is no random state to carry and the world size changes nothing.
Read it from `main` down: set up, train epoch by epoch, test once.
"""

import argparse
import json
import math
import os
import platform
import time
from datetime import timedelta
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from sotglp import draw_prompts, fuse, objective

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv=None):
    """The options. Defaults are those of Sec. 4, the same for every data set and model.

    What depends on other options or on the machine is filled in here, so that the configuration saved is complete.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=sorted(data.DATASETS), default="critters", help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the data sets' folders ($DATA_ROOT, else ./data)")
    add("--model", help="%s or a weights file (tiny for critters, else ViT-B/16)" % ", ".join(clip.available_models()))
    add("--shots", type=int, default=16, help="training images per class; the paper has 1, 2, 4, 8, 16 (%(default)s)")
    add("--seed", type=int, default=1, help="initial prompts, order and crops; the paper averages 3 (%(default)s)")
    add("--split-seed", type=int, default=1, help="draws the shots: fixed in the paper, 1-3 in CoOp (%(default)s)")
    add("--sampler", choices=("exact", "proportional"), default="exact",
        help="exact: the same number per class; proportional: as the released code, by class frequency (%(default)s)")
    add("--epochs", type=int, default=50, help="all epochs, warm-up included (%(default)s)")
    add("--warmup-epochs", type=float, default=5,
        help="linear warm-up, never more than a tenth of the epochs (%(default)s)")
    add("--batch-size", type=int, default=32, help="global batch, split over the processes (%(default)s)")
    add("--lr", type=float, default=0.05, help="peak learning rate of SGD (%(default)s)")
    add("--weight-decay", type=float, default=0.01, help="on prompts and projection alike (%(default)s)")
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
        help="share of the global prompts each training image does without; at 0 they stay alike (%(default)s)")
    add("--no-local-projection", action="store_true", help="keep the identity: -0.9 accuracy, better OOD in the paper")
    add("--no-vv", action="store_true", help="ordinary patch tokens in place of the V-V stream (Table 2)")
    add("--shared-local", action="store_true", help="one set of local prompts for all classes (Table 2)")
    add("--no-plan-gradient", action="store_true", help="hold the transport plan constant, as the released code")
    add("--amp", choices=("off", "fp16", "bf16"), help="mixed precision (fp16 on CUDA, off on CPU; bf16 also on CPU)")
    add("--device", default=evaluate.default_device(),
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

    args.model = args.model or evaluate.default_model(args.dataset)
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


def learning_rate(progress, args):
    """Linear warm-up, then cosine to 0.  Sec. 4

    progress: epochs done, with its fraction, in [0, epochs). why: per step, so that one-epoch runs see all of it.
    """
    if progress < args.warmup_epochs:
        return args.lr * progress / args.warmup_epochs
    done = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_epoch(model, loader, optimizer, scaler, args, epoch, rank, world):
    """One pass over the few-shot images -> means over all of them: losses, training accuracy, last learning rate."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, device=device)          # why: summed on the device, so that no step waits for the host
    draws = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    model.train()
    for step, (images, labels) in enumerate(evaluate.progress(loader, f"epoch {epoch + 1}", rank)):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch + (step + 0.5) / len(loader), args)
        n_batch = min(args.batch_size, len(loader.dataset) - step * args.batch_size)   # images of this step, all ranks
        kept = draw_prompts(n_batch, args.n_global, args.prompt_dropout, draws)[rank::world]
        if torch.is_tensor(images):                      # else cached features, on the device already
            images = images.to(device, non_blocking=True)
        labels, kept = labels.to(device, non_blocking=True), kept.to(device, non_blocking=True)
        with autocast(args):
            g, l = model(images, kept)
        # why: DDP averages gradients over ranks. A rank's share of the images, times world, turns that into the mean
        # over images on uneven shards too; an empty shard adds a zero that touches every learned parameter.
        share = len(labels) * world / n_batch
        loss = share * objective(g, l, labels, args.lambda_local) if len(labels) else 0 * (g + l).sum()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums += batch_sums(g.detach(), l.detach(), labels, args.lambda_local)
    if world > 1:
        dist.all_reduce(sums)
    global_loss, local_loss, right, seen = sums.tolist()
    assert seen == len(loader.dataset), f"epoch {epoch} trained on {seen:.0f} of {len(loader.dataset)} images"
    return {"loss": (global_loss + args.lambda_local * local_loss) / seen, "global_loss": global_loss / seen,
            "local_loss": local_loss / seen, "train_accuracy": 100 * right / seen,
            "lr": optimizer.param_groups[0]["lr"]}


def batch_sums(g, l, labels, lambda_local):
    """Sums over a batch: global and local cross-entropy, images that the fused score gets right, images."""
    right = (fuse(g, l, lambda_local).argmax(dim=1) == labels).sum()
    return torch.stack([F.cross_entropy(g, labels, reduction="sum"), F.cross_entropy(l, labels, reduction="sum"),
                        right, torch.ones_like(labels).sum()])


def autocast(args):
    """Mixed precision for the towers; similarities, transport and losses opt out of it by themselves."""
    return torch.autocast(torch.device(args.device).type, dtype=HALF.get(args.amp), enabled=args.amp in HALF)


class CachedFeatures:
    """Stands in for the training loader: batches of what the frozen image tower makes of the few-shot images."""

    @torch.no_grad()
    def __init__(self, model, pictures, batches, args, device):
        self.dataset, self.batches = pictures, batches
        features, labels = [], []
        loader = data.test_loader(pictures, evaluate.EVAL_BATCH, args.workers, device)
        for images, batch_labels in evaluate.progress(loader, "features", batches.rank):
            with autocast(args):
                features.append(model.clip.encode_patches(images.to(device), model.stream))
            labels.append(batch_labels)
        dtype = HALF.get(args.amp, torch.float32)
        self.cls, self.patches = (torch.cat(part).to(dtype) for part in zip(*features))   # (N, W), (N, P, W)
        self.labels = torch.cat(labels).to(device)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            chosen = torch.tensor([i for _, i in batch], dtype=torch.int64, device=self.labels.device)
            yield (self.cls[chosen], self.patches[chosen]), self.labels[chosen]


def save_checkpoint(path, model, optimizer, scaler, fields):
    """last.pt: what was learned, what is needed to read it, and what --resume goes on with.

    why: neither random state nor schedule is in it, since both follow from the configuration and the epoch.
    """
    checkpoint = {"learned": model.learned_state(), "optimizer": optimizer.state_dict(),
                  "scaler": scaler.state_dict(), **fields}
    evaluate.write_whole(path, lambda temporary: torch.save(checkpoint, temporary))


def resume(run, fields, model, optimizer, scaler):
    """Puts a run's last.pt into model, optimizer and scaler -> epochs done, seconds spent.

    Raises ValueError where the run was started with other options, classes or CLIP weights.
    """
    checkpoint = evaluate.read_run(run)
    changed = evaluate.changes(checkpoint["config"], fields["config"])
    if changed:
        raise ValueError(f"{run} was started with other options ({'; '.join(changed)}): give the same ones, or "
                         "another --output-dir without --resume")
    evaluate.check_classes(run, checkpoint["class_names"], fields["class_names"])
    evaluate.restore(run, checkpoint, model, fields["clip_sha256"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:                             # empty where the run had no need of one, say on CPU
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"], checkpoint["seconds"]


def test(model, test_set, preprocess, args, rank, world):
    """Scores the test split once, each image on one process -> counts of `evaluate.accuracy` over all of them."""
    loader = data.test_loader(data.Pictures(test_set, preprocess), evaluate.EVAL_BATCH, args.workers, args.device,
                              rank, world)
    with autocast(args):
        text = evaluate.zero_shot_text(model.clip, model.class_names, data.template(args.dataset))
        correct, seen = evaluate.accuracy(model, evaluate.progress(loader, "test", rank), args.lambda_local, text)
    if world > 1:
        dist.all_reduce(correct)
        dist.all_reduce(seen)
    assert seen.sum() == len(test_set), f"tested {seen.sum()} of {len(test_set)} images"
    return correct, seen


def versions():
    """What the numbers of a run may depend on besides its configuration."""
    gpu = torch.cuda.is_available()
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "cuda": torch.version.cuda if gpu else None,
            "gpu": torch.cuda.get_device_name() if gpu else None}


def main(args):
    """A run from its options to its result: set up, train epoch by epoch, test once."""
    start = time.time()
    rank, world, device = start_processes(args)
    say = print if rank == 0 else (lambda *_, **__: None)
    config = {name: value for name, value in vars(args).items() if name != "resume"}
    run = Path(args.output_dir)

    with evaluate.plain_errors(rank):
        check_args(args, world)
        train_set, _, test_set, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed,
                                                        args.sampler)
        published = data.split_matches_published(args.dataset, args.data_root)
        clip_model, preprocess = clip.load(args.model, device)
        torch.manual_seed(args.seed)                     # why: the same initial prompts on every process
        model = evaluate.make_model(clip_model, class_names, config)
        model.ranks = (rank, world)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.lr, momentum=0.9,
                                    weight_decay=args.weight_decay)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        saved = {"config": config, "class_names": class_names, "clip_sha256": clip.weights_hash(clip_model)}
        if args.amp in HALF:
            clip_model.store_matrices(HALF[args.amp])
        first, before = resume(run, saved, model, optimizer, scaler) if args.resume else (0, 0.0)
        run.mkdir(parents=True, exist_ok=True)

    threads = torch.get_num_threads()
    say(f"model {args.model}, data {args.dataset}: {len(class_names)} classes, {len(train_set)} training and "
        f"{len(test_set)} test images; {world} process{'es' * (world > 1)} on {device.type}, {threads} "
        f"thread{'s' * (threads > 1)}{' each' * (world > 1)}, writing to {run}")
    say("  ".join(f"{name}={value}" for name, value in sorted(config.items())))
    if published is False:
        say(f"note: the split file of {args.dataset} is not CoOp's published one: no comparison with published numbers")

    network = DistributedDataParallel(model) if world > 1 else model
    batches = data.Batches(len(train_set), args.batch_size, args.seed, rank, world)
    if args.cache_features:
        loader = CachedFeatures(model, data.Pictures(train_set, preprocess), batches, args, device)
        say(f"cached features: {loader.patches.nbytes / 2**20:.0f} MiB for {len(train_set)} images; "
            "the paper's random crops and flips are dropped")
    else:
        pictures = data.Pictures(train_set, data.train_transform(preprocess), args.seed)
        loader = data.train_loader(pictures, batches, args.workers, device)
    log = run / "log.jsonl"
    if rank == 0:                                        # an interrupted epoch may stand in the log, but is done again
        for name in () if args.resume else ("last.pt", "result.json", "per_class.csv", "evaluation.json"):
            (run / name).unlink(missing_ok=True)         # why: what an earlier run left here is not this run's
        done = log.read_text().splitlines()[:first] if first else []
        evaluate.write_whole(log, lambda temporary: temporary.write_text("".join(line + "\n" for line in done)))

    for epoch in range(first, args.epochs):
        began, batches.epoch = time.time(), epoch
        fields = train_epoch(network, loader, optimizer, scaler, args, epoch, rank, world)
        if rank == 0:
            seconds = time.time() - began
            spent = before + time.time() - start
            row_error = (model.plan.sum(-1) * args.n_support - 1).abs().max().item()   # how far Sinkhorn's rows are off
            log_epoch(log, {"epoch": epoch + 1, **fields, "row_error": row_error, "seconds": round(seconds, 2)},
                      left=seconds * (args.epochs - epoch - 1))
            save_checkpoint(run / "last.pt", model, optimizer, scaler, {**saved, "epoch": epoch + 1, "seconds": spent})

    correct, seen = test(model, test_set, preprocess, args, rank, world)
    if rank == 0:
        evaluate.write_per_class(run / "per_class.csv", class_names, correct, seen)
        report(run, {**evaluate.percentages(correct, seen), "test_images": int(seen.sum()),
                     "train_images": len(train_set), "split_matches_published": published, "world_size": world,
                     "threads": threads, "seconds": round(before + time.time() - start, 1)}, config)
    if world > 1:
        dist.destroy_process_group()


def report(run, figures, config):
    """result.json, and its gist on screen: the figures, what identifies the run, configuration and versions."""
    named = {name: config[name] for name in ("dataset", "model", "shots", "seed", "split_seed")}
    evaluate.write_json(run / "result.json", {**figures, **named, "config": config, "versions": versions()})
    print(f"{evaluate.accuracies_line(figures)}, {figures['seconds']:.0f} s\n"
          f"wrote {run}/result.json, per_class.csv, log.jsonl, last.pt")


def log_epoch(path, fields, left):
    """One JSON line on disk, one line on screen. Raises RuntimeError on a loss that is no number."""
    with open(path, "a") as file:
        file.write(json.dumps(fields) + "\n")
    print("epoch {epoch:3d}  loss {loss:.4f} (global {global_loss:.4f}, local {local_loss:.4f})  "
          "train {train_accuracy:5.1f} %  lr {lr:.2e}  {seconds:.1f} s".format(**fields) + f"  left {left:.0f} s",
          flush=True)
    if not math.isfinite(fields["loss"]):
        raise RuntimeError(f"epoch {fields['epoch']}: loss {fields['loss']} (global {fields['global_loss']}, local "
                           f"{fields['local_loss']}): try a smaller --lr, or --amp off; last.pt, if it is there, "
                           "holds the epoch before")


if __name__ == "__main__":
    main(parse_args())
