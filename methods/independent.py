"""SOT-GLP in which each local prompt keeps the patches that resemble it most, alone, as in GalLoP: an ablation.

Against SOT-GLP: no support that the prompts of a class share (Eq. 7-8), and no transport that divides it among them
(Eq. 9-10). All else is the same, and the paper's.
"""

from methods import gallop
from sotglp import SOTGLP


class IndependentTopK(SOTGLP):
    """n_support: the patches that each prompt keeps. What log.jsonl says of a plan is of the one that is not used."""

    def __init__(self, clip_model, class_names, n_support=10, **texts):
        super().__init__(clip_model, class_names, n_support=n_support, **texts)

    def local(self, patches, text):
        """Mean over the prompts of the mean over each one's K patches: (B, P, D), (C, L, D) -> logits (B, C)."""
        return gallop.local_logits(patches, text, self.scale, self.n_support).mean(dim=-1)
