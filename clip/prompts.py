"""Learned prompts in front of class names, encoded by the frozen text tower: Eq. 1 of SOT-GLP.

`encode_own` is Eq. 1 as it stands in the paper. `encode_shared` gives the same for prompts that all classes
share, with less work. What serves many classes (chunks) and many processes (shares) stands below the two.

Letters:  C classes, c of them at once   N prompts of any kind   M tokens per prompt   J blocks with prompts
          S tokens of [SOS] name [EOT]   D joint embedding width   W width of the text tower
"""

if __name__ == "__main__":
    raise SystemExit("clip/prompts.py is no command: python train.py reads it")

from functools import partial

import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .precision import unit
from .tokenizer import SOS, tokenize

FEW_CLASSES = 100    # up to here kernel launches, not work, decide how long a step in half precision takes
TEMPLATE = "a photo of a"  # Sec. 3.1: tau_init; it also fixes M = 4


class ClassTexts:
    """The texts of all classes: calling it with prompts gives their features.  Eq. 1

    clip_model: a `clip.CLIP`; class_names: C strings, in the order of their labels. text_chunk: classes that
    go through the text tower at once; checkpoint_text: compute the activations again in the backward pass
    instead of keeping them; ranks: (rank, world) of the processes that share the work.
    """

    def __init__(self, clip_model, class_names, text_chunk=200, checkpoint_text=False, ranks=(0, 1)):
        self.clip = clip_model
        self.class_names = class_names
        self.ranks = ranks
        self.text_chunk = text_chunk
        self.checkpoint_text = checkpoint_text
        # why: on a CPU, and with many classes, `encode_shared` saves work; else it costs twice the launches
        on_gpu = clip_model.logit_scale.device.type == "cuda"
        self.saves_launches = on_gpu and len(class_names) <= FEW_CLASSES
        self.tokenized = {}

    def __call__(self, prompts, suffix="", deep=None, raw=False):
        """[SOS], prompt, class name, suffix, [EOT] for each prompt and class -> unit (C, N, D).  Eq. 1

        prompts: (N, M, W) for all classes, or (C, N, M, W); deep (J-1, n, W): what replaces the first n of
        the M tokens in deeper blocks; raw: features as the tower gives them, not of unit length. With several
        ranks each process encodes its share of the classes and receives the other shares, so all processes
        must call this together.
        """
        tokens, eot, chunks, order = self.prepare(prompts.shape[-2], suffix)
        shared = prompts.dim() == 3 and deep is None and not self.saves_launches
        if shared:
            encode = self.encode_shared
        else:
            encode = partial(self.encode_own, deep=deep)
            prompts = prompts.expand(len(self.class_names), -1, -1, -1)            # (C, N, M, W)
        if self.checkpoint_text:
            encode = partial(checkpoint, encode, use_reentrant=False)

        features = []
        for classes, longest in chunks:
            chunk_prompts = prompts if shared else prompts[classes]
            features.append(encode(chunk_prompts, tokens[classes, :longest], eot[classes]))
        features = torch.cat(features)                                          # (c, N, D), this rank's share
        if not raw:
            features = unit(features)

        if self.ranks[1] > 1:
            # (C, N, D), still sorted by length
            features = gather_shares(features, len(self.class_names), *self.ranks)
        return features[order.argsort()]        # in the order of the labels

    def encode_both(self, shared, own):
        """Two kinds of prompts -> the features of each, unit (C, N, D).  Eq. 1"""
        if not self.saves_launches:
            return self(shared), self(own)
        C = len(self.class_names)
        shared = shared.expand(C, -1, -1, -1)
        own = own.expand(C, -1, -1, -1)
        both = self(torch.cat([shared, own], dim=1))
        return both.split([shared.shape[1], own.shape[1]], dim=1)

    def encode_own(self, prompts, tokens, eot, deep=None):
        """Prompts (c, N, M, W), [SOS] name [EOT] (c, S) of some classes -> raw (c, N, D).  Eq. 1"""
        N, M = prompts.shape[1:3]
        names = self.clip.token_embedding(tokens)[:, None].expand(-1, N, -1, -1)   # (c, N, S, W)

        # Eq. 1: [SOS]; prompt; class name; [EOT].
        # why nothing after the longest name of a chunk: the mask is causal, so it could not reach any [EOT]
        embeddings = torch.cat([names[:, :, :1], prompts, names[:, :, 1:]], dim=2) # (c, N, M+S, W)

        places = (eot + M).repeat_interleave(N)                                    # (cN,), of [EOT]
        deep_prompts = () if deep is None else (deep,)
        features = self.clip.encode_embeddings(embeddings.flatten(0, 1), places, *deep_prompts)
        return features.unflatten(0, (-1, N))

    def encode_shared(self, prompts, tokens, eot):
        """Prompts (N, M, W) for all classes, [SOS] name [EOT] (c, S) of some -> raw (c, N, D).  Eq. 1"""
        N = len(prompts)
        sos = self.clip.token_embedding.weight[SOS]                                # (W,)
        prefix = torch.cat([sos.expand(N, 1, -1), prompts], dim=1)                 # (N, 1+M, W)
        names = self.clip.token_embedding(tokens[:, None, 1:]).expand(-1, N, -1, -1)   # (c, N, S-1, W)
        return self.clip.encode_with_prefix(prefix, names, eot - 1)

    def prepare(self, n_context, suffix=""):
        """Tokenises the names once -> tokens (C, S), places of [EOT] (C,), this process's chunks, order (C,).

        A chunk: (class numbers, tokens of the longest name). order: all class numbers, those of short names
        first. Raises ValueError for a name that does not fit into the context with a prompt of n_context
        tokens.
        """
        if (n_context, suffix) not in self.tokenized:
            self.tokenized[n_context, suffix] = self._prepare(n_context, suffix)
        return self.tokenized[n_context, suffix]

    def _prepare(self, n_context, suffix):
        device = self.clip.logit_scale.device
        rank, world = self.ranks
        tokens, eot = tokenize_names(self.class_names, n_context, self.clip.context_length, suffix)
        order = eot.argsort(stable=True)

        # why: every world-th of the sorted names, so that the processes have equal work; chunks, to bound
        # memory
        share = order[rank::world]
        chunks = []
        for classes in share.tensor_split(chunk_boundaries(eot[share].tolist(), self.text_chunk)):
            longest = max(eot[classes].tolist(), default=1) + 1
            chunks.append((classes.to(device), longest))
        return tokens.to(device), eot.to(device), chunks, order.to(device)

    def check_names(self, n_context, suffix=""):
        """Raises ValueError for a class name that does not fit behind a prompt of n_context tokens."""
        self.prepare(n_context, suffix)

    def equal_names(self):
        """Groups of class names that are one text to this CLIP, as words may be that it never saw."""
        tokens, *_ = self.prepare(0)
        _, texts = self.clip.token_embedding(tokens).flatten(1).unique(dim=0, return_inverse=True)    # (C,)
        groups = {}
        for name, text in zip(self.class_names, texts.tolist()):
            groups.setdefault(text, []).append(name)
        return [group for group in groups.values() if len(group) > 1]


def tokenize_names(class_names, n_context, context_length, suffix=""):
    """[SOS] name suffix [EOT] of every class, cut after the longest: tokens (C, S), places of [EOT] (C,).

    Raises ValueError for a name that leaves no room for n_context prompt tokens.
    """
    names = [name + suffix for name in class_names]
    tokens = torch.stack([tokenize(name, context_length, truncate=True)[0] for name in names])
    eot = tokens.argmax(dim=-1)                                                    # [EOT] has the largest id
    for name, end in zip(names, eot.tolist()):
        if end + n_context >= context_length:
            raise ValueError(f"class name {name!r} is too long: [SOS], {n_context} prompt tokens, the name "
                             f"and [EOT] must fit into {context_length} tokens")
    return tokens[:, : int(eot.max()) + 1], eot


# ---- many classes ------------------------------------------------------------------------------------------

def chunk_boundaries(lengths, most):
    """Where a sorted list of lengths is cut into chunks: after `most` items, and where lengths grow.

    why where they grow: a chunk is as long as its longest name, so it should hold no other lengths. why not
    always: a chunk of few classes keeps a GPU waiting for its next command.
    """
    boundaries = []
    start = 0
    for i in range(1, len(lengths)):
        if i - start == most or (lengths[i] > lengths[i - 1] and i - start >= most // 8):
            boundaries.append(i)
            start = i
    return boundaries


# ---- many processes ----------------------------------------------------------------------------------------

def gather_shares(share, n, rank, world):
    """Joins rows of all processes: share (c, ...) holds the rows rank, rank + world, ... of n -> (n, ...)."""
    # why: all_gather needs equal shapes; padding also keeps autograd connected on a process without rows
    missing = -(-n // world) - len(share)
    share = F.pad(share, (0, 0) * (share.dim() - 1) + (0, missing))
    return GatherShares.apply(share, rank, world).flatten(0, 1)[:n]


class GatherShares(torch.autograd.Function):
    """(c, ...) of each process -> (c, world, ...). Each loss needs all shares, so gradients add up."""

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
