"""All that two processes must show, in one pair of them. torchrun starts it; test_distributed.py reads what it leaves.

    torchrun --standalone --nproc_per_node=2 tests/two_ranks.py FOLDER ADDRESS MISSING [options of train.py]

Rank r leaves FOLDER/r.pt. ADDRESS and MISSING are files on a server: one that is there and one that is not.
"""

import os
import socket
import sys

import torch.distributed as dist

from conftest import random_clip  # first: it puts the project on the path

import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from harness.cached_features import share_rows  # noqa: E402
from clip import loader  # noqa: E402
from methods import METHODS  # noqa: E402
from methods.promptot import transport_loss  # noqa: E402
from sotglp import SOTGLP, draw_prompts, objective, unit  # noqa: E402

# Names of 2, 1, 1, 3 and 7 tokens. Sorted by length they stand in the order 1, 2, 0, 3, 4: not its own inverse.
NAMES = ["sea lake", "cat", "dog", "annual crop land", "a rather long name of a class"]
# Of a batch of 3 images rank 0 has two; a small epsilon leaves row errors that are more than rounding.
CACHED = ("--cache-features", "--epochs", "1", "--batch-size", "3", "--epsilon", "0.01")
SMALL = {"sotglp": {"n_support": 5}, "gallop": {"top_k": (1, 2, 3, 4)},       # 16 patches
         "proda": {"n_global": 5, "n_context": 3, "n_drawn": 2}, "lsn": {"n_context": 3, "n_negative": 2},
         "plotpp": {"n_image_prompts": 2}}
TRAINED = [name for name in METHODS if name not in ("independent", "dense")]    # these two share as SOT-GLP does
CASES = {"classes and images do not divide": (3, 5), "rank 1 has neither class nor image": (1, 1)}   # images, classes


def make_model(n_classes, **options):
    """The model of a case, the same on every process."""
    torch.manual_seed(1)
    return SOTGLP(random_clip(), NAMES[:n_classes], n_support=5, **options).train()


def batch(n_images, n_classes):
    torch.manual_seed(2)
    return torch.randn(n_images, 3, 32, 32), torch.arange(n_images) % n_classes, draw_prompts(n_images, 4, 0.75)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def share_of_a_step(n_images, n_classes, rank, world):
    """A training step as train.py does it -> gradients, this rank's loss, text features."""
    model = make_model(n_classes, ranks=(rank, world), text_chunk=1)
    images, labels, kept = (part[rank::world] for part in batch(n_images, n_classes))
    network = DistributedDataParallel(model)     # kept until after the backward pass, or it would average nothing
    g, l = network(images, kept)
    loss = objective(g, l, labels) * (len(labels) * world / n_images) if len(labels) else 0 * (g + l).sum()
    loss.backward()
    return gradients(model), loss.item(), [text.detach() for text in model.encode_prompts()]


def make_method(name, **options):
    """A method on all NAMES, the same on every process."""
    torch.manual_seed(1)
    return METHODS[name](random_clip(), NAMES, **SMALL.get(name, {}), **options).train()


def step_of_a_method(name, n_images, rank, world):
    """A training step of a method as train.py does it -> gradients, the sum over the ranks of the parts of the loss."""
    model = make_method(name, ranks=(rank, world))
    images, labels, _ = batch(n_images, len(NAMES))
    drawn = model.draw(n_images, torch.Generator().manual_seed(3))
    network = DistributedDataParallel(model) if world > 1 else model
    outputs = network(images[rank::world], None if drawn is None else drawn[rank::world])
    loss, _ = model.loss(outputs, labels[rank::world], n_images)
    (loss * world).backward()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    return gradients(model), loss.item()


def transport_of_three(rank, world):
    """Prompt-OT's loss of three made-up images of one class -> this rank's part, its gradients by image and by text.

    Each image is most like the frozen one of another rank, so that a plan made by each rank alone would be wrong.
    """
    torch.manual_seed(4)
    frozen, text, frozen_text = (unit(torch.randn(n, 8)) for n in (3, 2, 2))
    image, text, labels = frozen.roll(1, 0)[rank::world].requires_grad_(), text.requires_grad_(), torch.zeros(3).long()
    loss = transport_loss(image, text, frozen[rank::world], frozen_text, labels[rank::world], n_batch=3,
                          ranks=(rank, world))
    return loss.item(), *torch.autograd.grad(loss, (image, text))


def few_pictures(rank, world, device="cpu"):
    """A test of one picture: a process is left without any -> {score: right answers by class}, pictures by class."""
    torch.manual_seed(1)
    model = SOTGLP(random_clip().to(device), NAMES, n_support=5, ranks=(rank, world))
    _, _, items, _ = data.load("critters", "", 1, 1)
    counts = evaluate.test(model, items[:1], "critters", rank=rank, world=world)
    return {name: numbers.tolist() for name, numbers in counts.n_correct.items()}, counts.n_images.tolist()


def filled_rows(rank, world):
    """Tensors of 3 rows and of 1, of which each process fills its own with their numbers -> all rows."""
    tensors = []
    for n in (3, 1):
        tensor = torch.zeros(n, 2, dtype=torch.bfloat16)
        tensor[rank::world] = torch.arange(n)[rank::world, None].to(tensor)
        share_rows(tensor, world)
        tensors.append(tensor)
    return tensors


def fetched(address):
    """What a rank gets from the loader: the path of the file, or its error in words."""
    try:
        return str(loader.download(address))
    except ConnectionError as error:
        return f"failed: {error}"


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def main(folder, address, missing, *options):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    seen = {name: share_of_a_step(*case, rank, world) for name, case in CASES.items()}
    seen |= {f"{name}, {n}": step_of_a_method(name, n, rank, world) for name in TRAINED for n in (3, 1)}
    seen |= {"few": few_pictures(rank, world), "rows": filled_rows(rank, world)}
    seen |= {"transport": transport_of_three(rank, world)}
    seen |= {"there": fetched(address), "missing": fetched(missing), "threads": torch.get_num_threads()}
    torch.save(seen, f"{folder}/{rank}.pt")
    port = [free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()

    train.main(train.parse_args([*options, "--output-dir", f"{folder}/run"]))
    # why another store: in torchrun's a rank would find where the other one listened in the run before
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port[0])}
    train.main(train.parse_args([*options, *CACHED, "--output-dir", f"{folder}/cached"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
