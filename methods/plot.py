"""PLOT, "Prompt Learning with Optimal Transport for Vision-Language Models" (Chen et al., arXiv 2210.01253).

All patches of an image are matched with L prompts, shared by the classes, by balanced optimal transport. The
transport-weighted similarity is the only score.

Against SOT-GLP: every patch takes part, not the K best for a class; the prompts are shared by the classes; no
global score, no V-V stream, no map on patch features. So it is SOT-GLP's local score with K = P and a
constant plan.

differs: PLOT is for ResNet-50, whose attention pooling gives its local features. Here ordinary patch tokens
of the vision transformer take their place (our choice). Table 1's column "PLOT" is PLOT++, another method: it
matches four prompted image features with four prompts and uses no patches. plotpp.py has it.

Letters: those of sotglp.py.  B images   C classes   P patches   L prompts of M vectors   D joint width
"""

if __name__ == "__main__":
    raise SystemExit("methods/plot.py is no command: python train.py --method plot")

import torch
from torch import nn

from clip.precision import in_float32
from methods import coop
from sinkhorn import sinkhorn
from sotglp import Method, mean_cosines, patch_similarity, project


@in_float32
def logits(patches, text, scale, epsilon=0.1, n_iters=20):
    """Transport-weighted similarity of all patches to a class's prompts, times 1/tau.

    unit (B, P, D), (C, L, D) -> (B, C). The plan is constant in the backward pass.
    differs: PLOT stops when the batch's mean change is small, so that an image's score depends on its batch.
    """
    similarity = patch_similarity(patches, text)                      # (B, C, P, L)
    plan = sinkhorn(1 - similarity.detach(), epsilon=epsilon, n_iters=n_iters)
    return scale * (plan * similarity).sum(dim=(-2, -1))


class PLOT(Method):
    """L contexts of M vectors, shared by the classes; each starts from N(0, 0.02).

    epsilon, n_iters: of the transport. Raises ValueError for a class name that does not fit behind the
    context.
    """

    # differs: PLOT's batch is 128; 32 is that of its successor for vision transformers.
    DEFAULTS = {"lr": 0.002, "epochs": 50, "warmup_epochs": 1, "batch_size": 32, "weight_decay": 5e-4}
    SUFFIX = coop.CoOp.SUFFIX
    stream = "qk"
    text_names = ("local",)
    has_plan = True

    def __init__(self, clip_model, class_names, n_local=4, n_context=16, epsilon=0.1, n_iters=20,
                 **text_options):
        super().__init__(clip_model, class_names, **text_options)
        self.epsilon, self.n_iters = epsilon, n_iters
        # why here: what cannot work fails before training
        self.text_encoder.check_names(n_context, self.SUFFIX)
        width = clip_model.token_embedding.weight.shape[1]
        prompts = torch.empty(n_local, n_context, width).normal_(std=0.02)
        self.local_prompts = nn.Parameter(prompts)                                 # (L, M, W)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], context, class name, full stop, [EOT] for each prompt and class -> unit (C, L, D)."""
        return self.encode(self.local_prompts, self.SUFFIX)

    def forward(self, features, drawn=None, text_features=None):
        """Pictures or their features -> a tuple of the logits (B, C)."""
        _, patches = self.features(features)                                       # (B, P, W)
        text = self.encode_prompts() if text_features is None else text_features                   # (C, L, D)
        patches = project(patches, self.clip.visual.proj)                          # (B, P, D)
        return (logits(patches, text, self.scale, self.epsilon, self.n_iters),)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the cross-entropy of a batch of n_batch images; it is the only term."""
        loss = coop.objective(outputs[0], labels, n_batch)
        return loss, {"local": loss.detach()}

    def scores(self, outputs):
        """{"local": (B, C)}."""
        return {"local": outputs[0]}

    def cosines(self, features, text_features):
        """No cosines of images; raw cosines of patches with each class, averaged over prompts: (B, P, C)."""
        _, patches = self.features(features)
        return None, mean_cosines(project(patches, self.clip.visual.proj), text_features)
