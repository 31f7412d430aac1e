"""GalLoP, "Learning Global and Local Prompts for Vision-Language Models" (Lafon et al., arXiv 2407.01400).

Global prompts see the image feature, local prompts its patches; all classes share both kinds. The local score
of a prompt is the mean over the patches that resemble it most, and each prompt has a number of patches of its
own.

Against SOT-GLP, which started from it: local prompts shared by the classes, not L per class; each prompt
chooses its patches alone, where SOT-GLP keeps one support for all prompts and divides it among them by
transport; patches come from the value path of the last block, not from a V-V stream. The map on patch
features is the same.

Letters: those of sotglp.py.  B images   C classes   P patches   G global, L local prompts   D joint width
"""

if __name__ == "__main__":
    raise SystemExit("methods/gallop.py is no command: python train.py --method gallop")

import torch
import torch.nn.functional as F
from torch import nn

from clip.precision import in_float32
from clip.prompts import TEMPLATE
from sotglp import (Method, cross_entropy, draw_prompts, global_logits, mean_cosines, patch_similarity,
                    project)


@in_float32
def top_k_mean(similarity, top_k=(5, 10, 15, 20)):
    """The mean of the k largest similarities over the patches, k being each prompt's own.

    similarity (B, C, P, L) -> (B, C, L). top_k: L numbers, or one for all prompts; each is at most P. Raises
    ValueError for another count of numbers, and for numbers below 1.
    """
    P, L = similarity.shape[-2:]
    counts = [top_k] * L if isinstance(top_k, int) else list(top_k)
    if len(counts) != L or min(counts) < 1:
        raise ValueError(f"--top-k takes one number, at least 1, for each of the {L} local prompts, "
                         f"got {counts}")
    counts = [min(k, P) for k in counts]
    largest = similarity.topk(max(counts), dim=-2).values                     # (B, C, k, L), in falling order
    return torch.stack([largest[:, :, :k, l].mean(dim=-1) for l, k in enumerate(counts)], dim=-1)


@in_float32
def local_logits(patches, text, scale, top_k):
    """Each prompt's local score, times 1/tau: unit (B, P, D), (C, L, D) -> (B, C, L)."""
    return scale * top_k_mean(patch_similarity(patches, text), top_k)


@in_float32
def objective(global_logits, local_logits, labels, n_batch=None):
    """Cross-entropy of the global logits + the mean over the local prompts of the cross-entropy of each.

    (B, C) of the prompt that each image kept, (B, C, L), (B,) -> scalar, the mean over n_batch images.
    """
    return cross_entropy(global_logits, labels, n_batch) + local_cross_entropy(local_logits, labels, n_batch)


@in_float32
def local_cross_entropy(local_logits, labels, n_batch=None):
    """The mean over the local prompts of the cross-entropy of each: (B, C, L), (B,) -> scalar."""
    L = local_logits.shape[-1]
    labels = labels[:, None].expand(-1, L)                                         # (B, L)
    return F.cross_entropy(local_logits, labels, reduction="sum") / (n_batch or len(labels)) / L


@in_float32
def fuse(global_logits, local_logits):
    """Half the global score + half the mean local score: (B, C), (B, C, L) -> (B, C)."""
    return (global_logits + local_logits.mean(dim=-1)) / 2


class GalLoP(Method):
    """Shared global and local prompts, and the learned map on patch features.

    top_k: how many patches each local prompt keeps, n_local numbers. prompt_dropout: the share of the global
    prompts that each training image drops. Raises ValueError for a class name that is too long, and as
    `top_k_mean`.
    """

    # differs: GalLoP trains ImageNet for 50 epochs in batches of 128, SUN397 in batches of 128 and EuroSAT of
    # 10.
    DEFAULTS = {"lr": 0.002, "epochs": 200, "warmup_epochs": 0, "batch_size": 32, "weight_decay": 0.01}
    stream = "value"
    text_names = ("global", "local")

    def __init__(self, clip_model, class_names, n_global=4, n_local=4, top_k=(5, 10, 15, 20),
                 prompt_dropout=0.75, local_projection=True, **text_options):
        super().__init__(clip_model, class_names, **text_options)
        self.top_k, self.prompt_dropout = top_k, prompt_dropout
        top_k_mean(torch.zeros(1, 1, 1, n_local), top_k)   # why here: what cannot work fails before training
        template = self.word_vectors(TEMPLATE)                                     # (M, W)
        self.text_encoder.check_names(len(template))
        # all start alike: what each image drops, and the different top_k, make them differ
        self.global_prompts = nn.Parameter(template.repeat(n_global, 1, 1))        # (G, M, W)
        self.local_prompts = nn.Parameter(template.repeat(n_local, 1, 1))          # (L, M, W)
        width = clip_model.visual.proj.shape[0]
        self.local_projection = nn.Parameter(torch.eye(width), requires_grad=local_projection)   # (W, W)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """Global and local prompts with the names of all classes -> unit (C, G, D), (C, L, D)."""
        prompts = torch.cat([self.global_prompts, self.local_prompts])
        return self.encode(prompts).split([len(self.global_prompts), len(self.local_prompts)], dim=1)

    def encode_images(self, images):
        """Pictures or features -> unit image features (B, D), patches behind the learned map (B, P, D)."""
        cls, patches = self.features(images)                                         # (B, W), (B, P, W)
        proj = self.clip.visual.proj
        return project(cls, proj), project(patches, proj, self.local_projection)

    def draw(self, n_images, generator=None):
        """Which global prompts each image keeps in a training step: one of 4 by default, (n_images, k)."""
        return draw_prompts(n_images, len(self.global_prompts), self.prompt_dropout, generator)

    def forward(self, features, drawn=None, text_features=None):
        """Pictures or features -> global logits (B, C) of the prompts kept, local logits (B, C, L)."""
        image, patches = self.encode_images(features)
        global_text, local_text = self.encode_prompts() if text_features is None else text_features
        return (global_logits(image, global_text, self.scale, drawn),
                local_logits(patches, local_text, self.scale, self.top_k))

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of a batch of n_batch images, and of its global term."""
        global_logits, local_logits = outputs
        global_loss = cross_entropy(global_logits, labels, n_batch)
        local_loss = local_cross_entropy(local_logits, labels, n_batch)
        return global_loss + local_loss, {"global": global_loss.detach(), "local": local_loss.detach()}

    def logits(self, outputs):
        """The fused score: (B, C)."""
        return fuse(*outputs)

    def scores(self, outputs):
        """The fused score, which decides, and those of each branch: {name: (B, C)}."""
        return {"fused": fuse(*outputs), "global": outputs[0], "local": outputs[1].mean(dim=-1)}

    def cosines(self, features, text_features):
        """Raw cosines of images and of patches with each class, averaged over prompts: (B, C), (B, P, C)."""
        image, patches = self.encode_images(features)                              # (B, D), (B, P, D)
        global_text, local_text = text_features
        return mean_cosines(image, global_text), mean_cosines(patches, local_text)
