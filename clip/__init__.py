"""OpenAI's CLIP for SOT-GLP, written afresh for OpenAI's files.

model.py      the two towers, and the V-V stream beside the image tower (Eq. 2)
prompts.py    learned prompts in front of class names (Eq. 1)
tokenizer.py  texts -> token ids
loader.py     a name -> a file -> model and preprocessing
weights.py    a file -> tensors -> model, and what is refused
archive.py    the weights inside OpenAI's TorchScript archives
download.py   a file from the network
precision.py  what is computed in float32 everywhere
"""

# why before the imports: they fail where a file of this folder is started by its path
if __name__ == "__main__":
    raise SystemExit("clip/__init__.py is no command: python train.py reads it")

import os

# why: torch's threads wait for each other in a busy loop. By default they do so for milliseconds, and then a
# core that is shared with another program stops them all. After this many turns of the loop they sleep until
# they are woken. torch reads the variable when it is imported, so every script imports this package first.
# What the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from .loader import (  # noqa: E402  (after the variable is set)
    ACTIVATIONS, available_models, full_name, load, preprocess, weights_hash)
from .model import CLIP  # noqa: E402
from .weights import build_model, check_finite  # noqa: E402
from .tokenizer import tokenize  # noqa: E402

__all__ = ["ACTIVATIONS", "CLIP", "available_models", "build_model", "check_finite", "full_name", "load",
           "preprocess", "tokenize", "weights_hash"]
