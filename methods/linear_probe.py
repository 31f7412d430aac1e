"""A linear probe, as in CLIP (Radford et al., arXiv 2103.00020) and CoOp: logistic regression on frozen features.

    python -m methods.linear_probe                                    the embedded default
    python -m methods.linear_probe --dataset eurosat --data-root DIR --shots 8

It has no text, no prompts and no epochs, so train.py does not train it. The weight of its penalty is chosen on the
validation shots; the test split is read once, at the end. The run's folder gets the result.json of train.py.

Against SOT-GLP: the class names are not used, so nothing is known of a class without images; no patches; the image
feature is used as it is, not as a unit vector.

Letters: those of sotglp.py.  n images   C classes   D joint width   c: how much the errors count against the penalty
"""

import argparse
import time
from pathlib import Path

import clip  # before torch: it bounds how long torch's threads wait

import torch
import torch.nn.functional as F

import data
import evaluate
import runs
from sotglp import Method


def logits(features, weight, bias):
    """features (n, D), weight (C, D), bias (C,) -> (n, C), float64."""
    return features.double() @ weight.T + bias


def fit(features, labels, c, n_classes=None, max_iter=1000):
    """The minimum of 1/2 |W|^2 + c sum CE over weight and bias, the bias being free of penalty, by torch's L-BFGS.

    features (n, D), labels (n,) -> weight (C, D), bias (C,), float64. C is n_classes, else the largest label + 1.
    """
    n_classes = n_classes or int(labels.max()) + 1
    weight = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, device=features.device, requires_grad=True)
    bias = weight.detach().new_zeros(n_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() / 2 + c * F.cross_entropy(logits(features, weight, bias), labels, reduction="sum")
        loss = loss / (1 + c * len(labels))                # why: the tolerances then mean the same for every c
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def search(train, train_labels, val, val_labels):
    """CoOp's search for c on validation features (n, D): seven powers of ten, then eight halvings around the best."""
    n_classes = int(torch.cat([train_labels, val_labels]).max()) + 1

    def right(c):
        weight, bias = fit(train, train_labels, c, n_classes)
        return int((logits(val, weight, bias).argmax(dim=1) == val_labels).sum())

    best = max([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6], key=right)    # of equal ones the first
    low, high = best / 10, best * 10
    for _ in range(8):
        right_is_better, ends = right(low) < right(high), (low, high)
        middle = (low * high) ** 0.5
        low, high = (middle, high) if right_is_better else (low, middle)
    return ends[right_is_better]                           # the better end of the last round


class LinearProbe(Method):
    """A fitted probe with the names by which evaluate.py tests a method."""

    stream = "qk"

    def __init__(self, clip_model, class_names, weight, bias):
        super().__init__(clip_model, class_names)
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def encode_prompts(self):
        """There are none."""

    def forward(self, images, drawn=None, texts=None):
        """Images (B, 3, R, R), or what `clip.encode_patches` made of them -> a tuple of the logits (B, C)."""
        return logits(self.tokens(images)[0] @ self.clip.visual.proj, self.weight, self.bias),

    def scores(self, outputs):
        """{"probe": (B, C)}."""
        return {"probe": outputs[0]}


@torch.no_grad()
def image_features(clip_model, items, args):
    """Image features of some items, not normalised, without augmentation -> (n, D), labels (n,)."""
    pictures = data.Pictures(items, clip.preprocess(clip_model.visual.resolution), own=args.dataset == "folder")
    loader = data.test_loader(pictures, evaluate.EVAL_BATCH, args.workers, args.device)
    features, labels = zip(*((clip_model.encode_image(images.to(args.device)), labels)
                             for images, labels in runs.progress(loader, "features")))
    return torch.cat(features), torch.cat(labels).to(args.device)


def parse_args(argv=None):
    """The options, under the names that train.py gives them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=sorted(data.DATASETS), default="critters", help="critters needs no files (%(default)s)")
    add("--data-root", help="folder that holds the datasets' folders ($DATA_ROOT, else ./data)")
    add("--model", help="a CLIP name or a weights file (tiny for critters, else ViT-B/16)")
    add("--shots", type=int, default=16, help="training images per class (%(default)s)")
    add("--seed", type=int, default=1, help="names the run; nothing here is random but the draw (%(default)s)")
    add("--split-seed", type=int, default=1, help="draws the shots (%(default)s)")
    add("--device", default=runs.default_device(), help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--workers", type=int, default=0, help="processes that read pictures (%(default)s)")
    add("--output-dir", help="where the run is written (runs/linear_probe-<dataset>-<shots>shot-seed<seed>)")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")
    args = parser.parse_args(argv)
    runs.refuse_empty(parser, args)
    args.model = clip.full_name(args.model or runs.default_model(args.dataset))
    args.output_dir = args.output_dir or runs.folder_name("linear_probe", args.dataset, args.shots, args.seed)
    return args


@runs.plain_errors()
def main(args):
    """Features, the search for c, the fit, the test."""
    started, folder = time.time(), Path(args.output_dir)
    runs.check_device(args.device)
    args.data_root = data.find_root(args.dataset, args.data_root)
    runs.check_free(folder, overwrite=args.overwrite)
    config = {"method": "linear_probe", **{name: value for name, value in vars(args).items() if name != "overwrite"},
              "sampler": "exact", "amp": "off", "test_split": "test"}
    train, val, test, class_names = data.load(args.dataset, args.data_root, args.shots, args.split_seed)
    if not val:
        raise ValueError(f"{args.dataset} has no validation images, on which the linear probe chooses its penalty")
    _lock = runs.lock(folder)                              # kept open until the end
    runs.check_free(folder, overwrite=args.overwrite)      # why again: another process had the folder till now
    clip_model, _ = clip.load(args.model, args.device)
    train_features, val_features = (image_features(clip_model, items, args) for items in (train, val))
    c = search(*train_features, *val_features)
    model = LinearProbe(clip_model, class_names, *fit(*train_features, c, len(class_names)))
    counts = evaluate.test(model, test, args.dataset, workers=args.workers)
    runs.remove(folder, ("last.pt", "log.jsonl", *runs.REPORTS))
    evaluate.report(folder, model, counts, config, started, c=c, train_images=len(train))


if __name__ == "__main__":
    main(parse_args())
