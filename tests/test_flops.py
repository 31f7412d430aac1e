"""No arithmetic is wasted: products of matrices are counted against the formula.

Attention is left out: some versions of torch count it on CPU, some do not, and it is a small part.
"""

import clip  # before torch: it bounds how long torch's threads wait

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import random_clip
from sotglp import SOTGLP, local_logits

W, LAYERS, P, D = 128, 2, 16, 32           # of the random CLIP; both towers have the same width and depth
BLOCK = 3 * W * W + W * W + 8 * W * W      # multiplications per token: Q, K, V; output projection; perceptron
KEYS, READ = 2 * W * W, 10 * W * W         # of the last block: K, V of every token; the rest for the one that is read


@pytest.fixture(scope="module")
def clip_model():
    """One for all tests of this file: counting changes nothing in it."""
    return random_clip()


def multiplications(function):
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "attention" not in str(op)) / 2   # a product and a sum count as two


def test_second_stream_costs_one_output_projection_per_block(clip_model):
    images, tokens = torch.randn(2, 3, 32, 32), 2 * (1 + P)
    embedding, first = 2 * P * 3 * 8 * 8 * W, LAYERS - 1
    assert multiplications(lambda: clip_model.encode_patches(images, "qk")) == embedding + tokens * LAYERS * BLOCK
    # of the last block CLS is read in one stream, the patches in the other: 2 images, 2 P patches
    last = tokens * KEYS + 2 * READ + 2 * P * W * W
    assert multiplications(lambda: clip_model.encode_patches(images)) == \
        embedding + tokens * first * (BLOCK + W * W) + last


def test_what_reads_an_image_feature_or_a_text_computes_nothing_else(clip_model):
    # the ordinary stream alone; and a text no further than the longest [EOT]: [SOS] 3 words [EOT] are 5 tokens.
    # In the last block, only CLS and [EOT] are more than keys and values.
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["cat", "a red dog"])
    token = (LAYERS - 1) * BLOCK + KEYS
    image = 2 * (P * 3 * 8 * 8 * W + (1 + P) * token + READ + W * D)
    assert multiplications(lambda: clip_model.encode_image(images)) == image
    assert multiplications(lambda: clip_model.encode_text(tokens)) == 2 * (5 * token + READ + W * D)


def test_text_tower_sees_no_token_behind_the_longest_name_of_a_chunk(clip_model):
    # names of 1, 1, 2 and 3 tokens; with [SOS], 4 prompt tokens and [EOT] that is 7, 7, 8 and 9.
    # A chunk ends where the next name is longer, if it has an eighth of what it may have: at most 16, at least 2
    names, prompts = ["cat", "annual crop land", "dog", "sea lake"], 4
    for chunk, longest in {200: (9, 9, 9, 9), 16: (7, 7, 9, 9), 2: (7, 7, 8, 9), 1: (7, 7, 8, 9)}.items():
        model = SOTGLP(clip_model, names, text_chunk=chunk)
        expected = prompts * (sum(longest) * ((LAYERS - 1) * BLOCK + KEYS) + len(names) * (READ + W * D))
        assert multiplications(lambda: model.encode(model.local_prompts)) == expected


def test_shared_prompts_go_through_the_text_tower_once_for_all_classes(clip_model):
    # [SOS] and 4 prompt tokens of 4 prompts; behind them, for each of 2 classes and 4 prompts, a name of one token and
    # [EOT]. In the last block [EOT] alone is more than query, key and value.
    model = SOTGLP(clip_model, ["cat", "dog"])
    prefix, behind = 4 * 5 * LAYERS * BLOCK, 2 * 4 * 2 * ((LAYERS - 1) * BLOCK + 3 * W * W)
    read = 2 * 4 * (READ - W * W + W * D)
    assert multiplications(lambda: model.encode(model.global_prompts)) == prefix + behind + read


def test_frozen_weights_get_no_gradient_work(clip_model):
    # backward asks for the gradient of every product's input and for none of its weights: as much again, not twice.
    # Of shared prompts it asks less: class names do not learn, so neither do the first keys and values that they give
    model = SOTGLP(clip_model, ["cat", "dog"])
    forward, both = (multiplications(lambda: model.encode(model.local_prompts)),
                     multiplications(lambda: model.encode(model.local_prompts).sum().backward()))
    assert both == 2 * forward
    forward, both = (multiplications(lambda: model.encode(model.global_prompts)),
                     multiplications(lambda: model.encode(model.global_prompts).sum().backward()))
    assert forward < both < 2 * forward


def test_local_projection_is_folded_into_the_joint_one(clip_model):
    # (W, W) @ (W, D) once, then P tokens times (W, D) per image; unfolded, P tokens times (W, W) would come on top.
    # Cosines: one image and P patches with 4 prompts each of 2 classes.
    model, B = SOTGLP(clip_model, ["cat", "dog"]).eval(), 3
    features = torch.randn(B, W), torch.randn(B, P, W)
    found = multiplications(lambda: model(features)) - multiplications(lambda: model.encode_prompts())
    assert found == B * W * D + W * W * D + B * P * W * D + B * (1 + P) * 2 * 4 * D


def test_matching_costs_one_product_of_patches_and_prompts():
    B, C, L = 3, 5, 4
    patches, text = torch.randn(B, P, D), torch.randn(C, L, D)
    assert multiplications(lambda: local_logits(patches, text, 1.0, 5)) == B * P * C * L * D


def test_deeper_towers_cost_in_proportion():
    shallow, deep = (random_clip(layers=n) for n in (1, 3))
    images = torch.randn(1, 3, 32, 32)
    few, many = (multiplications(lambda m=m: m.encode_patches(images)) for m in (shallow, deep))
    assert many - few == 2 * (1 + P) * (BLOCK + W * W)
