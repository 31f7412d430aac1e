"""Numbers that half precision would spoil: everything from the joint space on is computed in float32."""

if __name__ == "__main__":
    raise SystemExit("clip/precision.py is no command: python train.py reads it")

import functools

import torch
import torch.nn.functional as F


def in_float32(function):
    """Computes `function` in float32 at least, also when it is called under autocast or with half inputs.

    why: half precision keeps 8 to 11 bits. That is too few for cosines that differ in the third digit and are
    then divided by epsilon or tau. Autocast on a CPU would compute softmax in half precision too.
    """
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        values = (*args, *kwargs.values())
        device = next((value.device.type for value in values if torch.is_tensor(value)), "cpu")
        kwargs = {name: _at_least_float32(value) for name, value in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*map(_at_least_float32, args), **kwargs)

    return wrapped


def _at_least_float32(value):
    is_half = torch.is_tensor(value) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


@in_float32
def to_joint_space(tokens, proj):
    """Tokens after a tower's last norm, mapped to the space of both towers: (..., W) -> (..., D)."""
    return tokens @ proj


@in_float32
def unit(features):
    """Each vector divided by its length, so that inner products are cosines: (..., D) -> (..., D)."""
    return F.normalize(features, dim=-1)
