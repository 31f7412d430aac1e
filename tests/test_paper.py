"""PAPER.md against the files: quoted code, errata from paper/*.csv, costs by torch's counter, what the remarks say."""

import contextlib
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip.model import CLIP
from conftest import PROJECT
from paper import table as paper_table
from sinkhorn import sinkhorn
from sotglp import SOTGLP, local_logits, unit

PAPER = (PROJECT / "PAPER.md").read_text()
CELLS = {first: rest.split(" | ") for first, rest in re.findall(r"^\| (.+?) \| (.+) \|$", PAPER, re.MULTILINE)}


# ---- quotes --------------------------------------------------------------------------------------------------

# A quote comes from the file that was named last before it.
QUOTES = [(re.findall(r"`([\w/]+\.py)`", PAPER[: found.start()])[-1], found[1])
          for found in re.finditer(r"^```python\n(.*?)^```$", PAPER, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("file, quote", QUOTES, ids=[f"{file} {i}" for i, (file, _) in enumerate(QUOTES)])
def test_quoted_code_stands_word_for_word_in_its_file(file, quote):
    lines, at = (PROJECT / file).read_text().splitlines(), 0
    for piece in quote.split("...\n"):                    # in the order of the file, with lines left out between them
        piece = piece.splitlines()
        places = [i for i in range(at, len(lines)) if lines[i : i + len(piece)] == piece]
        assert places, f"{file} has no more, after line {at}: " + "\n".join(piece)
        at = places[0] + len(piece)


def test_every_equation_has_a_quote():
    sections = re.split(r"^### ", PAPER[PAPER.index("## The equations one by one"):], flags=re.MULTILINE)[1:]
    quoted = {name: "```python" in text for name, text in ((text.splitlines()[0], text) for text in sections)
              if name.startswith(("Eq.", "Sec."))}
    numbers = {n for name in quoted for first, last in re.findall(r"Eq\. (\d+)(?:-(\d+))?", name)
               for n in range(int(first), int(last or first) + 1)}
    assert numbers == {*range(1, 12)}
    assert all(quoted.values())


def test_links_within_the_page_lead_to_a_heading():
    headings = re.findall(r"^#+ (.+)$", PAPER, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", PAPER)
    assert links and {*links} <= slugs


# ---- errata --------------------------------------------------------------------------------------------------

def split(number, label="dataset"):
    """A table of the paper -> {name: line} without its averages, and the line of averages."""
    lines = {line[label]: line for line in paper_table(number)}
    return lines, lines.pop("average", None)


def mean(lines, column):
    return sum(line[column] for line in lines.values()) / len(lines)


def table_4():
    """{method: ({dataset: line}, line of averages)}"""
    methods = {line["method"] for line in paper_table(4)}
    lines = {m: {line["dataset"]: line for line in paper_table(4) if line["method"] == m} for m in methods}
    return {method: (line, line.pop("average")) for method, line in lines.items()}


def columns(line):
    return [name for name in line if name not in ("dataset", "method")]


def test_averages_are_those_of_their_columns_but_for_the_errata():
    wrong = {}
    for number in (1, 2):
        lines, average = split(number)
        wrong |= {f"Table {number}, average of {name}": (average[name], mean(lines, name)) for name in columns(average)}
    for name, line in split(3, "method")[0].items():
        for metric in ("FPR95", "AUROC"):
            found = sum(line[f"{ood} {metric}"] for ood in ("iNaturalist", "SUN", "Places", "Textures")) / 4
            wrong[f"Table 3, mean {metric} of {name}"] = line[f"mean {metric}"], found
    for method, (lines, average) in table_4().items():
        wrong |= {f"Table 4, average of {method} at {shots} shots": (average[shots], mean(lines, shots))
                  for shots in columns(average)}
    assert len(wrong) == 11 + 4 + 28 + 25
    wrong = {name: [f"{printed}", f"{found:.1f}"] for name, (printed, found) in wrong.items()
             if abs(printed - found) > 0.08}
    assert wrong == {name: cells for name, cells in CELLS.items() if name in wrong}
    assert [*wrong] == ["Table 1, average of CLIP", "Table 3, mean FPR95 of CLIP (GL)",
                        "Table 3, mean FPR95 of w/o V-V", "Table 4, average of PromptSRC at 16 shots"]


def wins_and_ties(pairs):
    """Of pairs (this, that): "8 and a tie"."""
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    assert ties == 1
    return f"{wins} and a tie"


def test_claims_of_the_text_against_its_tables():
    best, ablations = split(1)[0].values(), split(2)[0]
    others = [name for name in columns(paper_table(1)[0]) if name != "SOT-GLP"]
    found = {"Sec. 4, datasets on which SOT-GLP is best in Table 1":
             ["9", wins_and_ties([(line["SOT-GLP"], max(line[name] for name in others)) for line in best])],
             "Sec. 5, datasets on which the full model beats w/o V-V in Table 2":
             ["9", wins_and_ties([(line["SOT-GLP"], line["w/o V-V"]) for line in ablations.values()])]}
    falls = [ablations[name]["w/o Class-Spec"] - ablations[name]["SOT-GLP"]
             for name in ("caltech101", "oxford_flowers", "oxford_pets")]
    found["Sec. 5, w/o class-specific on Caltech101, Flowers102, Pets"] = [
        "within 0.1", ", ".join(f"{fall:.1f}" for fall in falls)]
    found["Sec. 5, cost of V-V, from 44.9 to 58.8 GFLOP"] = ["24 %", f"{100 * (58.8 / 44.9 - 1):.0f} %"]
    assert found == {name: CELLS[name] for name in found} and round(100 * (1 - 44.9 / 58.8)) == 24


def test_cells_of_table_4_that_belong_elsewhere():
    table_1, coop = split(1)[0], table_4()["CoOp"][0]
    copied = [name for name, line in coop.items()
              if line["16"] == table_1[name]["Linear Probe"] != table_1[name]["CoOp"]]
    assert copied == ["caltech101", "oxford_pets", "oxford_flowers", "fgvc_aircraft", "eurosat"]
    assert CELLS["Table 4, CoOp at 16 shots on Caltech101, Pets, Flowers102, Aircraft, EuroSAT"][0] == "CoOp"
    assert all(coop["food101"][shots] == coop["ucf101"][shots] for shots in columns(coop["food101"]))
    assert table_1["food101"]["CoOp"] != coop["food101"]["16"]
    assert CELLS["Table 4, CoOp on Food101"] == ["five cells", "those of UCF101"]


def test_cells_in_which_tables_1_and_4_differ():
    table_1, printed = split(1)[0], table_4()
    differ = {method: [(name, line["16"], table_1[name][method]) for name, line in printed[method][0].items()
                       if line["16"] != table_1[name][method]] for method in ("PromptSRC", "GalLoP", "MaPLe", "SOT-GLP")}
    assert not differ["MaPLe"] and not differ["SOT-GLP"]
    for method, row in (("PromptSRC", "on ImageNet, Cars, Food101, Aircraft"), ("GalLoP", "on Food101")):
        fourth, first = (", ".join(str(cell[i]) for cell in differ[method]) for i in (1, 2))
        assert CELLS[f"Table 4, {method} at 16 shots {row}"] == [fourth, f"{first} in Table 1"]


def test_gains_of_vv_that_are_larger_than_on_dtd():
    gains = {name: round(line["SOT-GLP"] - line["w/o V-V"], 1) for name, line in split(2)[0].items()}
    claimed = {"dtd", "sun397", "eurosat"}                # Sec. 5: "the largest gains"
    larger = {name: gain for name, gain in gains.items() if gain > gains["dtd"] and name not in claimed}
    assert larger == {"oxford_pets": 0.9, "caltech101": 0.5, "ucf101": 0.3} and gains["dtd"] == 0.2
    assert CELLS["Sec. 5, DTD among the largest gains of V-V (Table 2)"] == [
        "+0.2", "Pets +0.9, Caltech101 +0.5, UCF101 +0.3 gain more"]


# ---- costs ---------------------------------------------------------------------------------------------------

W, l, P, D, W_text, G, L, p, S = 768, 12, 196, 512, 512, 4, 4, 16, 9        # ViT-B/16, names of 3 tokens


def cost(C):
    """PAPER.md's formulas: multiplications of {part: (forward, backward)}."""
    image, vv = 12 * (1 + P) * W**2 + 2 * (1 + P)**2 * W, (1 + P) * W**2 + 2 * (1 + P)**2 * W      # of one block
    last_image = 2 * (1 + P) * W**2 + 10 * W**2 + 2 * (1 + P) * W
    text, last_text = ([12 * S * W_text**2 + n * 2 * S**2 * W_text for n in (1, 2)],
                       [2 * S * W_text**2 + 10 * W_text**2 + n * 2 * S * W_text for n in (1, 2)])
    return {"image": (3 * p**2 * P * W + (l - 1) * image + last_image + W * D, 0),
            "vv": ((l - 1) * vv + P * W**2 + 2 * P * (1 + P) * W, 0),
            "projection": (P * W * D, P * W * D), "fold": (W**2 * D, W**2 * D),
            "local text": tuple(C * L * ((l - 1) * block + last + W_text * D) for block, last in zip(text, last_text)),
            "global text": global_text(C),
            "matching": (C * G * D + C * P * L * D, C * G * D + 2 * C * P * L * D)}


def global_text(C):
    """Shared prompts: [SOS] and prompt once, Q tokens; behind them name and [EOT] of each class, R = S - Q tokens.

    The names do not learn: backward leaves out their queries, keys and values in the first block. Of the prompts in the
    last block keys and values alone are used.
    """
    w, Q = W_text, 5
    R, prefix, behind = S - Q, 12 * Q * w**2 + 2 * Q**2 * w, 12 * (S - Q) * w**2
    last = (3 * R + 9) * w**2 + w * D
    return (G * l * prefix + C * G * ((l - 1) * (behind + 2 * R * S * w) + last + 2 * S * w),
            G * ((l - 1) * (prefix + 2 * Q**2 * w) + 3 * Q * w**2)
            + C * G * ((l - 1) * behind - 3 * R * w**2 + ((l - 2) * 4 + 3) * R * S * w + last + 4 * S * w))


def step(C, B):
    """Multiplications of a training step of B images: forward, backward."""
    once = "local text", "global text", "fold"            # per step; the others per image
    return [sum(n[i] * (1 if part in once else B) for part, n in cost(C).items()) for i in (0, 1)]


def test_costs_are_what_torch_counts_on_the_real_sizes(monkeypatch):
    # tensors without memory: only their shapes are computed, and "meta" knows no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        clip_model = CLIP(D, 224, p, W, l, 77, 49408, W_text, l)
        images, labels = torch.empty(2, 3, 224, 224), torch.zeros(2, dtype=torch.int64)
    model = SOTGLP(clip_model, ["annual crop land"] * 3).eval()

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops(), result

    assert counted(lambda: model.clip.encode_image(images[:1]))[0] == 2 * cost(3)["image"][0]
    forward, outputs = counted(lambda: model(images))
    backward, _ = counted(lambda: model.loss(outputs, labels, 2)[0].backward())
    assert [forward, backward] == [2 * n for n in step(3, 2)]
    assert sum(q.numel() for q in model.learned_state().values()) == G * 4 * W_text + 3 * L * 4 * W_text + W**2


def test_the_table_of_costs_is_that_of_the_formulas():
    rows = {"image tower, per image": "image", "V-V stream, per image": "vv",
            "local projection, per image": "projection", "matching, per image": "matching",
            "local prompts, per step, forward": "local text", "global prompts, per step, forward": "global text"}
    table = PAPER[PAPER.index("| | C = 10 | C = 1000 |"):]
    found = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE))
    for row, part in rows.items():
        assert found[row] == " | ".join(f"{2e-9 * cost(C)[part][0]:.2f}" for C in (10, 1000))
    assert found["a training step of 32 images"] == " | ".join(f"{2e-9 * sum(step(C, 32)):.2f}" for C in (10, 1000))
    assert found["learned parameters"] == " | ".join(f"{16 * W_text * (1 + C) + W**2:,}" for C in (10, 1000))
    share = round(100 * cost(1)["vv"][0] / cost(1)["image"][0])
    assert {int(n) for n in re.findall(r"adds (\d+) % to the", PAPER)} == {share}


# ---- remarks -------------------------------------------------------------------------------------------------

def train_local(lambda_local, lr, weight_decay):
    """Three steps on the local loss of random features -> the text features that were learned."""
    torch.manual_seed(3)
    patches, text = unit(torch.randn(4, 9, 6)), torch.nn.Parameter(torch.randn(3, 2, 6))
    optimizer = torch.optim.SGD([text], lr=lr, momentum=0.9, weight_decay=weight_decay)
    for _ in range(3):
        logits, _ = local_logits(patches, unit(text), 10.0, n_support=4)
        optimizer.zero_grad()
        (lambda_local * torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))).backward()
        optimizer.step()
    return text.detach()


def test_lambda_is_a_rate_and_a_weight_decay_for_the_local_branch():
    torch.testing.assert_close(train_local(0.25, 0.2, 0.1), train_local(1.0, 0.2 * 0.25, 0.1 / 0.25))
    assert not torch.allclose(train_local(0.25, 0.2, 0.1), train_local(1.0, 0.2, 0.1), atol=1e-2)


@pytest.mark.parametrize("kept, alike", [(None, True), (torch.tensor([[0], [1], [2]]), False)])
def test_only_dropout_parts_the_global_prompts(kept, alike, clip_model):
    model = SOTGLP(clip_model, ["cat", "dog"], n_global=3, n_support=5).eval()
    loss, _ = model.loss(model(torch.randn(3, 3, 32, 32), kept), torch.tensor([0, 1, 1]), 3)
    gradient, = torch.autograd.grad(loss, model.global_prompts)                        # (G, M, W)
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(gradient, gradient[:1].expand_as(gradient), rtol=1e-3, atol=1e-6) == alike


def test_the_branches_share_no_learned_parameter(clip_model):
    model = SOTGLP(clip_model, ["cat", "dog"], n_support=5).eval()
    learned = {name: q for name, q in model.named_parameters() if q.requires_grad}
    branches = ["global_prompts"], ["local_prompts", "local_projection"]
    for logits, own in zip(model(torch.randn(2, 3, 32, 32)), branches):
        gradients = torch.autograd.grad(logits.square().sum(), [*learned.values()], retain_graph=True,
                                        materialize_grads=True)
        assert [name for name, gradient in zip(learned, gradients) if gradient.any()] == own


def test_the_plan_is_one_plus_c_over_epsilon_to_first_order():
    similarity = torch.rand(50, 10, 4, dtype=torch.float64)
    c = similarity - similarity.mean(1, keepdim=True) - similarity.mean(2, keepdim=True) + similarity.mean((1, 2), True)
    even, added = [], []
    for size in (1e-3, 1e-4):                             # a tenth of c leaves a hundredth of the rest
        plan = sinkhorn(1 - size * similarity, epsilon=0.1, n_iters=100)
        even.append((40 * plan - 1 - size * c / 0.1).abs().max())
        phi = (plan * size * similarity).sum((1, 2)) - size * similarity.mean((1, 2))
        added.append(((phi / (size * c).square().mean((1, 2)) * 0.1) - 1).abs().max())
    assert even[1] < even[0] / 80 and even[0] < 1e-4
    assert added[1] < added[0] / 5 and added[0] < 0.02


@pytest.mark.parametrize("plan_gradient, expected", [(False, 3 / 4), (True, 3 / 4 + math.log(3) * 3 / 16)])
def test_the_pull_through_the_plan_by_hand(plan_gradient, expected):
    # phi = s x, s = 1 / (1 + e^(-x / epsilon)): d phi / dx = s + x s (1 - s) / epsilon; s = 3/4, 1 / epsilon = ln 3.
    # Prompts (x, 0) and (0, x) against patches (1, 0) and (0, 1) have the similarity [[x, 0], [0, x]].
    x = torch.ones([], requires_grad=True)
    logits, _ = local_logits(torch.eye(2)[None], x * torch.eye(2)[None], 1.0, 2, 1 / math.log(3), 20, plan_gradient)
    assert torch.autograd.grad(logits.sum(), x)[0].item() == pytest.approx(expected)
