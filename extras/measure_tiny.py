"""What the weights of a tiny CLIP can do: the tables that `python -m extras.pretrain_tiny --evaluate` prints.

They are zero-shot but for one linear probe: attributes of creatures, the sixteen classes, OOD detection.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clip
from extras.stream import patch_slots
from sources import critters


@torch.no_grad()
def evaluate(path, split):
    """Prints all tables of a file of weights. split: which pictures of the classes it looks at."""
    model, preprocess = clip.load(path)
    evaluate_attributes(model, preprocess)
    evaluate_ood(model, preprocess, split, *evaluate_benchmark(model, preprocess, split))


def percent(hits):
    """The mean of truth values, or of shares, in percent."""
    return f"{100 * torch.as_tensor(hits).float().mean():5.1f}"


def features(model, preprocess, pictures, streams=("vv",)):
    """Pictures -> unit CLS features (N, D), then for each stream unit patch features (N, P, D)."""
    batches = []
    for images in torch.stack([preprocess(picture) for picture in pictures]).split(256):
        tokens = [model.encode_patches(images, stream) for stream in streams]
        cls, _ = tokens[0]
        batches.append([F.normalize(x @ model.visual.proj, dim=-1) for x in (cls, *(z for _, z in tokens))])
    return [torch.cat(parts) for parts in zip(*batches)]


def text_features(model, texts):
    """Texts -> unit features (n, D)."""
    return F.normalize(model.encode_text(clip.tokenize(texts)), dim=-1)


# ---- attributes --------------------------------------------------------------------------------------------

def evaluate_attributes(model, preprocess, n=2000):
    """The phrase nearest to CLS, and to the patches that show its slot, on creatures not of the stream."""
    rng = random.Random("evaluate")
    scenes = [critters.scene(rng, critters.random_critter(rng), critters.random_prop(rng)) for _ in range(n)]
    pictures, masks, phrases = zip(*scenes)
    slots = torch.from_numpy(np.stack([patch_slots(mask) for mask in masks]))               # (N, P)
    cls, *streams = features(model, preprocess, pictures, ("vv", "qk"))

    print(f"\n{n} creatures, in %: the right phrase, noun, colour")
    print(f"{'':8s} | {'CLS':^17s} | {'V-V patches':^17s} | {'ordinary patches':^17s} | chance")
    for value, slot in enumerate(critters.SLOTS):
        choices = critters.PHRASES[slot]
        shown = slots == value
        here = [i for i in range(n) if slot in phrases[i] and shown[i].any()]
        means = [torch.stack([patches[i, shown[i]].mean(0) for i in here]) for patches in streams]

        text = text_features(model, choices)
        truth = [phrases[i][slot].split() for i in here]
        cells = [shares_right(feature @ text.T, choices, truth) for feature in (cls[here], *means)]
        print(f"{slot:8s} | {' | '.join(cells)} | {100 / len(choices):.1f}")


def shares_right(cosines, choices, truth):
    """How often the phrase of the largest cosine (n, choices) is the true one, its noun, its colour."""
    said = [choices[k].split() for k in cosines.argmax(-1)]
    phrase = percent([a == b for a, b in zip(said, truth)])
    noun = percent([a[-1:] == b[-1:] for a, b in zip(said, truth)])
    colour = percent([a[-2:-1] == b[-2:-1] for a, b in zip(said, truth)])
    return f"{phrase} {noun} {colour}"


# ---- the benchmark -----------------------------------------------------------------------------------------

def evaluate_benchmark(model, preprocess, split):
    """Zero-shot by name and by description, a linear probe, and where the best patches lie.

    -> unit features of the class names (C, D), of the pictures (N, D) and of their patches (N, P, D).
    """
    pictures, masks, labels = examples(split, critters.POOL[split])
    few, _, few_labels = examples("train", 16)
    cls, patches = features(model, preprocess, pictures)
    few_cls, _ = features(model, preprocess, few)
    names = text_features(model, [f"a photo of a {name}" for name in critters.class_names()])
    full = text_features(model, [f"a photo of {text}" for text in critters.descriptions()])

    guess = (cls @ names.T).argmax(-1)
    right = guess == labels
    kinds = [f"{kind.body} {percent(hits)}" for (kind, *_), hits in zip(critters.KINDS, right.view(4, -1))]
    probed = linear_probe(few_cls, few_labels, cls)
    slots = torch.from_numpy(np.stack([patch_slots(mask) for mask in masks]))               # (N, P)
    best = torch.einsum("npd,nd->np", patches, names[labels]).topk(10).indices
    shown = slots.gather(1, best)                              # 0 is the ground, 7 a prop, -1 nothing clear

    print(f"\n{len(labels)} {split} pictures, in %")
    print(f"zero-shot by class name        {percent(right)}, of the kinds: {', '.join(kinds)}")
    print(f"the right kind by class name   {percent(guess // 4 == labels // 4)}")
    print(f"zero-shot by full description  {percent((cls @ full.T).argmax(-1) == labels)}")
    print(f"16-shot linear probe on CLS    {percent(probed == labels)}")
    print(f"top-10 V-V patches on critter  {percent((shown > 0) & (shown < 7))}")
    return names, cls, patches


def examples(split, count):
    """The first `count` pictures of each class, their masks, and their labels (N,)."""
    labels = torch.arange(len(critters.CLASSES)).repeat_interleave(count)
    drawn = [critters.example(split, int(label), i % count) for i, label in enumerate(labels)]
    pictures, masks, _ = zip(*drawn)
    return pictures, masks, labels


def linear_probe(train, labels, test, penalty=1e-3):
    """Logistic regression on standardised features, trained to its end -> the labels it gives `test`."""
    mean = train.mean(0)
    std = train.std(0)
    layer = nn.Linear(train.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer((train - mean) / std), labels) + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer((test - mean) / std).argmax(-1)


# ---- out of distribution -----------------------------------------------------------------------------------

def evaluate_ood(model, preprocess, split, names, cls, patches):
    """AUROC of MCM and GL-MCM: how often a picture of the benchmark has more confidence than one outside it.

    names, cls, patches: what `evaluate_benchmark` gives.
    """
    def confidence(cls, patches):
        mcm = (cls @ names.T).softmax(-1).amax(-1)
        return mcm, mcm + (patches @ names.T).softmax(-1).amax((1, 2))

    inside = confidence(cls, patches)
    first = critters.OOD_SIZE if split == "val" else 0         # why: the sets proper are kept for the test
    table = []
    print("\nOOD, zero-shot AUROC in %          MCM, GL-MCM")
    for name in critters.OOD_SETS:
        pictures = [critters.ood_picture(name, first + i) for i in range(critters.OOD_SIZE)]
        outside = confidence(*features(model, preprocess, pictures))
        table.append([(a[:, None] > b).float().mean() for a, b in zip(inside, outside)])
        print(f"{name:30s} " + ", ".join(map(percent, table[-1])))
    print(f"{'mean':30s} " + ", ".join(map(percent, zip(*table))))
