"""CoCoOp, "Conditional Prompt Learning for Vision-Language Models" (Zhou et al., arXiv 2203.05557).

A CoOp whose context is shifted for each image: a small network, the meta-net, reads the image feature and
gives one vector, which is added to every vector of the context. So each image has its own texts.

Against SOT-GLP: one prompt per class instead of G + L; no patches, so no transport and no local score; the
prompt, not the score, adapts to the image.

Cost: B C texts in each step, forward and backward, and C texts for each test image, where others encode C
texts once. With 16 shots of ImageNet that is 160,000 steps of 1,000 texts, and 50 million texts for one test.

Letters: those of sotglp.py.  B images   C classes   P patches   M vectors of the context   D joint width
         W text tower width
"""

if __name__ == "__main__":
    raise SystemExit("methods/cocoop.py is no command: python train.py --method cocoop")

import warnings

import torch
from torch import nn

from clip.precision import in_float32
from methods import coop
from sotglp import project

MANY_CLASSES = 100          # from here on the cost is worth a warning


@in_float32
def logits(image, text, scale):
    """Cosine of each image with its own texts, times 1/tau: unit (B, D), (C, B, D) -> (B, C).

    image: also patches (B, P, D) -> (B, P, C).
    """
    return scale * torch.einsum("b...d,cbd->b...c", image, text)


class CoCoOp(coop.CoOp):
    """A context for all classes, shifted for each image.

    words: what the context starts from; they fix M. Warns of the cost from 100 classes on. Raises
    ValueError for a class name that does not fit behind the context.
    """

    # differs: the published warm-up is one epoch at a constant 1e-5, here linear, as in train.py. It
    # trains in half precision.
    DEFAULTS = {"lr": 0.002, "epochs": 10, "warmup_epochs": 1, "batch_size": 1, "weight_decay": 5e-4}

    def __init__(self, clip_model, class_names, words="a photo of a", **text_options):
        # why these ranks: each process has its own images, so there are no texts that all of them need
        super().__init__(clip_model, class_names, words=words, **{**text_options, "ranks": (0, 1)})
        if len(self.class_names) >= MANY_CLASSES:
            warnings.warn(f"CoCoOp is slow here: it encodes the texts of all {len(self.class_names)} classes "
                          "anew for every image, in training and in tests", stacklevel=2)
        D = clip_model.text_projection.shape[1]
        W = self.context.shape[1]
        self.meta_net = nn.Sequential(nn.Linear(D, D // 16), nn.ReLU(), nn.Linear(D // 16, W))
        self.to(clip_model.logit_scale.device)

    @in_float32
    def contexts(self, image):
        """The context of each image, the same shift on all its vectors: unit (B, D) -> (B, M, W)."""
        return self.context + self.meta_net(image)[:, None]

    def encode_for(self, image):
        """[SOS], context of an image, class name, full stop, [EOT]: unit (B, D) -> unit (C, B, D)."""
        # why a few images at a time: so that no more than about text_chunk texts are in the tower at once
        few = max(1, self.text_encoder.text_chunk // len(self.class_names))
        # the text encoder sees N prompts that all classes share, one for each image
        return torch.cat([self.encode(self.contexts(part), self.SUFFIX) for part in image.split(few)], dim=1)

    def encode_prompts(self):
        """None: the texts depend on the image, so nothing can be computed once."""

    def forward(self, features, drawn=None, text_features=None):
        """Features or images -> a tuple of the logits (B, C). text_features: not read, each has its own."""
        cls, _ = self.features(features)                                           # (B, W)
        image = project(cls, self.clip.visual.proj)                                # (B, D)
        return (logits(image, self.encode_for(image), self.scale),)

    def cosines(self, features, text_features):
        """Raw cosines of images, and of their value-path patches, with their own texts: (B, C), (B, P, C).

        why: our choice, for nothing is published on patches.
        """
        image, patches = (project(tokens, self.clip.visual.proj) for tokens in self.features(features))
        text = self.encode_for(image)                                              # (C, B, D)
        return logits(image, text, 1.0), logits(patches, text, 1.0)
