"""What extras/bench.py measures: ViT-B/16 with random weights, and steps forward and backward."""

import clip  # before torch: it bounds how long torch's threads wait

import torch

from extras.plain_forms import plain_forward
from sotglp import draw_prompts, objective

NAMES = ["annual crop land", "forest", "herbaceous vegetation land", "highway or road",
         "industrial buildings", "pasture land", "permanent crop land", "residential buildings", "river",
         "sea or lake"]


def names_of(n_classes):
    """Ten names, or 10, 100, ... times as many made of them."""
    if n_classes == len(NAMES):
        return NAMES
    return [f"{name} {i}" for name in NAMES for i in range(n_classes // len(NAMES))]


def vit_b16(device):
    """CLIP ViT-B/16 with random weights of a trained model's size."""
    model = clip.CLIP(512, 224, 16, 768, 12, 77, 49408, 512, 12)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            p.data = torch.ones_like(p)
        else:
            p.data = 0.02 * torch.randn(p.shape, generator=generator)
    model.logit_scale.data.fill_(4.6)
    return model.to(device)


def batch(n_images, n_classes, device):
    """Images (B, 3, 224, 224), the global prompts that each keeps, labels (B,)."""
    images = torch.randn(n_images, 3, 224, 224)
    kept = draw_prompts(n_images, 4, 0.75)
    labels = torch.arange(n_images) % n_classes
    return [part.to(device) for part in (images, kept, labels)]


def step(model, images, kept, labels):
    """A step of SOT-GLP. It takes features in place of images as well."""
    objective(*model(images, kept), labels).backward()


def plain_step(model, images, kept, labels):
    """The same step in its plain form."""
    objective(*plain_forward(model, images, kept), labels).backward()


def prompted_step(model, images, kept, labels):
    """A step of Prompt-OT. Its gradients go through both towers. The first one computes the frozen texts."""
    model.loss(model(images), labels, len(labels))[0].backward()


def backward(texts):
    """Backward through the text tower alone."""
    sum(text.square().sum() for text in texts).backward()


def check_same_numbers(model, images):
    """Raises AssertionError where the plain form gives other logits. why: the race would then be void."""
    everything = torch.arange(4, device=images.device).expand(len(images), -1)        # no prompt dropout
    with torch.no_grad():
        logits = model.eval()(images)
    for ours, plain in zip(logits, plain_forward(model, images, everything)):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)
    model.train()
