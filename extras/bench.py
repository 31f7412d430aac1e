"""How fast the parts are, against the plain form and against what the machine can do. Run by hand:

    python -m extras.bench                        the table, about ten minutes on one core
    python -m extras.bench --quick                10 classes, batch 4, without the plain form: two minutes
    python -m extras.bench --device cuda          on a GPU, each precision, up to 1000 classes
    python -m extras.bench --against ../other     the same on another checkout of this project, and the ratio

ViT-B/16 sizes with random weights, one process; medians of repeats that take turns. On a CPU one thread, float32.
The plain form below computes the same numbers without any of the tricks: 77 tokens, every row through every block,
global and local prompts one after the other, each image stream by a pass of its own.

What makes the code fast, each trick exact and tested against the plain form: texts are cut after the longest [EOT] of a
chunk (the mask is causal), and chunks where names get longer; prompts that all classes share go through the text tower
once; the last blocks compute what is read; the V-V stream takes V from the ordinary one; the frozen towers build no
graph for weights; the local projection is multiplied with CLIP's before the patches are; transport has a fixed number
of iterations and keeps its problems in the contiguous dimension; with several processes each encodes its share of the
classes. The rows "trick:" race each of them alone, and give the largest deviation from the plain form.

Predicted by formula, not measured: a step on ImageNet, 1,000 classes, 16 shots, batch 32, ViT-B/16, fp16, with 4 + 4
prompts. Sorted by length and cut where names get longer, the local prompts are 4,000 texts of 32,944 tokens (308,000
at 77 each); behind [SOS] and the global prompts 12,944 more follow. Of four cards the slowest has 8,832 and 3,832. The
text tower keeps about 146 KiB per token. --checkpoint-text keeps one chunk at most, of 6,400 tokens, computed twice.
                                    1 card          4 cards, each
    text, forward and backward      6.6 TFLOP       1.8 TFLOP
    images                          1.2 TFLOP       0.3 TFLOP
    text activations                6.4 GiB         1.8 GiB
    with --checkpoint-text          0.9 GiB         0.6 GiB
    a step at 35 TFLOP/s            about 0.2 s     about 0.06 s    (half of an RTX 3090's dense peak)
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

parser = argparse.ArgumentParser(description=__doc__.split("\n\nWhat makes")[0],
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="10 classes, batch 4, each timing once, no plain form")
parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
parser.add_argument("--repeats", type=int, default=3, help="of each timing; the median is reported (%(default)s)")
parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
parser.add_argument("--against", metavar="DIR", help="another checkout to compare with")
parser.add_argument("--project", default=Path(__file__).resolve().parent.parent, type=Path, help=argparse.SUPPRESS)
parser.add_argument("--peak", choices=("plain", "ours", "prompted"), help=argparse.SUPPRESS)
args = parser.parse_args()
if args.quick:
    args.repeats = 1
os.environ["OMP_NUM_THREADS"] = "1"          # before torch is imported
sys.path.insert(0, str(args.project))

import torch                                  # noqa: E402
import torch.nn.functional as F               # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import clip                                   # noqa: E402
import data                                   # noqa: E402
from clip.prompts import ClassTexts           # noqa: E402
from harness import machine                   # noqa: E402
from sinkhorn import sinkhorn                 # noqa: E402
from sotglp import SOTGLP, draw_prompts, local_logits, objective, project  # noqa: E402

torch.set_num_threads(1)
DEVICE = machine.use_device(args.device)
HALF = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    return model.to(DEVICE)


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
            taken = duration(function)
            seconds[name] += [taken] if round_ else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def duration(function):
    """Seconds that a function takes; on a GPU those between two of its events."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(pairs, repeats):
    """{trick: (plain, ours)}, functions that return tensors -> how many times faster, and the largest deviation."""
    table = {}
    for trick, (plain, ours) in pairs.items():
        deviation = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(plain(), ours(), strict=True))
        times = take_turns({"plain": plain, "ours": ours}, repeats)
        table |= {f"trick: {trick}, times faster": times["plain"] / times["ours"],
                  f"trick: {trick}, deviation": deviation}
    return table


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
    parts = torch.randn(n, 3, 224, 224), draw_prompts(n, 4, 0.75), torch.arange(n) % n_classes
    return [part.to(DEVICE) for part in parts]


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


# ---- the rows ------------------------------------------------------------------------------------------------

def measure():
    """-> {what: value}; seconds unless the name says otherwise."""
    table, clip_model = {}, vit_b16()
    a, b = torch.randn(1576, 768, device=DEVICE), torch.randn(3072, 768, device=DEVICE)
    small = SOTGLP(clip_model, NAMES).train()
    four = batch(4, 10)
    with torch.no_grad():
        g, l = small.eval()(four[0])
    for ours, plain in zip((g, l), plain_forward(small, four[0], torch.arange(4, device=DEVICE).expand(4, -1))):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)     # the same numbers, or the race is void
    small.train()
    functions = {
        "20 matrix products": lambda: [F.linear(a, b) for _ in range(20)],   # in turn with the rest: machines drift
        "step C=10 B=4": lambda: step(small, *four),
        "text C=10": lambda: backward(small.encode_prompts()),
        "images B=4, ordinary stream alone": lambda: clip_model.encode_image(four[0]),
        "images B=4, both streams": lambda: clip_model.encode_patches(four[0])}
    if not args.quick:
        many = batch(32, 10)
        with torch.no_grad():
            cached = clip_model.encode_patches(many[0])
        functions |= {
            "step C=10 B=4, plain": lambda: step(small, *four, plain=True),
            "text C=10, plain": lambda: backward(plain_texts(small)),
            "step C=10 B=32": lambda: step(small, *many),
            "step C=10 B=32, cached features": lambda: step(small, cached, *many[1:])}
    times = take_turns(functions, args.repeats)
    table |= times
    peak = table["matrix product, GFLOP/s"] = 20 * 1576 * 768 * 3072 * 2 / 1e9 / times["20 matrix products"]
    if not args.quick:
        table["step C=10 B=4, times faster than plain"] = times["step C=10 B=4, plain"] / times["step C=10 B=4"]
        table["text C=10, times faster than plain"] = times["text C=10, plain"] / times["text C=10"]
        table["cached features, times faster"] = times["step C=10 B=32"] / times["step C=10 B=32, cached features"]
    for what, function in (("text C=10", lambda: backward(small.encode_prompts())),
                           ("images B=4, both streams", lambda: clip_model.encode_patches(four[0])),
                           ("step C=10 B=4", lambda: step(small, *four))):
        table[f"{what}, of the peak"] = gigaflops(function) / times[what] / peak
    one, both = (gigaflops(lambda s=s: clip_model.encode_patches(four[0], s)) for s in ("qk", "vv"))
    table["images, FLOPs of linear layers, both streams over one"] = both / one
    table["evaluation, images/s"] = 4 / times["images B=4, both streams"]
    table |= costs(clip_model)
    if not args.quick:
        table |= race(tricks(clip_model, small, four[0]), args.repeats)
    if DEVICE.type == "cuda":
        return table | gpu_steps()
    if not args.quick:
        table["peak memory of a step C=10 B=4, MiB, plain"] = peak_of_a_step("plain")
    table["peak memory of a step C=10 B=4, MiB"] = peak_of_a_step("ours")
    if (args.project / "methods/promptot.py").exists():
        deep = prompted()
        table |= take_turns({"step of Prompt-OT C=10 B=4": lambda: prompted_step(deep, four[0], four[2])}, args.repeats)
        table["peak memory of a step of Prompt-OT C=10 B=4, MiB"] = peak_of_a_step("prompted")
    if not args.quick:
        table |= hundred_classes(clip_model)
    return table | loader_and_starts()


def tricks(clip_model, model, images):
    """{trick: (plain, ours)}: each trick alone, where that can be told apart; both give tensors."""
    *_, W = model.local_prompts.shape
    visual, blocks = clip_model.visual, clip_model.transformer.resblocks
    shared, own = model.global_prompts, model.global_prompts.expand(len(NAMES), -1, -1, -1)
    texts = torch.randn(40, 10, W, device=DEVICE, requires_grad=True)
    eot, rows = torch.full((40,), 9, device=DEVICE), torch.arange(40, device=DEVICE)
    tokens = torch.randn(4 * 196, 768, device=DEVICE)
    cost, hidden = torch.rand(32, 100, 10, 4, device=DEVICE), torch.randn(4 * 197, 3072, device=DEVICE)

    def all_rows():                                    # of the last block, where [EOT] alone is read
        x = texts + clip_model.positional_embedding[:10]
        for block in blocks:
            x = block(x, causal=True)
        return with_gradient(texts, clip_model.ln_final(x[rows, eot]) @ clip_model.text_projection)

    def all_tokens():                                  # of the last block of both streams
        x = z = visual.embed(images)
        for block in visual.transformer.resblocks:
            x, z = block.forward_dual(x, z)
        return visual.ln_post(x[:, 0]), visual.ln_post(z[:, 1:])

    def padded():                                      # to 77 tokens
        long = F.pad(texts, (0, 0, 0, 67))
        return with_gradient(texts, clip_model.encode_embeddings(long, eot))

    ours = lambda: with_gradient(texts, clip_model.encode_embeddings(texts, eot))
    return {
        "no token behind [EOT]": (padded, ours),
        "last text block for [EOT] alone": (all_rows, ours),
        "shared prompts once for all classes": (lambda: with_gradient(shared, model.encode(own)),
                                                lambda: with_gradient(shared, model.encode(shared))),
        "one pass for both image streams": (
            lambda: (clip_model.encode_image(images), clip_model.encode_patches(images)[1]),
            lambda: (lambda cls, patches: (cls @ visual.proj, patches))(*clip_model.encode_patches(images))),
        "last image block for what is read": (all_tokens, lambda: clip_model.encode_patches(images)),
        "QuickGELU in place": (lambda: [hidden * torch.sigmoid(1.702 * hidden)], lambda: [blocks[0].mlp.gelu(hidden)]),
        "projections multiplied first": (
            lambda: [F.normalize(tokens @ model.local_projection @ visual.proj, dim=-1)],
            lambda: [project(tokens, visual.proj, model.local_projection)]),
        "transport with its problems last": (lambda: [plain_sinkhorn(cost)], lambda: [sinkhorn(cost)])}


def with_gradient(leaf, output):
    """The output, and the gradient that the sum of its cubes gives a leaf (that of squares is 0 for unit vectors)."""
    return output, *torch.autograd.grad(output.pow(3).sum(), leaf)


def costs(clip_model):
    """What a step's linear layers cost against the number of classes and of images, in GFLOP, by formula."""
    W, D, table = 512, 512, {}
    block = 12 * W * W                                 # per token, as in tests/test_flops.py
    for C in (10, 100, 1000):
        names = [f"{name} {i}" if C > 10 else name for name in NAMES for i in range(C // 10)]
        _, eot, chunks, _ = ClassTexts(clip_model, names).prepare(4)
        own, behind = (4 * sum(len(classes) * (longest + more) for classes, longest in chunks) for more in (4, -1))
        needed = 4 * int((eot + 5).sum())
        ours = own * (11 * block + 2 * W * W) + 4 * C * (10 * W * W + W * D)                    # local prompts
        ours += behind * (11 * block + 3 * W * W) + 4 * C * (9 * W * W + W * D) + 20 * len(chunks) * 12 * block
        table[f"text C={C}, GFLOP forward and backward, plain"] = 8 * C * 77 * 12 * block * 4 / 1e9
        table[f"text C={C}, GFLOP forward and backward"] = ours * 4 / 1e9
        table[f"text C={C}, share of its tokens that is padding"] = 1 - needed / own
    image = gigaflops(lambda: clip_model.encode_patches(torch.randn(1, 3, 224, 224, device=DEVICE)))
    return table | {f"images B={B}, GFLOP": B * image for B in (4, 32, 128)}


def gpu_steps():
    """Steps of batch 32 on a GPU, for few and many classes, in each precision."""
    table = {}
    for C in (10,) if args.quick else (10, 100, 1000):
        names = NAMES if C == 10 else [f"{name} {i}" for name in NAMES for i in range(C // 10)]
        for precision, dtype in HALF.items():
            table |= gpu_step(names, dtype, f"step C={C} B=32, {precision}")
    return table


def gpu_step(names, dtype, what):
    """How long a step takes, and how long its kernels take to issue; how many they are; memory above the weights."""
    model = SOTGLP(vit_b16(), names, text_chunk=1000).train()
    if dtype:
        model.clip.store_matrices(dtype)
    images, kept, labels = batch(32, len(names))

    def mixed_step():
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
            g, l = model(images, kept)
        objective(g, l, labels).backward()

    seconds = take_turns({what: mixed_step}, args.repeats)[what]
    torch.cuda.synchronize()
    start = time.perf_counter()
    mixed_step()
    issued = time.perf_counter() - start
    torch.cuda.synchronize()

    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mixed_step()
    peak = torch.cuda.max_memory_allocated() - weights
    return {f"{what}, ms": 1000 * seconds, f"{what}, ms of issuing": 1000 * issued,
            f"{what}, kernels": kernels(mixed_step), f"{what}, peak MiB": peak / 2**20}


def kernels(function):
    """How many kernels and copies a function starts on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def hundred_classes(clip_model):
    names = [f"{name} {i}" for name in NAMES for i in range(10)]
    model, uncut = SOTGLP(clip_model, names).train(), ClassTexts(clip_model, names, text_chunk=10**6)
    shared, local = model.global_prompts, model.local_prompts
    four, many = batch(4, 100), batch(32, 100)
    patches = F.normalize(torch.randn(32, 196, 512), dim=-1)
    text = F.normalize(torch.randn(100, 4, 512), dim=-1).requires_grad_()
    times = take_turns({
        "step C=100 B=4": lambda: step(model, *four), "step C=100 B=32": lambda: step(model, *many),
        "local matching C=100 B=32": lambda: local_logits(patches, text, 100.0)[0].sum().backward()}, args.repeats)
    share = {"local matching, of that step": times["local matching C=100 B=32"] / times["step C=100 B=32"]}
    return times | share | race({
        "C=100, shared prompts once for all classes": (
            lambda: with_gradient(shared, model.encode(shared.expand(100, -1, -1, -1))),
            lambda: with_gradient(shared, model.encode(shared))),
        "C=100, chunks cut where names get longer": (lambda: with_gradient(local, uncut(local)),
                                                     lambda: with_gradient(local, model.encode(local)))}, args.repeats)


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
    minutes = 2 if args.quick else 10
    print(f"about {minutes} minutes on one core of an AMD EPYC (Zen 3) with nothing else to do", flush=True)
    table, other = measure(), {}
    if args.against:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, "--project", args.against, "--json", file.name,
                       "--repeats", str(args.repeats), "--device", args.device] + ["--quick"] * args.quick
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            other = json.loads(Path(file.name).read_text())
    for what, value in table.items():
        ratio = f"   {other[what]:10.3f}   ratio {other[what] / value:.2f}" if what in other else ""
        number = f"{value:10.1e}" if "deviation" in what else f"{value:10.3f}"
        print(f"{what:65s} {number} {unit(what):2s}{ratio}{remark(what, value)}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2))
        print(f"wrote {args.json}")


def unit(what):
    """Seconds, unless the name of a row says what its number is."""
    others = ("MiB", "GFLOP", "images/s", "times faster", "of the peak", "of that step", "share", "over", "deviation")
    return "" if any(word in what for word in others) else "s"


def remark(what, value):
    """A share of the machine's peak above 1 says that something else ran while the peak was measured."""
    return "   above 1: a disturbed measurement, repeat it" if "of the peak" in what and value > 1 else ""


if __name__ == "__main__":
    main()
