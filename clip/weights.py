"""From a file to a CLIP: the weights are read, and what holds none is refused. No code of a file is run."""

if __name__ == "__main__":
    raise SystemExit("clip/weights.py is no command: python train.py reads it")

import errno
import gzip
import io
import sys
import zipfile

import torch
import torch.distributed as dist

from .archive import ArchiveReader
from .model import CLIP

LIMIT = 4 * 2**30         # bytes that the weights may take: twice what OpenAI's largest take in float32
VOCABULARY = 49408        # token ids of CLIP's tokenizer

# The width of one attention head in open_clip's image towers ViT-H, ViT-g, ViT-bigG and ViT-e, by the width
# of the tower. In all other towers a head is 64 wide.
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}

FIRST = "visual.conv1.weight"                               # every vision transformer of CLIP has this tensor
WRAPPERS = ("state_dict", "model_state_dict", "model")      # where training programs keep a model's tensors
BOOKKEEPING = {"input_resolution", "context_length", "vocab_size"}      # OpenAI stores them among the weights


# ---- tensors by name -> CLIP -----------------------------------------------------------------------

def build_model(state_dict):
    """An OpenAI state dict -> CLIP in float32, frozen. All sizes are read from the tensors' shapes.

    Raises ValueError for a ResNet, for a dict that is no CLIP, and with the name of every key that is
    missing, unexpected or of another shape.
    """
    refuse_other_models(state_dict)
    check_plain(state_dict)
    weights = {name: value.float() for name, value in state_dict.items() if name not in BOOKKEEPING}

    sizes = read_sizes(weights)
    with torch.device("meta"):
        model = CLIP(**sizes)

    check_perceptrons(weights)
    check_keys(weights, model.state_dict())
    check_finite(weights, "these weights")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def refuse_other_models(state_dict):
    """Raises ValueError for a ResNet, and for a CLIP whose tensors have the names of another library."""
    if "visual.layer1.0.conv1.weight" in state_dict:
        raise ValueError("this CLIP has a ResNet image tower; SOT-GLP needs the patch tokens of a vision "
                         "transformer: use ViT-B/16, ViT-B/32 or ViT-L/14")
    if any(str(name).startswith(("vision_model.", "text_model.")) for name in state_dict):
        raise ValueError("these weights have the names of Hugging Face's transformers: --model ViT-B/16, "
                         "ViT-B/32 and ViT-L/14 are the same weights with OpenAI's; of other models save "
                         "open_clip's state_dict()")


def read_sizes(weights):
    """The sizes of a CLIP from the shapes of its weights -> the arguments of CLIP, by name.

    Raises ValueError where a tensor that shows a size is missing, and for a size that no CLIP has.
    """
    try:
        vision_width, _, patch, _ = weights[FIRST].shape
        n_tokens = weights["visual.positional_embedding"].shape[0]
        text_width, embed_dim = weights["text_projection"].shape
        context_length = weights["positional_embedding"].shape[0]
        vocab_size = weights["token_embedding.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        beginning = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(f"these weights are no CLIP with a vision transformer: {error} not found as "
                         f"expected; the file begins with {beginning}") from error

    vision_layers = count_layers(weights, "visual.transformer.resblocks.")
    text_layers = count_layers(weights, "transformer.resblocks.")
    grid = round(max(n_tokens - 1, 0) ** 0.5)      # patches on one side of the image

    def check(fits, what, found, expected):
        if not fits:
            raise ValueError(f"these weights do not fit CLIP: {what} is {found}, expected {expected}")

    check(is_width(vision_width), "visual.conv1.weight: the width", vision_width, "a multiple of 64")
    check(patch > 0, "visual.conv1.weight: the patch size", patch, "at least 1")
    check(grid > 0 and n_tokens == 1 + grid**2,
          "visual.positional_embedding: the token count", n_tokens, "1 + a square")
    check(is_width(text_width), "text_projection: the width", text_width, "a multiple of 64")
    check(embed_dim > 0, "text_projection: the joint width", embed_dim, "at least 1")
    check(context_length > 1, "positional_embedding: the context length", context_length, "at least 2")
    check(vocab_size == VOCABULARY, "token_embedding.weight: the vocabulary", vocab_size, VOCABULARY)

    return {"embed_dim": embed_dim, "resolution": grid * patch, "patch": patch,
            "vision_width": vision_width, "vision_layers": vision_layers,
            "vision_head_width": HEAD_WIDTHS.get(vision_width, 64),
            "context_length": context_length, "vocab_size": vocab_size,
            "text_width": text_width, "text_layers": text_layers}


def is_width(number):
    """Whether a tower can be so wide: its attention heads are 64 wide."""
    return number > 0 and number % 64 == 0


def check_perceptrons(weights):
    """Raises ValueError for a tower whose perceptrons are not four times as wide as the tower."""
    for name in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_fc.weight"):
        if name not in weights:
            continue
        rows, width = weights[name].shape
        if rows != 4 * width:
            raise ValueError(f"these weights do not fit CLIP: {name} has {rows} rows, expected {4 * width}; "
                             "open_clip's ViT-g-14, ViT-bigG-14 and ViT-e-14 have other perceptrons, and are "
                             "not read here")


def check_finite(tensors, where):
    """Raises ValueError that names the first tensor, of {name: tensor}, that is not finite everywhere."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite numbers")


def check_plain(state_dict):
    """Raises ValueError for a value that is no dense tensor of numbers, and for more than LIMIT in all."""
    size = 0
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"the weights are named by strings, found {name!r}")
        if not is_dense_numbers(value):
            raise ValueError(f"{name!r} is {describe(value)}, expected a dense tensor of numbers")
        needed = value.numel() * value.element_size()
        stored = value.untyped_storage().nbytes()
        if needed > stored:
            raise ValueError(f"{name!r} is of {needed} bytes, but {stored} bytes are stored, "
                             "expected a dense tensor of numbers")
        size += needed

    if size > LIMIT:
        raise ValueError(f"these weights take {size} bytes, more than {LIMIT}")


def is_dense_numbers(value):
    """Whether a value is a tensor of real numbers, each of which is stored."""
    return (torch.is_tensor(value) and value.layout == torch.strided and value.device.type != "meta"
            and not value.is_quantized and not value.is_complex() and value.dtype != torch.bool)


def describe(value):
    """What a value is, in the words of an error."""
    if not torch.is_tensor(value):
        return type(value).__name__
    return f"a {value.layout} tensor of {value.dtype} on {value.device}".replace("torch.", "")


def count_layers(weights, prefix):
    """How many transformer blocks have this prefix. Raises ValueError unless they count 0, 1, 2, ..."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise ValueError(f"these weights do not fit CLIP: the blocks of {prefix} are "
                         f"{', '.join(sorted(numbers)) or 'none'}, expected 0, 1, 2 and so on")
    return len(numbers)


def check_keys(found, wanted):
    """Raises ValueError that lists every key that is missing, unexpected or of another shape."""
    wrong = [f"missing {name}" for name in wanted if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in wanted]
    wrong += [f"{name} is {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
              for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if wrong:
        raise ValueError("these weights do not fit CLIP: " + "; ".join(wrong))


# ---- file -> tensors by name -----------------------------------------------------------------------

def read_state_dict(path):
    """The tensors, by name, of a TorchScript archive or of a saved state dict, gzipped or not.

    Raises ValueError for a damaged file, for one that holds anything else, and for one that unpacks to more
    than LIMIT.
    """
    refuse_safetensors(path)
    try:
        with open(path, "rb") as raw:
            is_gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            file = io.BytesIO(unpack(raw)) if is_gzipped else raw
            if zipfile.is_zipfile(file):
                archive = zipfile.ZipFile(file)
                check_archive(archive)
                if is_torchscript(archive):
                    return read_archive(archive)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    # why so broad: in a damaged file zipfile, pickle and torch can trip over anything
    except Exception as error:
        if is_memory(error) or is_refusal(error):
            raise
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"cannot be read as weights ({reason}): it is truncated or damaged, or holds more "
                         "than tensors. Fetch it again, or save a model's state_dict() alone") from error

    state_dict, taken_off = unwrap(content, path)
    if taken_off and is_first():
        print(f"note: {path}: the weights are read without {' and '.join(taken_off)}, which a training "
              "program put around them", file=sys.stderr, flush=True)
    return state_dict


def refuse_safetensors(path):
    """Raises ValueError, with the way out, for a file that begins with a length of 8 bytes and then JSON."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            raise ValueError("this is a safetensors file: torch.save(safetensors.torch.load_file(FILE), "
                             "'clip.pt') makes a state dict of it, which is read if its names are OpenAI's "
                             "or open_clip's")


def unwrap(content, path):
    """What a file holds -> {name: tensor}, and what a training program had put around it, as texts.

    Raises ValueError for what holds no state dict. Raises it also for a CLIP that is only a part of a state
    dict, with the line of Python that takes it out.
    """
    taken_off = []
    reached = ""                # how that line of Python reaches the tensors in the content
    for entry in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            taken_off.append(f"the entry {entry!r}")
            reached = f"[{entry!r}]"
            break
    if not is_state_dict(content):
        raise ValueError("holds no plain state dict, {name: tensor}: save a model's state_dict() alone")

    prefix = next((name.removesuffix(FIRST) for name in content if name.endswith(f".{FIRST}")), "")
    if not prefix or FIRST in content:
        return content, taken_off

    others = [name for name in content if not name.startswith(prefix)]
    if others:
        raise ValueError(f"the names of its CLIP begin with {prefix!r}, and it holds others, such as "
                         f"{others[0]!r}. In Python this makes a file of the CLIP alone:\n"
                         f"import torch; content = torch.load({str(path)!r}, 'cpu', weights_only=True)"
                         f"{reached}; torch.save({{name[{len(prefix)}:]: tensor for name, tensor in "
                         f"content.items() if name.startswith({prefix!r})}}, 'clip.pt')")
    taken_off.append(f"the beginning {prefix!r} of all names")
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}, taken_off


def is_state_dict(content):
    """Whether a file holds tensors by their names and nothing else."""
    if not isinstance(content, dict):
        return False
    return all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items())


def has_joined():
    """Whether this process works with others.

    why not by RANK or LOCAL_RANK: they may be left over in the environment of a process that works alone.
    """
    return dist.is_available() and dist.is_initialized()


def is_first():
    """Whether this process prints: it works alone, or is the first of several."""
    return not has_joined() or dist.get_rank() == 0


def is_memory(error):
    """Whether an error says that there is too little memory; torch has words of its own for it."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def is_refusal(error):
    """Whether the system refused to read a file that may be whole. EINVAL: the file itself is damaged."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def unpack(raw):
    """The content of a gzipped file. Raises ValueError where it is larger than LIMIT."""
    content = bytearray()
    # why in pieces: one call would take all the memory that the file asks for
    with gzip.GzipFile(fileobj=raw) as file:
        while piece := file.read(2**20):
            content += piece
            if len(content) > LIMIT:
                raise ValueError(f"it unpacks to more than {LIMIT} bytes")
    return content


def check_archive(archive):
    """Raises ValueError for a zip that unpacks to more than LIMIT, and for one with a wrong checksum."""
    size = sum(member.file_size for member in archive.infolist())
    if size > LIMIT:
        raise ValueError(f"it unpacks to {size} bytes, more than {LIMIT}")
    if archive.testzip():                   # why: torch does not compare them, and would read changed numbers
        raise ValueError("a checksum is wrong")


def is_torchscript(archive):
    """Whether a zip holds a program; it has the program's constants beside the tensors."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(archive):
    """The state dict of the module in a TorchScript archive."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    return dict(ArchiveReader(archive, root).load().tensors())
