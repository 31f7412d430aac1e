"""The making of the tiny CLIP: targets, words, losses, the loop and the reports, on a few pictures and small models."""

import gzip
import math
import multiprocessing
import os
import random
import re
import signal
import sys
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from harness import machine, streams
from sources import critters
from extras import measure_tiny, pretrain_tiny as pretrain, stream
from clip.loader import MEAN, STD

SLOT = {slot: i for i, slot in enumerate(critters.SLOTS)}          # ground 0, body 1, ..., prop 7
STAR = {"ground": "grass", "body": "a red star", "top": "white horns", "eyes": "two eyes"}


@pytest.fixture
def small(monkeypatch):
    """A model of one block in each tower, 64 wide."""
    for name, value in dict(embed_dim=64, vision_width=64, vision_layers=1, text_width=64, text_layers=1).items():
        monkeypatch.setitem(pretrain.SIZES, name, value)


# ---- pictures

def test_the_slot_of_a_patch_by_hand():
    mask = np.zeros((64, 64), np.uint8)                             # 8 x 8 patches of 64 pixels, all of them ground
    shares = [  # patch, what it shows in how many pixels, the slot
        (0, {}, 0),
        (1, {"body": 6}, 0), (2, {"body": 7}, -1),                  # 58/64 = .91 is ground, 57/64 = .89 is not
        (3, {"body": 19}, -1), (4, {"body": 20}, SLOT["body"]),     # 19/64 = .297 is not enough, 20/64 = .31 is
        (8, {"top": 20, "eyes": 21}, SLOT["eyes"]),                 # the larger one
        (15, {"prop": 64}, SLOT["prop"]), (56, {"body": 30, "ground": 34}, SLOT["body"]),   # ground does not compete
        (62, {"clutter": 64}, -1)]
    expected = np.zeros(64, int)
    for patch, shown, slot in shares:
        pixels = [critters.CLUTTER if name == "clutter" else SLOT[name] for name, n in shown.items() for _ in range(n)]
        y, x = 8 * (patch // 8), 8 * (patch % 8)
        mask[y:y + 8, x:x + 8] = np.array(pixels + [0] * (64 - len(pixels))).reshape(8, 8)
        expected[patch] = slot
    assert stream.patch_slots(mask).tolist() == expected.tolist()


def test_the_target_of_a_patch_is_the_phrase_that_it_shows():
    image, targets, phrases = stream.draw_one("seed")
    picture, mask, said = critters.sample(random.Random("seed"))
    assert np.array_equal(image, picture) and phrases == said
    slots = stream.patch_slots(mask)
    assert len(set(slots)) > 2 and -1 in slots
    for slot, target in zip(slots, targets, strict=True):
        assert target == (-1 if slot < 0 else stream.BANK.index(said[critters.SLOTS[slot]]))


def test_the_bank_has_every_phrase_once():
    assert stream.BANK == [text for texts in critters.PHRASES.values() for text in texts]
    assert len(set(stream.BANK)) == len(stream.BANK) and stream.GRID == 8
    assert [stream.BANK[i] for i in stream.GROUND] == critters.PHRASES["ground"]


def test_the_pool_depends_on_its_seed_alone():
    pixels, targets, phrases = stream.draw_pool(3, 7, workers=1)
    for i in range(3):
        image, wanted, said = stream.draw_one(f"stream 7 {i}")
        assert np.array_equal(pixels[i], image) and np.array_equal(targets[i], wanted) and phrases[i] == said
    assert pixels.dtype == torch.uint8 and targets.dtype == torch.int16


class Fixed(random.Random):
    """Flips or not, and shifts by (dx, dy)."""

    def __init__(self, flip, *shifts):
        super().__init__(0)
        self.flip, self.shifts = flip, list(shifts)

    def random(self):
        return .49 if self.flip else .5

    def randint(self, low, high):
        assert (low, high) == (0, 4)
        return self.shifts.pop(0)


@pytest.fixture
def plain_light(monkeypatch):
    """Brightness and contrast stay: both are drawn around one half."""
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, .5))


def picture_of(images):
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@pytest.mark.parametrize("flip", [False, True])
def test_a_picture_and_its_targets_are_flipped_together(flip, plain_light):
    pixels = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    targets = torch.arange(128).view(2, 64)
    images, wanted = stream.augment(pixels, targets, Fixed(flip, 2, 2))                        # 2 of 0 to 4: no shift
    upright = picture_of(images).flip(-1) if flip else picture_of(images)
    torch.testing.assert_close(upright, pixels.permute(0, 3, 1, 2) / 255, atol=1e-5, rtol=0)
    row = list(range(7, -1, -1)) if flip else list(range(8))                                     # the first 8 patches
    assert wanted.shape == (2, 64) and wanted[0, :16].tolist() == row + [8 + i for i in row]


def test_a_shift_is_of_two_pixels_at_most_and_repeats_the_edge(plain_light):
    pixels = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    whole = pixels.permute(0, 3, 1, 2) / 255
    image = picture_of(stream.augment(pixels, torch.zeros(1, 64), Fixed(False, 4, 1))[0])      # 2 left, 1 down
    torch.testing.assert_close(image[:, :, 1:, :-2], whole[:, :, :-1, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(image[:, :, 0, :-2], whole[:, :, 0, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(image[:, :, 1:, -1], whole[:, :, :-1, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("drawn, expected", [
    (0., 100 / 255 * .9 - .05), (1., 100 / 255 * 1.1 + .05),       # contrast 1 +- .1, brightness +- .05
])
def test_light_by_hand(drawn, expected, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, drawn))
    pixels = torch.tensor([100, 0, 255], dtype=torch.uint8).expand(1, 64, 64, 3)
    image = picture_of(stream.augment(pixels, torch.zeros(1, 64), Fixed(False, 2, 2))[0])
    assert image[0, 0].mean() == pytest.approx(expected, abs=1e-5)
    assert image.min() >= -1e-6 and image.max() <= 1 + 1e-6


def test_contrast_differs_by_channel_and_brightness_by_picture():
    pixels = torch.full((2, 64, 64, 3), 128, dtype=torch.uint8)
    values = picture_of(stream.augment(pixels, torch.zeros(2, 64), random.Random(0))[0])
    assert len(values.mean((2, 3)).flatten().unique()) == 6 and values.std((2, 3)).max() < 1e-6


# ---- words

class Saying(random.Random):
    """Its draws of random() are given; choice takes the first, or the one numbered `pick`."""

    def __init__(self, *draws, pick=0):
        super().__init__(0)
        self.draws, self.pick = list(draws), pick

    def random(self):
        return self.draws.pop(0)

    def choice(self, options):
        return options[self.pick % len(options)]


# what is drawn: for each phrase (below .7: it is said), an adjective without meaning (below .1), brief (below .4),
# then for pattern, top, sides and bottom whether it becomes an adjective (below .4)
@pytest.mark.parametrize("draws, pick, text", [
    ((0, 0, 0, 0, 1, 1, 1, 1, 1, 1), 0, "a red star with white horns and two eyes on grass"),
    ((0, 0, 0, 0, 1, .39, 1, .39, 1, 1), 0, "a horned red star with two eyes on grass"),
    ((0, 0, 0, 0, 1, .39, 1, .4, 1, 1), 0, "a red star with white horns and two eyes on grass"),
    ((0, 0, 0, 0, 1, .4, 1, 0, 1, 1), 0, "a red star with white horns and two eyes on grass"),         # not brief
    ((.69, 0, .7, .7, 1, 1, 1, 1, 1, 1), 0, "a red star on grass"),
    ((.7, 1, .7, .69, 1, 1, 1, 1, 1, 1), 0, "a red star with two eyes"),                               # always the body
    ((0, 0, 1, 1, .09, 1, 1, 1, 1, 1), 0, "a common red star on grass"),
    ((0, 0, 1, 1, .1, 1, 1, 1, 1, 1), 0, "a red star on grass"),
    ((0, 0, 0, 1, .09, 0, 1, 0, 1, 1), 0, "a common horned red star on grass"),
    ((1, 0, 1, 1, 1, 1, 1, 1, 1, 1), 1, "a photo of a red star"),
])
def test_a_caption_by_hand(draws, pick, text):
    assert stream.caption(STAR, Saying(*draws, pick=pick)) == text


def test_a_caption_of_nothing_said_says_all():
    assert stream.caption({"ground": "snow", "prop": "a red tree"}, Saying(1, 1, 1, 1, 1, 1, 1, 1)) == \
        "a red tree in snow"


def test_parts_without_a_body_become_no_adjectives():
    assert stream.caption({"top": "white horns"}, Saying(0, 1, 0, 0, 0, 0, 0)) == "white horns"


def test_every_adjective_belongs_to_one_noun():
    nouns = {noun for slot in ("pattern", "top", "sides", "bottom") for noun in critters.WORDS[slot]}
    assert set(stream.ADJECTIVES) == nouns - {"antennae"} and len(set(stream.ADJECTIVES.values())) == len(nouns) - 1
    assert stream.ADJECTIVES["horns"] == "horned" and stream.ADJECTIVES["checks"] == "checkered"
    for name, _ in critters.CLASSES:                               # the names of the benchmark are said like this
        assert name.split()[0] in stream.ADJECTIVES.values()


def test_alter_exchanges_one_word():
    rng, changed = random.Random(0), Counter()
    for _ in range(600):
        other = stream.alter(STAR, rng)
        slot, = (slot for slot in STAR if other[slot] != STAR[slot])
        assert list(other) == list(STAR) and other[slot] in critters.PHRASES[slot]
        if slot in ("body", "top"):                                # colour or noun stays
            same = [a == b for a, b in zip(other[slot].split()[-2:], STAR[slot].split()[-2:])]
            assert sum(same) == 1
            changed[slot, same.index(True)] += 1
        else:
            changed[slot] += 1
    assert len(changed) == 6 and min(changed.values()) > 40


def test_a_wrong_caption_is_said_in_the_same_way_with_one_word_wrong():
    for seed in range(40):
        right = stream.caption(STAR, random.Random(seed))
        wrong = stream.wrong_caption(STAR, seed, random.Random(seed + 1))
        assert wrong != right
        if len(wrong.split()) == len(right.split()):
            assert sum(a != b for a, b in zip(wrong.split(), right.split())) <= 3        # "on grass", "at night", "a"


def test_the_vocabulary_is_what_the_drawn_world_says():
    vocabulary = stream.Vocabulary([STAR] * 50)
    tokens = clip.tokenize(["a red star with white horns", "two eyes"])
    assert torch.equal(vocabulary.ids[vocabulary(["a red star with white horns", "two eyes"])], tokens)
    known = set(vocabulary.ids.tolist())
    assert {0, 49406, 49407} < known and known >= set(clip.tokenize(stream.BANK).flatten().tolist())
    assert clip.tokenize("photo")[0, 1].item() in known and clip.tokenize("zebra")[0, 1].item() not in known
    assert vocabulary(["a"]).max() == len(vocabulary.ids) - 1                                # [EOT] stays the largest


# ---- losses

def test_the_slot_loss_by_hand():
    bank = {text: i for i, text in enumerate(stream.BANK)}
    logits = torch.zeros(2, len(bank))
    logits[0, bank["one eye"]] = math.log(2)       # of one, two and three eyes the shares are 2/4, 1/4, 1/4
    logits[:, bank["a red star"]] = 50             # it belongs to another slot
    both = [{"eyes": "one eye"}, {"eyes": "three eyes"}]
    # log 2 for the first, log 3 for the second, their mean over log 3, the loss of a guess
    assert pretrain.slot_loss(logits, both).item() == pytest.approx((math.log(2) + math.log(3)) / 2 / math.log(3))
    # a second slot, of 11 grounds: a guess costs 1 there, and the mean over slots is taken
    more = [{"eyes": "one eye", "ground": "snow"}, {}]
    assert pretrain.slot_loss(logits, more).item() == pytest.approx((math.log(2) / math.log(3) + 1) / 2)


class Words:
    """A stand-in for the model: texts are sums of random vectors of their tokens, images and patches are given."""

    def __init__(self, cls, patches, n):
        self.cls, self.patches, self.logit_scale = cls, patches, torch.tensor(1.5)
        self.visual = SimpleNamespace(proj=torch.randn(6, 6))
        self.table = torch.randn(n, 6)

    def encode_patches(self, images, stream):
        assert stream == "vv"
        return self.cls, self.patches

    def encode_text(self, tokens):
        return self.table[tokens].sum(1)


def cross_entropy(logits, label):
    return -(logits[label] - logits.exp().sum().log())


def test_the_four_losses_in_plain_loops():
    phrases = [stream.draw_one(i)[2] for i in range(9)]          # 9 // 4 = 2 of them get wrong captions
    vocabulary = stream.Vocabulary(phrases)
    model = Words(torch.randn(9, 6), torch.randn(9, 64, 6), len(vocabulary.ids))
    body = stream.BANK.index("a red star")
    targets = torch.full((9, 64), -1, dtype=torch.int16)
    targets[0, 3], targets[4, 5], targets[8, 63] = body, body + 1, 0
    losses = pretrain.losses_of(model, torch.zeros(9, 3, 64, 64), targets, phrases, vocabulary, random.Random(5), 2)

    rng, told, wrong = random.Random(5), [], []
    for i, p in enumerate(phrases):
        seed = rng.random()
        told.append(stream.caption(p, random.Random(seed)))
        wrong += [[stream.wrong_caption(p, seed, rng) for _ in range(2)]] if i < 2 else []

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def text(texts):
        return unit(model.encode_text(vocabulary(texts)))

    scale, image = math.exp(1.5), unit(model.cls @ model.visual.proj)
    logits, bank = scale * image @ text(told).T, text(stream.BANK)
    rows = sum(cross_entropy(logits[i], i) + cross_entropy(logits[:, i], i) for i in range(9)) / 18
    words = sum(cross_entropy(scale * text([told[i], *wrong[i]]) @ image[i], 0) for i in range(2)) / 2
    tokens = [(unit(model.patches[i, p] @ model.visual.proj), targets[i, p]) for i, p in ((0, 3), (4, 5), (8, 63))]
    regions = sum(cross_entropy(scale * bank @ token, target) for token, target in tokens) / 3
    expected = {"contrast": rows, "words": words, "regions": regions,
                "slots": pretrain.slot_loss(scale * image @ bank.T, phrases)}
    assert set(losses) == set(expected) == set(pretrain.WEIGHTS)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4), name


def test_a_quarter_of_the_patches_of_ground_counts():
    phrases = [STAR] * 20
    vocabulary = stream.Vocabulary(phrases)
    model = Words(torch.randn(20, 6), torch.randn(1, 1, 6).expand(20, 64, 6), len(vocabulary.ids))

    def regions(ground, other):
        targets = torch.full((20, 64), -1, dtype=torch.int16)
        targets[:, :ground], targets[:, 60:60 + other] = stream.BANK.index("grass"), stream.BANK.index("a red star")
        return pretrain.losses_of(model, torch.zeros(20, 3, 64, 64), targets, phrases, vocabulary,
                                  random.Random(0))["regions"].item()

    a, b = regions(60, 0), regions(0, 4)                           # all patches are alike: one loss for each phrase
    mixed = regions(60, 4)                                         # (1200 share * a + 80 b) / (1200 share + 80)
    assert 80 * (b - mixed) / (mixed - a) / 1200 == pytest.approx(.25, abs=.04)


# ---- the model and its file

def test_a_new_model_has_openais_initialisation():
    torch.manual_seed(0)
    vocabulary = stream.Vocabulary([STAR])
    model = pretrain.new_model(vocabulary)
    p = dict(model.named_parameters())
    assert all(x.requires_grad for x in p.values())
    assert p["token_embedding.weight"].shape == (len(vocabulary.ids), 128)
    assert model.logit_scale.exp().item() == pytest.approx(1 / .07)
    for name, x in p.items():
        if name.endswith("bias"):
            assert (x == 0).all(), name
        elif "ln_" in name:
            assert (x == 1).all(), name
    # deviations: .02 for embeddings; for matrices one over the root of the inputs of a row, .35 of it at a block's ends
    for name, deviation in {"token_embedding.weight": .02, "visual.positional_embedding": .02,
                            "visual.class_embedding": .02, "positional_embedding": .02,
                            "visual.conv1.weight": (3 * 8 * 8) ** -.5, "visual.proj": 128 ** -.5,
                            "text_projection": 128 ** -.5,
                            "transformer.resblocks.0.attn.in_proj_weight": 128 ** -.5,
                            "transformer.resblocks.0.mlp.c_fc.weight": 128 ** -.5,
                            "transformer.resblocks.0.attn.out_proj.weight": .35 * 128 ** -.5,
                            "visual.transformer.resblocks.1.mlp.c_proj.weight": .35 * 512 ** -.5}.items():
        assert p[name].std().item() == pytest.approx(deviation, rel=.2 if p[name].ndim == 1 else .05), name


def test_the_sizes_are_those_of_the_model_card():
    assert pretrain.SIZES == dict(embed_dim=128, resolution=64, patch=8, vision_width=128, vision_layers=4,
                                  context_length=77, vocab_size=49408, text_width=128, text_layers=3)


def test_what_is_saved_is_read_again_as_openais(small, tmp_path):
    vocabulary = stream.Vocabulary([STAR])
    model, path = pretrain.new_model(vocabulary), tmp_path / "tiny.pt.gz"
    pretrain.save_weights(model, vocabulary, path)
    loaded, _ = clip.load(path)
    table = loaded.token_embedding.weight
    assert table.shape == (49408, 64) and set(table.any(1).nonzero().flatten().tolist()) == set(vocabulary.ids.tolist())
    state = model.state_dict() | {"token_embedding.weight": table}
    assert torch.equal(table[vocabulary.ids], model.token_embedding.weight.half().float())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].half().float()), name
    texts = ["a red star with two eyes", "white horns"]
    torch.testing.assert_close(loaded.encode_text(clip.tokenize(texts)), model.encode_text(vocabulary(texts)),
                               atol=2e-3, rtol=0)
    first = path.read_bytes()
    assert len(first) < .2 * len(gzip.decompress(first)) and first[4:8] == bytes(4)             # no time in it
    stored = torch.load(gzip.open(path), weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.half}


def test_only_matrices_decay(small):
    model = pretrain.new_model(stream.Vocabulary([STAR]))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = pretrain.make_optimizer(model, .5)
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert sorted(map(len, groups)) == sorted([len(groups[0]), len(names) - len(groups[0])])
    assert groups[0] == {name for name in names.values() if re.search(
        r"conv1.weight|in_proj_weight|out_proj.weight|c_fc.weight|c_proj.weight|visual.proj|text_projection", name)}
    assert [(g["weight_decay"], g["lr"], g["betas"]) for g in optimizer.param_groups] == \
        [(.05, .5, (.9, .98)), (0., .5, (.9, .98))]


# ---- the loop

def arguments(folder, steps, **more):
    return Namespace(**{**dict(output=str(folder / "w.pt.gz"), steps=steps, pool=6, batch_size=4, lr=1e-2, seed=3,
                               workers=1), **more})


@pytest.fixture
def pool(monkeypatch):
    """The pool is drawn once, in this process."""
    drawn = [stream.draw_one(f"stream {i}") for i in range(6)]
    pixels, targets, phrases = zip(*drawn)
    made = torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(targets)), phrases
    monkeypatch.setattr(pretrain, "draw_pool", lambda size, seed, workers: made)


def weights(folder):
    return torch.load(folder / "w.pt.gz.resume", weights_only=True)


def test_a_signal_ends_the_processes_that_draw_without_a_traceback():
    with machine.plain_errors(), multiprocessing.Pool(1, streams.let_signals_end) as pool:
        assert pool.map(signal.getsignal, [signal.SIGINT, signal.SIGTERM]) == [signal.SIG_DFL] * 2


def test_a_file_that_is_none_to_go_on_with_is_named(tmp_path):
    path = tmp_path / "w.pt.gz.resume"
    path.write_text("mine")
    with pytest.raises(ValueError, match="w.pt.gz.resume is damaged, or no checkpoint of this program"):
        pretrain.resume(path, None, None)
    assert path.read_text() == "mine"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="w.pt.gz.resume is no regular file"):
        pretrain.resume(path, None, None)


def test_a_resumed_run_equals_one_without_a_stop(small, pool, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    pretrain.train(arguments(one, 4))
    pretrain.train(arguments(two, 2))              # its first two steps have the rates of a run of four: see below
    pretrain.train(arguments(two, 4))
    assert "from step 2," in capsys.readouterr().out
    alone, resumed = weights(one), weights(two)
    assert alone["step"] == resumed["step"] == 4
    for name, tensor in alone["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert (one / "w.pt.gz").read_bytes() == (two / "w.pt.gz").read_bytes()
    loaded = clip.load(one / "w.pt.gz")[0].visual.proj
    assert torch.equal(loaded, alone["model"]["visual.proj"].half().float())
    pretrain.train(arguments(tmp_path, 4, seed=4))
    assert not torch.equal(weights(tmp_path)["model"]["visual.proj"], alone["model"]["visual.proj"])


@pytest.fixture
def toy(small, pool, monkeypatch):
    """A loop of cheap steps: losses of the scale alone; rates, gradients and what is saved are noted."""
    seen, saved = [], []

    class Noting(torch.optim.SGD):
        def step(self):
            seen.append(([group["lr"] for group in self.param_groups], self.param_groups[0]["params"][0].grad.item()))

    def make(model, lr):
        return Noting([{"params": [model.logit_scale]}, {"params": [model.visual.proj]}], lr=lr)

    monkeypatch.setattr(pretrain, "make_optimizer", make)
    monkeypatch.setattr(pretrain, "augment", lambda pixels, targets, rng: (pixels, targets))
    monkeypatch.setattr(pretrain, "losses_of", lambda model, *_: {
        name: model.logit_scale * factor for name, factor in
        {"contrast": .1, "slots": .01, "words": .001, "regions": .0001}.items()})
    monkeypatch.setattr(pretrain, "save_checkpoint", lambda path, **state: saved.append(state["step"]))
    monkeypatch.setattr(pretrain, "save_weights", lambda model, vocabulary, path: saved.append(path))
    return SimpleNamespace(steps=seen, saved=saved)


def test_the_learning_rate_warms_up_and_follows_a_cosine(toy, tmp_path):
    pretrain.train(arguments(tmp_path, 400, lr=2.))
    rates = [rate for (rate, other), _ in toy.steps]
    assert len(rates) == 400 and all(rate == other for (rate, other), _ in toy.steps)
    # up by 1/200 a step: 2 * 1/200, 2 * 100/200; after 200 of 400 steps the cosine is at its half: .5 + .5 cos(pi/2);
    # at step 300, .5 + .5 cos(3 pi/4) = .14645; at the last, step 399, .5 + .5 cos(pi 399/400) = .0000154
    for step, expected in {0: .01, 99: 1., 200: 1., 300: .29289, 399: 3.084e-5}.items():
        assert rates[step] == pytest.approx(expected, rel=1e-3), step


def test_losses_are_weighted_and_gradients_do_not_add_up(toy, tmp_path):
    pretrain.train(arguments(tmp_path, 3))
    # .7 * .1 + 3 * .01 + 1 * .001 + 1 * .0001
    assert [gradient for _, gradient in toy.steps] == pytest.approx([.1011] * 3)


def test_large_gradients_are_cut(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "losses_of", lambda model, *_: {"slots": model.logit_scale * 50})
    pretrain.train(arguments(tmp_path, 1))
    assert toy.steps[0][1] == pytest.approx(1, abs=1e-4)


def test_a_run_saves_every_300_steps_and_says_how_far_it_is(toy, tmp_path, capsys):
    pretrain.train(arguments(tmp_path, 310))
    path = str(tmp_path / "w.pt.gz")
    assert toy.saved == [300, path, 310, path]
    said = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in said[1:]] == list(range(20, 301, 20))
    scale = math.log(1 / .07)
    assert f"| loss {.1011 * scale:.3f} | contrast {.1 * scale:.3f} | slots {.01 * scale:.3f} |" in said[1]
    assert f"| scale {1 / .07:.1f} |" in said[1]
    assert re.search(r"\| \d\.\d\d s/step \| 0 min left$", said[1])
    assert said[0].startswith("6 pictures, ") and f"{len(stream.BANK)} phrases, from step 0, " in said[0]


def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "losses_of", lambda model, *_: {"slots": model.logit_scale / 0})
    with pytest.raises(RuntimeError, match="step 0: loss inf | slots inf"):
        pretrain.train(arguments(tmp_path, 1))
    assert toy.steps == toy.saved == []


def test_batches_do_not_depend_on_the_steps_before(toy, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "augment", lambda pixels, targets, rng: seen.append((pixels, rng.random())) or (0, 0))
    for _ in range(2):
        pretrain.train(arguments(tmp_path, 8))
    assert {len(pixels) for pixels, _ in seen} == {4} and len({number for _, number in seen}) == 8
    assert len({picture.numpy().tobytes() for pixels, _ in seen for picture in pixels}) == 6         # of the whole pool
    assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(seen[:8], seen[8:], strict=True))


def test_a_checkpoint_that_is_stopped_leaves_the_last_one(tmp_path, monkeypatch):
    path = str(tmp_path / "c")
    pretrain.save_checkpoint(path, step=1)
    monkeypatch.setattr(torch, "save", lambda state, file: open(file, "w").close() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.save_checkpoint(path, step=2)
    assert torch.load(path, weights_only=True) == {"step": 1}


# ---- what the weights can do

class Oracle:
    """A stand-in for the model. A picture is known by the colour of its first pixel, a text by its tokens.

    know(pixel, stream) is what it sees: the texts that CLS shows, and the text of each patch or "".
    """

    def __init__(self, know):
        self.axes, self.know, self.visual = {}, know, SimpleNamespace(proj=torch.eye(320))

    def axis(self, tokens):
        return self.axes.setdefault(tuple(tokens), len(self.axes))

    def encode_text(self, tokens):
        return torch.eye(320)[[self.axis(row) for row in tokens.tolist()]]

    def encode_patches(self, images, stream):
        cls, patches = torch.zeros(len(images), 320), torch.zeros(len(images), 64, 320)
        for i, image in enumerate(images):
            said, shown = self.know(tuple(image.int().tolist()), stream)
            for text in said:
                cls[i, self.axis(clip.tokenize(text)[0].tolist())] = 1
            for text in set(shown) - {""}:
                patches[i, [text == other for other in shown], self.axis(clip.tokenize(text)[0].tolist())] = 1
        return cls, patches


def first_pixel(picture):
    return torch.tensor(picture.getpixel((0, 0))).float()


def test_the_table_of_attributes_tells_phrase_noun_and_colour_apart(monkeypatch, capsys):
    """CLS knows colours alone, V-V patches all, ordinary patches nouns alone."""
    seen, phrase = [], critters.phrase
    mask = np.arange(64).reshape(8, 8).repeat(8, 0).repeat(8, 1) // 8                # patch row r shows slot r

    def scene(rng, critter, prop):
        said = {"ground": "grass", "prop": "a red tree", **critter.phrases()}
        seen.append(said)
        return Image.new("RGB", (64, 64), (len(seen), 0, 0)), mask.astype(np.uint8), said

    def other(slot, text, noun):
        if slot not in critters.WORDS:
            return text
        colours, nouns, words = list(critters.COLOURS), critters.WORDS[slot], text.split()[-2:]
        if noun:
            return phrase(words[0], nouns[nouns.index(words[1]) - 1])
        return phrase(colours[colours.index(words[0]) - 1], words[1])

    def know(pixel, stream):
        said = seen[pixel[0] - 1]
        cls = [other(slot, text, noun=True) for slot, text in said.items()]
        rows = [said.get(slot, "") for slot in critters.SLOTS]
        if stream == "qk":
            rows = [other(slot, text, noun=False) if text else "" for slot, text in zip(critters.SLOTS, rows)]
        return cls, [text for text in rows for _ in range(8)]

    monkeypatch.setattr(critters, "scene", scene)
    measure_tiny.evaluate_attributes(Oracle(know), first_pixel, n=12)
    lines = capsys.readouterr().out.splitlines()
    assert len(seen) == 12 and lines[1] == "12 creatures, in %: the right phrase, noun, colour"
    counts = {"body": 7, "pattern": 4, "top": 6, "sides": 4, "bottom": 5, "prop": 6}
    for slot, line in zip(critters.SLOTS, lines[3:], strict=True):
        truth = " 100.0 100.0 100.0 "
        if slot in counts:                                         # one of so many nouns in one of 8 colours
            assert line == f"{slot:8s} |   0.0   0.0 100.0 |{truth}|   0.0 100.0   0.0 | {100 / 8 / counts[slot]:.1f}"
        else:
            assert line == f"{slot:8s} |{truth}|{truth}|{truth}| {({'ground': 9.1, 'eyes': 33.3})[slot]}"


@pytest.mark.parametrize("split, count", [("val", 3), ("test", 17)])
def test_the_report_on_the_benchmark_by_hand(split, count, monkeypatch, capsys):
    """Names: class 5 is taken for its near-twin 6, and 12 for 0 of another kind. Descriptions: 3 is taken for 2.
    The patches that show the name lie on the creature; those of class 0 on the ground, those of class 1 on a prop."""
    names, texts = critters.class_names(), critters.descriptions()
    drawn = Counter()

    def example(part, label, index):
        drawn[part, label, index] += 1
        mask = np.zeros((64, 64), np.uint8)
        mask[:16], mask[16:32], mask[32:48] = SLOT["body"], SLOT["eyes"], SLOT["prop"]            # 16 patches each
        return Image.new("RGB", (64, 64), (label, index, 0)), mask, {}

    def know(pixel, stream):
        label = pixel[0]
        name = f"a photo of a {names[{5: 6, 12: 0}.get(label, label)]}"
        here = {0: 3, 1: 2}.get(label, label % 2)                  # in which quarter of the picture
        right = f"a photo of a {names[label]}"
        return ([name, f"a photo of {texts[{3: 2}.get(label, label)]}"],
                [right * (i // 16 == here) for i in range(64)])

    def probe(train, labels, test):                                # it is wrong about class 9
        assert train.shape == (256, 320) and labels.tolist() == [label for label in range(16) for _ in range(16)]
        truth = torch.arange(16).repeat_interleave(len(test) // 16)
        return torch.where(truth == 9, 0, truth)

    monkeypatch.setattr(critters, "example", example)
    monkeypatch.setattr(measure_tiny, "linear_probe", probe)
    monkeypatch.setattr(critters, "POOL", {"train": 64, "val": 3, "test": 17})
    features = measure_tiny.evaluate_benchmark(Oracle(know), first_pixel, split)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        f"{16 * count} {split} pictures, in %",
        # 14 of 16; of four classes each: all, three, all, three
        "zero-shot by class name 87.5, of the kinds: a red star 100.0, a blue egg 75.0, a pink heart 100.0, "
        "a green box 75.0",
        "the right kind by class name 93.8", "zero-shot by full description 93.8",                # 15 of 16
        "16-shot linear probe on CLS 93.8", "top-10 V-V patches on critter 87.5"]                # 14 of 16
    expected = {(split, label, i): 1 for label in range(16) for i in range(count)}
    assert drawn == expected | {("train", label, i): 1 for label in range(16) for i in range(16)}
    assert [len(part) for part in features] == [16, 16 * count, 16 * count]
    assert torch.allclose(features[1].norm(dim=-1), torch.ones(16 * count))
    lengths = features[2].norm(dim=-1)                             # 16 of 64 patches show something
    assert torch.allclose(lengths.sort(-1).values, torch.tensor([0.] * 48 + [1.] * 16))


@pytest.mark.parametrize("split, first", [("test", 0), ("val", 3)])
def test_the_report_on_ood_sets_by_hand(split, first, monkeypatch, capsys):
    """Two classes. A picture is [1, 0]: its confidence is e / (e + 1) = .731. Its patch is [.7, .7]: .5, both 1.231."""
    asked = []
    outside = {  # CLS, and the patch: their confidences, of which only lower ones are right
        "near": ((1., 0.), (1., 0.)),                              # .731, 1.462: never lower, never lower
        "strangers": ((.6, .8), (1., 0.)),                         # e^.8 / (e^.8 + e^.6) = .550, 1.281: lower, higher
        "scenes": ((.6, .8), (.6, .8)),                            # .550, 1.100: lower, lower
        "textures": ((.6, .8), (.6, .8)), "scribbles": ((.6, .8), (.6, .8))}

    class Model:
        visual = SimpleNamespace(proj=torch.eye(2))

        def encode_patches(self, images, stream):
            cls, patch = zip(*(outside[critters.OOD_SETS[int(i)]] for i in images))
            return torch.tensor(cls), torch.tensor(patch)[:, None]

    monkeypatch.setattr(critters, "OOD_SIZE", 3)
    monkeypatch.setattr(critters, "ood_picture",
                        lambda name, i: asked.append((name, i)) or critters.OOD_SETS.index(name))
    measure_tiny.evaluate_ood(Model(), torch.tensor, split, torch.eye(2), torch.tensor([[1., 0.]] * 4),
                          torch.full((4, 1, 2), .5 ** .5))
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["near", "0.0", "0.0"], ["strangers", "100.0", "0.0"], ["scenes", "100.0", "100.0"],
                     ["textures", "100.0", "100.0"], ["scribbles", "100.0", "100.0"], ["mean", "80.0", "60.0"]]
    assert asked == [(name, first + i) for name in critters.OOD_SETS for i in range(3)]


def test_a_linear_probe_stands_in_the_middle():
    # a feature around 0 that tells the classes apart, and a large one that does not
    train, labels = torch.tensor([[-6., 500.], [-5., 501.], [5., 500.], [6., 501.]]), torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[-.1, 500.5], [.1, 500.5], [.2, 500.5]])
    assert measure_tiny.linear_probe(train, labels, test).tolist() == [0, 1, 1]


def test_percent():
    assert measure_tiny.percent([True, False, True, True]) == " 75.0"
    assert measure_tiny.percent(torch.tensor([1.])) == "100.0"


def command(monkeypatch, *args):
    """The command -> what it was asked to do."""
    done = []
    monkeypatch.setattr(pretrain, "train", done.append)
    for part in ("attributes", "benchmark", "ood"):
        monkeypatch.setattr(measure_tiny, f"evaluate_{part}",
                            lambda *args, part=part: done.append((part, *args)) or [part])
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny", *map(str, args)])
    pretrain.main(pretrain.parse_args())
    return done


def test_the_command_trains_as_the_model_card_says(monkeypatch):
    args, = command(monkeypatch)
    assert (args.output, args.steps, args.pool, args.batch_size, args.lr, args.seed) == \
        ("tiny.pt.gz", 5000, 50000, 64, 1.2e-3, 0)
    assert args.workers >= 1 and args.evaluate is None


def test_what_is_given_on_the_command_line_counts(monkeypatch):
    args, = command(monkeypatch, "--output", "o", "--steps", 7, "--pool", 8, "--batch-size", 9, "--lr", .5,
                    "--seed", 10, "--workers", 2)
    assert (args.output, args.steps, args.pool, args.batch_size, args.lr, args.seed, args.workers) == \
        ("o", 7, 8, 9, .5, 10, 2)


@pytest.mark.parametrize("args, split", [((), "val"), (("--split", "test"), "test")])
def test_the_command_evaluates_instead(monkeypatch, args, split):
    (one, *_), (two, model, preprocess, seen), (three, *rest) = command(monkeypatch, "--evaluate", "tiny", *args)
    assert (one, two, three) == ("attributes", "benchmark", "ood") and rest == [model, preprocess, split, "benchmark"]
    assert seen == split and model.visual.resolution == 64


def test_the_command_fails_before_it_draws(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--pool", 0)
    assert "must be at least 1" in capsys.readouterr().err
    command(monkeypatch, "--output", tmp_path / "new/tiny.pt.gz")
    assert (tmp_path / "new").is_dir()                               # else the first save would fail
    with pytest.raises(SystemExit, match="error: .*nothing.pt"):
        command(monkeypatch, "--evaluate", tmp_path / "nothing.pt")
