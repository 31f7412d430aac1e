"""LSN, "Out-of-Distribution Detection with Negative Prompts" (Nie et al., ICLR 2024), in one file.

CoOp, and negative contexts for each class, which learn what the class is not: of all classes, an image shall
resemble the negative texts of its own class least. The confidence adds up what both kinds of text say of an
image; the prediction is CoOp's. Against SOT-GLP: no patches, no transport, no map on features.

differs: the authors train one set after the other in each epoch; here all sets take each step together, and
the constants of `diversity` are the texts before it. They use Adam of rate 0.002 for the negative contexts,
SGD of rate 0.001 and 50 epochs for the positive one; here one SGD and 100 epochs serve all. They have no
crops and flips (--cache-features), 64 or 128 images per class. A step encodes 1 + S texts for each class.

Letters: those of sotglp.py.  B images   C classes   S sets of negative contexts   M vectors   D joint width
"""

if __name__ == "__main__":
    raise SystemExit("methods/lsn.py is no command: python train.py --method lsn")

import torch
from torch import nn

from clip.precision import in_float32
from methods import coop
from sotglp import project


@in_float32
def objective(logits, labels, double_softmax=False, n_batch=None):
    """Cross-entropy: (B, C), (B,) -> scalar, the mean over n_batch images, of which these may be a part.

    double_softmax: takes the softmax of the logits for logits, as the released code does.
    """
    return coop.objective(logits.softmax(dim=-1) if double_softmax else logits, labels, n_batch)


@in_float32
def negative_logits(cosines, scale=20.0):
    """The less an image resembles what a class is not, the likelier is the class: (..., C) -> (..., C)."""
    return scale * (1 - cosines)


@in_float32
def diversity(text):
    """How alike the sets are: for each one, the mean over classes of its mean cosine with the other sets.

    unit (C, S, D) -> (S,), 0 where S = 1. The other sets are constant in the backward pass.
    """
    S = text.shape[1]
    cosines = text @ text.detach().mT                                              # (C, S, S): own, others
    others = cosines.sum(dim=-1) - cosines.diagonal(dim1=-2, dim2=-1)              # (C, S)
    return others.mean(dim=0) / max(1, S - 1)


@in_float32
def confidence(cosines, negative_cosines):
    """The positive texts' MCM + the mean over the sets of theirs: (B, C), (B, S, C) -> (B,), higher = ID."""
    positive = cosines.softmax(dim=-1).amax(dim=-1)                                # (B,)
    negative = ((1 - negative_cosines) / 5).softmax(dim=-1).amax(dim=-1)           # (B, S)
    return positive + negative.mean(dim=-1)


class LSN(coop.CoOp):
    """CoOp with S negative contexts for each class; all contexts start from N(0, 0.02).

    n_context: M; n_negative: S; lambda_diversity, double_softmax: of the loss. Raises as CoOp does.
    """

    DEFAULTS = {**coop.CoOp.DEFAULTS, "epochs": 100, "warmup_epochs": 0, "batch_size": 8}
    class_specific = True      # the negative contexts are
    text_names = ("global", "negative")

    def __init__(self, clip_model, class_names, n_context=16, n_negative=3, lambda_diversity=1.0,
                 double_softmax=False, **text_options):
        super().__init__(clip_model, class_names, n_context, **text_options)
        self.class_specific = True                         # why again: CoOp's is that of its context
        self.lambda_diversity, self.double_softmax = lambda_diversity, double_softmax
        shape = n_negative, len(self.class_names), *self.context.shape
        self.negative_contexts = nn.Parameter(torch.empty(shape).normal_(std=0.02))    # (S, C, M, W)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], context, class name, full stop, [EOT]: positive, unit (C, D), and negative (C, S, D)."""
        negative_text = self.encode(self.negative_contexts.transpose(0, 1), self.SUFFIX)
        return super().encode_prompts(), negative_text

    def negative_cosines(self, features, negative_text):
        """Cosine of each image with the text of each set and class: unit (C, S, D) -> (B, S, C)."""
        cls, _ = self.features(features)                                           # (B, W)
        image = project(cls, self.clip.visual.proj)                                # (B, D)
        cosines = coop.logits(image, negative_text.flatten(0, 1), 1.0)             # (B, CS)
        return cosines.unflatten(1, negative_text.shape[:2]).mT

    def forward(self, features, drawn=None, text_features=None):
        """Features or images -> a tuple of logits (B, C); in training also negative cosines and texts."""
        features = self.features(features)                 # why first: else images would pass the tower twice
        text, negative_text = self.encode_prompts() if text_features is None else text_features
        outputs = super().forward(features, text_features=text)
        if not self.training:
            return outputs
        return (*outputs, self.negative_cosines(features, negative_text), negative_text)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the loss of n_batch images, and of its terms, each summed over the sets."""
        logits, cosines, negative_text = outputs
        negative = negative_logits(cosines).flatten(0, 1)                          # (BS, C)
        labels_of_sets = labels.repeat_interleave(cosines.shape[1])                # (BS,)
        terms = {"global": objective(logits, labels, self.double_softmax, n_batch),
                 "negative": objective(negative, labels_of_sets, self.double_softmax, n_batch),
                 "diversity": len(labels) / n_batch * diversity(negative_text).sum()}
        loss = terms["global"] + terms["negative"] + self.lambda_diversity * terms["diversity"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def cosines(self, features, text_features):
        """Raw cosines of images, and of their value-path patches, with each class: (B, C), (B, P, C)."""
        return super().cosines(features, text_features[0])

    def confidence(self, features, text_features):
        """LSN's own score of images: features or images, texts of `encode_prompts()` -> (B,)."""
        features = self.features(features)
        cosines, _ = self.cosines(features, text_features)
        return confidence(cosines, self.negative_cosines(features, text_features[1]))
