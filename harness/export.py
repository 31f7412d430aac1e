"""What a run's prompts say, for other programs: class names and unit text features in a NumPy file.

docs/export.md has the lines that use them with OpenAI's clip or with open_clip.
"""

import clip  # noqa: F401  (before torch: it bounds how long torch's threads wait)

import numpy
import torch

from harness import machine, runs


@torch.no_grad()
def text_arrays(model):
    """A model's class names and unit text features, (C, N, D) each, and its map of patches where it has one.

    Raises ValueError for a method of which the text features are only a part.
    """
    name = type(model).__name__
    if not model.frozen_tower:
        raise ValueError(f"{name} cannot be exported: its image tower has learned prompts, too, and other "
                         "programs do not have it")
    features = model.encode_prompts()
    if features is None:
        raise ValueError(f"{name} cannot be exported: its texts depend on the image, or it has none")
    if not isinstance(features, tuple):
        features = (features,)

    arrays = {"class_names": numpy.array(model.class_names), "scale": model.scale}
    for name, text in zip(model.text_names, features):
        arrays[f"{name}_text"] = text[:, None] if text.ndim == 2 else text         # (C, N, D)
    if hasattr(model, "local_projection"):
        arrays["local_projection"] = model.local_projection                        # (W, W)
    for name, array in arrays.items():
        if torch.is_tensor(array):
            arrays[name] = array.cpu().numpy()
    return arrays


def export(run, path, device="cpu", model_file=None):
    """Writes what `text_arrays` gives for a run, and the name of its CLIP, to a .npz file."""
    checkpoint = runs.read_checkpoint(run)
    arrays = text_arrays(runs.build(run, checkpoint, device, model=model_file))
    arrays["clip"] = numpy.array(runs.short_name(checkpoint["config"]["model"]))

    def save(temporary):
        with open(temporary, "wb") as file:                # why: numpy adds .npz to a name that lacks it
            numpy.savez(file, **arrays)

    machine.write_whole(path, save)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array.ndim)
    print(f"wrote {path}: {shapes}, of {arrays['clip']}")
