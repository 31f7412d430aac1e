"""The computation as one writes it first, without what makes it fast. extras/bench.py compares with it.

It gives the same numbers: 77 tokens, every row through every block, global and local prompts one after the
other, each image stream by a pass of its own.

What makes the code fast, each trick exact and tested against the plain form:
- Texts are cut after the longest [EOT] of a chunk (the mask is causal), and chunks where names get longer.
- Prompts that all classes share go through the text tower once.
- The last blocks compute what is read.
- The V-V stream takes V from the ordinary one.
- The frozen towers build no graph for weights.
- The local projection is multiplied with CLIP's before the patches are.
- Transport has a fixed number of iterations and keeps its problems in the contiguous dimension.
- With several processes each encodes its share of the classes.
`tricks` sets each of them alone against its plain form.
"""

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.nn.functional as F

from clip.prompts import ClassTexts
from sinkhorn import sinkhorn
from sotglp import project


def plain_texts(model):
    """All prompts, 77 tokens each, the global ones and then the local ones -> (C, G, D), (C, L, D)."""
    C = len(model.class_names)
    tokens = torch.stack([clip.tokenize(name.replace("_", " "))[0] for name in model.class_names])
    tokens = tokens.to(model.global_prompts.device)                               # (C, 77)
    names = model.clip.token_embedding(tokens)[:, None]                           # (C, 1, 77, W)

    features = []
    for prompts in (model.global_prompts.expand(C, -1, -1, -1), model.local_prompts):
        N, M = prompts.shape[1:3]
        sos = names[:, :, :1].expand(-1, N, -1, -1)
        name = names[:, :, 1 : 77 - M].expand(-1, N, -1, -1)
        texts = torch.cat([sos, prompts, name], dim=2)                            # (C, N, 77, W)

        x = texts.flatten(0, 1) + model.clip.positional_embedding
        for block in model.clip.transformer.resblocks:
            x = block(x, causal=True)
        eot = (tokens.argmax(-1) + M).repeat_interleave(N)
        x = (model.clip.ln_final(x) @ model.clip.text_projection)[torch.arange(len(x)), eot]
        features.append(F.normalize(x, dim=-1).unflatten(0, (C, N)))              # (C, N, D)
    return features


def plain_sinkhorn(cost, epsilon=0.1, n_iters=20):
    """Two potentials beside the cost, problems in front: (..., K, L) -> plan (..., K, L).  Eq. 9"""
    K, L = cost.shape[-2:]
    f = cost.new_zeros(cost.shape[:-1])                                           # (..., K)
    g = cost.new_zeros((*cost.shape[:-2], L))                                     # (..., L)
    log_a = cost.new_tensor(1 / K).log()
    log_b = cost.new_tensor(1 / L).log()

    for _ in range(n_iters):
        f = epsilon * (log_a - torch.logsumexp((g[..., None, :] - cost) / epsilon, dim=-1))
        g = epsilon * (log_b - torch.logsumexp((f[..., :, None] - cost) / epsilon, dim=-2))
    return ((f[..., :, None] + g[..., None, :] - cost) / epsilon).exp()


def plain_forward(model, images, kept):
    """Global and local logits (B, C), step by step. kept: the global prompts of each image.  Eq. 2-11"""
    image = F.normalize(model.clip.encode_image(images), dim=-1)                  # (B, D)
    _, patches = model.clip.encode_patches(images)
    patches = F.normalize(patches @ model.local_projection @ model.clip.visual.proj, dim=-1)      # (B, P, D)
    global_text, local_text = plain_texts(model)

    cosines = torch.einsum("bd,cgd->bcg", image, global_text)
    cosines = cosines.gather(2, kept[:, None].expand(-1, len(global_text), -1)).mean(-1)          # (B, C)

    similarity = torch.einsum("bpd,cld->bcpl", patches, local_text)
    best = similarity.mean(-1).topk(model.n_support, dim=-1).indices              # (B, C, K)
    best = best[..., None].expand(-1, -1, -1, similarity.shape[-1])
    similarity = similarity.gather(2, best)                                       # (B, C, K, L)
    phi = (plain_sinkhorn(1 - similarity) * similarity).sum((-2, -1))             # (B, C)
    return model.scale * cosines, model.scale * phi


# ---- each trick alone --------------------------------------------------------------------------------------

def with_gradient(leaf, output):
    """The output, and the gradient of the sum of its cubes. why: the squares of a unit vector add up to 1."""
    return output, *torch.autograd.grad(output.pow(3).sum(), leaf)


def tricks(model, images):
    """{trick: (plain, ours)}: each trick alone, where that can be told apart. All functions give tensors."""
    device = images.device
    return text_tricks(model, device) | image_tricks(model, images) | local_tricks(model, device)


def text_tricks(model, device):
    """Those of the text tower, on 40 texts of 10 tokens."""
    clip_model = model.clip
    shared = model.global_prompts
    one_per_class = shared.expand(len(model.class_names), -1, -1, -1)
    once = ClassTexts(clip_model, model.class_names)
    once.saves_launches = False                        # why: else a GPU takes the plain form for both
    texts = torch.randn(40, 10, shared.shape[-1], device=device, requires_grad=True)
    eot = torch.full((40,), 9, device=device)

    def ours():
        return with_gradient(texts, clip_model.encode_embeddings(texts, eot))

    def padded():                                      # to 77 tokens
        long = F.pad(texts, (0, 0, 0, 67))
        return with_gradient(texts, clip_model.encode_embeddings(long, eot))

    def all_rows():                                    # of the last block, where [EOT] alone is read
        x = texts + clip_model.positional_embedding[:10]
        for block in clip_model.transformer.resblocks:
            x = block(x, causal=True)
        x = x[torch.arange(40, device=device), eot]
        return with_gradient(texts, clip_model.ln_final(x) @ clip_model.text_projection)

    return {"no token behind [EOT]": (padded, ours),
            "last text block for [EOT] alone": (all_rows, ours),
            "shared prompts once for all classes": (
                lambda: with_gradient(shared, once(one_per_class)),
                lambda: with_gradient(shared, once(shared)))}


def image_tricks(model, images):
    """Those of the image tower."""
    clip_model = model.clip
    visual = clip_model.visual

    def two_passes():
        return clip_model.encode_image(images), clip_model.encode_patches(images)[1]

    def one_pass():
        cls, patches = clip_model.encode_patches(images)
        return cls @ visual.proj, patches

    def all_tokens():                                  # of the last block of both streams
        x = z = visual.embed(images)
        for block in visual.transformer.resblocks:
            x, z = block.forward_dual(x, z)
        return visual.ln_post(x[:, 0]), visual.ln_post(z[:, 1:])

    return {"one pass for both image streams": (two_passes, one_pass),
            "last image block for what is read": (all_tokens, lambda: clip_model.encode_patches(images))}


def local_tricks(model, device):
    """Those of single operations, on random tensors."""
    visual = model.clip.visual
    gelu = model.clip.transformer.resblocks[0].mlp.gelu
    hidden = torch.randn(4 * 197, 3072, device=device)
    tokens = torch.randn(4 * 196, 768, device=device)
    cost = torch.rand(32, 100, 10, 4, device=device)

    def projections_in_turn():
        return [F.normalize(tokens @ model.local_projection @ visual.proj, dim=-1)]

    return {"QuickGELU in place": (lambda: [hidden * torch.sigmoid(1.702 * hidden)], lambda: [gelu(hidden)]),
            "projections multiplied first": (projections_in_turn,
                                             lambda: [project(tokens, visual.proj, model.local_projection)]),
            "transport with its problems last": (lambda: [plain_sinkhorn(cost)], lambda: [sinkhorn(cost)])}
