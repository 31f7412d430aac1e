"""PLOT++, PLOT for vision transformers (Chen et al., arXiv 2210.01253, its code: plot-pp), in one file.

V prompts show an image in V ways: each one makes a pass of its own through the image tower, with its tokens
behind the patches. Balanced transport matches the V image features with the N texts of a class. Tables 1 and
3 of the paper call it PLOT.

Against SOT-GLP: whole images take the place of patches. Prompts of both towers are learned, shared by the
classes. No global score but in stage 1, no V-V stream, no map on features.

Two stages, two runs: --stage 1 learns the image prompts alone and adds a score of the pooled features;
--stage 2 --start-from RUN goes on from there with both prompts, without it.

differs: the authors stop the transport when the batch's mean change is small, so that a score depends on the
batch. They choose words for each dataset (--words has one choice for all), and learn as many tokens of all
four texts as the first one has, whatever they are. A step makes V passes through the image tower, with
gradient, and N texts per class.

Letters: those of sotglp.py.  B images   C classes   V image prompts of n tokens   N text prompts of M tokens
         D joint width   W tower width
"""

if __name__ == "__main__":
    raise SystemExit("methods/plotpp.py is no command: python train.py --method plotpp")

import torch
from torch import nn

from clip.precision import in_float32, unit
from methods import coop, plot
from sotglp import Method

WORDS = ("a photo of a", "this is a photo", "this is picture of", "one picture of a")


@in_float32
def logits(image, text, scale, pooled=False, epsilon=0.1, n_iters=20):
    """Transport-weighted similarity of an image's features to a class's texts, times 1/tau.

    raw (B, V, D), raw (C, N, D) -> (B, C). The plan is constant in the backward pass. pooled: adds the cosine
    of the mean feature and the mean text, times 1/tau; these are means of raw features.
    """
    matched = plot.logits(unit(image), unit(text), scale, epsilon, n_iters)        # (B, C)
    if not pooled:
        return matched
    return matched + coop.logits(unit(image.mean(dim=1)), unit(text.mean(dim=1)), scale)


class PLOTPP(Method):
    """Prompts of both towers, shared by the classes.

    stage: 1 learns the image prompts alone, with the pooled score, 2 both prompts without it. words: a text
    prompt starts from each; n_image_prompts: V, of n_image_tokens tokens each, from N(0, 0.02); epsilon,
    n_iters: of the transport. Raises ValueError for another stage, for words of different numbers of tokens,
    and for a class name that does not fit behind them.
    """

    # differs: published are 50 epochs per stage with 1 shot and on ImageNet, 100 with 2 and 4 shots; and a
    # warm-up of one epoch at a constant 1e-5, here linear, as in train.py.
    DEFAULTS = {"lr": 0.002, "epochs": 200, "warmup_epochs": 1, "batch_size": 32, "weight_decay": 5e-4}
    SUFFIX = coop.CoOp.SUFFIX
    frozen_tower = False    # tokens stand among the patches
    loss = coop.CoOp.loss
    logits = coop.CoOp.logits
    scores = coop.CoOp.scores

    def __init__(self, clip_model, class_names, stage=2, words=WORDS, n_image_prompts=4, n_image_tokens=2,
                 epsilon=0.1, n_iters=20, **text_options):
        super().__init__(clip_model, class_names, **text_options)
        if stage not in (1, 2):
            raise ValueError(f"--stage must be 1 or 2, got {stage}")
        self.pooled = stage == 1
        self.transport = {"epsilon": epsilon, "n_iters": n_iters}
        start = self.word_prompts(words)                                           # (N, M, W)
        self.text_encoder.check_names(start.shape[1], self.SUFFIX)

        width = clip_model.visual.proj.shape[0]
        image_start = torch.randn(n_image_prompts, n_image_tokens, width) * 0.02   # (V, n, W)
        self.text_prompts = nn.Parameter(start, requires_grad=stage == 2)
        self.image_prompts = nn.Parameter(image_start)
        self.to(clip_model.logit_scale.device)

    def word_prompts(self, words):
        """The token vectors of N texts: (N, M, W). Raises ValueError where their numbers differ."""
        vectors = [self.word_vectors(text) for text in words]
        counts = [len(vector) for vector in vectors]
        if not counts or min(counts) < 1 or min(counts) < max(counts):
            found = ", ".join(f"{text!r} has {count}" for text, count in zip(words, counts))
            raise ValueError(f"--words takes texts of the same number of tokens: {found or 'got no text'}")
        return torch.stack(vectors)

    def encode_prompts(self):
        """[SOS], prompt, class name, full stop, [EOT] for each text prompt -> raw (C, N, D)."""
        return self.encode(self.text_prompts, self.SUFFIX, raw=True)

    def encode_images(self, images):
        """Images (B, 3, R, R) -> raw (B, V, D): a pass for each image prompt."""
        passes = [self.clip.encode_image(images, prompt[None]) for prompt in self.image_prompts]
        return torch.stack(passes, dim=1)

    def forward(self, features, drawn=None, text_features=None):
        """Images (B, 3, R, R) -> a tuple of the logits (B, C)."""
        text = self.encode_prompts() if text_features is None else text_features   # (C, N, D)
        return (logits(self.encode_images(features), text, self.scale, self.pooled, **self.transport),)

    def cosines(self, features, text_features):
        """The transported similarity with each class, without the pooled term, (B, C); no patches."""
        return logits(self.encode_images(features), text_features, 1.0, **self.transport), None
