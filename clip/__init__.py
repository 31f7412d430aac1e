"""OpenAI's CLIP for SOT-GLP, written afresh for OpenAI's files.

model.py      the two towers, and the V-V stream beside the image tower
loader.py     a name or a file -> model and preprocessing
tokenizer.py  texts -> token ids
"""

from .loader import available_models, load, preprocess, weights_hash
from .model import CLIP, build_model
from .tokenizer import tokenize

__all__ = ["CLIP", "available_models", "build_model", "load", "preprocess", "tokenize", "weights_hash"]
