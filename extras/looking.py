"""What a model makes of one picture, in numbers: scores, cosines of its patches, its support and its plan.

Read it beside Sec. 3.4. extras/visualize.py draws these numbers. What a method does not have is None.
"""

from typing import NamedTuple

import torch

from clip.precision import unit
from methods.lsn import LSN
from methods.variants import IndependentTopK
from sotglp import SOTGLP, saliency, sparse_transport


class Look(NamedTuple):
    """What is drawn of one picture. None: the method has no such thing."""
    probabilities: dict                  # {score: (C,)}; the first score decides
    label: int                           # the class whose prompts are shown
    similarity: torch.Tensor             # (P, L): cosines of the patches with its prompts
    support: torch.Tensor = None         # (K,): the patches kept, the most salient one first
    plan: torch.Tensor = None            # (K, L), rows in this order
    prompt_cosines: torch.Tensor = None  # (L, L), of the prompts of the class


@torch.no_grad()
def look(model, images, text_features, label=None):
    """The scores of a picture (1, 3, R, R), and what its patches say of a class.

    label: of that class; None for the predicted one.
    """
    outputs = model(images, None, text_features)
    probabilities = {name: score[0].softmax(dim=0) for name, score in model.scores(outputs).items()}
    if label is None:
        label = int(model.logits(outputs)[0].argmax())

    seen = Look(probabilities, label, patch_cosines(model, images, text_features, label),
                prompt_cosines=prompt_cosines(model, text_features, label))
    if not model.has_plan and not shares_support(model):
        return seen

    n_support = getattr(model, "n_support", len(seen.similarity))
    support, plan = transport(seen.similarity, n_support, model.epsilon, model.n_iters)    # (K,), (K, L)
    if not model.has_plan:
        plan = None
    return seen._replace(support=support, plan=plan)


def shares_support(model):
    """Whether all prompts of a class look at the same patches: SOT-GLP and what is built on it."""
    return isinstance(model, SOTGLP) and not isinstance(model, IndependentTopK)


def transport(similarity, n_support, epsilon=0.1, n_iters=20):
    """The support, most salient patch first, and its plan: (P, L) -> patches (K,), plan (K, L).  Eq. 8-9"""
    parts = sparse_transport(similarity[None, None], n_support, epsilon, n_iters)
    kept, plan, patches = (part[0, 0] for part in parts)        # of the one picture and the one class
    order = saliency(kept).argsort(descending=True)
    return patches[order], plan[order]


# ---- cosines of one class ----------------------------------------------------------------------------------

@torch.no_grad()
def patch_cosines(model, images, text_features, label):
    """Cosines of a picture's patches with the prompts of a class that patches are compared with: (P, L).

    images: (1, 3, R, R), or the pair that `clip.encode_patches` made of them.
    None for a method without patches.
    """
    if text_features is None:                                   # each picture has its own
        return model.cosines(images, None)[1][0, :, [label]]    # (P, 1)

    prompts = patch_prompts(model, text_features)[[label]]      # (1, L, D), or (1, D) where L is 1
    one_by_one = [prompts]
    if prompts.dim() == 3:
        one_by_one = prompts.split(1, dim=1)                    # L times (1, 1, D)

    # why one by one: a method's `cosines` averages over the prompts that it is given
    cosines = [model.cosines(images, with_prompts(model, text_features, prompt))[1] for prompt in one_by_one]
    if cosines[0] is None:
        return None
    return torch.cat(cosines, dim=2)[0]                         # L times (1, P, 1) -> (P, L)


def patch_kind(model):
    """Which of several kinds of text features are for patches: the last, of LSN the positive ones."""
    return 0 if isinstance(model, LSN) else -1


def patch_prompts(model, text_features):
    """The text features that patches are compared with: (C, L, D), or (C, D) where L is 1."""
    if isinstance(text_features, tuple):
        return text_features[patch_kind(model)]
    return text_features


def with_prompts(model, text_features, prompts):
    """The text features, with other prompts in place of those that patches are compared with."""
    if not isinstance(text_features, tuple):
        return prompts
    kinds = list(text_features)
    kinds[patch_kind(model)] = prompts
    return tuple(kinds)


def prompt_cosines(model, text_features, label):
    """Cosines of the prompts of a class that patches are compared with: (L, L). None where there is one."""
    if text_features is None:
        return None
    prompts = patch_prompts(model, text_features)
    if prompts.dim() < 3 or prompts.shape[1] < 2:
        return None
    prompts = unit(prompts[label])         # why: PLOT++ has raw text features
    return prompts @ prompts.T
