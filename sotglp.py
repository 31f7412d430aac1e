"""SOT-GLP, "Local-Global Prompt Learning via Sparse Optimal Transport" (arXiv 2603.08347 v1), Sec. 3 in one file.

Read it beside the paper. The scores of Sec. 3.3-3.5 come first, as plain functions. Then come the features that they
compare (Sec. 3.1-3.2), and last the model: its `forward` is Figure 1. The transport is in sinkhorn.py and the V-V
stream in clip/model.py. PAPER.md lists every difference from the paper.

Letters:  B images   C classes   P patches   K kept patches   G global prompts (paper: N_g)
          L local prompts per class (paper: N_l)   M tokens per prompt   S tokens of a name   N prompts of any kind
          D joint embedding width   W width of the tower at hand   c, k: some of C, some of G
          cost, plan: the paper's C and T   scale: 1 / tau   lambda_local: its lambda   n_support: the K of Eq. 8
Image, patch and text features are unit vectors, so every inner product below is a cosine.
"""

import math
from functools import partial

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip.tokenizer import SOS
from sinkhorn import in_float32, sinkhorn

TEMPLATE = "a photo of a"  # Sec. 3.1: tau_init; it also fixes M = 4


# ---- Sec. 3.3: global image-text alignment -------------------------------------------------------------------

@in_float32
def global_logits(image, text, scale, kept=None):
    """Cosine of image and class, averaged over the global prompts, times 1/tau.  Eq. 4

    image (B, D), text (C, G, D) -> (B, C). kept (B, k): the prompts that dropout leaves each image, all if None.
    """
    similarity = torch.einsum("bd,cgd->bcg", image, text)                          # (B, C, G)
    if kept is not None:
        similarity = similarity.gather(2, kept[:, None].expand(-1, len(text), -1)) # (B, C, k)
    # Eq. 4: s_bc = mean_g <image_b, text_cg> / tau
    return scale * similarity.mean(dim=-1)


def draw_prompts(n_images, n_global, prompt_dropout, generator=None):
    """Global prompt dropout: which prompts each image keeps.  Sec. 3.3

    -> (n_images, k) int64, drawn without replacement, k = max(1, G - int(prompt_dropout G)).
    differs: the paper gives no rate; 0.75 is the released one. The released code draws with replacement.
    """
    k = max(1, n_global - int(prompt_dropout * n_global))
    return torch.rand(n_images, n_global, generator=generator).argsort(dim=1)[:, :k]


# ---- Sec. 3.4: sparse optimal transport alignment ------------------------------------------------------------

@in_float32
def saliency(similarity):
    """How much a patch resembles a class: its mean similarity to the local prompts.  Eq. 7

    similarity (B, C, P, L) -> (B, C, P).
    """
    return similarity.mean(dim=-1)


@in_float32
def sparse_support(similarity, n_support):
    """The K most salient patches of each image for each class, one set for all prompts of a class.  Eq. 8

    similarity (B, C, P, L) -> kept similarities (B, C, K, L), their patch indices (B, C, K), in no particular order.
    Raises ValueError for more kept patches than there are.
    """
    P, L = similarity.shape[-2:]
    check_support(n_support, P)
    patch_ids = saliency(similarity).topk(n_support, dim=-1, sorted=False).indices # (B, C, K)
    return similarity.gather(2, patch_ids[..., None].expand(-1, -1, -1, L)), patch_ids


def check_support(n_support, n_patches):
    """Raises ValueError, with both numbers, if n_support is not in [1, P]."""
    if not 1 <= n_support <= n_patches:
        raise ValueError(f"cannot keep {n_support} of {n_patches} patches: --n-support must lie between 1 and "
                         f"{n_patches}")


@in_float32
def local_logits(patches, text, scale, n_support=10, epsilon=0.1, n_iters=20, plan_gradient=True):
    """Transport-weighted similarity of the kept patches to a class's local prompts, times 1/tau.  Eq. 7-11

    patches (B, P, D), text (C, L, D) -> logits (B, C), plan (B, C, K, L).
    plan_gradient=False holds the plan constant in the backward pass, as the released code does.
    """
    similarity = torch.einsum("bpd,cld->bcpl", patches, text)                      # (B, C, P, L)
    similarity, _ = sparse_support(similarity, n_support)                          # (B, C, K, L)
    cost = 1 - similarity                                                          # Sec. 3.4: C_uv = 1 - sim_uv
    plan = sinkhorn(cost if plan_gradient else cost.detach(), epsilon=epsilon, n_iters=n_iters)
    # Eq. 10: phi_bc = sum_kl plan_bckl similarity_bckl.  differs: the released code divides this by L.
    phi = (plan * similarity).sum(dim=(-2, -1))                                    # (B, C)
    return scale * phi, plan                                                       # Eq. 11: s_bc = phi_bc / tau


def local_mean_logits(patches, text, scale, *options):
    """The released code's local logits: the mean over the L prompts for the sum in Eq. 10, so `local_logits` / L."""
    return local_logits(patches, text, scale / text.shape[1], *options)


# ---- Sec. 3.5: training objective and inference --------------------------------------------------------------

@in_float32
def objective(global_logits, local_logits, labels, lambda_local=0.25, n_batch=None):
    """Cross-entropy of the global logits (Eq. 5-6) + lambda times that of the local ones (Eq. 11).  Sec. 3.5

    logits (B, C), labels (B,) -> scalar, the mean over images. n_batch: the size of the batch, where these images are
    only a part of it; the parts add up to the mean.
    """
    global_loss, local_loss = (F.cross_entropy(logits, labels, reduction="sum") / (n_batch or len(labels))
                               for logits in (global_logits, local_logits))
    return global_loss + lambda_local * local_loss


@in_float32
def fuse(global_logits, local_logits, lambda_local=0.25):
    """The final score: global + lambda local, (B, C); its softmax gives the class probabilities.  Sec. 3.5"""
    return global_logits + lambda_local * local_logits


# ---- Figure 2, in numbers ------------------------------------------------------------------------------------

@in_float32
def specialisation(patches, text, labels, n_support=10, epsilon=0.1, n_iters=20):
    """How far a class's local prompts differ, and how they share out the patches of its images.  Figure 2

    patches (B, P, D), text (C, L, D), labels (B,): the class of each image, whose prompts are looked at -> {name: (B,)}
      plan_entropy   entropy of the plan over that of the uniform plan, in [0, 1]; 1: every prompt has all patches alike
      row_error      the largest error of a row's sum, relative to its 1/K, in the plans of all classes
      overlap        how many of their three best patches two prompts have in common, in [0, 1], mean over pairs
      prompt_cosine  cosine of two prompts, in [-1, 1], mean over pairs
    With one prompt there is no pair, and both means are 0.
    """
    similarity = torch.einsum("bpd,cld->bcpl", patches, text)                      # (B, C, P, L)
    kept, _ = sparse_support(similarity, n_support)                                # (B, C, K, L)
    plan = sinkhorn(1 - kept, epsilon=epsilon, n_iters=n_iters)                    # (B, C, K, L)
    K, L = plan.shape[-2:]
    row_error = (K * plan.sum(dim=-1) - 1).abs().amax(dim=(-2, -1))                # (B,)
    own = torch.arange(len(labels), device=labels.device), labels
    plan, similarity, text = plan[own], similarity[own], text[labels]              # (B, K, L), (B, P, L), (B, L, D)
    entropy = torch.special.entr(plan).sum(dim=(-2, -1)) / math.log(max(2, K * L)) # why 2: one cell has no entropy
    n_best = min(3, similarity.shape[1])
    best = similarity.topk(n_best, dim=1).indices                                  # (B, 3, L)
    best = torch.zeros_like(similarity).scatter(1, best, 1)                        # (B, P, L), 1 for the three best
    return {"plan_entropy": entropy, "row_error": row_error, "overlap": mean_of_pairs(best.mT @ best) / n_best,
            "prompt_cosine": mean_of_pairs(text @ text.mT)}


def mean_of_pairs(matrix):
    """The mean of what is not on the diagonal: (B, L, L) -> (B,)."""
    L = matrix.shape[-1]
    return (matrix.sum(dim=(-2, -1)) - matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)) / max(1, L * (L - 1))


# ---- Sec. 3.1-3.2: the features that the scores compare ------------------------------------------------------

@in_float32
def unit(features):
    """Each vector divided by its length: (..., D) -> (..., D)."""
    return F.normalize(features, dim=-1)


@in_float32
def project(tokens, proj, local_projection=None):
    """Tokens of the image tower as unit vectors of the joint space: (..., W) -> (..., D).  Eq. 3"""
    if local_projection is not None:
        # Eq. 3: Z_local = Z W_local-proj, then CLIP's projection. why: the two matrices first, which is cheaper
        proj = local_projection @ proj                                             # (W, D)
    return unit(tokens @ proj)


@in_float32
def mean_cosines(features, text):
    """Cosines with each class, averaged over its N prompts: unit (..., D), (C, N, D) -> (..., C).  Sec. 3.5"""
    return features @ text.mean(dim=1).T    # why: the mean of the cosines is the product with the mean of the prompts


class ClassTexts:
    """Learned prompts in front of class names, encoded by the frozen text tower.  Eq. 1

    clip_model: a `clip.CLIP`; class_names: C strings, in the order of their labels. text_chunk: classes that go through
    the text tower at once; checkpoint_text: compute the activations again in the backward pass instead of keeping them;
    ranks: (rank, world) of the processes that share the work. keep_underscores: they become spaces otherwise.
    """

    def __init__(self, clip_model, class_names, text_chunk=200, checkpoint_text=False, ranks=(0, 1),
                 keep_underscores=False):
        self.clip, self.ranks = clip_model, ranks
        # differs: the released code keeps "_"
        self.class_names = class_names if keep_underscores else [name.replace("_", " ") for name in class_names]
        self.text_chunk, self.checkpoint_text = text_chunk, checkpoint_text
        self.tokenized = {}

    def __call__(self, prompts, suffix="", deep=None):
        """[SOS], prompt, class name, suffix, [EOT] for each prompt and class -> unit (C, N, D).  Eq. 1

        prompts: (N, M, W) for all classes, or (C, N, M, W); deep (J-1, M, W): what replaces them in deeper blocks.
        With several ranks each process encodes its share of the classes and receives the other shares, so all processes
        must call this together.
        """
        tokens, eot, chunks, order = self.prepare(prompts.shape[-2], suffix)
        shared = prompts.dim() == 3 and deep is None
        if not shared:
            prompts = prompts.expand(len(self.class_names), -1, -1, -1)            # (C, N, M, W)
        encode = self.encode_shared if shared else partial(self.encode_own, deep=() if deep is None else (deep,))
        encode = partial(checkpoint, encode, use_reentrant=False) if self.checkpoint_text else encode
        features = torch.cat([encode(prompts if shared else prompts[classes], tokens[classes, :longest], eot[classes])
                              for classes, longest in chunks])                     # (c, N, D), this rank's share
        if self.ranks[1] > 1:
            features = gather_shares(features, len(self.class_names), *self.ranks) # (C, N, D), still sorted by length
        return features[order.argsort()]

    def prepare(self, n_context, suffix=""):
        """Tokenises the class names once -> tokens (C, S), places of [EOT] (C,), this process's chunks, order (C,).

        A chunk: (class numbers, tokens of the longest name). order: all class numbers, those of short names first.
        Raises ValueError for a name that does not fit into the context with a prompt of n_context tokens.
        """
        if (n_context, suffix) not in self.tokenized:
            device, (rank, world) = self.clip.logit_scale.device, self.ranks
            tokens, eot = tokenize_names(self.class_names, n_context, self.clip.context_length, suffix)
            order = eot.argsort(stable=True)
            # why: every world-th of the sorted names, so that the processes have equal work; chunks, to bound memory
            share = order[rank::world]
            chunks = [(classes.to(device), max(eot[classes].tolist(), default=1) + 1)
                      for classes in share.tensor_split(cuts(eot[share].tolist(), self.text_chunk))]
            self.tokenized[n_context, suffix] = tokens.to(device), eot.to(device), chunks, order.to(device)
        return self.tokenized[n_context, suffix]

    def different_names(self):
        """How many different texts the class names are to this CLIP. Words that it never saw may have equal vectors."""
        tokens, *_ = self.prepare(0)
        return len(self.clip.token_embedding(tokens).flatten(1).unique(dim=0))

    def encode_shared(self, prompts, tokens, eot):
        """Prompts (N, M, W) of all classes, [SOS] name [EOT] (c, S) of some -> unit text features (c, N, D).  Eq. 1"""
        sos, N = self.clip.token_embedding(tokens.new_tensor(SOS)), len(prompts)
        prefix = torch.cat([sos.expand(N, 1, -1), prompts], dim=1)                 # (N, 1+M, W)
        names = self.clip.token_embedding(tokens[:, None, 1:]).expand(-1, N, -1, -1)   # (c, N, S-1, W)
        return unit(self.clip.encode_behind(prefix, names, eot - 1))

    def encode_own(self, prompts, tokens, eot, deep=()):
        """Prompts (c, N, M, W) and [SOS] name [EOT] (c, S) of some classes -> unit text features (c, N, D).  Eq. 1"""
        N, M = prompts.shape[1:3]
        names = self.clip.token_embedding(tokens)[:, None].expand(-1, N, -1, -1)   # (c, N, S, W)
        # Eq. 1: [SOS]; prompt; class name; [EOT].
        # why nothing after the longest name of a chunk: the mask is causal, so it could not reach any [EOT]
        texts = torch.cat([names[:, :, :1], prompts, names[:, :, 1:]], dim=2)      # (c, N, M+S, W)
        features = self.clip.encode_embeddings(texts.flatten(0, 1), (eot + M).repeat_interleave(N), *deep)
        return unit(features).unflatten(0, (-1, N))


def tokenize_names(class_names, n_context, context_length, suffix=""):
    """[SOS] name suffix [EOT] of every class, cut after the longest: tokens (C, S), places of [EOT] (C,).

    Raises ValueError for a name that leaves no room for n_context prompt tokens.
    """
    names = [name + suffix for name in class_names]
    tokens = torch.stack([clip.tokenize(name, context_length, truncate=True)[0] for name in names])
    eot = tokens.argmax(dim=-1)                                                    # [EOT] has the largest id
    for name, end in zip(names, eot.tolist()):
        if end + n_context >= context_length:
            raise ValueError(f"class name {name!r} is too long: [SOS], {n_context} prompt tokens, the name and [EOT] "
                             f"must fit into {context_length} tokens")
    return tokens[:, : int(eot.max()) + 1], eot


def cuts(lengths, most):
    """Where a sorted list of lengths is cut into chunks: at `most` items at the latest, and where lengths grow.

    why where they grow: a chunk is as long as its longest name, so it should hold no other lengths. why not always: a
    chunk of few classes keeps a GPU waiting for its next command.
    """
    found, start = [], 0
    for i in range(1, len(lengths)):
        if i - start == most or (lengths[i] > lengths[i - 1] and i - start >= most // 8):
            found.append(start := i)
    return found


def gather_shares(share, n, rank, world):
    """Joins rows of all processes: share (c, ...) holds the rows rank, rank + world, ... of n -> (n, ...)."""
    # why: all_gather needs equal shapes; padding also keeps autograd connected on a process without rows
    share = F.pad(share, (0, 0) * (share.dim() - 1) + (0, -(-n // world) - len(share)))
    return GatherShares.apply(share, rank, world).flatten(0, 1)[:n]


class GatherShares(torch.autograd.Function):
    """(c, ...) of each process -> (c, world, ...). The loss of every process needs all shares, so gradients add up."""

    @staticmethod
    def forward(ctx, share, rank, world):
        ctx.rank = rank
        shares = [torch.empty_like(share) for _ in range(world)]
        torch.distributed.all_gather(shares, share.contiguous())
        return torch.stack(shares, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[:, ctx.rank], None, None


# ---- the model -----------------------------------------------------------------------------------------------

class Method(nn.Module):
    """What SOT-GLP and the methods in methods/ have in common: a frozen CLIP, and the text work for its class names.

    texts: the options of ClassTexts. The scripts use a method through these names alone; the options of its constructor
    are options of train.py:
      DEFAULTS                             train.py: the recipe, defaults of its options
      clip, class_names                    its CLIP; the names by label
      stream                               which of CLIP's patch streams it reads; None: it has its own way through the
                                           image tower, so it always gets pictures
      class_specific                       whether it learns something for each class: then it knows no other classes
      draw(n_images, generator)            train.py: random choices of a step, a row for each image, or None
      forward(images, drawn, texts)        outputs, a tuple of tensors, those of images batch first.
                                           images: (B, 3, R, R), or the tuple that `clip.encode_patches` made of them;
                                           texts: from `encode_prompts()`
      encode(prompts, suffix="")           a ClassTexts, in which the text work of every method is done
      encode_prompts()                     evaluate.py, ood.py: the texts, computed once
      loss(outputs, labels, n_batch)       train.py: this process's part of the loss of n_batch images, {term: its part}
      scores(outputs)                      {name: (B, C)}; the first one decides
      cosines(images, texts)               ood.py: raw cosines (B, C) or None, and (B, P, C) or None
      learned_state()                      the learned tensors by name, sharing the parameters' memory
      diagnostics(images, labels)          train.py: {name: (B,)} for the log; a method may lack it
    """

    class_specific = False

    def __init__(self, clip_model, class_names, **texts):
        super().__init__()
        self.clip, self.class_names = clip_model, list(class_names)
        self.encode = ClassTexts(clip_model, self.class_names, **texts)

    @property
    def scale(self):
        """1/tau: CLIP's own temperature, read from its weights and frozen."""
        return self.clip.logit_scale.float().exp()

    def tokens(self, images):
        """Images, or what `clip.encode_patches` made of them -> CLS (B, W), patches (B, P, W) of the frozen tower."""
        if isinstance(images, tuple):
            return images
        with torch.no_grad():   # what is learned comes behind the tower
            return self.clip.encode_patches(images, self.stream)

    def word_vectors(self, words):
        """The token vectors of some words, to start a prompt from: (M, W)."""
        tokens = clip.tokenize(words)[0]
        return self.clip.token_embedding.weight[tokens[1 : tokens.argmax()]]       # without [SOS] and [EOT]

    def draw(self, n_images, generator=None):
        """No random choices, unless a method has some."""

    def learned_state(self):
        """What is learned, by name: all that a checkpoint needs. Memory is the parameters'."""
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}


class SOTGLP(Method):
    """The prompts that are learned for a frozen CLIP, and the learned map on its patch features.

    clip_model: a `clip.CLIP`; class_names: C strings, in the order of their labels. The options are the paper's; texts
    are those of ClassTexts. Raises ValueError for a class name that is too long for the text tower, and for more kept
    patches than the image tower has.
    """

    DEFAULTS = {"lr": 0.05, "epochs": 50, "warmup_epochs": 5, "batch_size": 32, "weight_decay": 0.01}    # Sec. 4

    def __init__(self, clip_model, class_names, *, n_global=4, n_local=4, n_support=10, epsilon=0.1, n_iters=20,
                 lambda_local=0.25, prompt_dropout=0.75, local_projection=True, vv_attention=True, class_specific=True,
                 plan_gradient=True, local_mean=False, vv_alias=False, keep_underscores=False, **texts):
        super().__init__(clip_model, class_names, keep_underscores=keep_underscores, **texts)
        self.n_support, self.epsilon, self.n_iters, self.plan_gradient = n_support, epsilon, n_iters, plan_gradient
        self.lambda_local, self.prompt_dropout, self.class_specific = lambda_local, prompt_dropout, class_specific
        self.local_score = local_mean_logits if local_mean else local_logits
        self.stream = ("vv_alias" if vv_alias else "vv") if vv_attention else "qk"

        template = self.word_vectors(TEMPLATE)                                     # (M, W)
        M, W = template.shape
        # why here: what cannot work fails before training
        check_support(n_support, len(clip_model.visual.positional_embedding) - 1)
        self.encode.prepare(M)

        self.global_prompts = nn.Parameter(template.repeat(n_global, 1, 1))        # (G, M, W)
        # differs: the paper does not say how local prompts start; this is the released scale, U(-bound, bound).
        classes = len(self.class_names) if class_specific else 1
        bound = (6 / ((classes + n_local) * M * W)) ** 0.5
        local = torch.empty(classes, n_local, M, W).uniform_(-bound, bound)        # (C, L, M, W)
        self.local_prompts = nn.Parameter(local if class_specific else local[0])   # or (L, M, W), for all classes
        # Eq. 3: starts as the identity, so that training starts from CLIP's own patch features
        width = clip_model.visual.proj.shape[0]
        self.local_projection = nn.Parameter(torch.eye(width), requires_grad=local_projection)   # (W, W)
        self.to(clip_model.logit_scale.device)

    def forward(self, images, drawn=None, texts=None):
        """Figure 1: images (B, 3, R, R) -> global logits (B, C), local logits (B, C).

        images: also the pair that `clip.encode_patches` made of them. drawn (B, k): the global prompts that each image
        keeps; where None, they are drawn in training mode, and all of them are used otherwise. texts: what
        `encode_prompts()` gave, so that evaluation encodes the texts once.
        """
        image, patches = self.encode_images(images)                                # (B, D), (B, P, D)
        global_text, local_text = self.encode_prompts() if texts is None else texts   # (C, G, D), (C, L, D)
        if drawn is None and self.training:
            drawn = self.draw(len(image)).to(image.device)
        global_scores = global_logits(image, global_text, self.scale, drawn)       # (B, C)
        return global_scores, self.local(patches, local_text)

    def local(self, patches, text):
        """The local branch: unit patches (B, P, D), texts (C, L, D) -> logits (B, C).  Eq. 7-11"""
        return self.local_score(patches, text, self.scale, self.n_support, self.epsilon, self.n_iters,
                                self.plan_gradient)[0]

    def encode_images(self, images):
        """Both streams of the image tower in the joint space: unit (B, D), (B, P, D).  Eq. 2-3

        images (B, 3, R, R), or what `clip.encode_patches` made of them.
        """
        cls, patches = self.tokens(images)                                         # (B, W), (B, P, W)
        proj = self.clip.visual.proj
        return project(cls, proj), project(patches, proj, self.local_projection)

    def encode_prompts(self):
        """Global and local prompts with the names of all classes -> unit vectors (C, G, D), (C, L, D).  Eq. 1"""
        return self.encode(self.global_prompts), self.encode(self.local_prompts)

    def draw(self, n_images, generator=None):
        """Which global prompts each image keeps in a training step: (n_images, k).  Sec. 3.3"""
        return draw_prompts(n_images, len(self.global_prompts), self.prompt_dropout, generator)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of a batch of n_batch images, and of its two terms.  Sec. 3.5"""
        terms = {name: F.cross_entropy(logits.detach(), labels, reduction="sum") / n_batch
                 for name, logits in zip(("global", "local"), outputs)}
        return objective(*outputs, labels, self.lambda_local, n_batch), terms

    def scores(self, outputs):
        """The fused score, which decides, and those of each branch: {name: (B, C)}.  Sec. 3.5"""
        return {"fused": fuse(*outputs, self.lambda_local), "global": outputs[0], "local": outputs[1]}

    def cosines(self, images, texts):
        """Raw cosines of images and of their patches with each class: (B, C), (B, P, C).  Sec. 3.5, GL-MCM"""
        return tuple(mean_cosines(*pair) for pair in zip(self.encode_images(images), texts))

    @torch.no_grad()
    def diagnostics(self, images, labels):
        """How the local prompts specialise on a batch, without gradient, for the log: {name: (B,)}.  Figure 2"""
        (_, patches), text = self.encode_images(images), self.encode(self.local_prompts)   # (B, P, D), (C, L, D)
        return specialisation(patches, text, labels, self.n_support, self.epsilon, self.n_iters)
