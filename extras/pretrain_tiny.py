"""Makes tiny.pt.gz, a CLIP of 1.5 million parameters, from nothing but the drawn pictures of critters.py.

    python -m extras.pretrain_tiny --output tiny.pt.gz          # 40 minutes on 2 cores; again to go on
    python -m extras.pretrain_tiny --evaluate clip/tiny.pt.gz   # what the weights can do

Contrastive losses, all of them through the text tower, so that the result is an ordinary CLIP: images against
captions; the CLS token against phrases, and against captions, that differ in one word; V-V patch tokens
against the phrase that the mask gives them. The last one is what makes it learn in so short a time.

On Linux set MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 before the command: glibc
then keeps the memory of large tensors instead of returning it, and a step takes half the time or less.
"""

import gzip
import io
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIP
from extras.measure_tiny import evaluate
from extras.stream import BANK, GROUND, PATCH, PLACE, Vocabulary, augment, caption, draw_pool, wrong_caption
from harness import machine, places
from harness.parser import Parser
from sources import critters
from sources.listing import check_regular

SIZES = dict(embed_dim=128, resolution=critters.SIZE, patch=PATCH, vision_width=128, vision_layers=4,
             context_length=77, vocab_size=49408, text_width=128, text_layers=3)
WEIGHTS = {"contrast": .7, "slots": 3., "words": 1., "regions": 1.}     # of the losses


# ---- losses ------------------------------------------------------------------------------------------------

def losses_of(model, images, targets, phrases, vocabulary, rng, n_altered=3):
    """One batch -> the parts of the loss by name.

    images: (B, 3, 64, 64). targets: phrase numbers of their patches (B, P). phrases: of each image, by slot.
    """
    cls, patches = model.encode_patches(images, "vv")
    image = F.normalize(cls @ model.visual.proj, dim=-1)                                    # (B, D)
    scale = model.logit_scale.exp()
    bank = F.normalize(model.encode_text(vocabulary(BANK)), dim=-1)                         # (bank, D)
    told, wrong = encode_captions(model, phrases, vocabulary, rng, n_altered)

    # why in this order: gradients add up in it, and the weights stay the same to the last bit
    contrast = contrast_loss(scale * image @ told.T)
    words = word_loss(image, told, wrong, scale)
    regions = region_loss(model, patches, targets, bank, scale)
    slots = slot_loss(scale * image @ bank.T, phrases)
    return {"contrast": contrast, "slots": slots, "words": words, "regions": regions}


def encode_captions(model, phrases, vocabulary, rng, n_altered):
    """Unit features: a caption for each image (B, D), wrong ones for a quarter of them (B/4, altered, D)."""
    told = []
    wrong = []
    for i, said in enumerate(phrases):
        seed = rng.random()
        told.append(caption(said, random.Random(seed)))
        if i < len(phrases) // 4:
            wrong += [wrong_caption(said, seed, rng) for _ in range(n_altered)]

    texts = F.normalize(model.encode_text(vocabulary(told + wrong)), dim=-1)
    return texts[: len(told)], texts[len(told):].unflatten(0, (-1, n_altered))


def contrast_loss(logits):
    """CLIP's own: which caption of the batch belongs to an image, which image to a caption.  logits (B, B)"""
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def slot_loss(logits, phrases):
    """Which phrase of each slot is true of the image, among all phrases of that slot.  logits (B, bank)"""
    losses = []
    for slot, choices in critters.PHRASES.items():
        here = [i for i, said in enumerate(phrases) if slot in said]
        if here:
            columns = torch.tensor([PLACE[text] for text in choices])
            target = torch.tensor([choices.index(phrases[i][slot]) for i in here])
            loss = F.cross_entropy(logits[here][:, columns], target)
            losses.append(loss / math.log(len(choices)))            # 1 for a guess
    return sum(losses) / len(losses)


def word_loss(image, told, wrong, scale):
    """Which of a true caption and its altered ones belongs to the image."""
    some = image[: len(wrong)]
    groups = torch.cat([told[: len(wrong), None], wrong], dim=1)                   # (B/4, 1 + altered, D)
    logits = scale * torch.einsum("bd,bnd->bn", some, groups)
    return F.cross_entropy(logits, torch.zeros(len(some), dtype=torch.long))


def region_loss(model, patches, targets, bank, scale):
    """Which phrase of the bank a patch shows. why a quarter of the ground: it is everywhere."""
    ground = torch.isin(targets, GROUND)
    keep = (targets >= 0) & (~ground | (torch.rand(targets.shape) < .25))
    tokens = F.normalize(patches[keep] @ model.visual.proj, dim=-1)
    return F.cross_entropy(scale * tokens @ bank.T, targets[keep].long())


# ---- the model ---------------------------------------------------------------------------------------------

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
            ends_a_block = "out_proj" in name or "c_proj" in name
            nn.init.normal_(p, std=p[0].numel() ** -.5 * (.35 if ends_a_block else 1))

    nn.init.constant_(model.logit_scale, math.log(1 / .07))
    return model


def save_weights(model, vocabulary, path):
    """Writes OpenAI's format: half precision, a row for each of the 49408 tokens, 0 for those never seen."""
    state = {key: value.detach().half() for key, value in model.state_dict().items()}
    table = torch.zeros(SIZES["vocab_size"], SIZES["text_width"], dtype=torch.half)
    table[vocabulary.ids] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    buffer = io.BytesIO()
    torch.save(state, buffer)

    packed = io.BytesIO()
    with gzip.GzipFile(path, "wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(buffer.getvalue())
    machine.write_whole(path, lambda temporary: temporary.write_bytes(packed.getvalue()))


# ---- the loop ----------------------------------------------------------------------------------------------

def make_optimizer(model, lr):
    """AdamW; weight decay on matrices alone."""
    matrices = []
    others = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and "embedding" not in name
        (matrices if is_matrix else others).append(p)
    groups = [{"params": matrices, "weight_decay": .05}, {"params": others, "weight_decay": 0.}]
    return torch.optim.AdamW(groups, lr=lr, betas=(.9, .98))


def rate_at(step, args):
    """The learning rate: linear warm-up, then a cosine to zero."""
    return args.lr * min((step + 1) / 200, .5 + .5 * math.cos(math.pi * step / args.steps))


def save_checkpoint(path, **state):
    """All that the loop goes on with, whole or not at all."""
    machine.write_whole(path, lambda temporary: torch.save(state, temporary))


def resume(path, model, optimizer):
    """Takes a checkpoint over where there is one -> how many steps are done.

    Raises ValueError for a file that is none, OSError for a pipe.
    """
    if not os.path.exists(path):
        return 0
    check_regular(path)
    try:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])
    # why so broad: in a damaged file pickle and torch can trip over anything
    except Exception as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of this program ({type(error).__name__}): "
                         "remove it, or name another --output") from error


def weighted(losses, step):
    """The loss, and its parts as text. Raises RuntimeError, with the parts, for a loss that is not finite."""
    loss = sum(WEIGHTS[name] * part for name, part in losses.items())
    parts = " | ".join(f"{name} {part.item():.3f}" for name, part in losses.items())
    if not torch.isfinite(loss):
        raise RuntimeError(f"step {step}: loss {loss.item()} | {parts}")
    return loss, parts


def train(args):
    """Trains from the first step, or from where OUTPUT.resume stands, and writes the weights."""
    torch.manual_seed(args.seed)
    start = time.monotonic()
    pixels, targets, phrases = draw_pool(args.pool, args.seed, args.workers)
    vocabulary = Vocabulary(phrases)
    model = new_model(vocabulary)
    optimizer = make_optimizer(model, args.lr)

    checkpoint = args.output + ".resume"
    first = resume(checkpoint, model, optimizer)
    print(f"{args.pool} pictures, {len(vocabulary.ids)} tokens, {len(BANK)} phrases, from step {first}, "
          f"{time.monotonic() - start:.0f} s", flush=True)

    start = time.monotonic()
    for step in range(first, args.steps):
        rng = random.Random(f"{args.seed} {step}")          # why: a resumed run draws what it would have
        torch.manual_seed(rng.getrandbits(32))
        batch = torch.randint(args.pool, (args.batch_size,))
        images, wanted = augment(pixels[batch], targets[batch], rng)
        losses = losses_of(model, images, wanted, [phrases[i] for i in batch], vocabulary, rng)
        loss, parts = weighted(losses, step)

        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()

        done = step + 1
        if done % 20 == 0:
            pace = (time.monotonic() - start) / (done - first)
            print(f"step {done:5d} | loss {loss.item():.3f} | {parts} | "
                  f"scale {model.logit_scale.exp().item():.1f} | {pace:.2f} s/step | "
                  f"{pace * (args.steps - done) / 60:.0f} min left", flush=True)
        if done % 300 == 0 or done == args.steps:
            save_checkpoint(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=done)
            save_weights(model, vocabulary, args.output)


# ---- the script --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options."""
    parser = Parser("python -m extras.pretrain_tiny [options]", __doc__)
    add = parser.add_argument
    add("--output", default="tiny.pt.gz", help="the weights; OUTPUT.resume beside it is to go on from")
    add("--steps", type=int, default=5000, help="length of the run and of its cosine schedule")
    add("--pool", type=int, default=50000, help="how many pictures are drawn, before the first step")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=1.2e-3)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw the pictures")
    add("--evaluate", metavar="WEIGHTS", help="measure these weights instead of training")
    add("--split", choices=("val", "test"), default="val",
        help="which pictures --evaluate looks at")

    args = parser.parse_args(argv)
    if min(args.steps, args.pool, args.batch_size, args.workers) < 1:
        parser.error("--steps, --pool, --batch-size and --workers must be at least 1")
    return args


@machine.plain_errors("the same command goes on")
def main(args):
    """Trains, or measures weights."""
    machine.refuse_torchrun()
    if args.evaluate:
        return evaluate(args.evaluate, args.split)
    places.check_file(args.output, "--output")
    train(args)


if __name__ == "__main__":
    main(parse_args())
