"""Tells pictures of a run's classes (in-distribution, ID) from pictures of anything else (OOD), as in Table 3.

    python ood.py runs/critters-16shot-seed1                        against the drawn OOD sets
    python ood.py runs/imagenet-16shot-seed1 --data-root DIR        against iNaturalist, SUN, Places, Textures
    python ood.py RUN --ood-root textures=DIR --csv scores.csv      against one's own pictures, with a score for each
    python ood.py --zero-shot --dataset imagenet --data-root DIR    CLIP alone, no run needed

Every score is a confidence: higher means more in-distribution. Read it from the scores (Sec. 3.5) and the two metrics
through the sets of pictures to `confidences`, which makes the rows of the table from a batch.
"""

import math
import os
import statistics
import time
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

import paper
import data
from harness import machine, places, run_pictures, runs
from harness.parser import Parser
from methods import METHODS
from methods.zero_shot import ZeroShot
from sources import critters
from sources.files import absolute
from sources.overlap import shared
from sources.listing import left_out, walk

TEMPLATE = "a photo of a {}"     # as in MCM and GL-MCM, for every dataset; CoOp's templates end in a full stop

# Each OOD set of ImageNet: its number of pictures, and its folder in one of HOMES, which are folders of --data-root.
BENCHMARK = {"iNaturalist": (10_000, ("iNaturalist",)), "SUN": (10_000, ("SUN",)), "Places": (10_000, ("Places",)),
             "Textures": (5_640, ("dtd/images", "dtd/dtd/images", "Texture/images"))}
HOMES = ("ood_data", "", "ImageNet_OOD_dataset")
SOURCES = ("get iNaturalist, SUN and Places from http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/<set>.tar.gz; "
           "Textures is all of DTD: python data.py --dataset dtd --data-root DIR --download")

# The rows, controls first. GL-MCM was published on the value path of the last block; nothing is published for V-V.
ROWS = {"zero_shot_mcm": "zero-shot MCM", "zero_shot_gl_mcm": "zero-shot GL-MCM, value path",
        "zero_shot_gl_mcm_vv": "zero-shot GL-MCM, V-V, none published",
        "mcm": "this run's MCM", "l_mcm": "this run's L-MCM", "gl_mcm": "this run's GL-MCM",
        "own": "this method's own score"}
# Which row a score of a method of `make_methods` fills.
ROW_OF = {("value", "mcm"): "zero_shot_mcm", ("value", "gl_mcm"): "zero_shot_gl_mcm",
          ("vv", "gl_mcm"): "zero_shot_gl_mcm_vv",
          ("run", "mcm"): "mcm", ("run", "l_mcm"): "l_mcm", ("run", "gl_mcm"): "gl_mcm", ("run", "own"): "own"}


# ---- scores: Sec. 3.5, "we follow the GL-MCM protocol" -------------------------------------------------------

def mcm(cosines, temperature=1.0):
    """Maximum concept matching: the probability of the likeliest class.  Sec. 3.5, GL-MCM

    cosines (B, C), averaged over prompts, not scaled by 1/tau -> confidence (B,) in [1/C, 1], float64.
    """
    # why float64: at temperature 1000, the released training script's, float32 makes ties of most scores
    return (cosines.double() / temperature).softmax(dim=-1).amax(dim=-1)


def l_mcm(patch_cosines, temperature=1.0):
    """Local MCM: the same for each patch, then the most confident patch. No selection, no transport.  Sec. 3.5, GL-MCM

    patch_cosines (B, P, C) -> confidence (B,) in [1/C, 1], float64.
    """
    return mcm(patch_cosines, temperature).amax(dim=-1)


def gl_mcm(cosines, patch_cosines, temperature=1.0, local_weight=1.0):
    """MCM of the whole image + weight times that of its patches.  Sec. 3.5, GL-MCM

    cosines (B, C), patch_cosines (B, P, C) -> confidence (B,), float64.
    """
    return mcm(cosines, temperature) + local_weight * l_mcm(patch_cosines, temperature)


# ---- metrics: Sec. 4 -----------------------------------------------------------------------------------------

def fpr95(id_scores, ood_scores):
    """The share of OOD pictures that are accepted when 95 % of the ID pictures are.  Sec. 4

    Scores (n,), (m,), tensors or arrays -> a float in [0, 1], lower is better. Raises ValueError where there are none,
    or one is not finite. The threshold is the score whose ID recall is nearest to 0.95, the lowest of equally near.
    differs: textbooks take the first recall >= 0.95. We do what the code behind the published OOD results does. The two
    differ on small sets.
    """
    id_scores, ood_scores = checked(id_scores, ood_scores)
    thresholds = torch.cat([id_scores, ood_scores]).unique()                       # ascending
    thresholds = thresholds[thresholds >= id_scores.min()]                         # the first has full recall
    accepted = len(id_scores) - torch.searchsorted(id_scores.sort().values, thresholds)
    # why double: 0.9 and 1 are equally near to 0.95 except for rounding, and the published code rounds in double
    distance = (accepted.double() / len(id_scores) - 0.95).abs()
    return (ood_scores >= thresholds[distance.argmin()]).double().mean().item()    # argmin: the first of equals


def auroc(id_scores, ood_scores):
    """How often a random ID picture scores higher than a random OOD picture; a tie counts half.  Sec. 4

    Scores (n,), (m,), tensors or arrays -> a float in [0, 1], 1/2 is chance. Raises ValueError where there are none,
    or one is not finite.
    """
    id_scores, ood_scores = checked(id_scores, ood_scores)
    ood_scores = ood_scores.sort().values
    below = torch.searchsorted(ood_scores, id_scores)                              # (n,): OOD scores below each ID one
    not_above = torch.searchsorted(ood_scores, id_scores, right=True)              # and those that equal it as well
    return (below + not_above).sum().item() / (2 * len(id_scores) * len(ood_scores))


def checked(*both):
    """ID and OOD scores as float64 vectors on the CPU."""
    both = [torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach() for scores in both]
    for name, scores in zip(("ID", "OOD"), both):
        finite = int(scores.isfinite().sum())
        if finite < max(1, len(scores)):
            raise ValueError(f"no FPR95, no AUROC: of {len(scores)} {name} scores {finite} are finite numbers")
    return both


# ---- the sets of pictures ------------------------------------------------------------------------------------

def ood_sets(dataset, root, own=None):
    """The OOD sets that go with a dataset -> {name: items}, items as in data.py with label -1.

    own: {name: folder}, one's own sets in their place. Raises FileNotFoundError that names every set without pictures.
    """
    if not own and dataset == "critters":
        return {name: [(path, label, "") for path, label in critters.paths(name)] for name in critters.OOD_SETS}
    if not own and dataset != "imagenet":
        raise ValueError(f"no OOD sets are known to go with {dataset}: name folders of pictures by --ood-root NAME=DIR")
    folders = {name: [absolute(top)] for name, top in own.items()} if own else {
        name: [absolute(os.path.join(root, home, top)) for home in HOMES for top in candidates]
        for name, (_, candidates) in BENCHMARK.items()}
    found = {name: first_with_pictures(candidates) for name, candidates in folders.items()}
    empty = [f"\n{name}: no pictures in {', '.join(folders[name])}" for name in found if not found[name]]
    if empty:
        raise FileNotFoundError("OOD sets are missing" + "".join(empty) + f"\n{SOURCES}" * (not own))
    return found


def first_with_pictures(folders):
    """The pictures, as items, of the first of these folders that has any; none where no folder has."""
    for top in filter(os.path.isdir, folders):
        pictures, others, system = walk(top)
        for text in left_out(others, system):
            print(f"{top}: left out {text}", flush=True)
        if pictures:
            return [(path, -1, "") for path in pictures]
    return []


def count_warnings(sets):
    """One line for each set of the ImageNet benchmark, ID included, whose size is not the published one."""
    expected = {"ID": data.DATASETS["imagenet"].sizes[2], **{name: count for name, (count, _) in BENCHMARK.items()}}
    return [f"warning: {name} has {len(items):,} pictures, the benchmark {expected[name]:,}: "
            + ("some are missing, so an archive may be half unpacked" if len(items) < expected[name] else
               "others lie among them, or it is the whole dataset, not the benchmark's selection")
            + "; do not compare with published numbers"
            for name, items in sets.items() if len(items) != expected.get(name, len(items))]


def overlap_warnings(sets, trained):
    """One line for each OOD set that holds in-distribution pictures; trained: paths of those that were trained on."""
    inside = [path for path, *_ in sets["ID"]] + trained
    found = {name: shared([path for path, *_ in items], inside) for name, items in sets.items() if name != "ID"}
    return [f"warning: {name} holds {len(paths)} pictures that are in-distribution, first {paths[0]}: its numbers "
            "are not those of an OOD set" for name, paths in found.items() if paths]


# ---- from pictures to scores ---------------------------------------------------------------------------------

def confidences(images, methods, text_features, temperature=1.0, local_weight=1.0):
    """A batch of pictures -> {row of the table: confidence (B,)} and the predicted classes, (B,).

    methods: those of `make_methods`, by name, the one whose predictions count last; text_features: what
    `encode_prompts()` of each gave. Every method predicts by the score that decides (Sec. 3.5).
    """
    rows = {}
    for name, method in methods.items():
        features = method.features(images)
        cosines, patch_cosines = method.cosines(features, text_features[name])     # (B, C), (B, P, C)
        scores = {}
        if cosines is not None:
            scores["mcm"] = mcm(cosines, temperature)
        if patch_cosines is not None:
            scores["l_mcm"] = l_mcm(patch_cosines, temperature)
        if cosines is not None and patch_cosines is not None:
            scores["gl_mcm"] = gl_mcm(cosines, patch_cosines, temperature, local_weight)
        if hasattr(method, "confidence"):
            scores["own"] = method.confidence(features, text_features[name]).double()
        rows |= {ROW_OF[name, score]: values for score, values in scores.items() if (name, score) in ROW_OF}

    outputs = method(features, None, text_features[name])      # of the last method
    return rows, method.logits(outputs).argmax(dim=1)


def make_methods(clip_model, class_names, model=None):
    """The methods whose rows stand in the table, by name: two controls, then the run's method where there is one."""
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
            rows, labels = confidences(images.to(args.device), methods, text_features, args.temperature,
                                       args.local_weight)
            batches.append(rows)
            classes.append(labels)
        scores[name] = {row: torch.cat([batch[row] for batch in batches]).cpu() for row in batches[0]}
        predicted[name] = torch.cat(classes).cpu()
    return scores, predicted


# ---- the table -----------------------------------------------------------------------------------------------

def measure(scores):
    """{"ID" and each OOD set: {row: scores}} -> {row: {each OOD set and "mean": {"fpr95", "auroc"}}} in percent."""
    outside = {name: rows for name, rows in scores.items() if name != "ID"}
    table = {}
    for row, inside in scores["ID"].items():
        cells = {name: {"fpr95": 100 * fpr95(inside, rows[row]), "auroc": 100 * auroc(inside, rows[row])}
                 for name, rows in outside.items()}
        mean = {metric: statistics.mean(cell[metric] for cell in cells.values()) for metric in ("fpr95", "auroc")}
        table[row] = {**cells, "mean": mean}
    return table


def paper_rows(config, sets):
    """The rows that Table 3 has, in the form of `measure`; none unless ViT-B/16 meets ImageNet's four OOD sets."""
    if config["dataset"] != "imagenet" or config["model"] != "ViT-B/16" or [*sets] != ["ID", *BENCHMARK]:
        return {}
    rows = {"zero_shot_mcm": "CLIP (MCM)", "zero_shot_gl_mcm": "CLIP (GL)"}
    variants = {(True, True, True): "SOT-GLP", (False, True, True): "w/o V-V", (True, False, True): "w/o Proj"}
    switches = tuple(config.get(name) for name in ("vv_attention", "local_projection", "class_specific"))
    if switches in variants and config["shots"] == 16 and config["method"] == "sotglp":
        rows["gl_mcm"] = variants[switches]
    table = {line["method"]: line for line in paper.table(3)}
    return {row: {name: {metric.lower(): table[line][f"{name} {metric}"] for metric in ("FPR95", "AUROC")}
                  for name in (*BENCHMARK, "mean")} for row, line in rows.items()}


def show(table, paper):
    """Prints the rows, the paper's below ours, and a warning for each set with rows below chance."""
    def print_row(label, cells):
        print(f"{label:38s}" + "".join(f"{cell:>{max(15, len(name) + 2)}s}" for name, cell in cells.items()))

    print_row("FPR95 / AUROC in percent", {name: name for name in next(iter(table.values()))})
    for row, cells in table.items():
        for label, found in ((ROWS[row], cells), ("    the paper's Table 3", paper.get(row))):
            if found:
                print_row(label, {name: "{fpr95:.1f} / {auroc:.1f}".format(**cell) for name, cell in found.items()})
    for name in next(iter(table.values())):
        worse = [f"{ROWS[row]} {cells[name]['auroc']:.1f}" for row, cells in table.items()
                 if cells[name]["auroc"] < 50]
        if worse and name != "mean":
            print(f"warning: {name}: AUROC below 50 %, worse than chance: {', '.join(worse)}; "
                  "is the set what it should be? --csv lists its pictures")


def csv_rows(sets, scores, predicted, row, class_names):
    """One line per picture: path, set, score, predicted class."""
    return [{"path": path, "set": name, "score": score, "predicted": class_names[label]}
            for name, items in sets.items()
            for (path, *_), score, label in zip(items, scores[name][row].tolist(), predicted[name].tolist())]


# ---- the script ----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options, checked for what goes together."""
    parser = Parser(
        "python ood.py [RUN] [options]", __doc__,
        epilog=f"For ImageNet, {SOURCES}.\n"
               "Look at the zero-shot rows first: where they are far from the published values, a set or the class\n"
               "order is wrong, and no gain above them means anything. Textures is every picture of DTD, and SUN has\n"
               "many of SUN397: report neither for a run trained on those. RUN/ood.json holds the table, in percent.")
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a folder that train.py wrote; its own test split is ID")
    add("--zero-shot", action="store_true", help="only the rows of CLIP without learning, no RUN needed")
    add("--dataset", choices=data.DATASETS, metavar="NAME", help="for --zero-shot: whose test split is ID (critters)")
    add("--model", help="for --zero-shot: a CLIP name or file (tiny for critters, else ViT-B/16); for a RUN: the file of "
        "its CLIP, where it has moved")
    add("--activation", choices=clip.ACTIVATIONS, help="for --zero-shot with a file: that of its towers (quickgelu)")
    add("--data-root", help="folder of the datasets; for ImageNet also of the OOD sets, or of ood_data with them "
        "(the run's own, else $DATA_ROOT, else ./data)")
    add("--ood-root", action="append", default=[], metavar="NAME=DIR",
        help="pictures below DIR, at any depth, are an OOD set; may be repeated; replaces the dataset's usual ones")
    add("--temperature", type=float, help="of the softmax over raw cosines; 1 in every paper, 1000 in the released "
        "training script: nearly a linear score (1, and 1000 for a RUN of --method released)")
    add("--local-weight", type=float, default=1.0, help="of L-MCM in GL-MCM; 1 for SOT-GLP, GalLoP and LoCoOp, 0.5 in "
        "GL-MCM's own ImageNet script (%(default)s)")
    add("--csv", metavar="FILE", help="path, set, score and predicted class of every picture: sort by score. It is the "
        "score of the last row: the method's own, else GL-MCM where there is one")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, help="processes that read pictures (up to 8 on CUDA, 0 on CPU)")
    add("--amp", choices=("off", *machine.HALF), help="mixed precision of the towers (fp16 on CUDA, off on CPU)")
    args = parser.parse_args(argv)
    parser.refuse_empty(args)
    args.workers = machine.default_workers(args.device) if args.workers is None else args.workers
    args.amp = args.amp or machine.default_amp(args.device)
    if bool(args.run) == args.zero_shot:
        parser.error("name either a RUN or --zero-shot --dataset NAME")
    if args.run and (args.dataset or args.activation):
        parser.error("--dataset and --activation are for --zero-shot: a RUN has its own")
    args.dataset = args.dataset or "critters"
    temperature = 1.0 if args.temperature is None else args.temperature
    if not (0 < temperature < math.inf and math.isfinite(args.local_weight)):
        parser.error("--temperature must be positive and --local-weight finite, "
                     f"got {temperature} and {args.local_weight}")
    pairs = [text.partition("=") for text in args.ood_root]
    args.ood_root = {name: top for name, _, top in pairs}
    if len(args.ood_root) < len(pairs) or not all(args.ood_root.values()) or {"", "ID", "mean"} & {*args.ood_root}:
        parser.error("--ood-root takes NAME=DIR, every NAME another one, none of them ID or mean")
    return args


def find_pictures(args, checkpoint):
    """ID and OOD sets of a configuration -> {set: items}, class names; prints what was found and what looks wrong."""
    config = checkpoint["config"]
    root = run_pictures.root_of(config, args.data_root) if args.run else data.find_root(args.dataset, args.data_root)
    # why the OOD sets first: what is missing shows at once, while ImageNet's lists take their time
    outside = ood_sets(config["dataset"], root, args.ood_root)
    test, class_names = (run_pictures.unseen_pictures(args.run, checkpoint, args.data_root) if args.run else
                         data.load(config["dataset"], root, shots=0, seed=1)[2:])
    print(f"{args.run or 'zero-shot'}: model {config['model']}, ID {config['dataset']}, {len(test)} test images, OOD "
          + ", ".join(f"{name} {len(items)}" for name, items in outside.items())
          + f"; temperature {args.temperature:g}, local weight {args.local_weight:g}", flush=True)
    sets = {"ID": test, **outside}
    trained = [os.path.join(root, path) for path in checkpoint.get("training", ())]
    warnings = [*overlap_warnings(sets, trained), *(count_warnings(sets) if config["dataset"] == "imagenet" else ())]
    for warning in warnings:
        print(warning, flush=True)

    # why now: what cannot be read would end the program after all the work before it
    own = data.DATASETS[config["dataset"]].as_people_see
    data.check_pictures([item for name, items in sets.items() if own or name in args.ood_root for item in items])
    return sets, class_names


@machine.plain_errors()
def main(args):
    """Finds the pictures, scores each once, prints the table and writes it."""
    start = time.monotonic()
    machine.use_device(args.device, args.amp)
    if args.csv:
        places.check_file(args.csv, "--csv")
    checkpoint = runs.read_checkpoint(args.run) if args.run else {"config": {
        "dataset": args.dataset, "model": clip.full_name(args.model or machine.default_model(args.dataset)),
        "method": "zero_shot", "shots": 0}}
    config = checkpoint["config"]
    writable = bool(args.run) and os.access(args.run, os.W_OK)
    if args.run and not writable:
        print(f"note: {args.run} is read-only here: ood.json is not written; --csv FILE can be elsewhere",
              flush=True)
    if args.temperature is None:
        args.temperature = METHODS[config["method"]].ood_temperature if args.run else 1.0
    sets, class_names = find_pictures(args, checkpoint)
    if args.run:
        model = runs.build(args.run, checkpoint, args.device, model=args.model)
        clip_model = model.clip
    else:
        model = None
        clip_model, _ = clip.load(config["model"], args.device, args.activation or "quickgelu")
    if args.amp in machine.HALF:
        clip_model.store_matrices(machine.HALF[args.amp])
    methods = make_methods(clip_model, class_names, model)
    with machine.autocast(args.amp, args.device):
        scores, predicted = score_sets(sets, config["dataset"], methods, args)
    table, paper = measure(scores), paper_rows(config, sets)

    show(table, paper)
    if writable:
        machine.write_json(Path(args.run) / "ood.json", {
            **{name: config[name] for name in ("method", "dataset", "model")}, "temperature": args.temperature,
            "local_weight": args.local_weight, "ood_root": args.ood_root, "precision": machine.precision(args.amp),
            "images": {name: len(items) for name, items in sets.items()},
            "data": {name: run_pictures.digest(items, run_pictures.root_of(config, args.data_root)) for name, items in sets.items()},
            "table": table, "paper_table_3": paper, "seconds": round(time.monotonic() - start, 1)})
        print(f"wrote {args.run}/ood.json")
    if args.csv:
        row = [*table][-1] if model else "zero_shot_gl_mcm"
        machine.write_csv(args.csv, csv_rows(sets, scores, predicted, row, class_names))
        print(f"wrote {args.csv}: {sum(map(len, sets.values()))} pictures")


if __name__ == "__main__":
    main(parse_args())
