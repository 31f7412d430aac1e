"""What the tiny CLIP learns from: drawn pictures, the phrase that each patch shows, and captions.

All of it comes from sources/critters.py. extras/pretrain_tiny.py trains with it.
"""

import multiprocessing
import random

import numpy as np
import torch
import torch.nn.functional as F

from clip import tokenize
from clip.loader import MEAN, STD
from harness.streams import let_signals_end
from sources import critters

PATCH = 8                                                           # side of a patch in pixels
GRID = critters.SIZE // PATCH                                       # patches in a row

BANK = [text for phrases in critters.PHRASES.values() for text in phrases]
PLACE = {text: i for i, text in enumerate(BANK)}                    # phrase -> its number in the bank
GROUND = torch.tensor([PLACE[text] for text in critters.PHRASES["ground"]], dtype=torch.int16)


# ---- pictures, drawn ahead ---------------------------------------------------------------------------------

def patch_slots(mask):
    """A mask (64, 64) -> the slot that each patch shows (P,), -1 where none does clearly."""
    patches = mask.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    share = np.stack([(patches == slot).mean(1) for slot in range(len(critters.SLOTS))], axis=1)
    things = share[:, 1:]                                           # all but the ground
    shown = np.where(things.max(1) > .3, 1 + things.argmax(1), -1)
    return np.where(share[:, 0] > .9, 0, shown)


def draw_one(seed):
    """One picture of the stream -> pixels, phrase number of each patch (P,) or -1, phrases by slot."""
    picture, mask, phrases = critters.sample(random.Random(seed))
    numbers = [PLACE.get(phrases.get(slot), -1) for slot in critters.SLOTS]
    numbers = np.array([*numbers, -1])                              # the last is that of slot -1
    return np.asarray(picture), numbers[patch_slots(mask)].astype(np.int16), phrases


def draw_pool(size, seed, workers):
    """All pictures of a training run -> pixels (N, 64, 64, 3) uint8, patch targets (N, P) int16, phrases."""
    # why: each process of the pool would show a traceback of its own
    with multiprocessing.Pool(workers, let_signals_end) as pool:
        drawn = pool.imap(draw_one, (f"stream {seed} {i}" for i in range(size)), chunksize=250)
        pixels, targets, phrases = zip(*drawn)
        pool.close()
        pool.join()                            # why: else they are ended by a signal, and may say so
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(targets)), phrases


def augment(pixels, targets, rng):
    """Flips, shifts and lights a batch at random -> normalised images (B, 3, 64, 64), targets (B, P).

    The flip and the shift, of two pixels at most, are the same for the whole batch.
    """
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if rng.random() < .5:
        images = images.flip(-1)
        targets = targets.unflatten(1, (GRID, GRID)).flip(-1).flatten(1)

    x = rng.randint(0, 4)
    y = rng.randint(0, 4)
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")[:, :, y:y + critters.SIZE, x:x + critters.SIZE]

    contrast = 1 + .2 * (torch.rand(len(images), 3, 1, 1) - .5)
    brightness = .1 * (torch.rand(len(images), 1, 1, 1) - .5)
    images = (images * contrast + brightness).clamp(0, 1)
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), targets


# ---- captions ----------------------------------------------------------------------------------------------

ADJECTIVES = {  # "a star with white horns" may be called "a horned star"
    "horns": "horned", "ears": "long-eared", "crown": "crowned", "spikes": "spiky", "hat": "hatted",
    "wings": "winged", "claws": "clawed", "fins": "finned", "leaves": "leafy",
    "legs": "long-legged", "boots": "booted", "wheels": "wheeled", "tail": "tailed", "tentacles": "tentacled",
    "stripes": "striped", "spots": "spotted", "checks": "checkered", "band": "banded"}
EMPTY_ADJECTIVES = ("common", "little", "great", "royal", "northern")     # said at random: they mean nothing
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "this is ")


def caption(phrases, rng):
    """A sentence about some of an image's phrases. How it is said depends on `rng`, not on the words."""
    said = {slot: text for slot, text in phrases.items() if rng.random() < .7 or slot == "body"}
    if not said:
        said = phrases
    adjectives = []
    if rng.random() < .1:
        adjectives.append(rng.choice(EMPTY_ADJECTIVES))
    brief = rng.random() < .4

    for slot in ("pattern", "top", "sides", "bottom"):
        noun = said.get(slot, "").split(" ")[-1]
        if rng.random() < .4 and brief and "body" in said and noun in ADJECTIVES:
            adjectives.append(ADJECTIVES[noun])
            said = {other: text for other, text in said.items() if other != slot}
    return rng.choice(OPENINGS) + critters.sentence(said, adjectives)


def wrong_caption(phrases, seed, rng):
    """The caption that `seed` gives, with one word wrong."""
    right = caption(phrases, random.Random(seed))
    wrong = right
    while wrong == right:                                           # why: what is altered need not be said
        wrong = caption(alter(phrases, rng), random.Random(seed))
    return wrong


def alter(phrases, rng):
    """The phrases with one word exchanged: a colour, a noun, a number, a ground."""
    slot = rng.choice([*phrases])
    words = set(phrases[slot].split()[-2:])
    others = [text for text in critters.PHRASES[slot] if text != phrases[slot]]
    if slot not in ("eyes", "ground"):
        others = [text for text in others if words & set(text.split()[-2:])]
    return {**phrases, slot: rng.choice(others)}


class Vocabulary:
    """The tokens that the drawn world uses: only their rows are trained. [EOT] stays the largest."""

    def __init__(self, phrases):
        rng = random.Random(0)
        self.ids = tokenize(BANK + [caption(p, rng) for p in phrases]).unique()

    def __call__(self, texts):
        """Texts -> the places of their tokens in the vocabulary (n, 77)."""
        return torch.searchsorted(self.ids, tokenize(texts))
