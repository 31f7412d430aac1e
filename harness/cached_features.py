"""--cache-features: the frozen image tower runs once over the training images, and its features are kept."""

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed as dist

import data
from harness import machine


class CachedFeatures:
    """Replaces the training loader: batches of cached features of the frozen image tower.

    Of several processes each computes its share of the images, and then has those of all.
    """

    @torch.no_grad()
    def __init__(self, run, batches):
        tower = run.model.clip.visual
        loader = data.test_batches(run.train_set, run.args.dataset, tower.resolution, run.args.workers,
                                   run.device, run.rank, run.world)
        n = len(run.train_set)
        P = len(tower.positional_embedding) - 1
        W = len(tower.proj)
        # why reserved: autocast returns float32, and batches that are joined in the end need memory twice
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
    """Gives every process all rows of a tensor, of which process r has filled the rows r, r + world, ..."""
    if world == 1:
        return
    for source in range(world):
        rows = tensor[source::world].contiguous()
        dist.broadcast(rows.view(torch.uint8), source)   # why bytes: gloo does not know every type
        tensor[source::world] = rows
