"""Fits a linear probe, logistic regression, on image features of a few images per class, as in CLIP, CoOp.

    python -m extras.linear_probe                                    the embedded default
    python -m extras.linear_probe --dataset eurosat --data-root DIR --shots 8

The probe has no text, no prompts and no epochs, so train.py does not train it. methods/linear_probe.py has
its equations. The weight of its penalty is chosen on the validation shots; the test split is read once, at
the end. The run's folder gets the result.json of train.py.
"""

import time
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch

import data
import evaluate
from harness import machine, places, results, run_pictures
from harness.configuration import folder_name
from harness.parser import Parser
from methods.linear_probe import LinearProbe, fit, search
from methods.zero_shot import ZeroShot
from sources.reading import check_pictures


@torch.no_grad()
def image_features(clip_model, items, args):
    """Image features of some items, not normalised, without augmentation -> (n, D), labels (n,)."""
    loader = data.test_batches(items, args.dataset, clip_model.visual.resolution, args.workers, args.device)
    features, labels = zip(*((clip_model.encode_image(images.to(args.device)), labels)
                             for images, labels in machine.progress(loader, "features")))
    return torch.cat(features), torch.cat(labels).to(args.device)


def parse_args(argv=None):
    """The options, under the names that train.py gives them."""
    parser = Parser("python -m extras.linear_probe [options]", __doc__)
    add = parser.add_argument
    add("--dataset", choices=data.DATASETS, metavar="NAME", default="critters",
        help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the datasets' folders ($DATA_ROOT, else ./data)")
    add("--model", help="a CLIP name or a weights file (tiny for critters, else ViT-B/16)")
    add("--activation", choices=clip.ACTIVATIONS, default="quickgelu",
        help="of a --model that is somebody's file; weights do not show it (%(default)s)")
    add("--shots", type=int, default=16, help="training images per class (%(default)s)")
    add("--seed", type=int, default=1,
        help="names the run; nothing here is random but the draw (%(default)s)")
    add("--split-seed", type=int, default=1, help="draws the shots (%(default)s)")
    add("--device", default=machine.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, default=0, help="processes that read pictures (%(default)s)")
    add("--output-dir", help="where the run is written (runs/linear_probe-<dataset>-<shots>shot-seed<seed>, "
        "with the options that are not the usual ones)")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")
    args = parser.parse_args(argv)
    parser.refuse_empty(args)
    args.model = clip.full_name(args.model or machine.default_model(args.dataset))
    with machine.plain_errors():
        args.data_root = data.find_root(args.dataset, args.data_root)
    args.output_dir = args.output_dir or folder_name(configuration(args), vars(parser.parse_args([])))
    return args


def configuration(args):
    """The options that belong to a run, and what the loop of train.py would have: what result.json names."""
    own = {name: value for name, value in vars(args).items() if name != "overwrite"}
    return {**own, "method": "linear_probe", "classes": "all", "sampler": "exact", "held_out": None,
            "amp": "off", "test_split": "test"}


@machine.plain_errors()
def main(args):
    """Features, the search for c, the fit, the test."""
    started, folder = time.monotonic(), Path(args.output_dir)
    machine.use_device(args.device)
    config = configuration(args)
    places.check_free(folder, config, overwrite=args.overwrite)
    if args.dataset == "folder":
        places.check_apart(folder, args.data_root)
    train, val, test, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed)
    published = data.split_matches_published(args.dataset, args.data_root)
    if not val:
        raise ValueError(f"{args.dataset} has no validation images, on which the linear probe chooses its "
                         "penalty")
    if data.DATASETS[args.dataset].as_people_see:
        check_pictures(train + val + test)
    clip_model, _ = clip.load(args.model, args.device, args.activation)
    ZeroShot(clip_model, class_names, data.template(args.dataset))    # why: names too long for it fail here

    with places.lock(folder):
        # why again: another process had the folder till now
        places.check_free(folder, config, overwrite=args.overwrite)
        train_features, val_features = (image_features(clip_model, items, args) for items in (train, val))
        print(f"{len(train)} training images; the weight of the penalty is chosen on {len(val)} validation "
              "images, by 23 fits", flush=True)
        c = search(*train_features, *val_features)
        print(f"chosen: errors count {c:.3g} times the penalty; the test follows", flush=True)
        model = LinearProbe(clip_model, class_names, *fit(*train_features, c, len(class_names)))
        counts = evaluate.test(model, test, args.dataset, workers=args.workers)
        if places.holds_run(folder):
            places.remove(folder, ("last.pt", "log.jsonl", *places.REPORTS))
        parts = {"training": train, "test": test}
        digests = {part: run_pictures.digest(items, args.data_root) for part, items in parts.items()}
        results.report(folder, model, counts, config, started, c=c, train_images=len(train),
                       split_matches_published=published, class_names=class_names,
                       clip_sha256=clip.weights_hash(clip_model), data=digests)


if __name__ == "__main__":
    main(parse_args())
