"""OpenAI's CLIP with a vision transformer, and the V-V stream of SOT-GLP (Eq. 2) beside it.

Read top to bottom: one attention layer -> one block, alone and with the V-V stream -> the image tower with
its streams -> CLIP with its text tower. Module and parameter names are those of OpenAI's state dicts, so that
these load without renaming. The exact shortcuts at the end save work and change no number.

Letters:  B images  P patches  n texts  S tokens of a sequence  H heads  W tower width  D joint embedding
width
"""

if __name__ == "__main__":
    raise SystemExit("clip/model.py is no command: python train.py reads it")

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .precision import to_joint_space

STREAMS = ("vv", "qk", "value", "released_vv")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI trained with."""

    def forward(self, x):
        return F.silu(1.702 * x).div_(1.702)  # why: the same function in three passes, the last one in place


class Attention(nn.Module):
    """Multi-head attention that gives its queries, keys and values one by one."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def to_qkv(self, x):
        """Queries, keys and values of x: (B, S, W) -> three (B, H, S, W/H)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                  # (B, S, 3W)
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def merge(self, heads):
        """Joins the heads and applies the output projection: (B, H, S, W/H) -> (B, S, W)."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        """CLIP's own block: (B, S, W) -> (B, S, W)."""
        return self.add_mlp(x + self.attend(x, causal))

    def attend(self, x, causal=False):
        q, k, v = self.attn.to_qkv(self.ln_1(x))
        return self.attn.merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def add_mlp(self, x):
        return x + self.mlp(self.ln_2(x))

    def forward_dual(self, x, z):
        """One block of both streams: x is CLIP's own stream, z collects V-V attention.  Eq. 2

        x, z: (B, 1+P, W). V is that of x, computed once for both streams. z has no perceptron. What it is
        for: CLIP was trained through CLS only, so its last patch tokens mix the whole image and say little
        about their own place. In V-V attention a token attends to tokens of similar content, and the sum
        starts from Z_0, so each token keeps to what is at its place. It can be compared with texts, and no
        new weight is needed.
        """
        q, k, v = self.attn.to_qkv(self.ln_1(x))

        # Eq. 2: Z_l = Z_{l-1} + Proj(softmax(V V^T / sqrt(d)) V)
        # differs: Eq. 2 has one softmax, CLIP's attention has one per head, whose width is d; and Eq. 2 does
        # not say whose V it is, here it is that of x (PAPER.md, decision 1)
        z = z + self.attn.merge(F.scaled_dot_product_attention(v, v, v))

        x = x + self.attn.merge(F.scaled_dot_product_attention(q, k, v))
        return self.add_mlp(x), z

    def forward_value(self, x):
        """This block with the identity as attention matrix: each token sees itself alone.  GL-MCM"""
        _, _, v = self.attn.to_qkv(self.ln_1(x))
        return self.add_mlp(x + self.attn.merge(v))


class Transformer(nn.Module):
    """A stack of blocks; a head is 64 wide in every CLIP that OpenAI published."""

    def __init__(self, width, layers, head_width=64):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, width // head_width) for _ in range(layers))

    def forward(self, x, position=0, causal=False, prompts=(), start=1):
        """All blocks, for the token at one position of each sequence: x (B, S, W), position (B,) -> (B, W).

        prompts (J-1, n, W): deep prompts. Before block i, 0 < i < J, they replace the n tokens from `start`
        on; behind block J-1 these tokens go on like others. Raises ValueError for more layers than there are
        blocks.
        """
        *blocks, last = self.resblocks
        if len(prompts) > len(blocks):
            raise ValueError(f"prompts for {len(prompts) + 1} layers, but this tower has "
                             f"{len(self.resblocks)} blocks")

        for i, block in enumerate(blocks):
            x = block(x, causal)
            if i < len(prompts):
                new = prompts[i].expand(len(x), -1, -1)                            # (B, n, W)
                x = torch.cat([x[:, :start], new, x[:, start + new.shape[1]:]], dim=1)
        return forward_one(last, x, position, causal)          # = last(x, causal) at `position`


class VisionTransformer(nn.Module):
    """The image tower. `forward` gives tokens after `ln_post`; `proj` leads from there to the joint space."""

    def __init__(self, resolution, patch, width, layers, embed_dim, head_width=64):
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, head_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def embed(self, images, prompts=None):
        """Images -> Z_0, the tokens that both streams start from: (B, 3, R, R) -> (B, 1+P, W).

        prompts (n, W): more tokens behind the patches, without position embeddings.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)                    # (B, P, W)
        cls = self.class_embedding.expand(len(images), 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self.positional_embedding
        if prompts is not None:
            tokens = torch.cat([tokens, prompts.expand(len(images), -1, -1)], dim=1)           # (B, 1+P+n, W)
        return self.ln_pre(tokens)

    def forward(self, images, stream="vv"):
        """Images -> CLS of the ordinary stream (B, W), patches of the chosen stream (B, P, W).  Eq. 2"""
        if stream not in STREAMS:
            raise ValueError(f"unknown patch stream {stream!r}: choose one of {', '.join(STREAMS)}")
        if stream in ("vv", "released_vv"):
            cls, patches = self.both_streams(images, stream)
        else:
            cls, patches = self.own_stream(images, stream)
        return self.ln_post(cls), self.ln_post(patches)

    def both_streams(self, images, stream):
        """CLS of CLIP's own stream (B, W), patches of the V-V stream (B, P, W).  Eq. 2"""
        x = z = self.embed(images)                             # Sec. 3.2: Z_0^ori = Z_0^vv = Z_0
        if stream == "released_vv":
            # differs: the released code adds this too, by an in-place sum in the first block
            z = z + self.transformer.resblocks[0].attend(z)

        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x, z = block.forward_dual(x, z)
        return forward_dual_last(last, x, z)           # = last.forward_dual(x, z): CLS of x, patches of z

    def own_stream(self, images, stream):
        """CLS (B, W), patches (B, P, W) of CLIP's own stream; "value": no attention in the last block."""
        x = self.embed(images)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x)
        if stream == "value":
            return forward_one(last, x), last.forward_value(x[:, 1:])
        x = last(x)
        return x[:, 0], x[:, 1:]


class CLIP(nn.Module):
    """Both towers, frozen and always in evaluation mode."""

    def __init__(self, embed_dim, resolution, patch, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers, vision_head_width=64):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(resolution, patch, vision_width, vision_layers, embed_dim,
                                        vision_head_width)
        self.transformer = Transformer(text_width, text_layers)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.empty([]))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def encode_patches(self, images, stream="vv"):
        """Images -> tokens after `ln_post`, before the joint projection.  Eq. 2

        images (B, 3, R, R) at the model's resolution R -> CLS (B, W), patches (B, P, W). stream: "vv" the V-V
        stream, "released_vv" that of the released code; "qk" ordinary patch tokens (Table 2, "w/o V-V");
        "value" the last block with its attention matrix replaced by the identity (GL-MCM). Raises ValueError
        for any other.
        """
        return self.visual(images, stream)

    def encode_image(self, images, prompts=None):
        """Images (B, 3, R, R) -> image features (B, D), not normalised, as OpenAI's.

        prompts (J, n, W): deep prompts behind the patches, a row for each of the first J blocks.
        """
        first, *deeper = (None,) if prompts is None else prompts
        x = self.visual.embed(images, first)
        x = self.visual.transformer(x, prompts=deeper, start=len(self.visual.positional_embedding))
        return to_joint_space(self.visual.ln_post(x), self.visual.proj)

    def encode_text(self, tokens):
        """Token ids (n, S) from `clip.tokenize` -> text features (n, D), not normalised, as OpenAI's.

        The tokens may lie on the CPU: then their length is known without waiting for a GPU.
        """
        eot = tokens.argmax(dim=-1)                  # [EOT] has the largest id
        tokens = tokens[:, : int(eot.max()) + 1]   # why: the mask is causal, nothing after [EOT] can reach it
        tokens, eot = (part.to(self.logit_scale.device, non_blocking=True) for part in (tokens, eot))
        return self.encode_embeddings(self.token_embedding(tokens), eot)

    def encode_embeddings(self, embeddings, eot, prompts=None):
        """Token embeddings (n, S, W), the places of their [EOT] (n,) -> text features (n, D), not normalised.

        This is how learned prompts enter the text tower (Eq. 1): S may be any length up to the context
        length. prompts (J-1, m, W): deep prompts in the places 1 to m, a row for each of the blocks 1 to J-1.
        """
        x = embeddings + self.positional_embedding[: embeddings.shape[1]]
        x = self.transformer(x, eot, causal=True, prompts=() if prompts is None else prompts)
        return to_joint_space(self.ln_final(x), self.text_projection)

    def encode_with_prefix(self, prefix, embeddings, eot):
        """Features of texts that begin alike: prefix (N, Q, W) before embeddings (n, N, S, W) -> (n, N, D).

        The same as `encode_embeddings` of prefix and rest in one; eot (n,): places of [EOT], counted in the
        rest.
        """
        x = run_with_prefix(self, prefix, embeddings, eot)
        return to_joint_space(self.ln_final(x), self.text_projection)

    def store_matrices(self, dtype):
        """Casts the weights of matrix products to half precision, for use under autocast.

        why: autocast would cast these frozen weights anew at every call.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)


# ---- exact shortcuts: skip on first reading ----------------------------------------------------------------

def forward_one(block, x, position=0, causal=False):
    """`block(x, causal)` for the token at one position of each sequence: (B, S, W), (B,) -> (B, W).

    why: nobody reads the other tokens after the last block. Of them it needs keys and values, but no
    perceptron.
    """
    rows = torch.arange(len(x), device=x.device)
    h = block.ln_1(x)
    q, k, v = one_query(block.attn, h, h[rows, position][:, None])
    seen = None
    if causal:
        seen = torch.arange(x.shape[1], device=x.device) <= position[:, None, None, None]     # (B, 1, 1, S)
    x = x[rows, position][:, None] + block.attn.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return block.add_mlp(x)[:, 0]


def forward_dual_last(block, x, z):
    """`block.forward_dual(x, z)` for what is read of it: CLS of x (B, W), patches of z (B, P, W)."""
    h = block.ln_1(x)
    q, k, v = one_query(block.attn, h, h[:, :1])
    z = z[:, 1:] + block.attn.merge(F.scaled_dot_product_attention(v[:, :, 1:], v, v))
    x = x[:, :1] + block.attn.merge(F.scaled_dot_product_attention(q, k, v))
    return block.add_mlp(x)[:, 0], z


def one_query(attention, x, one):
    """The query of one token (B, 1, W), keys and values of x: -> (B, H, 1, W/H), two (B, H, S, W/H)."""
    W = x.shape[-1]
    weight = attention.in_proj_weight
    bias = attention.in_proj_bias
    q = F.linear(one, weight[:W], bias[:W]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    k, v = F.linear(x, weight[W:], bias[W:]).unflatten(-1, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def run_with_prefix(clip, prefix, embeddings, eot):
    """The text tower before `ln_final`, for texts that begin alike: (N, Q, W), (n, N, S, W) -> (n, N, W).

    why: the mask is causal, so a prefix does not depend on what follows. Its keys and values serve all n
    texts.
    """
    n, N, S, _ = embeddings.shape
    Q = prefix.shape[1]
    rows = torch.arange(n * N, device=embeddings.device)
    p = prefix + clip.positional_embedding[:Q]
    x = (embeddings + clip.positional_embedding[Q : Q + S]).flatten(0, 1)          # (nN, S, W)
    eot = eot.repeat_interleave(N)
    seen = torch.ones(S, Q + S, dtype=torch.bool, device=x.device).tril(Q)        # what each token attends to

    for block in clip.transformer.resblocks:
        q_p, k_p, v_p = block.attn.to_qkv(block.ln_1(p))                           # (N, H, Q, W/H) each
        q, k, v = block.attn.to_qkv(block.ln_1(x))                                 # (nN, H, S, W/H) each
        k = torch.cat([k_p.repeat(n, 1, 1, 1), k], dim=2)                          # (nN, H, Q+S, W/H)
        v = torch.cat([v_p.repeat(n, 1, 1, 1), v], dim=2)

        if block is clip.transformer.resblocks[-1]:                             # of which [EOT] alone is read
            x = x[rows, eot][:, None]                                              # (nN, 1, W)
            q = q[rows, :, eot][:, :, None]
            seen = seen[eot][:, None, None]
        x = block.add_mlp(x + block.attn.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
        p = block.add_mlp(p + block.attn.merge(F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True)))
    return x[:, 0].unflatten(0, (n, N))
