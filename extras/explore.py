"""Writes a page in which a reader moves the equations: Sec. 3.3-3.5 with the numbers of a run's own pictures.

    python -m extras.explore RUN                          eight pictures of the test split
    python -m extras.explore RUN --images a.jpg b.png     your own

RUN/pictures/explore.html is one file, which needs no server, no network and no library. Python computes what
needs the model: cosines and logits. The page, whose template is explore.html, computes Eq. 4 and 7-11 from
them whenever its reader moves something. A method without a plan or a global score gets the parts it has.
"""

import base64
import hashlib
import io
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

import clip  # noqa: F401  (before torch: it bounds how long torch's threads wait)

import torch

from extras import visualize
from harness import machine, places, runs
from harness.parser import Parser
from methods.gallop import GalLoP
from methods.released import Released
from methods.variants import IndependentTopK

TEMPLATE = Path(__file__).with_suffix(".html")
PAPER = Path(__file__).resolve().parent.parent / "PAPER.md"


def described(model):
    """What the page must know of a method: its parts, and the run's own values of what a reader moves."""
    n_patches = len(model.clip.visual.positional_embedding) - 1
    scale = model.scale.item()
    top_k = None
    if isinstance(model, GalLoP):
        top_k = [min(k, n_patches) for k in model.top_k]
    elif isinstance(model, IndependentTopK):
        top_k = [model.n_support] * model.local_prompts.shape[-3]

    parts = {"plan": model.has_plan, "own": bool(top_k), "halved": isinstance(model, GalLoP),
             "lambda": hasattr(model, "lambda_local")}
    settings = {"K": getattr(model, "n_support", n_patches), "epsilon": getattr(model, "epsilon", 0.1),
                "iterations": getattr(model, "n_iters", 20), "lambda": getattr(model, "lambda_local", 1)}
    local_scale = scale / model.local_prompts.shape[-3] if isinstance(model, Released) else scale
    return {"class_names": model.class_names, "parts": parts, "settings": settings, "top_k": top_k,
            "global_scale": scale, "local_scale": local_scale}


@torch.no_grad()
def look(model, text_features, image, name, truth=None):
    """The numbers of a picture (3, R, R): the logits of all classes, and what leads to them for some.

    These are the five likeliest classes and the true one. Raises ValueError for a method without patches.
    """
    features = model.features(image[None])
    outputs = model(features, None, text_features)
    decisive = model.logits(outputs)[0]                                            # (C,)
    scores = {score: values[0] for score, values in model.scores(outputs).items()} # (C,) each
    labels = decisive.topk(min(5, len(decisive))).indices.tolist()
    labels += [truth] if truth not in (None, *labels) else []

    similarity = [visualize.patch_cosines(model, features, text_features, label) for label in labels]
    if similarity[0] is None:
        raise ValueError("the method of this run compares no patches: there is no Eq. 7-11 to move")
    parts = described(model)["parts"]
    if not parts["plan"] and not parts["own"]:
        scores = {"global": decisive}                    # what leads to any other score is not in Eq. 4-11

    picture = {"name": str(name), "truth": truth, "labels": labels, "image": png(visualize.picture_of(image)),
               "similarity": packed(torch.stack(similarity))}                      # (c, P, L)
    if len(scores) > 1:
        picture["cosines"] = packed(global_cosines(model, features, *text_features)[labels])   # (c, G)
    elif "global" in scores:
        picture["cosines"] = packed(decisive[labels, None] / model.scale)          # (c, 1)
    return picture | {score: packed(scores[score]) for score in ("global", "local") if score in scores}


def global_cosines(model, features, prompts, *others):
    """The cosine of the picture with each global prompt of each class: (C, G, D), others -> (C, G).  Eq. 4"""
    # why one by one: a method's `cosines` averages over the prompts that it is given
    return torch.cat([model.cosines(features, (prompt, *others))[0] for prompt in prompts.split(1, dim=1)]).T


def packed(numbers):
    """A tensor as text. why not in half precision: the plan of a small epsilon would be wrong by percents."""
    values = numbers.float().cpu().contiguous().numpy().astype("<f4")
    return {"shape": list(numbers.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def png(picture):
    """A picture as a data: address."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(numbers, paper):
    """The template with its numbers, and a policy: its own scripts may run, nothing may be loaded.

    paper: the address of PAPER.md.
    """
    address = quote(paper, safe="/:")
    template = TEMPLATE.read_text(encoding="utf-8").replace('href="PAPER.md', f'href="{address}')
    scripts = re.findall("<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; " \
             "base-uri 'none'; form-action 'none'"
    # why: a "<" in a class name could end the element that holds the numbers
    data = json.dumps(numbers).replace("<", "\\u003c")
    return template.replace("{{policy}}", policy).replace("{{data}}", data)


def address_from(folder):
    """The address of PAPER.md in a page in this folder."""
    try:
        return Path(os.path.relpath(PAPER, folder)).as_posix()
    except ValueError:                                     # on Windows, of a folder on another drive
        return PAPER.as_uri()


def parse_args(argv=None):
    """The options."""
    parser = Parser("python -m extras.explore RUN [options]", __doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that train.py wrote")
    visualize.picture_options(parser)
    parser.add_argument("--output", metavar="FILE", help="the page, FILE.html (RUN/pictures/explore.html)")
    args = parser.parse_args(argv)
    visualize.check_picture_options(parser, args)
    args.output = Path(args.output or Path(args.run) / "pictures" / "explore.html")
    if args.output.suffix != ".html":
        parser.error(f"--output must end in .html, got {args.output}")
    return args


@machine.plain_errors()
def main(args):
    """Computes the numbers of the pictures, writes the page and says where."""
    machine.use_device(args.device)
    checkpoint = runs.read_checkpoint(args.run)
    places.check_file(args.output, "--output")
    model = runs.build(args.run, checkpoint, args.device, model=args.model)
    with torch.no_grad():
        text_features = model.encode_prompts()
    pictures = [look(model, text_features, image, path, truth)
                for path, truth, image in visualize.chosen(args.run, checkpoint, model, args)]

    paper = address_from(args.output.parent.resolve())
    machine.write_text(args.output, page({"run": args.run, **described(model), "pictures": pictures}, paper))
    print(f"wrote {args.output}, {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(parse_args())
