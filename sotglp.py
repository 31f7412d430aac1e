"""SOT-GLP, "Local-Global Prompt Learning via Sparse Optimal Transport" (arXiv 2603.08347 v1): Sec. 3.

Read it beside the paper, whose order it has. First come Sec. 3.2-3.5 as plain functions, then the model,
whose `forward` is Figure 1, last Figure 2 in numbers. Eq. 1 is in clip/prompts.py, the V-V stream of Eq. 2 in
clip/model.py, the transport of Eq. 9 in sinkhorn.py. PAPER.md lists every difference from the paper.

Letters:  B images   C classes   P patches   K kept patches   G global prompts (paper: N_g)
          L local prompts per class (paper: N_l)   M tokens per prompt   N prompts of any kind
          D joint embedding width   W width of the tower at hand   k: some of the G
          cost, plan: the paper's C and T   scale: 1 / tau   lambda_local: lambda   n_support: the K of Eq. 8
Image, patch and text features are unit vectors, so every inner product below is a cosine.
"""

import math

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.nn.functional as F
from torch import nn

from clip.precision import in_float32, to_joint_space, unit
from clip.prompts import TEMPLATE, ClassTexts
from sinkhorn import sinkhorn


# ---- Sec. 3.2: patch features ------------------------------------------------------------------------------

@in_float32
def project(tokens, proj, local_projection=None):
    """Tokens of the image tower as unit vectors of the joint space: (..., W) -> (..., D).  Eq. 3"""
    if local_projection is not None:
        # Eq. 3: Z_local = Z W_local-proj
        # differs: Eq. 3 stops there; CLIP's projection follows, because texts are D wide
        # why the product of the matrices first: it is cheaper
        proj = local_projection @ proj                                             # (W, D)
    return unit(to_joint_space(tokens, proj))


# ---- Sec. 3.3: global image-text alignment -----------------------------------------------------------------

@in_float32
def global_logits(image, text, scale, kept=None):
    """Cosine of image and class, averaged over the global prompts, times 1/tau.  Eq. 4

    image (B, D), text (C, G, D) -> (B, C). kept (B, k): the prompts that dropout leaves each image, all if
    None.
    """
    similarity = torch.einsum("bd,cgd->bcg", image, text)                          # (B, C, G)
    if kept is not None:
        kept = kept[:, None].expand(-1, len(text), -1)                             # (B, C, k)
        similarity = similarity.gather(2, kept)
    # Eq. 4: s_bc = mean_g <image_b, text_cg> / tau
    return scale * similarity.mean(dim=-1)


@in_float32
def cross_entropy(logits, labels, n_batch=None):
    """-log of the softmax probability of the true class, the mean over images.  Eq. 5-6

    logits (B, C), labels (B,) -> scalar. n_batch: the size of the batch, where these images are only a part
    of it; the parts add up to the mean.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / (n_batch or len(labels))


def draw_prompts(n_images, n_global, prompt_dropout, generator=None):
    """Global prompt dropout: which prompts each image keeps.  Sec. 3.3

    -> (n_images, k) int64, drawn without replacement, k = max(1, G - int(prompt_dropout G)).
    differs: the paper gives no rate; 0.75 is the released one. The released code draws with replacement.
    """
    k = max(1, n_global - int(prompt_dropout * n_global))
    return torch.rand(n_images, n_global, generator=generator).argsort(dim=1)[:, :k]


# ---- Sec. 3.4: sparse optimal transport alignment ----------------------------------------------------------

@in_float32
def patch_similarity(patches, text):
    """Cosines of patches and local prompts: unit (B, P, D), (C, L, D) -> (B, C, P, L).  Sec. 3.4"""
    return torch.einsum("bpd,cld->bcpl", patches, text)


@in_float32
def saliency(similarity):
    """How much a patch resembles a class: its mean similarity to the local prompts.  Eq. 7

    similarity (B, C, P, L) -> (B, C, P).
    """
    return similarity.mean(dim=-1)


@in_float32
def sparse_support(similarity, n_support):
    """The K most salient patches of each image for each class, one set for all prompts of a class.  Eq. 8

    similarity (B, C, P, L) -> kept similarities (B, C, K, L), their patch indices (B, C, K), in no order.
    Raises ValueError for more kept patches than there are.
    """
    P, L = similarity.shape[-2:]
    check_support(n_support, P)
    patch_ids = saliency(similarity).topk(n_support, sorted=False).indices         # (B, C, K)
    kept = similarity.gather(2, patch_ids[..., None].expand(-1, -1, -1, L))        # (B, C, K, L)
    return kept, patch_ids


def check_support(n_support, n_patches):
    """Raises ValueError, with both numbers, if n_support is not in [1, P]."""
    if not 1 <= n_support <= n_patches:
        raise ValueError(f"cannot keep {n_support} of {n_patches} patches: --n-support must lie between "
                         f"1 and {n_patches}")


@in_float32
def sparse_transport(similarity, n_support=10, epsilon=0.1, n_iters=20, plan_gradient=True):
    """The plan between the kept patches and the local prompts of each class.  Eq. 8-9

    similarity (B, C, P, L) -> kept similarities (B, C, K, L), plan (B, C, K, L), patch indices (B, C, K).
    """
    kept, patch_ids = sparse_support(similarity, n_support)                        # (B, C, K, L), (B, C, K)
    cost = 1 - kept                                                # Sec. 3.4: C_uv = 1 - sim_uv
    if not plan_gradient:
        cost = cost.detach()
    plan = sinkhorn(cost, epsilon=epsilon, n_iters=n_iters)                        # Eq. 9, (B, C, K, L)
    return kept, plan, patch_ids


@in_float32
def local_logits(patches, text, scale, n_support=10, epsilon=0.1, n_iters=20, plan_gradient=True):
    """Transport-weighted similarity of the kept patches to a class's local prompts, times 1/tau.  Eq. 7-11

    patches (B, P, D), text (C, L, D) -> logits (B, C), plan (B, C, K, L); `sparse_transport` tells which
    patches its rows are. plan_gradient=False holds the plan constant in the backward pass, as the released
    code does.
    """
    similarity = patch_similarity(patches, text)                                   # (B, C, P, L)
    kept, plan, _ = sparse_transport(similarity, n_support, epsilon, n_iters, plan_gradient)

    # Eq. 10: phi_bc = sum_kl plan_bckl similarity_bckl.  differs: the released code divides this by L
    phi = (plan * kept).sum(dim=(-2, -1))                                          # (B, C)
    # Eq. 11: s_bc = phi_bc / tau
    return scale * phi, plan


# ---- Sec. 3.5: training objective and inference ------------------------------------------------------------

@in_float32
def objective(global_logits, local_logits, labels, lambda_local=0.25, n_batch=None):
    """Cross-entropy of the global logits (Eq. 5-6) + lambda times that of the local ones (Eq. 11).  Sec. 3.5

    logits (B, C), labels (B,) -> scalar, the mean over images; n_batch as in `cross_entropy`.
    """
    global_loss = cross_entropy(global_logits, labels, n_batch)
    local_loss = cross_entropy(local_logits, labels, n_batch)
    return global_loss + lambda_local * local_loss


@in_float32
def fuse(global_logits, local_logits, lambda_local=0.25):
    """The final score: global + lambda local, (B, C); its softmax gives the class probabilities.  Sec. 3.5"""
    return global_logits + lambda_local * local_logits


@in_float32
def mean_cosines(features, text):
    """Cosines with each class, the mean over N prompts: unit (..., D), (C, N, D) -> (..., C).  Sec. 3.5"""
    # why: the mean of the cosines is the product with the mean of the prompts
    return features @ text.mean(dim=1).T


# ---- the model ---------------------------------------------------------------------------------------------

class Method(nn.Module):
    """What SOT-GLP and the methods in methods/ share: a frozen CLIP, and the text work for its class names.

    class_names: C strings, in the order of their labels. text_options: those of `ClassTexts`. The scripts use
    a method through what stands here alone. The parameters of its constructor are options of train.py.
    """

    DEFAULTS = {}              # the recipe: defaults of train.py
    class_specific = False     # whether it learns something for each class: then it knows no other classes
    frozen_tower = True        # whether the image tower is CLIP's own: then its features can be computed once
    stream = "vv"              # which patch tokens of a frozen tower the method reads
    text_names = ("global",)   # what the text features are that `encode_prompts` gives, one after the other
    ood_temperature = 1.0      # of the softmax in ood.py
    has_plan = False           # whether its local score comes from a transport plan: then that is drawn

    def __init__(self, clip_model, class_names, **text_options):
        super().__init__()
        self.clip = clip_model
        self.class_names = list(class_names)
        names = [self.name_in_text(name) for name in self.class_names]
        self.text_encoder = ClassTexts(clip_model, names, **text_options)

    @classmethod
    def recipe(cls, dataset):
        """The defaults of train.py for a dataset, {option: value}."""
        return cls.DEFAULTS

    @staticmethod
    def name_in_text(class_name):
        """A class name as it stands in a prompt: underscores become spaces."""
        return class_name.replace("_", " ")    # differs: the released code keeps "_"

    @property
    def scale(self):
        """1/tau: CLIP's own temperature, read from its weights and frozen."""
        return self.clip.logit_scale.float().exp()

    def features(self, images):
        """What the method reads of the frozen image tower: CLS (B, W) and patches (B, P, W) as a tuple.

        images (B, 3, R, R); features pass through unchanged, and so do pictures where the tower has learned
        prompts.
        """
        if isinstance(images, tuple) or not self.frozen_tower:
            return images
        with torch.no_grad():   # what is learned comes after the tower
            return self.clip.encode_patches(images, self.stream)

    def word_vectors(self, words):
        """The token vectors of some words, to start a prompt from: (M, W)."""
        tokens = clip.tokenize(words)[0]
        ids = tokens[1 : tokens.argmax()]                                          # without [SOS] and [EOT]
        ids = ids.to(self.clip.logit_scale.device, non_blocking=True)
        return self.clip.token_embedding(ids)

    def encode(self, prompts, suffix="", deep=None, raw=False):
        """Prompts with the names of all classes -> unit (C, N, D), or raw, see `ClassTexts`.  Eq. 1"""
        return self.text_encoder(prompts, suffix, deep, raw)

    def encode_prompts(self):
        """The text features of what is learned so far, for tests that compute them once."""
        raise NotImplementedError

    def draw(self, n_images, generator=None):
        """The random choices of a training step, a row for each image; None where a method has none."""

    def forward(self, features, drawn=None, text_features=None):
        """Features or pictures -> the outputs, a tuple of tensors; those of images have the batch first.

        drawn: rows of `draw`; text_features: from `encode_prompts()`, computed here where None.
        """
        raise NotImplementedError

    def loss(self, outputs, labels, n_batch):
        """These images' part of the loss of n_batch images, and of its terms: scalar, {term: scalar}."""
        raise NotImplementedError

    def logits(self, outputs):
        """The score that decides, the first of `scores`: (B, C)."""
        return next(iter(self.scores(outputs).values()))

    def scores(self, outputs):
        """All scores for reports, the decisive one first: {name: (B, C)}."""
        raise NotImplementedError

    def cosines(self, features, text_features):
        """Raw cosines with each class: of images (B, C) or None, of patches (B, P, C) or None.  GL-MCM"""
        raise NotImplementedError

    def learned_state(self):
        """What is learned, by name: all that a checkpoint needs. Memory is the parameters'."""
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}

    def after_epoch(self, epoch, epochs):
        """What a method does when epoch 1, 2, ... is done. What it keeps is part of `learned_state`."""


class SOTGLP(Method):
    """The prompts that are learned for a frozen CLIP, and the learned local projection of its patches.

    clip_model: a `clip.CLIP`; class_names: C strings, in the order of their labels. Defaults: Sec. 4
    and 5; epsilon, n_iters and prompt_dropout are not in the paper (PAPER.md, decisions 4 and 6). Raises
    ValueError for a class name that is too long for the text tower, and for more kept patches than there are.
    """

    text_names = ("global", "local")
    # Sec. 4
    DEFAULTS = {"lr": 0.05, "epochs": 50, "warmup_epochs": 5, "batch_size": 32, "weight_decay": 0.01}

    def __init__(self, clip_model, class_names, *, n_global=4, n_local=4, n_support=10, epsilon=0.1,
                 n_iters=20, lambda_local=0.25, prompt_dropout=0.75, local_projection=True, vv_attention=True,
                 class_specific=True, plan_gradient=True, **text_options):
        super().__init__(clip_model, class_names, **text_options)
        self.n_support = n_support
        self.epsilon = epsilon
        self.n_iters = n_iters
        self.lambda_local = lambda_local
        self.prompt_dropout = prompt_dropout
        self.class_specific = class_specific
        self.plan_gradient = plan_gradient
        self.stream = "vv" if vv_attention else "qk"

        template = self.word_vectors(TEMPLATE)                                     # (M, W)
        M, W = template.shape
        # why here: what cannot work fails before training
        check_support(n_support, len(clip_model.visual.positional_embedding) - 1)
        self.text_encoder.check_names(M)

        self.global_prompts = nn.Parameter(template.repeat(n_global, 1, 1))        # (G, M, W)

        # differs: the paper does not say how local prompts start; the released code takes Xavier's uniform
        C = len(self.class_names) if class_specific else 1
        local = nn.init.xavier_uniform_(torch.empty(C, n_local, M, W))             # (C, L, M, W)
        self.local_prompts = nn.Parameter(local if class_specific else local[0])   # or (L, M, W), for all

        # differs: the paper does not say how it starts; the identity, as released, is CLIP's own patches
        width = clip_model.visual.proj.shape[0]
        self.local_projection = nn.Parameter(torch.eye(width), requires_grad=local_projection)     # (W, W)
        self.to(clip_model.logit_scale.device)

    def forward(self, features, drawn=None, text_features=None):
        """Figure 1: pictures (B, 3, R, R) or their `features` -> global logits (B, C), local logits (B, C).

        drawn (B, k): the global prompts that each image keeps; where None, they are drawn in training mode,
        and all of them are used otherwise.
        """
        image, patches = self.encode_images(features)                              # (B, D), (B, P, D)
        if text_features is None:
            text_features = self.encode_prompts()
        global_text, local_text = text_features                                    # (C, G, D), (C, L, D)
        if drawn is None and self.training:
            drawn = self.draw(len(image)).to(image.device)

        global_scores = global_logits(image, global_text, self.scale, drawn)       # (B, C)
        local_scores = self.local(patches, local_text)                             # (B, C)
        return global_scores, local_scores

    def encode_images(self, images):
        """Both streams of the image tower in the joint space: unit (B, D), (B, P, D).  Eq. 2-3

        images (B, 3, R, R), or their `features`.
        """
        cls, patches = self.features(images)                                       # (B, W), (B, P, W)
        proj = self.clip.visual.proj
        return project(cls, proj), project(patches, proj, self.local_projection)

    def encode_prompts(self):
        """Global and local prompts with the names of all classes -> unit (C, G, D), (C, L, D).  Eq. 1"""
        return self.text_encoder.encode_both(self.global_prompts, self.local_prompts)

    def local(self, patches, text):
        """The local branch: unit patches (B, P, D), texts (C, L, D) -> logits (B, C).  Eq. 7-11"""
        logits, _ = local_logits(patches, text, self.scale, self.n_support, self.epsilon, self.n_iters,
                                 self.plan_gradient)
        return logits

    @property
    def has_plan(self):
        """Whether the local score is the paper's; a subclass with a `local` of its own says so itself."""
        return type(self).local is SOTGLP.local

    def draw(self, n_images, generator=None):
        """Which global prompts each image keeps in a training step: (n_images, k).  Sec. 3.3"""
        return draw_prompts(n_images, len(self.global_prompts), self.prompt_dropout, generator)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of n_batch images, and of its two terms.  Sec. 3.5"""
        global_loss, local_loss = (cross_entropy(logits, labels, n_batch) for logits in outputs)
        loss = global_loss + self.lambda_local * local_loss        # `objective`; the log has its terms
        return loss, {"global": global_loss.detach(), "local": local_loss.detach()}

    def logits(self, outputs):
        """The fused score: (B, C).  Sec. 3.5"""
        return fuse(*outputs, self.lambda_local)

    def scores(self, outputs):
        """The fused score, which decides, and those of each branch: {name: (B, C)}.  Sec. 3.5"""
        global_scores, local_scores = outputs
        return {"fused": self.logits(outputs), "global": global_scores, "local": local_scores}

    def cosines(self, features, text_features):
        """Raw cosines of images and of their patches with each class: (B, C), (B, P, C).  Sec. 3.5, GL-MCM"""
        image, patches = self.encode_images(features)                              # (B, D), (B, P, D)
        global_text, local_text = text_features
        return mean_cosines(image, global_text), mean_cosines(patches, local_text)

    @torch.no_grad()
    def diagnostics(self, features, labels):
        """How the local prompts specialise on a batch, for the log: {name: (B,)}.  Figure 2"""
        _, patches = self.encode_images(features)                                  # (B, P, D)
        text = self.encode(self.local_prompts)                                     # (C, L, D)
        numbers = specialisation(patches, text, labels, self.n_support, self.epsilon, self.n_iters)
        if not self.has_plan:
            del numbers["plan_entropy"], numbers["row_error"]
        return numbers


# ---- Figure 2, in numbers ----------------------------------------------------------------------------------

@in_float32
def specialisation(patches, text, labels, n_support=10, epsilon=0.1, n_iters=20):
    """How far a class's local prompts differ, and how they share out the patches of its images.  Figure 2

    patches (B, P, D), text (C, L, D), labels (B,): the class of each image, whose prompts are looked at ->
    {name: (B,)}
      plan_entropy   entropy of the plan over that of the uniform plan, in [0, 1]; 1: the plan is even
      row_error      the largest error of a row's sum, relative to its 1/K, in the plans of all classes
      overlap        how many of their three best patches two prompts share, in [0, 1], mean over pairs
      prompt_cosine  cosine of two prompts, in [-1, 1], mean over pairs
    With one prompt there is no pair, and both means are 0.
    """
    similarity = patch_similarity(patches, text)                                   # (B, C, P, L)
    _, plan, _ = sparse_transport(similarity, n_support, epsilon, n_iters)         # (B, C, K, L)
    K, L = plan.shape[-2:]
    row_error = (K * plan.sum(dim=-1) - 1).abs().amax(dim=(-2, -1))                # (B,)

    images = torch.arange(len(labels), device=labels.device)
    plan = plan[images, labels]                                                  # (B, K, L), of the own class
    similarity = similarity[images, labels]                                        # (B, P, L)
    text = text[labels]                                                            # (B, L, D)
    # why 2: log(1) = 0, and one cell has no entropy
    entropy = torch.special.entr(plan).sum(dim=(-2, -1)) / math.log(max(2, K * L))

    n_best = min(3, similarity.shape[1])
    best = similarity.topk(n_best, dim=1).indices                                  # (B, 3, L)
    best = torch.zeros_like(similarity).scatter(1, best, 1)                  # (B, P, L), 1 for the three best
    return {"plan_entropy": entropy, "row_error": row_error,
            "overlap": mean_of_pairs(best.mT @ best) / n_best, "prompt_cosine": mean_of_pairs(text @ text.mT)}


def mean_of_pairs(matrix):
    """The mean of what is not on the diagonal: (B, L, L) -> (B,)."""
    L = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (matrix.sum(dim=(-2, -1)) - diagonal) / max(1, L * (L - 1))
