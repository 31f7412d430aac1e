"""MaPLe, "Multi-modal Prompt Learning" (Khattak et al., arXiv 2210.03117), in one file.

Prompts are learned in the first J blocks of the text tower. A linear map for each of these blocks turns them
into the prompts of the image tower, so that gradients of both towers reach the same prompts. The score and
the loss are CoOp's.

Against SOT-GLP: the image tower is not frozen, since prompts stand among its patches; one prompt per class;
no patches, so no transport and no local score.

Almost all that is learned lies in the maps: with ViT-B/16 3,545,856 of 3,555,072 numbers.

Letters: those of sotglp.py.  B images   C classes   J blocks with prompts   n of M tokens of a prompt
         D joint width   W text tower width   V image tower width
"""

if __name__ == "__main__":
    raise SystemExit("methods/maple.py is no command: python train.py --method maple")

import torch
from torch import nn

from clip.precision import in_float32, unit
from clip.prompts import TEMPLATE
from methods import coop
from methods.promptot import deep_start
from sotglp import Method


@in_float32
def couple(text_prompts, weights, biases):
    """The prompts of the image tower, block by block: (J, n, W), (J, V, W), (J, V) -> (J, n, V)."""
    # image_jn = weights_j text_jn + biases_j
    return torch.einsum("jnw,jvw->jnv", text_prompts, weights) + biases[:, None]


class MaPLe(Method):
    """Deep prompts in the text tower, shared by all classes, and maps from them to those of the image tower.

    n_context: n, the words of "a photo of a" that are learned; the others stay, frozen, before the class
    name. depth: J, blocks with prompts, from the first; all of them where a tower has fewer. Raises
    ValueError for n_context outside [1, 4] and for a class name that does not fit behind the prompt.
    """

    # differs: the published warm-up is one epoch at a constant 1e-5, here it is linear and half an epoch: a
    # tenth of the run, the most that train.py takes by itself. Published runs are in half precision.
    DEFAULTS = {"lr": 0.0035, "epochs": 5, "warmup_epochs": 1, "batch_size": 4, "weight_decay": 5e-4}
    SUFFIX = coop.CoOp.SUFFIX
    frozen_tower = False

    def __init__(self, clip_model, class_names, n_context=2, depth=9, **text_options):
        super().__init__(clip_model, class_names, **text_options)
        words = self.word_vectors(TEMPLATE)                                        # (M, W)
        if not 1 <= n_context <= len(words):
            raise ValueError(f"--n-context must lie between 1 and {len(words)}, the words of {TEMPLATE!r}: "
                             f"got {n_context}")
        self.text_encoder.check_names(len(words), self.SUFFIX)
        learned, frozen = words.split([n_context, len(words) - n_context])
        J = min(depth, len(clip_model.transformer.resblocks), len(clip_model.visual.transformer.resblocks))
        self.text_prompts = nn.Parameter(deep_start(learned, J))                   # (J, n, W)
        self.register_buffer("frozen_words", frozen, persistent=False)             # (M-n, W)

        # all but the first one start alike, as published
        first, other = (nn.Linear(words.shape[1], len(clip_model.visual.proj)) for _ in range(2))
        maps = [first] + [other] * (J - 1)
        self.coupling_weights = nn.Parameter(torch.stack([one.weight.detach() for one in maps]))   # (J, V, W)
        self.coupling_biases = nn.Parameter(torch.stack([one.bias.detach() for one in maps]))      # (J, V)
        self.to(clip_model.logit_scale.device)

    def encode_prompts(self):
        """[SOS], prompt, frozen words, class name, full stop, [EOT] of each class -> unit (C, D)."""
        prompt = torch.cat([self.text_prompts[0], self.frozen_words])              # (M, W)
        return self.encode(prompt[None], self.SUFFIX, self.text_prompts[1:])[:, 0] # N = 1

    def encode_images(self, images):
        """Image features, with the coupled prompts in the tower: (B, 3, R, R) -> unit (B, D)."""
        prompts = couple(self.text_prompts, self.coupling_weights, self.coupling_biases)           # (J, n, V)
        return unit(self.clip.encode_image(images, prompts))

    def forward(self, features, drawn=None, text_features=None):
        """Pictures (B, 3, R, R) -> a tuple of the logits (B, C)."""
        text = self.encode_prompts() if text_features is None else text_features   # (C, D)
        return (coop.logits(self.encode_images(features), text, self.scale),)

    def loss(self, outputs, labels, n_batch):
        """These images' part of the cross-entropy of a batch of n_batch images; it is the only term."""
        loss = coop.objective(outputs[0], labels, n_batch)
        return loss, {"global": loss.detach()}

    def scores(self, outputs):
        """{"global": (B, C)}."""
        return {"global": outputs[0]}

    def cosines(self, features, text_features):
        """Raw cosines of images with each class, (B, C); no patches, for they are no longer CLIP's own."""
        return coop.logits(self.encode_images(features), text_features, 1.0), None
