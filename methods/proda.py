"""ProDA, "Prompt Distribution Learning" (Lu et al., arXiv 2205.03340), in one file.

The texts that K learned contexts give a class count as draws from a Gaussian; a test takes their mean. The
training loss bounds the mean cross-entropy over this Gaussian, see `shift`. A term keeps the contexts apart.

unverified: no code was published. The equations, 1 / (K + 1) for a covariance that is diagonal in D too, are
those of others' ports. Nobody could check K = 32, M = 16, k = 4, weight 0.1 (a port has 1), rate, batch.
differs: names stand behind all contexts, published also before and inside; random draws; linear warm-up.

Letters: those of sotglp.py.  B images   C classes   K contexts, k in a step   M vectors   D joint width
"""

if __name__ == "__main__":
    raise SystemExit("methods/proda.py is no command: python train.py --method proda")

import torch
import torch.nn.functional as F
from torch import nn

from clip.precision import in_float32
from clip.prompts import ClassTexts
from methods import coop
from sotglp import Method, global_logits, mean_cosines, mean_of_pairs, project

logits = global_logits      # Eq. 4: cosines averaged over the contexts, (B, D), (C, K, D) -> (B, C)


@in_float32
def shift(image, text, labels, scale):
    """What the bound adds to a logit: half the variance of its difference to the own class's.

    unit (B, D), (C, K, D), (B,) -> (B, C): scale^2 / 2 sum_kd image_d^2 (dev_ckd - dev_ykd)^2 / (K + 1).
    """
    weight = image.square()                                                        # (B, D)
    deviation = text - text.mean(dim=1, keepdim=True)                              # (C, K, D), dev
    squares = deviation.square().sum(dim=1)                                        # (C, D)
    # why (a - b)^2 = a^2 + b^2 - 2 a b: no tensor of B C K D, or of C^2 D, numbers is needed
    own = (weight * squares[labels]).sum(dim=1, keepdim=True)                      # (B, 1)
    product = (weight[:, None] * deviation[labels]).flatten(1) @ deviation.flatten(1).T    # (B, C)
    added = scale**2 / 2 * (weight @ squares.T + own - 2 * product) / (text.shape[1] + 1)
    return added.scatter(1, labels[:, None], 0)            # why: rounding leaves a rest


@in_float32
def orthogonality(text):
    """The mean |cosine| of two different contexts: unit (K, D) -> scalar, 0 where K = 1."""
    return mean_of_pairs((text @ text.T).abs())


@in_float32
def objective(image, text, bare, labels, scale, lambda_orthogonal=0.1, n_batch=None):
    """Cross-entropy of the shifted logits + lambda_orthogonal times the orthogonality of the bare contexts.

    unit (B, D), (C, k, D), (K, D), (B,) -> scalar: the part that these images have in a batch of n_batch.
    """
    shifted = logits(image, text, scale) + shift(image, text, labels, scale)       # (B, C)
    share = len(labels) / (n_batch or len(labels))
    return coop.objective(shifted, labels, n_batch) + lambda_orthogonal * share * orthogonality(bare)


class ProDA(Method):
    """n_global: K contexts of n_context vectors, shared by the classes, that start from N(0, 0.02).

    n_drawn: k; lambda_orthogonal: of `objective`. Raises ValueError for k outside [1, K] and a name too long.
    """

    DEFAULTS = {"lr": 0.001, "epochs": 100, "warmup_epochs": 1, "batch_size": 20, "weight_decay": 5e-4}
    SUFFIX = coop.CoOp.SUFFIX
    stream = coop.CoOp.stream
    logits = coop.CoOp.logits
    scores = coop.CoOp.scores

    def __init__(self, clip_model, class_names, n_global=32, n_context=16, n_drawn=4, lambda_orthogonal=0.1,
                 **text_options):
        super().__init__(clip_model, class_names, **text_options)
        if not 1 <= n_drawn <= n_global:
            raise ValueError(f"--n-drawn must lie between 1 and --n-global, {n_global}: got {n_drawn}")
        self.n_drawn, self.lambda_orthogonal = n_drawn, lambda_orthogonal
        self.text_encoder.check_names(n_context, self.SUFFIX)
        self.bare_encoder = ClassTexts(clip_model, [""], **{**text_options, "ranks": (0, 1)})
        self.bare_encoder.check_names(n_context, self.SUFFIX)
        start = torch.randn(n_global, n_context, clip_model.token_embedding.embedding_dim) * 0.02
        self.global_prompts = nn.Parameter(start)                                  # (K, M, W)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], context, class name, full stop, [EOT] for all contexts and classes -> unit (C, K, D)."""
        return self.encode(self.global_prompts, self.SUFFIX)

    def draw(self, n_images, generator=None):
        """The contexts of a training step, all different: (n_images, k), the same in every row."""
        order = torch.randperm(len(self.global_prompts), generator=generator)
        return order[: self.n_drawn].expand(n_images, -1)

    def forward(self, features, drawn=None, text_features=None):
        """Features or images -> a tuple of logits (B, C); in training also what `objective` compares."""
        cls, _ = self.features(features)                                           # (B, W)
        image = project(cls, self.clip.visual.proj)                                # (B, D)
        if not self.training:
            text = self.encode_prompts() if text_features is None else text_features    # (C, K, D)
            return (logits(image, text, self.scale),)

        drawn = self.draw(1).to(image.device) if drawn is None else drawn
        chosen = F.pad(drawn, (0, 0, 0, 1))[0]             # (k,)  why: a process without images has no row
        if self.text_encoder.ranks[1] > 1:                 # why: all processes encode the same contexts
            torch.distributed.broadcast(chosen, src=0)
        text = self.encode(self.global_prompts[chosen], self.SUFFIX)               # (C, k, D)
        bare = self.bare_encoder(self.global_prompts, self.SUFFIX)[0]              # (K, D)
        return logits(image, text, self.scale), image, text, bare

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of a batch of n_batch images, and of its two terms."""
        loss = objective(*outputs[1:], labels, self.scale, self.lambda_orthogonal, n_batch)
        apart = len(labels) / n_batch * orthogonality(outputs[-1].detach())
        return loss, {"global": loss.detach() - self.lambda_orthogonal * apart, "orthogonality": apart}

    def cosines(self, features, text_features):
        """Raw cosines of images, and of their value-path patches, with each class: (B, C), (B, P, C)."""
        return tuple(mean_cosines(project(tokens, self.clip.visual.proj), text_features)
                     for tokens in self.features(features))
