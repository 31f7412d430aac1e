"""How fast the parts are, against the plain form and against what the machine can do. Run by hand:

    python tests/bench.py                        the table, about ten minutes on one core
    python tests/bench.py --quick                C = 10 alone
    python tests/bench.py --against ../other     the same on another checkout of this project, and the ratio

ViT-B/16 sizes with random weights, one process, one thread, float32; medians of repeats that take turns.
The plain form below computes the same numbers without any of the tricks: 77 tokens, every row through every block,
global and local prompts one after the other, each image stream by a pass of its own.

What makes the code fast, each trick exact and tested against the plain form: texts are cut after the longest [EOT] of a
chunk (the mask is causal); all prompts go through the text tower together; the V-V stream takes V from the ordinary one;
the frozen towers build no graph for weights; the local projection is multiplied with CLIP's before the patches are;
transport has a fixed number of iterations and keeps its problems in the contiguous dimension; with several processes
each encodes its share of the classes.

Predicted by formula, not measured: a step on ImageNet, 1,000 classes, 16 shots, batch 32, ViT-B/16, fp16. With 4 + 4
prompts there are 8,000 texts. Sorted by length, in chunks of 200 classes, they are 80,000 tokens (616,000 at 77 each); of
four cards the slowest has 21,600. The text tower costs 75.5 MFLOP per token forward and as much backward, and keeps 146
KiB per token. --checkpoint-text keeps one chunk at most, 28,800 tokens (14,400 on each of four cards), and computes it
twice. An image costs 39.3 GFLOP.
                                    1 card          4 cards, each
    text, forward and backward      12.1 TFLOP      3.3 TFLOP
    images                          1.3 TFLOP       0.3 TFLOP
    text activations                11.1 GiB        3.0 GiB
    with --checkpoint-text          4.0 GiB         2.0 GiB
    a step at 35 TFLOP/s            about 0.4 s     about 0.1 s     (half of an RTX 3090's dense peak)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="leave out everything with 100 classes")
parser.add_argument("--repeats", type=int, default=3, help="of each timing; the median is reported (%(default)s)")
parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
parser.add_argument("--against", metavar="DIR", help="another checkout to compare with")
parser.add_argument("--project", default=Path(__file__).resolve().parent.parent, type=Path, help=argparse.SUPPRESS)
parser.add_argument("--peak", choices=("plain", "ours", "prompted"), help=argparse.SUPPRESS)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = "1"          # before torch is imported
sys.path.insert(0, str(args.project))

import torch                                  # noqa: E402
import torch.nn.functional as F               # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import clip                                   # noqa: E402
import data                                   # noqa: E402
from sotglp import SOTGLP, draw_prompts, local_logits, objective  # noqa: E402

torch.set_num_threads(1)
NAMES = ["annual crop land", "forest", "herbaceous vegetation land", "highway or road", "industrial buildings",
         "pasture land", "permanent crop land", "residential buildings", "river", "sea or lake"]


def vit_b16():
    """CLIP ViT-B/16 with random weights of a trained model's size."""
    model = clip.CLIP(512, 224, 16, 768, 12, 77, 49408, 512, 12)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = torch.ones_like(p) if "ln_" in name and name.endswith("weight") else \
            0.02 * torch.randn(p.shape, generator=generator)
    model.logit_scale.data.fill_(4.6)
    return model


# ---- the plain form ------------------------------------------------------------------------------------------

def plain_texts(model):
    """All prompts, 77 tokens each, the global ones and then the local ones -> (C, G, D), (C, L, D)."""
    C, device = len(model.class_names), model.global_prompts.device
    tokens = torch.stack([clip.tokenize(name.replace("_", " "))[0] for name in model.class_names]).to(device)
    names, features = model.clip.token_embedding(tokens)[:, None], []
    for prompts in (model.global_prompts.expand(C, -1, -1, -1), model.local_prompts):
        N, M = prompts.shape[1:3]
        sos, name = (part.expand(-1, N, -1, -1) for part in (names[:, :, :1], names[:, :, 1 : 77 - M]))
        texts = torch.cat([sos, prompts, name], dim=2)
        x = texts.flatten(0, 1) + model.clip.positional_embedding
        for block in model.clip.transformer.resblocks:
            x = block(x, causal=True)
        eot = (tokens.argmax(-1) + M).repeat_interleave(N)
        x = (model.clip.ln_final(x) @ model.clip.text_projection)[torch.arange(len(x)), eot]
        features.append(F.normalize(x, dim=-1).unflatten(0, (C, N)))
    return features


def plain_sinkhorn(cost, epsilon=0.1, n_iters=20):
    """Eq. 9 as one writes it first: potentials beside the cost, problems in front."""
    K, L = cost.shape[-2:]
    f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], L))
    a, b = cost.new_tensor(1 / K).log(), cost.new_tensor(1 / L).log()
    for _ in range(n_iters):
        f = epsilon * (a - torch.logsumexp((g[..., None, :] - cost) / epsilon, dim=-1))
        g = epsilon * (b - torch.logsumexp((f[..., :, None] - cost) / epsilon, dim=-2))
    return ((f[..., :, None] + g[..., None, :] - cost) / epsilon).exp()


def plain_forward(model, images, kept):
    """Global and local logits, step by step."""
    image = F.normalize(model.clip.encode_image(images), dim=-1)
    _, patches = model.clip.encode_patches(images)
    patches = F.normalize(patches @ model.local_projection @ model.clip.visual.proj, dim=-1)
    global_text, local_text = plain_texts(model)
    g = torch.einsum("bd,cgd->bcg", image, global_text)
    g = g.gather(2, kept[:, None].expand(-1, len(global_text), -1)).mean(-1)
    similarity = torch.einsum("bpd,cld->bcpl", patches, local_text)
    best = similarity.mean(-1).topk(model.n_support, dim=-1).indices
    similarity = similarity.gather(2, best[..., None].expand(-1, -1, -1, similarity.shape[-1]))
    l = (plain_sinkhorn(1 - similarity) * similarity).sum((-2, -1))
    return model.scale * g, model.scale * l


# ---- measuring -----------------------------------------------------------------------------------------------

def take_turns(functions, repeats):
    """{name: function} -> {name: median seconds}: one warm-up, then every function once per round."""
    seconds = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name] += [time.perf_counter() - start] if round_ else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_of_a_step(which):
    """MiB by which one training step, C = 10 and batch 4, raises the peak of a fresh process."""
    command = [sys.executable, __file__, "--project", str(args.project), "--peak", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(which):
    images, kept, labels = batch(4, 10)
    model = prompted() if which == "prompted" else SOTGLP(vit_b16(), NAMES).train()
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")         # the peak counts from here on
    if which == "prompted":
        prompted_step(model, images, labels)
    else:
        step(model, images, kept, labels, plain=which == "plain")
    print((status("VmHWM") - resident) / 1024)


def status(field):
    """A field of this process' status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def batch(n, n_classes):
    return torch.randn(n, 3, 224, 224), draw_prompts(n, 4, 0.75), torch.arange(n) % n_classes


def step(model, images, kept, labels, plain=False):
    g, l = plain_forward(model, images, kept) if plain else model(images, kept)
    objective(g, l, labels).backward()


def prompted():
    """Prompt-OT: prompts in all blocks of both towers."""
    from methods.promptot import PromptOT     # why here: a checkout to compare with may have none
    return PromptOT(vit_b16(), NAMES).train()


def prompted_step(model, images, labels):
    """A step of Prompt-OT, whose gradients go through both towers. The frozen texts are computed in the first one."""
    model.loss(model(images), labels, len(labels))[0].backward()


def backward(texts):
    sum(text.square().sum() for text in texts).backward()


def gigaflops(function):
    """Of the products of matrices and the convolution; attention, a small part, is counted by some versions alone."""
    with FlopCounterMode(display=False) as counter:
        function()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)) / 1e9


def measure():
    """-> {what: value}; seconds unless the name says otherwise."""
    table, clip_model = {}, vit_b16()
    a, b = torch.randn(1576, 768), torch.randn(3072, 768)
    small = SOTGLP(clip_model, NAMES).train()
    four, many = batch(4, 10), batch(32, 10)
    with torch.no_grad():
        cached = clip_model.encode_patches(many[0])
    g, l = small.eval()(four[0])
    for ours, plain in zip((g, l), plain_forward(small, four[0], torch.arange(4).expand(4, -1))):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)     # the same numbers, or the race is void
    small.train()
    times = take_turns({
        "20 matrix products": lambda: [F.linear(a, b) for _ in range(20)],   # in turn with the rest: machines drift
        "step C=10 B=4, plain": lambda: step(small, *four, plain=True),
        "step C=10 B=4": lambda: step(small, *four),
        "step C=10 B=32": lambda: step(small, *many),
        "step C=10 B=32, cached features": lambda: step(small, cached, *many[1:]),
        "text C=10, plain": lambda: backward(plain_texts(small)),
        "text C=10": lambda: backward(small.encode_prompts()),
        "images B=4, ordinary stream alone": lambda: clip_model.encode_image(four[0]),
        "images B=4, both streams": lambda: clip_model.encode_patches(four[0])}, args.repeats)
    table |= times
    peak = table["matrix product, GFLOP/s"] = 20 * 1576 * 768 * 3072 * 2 / 1e9 / times["20 matrix products"]
    table["step C=10 B=4, times faster than plain"] = times["step C=10 B=4, plain"] / times["step C=10 B=4"]
    table["text C=10, times faster than plain"] = times["text C=10, plain"] / times["text C=10"]
    table["cached features, times faster"] = times["step C=10 B=32"] / times["step C=10 B=32, cached features"]
    table["text C=10, of the peak"] = gigaflops(lambda: backward(small.encode_prompts())) / times["text C=10"] / peak
    one, both = (gigaflops(lambda s=s: clip_model.encode_patches(four[0], s)) for s in ("qk", "vv"))
    table["images, FLOPs of linear layers, both streams over one"] = both / one
    table["images, of the peak"] = both / times["images B=4, both streams"] / peak
    table["evaluation, images/s"] = 4 / times["images B=4, both streams"]
    table["peak memory of a step C=10 B=4, MiB, plain"] = peak_of_a_step("plain")
    table["peak memory of a step C=10 B=4, MiB"] = peak_of_a_step("ours")
    if (args.project / "methods/promptot.py").exists():
        model = prompted()
        table |= take_turns({"step of Prompt-OT C=10 B=4": lambda: prompted_step(model, four[0], four[2])}, args.repeats)
        table["peak memory of a step of Prompt-OT C=10 B=4, MiB"] = peak_of_a_step("prompted")
    if not args.quick:
        table |= hundred_classes(clip_model)
    return table | loader_and_starts()


def hundred_classes(clip_model):
    model = SOTGLP(clip_model, [f"{name} {i}" for name in NAMES for i in range(10)]).train()
    four, many = batch(4, 100), batch(32, 100)
    patches = F.normalize(torch.randn(32, 196, 512), dim=-1)
    text = F.normalize(torch.randn(100, 4, 512), dim=-1).requires_grad_()
    times = take_turns({
        "step C=100 B=4": lambda: step(model, *four), "step C=100 B=32": lambda: step(model, *many),
        "local matching C=100 B=32": lambda: local_logits(patches, text, 100.0)[0].sum().backward()}, args.repeats)
    return times | {"local matching, of that step": times["local matching C=100 B=32"] / times["step C=100 B=32"]}


def loader_and_starts():
    """Images per second that training gets, and how long the commands take to start."""
    train, _, _, _ = data.load("critters", "", 16, 1)
    pictures = data.Pictures(train, data.train_transform(clip.preprocess(64)), 1)
    list(data.train_loader(pictures, data.Batches(len(train), 32, 1)))                      # draws them once
    loader = data.train_loader(pictures, data.Batches(len(train), 32, 1))
    seconds = take_turns({"loader": lambda: list(loader)}, args.repeats)["loader"]
    table = {"loader, critters, images/s": len(train) / seconds}
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=args.project, stdout=subprocess.DEVNULL, check=True)
    table["train.py --help"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--epochs", "1", "--shots", "2", "--output-dir", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=args.project, stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if line.startswith("epoch"))
        table["train.py, default, to the end of its first step"] = time.perf_counter() - start
        process.communicate()
    return table


def main():
    if args.peak:
        return print_peak(args.peak)
    table, other = measure(), {}
    if args.against:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, "--project", args.against, "--json", file.name,
                       "--repeats", str(args.repeats)] + ["--quick"] * args.quick
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            other = json.loads(Path(file.name).read_text())
    for what, value in table.items():
        ratio = f"   {other[what]:10.3f}   ratio {other[what] / value:.2f}" if what in other else ""
        print(f"{what:55s} {value:10.3f}{ratio}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
