"""Makes tiny.pt.gz, a CLIP of 1.5 million parameters, from nothing but the drawn pictures of critters.py.

    python -m extras.pretrain_tiny --output tiny.pt.gz              # about 40 minutes on 2 cores; call again to go on
    python -m extras.pretrain_tiny --evaluate clip/tiny.pt.gz       # what the weights can do

Three contrastive losses, all of them through the text tower, so that the result is an ordinary CLIP:
image against caption; the CLS token against phrases that differ in one word, and against captions that do;
V-V patch tokens against the phrase that the mask gives them. The last one is what makes it learn in so short a time.

On Linux set MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 before the command: glibc then
keeps the memory of large tensors instead of returning it, and a step takes half the time or less.
"""

import gzip
import io
import math
import multiprocessing
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clip
from harness import machine, places
from harness.parser import Parser
from sources import critters
from clip import CLIP, tokenize
from clip.loader import MEAN, STD

SIZES = dict(embed_dim=128, resolution=64, patch=8, vision_width=128, vision_layers=4,
             context_length=77, vocab_size=49408, text_width=128, text_layers=3)
GRID = SIZES["resolution"] // SIZES["patch"]

BANK = [text for phrases in critters.PHRASES.values() for text in phrases]
PLACE = {text: i for i, text in enumerate(BANK)}                    # phrase -> its number in the bank
GROUND = torch.tensor([PLACE[text] for text in critters.PHRASES["ground"]], dtype=torch.int16)
WEIGHTS = {"contrast": .7, "slots": 3., "words": 1., "regions": 1.}


# ---- pictures, drawn ahead ----

def patch_slots(mask):
    """A mask -> the slot that each patch shows (P,), -1 where none does clearly."""
    patches = mask.reshape(GRID, -1, GRID, mask.shape[1] // GRID).swapaxes(1, 2).reshape(GRID * GRID, -1)
    share = np.stack([(patches == slot).mean(1) for slot in range(len(critters.SLOTS))], axis=1)
    ground, best = share[:, 0] > .9, 1 + share[:, 1:].argmax(1)
    return np.where(ground, 0, np.where(share[:, 1:].max(1) > .3, best, -1))


def draw_one(seed):
    """One picture of the stream -> pixels, phrase number of each patch (P,) or -1, phrases by slot."""
    picture, mask, phrases = critters.sample(random.Random(seed))
    numbers = np.array([PLACE.get(phrases.get(slot), -1) for slot in critters.SLOTS] + [-1])
    return np.asarray(picture), numbers[patch_slots(mask)].astype(np.int16), phrases


def draw_pool(size, seed, workers):
    """All pictures of a training run -> pixels (N, 64, 64, 3) uint8, patch targets (N, P) int16, phrases."""
    with multiprocessing.Pool(workers) as pool:
        drawn = pool.imap(draw_one, (f"stream {seed} {i}" for i in range(size)), chunksize=250)
        pixels, targets, phrases = zip(*drawn)
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(targets)), phrases


def augment(pixels, targets, rng):
    """Random flip of the batch, small shift, brightness and contrast -> normalised images (B, 3, 64, 64), targets."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if rng.random() < .5:
        images, targets = images.flip(-1), targets.unflatten(1, (GRID, GRID)).flip(-1).flatten(1)
    dx, dy = rng.randint(0, 4), rng.randint(0, 4)
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + 64, dx:dx + 64]
    gain = 1 + .2 * (torch.rand(len(images), 3, 1, 1) - .5)
    images = (images * gain + .1 * (torch.rand(len(images), 1, 1, 1) - .5)).clamp(0, 1)
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), targets


# ---- words ----

ADJECTIVES = {  # "a star with white horns" may be called "a horned star"
    "horns": "horned", "ears": "long-eared", "crown": "crowned", "spikes": "spiky", "hat": "hatted",
    "wings": "winged", "claws": "clawed", "fins": "finned", "leaves": "leafy", "legs": "long-legged", "boots": "booted",
    "wheels": "wheeled", "tail": "tailed", "tentacles": "tentacled",
    "stripes": "striped", "spots": "spotted", "checks": "checkered", "band": "banded"}
EMPTY_ADJECTIVES = ("common", "little", "great", "royal", "northern")     # said at random: they mean nothing
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "this is ")


def caption(phrases, rng):
    """A sentence about some of an image's phrases. How it is said depends on `rng` alone, not on the words."""
    said = {slot: text for slot, text in phrases.items() if rng.random() < .7 or slot == "body"} or phrases
    adjectives, brief = [rng.choice(EMPTY_ADJECTIVES)] if rng.random() < .1 else [], rng.random() < .4
    for slot in ("pattern", "top", "sides", "bottom"):
        noun = said.get(slot, "").split(" ")[-1]
        if rng.random() < .4 and brief and "body" in said and noun in ADJECTIVES:
            adjectives.append(ADJECTIVES[noun])
            said = {key: text for key, text in said.items() if key != slot}
    return rng.choice(OPENINGS) + critters.sentence(said, adjectives)


def wrong_caption(phrases, seed, rng):
    """The caption that `seed` gives, with one word wrong."""
    right = wrong = caption(phrases, random.Random(seed))
    while wrong == right:                                           # why: not all that is altered is also said
        wrong = caption(alter(phrases, rng), random.Random(seed))
    return wrong


def alter(phrases, rng):
    """One word exchanged: a colour, a noun, a number, a ground."""
    slot = rng.choice([*phrases])
    words = phrases[slot].split()
    near = [text for text in critters.PHRASES[slot] if text != phrases[slot]
            and (slot in ("eyes", "ground") or set(text.split()[-2:]) & set(words[-2:]))]
    return {**phrases, slot: rng.choice(near)}


class Vocabulary:
    """The tokens that the drawn world uses: only their rows are trained. [EOT] stays the largest."""

    def __init__(self, phrases):
        rng = random.Random(0)
        self.ids = tokenize(BANK + [caption(p, rng) for p in phrases]).unique()

    def __call__(self, texts):
        return torch.searchsorted(self.ids, tokenize(texts))


# ---- losses ----

def slot_loss(logits, phrases):
    """Which phrase of each slot is true of the image, among all phrases of that slot.  logits (B, bank)"""
    losses = []
    for slot, choices in critters.PHRASES.items():
        here = [i for i, p in enumerate(phrases) if slot in p]
        if here:
            columns = torch.tensor([PLACE[text] for text in choices])
            target = torch.tensor([choices.index(phrases[i][slot]) for i in here])
            losses.append(F.cross_entropy(logits[here][:, columns], target) / math.log(len(choices)))
    return sum(losses) / len(losses)


def losses_of(model, images, targets, phrases, vocabulary, rng, n_altered=3):
    """One batch -> the parts of the loss by name."""
    cls, patches = model.encode_patches(images, "vv")
    image = F.normalize(cls @ model.visual.proj, dim=-1)
    scale = model.logit_scale.exp()

    bank = F.normalize(model.encode_text(vocabulary(BANK)), dim=-1)
    told, wrong = [], []
    for i, p in enumerate(phrases):
        seed = rng.random()
        told.append(caption(p, random.Random(seed)))
        if i < len(phrases) // 4:
            wrong += [wrong_caption(p, seed, rng) for _ in range(n_altered)]
    texts = F.normalize(model.encode_text(vocabulary(told + wrong)), dim=-1)
    told, wrong = texts[: len(phrases)], texts[len(phrases):].unflatten(0, (-1, n_altered))

    logits = scale * image @ told.T
    pairs = torch.arange(len(images))
    contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    some = image[: len(wrong)]
    groups = torch.cat([told[: len(wrong), None], wrong], dim=1)                      # (B/4, 1 + altered, D)
    words = F.cross_entropy(scale * torch.einsum("bd,bnd->bn", some, groups), pairs.new_zeros(len(some)))

    keep = (targets >= 0) & (~torch.isin(targets, GROUND) | (torch.rand(targets.shape) < .25))    # ground is everywhere
    tokens = F.normalize(patches[keep] @ model.visual.proj, dim=-1)
    regions = F.cross_entropy(scale * tokens @ bank.T, targets[keep].long())
    slots = slot_loss(scale * image @ bank.T, phrases)
    return {"contrast": contrast, "slots": slots, "words": words, "regions": regions}


# ---- the model ----

def new_model(vocabulary):
    """A CLIP with OpenAI's initialisation and a token table of the vocabulary's size, ready to train."""
    model = CLIP(**{**SIZES, "vocab_size": len(vocabulary.ids)}).requires_grad_(True)
    for name, p in model.named_parameters():
        if "ln_" in name:
            nn.init.constant_(p, float(name.endswith("weight")))
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif "embedding" in name:
            nn.init.normal_(p, std=.02)
        elif p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -.5 * (.35 if "out_proj" in name or "c_proj" in name else 1))
    nn.init.constant_(model.logit_scale, math.log(1 / .07))
    return model


def save_weights(model, vocabulary, path):
    """Writes OpenAI's format: half precision, a row for each of the 49408 tokens, zero for those never seen."""
    state = {key: value.detach().half() for key, value in model.state_dict().items()}
    table = torch.zeros(SIZES["vocab_size"], SIZES["text_width"], dtype=torch.half)
    table[vocabulary.ids] = state["token_embedding.weight"]
    buffer = io.BytesIO()
    torch.save({**state, "token_embedding.weight": table}, buffer)
    packed = io.BytesIO()
    with gzip.GzipFile(path, "wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(buffer.getvalue())
    machine.write_whole(path, lambda temporary: temporary.write_bytes(packed.getvalue()))


# ---- the loop ----

def make_optimizer(model, lr):
    """AdamW; weight decay on matrices alone."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim > 1 and "embedding" not in name else others).append(p)
    return torch.optim.AdamW([{"params": matrices, "weight_decay": .05}, {"params": others, "weight_decay": 0.}],
                             lr=lr, betas=(.9, .98))


def save_checkpoint(path, **state):
    """All that the loop goes on with, whole or not at all."""
    machine.write_whole(path, lambda temporary: torch.save(state, temporary))


def train(args):
    torch.manual_seed(args.seed)
    start = time.monotonic()
    pixels, targets, phrases = draw_pool(args.pool, args.seed, args.workers)
    vocabulary = Vocabulary(phrases)
    model, checkpoint, step = new_model(vocabulary), args.output + ".resume", 0
    optimizer = make_optimizer(model, args.lr)
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    print(f"{args.pool} pictures, {len(vocabulary.ids)} tokens, {len(BANK)} phrases, from step {step}, "
          f"{time.monotonic() - start:.0f} s", flush=True)

    start, first = time.monotonic(), step
    while step < args.steps:
        rng = random.Random(f"{args.seed} {step}")                  # why: a resumed run draws what it would have drawn
        torch.manual_seed(rng.getrandbits(32))
        batch = torch.randint(args.pool, (args.batch_size,))
        images, wanted = augment(pixels[batch], targets[batch], rng)
        losses = losses_of(model, images, wanted, [phrases[i] for i in batch], vocabulary, rng)
        loss = sum(WEIGHTS[name] * part for name, part in losses.items())
        parts = " | ".join(f"{name} {part.item():.3f}" for name, part in losses.items())
        if not torch.isfinite(loss):
            raise RuntimeError(f"step {step}: loss {loss.item()} | {parts}")

        for group in optimizer.param_groups:                        # linear warm-up, then cosine to zero
            group["lr"] = args.lr * min((step + 1) / 200, .5 + .5 * math.cos(math.pi * step / args.steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        step += 1

        if step % 20 == 0:
            pace = (time.monotonic() - start) / (step - first)
            print(f"step {step:5d} | loss {loss.item():.3f} | {parts} | scale {model.logit_scale.exp().item():.1f} | "
                  f"{pace:.2f} s/step | {pace * (args.steps - step) / 60:.0f} min left", flush=True)
        if step % 300 == 0 or step == args.steps:
            save_checkpoint(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            save_weights(model, vocabulary, args.output)


# ---- what the weights can do ----

def percent(hits):
    return f"{100 * torch.as_tensor(hits).float().mean():5.1f}"


def features(model, preprocess, pictures, streams=("vv",)):
    """Pictures -> unit CLS features (N, D), then for each stream unit patch features (N, P, D)."""
    out = []
    for images in torch.stack([preprocess(picture) for picture in pictures]).split(256):
        tokens = [model.encode_patches(images, stream) for stream in streams]
        out.append([F.normalize(x @ model.visual.proj, dim=-1) for x in (tokens[0][0], *(z for _, z in tokens))])
    return [torch.cat(parts) for parts in zip(*out)]


def text_features(model, texts):
    """Texts -> unit features (n, D)."""
    return F.normalize(model.encode_text(tokenize(texts)), dim=-1)


def evaluate_attributes(model, preprocess, n=2000):
    """On creatures that the stream did not draw: the phrase nearest to CLS, and to the patches that show its slot."""
    rng = random.Random("evaluate")
    pictures, masks, phrases = zip(*(critters.scene(rng, critters.random_critter(rng), critters.random_prop(rng))
                                     for _ in range(n)))
    slots = torch.from_numpy(np.stack([patch_slots(mask) for mask in masks]))                        # (N, P)
    cls, *streams = features(model, preprocess, pictures, ("vv", "qk"))
    print(f"\n{n} creatures, in %: the right phrase, noun, colour")
    print(f"{'':8s} | {'CLS':^17s} | {'V-V patches':^17s} | {'ordinary patches':^17s} | chance")
    for value, slot in enumerate(critters.SLOTS):
        choices, shown = critters.PHRASES[slot], slots == value
        here = [i for i in range(n) if slot in phrases[i] and shown[i].any()]
        truth, text = [phrases[i][slot].split() for i in here], text_features(model, choices)
        means = [torch.stack([patches[i, shown[i]].mean(0) for i in here]) for patches in streams]
        row = []
        for feature in (cls[here], *means):
            said = [choices[k].split() for k in (feature @ text.T).argmax(-1)]
            row.append(" ".join(percent([a[words] == b[words] for a, b in zip(said, truth)])
                                for words in (slice(None), slice(-1, None), slice(-2, -1))))
        print(f"{slot:8s} | {' | '.join(row)} | {100 / len(choices):.1f}")


def linear_probe(train, labels, test, penalty=1e-3):
    """Logistic regression on standardised features, trained to its end -> the labels it gives `test`."""
    mean, std = train.mean(0), train.std(0)
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


def evaluate_benchmark(model, preprocess, split):
    """Zero-shot by name and by description, a linear probe, and where the best patches lie."""
    def pool(name, count):
        labels = torch.arange(len(critters.CLASSES)).repeat_interleave(count)
        return [critters.example(name, int(label), i % count) for i, label in enumerate(labels)], labels

    examples, labels = pool(split, critters.POOL[split])
    few, few_labels = pool("train", 16)
    cls, patches = features(model, preprocess, [picture for picture, _, _ in examples])
    names = text_features(model, [f"a photo of a {name}" for name in critters.class_names()])
    full = text_features(model, [f"a photo of {text}" for text in critters.descriptions()])
    guess = (cls @ names.T).argmax(-1)
    probed = linear_probe(features(model, preprocess, [picture for picture, _, _ in few])[0], few_labels, cls)
    slots = torch.from_numpy(np.stack([patch_slots(mask) for _, mask, _ in examples]))
    best = torch.einsum("npd,nd->np", patches, names[labels]).topk(10).indices
    print(f"\n{len(labels)} {split} pictures, in %")
    print(f"zero-shot by class name        {percent(guess == labels)}, of the kinds: " + ", ".join(
          f"{kind.body} {percent(hits)}" for (kind, *_), hits in zip(critters.KINDS, (guess == labels).view(4, -1))))
    print(f"the right kind by class name   {percent(guess // 4 == labels // 4)}")
    print(f"zero-shot by full description  {percent((cls @ full.T).argmax(-1) == labels)}")
    print(f"16-shot linear probe on CLS    {percent(probed == labels)}")
    print(f"top-10 V-V patches on critter  {percent((slots.gather(1, best) > 0) & (slots.gather(1, best) < 7))}")
    return names, cls, patches


def evaluate_ood(model, preprocess, split, names, cls, patches):
    """AUROC of MCM and of GL-MCM: how often a picture of the benchmark has more confidence than one from outside."""
    def confidence(cls, patches):
        mcm = (cls @ names.T).softmax(-1).amax(-1)
        return mcm, mcm + (patches @ names.T).softmax(-1).amax((1, 2))

    inside, table = confidence(cls, patches), []
    first = critters.OOD_SIZE if split == "val" else 0              # why: the sets proper are kept for the test
    print("\nOOD, zero-shot AUROC in %          MCM, GL-MCM")
    for name in critters.OOD_SETS:
        pictures = [critters.ood_picture(name, first + i) for i in range(critters.OOD_SIZE)]
        outside = confidence(*features(model, preprocess, pictures))
        table.append([(a[:, None] > b).float().mean() for a, b in zip(inside, outside)])
        print(f"{name:30s} " + ", ".join(map(percent, table[-1])))
    print(f"{'mean':30s} " + ", ".join(map(percent, zip(*table))))


@torch.no_grad()
def evaluate(path, split):
    model, preprocess = clip.load(path)
    evaluate_attributes(model, preprocess)
    evaluate_ood(model, preprocess, split, *evaluate_benchmark(model, preprocess, split))


def parse_args(argv=None):
    """The options."""
    p = Parser("python -m extras.pretrain_tiny [options]", __doc__)
    p.add_argument("--output", default="tiny.pt.gz", help="the weights; OUTPUT.resume beside it is to go on from")
    p.add_argument("--steps", type=int, default=5000, help="length of the run and of its cosine schedule")
    p.add_argument("--pool", type=int, default=50000, help="how many pictures are drawn, before the first step")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--lr", type=float, default=1.2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw the pictures")
    p.add_argument("--evaluate", metavar="WEIGHTS", help="measure these weights instead of training")
    p.add_argument("--split", choices=("val", "test"), default="val",
                   help="which pictures --evaluate looks at")
    args = p.parse_args(argv)
    if min(args.steps, args.pool, args.batch_size, args.workers) < 1:
        p.error("--steps, --pool, --batch-size and --workers must be at least 1")
    return args


@machine.plain_errors("the same command goes on")
def main(args):
    """Trains, or measures weights."""
    if args.evaluate:
        return evaluate(args.evaluate, args.split)
    places.check_file(args.output, "--output")
    train(args)


if __name__ == "__main__":
    main(parse_args())
