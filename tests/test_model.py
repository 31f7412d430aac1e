"""The towers: Eq. 2 by hand, the ordinary streams against torch's own attention, loading by name and shape."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
import clip.model
from clip.model import CLIP, Block, forward_dual_last
from clip.weights import build_model

from conftest import own_copy, random_clip


def test_vv_attention_by_hand():
    # One head of width 2, two tokens (1, -1) and (-1, 1), which ln_1 leaves as they are (mean 0, variance 1).
    # W_v picks the first coordinate times c: V = (c, 0), (-c, 0), so V V^T / sqrt(2) = c^2 / sqrt(2) [[1, -1], [-1, 1]].
    # Softmax of a row: (s, 1 - s) with s = sigmoid(sqrt(2) c^2). c^2 = ln(3) / sqrt(2) makes s = 3/4,
    # and Y = (3/4 - 1/4) V = V / 2. Output projection: twice the identity plus the bias (10, 20).
    # Z_1 = Z_0 + Proj(Y) = Z_0 + (+-c, 0) + (10, 20), for a Z_0 of ((5, 6), (7, 8)).
    block, c = Block(2, 1), math.sqrt(math.log(3) / math.sqrt(2))
    with torch.no_grad():
        block.attn.in_proj_weight.normal_()
        block.attn.in_proj_weight[4:] = torch.tensor([[c, 0], [0, 0]])
        block.attn.in_proj_bias.normal_()
        block.attn.in_proj_bias[4:] = 0
        block.attn.out_proj.weight.copy_(2 * torch.eye(2))
        block.attn.out_proj.bias.copy_(torch.tensor([10.0, 20]))
        _, z = block.forward_dual(torch.tensor([[[1.0, -1], [-1, 1]]]), torch.tensor([[[5.0, 6], [7, 8]]]))
    torch.testing.assert_close(z, torch.tensor([[[15 + c, 26], [17 - c, 28]]]), atol=1e-4, rtol=0)


# ---- both towers, written out from their weights ---------------------------------------------------------------

def uneven_clip():
    """A CLIP of towers that differ in width (one head, three heads) and depth; 9 patches, 12 tokens."""
    return own_copy(drawn_uneven_clip())


@functools.cache
def drawn_uneven_clip():
    model = CLIP(24, 24, 8, 64, 1, 12, 49408, 192, 3)
    for name, p in model.named_parameters():
        p.data = ("ln_" in name and name.endswith("weight")) + 0.1 * torch.randn(p.shape)
    return model


@pytest.fixture(params=[random_clip, uneven_clip])
def any_clip(request):
    return request.param()


def layer_norm(x, layer):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def embedded(tower, images):
    """Z_0: pieces of 8 by 8 pixels, row by row, times the weights; the class token before them; places; ln_pre."""
    patches = F.unfold(images, 8, stride=8).transpose(1, 2) @ tower.conv1.weight.flatten(1).T           # (B, P, W)
    cls = tower.class_embedding[None, None].repeat(len(images), 1, 1)
    return layer_norm(torch.cat([cls, patches], dim=1) + tower.positional_embedding[None], tower.ln_pre)


def attended(block, x, causal):
    """torch's nn.MultiheadAttention, heads of width 64."""
    mask = torch.full((x.shape[1],) * 2, -math.inf).triu(1) if causal else None
    attention = nn.MultiheadAttention(x.shape[-1], x.shape[-1] // 64, batch_first=True)
    attention.load_state_dict(block.attn.state_dict())
    h = layer_norm(x, block.ln_1)
    return x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]


def perceptron(block, x):
    """x * sigmoid(1.702 x) between two linear layers, as OpenAI describe it."""
    h = layer_norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    return x + (h * torch.sigmoid(1.702 * h)) @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def ordinary_stream(blocks, x, causal=False):
    for block in blocks:
        x = perceptron(block, attended(block, x, causal))
    return x


def values(block, x):
    """V (B, H, 1+P, 64): the last third of the rows of in_proj, those of Q and K come before."""
    width = x.shape[-1]
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
    return (layer_norm(x, block.ln_1) @ weight.T + bias).unflatten(-1, (-1, 64)).transpose(1, 2)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_vv_stream_is_z0_plus_every_blocks_vv_attention(any_clip):
    # Eq. 2 written out: all blocks, V from the ordinary stream, residual from Z_0, CLS a key and value, no perceptron
    tower, resolution = any_clip.visual, any_clip.visual.resolution
    images = torch.randn(2, 3, resolution, resolution)
    x = z = embedded(tower, images)
    for block in tower.transformer.resblocks:
        v = values(block, x)
        attention = (v @ v.transpose(-1, -2) / 8).softmax(-1)                            # sqrt(64) = 8
        z = z + block.attn.out_proj((attention @ v).transpose(1, 2).flatten(2))
        x = ordinary_stream([block], x)
    cls, patches = any_clip.encode_patches(images)
    assert_near(patches, layer_norm(z[:, 1:], tower.ln_post))
    assert_near(cls, layer_norm(x[:, 0], tower.ln_post))


def test_image_features_equal_the_reference(any_clip):
    tower, resolution = any_clip.visual, any_clip.visual.resolution
    images = torch.randn(2, 3, resolution, resolution)
    tokens = layer_norm(ordinary_stream(tower.transformer.resblocks, embedded(tower, images)), tower.ln_post)
    assert_near(any_clip.encode_image(images), tokens[:, 0] @ tower.proj)
    cls, patches = any_clip.encode_patches(images, "qk")
    assert_near(cls, tokens[:, 0])
    assert_near(patches, tokens[:, 1:])


def test_value_stream_is_the_last_block_without_its_attention_matrix(any_clip):
    tower, resolution = any_clip.visual, any_clip.visual.resolution
    images = torch.randn(2, 3, resolution, resolution)
    *first, last = tower.transformer.resblocks
    before = ordinary_stream(first, embedded(tower, images))
    h = perceptron(last, before + last.attn.out_proj(values(last, before).transpose(1, 2).flatten(2)))
    cls, patches = any_clip.encode_patches(images, "value")
    assert_near(patches, layer_norm(h[:, 1:], tower.ln_post))
    assert_near(cls, layer_norm(ordinary_stream([last], before)[:, 0], tower.ln_post))


def test_text_features_equal_the_reference_over_the_whole_context(any_clip):
    # the largest token is [EOT]: here 99, at places 3, 11 and 1 of each text, zeros behind it
    tokens = torch.zeros(3, any_clip.context_length, dtype=torch.int64)
    for text, eot in zip(tokens, (3, 11, 1)):
        text[:eot], text[eot] = torch.randint(1, 99, (eot,)), 99
    x = any_clip.token_embedding.weight[tokens] + any_clip.positional_embedding[None]
    x = ordinary_stream(any_clip.transformer.resblocks, x, causal=True)
    expected = layer_norm(x[torch.arange(3), torch.tensor([3, 11, 1])], any_clip.ln_final) @ any_clip.text_projection
    assert_near(any_clip.encode_text(tokens), expected)
    embeddings = any_clip.token_embedding.weight[tokens[:, :12]]
    assert_near(any_clip.encode_embeddings(embeddings, torch.tensor([3, 11, 1])), expected)


def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).square().sum().backward()
    return x.grad


def test_gradients_of_what_is_read_are_those_through_all_rows_of_the_last_block(any_clip):
    *blocks, last = any_clip.transformer.resblocks
    texts, eot = torch.randn(3, 7, any_clip.ln_final.weight.shape[0]), torch.tensor([3, 6, 1])

    def all_rows(texts):
        x = texts + any_clip.positional_embedding[:7]
        for block in (*blocks, last):
            x = block(x, causal=True)
        return any_clip.ln_final(x[torch.arange(3), eot]) @ any_clip.text_projection

    assert_near(gradient(lambda texts: any_clip.encode_embeddings(texts, eot), texts), gradient(all_rows, texts))


def test_texts_behind_a_shared_prefix_are_those_that_begin_with_it(any_clip):
    # 2 prefixes of 3 tokens before 3 texts of 4; [EOT] at 2, 3 and 0 of these, so at 5, 6 and 3 of the whole
    width, eot = any_clip.double().ln_final.weight.shape[0], torch.tensor([2, 3, 0])
    both = torch.randn(6 + 24, width).double()           # 2 x 3 tokens of prefixes, 3 x 2 x 4 of texts

    def apart(both):
        return any_clip.encode_with_prefix(both[:6].view(2, 3, width), both[6:].view(3, 2, 4, width), eot)

    def together(both):
        prefix = both[:6].view(1, 2, 3, width).expand(3, -1, -1, -1)
        texts = torch.cat([prefix, both[6:].view(3, 2, 4, width)], dim=2).flatten(0, 1)            # (6, 7, W)
        return any_clip.encode_embeddings(texts, (eot + 3).repeat_interleave(2)).unflatten(0, (3, 2))

    torch.testing.assert_close(apart(both), together(both))                        # float64: to 1e-7
    torch.testing.assert_close(gradient(apart, both), gradient(together, both))


def test_last_block_of_both_streams_gives_what_is_read_of_all_rows(any_clip):
    last, tokens = any_clip.visual.transformer.resblocks[-1], torch.randn(2, 10, any_clip.visual.proj.shape[0])

    def read(x):
        cls, patches = forward_dual_last(last, x, 2 * x)
        return torch.cat([cls[:, None], patches], dim=1)

    def all_rows(x):
        x, z = last.forward_dual(x, 2 * x)
        return torch.cat([x[:, :1], z[:, 1:]], dim=1)

    assert_near(read(tokens), all_rows(tokens))
    assert_near(gradient(read, tokens), gradient(all_rows, tokens))


def test_value_stream_ignores_the_other_tokens_of_the_last_block():
    # with a single block, each patch token of this stream depends on its own patch alone
    model = random_clip(layers=1)
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[:, :, :8, :8] = 0                                              # patch 0 changes
    a, b = (model.encode_patches(x, "value")[1][0] for x in (image, other))
    assert not torch.allclose(a[0], b[0]) and torch.equal(a[1:], b[1:])


def test_unknown_stream_is_refused_by_name(clip_model):
    with pytest.raises(ValueError, match="'xx'.*vv, qk, value"):
        clip_model.encode_patches(torch.zeros(1, 3, 32, 32), "xx")


def test_what_follows_eot_reaches_nothing(clip_model):
    tokens = clip.tokenize("a photo of a cat")
    padded = tokens.clone()
    padded[0, 20:30] = 320                                               # words after [EOT]
    assert torch.equal(clip_model.encode_text(tokens), clip_model.encode_text(padded))


def test_a_text_does_not_depend_on_the_others(clip_model):
    texts = ["cat", "a photo of a very long annual crop land and a dog", "dog"]
    together = clip_model.encode_text(clip.tokenize(texts))
    for text, expected in zip(texts, together):
        torch.testing.assert_close(clip_model.encode_text(clip.tokenize(text))[0], expected, atol=1e-4, rtol=1e-4)


def test_state_dict_builds_the_model_it_came_from(clip_model):
    images, tokens = torch.randn(1, 3, 32, 32), clip.tokenize("cat")
    built = build_model({**clip_model.state_dict(), "input_resolution": torch.tensor(32),
                         "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)})
    assert torch.equal(built.encode_image(images), clip_model.encode_image(images))
    assert torch.equal(built.encode_text(tokens), clip_model.encode_text(tokens))
    assert built.visual.resolution == 32 and all(p.dtype == torch.float32 for p in built.parameters())
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    half = build_model({k: v.half() for k, v in clip_model.state_dict().items()})
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_every_size_is_read_from_the_weights():
    # 11 and 1 blocks: "1" and "10" begin alike
    for model in (uneven_clip(), CLIP(8, 48, 16, 64, 11, 9, 49408, 128, 1)):
        state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
        built = build_model(state)
        assert [len(t.resblocks) for t in (built.visual.transformer, built.transformer)] == \
            [len(t.resblocks) for t in (model.visual.transformer, model.transformer)]
        assert (built.visual.resolution, built.context_length) == (model.visual.resolution, model.context_length)
        assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())


def test_clip_stays_frozen_and_in_evaluation_mode(clip_model):
    assert clip_model.train() is clip_model
    nn.Sequential(clip_model).train()
    assert not any(module.training for module in clip_model.modules())
    assert not any(p.requires_grad for p in clip_model.parameters())


def test_only_what_is_multiplied_by_is_kept_in_half_precision(clip_model):
    clip_model.store_matrices(torch.bfloat16)
    half = {name for name, p in clip_model.named_parameters() if p.dtype == torch.bfloat16}
    layers = [f"{tower}transformer.resblocks.{i}.{layer}" for tower in ("", "visual.") for i in range(2) for layer in (
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")]
    assert half == {"visual.conv1.weight", *layers}
    assert {p.dtype for p in clip_model.parameters()} == {torch.bfloat16, torch.float32}


def test_matrices_in_half_precision_give_nearly_the_same_features(clip_model):
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["a cat", "a dog"])
    patches, text = clip_model.encode_patches(images)[1], clip_model.encode_text(tokens)
    clip_model.store_matrices(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = clip_model.encode_patches(images)[1], clip_model.encode_text(tokens)
    for found, expected in zip(again, (patches, text)):                  # bfloat16 has 8 bits: 0.4 % per rounding
        assert F.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99


def cut(name, *shape):
    return lambda s: s.update({name: torch.zeros(shape)})


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s.update(logit_scale=3), "'logit_scale' is int, expected a dense tensor"),
    (lambda s: s.update(logit_scale=None), "'logit_scale' is NoneType"),
    (lambda s: s.update(input_resolution="224"), "'input_resolution' is str"),
    (lambda s: s.update({7: torch.zeros(1)}), "named by strings, found 7"),
    (lambda s: s.update(logit_scale=torch.zeros([], device="meta")), "'logit_scale' is .* on meta"),
    (lambda s: s.update(text_projection=s["text_projection"].to_sparse()), "'text_projection' is a sparse_coo tensor"),
    (lambda s: s.update(text_projection=s["text_projection"].to(torch.complex64)), "complex64"),
    (lambda s: s.update(logit_scale=torch.tensor(True)), "bool"),
    (lambda s: s.update(text_projection=torch.zeros(1).expand(10**13)), "of 40000000000000 bytes, but 4 bytes"),
    (cut("token_embedding.weight"), "no CLIP with a vision transformer"),
    (cut("positional_embedding"), "no CLIP with a vision transformer"),
    (cut("visual.positional_embedding"), "no CLIP with a vision transformer"),
    (cut("visual.conv1.weight", 64, 3, 0, 0), "the patch size is 0, expected at least 1"),
    (cut("visual.conv1.weight", 80, 3, 8, 8), "the width is 80, expected a multiple of 64"),
    (cut("visual.conv1.weight", 0, 3, 8, 8), "the width is 0, expected a multiple of 64"),
    (cut("visual.positional_embedding", 9, 64), "the token count is 9, expected 1 . a square"),
    (cut("visual.positional_embedding", 1, 64), "the token count is 1, expected 1 . a square"),
    (cut("text_projection", 100, 24), "text_projection: the width is 100, expected a multiple of 64"),
    (cut("text_projection", 192, 0), "the joint width is 0, expected at least 1"),
    (cut("positional_embedding", 1, 192), "the context length is 1, expected at least 2"),
    (cut("token_embedding.weight", 100, 192), "the vocabulary is 100, expected 49408"),
    (lambda s: [s.pop(k) for k in [*s] if k.startswith("visual.transformer")], "visual.transformer.* are none"),
    (lambda s: [s.update({k.replace("blocks.2", "blocks.7"): s.pop(k)}) for k in [*s] if ".2." in k],
     "the blocks of transformer.resblocks. are 0, 1, 7, expected 0, 1, 2"),
    (lambda s: s["ln_final.bias"].fill_(math.nan), "ln_final.bias has values that are not finite"),
    (lambda s: s.pop("visual.ln_post.bias"), "missing visual.ln_post.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
    (lambda s: s.update(logit_scale=torch.zeros(2)), r"logit_scale is \(2,\), expected \(\)"),
    (lambda s: s.update(text_projection=torch.zeros(192, 1, 1)), "no CLIP with a vision transformer"),
    (lambda s: (s.pop("ln_final.bias"), s.update(extra=s.pop("logit_scale"), positional_embedding=torch.zeros(12, 7))),
     r"missing logit_scale; missing ln_final.bias; unexpected extra; positional_embedding is \(12, 7\), "
     r"expected \(12, 192\)"),
    (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet image tower.*ViT-B/16, ViT-B/32 or"),
    (lambda s: s.pop("visual.conv1.weight"), "no CLIP with a vision transformer: 'visual.conv1.weight' not found.*"
     "begins with positional_embedding, text_projection, logit_scale"),
    (lambda s: (s.clear(), s.update(dict.fromkeys("abcd", torch.zeros(1)))), "begins with a, b, c$"),
    (lambda s: s.clear(), "begins with nothing")])
def test_wrong_weights_are_named(change, complaint):
    state = uneven_clip().state_dict()
    change(state)
    with pytest.raises(ValueError, match=complaint):
        build_model(state)


def test_weights_that_take_too_much_are_refused(monkeypatch):
    # one storage under 60 names: 60 times its bytes once it is a model
    monkeypatch.setattr("clip.weights.LIMIT", 59 * 400)
    with pytest.raises(ValueError, match="these weights take 24000 bytes, more than 23600"):
        build_model(dict.fromkeys(map(str, range(60)), torch.zeros(100)))


# ---- deep prompts

class AddTen(torch.nn.Module):
    """In place of a block: adds 10, and keeps what it got."""

    def forward(self, x, causal=False):
        self.got = x
        return x + 10


def test_deep_prompts_stand_in_their_places_in_every_block(clip_model, monkeypatch):
    monkeypatch.setattr(clip.model, "forward_one", lambda block, x, position=0, causal=False: block(x)[:, 0])
    for tower in (clip_model.visual.transformer, clip_model.transformer):
        tower.resblocks = torch.nn.ModuleList(AddTen() for _ in range(4))
    images, prompts = torch.randn(2, 3, 32, 32), torch.randn(3, 4, 128)           # J = 3 of four blocks, n = 4
    clip_model.encode_image(images, prompts)
    plain = clip_model.visual.embed(images)                                        # CLS and 16 patches
    behind = clip_model.visual.ln_pre(prompts[0]), prompts[1], prompts[2], prompts[2] + 10
    for i, (block, own) in enumerate(zip(clip_model.visual.transformer.resblocks, behind)):
        torch.testing.assert_close(block.got, torch.cat([plain + 10 * i, own.expand(2, -1, -1)], 1))

    embeddings, prompts = torch.randn(5, 9, 128), torch.randn(2, 4, 128)           # J - 1 = 2
    clip_model.encode_embeddings(embeddings, torch.full((5,), 8), prompts)
    plain = embeddings + clip_model.positional_embedding[:9]
    inside = plain[:, 1:5], prompts[0], prompts[1], prompts[1] + 10
    for i, (block, own) in enumerate(zip(clip_model.transformer.resblocks, inside)):
        tokens = plain + 10 * i
        torch.testing.assert_close(block.got, torch.cat([tokens[:, :1], own.expand(5, -1, -1), tokens[:, 5:]], 1))


def test_deep_prompts_reach_the_features_and_get_gradients(clip_model):
    image_prompts, text_prompts = torch.zeros(2, 4, 128, requires_grad=True), torch.zeros(1, 4, 128, requires_grad=True)
    images, embeddings, eot = torch.randn(2, 3, 32, 32), torch.randn(3, 9, 128), torch.tensor([8, 7, 8])
    for prompted, plain, prompts in (
            (clip_model.encode_image(images, image_prompts), clip_model.encode_image(images), image_prompts),
            (clip_model.encode_embeddings(embeddings, eot, text_prompts), clip_model.encode_embeddings(embeddings, eot),
             text_prompts)):
        assert not torch.allclose(prompted, plain, atol=1e-3)                      # even a zero token takes attention
        prompted.square().sum().backward()
        assert (prompts.grad.flatten(1).abs().amax(dim=1) > 0).all()
    assert torch.equal(clip_model.encode_image(images, None), clip_model.encode_image(images))


def test_prompts_of_more_layers_than_blocks_are_refused(clip_model):
    with pytest.raises(ValueError, match="prompts for 3 layers, but this tower has 2 blocks"):
        clip_model.encode_image(torch.randn(1, 3, 32, 32), torch.zeros(3, 4, 128))
    with pytest.raises(ValueError, match="prompts for 3 layers, but this tower has 2 blocks"):
        clip_model.encode_embeddings(torch.randn(1, 9, 128), torch.tensor([8]), torch.zeros(2, 4, 128))
