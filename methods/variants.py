"""SOT-GLP with another local score: what the ablations compare it with. All else is the same."""

if __name__ == "__main__":
    raise SystemExit("methods/variants.py is no command: python train.py --method independent, or dense")

from methods import gallop
from sotglp import SOTGLP


class IndependentTopK(SOTGLP):
    """Each local prompt keeps its own best patches, as in GalLoP: no shared support, no transport.

    n_support: how many.
    """

    def __init__(self, clip_model, class_names, n_support=10, **text_options):
        super().__init__(clip_model, class_names, n_support=n_support, **text_options)

    def local(self, patches, text):
        """Mean over the prompts of the mean over each one's K patches: (B, P, D), (C, L, D) -> (B, C)."""
        return gallop.local_logits(patches, text, self.scale, self.n_support).mean(dim=-1)


class DenseTransport(SOTGLP):
    """All patches are transported, as in PLOT: K = P."""

    def __init__(self, clip_model, class_names, **text_options):
        n_patches = len(clip_model.visual.positional_embedding) - 1
        super().__init__(clip_model, class_names, n_support=n_patches, **text_options)
