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

    Raises ValueError for a method whose text features do not say all.
    """
    features = model.encode_prompts() if model.frozen_tower else None
    if features is None:
        why = "its image tower has learned prompts, too, and other programs do not have it"
        if model.frozen_tower:
            why = "its texts depend on the image, or it has none"
        raise ValueError(f"{type(model).__name__} cannot be exported: {why}")
    features = features if isinstance(features, tuple) else (features,)
    arrays = {"class_names": numpy.array(model.class_names), "scale": model.scale}
    for name, text in zip(model.text_names, features):
        arrays[f"{name}_text"] = text[:, None] if text.ndim == 2 else text         # (C, N, D)
    if hasattr(model, "local_projection"):
        arrays["local_projection"] = model.local_projection                        # (W, W)
    return {name: array.cpu().numpy() if torch.is_tensor(array) else array for name, array in arrays.items()}


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
