"""The towers: Eq. 2 by hand, the ordinary streams against torch's own attention, loading by name and shape."""

import math

import pytest
import torch
from torch import nn

import clip
from clip.model import Block, build_model

from conftest import random_clip


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


def test_vv_stream_is_z0_plus_every_blocks_vv_attention(clip_model):
    # Eq. 2 written out: all blocks, V from the ordinary stream, residual from Z_0, CLS a key and value, no perceptron
    tower, images = clip_model.visual, torch.randn(2, 3, 32, 32)
    x = z = tower.embed(images)
    for block in tower.transformer.resblocks:
        v_weight, v_bias = block.attn.in_proj_weight[256:], block.attn.in_proj_bias[256:]    # after those of Q and K
        heads = (block.ln_1(x) @ v_weight.T + v_bias).unflatten(-1, (2, 64)).transpose(1, 2)              # (B, H, 1+P, 64)
        attention = (heads @ heads.transpose(-1, -2) / 8).softmax(-1)                        # sqrt(64) = 8
        z = z + block.attn.out_proj((attention @ heads).transpose(1, 2).flatten(2))
        x = block(x)
    cls, patches = clip_model.encode_patches(images)
    torch.testing.assert_close(patches, tower.ln_post(z[:, 1:]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cls, tower.ln_post(x[:, 0]), atol=1e-4, rtol=1e-4)


def reference_stream(transformer, x, causal=False):
    """The ordinary stream with torch's nn.MultiheadAttention and x * sigmoid(1.702 x), as OpenAI describe it."""
    mask = torch.full((x.shape[1],) * 2, -math.inf).triu(1) if causal else None
    for block in transformer.resblocks:
        attention = nn.MultiheadAttention(x.shape[-1], x.shape[-1] // 64, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        h = block.ln_1(x)
        x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    return x


def test_image_features_equal_the_reference(clip_model):
    images, tower = torch.randn(2, 3, 32, 32), clip_model.visual
    tokens = reference_stream(tower.transformer, tower.embed(images))
    for found, expected in ((clip_model.encode_image(images), tower.ln_post(tokens[:, 0]) @ tower.proj),
                            (clip_model.encode_patches(images, "qk")[1], tower.ln_post(tokens[:, 1:]))):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_text_features_equal_the_reference_over_all_77_tokens(clip_model):
    tokens = clip.tokenize(["a photo of a cat", "dog", "a satellite photo of annual crop land."])
    x = clip_model.token_embedding(tokens) + clip_model.positional_embedding
    x = clip_model.ln_final(reference_stream(clip_model.transformer, x, causal=True))
    expected = x[torch.arange(3), tokens.argmax(-1)] @ clip_model.text_projection
    torch.testing.assert_close(clip_model.encode_text(tokens), expected, atol=1e-4, rtol=1e-4)


def test_first_token_is_the_class_token_and_patches_go_row_by_row(clip_model):
    # an image that is white in the patch of row 1, column 2 (of 4 x 4) changes token 1 + 1 * 4 + 2 = 7 and no other
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 16:24] = 1
    changed = (clip_model.visual.embed(image) - clip_model.visual.embed(torch.zeros(1, 3, 32, 32))).abs().amax(-1)[0]
    assert changed.nonzero().flatten().tolist() == [7]


def test_value_stream_ignores_the_other_tokens_of_the_last_block():
    # with a single block, each patch token of this stream depends on its own patch alone
    model = random_clip(layers=1)
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[:, :, :8, :8] = 0                                              # patch 0 changes
    a, b = (model.encode_patches(x, "value")[1][0] for x in (image, other))
    assert not torch.allclose(a[0], b[0]) and torch.equal(a[1:], b[1:])
    block, tokens = model.visual.transformer.resblocks[0], model.visual.embed(image)
    v = block.ln_1(tokens) @ block.attn.in_proj_weight[256:].T + block.attn.in_proj_bias[256:]
    h = tokens + block.attn.out_proj(v)
    h = h + block.mlp(block.ln_2(h))
    torch.testing.assert_close(a, model.visual.ln_post(h[0, 1:]), atol=1e-4, rtol=1e-4)


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
    built = build_model({**clip_model.state_dict(), "input_resolution": torch.tensor(32)})
    assert torch.equal(built.encode_image(images), clip_model.encode_image(images))
    assert torch.equal(built.encode_text(tokens), clip_model.encode_text(tokens))
    assert built.visual.resolution == 32 and all(p.dtype == torch.float32 for p in built.parameters())
    half = build_model({k: v.half() for k, v in clip_model.state_dict().items()})
    assert half.logit_scale.dtype == torch.float32


def test_clip_stays_frozen_and_in_evaluation_mode(clip_model):
    clip_model.train()
    nn.Sequential(clip_model).train()
    assert not any(module.training for module in clip_model.modules())
    assert not any(p.requires_grad for p in clip_model.parameters())


def test_matrices_in_half_precision_give_nearly_the_same_features(clip_model):
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["a cat", "a dog"])
    patches, text = clip_model.encode_patches(images)[1], clip_model.encode_text(tokens)
    clip_model.store_matrices(torch.bfloat16)
    assert clip_model.transformer.resblocks[0].attn.in_proj_weight.dtype == torch.bfloat16
    assert clip_model.ln_final.weight.dtype == clip_model.token_embedding.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = clip_model.encode_patches(images)[1], clip_model.encode_text(tokens)
    for found, expected in zip(again, (patches, text)):                  # bfloat16 has 8 bits: 0.4 % per rounding
        assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s.pop("visual.ln_post.bias"), "missing visual.ln_post.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
    (lambda s: s.update(logit_scale=torch.zeros(2)), r"logit_scale is \(2,\), expected \(\)"),
    (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
    (lambda s: s.pop("visual.conv1.weight"), "no CLIP with a vision transformer"),
    (lambda s: s.clear(), "nothing")])
def test_wrong_weights_are_named(clip_model, change, complaint):
    state = clip_model.state_dict()
    change(state)
    with pytest.raises(ValueError, match=complaint):
        build_model(state)
