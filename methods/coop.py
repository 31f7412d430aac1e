"""CoOp, "Learning to Prompt for Vision-Language Models" (Zhou et al., arXiv 2109.01134), in one file.

A learned context of M vectors stands before each class name. The image feature is compared with the texts
that result; the prediction is a softmax over these cosines, and the loss its cross-entropy.

Against SOT-GLP: one prompt per class instead of G + L; no patches, so no transport and no local score; no map
on features. It is the global branch of SOT-GLP with G = 1, no dropout and another start.

Letters: those of sotglp.py.  B images   C classes   M vectors of the context   D, W: joint, text width
"""

if __name__ == "__main__":
    raise SystemExit("methods/coop.py is no command: python train.py --method coop")

import torch
from torch import nn

from clip.precision import in_float32
from sotglp import Method, cross_entropy, project

objective = cross_entropy


@in_float32
def logits(image, text, scale):
    """Cosine of image and class, times 1/tau: unit (B, D), or any (..., D), and (C, D) -> (B, C)."""
    return scale * image @ text.T


class CoOp(Method):
    """A context before the class names, for all classes or for each.

    n_context: M, of vectors drawn from N(0, 0.02); words, such as "a photo of a", fix M and the start
    instead. class_specific: a context for each class. Raises ValueError for a class name that does not fit
    behind the context.
    """

    # differs: CoOp trains ImageNet, and 1 shot, for 50 epochs, 2 and 4 shots for 100. Its warm-up is one
    # epoch at a constant 1e-5, here linear, as in train.py.
    DEFAULTS = {"lr": 0.002, "epochs": 200, "warmup_epochs": 1, "batch_size": 32, "weight_decay": 5e-4}
    SUFFIX = "."            # the name is followed by a full stop, as in "a photo of a cat."
    stream = "value"        # the patches of GL-MCM; accuracy needs none

    def __init__(self, clip_model, class_names, n_context=16, words=None, class_specific=False,
                 **text_options):
        super().__init__(clip_model, class_names, **text_options)
        self.class_specific = class_specific
        width = clip_model.token_embedding.weight.shape[1]
        shape = (len(self.class_names),) if class_specific else ()
        if words:
            start = self.word_vectors(words).expand(*shape, -1, -1).clone()
        else:
            start = torch.empty(*shape, n_context, width).normal_(std=0.02)
        # why here: what cannot work fails before training
        self.text_encoder.check_names(start.shape[-2], self.SUFFIX)
        self.context = nn.Parameter(start)                                         # (M, W), or (C, M, W)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], context, class name, full stop, [EOT] of each class -> unit (C, D)."""
        return self.encode(self.context[..., None, :, :], self.SUFFIX)[:, 0]     # one prompt per class: N = 1

    def forward(self, features, drawn=None, text_features=None):
        """Pictures or their features -> a tuple of the logits (B, C)."""
        cls, _ = self.features(features)                                           # (B, W)
        text = self.encode_prompts() if text_features is None else text_features                   # (C, D)
        return (logits(project(cls, self.clip.visual.proj), text, self.scale),)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the cross-entropy of a batch of n_batch images; it is the only term."""
        loss = objective(outputs[0], labels, n_batch)
        return loss, {"global": loss.detach()}

    def scores(self, outputs):
        """{"global": (B, C)}."""
        return {"global": outputs[0]}

    def cosines(self, features, text_features):
        """Raw cosines of images and of value-path patches with each class: (B, C), (B, P, C).  GL-MCM"""
        return tuple(logits(project(tokens, self.clip.visual.proj), text_features, 1.0)
                     for tokens in self.features(features))
