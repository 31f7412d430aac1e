"""Tells pictures of a run's classes (in-distribution, ID) from all other pictures (OOD), as in Table 3.

    python ood.py runs/critters-16shot-seed1                       against the drawn OOD sets
    python ood.py runs/imagenet-16shot-seed1 --data-root DIR       against iNaturalist, SUN, Places, Textures
    python ood.py RUN --ood-root textures=DIR --csv scores.csv     against one's own; a score for each
    python ood.py --zero-shot --dataset imagenet --data-root DIR   CLIP alone, no run needed

Every score is a confidence: higher means more in-distribution. Read it from the scores (Sec. 3.5) and the two
metrics to `confidences`, which makes the rows of the table from a batch. The sets are in sources/ood_sets.py.
"""

import math
import os
import statistics
import time

import clip  # before torch: it bounds how long torch's threads wait

import torch

import data
from harness import machine, places, run_pictures, runs
from harness.ood_table import csv_rows, paper_rows, show, write_table
from harness.parser import Parser
from methods import METHODS
from methods.zero_shot import ZeroShot
from sources import reading
from sources.ood_sets import SOURCES, count_warnings, ood_sets, overlap_warnings

TEMPLATE = "a photo of a {}"     # as in MCM and GL-MCM, for every dataset; CoOp's end in a full stop

# (method of `make_methods`, score) -> row of the table
ROW_OF = {
    ("value", "mcm"): "zero_shot_mcm",
    ("value", "gl_mcm"): "zero_shot_gl_mcm",
    ("vv", "gl_mcm"): "zero_shot_gl_mcm_vv",
    ("run", "mcm"): "mcm",
    ("run", "l_mcm"): "l_mcm",
    ("run", "gl_mcm"): "gl_mcm",
    ("run", "own"): "own",
}


# ---- scores: Sec. 3.5, "we follow the GL-MCM protocol" -----------------------------------------------------

def mcm(cosines, temperature=1.0):
    """Maximum concept matching: the probability of the likeliest class.  Sec. 3.5, GL-MCM

    cosines (B, C), averaged over prompts, not scaled by 1/tau -> confidence (B,) in [1/C, 1], float64.
    """
    # why float64: at temperature 1000, the released training script's, float32 makes ties of most scores
    return (cosines.double() / temperature).softmax(dim=-1).amax(dim=-1)


def l_mcm(patch_cosines, temperature=1.0):
    """Local MCM: the same for each patch, then the most confident patch.  Sec. 3.5, GL-MCM

    There is no selection and no transport. patch_cosines (B, P, C) -> confidence (B,) in [1/C, 1], float64.
    """
    return mcm(patch_cosines, temperature).amax(dim=-1)


def gl_mcm(cosines, patch_cosines, temperature=1.0, local_weight=1.0):
    """MCM of the whole image + weight times that of its patches.  Sec. 3.5, GL-MCM

    cosines (B, C), patch_cosines (B, P, C) -> confidence (B,), float64.
    """
    return mcm(cosines, temperature) + local_weight * l_mcm(patch_cosines, temperature)


# ---- metrics: Sec. 4 ---------------------------------------------------------------------------------------

def fpr95(id_scores, ood_scores):
    """The share of OOD pictures above the threshold that 95 % of the ID pictures reach.  Sec. 4

    Scores (n,), (m,), tensors or arrays -> a float in [0, 1], lower is better. Raises ValueError where there
    are none, or one is not finite. The threshold is the score whose ID recall is nearest to 0.95, the lowest
    of equally near ones.
    differs: textbooks take the first recall >= 0.95. We do what the code behind the published OOD results
    does. The two differ on small sets.
    """
    id_scores, ood_scores = checked(id_scores, ood_scores)
    thresholds = torch.cat([id_scores, ood_scores]).unique()                 # ascending
    thresholds = thresholds[thresholds >= id_scores.min()]                   # the first has full recall
    accepted = len(id_scores) - torch.searchsorted(id_scores.sort().values, thresholds)

    # why double: only rounding parts 0.9 and 1, equally near to 0.95, and the published code rounds in double
    distance = (accepted.double() / len(id_scores) - 0.95).abs()
    threshold = thresholds[distance.argmin()]                                # argmin: the first of equals
    return (ood_scores >= threshold).double().mean().item()


def auroc(id_scores, ood_scores):
    """How often a random ID picture scores higher than a random OOD picture; a tie counts half.  Sec. 4

    Scores (n,), (m,), tensors or arrays -> a float in [0, 1], 1/2 is chance. Raises ValueError where there
    are none, or one is not finite.
    """
    id_scores, ood_scores = checked(id_scores, ood_scores)
    ood_scores = ood_scores.sort().values
    below = torch.searchsorted(ood_scores, id_scores)                  # (n,): OOD scores below each ID one
    not_above = torch.searchsorted(ood_scores, id_scores, right=True)  # (n,): and those equal to it as well
    return (below + not_above).sum().item() / (2 * len(id_scores) * len(ood_scores))


def checked(*both):
    """ID and OOD scores as float64 vectors on the CPU."""
    both = [torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach() for scores in both]
    for name, scores in zip(("ID", "OOD"), both):
        finite = int(scores.isfinite().sum())
        if finite < max(1, len(scores)):
            raise ValueError(f"no FPR95, no AUROC: of {len(scores)} {name} scores {finite} are finite "
                             "numbers")
    return both


def measure(scores):
    """{"ID" and each OOD set: {row: scores}} -> {row: {OOD set or "mean": {"fpr95", "auroc"}}} in percent."""
    outside = {name: rows for name, rows in scores.items() if name != "ID"}
    table = {}
    for row, inside in scores["ID"].items():
        cells = {name: {"fpr95": 100 * fpr95(inside, rows[row]), "auroc": 100 * auroc(inside, rows[row])}
                 for name, rows in outside.items()}
        mean = {metric: statistics.mean(cell[metric] for cell in cells.values())
                for metric in ("fpr95", "auroc")}
        table[row] = {**cells, "mean": mean}
    return table


# ---- from pictures to scores -------------------------------------------------------------------------------

def confidences(images, methods, text_features, temperature=1.0, local_weight=1.0):
    """A batch of pictures -> {row of the table: confidence (B,)} and the predicted classes, (B,).

    methods: those of `make_methods`, by name, the last one gives the predictions; text_features: what
    `encode_prompts()` of each gave. Every method predicts by the score that decides (Sec. 3.5).
    """
    rows = {}
    for name, method in methods.items():
        features = method.features(images)
        scores = scores_of(method, features, text_features[name], temperature, local_weight)
        for score, values in scores.items():
            if (name, score) in ROW_OF:
                rows[ROW_OF[name, score]] = values

    outputs = method(features, None, text_features[name])      # of the last method
    return rows, method.logits(outputs).argmax(dim=1)


def scores_of(method, features, text_features, temperature, local_weight):
    """The confidences that a method has, by name, (B,) each: a method without patches has no local ones."""
    cosines, patch_cosines = method.cosines(features, text_features)               # (B, C), (B, P, C)
    scores = {}
    if cosines is not None:
        scores["mcm"] = mcm(cosines, temperature)
    if patch_cosines is not None:
        scores["l_mcm"] = l_mcm(patch_cosines, temperature)
    if cosines is not None and patch_cosines is not None:
        scores["gl_mcm"] = gl_mcm(cosines, patch_cosines, temperature, local_weight)
    if hasattr(method, "confidence"):
        scores["own"] = method.confidence(features, text_features).double()
    return scores


def make_methods(clip_model, class_names, model=None):
    """The methods whose rows stand in the table, by name: two controls, then the run's where there is one."""
    methods = {"value": ZeroShot(clip_model, class_names, TEMPLATE),
               "vv": ZeroShot(clip_model, class_names, TEMPLATE, stream="vv")}
    if model is not None:
        methods["run"] = model
    return methods


@torch.no_grad()
def score_sets(sets, dataset, methods, args):
    """Each picture of each set once -> {set: {row: scores (n,)}}, {set: predicted classes (n,)}, on the CPU.

    Pictures of all sets are read as those of the dataset, on which the run was trained.
    """
    text_features = {name: method.encode_prompts() for name, method in methods.items()}
    resolution = methods["value"].clip.visual.resolution

    scores = {}
    predicted = {}
    for name, items in sets.items():
        batches = []
        classes = []
        loader = data.test_batches(items, dataset, resolution, args.workers, args.device)
        for images, _ in machine.progress(loader, name):
            images = images.to(args.device)
            rows, labels = confidences(images, methods, text_features, args.temperature, args.local_weight)
            batches.append(rows)
            classes.append(labels)

        scores[name] = {row: torch.cat([batch[row] for batch in batches]).cpu() for row in batches[0]}
        predicted[name] = torch.cat(classes).cpu()
    return scores, predicted


# ---- the script --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.refuse_empty(args)
    if bool(args.run) == args.zero_shot:
        parser.error("name either a RUN or --zero-shot --dataset NAME")
    if args.run and (args.dataset or args.activation):
        parser.error("--dataset and --activation are for --zero-shot: a RUN has its own")
    temperature = 1.0 if args.temperature is None else args.temperature
    if not (0 < temperature < math.inf and math.isfinite(args.local_weight)):
        parser.error("--temperature must be positive and --local-weight finite, "
                     f"got {temperature} and {args.local_weight}")

    pairs = [text.partition("=") for text in args.ood_root]
    args.ood_root = {name: top for name, _, top in pairs}
    equal = len(args.ood_root) < len(pairs)
    if equal or not all(args.ood_root.values()) or {"", "ID", "mean"} & {*args.ood_root}:
        parser.error("--ood-root takes NAME=DIR, every NAME another one, none of them ID or mean")

    args.dataset = args.dataset or "critters"
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    args.amp = args.amp or machine.default_amp(args.device)
    return args


def make_parser():
    """The options, unchecked."""
    parser = Parser("python ood.py [RUN] [options]", __doc__, epilog=(
        f"For ImageNet, {SOURCES}.\n"
        "Look at the zero-shot rows first: where they are far from the published values, a set or the class\n"
        "order is wrong, and no gain above them means anything. Textures is every picture of DTD, SUN has\n"
        "many of SUN397: report neither for a run trained on those. RUN/ood.json has the table, in percent."))
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a folder that train.py wrote; its own test split is ID")
    add("--zero-shot", action="store_true", help="only the rows of CLIP without learning, no RUN needed")
    add("--dataset", choices=data.DATASETS, metavar="NAME",
        help="for --zero-shot: whose test split is ID (critters)")
    add("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16); for a RUN: "
        "the file of its CLIP, where it has moved")
    add("--activation", choices=clip.ACTIVATIONS,
        help="for --zero-shot with a file: that of its towers (quickgelu)")
    add("--data-root", help="folder of the datasets; for ImageNet also of the OOD sets, or of ood_data with "
        "them (the run's own, else $DATA_ROOT, else ./data)")
    add("--ood-root", action="append", default=[], metavar="NAME=DIR", help="pictures below DIR, at any "
        "depth, are an OOD set; may be repeated; replaces the dataset's usual ones")
    add("--temperature", type=float, help="of the softmax over raw cosines; 1 in every paper, 1000 in the "
        "released training script: nearly a linear score (1, and 1000 for a RUN of --method released)")
    add("--local-weight", type=float, default=1.0, help="of L-MCM in GL-MCM; 1 for SOT-GLP, GalLoP and "
        "LoCoOp, 0.5 in GL-MCM's own ImageNet script (%(default)s)")
    add("--csv", metavar="FILE", help="path, set, score and predicted class of every picture: sort by score. "
        "It is the score of the last row: the method's own, else GL-MCM where there is one")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF),
        help="mixed precision of the towers (fp16 on CUDA, off on CPU)")
    return parser


def read_checkpoint(args):
    """What is known of the run; without one, a configuration of zero-shot CLIP in its form."""
    if args.run:
        return runs.read_checkpoint(args.run)
    model = clip.full_name(args.model or machine.default_model(args.dataset))
    return {"config": {"dataset": args.dataset, "model": model, "method": "zero_shot", "shots": 0}}


def find_pictures(args, checkpoint):
    """ID and OOD sets of a configuration -> {set: items}, class names; prints what was found."""
    config = checkpoint["config"]
    if args.run:
        root = run_pictures.root_of(config, args.data_root)
    else:
        root = data.find_root(args.dataset, args.data_root)
    # why the OOD sets first: what is missing shows at once, while ImageNet's lists take their time
    outside = ood_sets(config["dataset"], root, args.ood_root)
    if args.run:
        test, class_names = run_pictures.unseen_pictures(args.run, checkpoint, args.data_root)
    else:
        *_, test, class_names = data.load(config["dataset"], root, shots=0, seed=1)

    sizes = ", ".join(f"{name} {len(items)}" for name, items in outside.items())
    print(f"{args.run or 'zero-shot'}: model {config['model']}, ID {config['dataset']}, {len(test)} "
          f"test images, OOD {sizes}; temperature {args.temperature:g}, local weight {args.local_weight:g}",
          flush=True)
    sets = {"ID": test, **outside}
    trained = [os.path.join(root, path) for path in checkpoint.get("training", ())]
    warnings = overlap_warnings(sets, trained)
    if config["dataset"] == "imagenet":
        warnings += count_warnings(sets)
    for warning in warnings:
        print(warning, flush=True)

    # why now: what cannot be read would end the program after all the work before it
    all_own = data.DATASETS[config["dataset"]].as_people_see
    own = [items for name, items in sets.items() if all_own or name in args.ood_root]
    reading.check_pictures([item for items in own for item in items])
    return sets, class_names


def load_models(args, checkpoint):
    """The CLIP of a configuration, ready for the device and the precision, and the run's model or None."""
    if args.run:
        model = runs.build(args.run, checkpoint, args.device, model=args.model)
        clip_model = model.clip
    else:
        model = None
        clip_model, _ = clip.load(checkpoint["config"]["model"], args.device, args.activation or "quickgelu")
    machine.store_matrices(clip_model, args.amp)
    return clip_model, model


@machine.plain_errors()
def main(args):
    """Finds the pictures, scores each once, prints the table and writes it."""
    start = time.monotonic()
    machine.use_device(args.device, args.amp)
    if args.csv:
        places.check_file(args.csv, "--csv")
    checkpoint = read_checkpoint(args)
    config = checkpoint["config"]
    writable = bool(args.run) and os.access(args.run, os.W_OK)
    if args.run and not writable:
        print(f"note: {args.run} is read-only here: ood.json is not written; --csv FILE can be elsewhere",
              flush=True)
    if args.temperature is None:
        args.temperature = METHODS[config["method"]].ood_temperature if args.run else 1.0

    sets, class_names = find_pictures(args, checkpoint)
    clip_model, model = load_models(args, checkpoint)
    methods = make_methods(clip_model, class_names, model)
    with machine.autocast(args.amp, args.device):
        scores, predicted = score_sets(sets, config["dataset"], methods, args)

    table = measure(scores)
    published = paper_rows(config, sets)
    show(table, published)
    if writable:
        write_table(args, config, sets, table, published, time.monotonic() - start)
    if args.csv:
        row = [*table][-1] if model else "zero_shot_gl_mcm"
        machine.write_csv(args.csv, csv_rows(sets, scores, predicted, row, class_names))
        print(f"wrote {args.csv}: {sum(map(len, sets.values()))} pictures")


if __name__ == "__main__":
    main(parse_args())
