"""SOT-GLP, "Local-Global Prompt Learning via Sparse Optimal Transport" (arXiv 2603.08347 v1), Sec. 3 in one file.

Read beside the paper: the scores of Sec. 3.3-3.5 come first, as plain functions; SOTGLP, which makes their
inputs (Sec. 3.1-3.2), comes last, and its `forward` is Figure 1. The transport is in sinkhorn.py, the V-V
stream in clip/model.py, every departure from the paper in PAPER.md.

Letters:  B images   C classes   P patches   K kept patches   G global prompts (paper: N_g)
          L local prompts per class (paper: N_l)   M tokens per prompt   D joint embedding width   W tower width
          cost, plan: the paper's C and T   scale: 1 / tau   lambda_local: its lambda   n_support: the K of Eq. 8
Image, patch and text features are unit vectors, so every inner product below is a cosine.
"""

from functools import partial

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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

    similarity (B, C, P, L) -> kept similarities (B, C, K, L), their patch indices (B, C, K), in no order of meaning.
    Raises ValueError for more kept patches than there are.
    """
    L, P = similarity.shape[-1], similarity.shape[-2]
    if not 1 <= n_support <= P:
        raise ValueError(f"cannot keep {n_support} of {P} patches: --n-support must lie between 1 and {P}")
    patches = saliency(similarity).topk(n_support, dim=-1, sorted=False).indices   # (B, C, K)
    return similarity.gather(2, patches[..., None].expand(-1, -1, -1, L)), patches


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


# ---- Sec. 3.5: training objective and inference --------------------------------------------------------------

@in_float32
def objective(global_logits, local_logits, labels, lambda_local=0.25):
    """Cross-entropy of the global logits (Eq. 5-6) + lambda times that of the local ones (Eq. 11).  Sec. 3.5

    logits (B, C), labels (B,) -> scalar, the mean over images.
    """
    return F.cross_entropy(global_logits, labels) + lambda_local * F.cross_entropy(local_logits, labels)


@in_float32
def fuse(global_logits, local_logits, lambda_local=0.25):
    """The final score: global + lambda local, (B, C); its softmax gives the class probabilities.  Sec. 3.5"""
    return global_logits + lambda_local * local_logits


# ---- Sec. 3.1-3.2: where the features come from --------------------------------------------------------------

class SOTGLP(nn.Module):
    """A frozen CLIP, the prompts that are learned for it, and the learned map on its patch features.

    clip_model: a `clip.CLIP`; class_names: C strings, in the order of their labels. text_chunk: classes that go
    through the text tower at once; checkpoint_text: compute them again in the backward pass instead of keeping
    activations; ranks: (rank, world) of the processes that share this work.
    Raises ValueError for a class name that, with its prompt, is longer than the text tower's context, and for
    more kept patches than the image tower has.
    """

    def __init__(self, clip_model, class_names, n_global=4, n_local=4, n_support=10, epsilon=0.1, n_iters=20,
                 prompt_dropout=0.75, local_projection=True, vv_attention=True, class_specific=True,
                 plan_gradient=True, text_chunk=200, checkpoint_text=False, ranks=(0, 1)):
        super().__init__()
        self.clip, self.class_names = clip_model, list(class_names)
        self.n_support, self.epsilon, self.n_iters, self.plan_gradient = n_support, epsilon, n_iters, plan_gradient
        self.prompt_dropout = prompt_dropout
        self.stream = "vv" if vv_attention else "qk"
        n_patches = len(clip_model.visual.positional_embedding) - 1
        sparse_support(torch.zeros(1, 1, n_patches, 1), n_support)   # why: a K too large fails now, not in step one

        words = clip.tokenize(TEMPLATE)[0]
        template = clip_model.token_embedding.weight[words[1 : words.argmax()]]    # (M, W)
        self.global_prompts = nn.Parameter(template.repeat(n_global, 1, 1))        # (G, M, W)
        # differs: the paper is silent on the local prompts' start; this is the released scale, U(-bound, bound).
        M, W = template.shape
        classes = len(class_names) if class_specific else 1
        bound = (6 / ((classes + n_local) * M * W)) ** 0.5
        local = torch.empty(classes, n_local, M, W).uniform_(-bound, bound)        # (C, L, M, W)
        self.local_prompts = nn.Parameter(local if class_specific else local[0])   # or (L, M, W), for all classes
        # Eq. 3: starts as the identity, so that training starts from CLIP's own patch features
        width = clip_model.visual.proj.shape[0]
        self.local_projection = nn.Parameter(torch.eye(width), requires_grad=local_projection)   # (W, W)

        tokens, eot = tokenize_names(class_names, M, clip_model.context_length)
        self.register_buffer("tokens", tokens, persistent=False)                   # (C, S): [SOS] name [EOT]
        self.register_buffer("eot", eot, persistent=False)                         # (C,)
        lengths, by_length = (eot + 1).sort(stable=True)
        self.register_buffer("by_length", by_length, persistent=False)             # (C,): short names first
        self.lengths = lengths                                                     # why no buffer: the host reads it
        self.text_chunk, self.checkpoint_text, self.ranks = text_chunk, checkpoint_text, ranks
        self.to(clip_model.logit_scale.device)

    @property
    def scale(self):
        """1/tau: CLIP's own temperature, read from its weights and frozen."""
        return self.clip.logit_scale.float().exp()

    def learned_state(self):
        """What training changes, by name: the prompts and the local projection. All that a checkpoint needs."""
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("clip.")}

    def encode_prompts(self):
        """Prompts and class names of all classes through the frozen text tower.  Eq. 1

        -> unit vectors: global (C, G, D), local (C, L, D). With `ranks` = (rank, world) each process encodes its
        share of the classes and gets the others' from them, so all of them must call this together.
        """
        rank, world = self.ranks
        # why: of names sorted by length every world-th, for shares of equal work; in chunks, so that memory is bounded
        chunks = zip(*(order[rank::world].split(self.text_chunk) for order in (self.by_length, self.lengths)))
        encode = partial(checkpoint, self.encode_classes, use_reentrant=False) if self.checkpoint_text \
            else self.encode_classes
        features = torch.cat([encode(classes, max(lengths.tolist(), default=2)) for classes, lengths in chunks])
        if world > 1:
            features = gather_shares(features, len(self.class_names), rank, world) # (C, G+L, D), by length again
        return features[self.by_length.argsort()].split([len(self.global_prompts), self.local_prompts.shape[-3]], dim=1)

    def encode_classes(self, classes, longest):
        """All prompts of some classes -> unit text features.  Eq. 1

        classes (c,): their numbers; longest: tokens of their longest name, [SOS] and [EOT] included -> (c, G+L, D).
        """
        # why: the mask is causal, nothing after [EOT] can reach it, so what follows the longest name is left out
        names = self.clip.token_embedding(self.tokens[classes, :longest])          # (c, S, W)
        local = self.local_prompts.expand(len(self.class_names), -1, -1, -1)[classes]              # (c, L, M, W)
        prompts = torch.cat([self.global_prompts.expand(len(classes), -1, -1, -1), local], dim=1)  # (c, G+L, M, W)
        names = names[:, None].expand(-1, prompts.shape[1], -1, -1)                # (c, G+L, S, W)
        # Eq. 1: [SOS]; prompt; class name; [EOT]
        texts = torch.cat([names[:, :, :1], prompts, names[:, :, 1:]], dim=2)      # (c, G+L, M+S, W)
        eot = (self.eot[classes] + prompts.shape[2]).repeat_interleave(prompts.shape[1])
        features = unit(self.clip.encode_embeddings(texts.flatten(0, 1), eot))     # (c (G+L), D)
        return features.unflatten(0, prompts.shape[:2])

    def encode_images(self, images):
        """The two streams of the image tower, projected to the joint space.  Eq. 3

        images (B, 3, R, R), or the pair that `clip.encode_patches` made of them -> unit vectors: image (B, D),
        patches (B, P, D).
        """
        with torch.no_grad():   # the tower is frozen: what is learned begins behind it
            cls, patches = self.clip.encode_patches(images, self.stream) if torch.is_tensor(images) else images
        proj = self.clip.visual.proj
        return project(cls, proj), project(patches, proj, self.local_projection)

    def score(self, image, patches, global_text, local_text, kept=None):
        """Both branches on features at hand: unit (B, D), (B, P, D), (C, G, D), (C, L, D) -> logits (B, C), (B, C)."""
        local, plan = local_logits(patches, local_text, self.scale, self.n_support, self.epsilon, self.n_iters,
                                   self.plan_gradient)
        self.plan = plan.detach()                                                  # (B, C, K, L), kept for the log
        return global_logits(image, global_text, self.scale, kept), local

    def forward(self, images, kept=None):
        """Figure 1: images (B, 3, R, R) -> global logits (B, C), local logits (B, C).

        kept (B, k): the global prompts each image keeps; where None, they are drawn in training mode and all of
        them serve otherwise.
        """
        image, patches = self.encode_images(images)                                # (B, D), (B, P, D)
        global_text, local_text = self.encode_prompts()                            # (C, G, D), (C, L, D)
        if kept is None and self.training:
            kept = draw_prompts(len(image), len(self.global_prompts), self.prompt_dropout).to(image.device)
        return self.score(image, patches, global_text, local_text, kept)


@in_float32
def unit(features):
    """Each vector divided by its length: (..., D) -> (..., D)."""
    return F.normalize(features, dim=-1)


@in_float32
def project(tokens, proj, local_projection=None):
    """Tokens of the image tower as unit vectors of the joint space: (..., W) -> (..., D).  Eq. 3"""
    if local_projection is not None:
        # Eq. 3: Z_local = Z W_local-proj, then CLIP's projection. why: first the two matrices, tokens are many
        proj = local_projection @ proj                                             # (W, D)
    return unit(tokens @ proj)


def gather_shares(share, n_classes, rank, world):
    """Joins what the processes encoded: share (c, N, D) holds classes rank, rank + world, ... -> (n_classes, N, D)."""
    padding = -(-n_classes // world) - len(share)       # why: all_gather wants equal shapes; this also keeps the graph
    share = F.pad(share, (0, 0, 0, 0, 0, padding))      # of a process that has no class at all
    return GatherShares.apply(share, rank, world).flatten(0, 1)[:n_classes]


class GatherShares(torch.autograd.Function):
    """(c, ...) of each process -> (c, world, ...). Every process' loss needs all shares, so gradients add up."""

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


def tokenize_names(class_names, n_context, context_length):
    """[SOS] name [EOT] of every class, cut after the longest: tokens (C, S), places of [EOT] (C,).

    Underscores become spaces. Raises ValueError for a name that leaves no room for n_context prompt tokens.
    """
    names = [name.replace("_", " ") for name in class_names]                       # differs: released code keeps "_"
    tokens = torch.stack([clip.tokenize(name, context_length, truncate=True)[0] for name in names])
    eot = tokens.argmax(dim=-1)                                                    # [EOT] has the largest id
    for name, end in zip(names, eot.tolist()):
        if end + n_context >= context_length:
            raise ValueError(f"class name {name!r} is too long: [SOS], {n_context} prompt tokens, the name and [EOT] "
                             f"must fit into {context_length} tokens")
    return tokens[:, : int(eot.max()) + 1], eot
