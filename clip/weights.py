"""From a file to a CLIP: reading weights, and refusing what are none. No code of a file is run.

OpenAI's files are TorchScript archives, that is programs that carry their weights. We take the weights and
leave the program alone: `ArchiveReader` knows the few things that weights need, and refuses all others.
"""

import errno
import gzip
import io
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict

import torch

from .model import CLIP

LIMIT = 4 * 2**30        # bytes that the weights may take: twice what the largest of OpenAI's take in float32
VOCABULARY = 49408                 # token ids of CLIP's tokenizer
# heads of open_clip's image towers ViT-H, ViT-g, ViT-bigG and ViT-e, by the tower's width; elsewhere they are 64 wide
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
FIRST = "visual.conv1.weight"      # a name that every vision transformer of CLIP has
WRAPPERS = ("state_dict", "model_state_dict", "model")     # under which training programs keep a model's tensors
# numbers that OpenAI stores among the weights
BOOKKEEPING = {"input_resolution", "context_length", "vocab_size"}


# ---- tensors by name -> CLIP -------------------------------------------------------------------------------

def build_model(state_dict):
    """An OpenAI state dict -> CLIP in float32, frozen. All sizes are read from the tensors' shapes.

    Raises ValueError for a ResNet, for a dict that is no CLIP, and with the name of every key that is
    missing, unexpected or of another shape.
    """
    if "visual.layer1.0.conv1.weight" in state_dict:
        raise ValueError("this CLIP has a ResNet image tower; SOT-GLP needs the patch tokens of a vision transformer: "
                         "use ViT-B/16, ViT-B/32 or ViT-L/14")
    if any(str(name).startswith(("vision_model.", "text_model.")) for name in state_dict):
        raise ValueError("these weights have the names of Hugging Face's transformers: --model ViT-B/16, ViT-B/32 and "
                         "ViT-L/14 are the same weights with OpenAI's; of other models save open_clip's state_dict()")
    check_plain(state_dict)
    weights = {k: v.float() for k, v in state_dict.items() if k not in BOOKKEEPING}
    try:
        vision_width, _, patch, _ = weights[FIRST].shape
        tokens = weights["visual.positional_embedding"].shape[0]
        text_width, embed_dim = weights["text_projection"].shape
        context_length = weights["positional_embedding"].shape[0]
        vocab_size = weights["token_embedding.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these weights are no CLIP with a vision transformer: {error} not found as expected; "
                         f"the file begins with {', '.join(list(state_dict)[:3]) or 'nothing'}") from error
    vision_layers = count_layers(weights, "visual.transformer.resblocks.")
    text_layers = count_layers(weights, "transformer.resblocks.")
    grid = round(max(tokens - 1, 0) ** 0.5)
    head_width = HEAD_WIDTHS.get(vision_width, 64)
    for what, found, right, expected in (
            ("visual.conv1.weight: the width", vision_width, vision_width > 0 == vision_width % 64, "a multiple of 64"),
            ("visual.conv1.weight: the patch size", patch, patch > 0, "at least 1"),
            ("visual.positional_embedding: the token count", tokens, tokens == 1 + grid**2 > 1, "1 + a square"),
            ("text_projection: the width", text_width, text_width > 0 == text_width % 64, "a multiple of 64"),
            ("text_projection: the joint width", embed_dim, embed_dim > 0, "at least 1"),
            ("positional_embedding: the context length", context_length, context_length > 1, "at least 2"),
            ("token_embedding.weight: the vocabulary", vocab_size, vocab_size == VOCABULARY, VOCABULARY)):
        if not right:
            raise ValueError(f"these weights do not fit CLIP: {what} is {found}, expected {expected}")
    with torch.device("meta"):
        model = CLIP(embed_dim, grid * patch, patch, vision_width, vision_layers, context_length, vocab_size,
                     text_width, text_layers, head_width)
    check_perceptrons(weights)
    check_keys(weights, model.state_dict())
    check_finite(weights, "these weights")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def check_perceptrons(weights):
    """Raises ValueError for the larger towers of open_clip whose perceptrons are not four times as wide."""
    for name in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_fc.weight"):
        rows, width = weights[name].shape if name in weights else (4, 1)
        if rows != 4 * width:
            raise ValueError(f"these weights do not fit CLIP: {name} has {rows} rows, expected {4 * width}; "
                             "open_clip's ViT-g-14, ViT-bigG-14 and ViT-e-14 have other perceptrons, and are not "
                             "read here")


def check_finite(tensors, where):
    """Raises ValueError that names the first tensor, {name: tensor}, with a value that is not a finite number."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite numbers")


def check_plain(state_dict):
    """Raises ValueError for the first value that is not a dense tensor of numbers, and where all take too much."""
    size = 0
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"the weights are named by strings, found {name!r}")
        found = type(value).__name__
        if torch.is_tensor(value):
            found = f"a {value.layout} tensor of {value.dtype} on {value.device}".replace("torch.", "")
            plain = value.layout == torch.strided and not value.is_quantized and value.device.type != "meta"
            if plain and not value.is_complex() and value.dtype != torch.bool:
                needed = value.numel() * value.element_size()
                if needed <= value.untyped_storage().nbytes():
                    size += needed
                    continue
                found = f"of {needed} bytes, but {value.untyped_storage().nbytes()} bytes are stored"
        raise ValueError(f"{name!r} is {found}, expected a dense tensor of numbers")
    if size > LIMIT:
        raise ValueError(f"these weights take {size} bytes, more than {LIMIT}")


def count_layers(weights, prefix):
    """How many transformer blocks the keys with this prefix number. Raises ValueError unless that is 0, 1, 2, ..."""
    numbers = {k[len(prefix):].split(".")[0] for k in weights if k.startswith(prefix)}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise ValueError(f"these weights do not fit CLIP: the blocks of {prefix} are "
                         f"{', '.join(sorted(numbers)) or 'none'}, expected 0, 1, 2 and so on")
    return len(numbers)


def check_keys(found, wanted):
    """Raises ValueError that lists every missing, unexpected or misshapen key."""
    wrong = [f"missing {k}" for k in wanted if k not in found]
    wrong += [f"unexpected {k}" for k in found if k not in wanted]
    wrong += [f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}"
              for k in wanted if k in found and found[k].shape != wanted[k].shape]
    if wrong:
        raise ValueError("these weights do not fit CLIP: " + "; ".join(wrong))


# ---- file -> tensors by name -------------------------------------------------------------------------------

def read_state_dict(path):
    """The tensors of a TorchScript archive or of a saved state dict, gzipped or not; no code of the file is run.

    Raises ValueError for a damaged file, for one that holds anything else, and for one that unpacks to more
    than LIMIT.
    """
    with open(path, "rb") as raw:
        if raw.read(9)[8:] == b"{":                # its head: a length of 8 bytes, then JSON
            raise ValueError("this is a safetensors file: torch.save(safetensors.torch.load_file(FILE), 'clip.pt') "
                             "makes a state dict of it, which is read if its names are OpenAI's or open_clip's")
    try:
        with open(path, "rb") as raw:
            gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            file = io.BytesIO(unpack(raw)) if gzipped else raw
            if zipfile.is_zipfile(file):
                archive = zipfile.ZipFile(file)
                check_archive(archive)
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    # TorchScript: beside the tensors it has the program's constants
                    return read_archive(archive)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    # why so broad: in a damaged file zipfile, pickle and torch can trip over anything
    except Exception as error:
        if is_memory(error) or is_refusal(error):
            raise
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"cannot be read as weights ({reason}): it is truncated or damaged, or holds "
                         "more than tensors. Fetch it again, or save a model's state_dict() alone") from error
    state, taken_off = unwrap(state, path)
    if taken_off and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {path}: the weights are read without {' and '.join(taken_off)}, which a training program "
              "put around them", file=sys.stderr, flush=True)
    return state


def unwrap(content, path):
    """A state dict without what training programs put around it -> {name: tensor}, what was taken off, as texts.

    Raises ValueError for what holds no state dict, and for a CLIP that is only a part of one, with the line that
    takes it out.
    """
    taken_off = []
    reached = ""
    entries = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if entries:
        content = content[entries[0]]
        taken_off.append(f"the entry {entries[0]!r}")
        reached = f"[{entries[0]!r}]"
    if not (isinstance(content, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in content.items())):
        raise ValueError("holds no plain state dict, {name: tensor}: save a model's state_dict() alone")

    prefix = next((name.removesuffix(FIRST) for name in content if name.endswith(f".{FIRST}")), "")
    if not prefix or FIRST in content:
        return content, taken_off
    others = [name for name in content if not name.startswith(prefix)]
    if others:
        kept = f"{{name[{len(prefix)}:]: tensor for name, tensor in content.items() if name.startswith({prefix!r})}}"
        raise ValueError(f"the names of its CLIP begin with {prefix!r}, and it holds others, such as {others[0]!r}. "
                         "In Python this makes a file of the CLIP alone:\nimport torch; content = torch.load("
                         f"{str(path)!r}, 'cpu', weights_only=True){reached}; torch.save({kept}, 'clip.pt')")
    taken_off.append(f"the beginning {prefix!r} of all names")
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}, taken_off


def is_memory(error):
    """Whether an error says that there is too little memory; torch has words of its own for it."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def is_refusal(error):
    """Whether the system refused to read a file, which may be whole. EINVAL: it is damaged."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def unpack(raw):
    """The content of a gzipped file. Raises ValueError where it is larger than LIMIT."""
    content = bytearray()
    # why in pieces: Python takes all that is asked for at once
    with gzip.GzipFile(fileobj=raw) as file:
        while piece := file.read(2**20):
            content += piece
            if len(content) > LIMIT:
                raise ValueError(f"it unpacks to more than {LIMIT} bytes")
    return content


def check_archive(archive):
    """Raises ValueError for a zip that unpacks to more than LIMIT, or whose members have not their checksums."""
    size = sum(member.file_size for member in archive.infolist())
    if size > LIMIT:
        raise ValueError(f"it unpacks to {size} bytes, more than {LIMIT}")
    if archive.testzip():                   # why: torch does not compare them, and would read changed numbers
        raise ValueError("a checksum is wrong")


def read_archive(archive):
    """The state dict of the module in a TorchScript archive."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    return dict(ArchiveReader(archive, root).load().tensors())


class Module:
    """What a module of the archive becomes: its attributes, and the names that its class declares as weights."""

    def __setstate__(self, attributes):
        self.attributes = attributes

    def tensors(self, prefix=""):
        """Parameters and buffers with their names, as `state_dict` gives them."""
        for name, value in self.attributes.items():
            if isinstance(value, Module):
                yield from value.tensors(f"{prefix}{name}.")
            # why: a script may keep others, say an attention mask
            elif name in self.declared and value is not None:
                yield prefix + name, value


class RebuildTensor:
    """A tensor from its place in a storage. why not a function: a pickle can set a function's attributes."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)


class ArchiveReader(pickle.Unpickler):
    """Unpickles the module of a TorchScript archive from what is listed here alone; nothing of the file is called."""

    known = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): RebuildTensor(),
        ("torch.jit._pickle", "build_intlist"): list,
        ("torch", "DoubleStorage"): torch.float64,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "LongStorage"): torch.int64,
        ("torch", "IntStorage"): torch.int32,
    }

    def __init__(self, archive, root):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":
            return type(name, (Module,), {"declared": self.declared(module, name)})
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among weights")
        return self.known[module, name]

    def declared(self, module, name):
        """The names that this class of the archive lists as parameters and buffers, read in its source as text."""
        source = self.archive.read(f"{self.root}code/{module.replace('.', '/')}.py").decode()
        lists = r"( +__parameters__ = .*\n)?( +__buffers__ = .*\n)?"
        head = re.search(rf"class {re.escape(name)}\(Module\):\n{lists}", source)[0]
        return re.findall(r'"(.+?)"', head)

    def persistent_load(self, key):
        _, dtype, number, _, _ = key
        if (dtype, number) not in self.storages:   # why kept: a file may name a storage again and again
            content = bytearray(self.archive.read(f"{self.root}data/{number}"))
            self.storages[dtype, number] = torch.frombuffer(content, dtype=dtype)
        return self.storages[dtype, number]
