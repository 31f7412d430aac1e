"""Zero-shot CLIP (Radford et al., arXiv 2103.00020) as a method that learns nothing.

The image feature is compared with one hand-written text per class, "a photo of a <name>.", or with the
template of a dataset. It is the row that every table begins with, and the control of ood.py. train.py does
not train it.

Letters: those of sotglp.py.  B images   C classes   P patches   D joint width
"""

if __name__ == "__main__":
    raise SystemExit("methods/zero_shot.py is no command: every run of train.py measures it")

import clip

import torch

from clip.precision import unit
from methods import coop
from sotglp import Method, mean_cosines, project

CHUNK = 256    # texts that go through the tower at once


@torch.no_grad()
def template_features(clip_model, class_names, template, raw=False):
    """The text features of a template, with {} for the class name: C strings -> unit (C, D).

    raw: as the tower gives them, not of unit length.
    """
    tokens = template_tokens(clip_model, class_names, template)                    # (C, S)
    features = torch.cat([clip_model.encode_text(chunk) for chunk in tokens.split(CHUNK)])
    return features if raw else unit(features)


def template_tokens(clip_model, class_names, template):
    """The tokens of a template with each class name: C strings -> (C, S). ValueError: a name is too long."""
    tokens = []
    for name in class_names:
        text = template.format(Method.name_in_text(name))
        try:
            tokens.append(clip.tokenize(text, clip_model.context_length))
        except ValueError as error:
            raise ValueError(f"class name {name!r} does not fit with the template {template!r} into "
                             f"{clip_model.context_length} tokens: shorten the name, or the --template that "
                             "you gave") from error
    return torch.cat(tokens)


class ZeroShot(Method):
    """CLIP itself.

    template: the prompt, with {} for the class name; stream: the patches of its local confidence. Raises
    ValueError for a class name that does not fit into it.
    """

    def __init__(self, clip_model, class_names, template="a photo of a {}.", stream="value"):
        super().__init__(clip_model, class_names)
        # why here: what cannot work fails before long work
        template_tokens(clip_model, class_names, template)
        self.template = template
        self.stream = stream

    def encode_prompts(self):
        """The template with each class name -> unit (C, D)."""
        return template_features(self.clip, self.class_names, self.template)

    def forward(self, features, drawn=None, text_features=None):
        """Pictures or their features, of any stream -> a tuple of the logits (B, C)."""
        cls, _ = self.features(features)                                           # (B, W)
        if text_features is None:
            text_features = self.encode_prompts()
        return (coop.logits(project(cls, self.clip.visual.proj), text_features, self.scale),)

    def scores(self, outputs):
        """{"zero_shot": (B, C)}."""
        return {"zero_shot": outputs[0]}

    def cosines(self, features, text_features):
        """Raw cosines of images and of their patches with each class: (B, C), (B, P, C).  GL-MCM"""
        cls, patches = self.features(features)                                     # (B, W), (B, P, W)
        proj = self.clip.visual.proj
        text = text_features[:, None]                                              # (C, 1, D)
        return mean_cosines(project(cls, proj), text), mean_cosines(project(patches, proj), text)
