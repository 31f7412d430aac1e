"""PromptSRC, "Self-regulating Prompts" (Khattak et al., arXiv 2307.06948), in one file.

Prompts are learned in many blocks of both towers, as in promptot.py. Three terms beside the cross-entropy
keep the prompted CLIP near the frozen one: the distance of the image features, that of the text features, and
the divergence of the class probabilities. At the end the prompts are a weighted mean over the epochs.

Against SOT-GLP: the image tower is not frozen, since prompts stand among its patches; one prompt per class;
no patches, so no transport and no local score. Against Prompt-OT: each feature is held to its own frozen one,
whatever else is in the batch.

differs: the published code averages all weights of the model, the frozen ones too, which half precision then
rounds. Here the prompts alone are averaged. It trains in half precision.

Letters: those of sotglp.py.  B images   C classes   J blocks with prompts   D joint width   W tower width
         A frozen_... feature is that of CLIP without learned prompts.
"""

if __name__ == "__main__":
    raise SystemExit("methods/promptsrc.py is no command: python train.py --method promptsrc")

import torch
import torch.nn.functional as F

from clip.precision import in_float32, unit
from methods import coop
from methods.promptot import PromptOT
from methods.templates import TEMPLATES
from methods.zero_shot import template_features


@in_float32
def terms(image, text, frozen_image, frozen_text, labels, scale, n_batch=None):
    """The four terms of the loss, unweighted: means over n_batch images, of which these may be a part.

    unit (B, D), (C, D), (B, D), (C, D), labels (B,) -> {name: scalar}
      global        cross-entropy
      image, text   absolute difference of the features from the frozen ones, mean over their numbers
      logits        divergence of the class probabilities from the frozen ones, divided by C
    """
    B, C = len(image), len(text)
    n_batch = n_batch or B
    logits = coop.logits(image, text, scale)                                       # (B, C)
    frozen_logits = coop.logits(frozen_image, frozen_text, scale)                  # (B, C)

    # sum_bc q_bc (log q_bc - log p_bc), p the softmax of the logits, q that of the frozen ones
    divergence = F.kl_div(logits.log_softmax(dim=1), frozen_logits.log_softmax(dim=1),
                          reduction="sum", log_target=True)
    return {"global": coop.objective(logits, labels, n_batch),
            "image": (image - frozen_image).abs().mean(dim=1).sum() / n_batch,
            "text": (text - frozen_text).abs().mean() * (B / n_batch),             # so that the parts add up
            "logits": divergence / (n_batch * C)}


def weigh(parts, lambda_image, lambda_text):
    """What `terms` gives -> global + lambda_image image + lambda_text text + logits, a scalar."""
    return parts["global"] + lambda_image * parts["image"] + lambda_text * parts["text"] + parts["logits"]


def objective(image, text, frozen_image, frozen_text, labels, scale, lambda_image=10.0, lambda_text=25.0,
              n_batch=None):
    """The weighted sum of `terms`, whose arguments these are -> scalar."""
    parts = terms(image, text, frozen_image, frozen_text, labels, scale, n_batch)
    return weigh(parts, lambda_image, lambda_text)


def epoch_weights(epochs, mean, std):
    """The share of each epoch in the average, a Gaussian around epoch `mean`: (epochs,), float64, sum 1."""
    epoch = torch.arange(1, epochs + 1, dtype=torch.float64)
    # w_e ~ exp(-(e - mean)^2 / (2 std^2)). why a softmax: far from the mean all of these are 0 in float64
    return (-((epoch - mean) / std).square() / 2).softmax(dim=0)


class PromptSRC(PromptOT):
    """The deep prompts of Prompt-OT with other regularisers, and their average over the epochs.

    lambda_image, lambda_text: weights of the terms. average_mean, average_std: of `epoch_weights`. depth:
    blocks with prompts, from the first, at most those of either tower. Raises as PromptOT does.
    """

    # differs: the published warm-up is one epoch at a constant 1e-5, here linear, as in train.py.
    DEFAULTS = {"lr": 0.0025, "epochs": 50, "warmup_epochs": 1, "batch_size": 4, "weight_decay": 5e-4}

    def __init__(self, clip_model, class_names, lambda_image=10.0, lambda_text=25.0, average_mean=30.0,
                 average_std=30.0, depth=9, **text_options):
        # lambda_transport keeps its default: where it is not 0, a training step asks the teacher
        super().__init__(clip_model, class_names, depth=depth, **text_options)
        self.lambda_image, self.lambda_text = lambda_image, lambda_text
        self.average_mean, self.average_std = average_mean, average_std
        self.register_buffer("average_text_prompts", torch.zeros_like(self.text_prompts))      # (J, n, W)
        self.register_buffer("average_image_prompts", torch.zeros_like(self.image_prompts))    # (J, n, W)

    @torch.compiler.disable      # why: it is called once, and its tokenizer is no work for a compiler
    def encode_frozen(self):
        """The frozen CLIP's texts: the mean of the raw features of TEMPLATES, then unit length, (C, D)."""
        raw = (template_features(self.clip, self.class_names, template, raw=True) for template in TEMPLATES)
        return unit(sum(raw))                          # why no division: the sum points where the mean does

    def loss(self, outputs, labels, n_batch):
        """These images' part of the objective of a batch of n_batch images, and of its terms."""
        _, *features = outputs
        parts = terms(*features, labels, self.scale, n_batch)
        loss = weigh(parts, self.lambda_image, self.lambda_text)
        return loss, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def after_epoch(self, epoch, epochs):
        """Adds the share of an epoch to the average, which the prompts become after the last epoch."""
        weight = epoch_weights(epochs, self.average_mean, self.average_std)[epoch - 1].item()
        for prompts, average in ((self.text_prompts, self.average_text_prompts),
                                 (self.image_prompts, self.average_image_prompts)):
            if epoch == 1:             # why: with --start-from it holds the average of the other run
                average.zero_()
            average += weight * prompts
            if epoch == epochs:
                prompts.copy_(average)

    def learned_state(self):
        """The prompts, and their average so far, with which an interrupted run goes on."""
        return {**super().learned_state(), "average_text_prompts": self.average_text_prompts,
                "average_image_prompts": self.average_image_prompts}
