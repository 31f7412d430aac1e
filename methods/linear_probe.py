"""A linear probe, as in CLIP (Radford et al., arXiv 2103.00020) and CoOp.

It has no text, no prompts and no epochs, so train.py does not train it: `python -m extras.linear_probe` does.
The weight of its penalty is chosen on the validation shots.

Against SOT-GLP: the class names are not used, so nothing is known of a class without images; no patches; the
image feature is used as it is, not as a unit vector.

Letters: those of sotglp.py.  n images   C classes   D joint width   c: weight of the errors
"""

if __name__ == "__main__":
    raise SystemExit("methods/linear_probe.py is no command: python -m extras.linear_probe")

import torch
import torch.nn.functional as F

from clip.precision import to_joint_space
from sotglp import Method


def logits(features, weight, bias):
    """features (n, D), weight (C, D), bias (C,) -> (n, C), float64."""
    return features.double() @ weight.T + bias


def fit(features, labels, c, n_classes=None, max_iter=1000):
    """The minimum of 1/2 |W|^2 + c sum CE over weight W and bias, by torch's L-BFGS.

    features (n, D), labels (n,) -> weight (C, D), bias (C,), float64. C is n_classes, else the largest label
    + 1.
    """
    n_classes = n_classes or int(labels.max()) + 1
    zeros = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, device=features.device)
    weight = zeros.requires_grad_()
    bias = weight.detach().new_zeros(n_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=1e-7,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        errors = F.cross_entropy(logits(features, weight, bias), labels, reduction="sum")
        loss = weight.square().sum() / 2 + c * errors
        loss = loss / (1 + c * len(labels))               # why: the tolerances then mean the same for every c
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def search(train, train_labels, val, val_labels):
    """CoOp's search for c on validation features (n, D): seven powers of ten, then eight halvings."""
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

    def forward(self, features, drawn=None, text_features=None):
        """Pictures or their features -> a tuple of the logits (B, C)."""
        cls, _ = self.features(features)                                           # (B, W)
        return (logits(to_joint_space(cls, self.clip.visual.proj), self.weight, self.bias),)

    def scores(self, outputs):
        """{"probe": (B, C)}."""
        return {"probe": outputs[0]}
