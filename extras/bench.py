"""How fast the parts are, against the plain form and against what the machine can do. Run by hand:

    python -m extras.bench                        the table, about ten minutes on one core
    python -m extras.bench --quick                10 classes, batch 4, without the plain form: two minutes
    python -m extras.bench --device cuda          on a GPU, each precision, up to 1000 classes
    python -m extras.bench --against ../other     the same on another checkout of this project, and the ratio

ViT-B/16 sizes with random weights, one process; medians of repeats that take turns. On a CPU one thread, in
float32. The rows "trick:" race each trick of plain_forms.py alone, and give the largest deviation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def parse_args():
    """The options. Two are hidden: the checkout to measure, and the step whose memory is asked for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="10 classes, batch 4, each timing once, no plain form")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--repeats", type=int, default=3, help="of each timing; the median is reported (%(default)s)")
    add("--json", metavar="FILE", type=os.path.expanduser, help="also write the table as JSON")
    add("--against", metavar="DIR", type=os.path.expanduser, help="another checkout to compare with")
    add("--project", default=HERE, type=Path, help=argparse.SUPPRESS)
    add("--peak", choices=("plain", "ours", "prompted"), help=argparse.SUPPRESS)

    args = parser.parse_args()
    if args.quick:
        args.repeats = 1
    return args


args = parse_args()
os.environ["OMP_NUM_THREADS"] = "1"          # before torch is imported
sys.path.insert(0, str(args.project))        # before clip and the rest are: they are measured

import torch                                  # noqa: E402
import torch.nn.functional as F               # noqa: E402

import clip                                   # noqa: E402
import data                                   # noqa: E402
from clip.prompts import ClassTexts           # noqa: E402
from extras import stopwatch                  # noqa: E402
from extras.plain_forms import plain_texts, tricks, with_gradient                           # noqa: E402
from extras.steps import (NAMES, backward, batch, check_same_numbers, names_of,             # noqa: E402
                          plain_step, prompted_step, step, vit_b16)
from harness import machine, places           # noqa: E402
from sotglp import SOTGLP, local_logits, objective                                          # noqa: E402

torch.set_num_threads(1)
with machine.plain_errors():
    DEVICE = machine.use_device(args.device)
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_turns(functions):
    """{name: function} -> {name: median seconds}."""
    return stopwatch.take_turns(functions, args.repeats, DEVICE)


def prompted():
    """Prompt-OT: prompts in all blocks of both towers."""
    from methods.promptot import PromptOT     # why here: a checkout to compare with may have none
    return PromptOT(vit_b16(DEVICE), NAMES).train()


# ---- the rows ----------------------------------------------------------------------------------------------

def measure():
    """-> {what: value}; seconds unless the name says otherwise."""
    clip_model = vit_b16(DEVICE)
    model = SOTGLP(clip_model, NAMES).train()
    four = batch(4, 10, DEVICE)
    check_same_numbers(model, four[0])

    times = ten_classes(model, four)
    table = times | rates(model, four, times) | costs(clip_model)
    if not args.quick:
        table |= stopwatch.race(tricks(model, four[0]), args.repeats, DEVICE)
    if DEVICE.type == "cuda":
        return table | gpu_steps()

    table |= memory_and_prompt_ot(four)
    if not args.quick:
        table |= hundred_classes(clip_model)
    return table | loader() | starts()


def ten_classes(model, four):
    """Seconds of steps and of their parts. Products of matrices take their turns too: machines drift."""
    a = torch.randn(1576, 768, device=DEVICE)
    b = torch.randn(3072, 768, device=DEVICE)
    functions = {
        "20 matrix products": lambda: [F.linear(a, b) for _ in range(20)],
        "step C=10 B=4": lambda: step(model, *four),
        "text C=10": lambda: backward(model.encode_prompts()),
        "images B=4, ordinary stream alone": lambda: model.clip.encode_image(four[0]),
        "images B=4, both streams": lambda: model.clip.encode_patches(four[0])}

    if not args.quick:
        many = batch(32, 10, DEVICE)
        with torch.no_grad():
            cached = model.clip.encode_patches(many[0])
        functions |= {
            "step C=10 B=4, plain": lambda: plain_step(model, *four),
            "text C=10, plain": lambda: backward(plain_texts(model)),
            "step C=10 B=32": lambda: step(model, *many),
            "step C=10 B=32, cached features": lambda: step(model, cached, *many[1:])}
    return take_turns(functions)


def rates(model, four, times):
    """What follows from the times: how many times faster, and which share of the machine's peak."""
    peak = 20 * 1576 * 768 * 3072 * 2 / 1e9 / times["20 matrix products"]
    table = {"matrix product, GFLOP/s": peak}
    if not args.quick:
        table |= {
            "step C=10 B=4, times faster than plain": times["step C=10 B=4, plain"] / times["step C=10 B=4"],
            "text C=10, times faster than plain": times["text C=10, plain"] / times["text C=10"],
            "cached features, times faster":
                times["step C=10 B=32"] / times["step C=10 B=32, cached features"]}

    both = stopwatch.gigaflops(lambda: model.clip.encode_patches(four[0], "vv"))
    ordinary = stopwatch.gigaflops(lambda: model.clip.encode_patches(four[0], "qk"))
    work = {"text C=10": stopwatch.gigaflops(lambda: backward(model.encode_prompts())),
            "images B=4, both streams": both,
            "step C=10 B=4": stopwatch.gigaflops(lambda: step(model, *four))}
    table |= {f"{what}, of the peak": gflop / times[what] / peak for what, gflop in work.items()}
    table["images, FLOPs of linear layers, both streams over one"] = both / ordinary
    table["evaluation, images/s"] = 4 / times["images B=4, both streams"]
    return table


def costs(clip_model):
    """What a step's linear layers cost against the number of classes and of images, in GFLOP, by formula."""
    W = D = 512
    block = 12 * W * W                                 # per token, as in tests/test_flops.py
    table = {}
    for C in (10, 100, 1000):
        _, eot, chunks, _ = ClassTexts(clip_model, names_of(C)).prepare(4)
        # tokens: of the local prompts, of the names behind the shared prompts, of those that are no padding
        local = 4 * sum(len(classes) * (longest + 4) for classes, longest in chunks)
        behind = 4 * sum(len(classes) * (longest - 1) for classes, longest in chunks)
        needed = 4 * int((eot + 5).sum())
        ours = local * (11 * block + 2 * W * W) + 4 * C * (10 * W * W + W * D)
        ours += behind * (11 * block + 3 * W * W) + 4 * C * (9 * W * W + W * D)
        ours += 20 * len(chunks) * 12 * block
        table[f"text C={C}, GFLOP forward and backward, plain"] = 8 * C * 77 * 12 * block * 4 / 1e9
        table[f"text C={C}, GFLOP forward and backward"] = ours * 4 / 1e9
        table[f"text C={C}, share of its tokens that is padding"] = 1 - needed / local

    one_image = torch.randn(1, 3, 224, 224, device=DEVICE)
    gflop = stopwatch.gigaflops(lambda: clip_model.encode_patches(one_image))
    return table | {f"images B={B}, GFLOP": B * gflop for B in (4, 32, 128)}


def memory_and_prompt_ot(four):
    """The peak memory of steps, each in a fresh process, and Prompt-OT where the checkout has it."""
    table = {}
    if not args.quick:
        table["peak memory of a step C=10 B=4, MiB, plain"] = peak_of_a_step("plain")
    table["peak memory of a step C=10 B=4, MiB"] = peak_of_a_step("ours")

    if (args.project / "methods/promptot.py").exists():
        model = prompted()
        table |= take_turns({"step of Prompt-OT C=10 B=4": lambda: prompted_step(model, *four)})
        table["peak memory of a step of Prompt-OT C=10 B=4, MiB"] = peak_of_a_step("prompted")
    return table


def peak_of_a_step(which):
    """MiB by which one training step, C = 10 and batch 4, raises the peak of a fresh process."""
    command = [sys.executable, "-m", "extras.bench", "--project", str(args.project), "--peak", which]
    return float(subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout)


def print_peak(which):
    """What `peak_of_a_step` asks its fresh process for."""
    parts = batch(4, 10, DEVICE)
    model = prompted() if which == "prompted" else SOTGLP(vit_b16(DEVICE), NAMES).train()
    measured = {"plain": plain_step, "ours": step, "prompted": prompted_step}[which]
    print(stopwatch.memory_rise(lambda: measured(model, *parts)))


def hundred_classes(clip_model):
    """Seconds of steps, of the local branch alone, and the tricks that need names of several lengths."""
    model = SOTGLP(clip_model, names_of(100)).train()
    uncut = ClassTexts(clip_model, names_of(100), text_chunk=10**6)
    shared = model.global_prompts
    local = model.local_prompts
    four = batch(4, 100, DEVICE)
    many = batch(32, 100, DEVICE)
    patches = F.normalize(torch.randn(32, 196, 512), dim=-1)
    text = F.normalize(torch.randn(100, 4, 512), dim=-1).requires_grad_()

    times = take_turns({
        "step C=100 B=4": lambda: step(model, *four),
        "step C=100 B=32": lambda: step(model, *many),
        "local matching C=100 B=32": lambda: local_logits(patches, text, 100.0)[0].sum().backward()})
    share = times["local matching C=100 B=32"] / times["step C=100 B=32"]
    deviations = stopwatch.race({
        "C=100, shared prompts once for all classes": (
            lambda: with_gradient(shared, model.encode(shared.expand(100, -1, -1, -1))),
            lambda: with_gradient(shared, model.encode(shared))),
        "C=100, chunks cut where names get longer": (
            lambda: with_gradient(local, uncut(local)),
            lambda: with_gradient(local, model.encode(local)))}, args.repeats, DEVICE)
    return times | {"local matching, of that step": share} | deviations


def loader():
    """Images per second that training gets."""
    train, *_ = data.load("critters", "", 16, 1)
    pictures = data.Pictures(train, data.train_transform(clip.preprocess(64)), 1)
    batches = data.train_loader(pictures, data.Batches(len(train), 32, 1))
    # the round that warms up draws the pictures
    seconds = take_turns({"loader": lambda: list(batches)})["loader"]
    return {"loader, critters, images/s": len(train) / seconds}


def starts():
    """How long the commands take to start."""
    start = time.perf_counter()
    command = [sys.executable, "train.py", "--help"]
    subprocess.run(command, cwd=args.project, stdout=subprocess.DEVNULL, check=True)
    table = {"train.py --help": time.perf_counter() - start}

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--epochs", "1", "--shots", "2", "--output-dir", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=args.project, stdout=subprocess.PIPE, text=True)
        next(line for line in process.stdout if line.startswith("epoch"))
        table["train.py, default, to the end of its first step"] = time.perf_counter() - start
        process.communicate()
    return table


# ---- on a GPU ----------------------------------------------------------------------------------------------

def gpu_steps():
    """Steps of batch 32 on a GPU, for few and many classes, in each precision."""
    table = {}
    for C in (10,) if args.quick else (10, 100, 1000):
        for precision, dtype in PRECISIONS.items():
            table |= gpu_step(names_of(C), dtype, f"step C={C} B=32, {precision}")
    return table


def gpu_step(names, dtype, what):
    """How long a step and the issuing of its kernels take, how many kernels, the memory above the weights."""
    model = SOTGLP(vit_b16(DEVICE), names, text_chunk=1000).train()
    if dtype:
        model.clip.store_matrices(dtype)
    images, kept, labels = batch(32, len(names), DEVICE)

    def mixed_step():
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
            logits = model(images, kept)
        objective(*logits, labels).backward()

    seconds = take_turns({what: mixed_step})[what]
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
            f"{what}, kernels": stopwatch.kernels(mixed_step), f"{what}, peak MiB": peak / 2**20}


# ---- the script --------------------------------------------------------------------------------------------

def measure_other(project):
    """The table of another checkout, by a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "extras.bench", "--project", str(Path(project).resolve()),
                   "--json", file.name, "--repeats", str(args.repeats), "--device", args.device]
        if args.quick:
            command.append("--quick")
        subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())


def unit(what):
    """Seconds, unless the name of a row says what its number is."""
    others = (", ms", "kernels", "MiB", "GFLOP", "images/s", "times faster", "of the peak", "of that step",
              "share", "over", "deviation")
    return "" if any(word in what for word in others) else "s"


def remark(what, value):
    """A share of the machine's peak above 1 says that something else ran while the peak was measured."""
    return "   above 1: a disturbed measurement, repeat it" if "of the peak" in what and value > 1 else ""


def print_row(what, value, other):
    """A row of the table, with the ratio to another checkout that has the row too."""
    number = f"{value:10.1e}" if "deviation" in what else f"{value:10.3f}"
    ratio = f"   {other[what]:10.3f}   ratio {other[what] / value:.2f}" if what in other else ""
    print(f"{what:65s} {number} {unit(what):2s}{ratio}{remark(what, value)}")


@machine.plain_errors()
def main():
    """Measures, prints the table, and writes it where --json asks for it."""
    if args.peak:
        return print_peak(args.peak)
    if args.json:
        places.check_file(args.json, "--json")
    if DEVICE.type == "cuda":
        expected = "a minute on an H100"
    else:
        expected = f"{2 if args.quick else 10} minutes on an idle core of an AMD EPYC (Zen 3)"
    print(f"about {expected}", flush=True)

    table = measure()
    other = measure_other(args.against) if args.against else {}
    for what, value in table.items():
        print_row(what, value, other)
    if args.json:
        machine.write_json(args.json, table)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
