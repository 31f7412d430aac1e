"""Prompt-OT, "An Optimal Transport Regularization Paradigm" (arXiv 2503.08906), in one file.

Prompts are learned in many blocks of both towers (IVLP). Beside the cross-entropy, transport keeps the
prompted CLIP near the frozen one: in each batch the pairs (image feature, text feature of its class) of the
one are transported to those of the other, and what this costs is a second term of the loss. With
lambda_transport = 0 it is plain IVLP.

Against SOT-GLP: the same tool as a regulariser, not as a matcher. SOT-GLP transports the patches of one image
to the prompts of one class, which gives a score. Here the images of a batch are transported, and only in
training; the score is CoOp's. No patches, one prompt per class, no map on features.

differs: the published scripts keep every epoch and test epoch 31 of 40, where the rate is still a sixth of
its peak. Here the last epoch is tested, as for every method. They train in half precision without scaling of
the loss.

Letters: those of sotglp.py.  B images, b of them on this process   C classes   n prompt tokens
         J blocks with prompts   D joint width   W tower width   frozen_...: of CLIP without learned prompts
"""

if __name__ == "__main__":
    raise SystemExit("methods/promptot.py is no command: python train.py --method promptot")

import functools
import itertools

import torch
from torch import nn

from clip.precision import in_float32, unit
from clip.prompts import TEMPLATE, gather_shares
from methods import coop
from sinkhorn import sinkhorn
from sotglp import Method

LARGEST_EXACT = 8           # images, of which there are 40,320 permutations


@in_float32
def pair_costs(image, text, frozen_image, frozen_text, labels, frozen_labels, modality="joint"):
    """What it costs to transport each prompted pair of image and class text to each frozen one.

    unit (b, D), (C, D), (B, D), (C, D), labels (b,), (B,) -> (b, B): half the squared distance of the joined
    vectors, that is 1 - cosine of the images + 1 - cosine of the texts. modality "image" or "text" takes one
    of the two halves.
    """
    image_cost = 1 - image @ frozen_image.T                                        # (b, B)
    text_cost = 1 - text[labels] @ frozen_text[frozen_labels].T                    # (b, B)
    return {"joint": image_cost + text_cost, "image": image_cost, "text": text_cost}[modality]


@functools.cache
def permutations(n, device):
    """All orders of n things, the identity first: (n!, n)."""
    orders = torch.tensor([*itertools.permutations(range(n))])
    return orders.to(device, non_blocking=True)


@torch.no_grad()
def transport_plan(cost, plan="exact", epsilon=0.1, n_iters=200):
    """The plan between two uniform marginals of equal size: cost (B, B) -> (B, B), without gradient.

    plan "exact": the cheapest permutation / B, for some permutation is always among the best plans
    (Birkhoff); "sinkhorn": entropic, Eq. 9 of SOT-GLP. Raises ValueError for an exact plan of more than 8
    images.
    """
    B = len(cost)
    if plan == "sinkhorn":
        return sinkhorn(cost, epsilon=epsilon, n_iters=n_iters)
    if B > LARGEST_EXACT:
        raise ValueError(f'plan="exact" tries all orders of a batch of at most {LARGEST_EXACT} images, got '
                         f'{B}: give a smaller --batch-size, or plan="sinkhorn" (--plan sinkhorn)')
    orders = permutations(B, cost.device)                                          # (B!, B)
    cost_of_order = cost[torch.arange(B, device=cost.device), orders].sum(dim=1)   # (B!,)
    # why keepdim: an index without dimensions is read by the host, which would wait for it
    best = orders[cost_of_order.argmin(dim=0, keepdim=True)][0]                    # (B,)
    return nn.functional.one_hot(best, B).to(cost) / B


@in_float32
def transport_loss(image, text, frozen_image, frozen_text, labels, plan="exact", modality="joint",
                   epsilon=0.1, n_iters=200, n_batch=None, ranks=(0, 1)):
    """sum_ij plan_ij cost_ij: how far the prompted features of a batch are from the frozen ones.

    unit (B, D), (C, D), (B, D), (C, D), labels (B,) -> scalar. The plan is constant in the backward pass.
    n_batch, ranks: the size of the batch, rank and number of processes, where these images are only a part of
    it; the parts add up.
    """
    rank, world = ranks
    batch = image.detach(), frozen_image, labels
    if world > 1:
        # why: the plan couples all images of a batch, so each process needs the features of all
        batch = [gather_shares(part, n_batch, *ranks) for part in batch]
    images, frozen_images, all_labels = batch                                      # (B, D), (B, D), (B,)

    cost = pair_costs(images, text, frozen_images, frozen_text, all_labels, all_labels, modality)     # (B, B)
    mine = pair_costs(image, text, frozen_images, frozen_text, labels, all_labels, modality)          # (b, B)
    return (transport_plan(cost, plan, epsilon, n_iters)[rank::world] * mine).sum()


def deep_start(words, n_blocks):
    """Where deep prompts start: words (n, W) in the first block, N(0, 0.02) in the others -> (J, n, W)."""
    deeper = torch.randn(n_blocks - 1, *words.shape) * 0.02    # on the CPU: the same on every device
    return torch.cat([words[None], deeper.to(words)])


class PromptOT(Method):
    """Deep prompts in both towers, shared by all classes, with transport to the frozen CLIP as a regulariser.

    lambda_transport: its weight; 0 is IVLP. modality, plan, epsilon, n_iters: of `transport_loss`. depth:
    blocks with prompts, from the first; all of them where a tower has fewer. Raises ValueError for a class
    name that does not fit behind the prompt, and for an unknown modality or plan.
    """

    # differs: the published warm-up is one epoch at a constant 1e-4, here linear, as in train.py.
    DEFAULTS = {"lr": 0.005, "epochs": 40, "warmup_epochs": 1, "batch_size": 4, "weight_decay": 5e-4}
    SUFFIX = coop.CoOp.SUFFIX
    frozen_tower = False    # prompts stand among the patches, so the image tower is no longer CLIP's own

    def __init__(self, clip_model, class_names, lambda_transport=10.0, modality="joint", plan="exact",
                 epsilon=0.1, n_iters=200, depth=12, **text_options):
        super().__init__(clip_model, class_names, **text_options)
        for option, value, known in (("modality", modality, ("joint", "image", "text")),
                                     ("plan", plan, ("exact", "sinkhorn"))):
            if value not in known:
                raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
        self.lambda_transport = lambda_transport
        self.transport = {"plan": plan, "modality": modality, "epsilon": epsilon, "n_iters": n_iters}
        template = self.word_vectors(TEMPLATE)                                     # (n, W)
        # why here: what cannot work fails before training
        self.text_encoder.check_names(len(template), self.SUFFIX)
        text_depth = min(depth, len(clip_model.transformer.resblocks))
        image_depth = min(depth, len(clip_model.visual.transformer.resblocks))
        width = len(clip_model.visual.proj)
        # one parameter for all blocks: the first row of the text prompts stands before the class name
        self.text_prompts = nn.Parameter(deep_start(template, text_depth))         # (J, n, W)
        self.image_prompts = nn.Parameter(torch.randn(image_depth, len(template), width) * 0.02)   # (J, n, W)
        self.frozen_text = None                            # (C, D), computed in the first training step
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], prompt, class name, full stop, [EOT] of each class -> unit (C, D)."""
        return self.encode(self.text_prompts[:1], self.SUFFIX, self.text_prompts[1:])[:, 0]    # N = 1

    @torch.compiler.disable      # why: it is called once, and its tokenizer is no work for a compiler
    def encode_frozen(self):
        """The text features of the frozen CLIP, of "a photo of a <name>." -> unit (C, D)."""
        return self.encode(self.word_vectors(TEMPLATE)[None], self.SUFFIX)[:, 0]

    @torch.no_grad()
    def teacher(self, images):
        """Features of the frozen CLIP: of the same crops, unit (B, D), and of the classes, unit (C, D)."""
        if self.frozen_text is None:
            self.frozen_text = self.encode_frozen()
        return unit(self.clip.encode_image(images)), self.frozen_text

    def forward(self, features, drawn=None, text_features=None):
        """Pictures (B, 3, R, R) -> logits (B, C); in training also what `transport_loss` compares."""
        image = unit(self.clip.encode_image(features, self.image_prompts))         # (B, D)
        text = self.encode_prompts() if text_features is None else text_features                   # (C, D)
        logits = coop.logits(image, text, self.scale)
        if not (self.training and self.lambda_transport):
            return (logits,)
        return logits, image, text, *self.teacher(features)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the cross-entropy of a batch + lambda_transport times its transport loss."""
        logits, *features = outputs
        loss = coop.objective(logits, labels, n_batch)
        terms = {"global": loss.detach()}
        if features:
            transport = transport_loss(*features, labels, n_batch=n_batch, ranks=self.text_encoder.ranks,
                                       **self.transport)
            loss = loss + self.lambda_transport * transport
            terms["transport"] = transport.detach()
        return loss, terms

    def scores(self, outputs):
        """{"global": (B, C)}."""
        return {"global": outputs[0]}

    def cosines(self, features, text_features):
        """Raw cosines of images with each class, (B, C); no patches."""
        image = unit(self.clip.encode_image(features, self.image_prompts))         # (B, D)
        return coop.logits(image, text_features, 1.0), None
