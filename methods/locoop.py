"""LoCoOp, "Few-Shot Out-of-Distribution Detection via Prompt Learning" (Miyai et al., arXiv 2306.01293).

CoOp, and a second term in training: patches that do not look like their image's class show background. There
the prediction should be undecided, so the entropy of its class probabilities is made large. The test is
CoOp's.

Against SOT-GLP: one prompt per class; patches serve as negative examples, not to recognise the class; they
come from the value path of the last block, not from a V-V stream, and no map is learned on them.

Letters: those of sotglp.py.  B images   C classes   P patches   D joint width   q: a patch's probabilities
"""

if __name__ == "__main__":
    raise SystemExit("methods/locoop.py is no command: python train.py --method locoop")

import torch
import torch.distributed

from clip.precision import in_float32
from methods import coop
from sotglp import project


@in_float32
def background(local_logits, labels, top_k):
    """Which patches show background: the own label is not among the top_k likeliest classes.

    (B, P, C), (B,) -> (B, P) bool.
    """
    return (local_logits.topk(top_k, dim=-1).indices != labels[:, None, None]).all(dim=-1)


@in_float32
def entropy(local_logits):
    """-sum_c q_c log(q_c + 1e-5) of each patch, q being the softmax: (B, P, C) -> (B, P)."""
    q = local_logits.softmax(dim=-1)
    return -(q * (q + 1e-5).log()).sum(dim=-1)


@in_float32
def objective(logits, local_logits, labels, lambda_entropy=0.25, top_k=None, n_batch=None, world=1):
    """Cross-entropy - lambda_entropy times the mean entropy of the background patches of the batch.

    (B, C), (B, P, C), (B,) -> scalar. top_k: a fifth of the classes where None. Without any background patch
    the second term is 0. n_batch, world: the size of the batch and the number of processes, where these
    images are a part of it.
    """
    entropy_of_batch = background_entropy(local_logits, labels, top_k, world)
    return coop.objective(logits, labels, n_batch) - lambda_entropy * entropy_of_batch


@in_float32
def background_entropy(local_logits, labels, top_k=None, world=1):
    """The mean entropy of a batch's background patches: (B, P, C), (B,) -> scalar; 0 where there are none."""
    top_k = default_top_k(local_logits.shape[-1]) if top_k is None else top_k
    patches = background(local_logits, labels, top_k)                              # (B, P)
    n_patches = patches.sum()
    if world > 1:           # why: it is one mean over the whole batch, and images differ in their background
        torch.distributed.all_reduce(n_patches)
    return (entropy(local_logits) * patches).sum() / n_patches.clamp(min=1)


def default_top_k(n_classes):
    """A fifth of the classes. why: LoCoOp gives 200 for ImageNet's 1,000 classes, and asks to adapt it."""
    return max(1, n_classes // 5)


class LoCoOp(coop.CoOp):
    """CoOp with a regulariser on background patches.

    top_k: k of `background`, a fifth of the classes where None. The other options are CoOp's. Raises
    ValueError for k outside [1, C].
    """

    DEFAULTS = {**coop.CoOp.DEFAULTS, "epochs": 50}        # those of LoCoOp's own runs, all on ImageNet

    def __init__(self, clip_model, class_names, n_context=16, words=None, class_specific=False,
                 lambda_entropy=0.25, top_k=None, **text_options):
        super().__init__(clip_model, class_names, n_context, words, class_specific, **text_options)
        if top_k is not None and not 1 <= top_k <= len(self.class_names):
            raise ValueError(f"--top-k must lie between 1 and the number of classes, "
                             f"{len(self.class_names)}: got {top_k}")
        self.lambda_entropy, self.top_k = lambda_entropy, top_k

    def forward(self, features, drawn=None, text_features=None):
        """Images -> a tuple of logits (B, C) and, in training, local logits (B, P, C)."""
        if not self.training:
            return super().forward(features, drawn, text_features)
        text = self.encode_prompts() if text_features is None else text_features                   # (C, D)
        return tuple(coop.logits(project(tokens, self.clip.visual.proj), text, self.scale)
                     for tokens in self.features(features))

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of a batch of n_batch images, and of its cross-entropy."""
        logits, local_logits = outputs
        world = self.text_encoder.ranks[1]
        global_loss = coop.objective(logits, labels, n_batch)
        entropy_of_batch = background_entropy(local_logits, labels, self.top_k, world)
        loss = global_loss - self.lambda_entropy * entropy_of_batch
        return loss, {"global": global_loss.detach(), "entropy": entropy_of_batch.detach()}
