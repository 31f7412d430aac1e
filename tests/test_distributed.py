"""Processes that share the text work give the values and gradients of one that does it alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from conftest import random_clip
from sotglp import SOTGLP, draw_prompts, objective

NAMES = ["cat", "annual crop land", "dog", "sea or lake", "a rather long name of a class"]


def make_model(n_classes, **options):
    torch.manual_seed(1)
    return SOTGLP(random_clip(), NAMES[:n_classes], n_support=5, **options).train()


def batch(n_images, n_classes):
    torch.manual_seed(2)
    return torch.randn(n_images, 3, 32, 32), torch.arange(n_images) % n_classes, draw_prompts(n_images, 4, 0.75)


def learned_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_rank(rank, world, n_images, n_classes, folder):
    """A training step of one of several processes, as train.py does it; leaves its gradients in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = make_model(n_classes, ranks=(rank, world), text_chunk=1)
    images, labels, kept = (part[rank::world] for part in batch(n_images, n_classes))
    network = DistributedDataParallel(model)
    g, l = network(images, kept)
    loss = objective(g, l, labels) * (len(labels) * world / n_images) if len(labels) else 0 * (g + l).sum()
    loss.backward()
    texts = [text.detach() for text in model.encode_prompts()]
    torch.save((learned_gradients(model), loss.item(), texts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world, n_images, n_classes", [(2, 3, 5), (3, 4, 5), (3, 2, 2)],
                         ids=["classes and images do not divide", "three processes", "one has neither class nor image"])
def test_shared_text_work_changes_neither_values_nor_gradients(world, n_images, n_classes, tmp_path):
    model = make_model(n_classes)
    images, labels, kept = batch(n_images, n_classes)
    loss = objective(*model(images, kept), labels)
    loss.backward()
    mp.spawn(one_rank, (world, n_images, n_classes, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    assert sum(rank[1] for rank in ranks) / world == pytest.approx(loss.item(), rel=1e-5)
    for gradients, _, texts in ranks:
        for text, expected in zip(texts, model.encode_prompts()):
            torch.testing.assert_close(text, expected.detach(), atol=1e-5, rtol=1e-5)
        for name, expected in learned_gradients(model).items():
            torch.testing.assert_close(gradients[name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [dict(text_chunk=1), dict(text_chunk=2), dict(text_chunk=2, checkpoint_text=True)])
def test_chunks_and_checkpoints_change_neither_values_nor_gradients(options):
    whole, parts = make_model(5), make_model(5, **options)
    images, labels, kept = batch(3, 5)
    for model in (whole, parts):
        objective(*model(images, kept), labels).backward()
    for name, expected in learned_gradients(whole).items():
        torch.testing.assert_close(learned_gradients(parts)[name], expected, atol=1e-6, rtol=1e-3)


def test_names_of_any_length_meet_their_own_eot():
    # each class alone gives what it gives among longer and shorter ones
    together = make_model(5).encode_prompts()[0]
    for i, name in enumerate(NAMES):
        alone = SOTGLP(random_clip(), [name], n_support=5).encode_prompts()[0]
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)
