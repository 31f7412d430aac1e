"""OpenAI's CLIP with a vision transformer, and the V-V stream of SOT-GLP (Eq. 2) beside it.

Read top to bottom: one attention layer -> one block -> the vision tower with its two streams ->
the text tower -> CLIP -> build_model. Written afresh for OpenAI's files: module and parameter names
are those of their state dicts, so that these load without renaming.

Letters:  B images  P patches  n texts  S tokens of a text  H heads  W tower width  D joint embedding width
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

STREAMS = ("vv", "qk", "value", "vv_alias")
LIMIT = 4 * 2**30                  # bytes that the weights may take: twice what the largest of OpenAI's take in float32
VOCABULARY = 49408                 # token ids of CLIP's tokenizer
BOOKKEEPING = {"input_resolution", "context_length", "vocab_size"}  # numbers that OpenAI stores among the weights


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

    def project(self, x):
        """Queries, keys and values of x: (B, S, W) -> three (B, H, S, W/H)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def project_one(self, x, one):
        """The query of one token, (B, 1, W), keys and values of all of x: -> (B, H, 1, W/H), two (B, H, S, W/H)."""
        W = x.shape[-1]
        q = F.linear(one, self.in_proj_weight[:W], self.in_proj_bias[:W])
        kv = F.linear(x, self.in_proj_weight[W:], self.in_proj_bias[W:])
        return (q.unflatten(-1, (self.heads, -1)).transpose(1, 2),
                *kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4))

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

    def add_mlp(self, x):
        return x + self.mlp(self.ln_2(x))

    def attend(self, x, causal=False):
        q, k, v = self.attn.project(self.ln_1(x))
        return self.attn.merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def forward(self, x, causal=False):
        return self.add_mlp(x + self.attend(x, causal))

    def forward_dual(self, x, z):
        """One block of both streams: x is CLIP's own stream, z collects V-V attention.  Eq. 2

        x, z: (B, 1+P, W). V is that of x, computed once for both streams. z has no perceptron.
        What it is for: CLIP was trained through CLS only, so its last patch tokens mix the whole image and say little
        about their own place. In V-V attention a token attends to tokens of similar content, and the sum starts from
        Z_0, so each token keeps to what is at its place. It can be compared with texts, and no new weight is needed.
        """
        q, k, v = self.attn.project(self.ln_1(x))
        # Eq. 2: Z_l = Z_{l-1} + Proj(softmax(V V^T / sqrt(d)) V), d being the width of one head.
        z = z + self.attn.merge(F.scaled_dot_product_attention(v, v, v))
        x = x + self.attn.merge(F.scaled_dot_product_attention(q, k, v))
        return self.add_mlp(x), z

    def forward_one(self, x, place=0, causal=False):
        """This block for the token at one place of each sequence: x (B, S, W), place (B,) or a number -> (B, W).

        why: nobody reads the other tokens after the last block. Of them it needs keys and values, but no perceptron.
        """
        rows, h = torch.arange(len(x), device=x.device), self.ln_1(x)
        q, k, v = self.attn.project_one(h, h[rows, place][:, None])
        seen = torch.arange(x.shape[1], device=x.device) <= place[:, None, None, None] if causal else None
        x = x[rows, place][:, None] + self.attn.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.add_mlp(x)[:, 0]

    def forward_dual_last(self, x, z):
        """forward_dual for what is read of the last block: CLS of CLIP's own stream (B, W), patches of z (B, P, W)."""
        h = self.ln_1(x)
        q, k, v = self.attn.project_one(h, h[:, :1])
        z = z[:, 1:] + self.attn.merge(F.scaled_dot_product_attention(v[:, :, 1:], v, v))
        x = x[:, :1] + self.attn.merge(F.scaled_dot_product_attention(q, k, v))
        return self.add_mlp(x)[:, 0], z

    def forward_value(self, x):
        """This block with its attention matrix replaced by the identity: each token sees itself alone."""
        _, _, v = self.attn.project(self.ln_1(x))
        return self.add_mlp(x + self.attn.merge(v))


class Transformer(nn.Module):
    """A stack of blocks; `heads` is width // 64 in every CLIP that OpenAI published."""

    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))

    def forward(self, x, place=0, causal=False, prompts=(), start=1):
        """All blocks, for the token at one place of each sequence: x (B, S, W), place (B,) or a number -> (B, W).

        prompts (J-1, n, W): deep prompts. Before block i, 0 < i < J, they take the place of the n tokens from `start`
        on; after block J-1 these tokens go on like others. Raises ValueError for more layers than there are blocks.
        """
        *blocks, last = self.resblocks
        if len(prompts) > len(blocks):
            raise ValueError(f"prompts for {len(prompts) + 1} layers, but this tower has {len(self.resblocks)} blocks")
        for i, block in enumerate(blocks):
            x = block(x, causal)
            if i < len(prompts):
                new = prompts[i].expand(len(x), -1, -1)                            # (B, n, W)
                x = torch.cat([x[:, :start], new, x[:, start + new.shape[1]:]], dim=1)
        return last.forward_one(x, place, causal)


class VisionTransformer(nn.Module):
    """The image tower. `forward` gives tokens after `ln_post`; `proj` leads from there to the joint space."""

    def __init__(self, resolution, patch, width, layers, embed_dim):
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def embed(self, images, prompts=None):
        """Images -> Z_0, the tokens that both streams start from: (B, 3, R, R) -> (B, 1+P, W).

        prompts (n, W): more tokens behind the patches, without a place of their own.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)                    # (B, P, W)
        cls = self.class_embedding.expand(len(images), 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self.positional_embedding
        if prompts is not None:
            tokens = torch.cat([tokens, prompts.expand(len(images), -1, -1)], dim=1)                # (B, 1+P+n, W)
        return self.ln_pre(tokens)

    def forward(self, images, stream="vv"):
        """Images -> CLS token of the ordinary stream (B, W), patch tokens of the chosen stream (B, P, W)."""
        if stream not in STREAMS:
            raise ValueError(f"unknown patch stream {stream!r}: choose one of {', '.join(STREAMS)}")
        x = z = self.embed(images)                                                 # Sec. 3.2: Z_0^ori = Z_0^vv = Z_0
        if stream == "vv_alias":   # differs: the released code adds this too, by an in-place sum in the first block
            z = z + self.transformer.resblocks[0].attend(z)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x, z = block.forward_dual(x, z) if stream.startswith("vv") else (block(x), None)
        if stream.startswith("vv"):
            cls, patches = last.forward_dual_last(x, z)
        elif stream == "value":
            cls, patches = last.forward_one(x), last.forward_value(x[:, 1:])
        else:
            x = last(x)
            cls, patches = x[:, 0], x[:, 1:]
        return self.ln_post(cls), self.ln_post(patches)


class CLIP(nn.Module):
    """Both towers, frozen and always in evaluation mode."""

    def __init__(self, embed_dim, resolution, patch, vision_width, vision_layers,
                 context_length, vocab_size, text_width, text_layers):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(resolution, patch, vision_width, vision_layers, embed_dim)
        self.transformer = Transformer(text_width, text_layers)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.empty([]))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def store_matrices(self, dtype):
        """Casts the weights of matrix products to half precision, for use under autocast. The rest stays as it is.

        why: autocast would cast these frozen weights anew at every call.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def encode_patches(self, images, stream="vv"):
        """Images -> tokens after `ln_post`, before the joint projection.  Eq. 2

        images (B, 3, R, R) at the model's resolution R -> CLS (B, W), patches (B, P, W).
        stream: "vv" the V-V stream, "vv_alias" that of the released code; "qk" ordinary patch tokens (Table 2, "w/o
        V-V"); "value" the last block with its attention matrix replaced by the identity (GL-MCM). Raises ValueError
        for any other.
        """
        return self.visual(images, stream)

    def encode_image(self, images, prompts=None):
        """Images (B, 3, R, R) -> image features (B, D), not normalised, as OpenAI's.

        prompts (J, n, W): deep prompts behind the patches, a row for each of the first J blocks.
        """
        first, *deeper = (None,) if prompts is None else prompts
        x = self.visual.transformer(self.visual.embed(images, first), prompts=deeper,
                                    start=len(self.visual.positional_embedding))
        return self.visual.ln_post(x) @ self.visual.proj

    def encode_embeddings(self, embeddings, eot, prompts=None):
        """Token embeddings (n, S, W) and the places of their [EOT] (n,) -> text features (n, D), not normalised.

        This is how learned prompts enter the text tower (Eq. 1): S may be any length up to the context length.
        prompts (J-1, m, W): deep prompts in the places 1 to m, a row for each of the blocks 1 to J-1.
        """
        x = embeddings + self.positional_embedding[: embeddings.shape[1]]
        x = self.transformer(x, eot, causal=True, prompts=() if prompts is None else prompts)
        return self.ln_final(x) @ self.text_projection

    def encode_behind(self, prefix, texts, eot):
        """Text features of texts that begin alike: prefix (N, Q, W) before texts (n, N, S, W) -> (n, N, D).

        The same as `encode_embeddings` of prefix and text in one; eot (n,): places of [EOT], counted in the texts.
        why: the mask is causal, so a prefix does not depend on what follows. Its keys and values serve all n texts.
        """
        n, N, S, _ = texts.shape
        Q, rows = prefix.shape[1], torch.arange(n * N, device=texts.device)
        p = prefix + self.positional_embedding[:Q]
        x = (texts + self.positional_embedding[Q : Q + S]).flatten(0, 1)           # (nN, S, W)
        eot = eot.repeat_interleave(N)
        seen = torch.ones(S, Q + S, dtype=torch.bool, device=x.device).tril(Q)     # what each token attends to
        for block in self.transformer.resblocks:
            q_p, *before = block.attn.project(block.ln_1(p))                       # (N, H, Q, W/H) each
            q, *behind = block.attn.project(block.ln_1(x))                         # (nN, H, S, W/H) each
            if block is self.transformer.resblocks[-1]:                            # of which [EOT] alone is read
                x, q, seen = x[rows, eot][:, None], q[rows, :, eot][:, :, None], seen[eot][:, None, None]
            k, v = (torch.cat([a.repeat(n, 1, 1, 1), b], dim=2) for a, b in zip(before, behind))
            x = block.add_mlp(x + block.attn.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
            p = block.add_mlp(p + block.attn.merge(F.scaled_dot_product_attention(q_p, *before, is_causal=True)))
        return (self.ln_final(x[:, 0]) @ self.text_projection).unflatten(0, (n, N))

    def encode_text(self, tokens):
        """Token ids (n, S) from `clip.tokenize` -> text features (n, D), not normalised, as OpenAI's."""
        eot = tokens.argmax(dim=-1)                  # [EOT] has the largest id
        tokens = tokens[:, : int(eot.max()) + 1]     # why: the mask is causal, nothing after [EOT] can reach it
        return self.encode_embeddings(self.token_embedding(tokens), eot)


def build_model(state_dict):
    """An OpenAI state dict -> CLIP in float32, frozen. All sizes are read from the tensors' shapes.

    Raises ValueError for a ResNet, for a dict that is no CLIP, and with the name of every key that is
    missing, unexpected or of another shape.
    """
    if "visual.layer1.0.conv1.weight" in state_dict:
        raise ValueError("this CLIP has a ResNet image tower; SOT-GLP needs the patch tokens of a vision transformer: "
                         "use ViT-B/16, ViT-B/32 or ViT-L/14")
    if any(str(name).startswith(("vision_model.", "text_model.")) for name in state_dict):
        raise ValueError("these weights have the names of Hugging Face's transformers: --model ViT-B/16, ViT-B/32 and "
                         "ViT-L/14 are the same weights with OpenAI's; of other models save open_clip's state_dict()")
    check_plain(state_dict)
    weights = {k: v.float() for k, v in state_dict.items() if k not in BOOKKEEPING}
    try:
        vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
        tokens = weights["visual.positional_embedding"].shape[0]
        text_width, embed_dim = weights["text_projection"].shape
        context_length = weights["positional_embedding"].shape[0]
        vocab_size = weights["token_embedding.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these weights are no CLIP with a vision transformer: {error} not found as expected; "
                         f"the file begins with {', '.join(list(state_dict)[:3]) or 'nothing'}") from error
    vision_layers = count_layers(weights, "visual.transformer.resblocks.")
    text_layers = count_layers(weights, "transformer.resblocks.")
    grid = round(max(tokens - 1, 0) ** 0.5)
    for what, found, right, expected in (
            ("visual.conv1.weight: the width", vision_width, vision_width > 0 == vision_width % 64, "a multiple of 64"),
            ("visual.conv1.weight: the patch size", patch, patch > 0, "at least 1"),
            ("visual.positional_embedding: the token count", tokens, tokens == 1 + grid**2 > 1, "1 + a square"),
            ("text_projection: the width", text_width, text_width > 0 == text_width % 64, "a multiple of 64"),
            ("text_projection: the joint width", embed_dim, embed_dim > 0, "at least 1"),
            ("positional_embedding: the context length", context_length, context_length > 1, "at least 2"),
            ("token_embedding.weight: the vocabulary", vocab_size, vocab_size == VOCABULARY, VOCABULARY)):
        if not right:
            raise ValueError(f"these weights do not fit CLIP: {what} is {found}, expected {expected}")
    with torch.device("meta"):
        model = CLIP(embed_dim, grid * patch, patch, vision_width, vision_layers, context_length, vocab_size,
                     text_width, text_layers)
    check_keys(weights, model.state_dict())
    check_finite(weights, "these weights")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def check_finite(tensors, where):
    """Raises ValueError that names the first tensor, {name: tensor}, with a value that is not a finite number."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite numbers")


def check_plain(state_dict):
    """Raises ValueError for the first value that is not a dense tensor of numbers, and where all take too much."""
    size = 0
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"the weights are named by strings, found {name!r}")
        found = type(value).__name__
        if torch.is_tensor(value):
            found = f"a {value.layout} tensor of {value.dtype} on {value.device}".replace("torch.", "")
            plain = value.layout == torch.strided and not value.is_quantized and value.device.type != "meta"
            if plain and not value.is_complex() and value.dtype != torch.bool:
                needed = value.numel() * value.element_size()
                if needed <= value.untyped_storage().nbytes():
                    size += needed
                    continue
                found = f"of {needed} bytes, but {value.untyped_storage().nbytes()} bytes are stored"
        raise ValueError(f"{name!r} is {found}, expected a dense tensor of numbers")
    if size > LIMIT:
        raise ValueError(f"these weights take {size} bytes, more than {LIMIT}")


def count_layers(weights, prefix):
    """How many transformer blocks the keys with this prefix number. Raises ValueError unless that is 0, 1, 2, ..."""
    numbers = {k[len(prefix):].split(".")[0] for k in weights if k.startswith(prefix)}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise ValueError(f"these weights do not fit CLIP: the blocks of {prefix} are "
                         f"{', '.join(sorted(numbers)) or 'none'}, expected 0, 1, 2 and so on")
    return len(numbers)


def check_keys(found, wanted):
    """Raises ValueError that lists every missing, unexpected or misshapen key."""
    wrong = [f"missing {k}" for k in wanted if k not in found]
    wrong += [f"unexpected {k}" for k in found if k not in wanted]
    wrong += [f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}"
              for k in wanted if k in found and found[k].shape != wanted[k].shape]
    if wrong:
        raise ValueError("these weights do not fit CLIP: " + "; ".join(wrong))
