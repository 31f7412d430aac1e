"""From a name or a file to a frozen CLIP and its preprocessing.

A name becomes a file, which is downloaded once and whose hash is compared. weights.py makes a CLIP of it.
"""

if __name__ == "__main__":
    raise SystemExit("clip/loader.py is no command: python train.py reads it")

import hashlib
import os
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from .download import digest, fetch
from .model import Block
from .weights import build_model, has_joined, is_first, read_state_dict

ADDRESS = "https://openaipublic.azureedge.net/clip/models"
PUBLISHED = {  # as in OpenAI's package openai-clip 1.0.1: the last folder is the file's SHA-256
    "ViT-B/16": f"{ADDRESS}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-B/32": f"{ADDRESS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-L/14": f"{ADDRESS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}
# SHA-256 of OpenAI's ViT-L/14@336px. The paper does not use it: it has no name here, and is read as a file.
LARGE_336 = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
DOWNLOAD_LIMIT = 2**30                             # bytes; the largest of the three has 890 MiB
TINY = Path(__file__).with_name("tiny.pt.gz")

ACTIVATIONS = {"quickgelu": None, "gelu": torch.nn.GELU}    # None: OpenAI's, which model.py builds in
EXTREME = 50                                       # a longer side that is so many times the shorter one
MEAN = (0.48145466, 0.4578275, 0.40821073)         # of OpenAI's training pictures, by colour
STD = (0.26862954, 0.26130258, 0.27577711)


def available_models():
    """The names that `load` knows."""
    return [*PUBLISHED, "tiny"]


def full_name(name):
    """A model's name as OpenAI writes it, also for "ViT-B-16" and "vit-b/16"; a file as an absolute path."""
    known = {model.lower().replace("/", "-"): model for model in available_models()}
    plain = name.lower().replace("/", "-")
    if plain in known:
        return known[plain]
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if path.is_file() else name


def load(name, device="cpu", activation="quickgelu"):
    """A name or a file -> CLIP on the device (float32, eval mode, frozen) and its `preprocess`.

    name: one of `available_models()`, or the path of a TorchScript archive by OpenAI or of a state dict
    (`.pt`, also gzipped). Published files are kept in ~/.cache/clip or $CLIP_CACHE; one that is not there is
    downloaded. activation: "gelu" for a file of weights that were trained with it, which they do not show.

    Raises FileNotFoundError for an unknown name, ConnectionError for a failed download, ValueError for a
    wrong hash, a damaged file, and one that holds no CLIP with a vision transformer.
    """
    name = full_name(str(name))
    path = find(name)
    try:
        model = build_model(read_state_dict(path))
    except ValueError as error:
        if not is_openais(path):
            raise ValueError(f"{path}: {error}") from error
        model = run_archive(path)

    if name not in available_models() and not is_openais(path):
        note_what_weights_hide(path, activation, model)
    elif activation != "quickgelu":
        raise ValueError(f"{name} was trained with QuickGELU: --activation is for files of other people's "
                         "weights")
    if ACTIVATIONS[activation]:
        set_activation(model, ACTIVATIONS[activation])
    return model.to(device), preprocess(model.visual.resolution)


def set_activation(model, activation):
    """Gives every transformer block of a CLIP this activation, a class of modules."""
    for module in model.modules():
        if isinstance(module, Block):
            module.mlp.gelu = activation()


def is_openais(path):
    """Whether a file is one that OpenAI published."""
    return digest(path) in [*map(published_hash, PUBLISHED.values()), LARGE_336]


def note_what_weights_hide(path, activation, model):
    """Prints with which activation and which heads somebody's file is read: its weights do not show them."""
    if not is_first():
        return
    attention = model.visual.transformer.resblocks[0].attn
    head_width = len(attention.in_proj_bias) // 3 // attention.heads
    print(f"note: {path} is none of OpenAI's files; it is read with {activation} and attention heads "
          f"{head_width} wide. QuickGELU is right for OpenAI's weights and open_clip's -quickgelu models, "
          "--activation gelu for open_clip's others", file=sys.stderr, flush=True)


def run_archive(path):
    """CLIP from a file of OpenAI's, read by torch itself: the way out where our own reader fails on it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # why: torch.jit is deprecated and says so
            return build_model(torch.jit.load(path, map_location="cpu").state_dict())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is OpenAI's file, but neither this program nor torch can read it: "
                         f"{str(error).splitlines()[0]}") from error


def preprocess(resolution):
    """CLIP's test transform: a PIL image -> (3, resolution, resolution) float32, normalised."""
    # why here: it takes as long as torch itself, and --help or a wrong option should not wait for it
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    resize = ResizeForCrop(Resize(resolution, InterpolationMode.BICUBIC))
    return Compose([resize, CenterCrop(resolution), to_rgb, ToTensor(), Normalize(MEAN, STD)])


class ResizeForCrop:
    """CLIP's resize of the shorter side. Of a very long picture it resizes only the middle.

    why: 5000 x 1 pixels would become 1120000 x 224, 750 MB. CenterCrop keeps the same pixels either way.
    """

    def __init__(self, resize):
        self.resize = resize                     # torchvision's

    def __call__(self, image):
        short, long = sorted(image.size)
        if long <= EXTREME * short:
            return self.resize(image)

        # why whole squares, as many at both ends: then the pixels of the middle are resized as before
        cut = (long // short - EXTREME) // 2 * short
        if image.width == long:
            middle = image.crop((cut, 0, image.width - cut, image.height))
        else:
            middle = image.crop((0, cut, image.width, image.height - cut))
        return self.resize(middle)


def to_rgb(image):
    """Any PIL image in RGB, as PIL converts it."""
    return image.convert("RGB")


def weights_hash(model):
    """The `tensors_hash` of a model: equal for all files that hold it."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors):
    """SHA-256 over the names and float32 values of {name: tensor}."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


# ---- name -> file ----------------------------------------------------------------------------------

def find(name):
    """The file that a name stands for. It exists, and one of OpenAI's has the right hash."""
    if name in PUBLISHED:
        return download(PUBLISHED[name])
    path = TINY if name == "tiny" else Path(os.path.expanduser(name))
    if path.is_file():
        return path

    if name == "tiny":
        raise FileNotFoundError(f"{path} is missing; it belongs to the repository: git checkout {path} "
                                "brings it back")
    known = ", ".join(available_models())
    if re.fullmatch(r"RN\d+(x\d+)?", name):
        raise ValueError(f"{name} has a ResNet image tower; SOT-GLP needs the patch tokens of a vision "
                         f"transformer: use one of {known}")
    raise FileNotFoundError(f"{name!r} is no file and no known model: use one of {known}, or the path of a "
                            "CLIP file (.pt, .pt.gz)")


def cache():
    """The folder of the published files."""
    # why os.path: pathlib raises RuntimeError for a user without a home, as in a container
    folder = os.path.expanduser(os.environ.get("CLIP_CACHE") or "~/.cache/clip")
    if folder.startswith("~"):
        raise FileNotFoundError("this user has no home folder, in which the weights would be kept: set "
                                "$CLIP_CACHE to a folder for them")
    return Path(folder)


def download(url):
    """An address -> its file in the cache, downloaded if it is missing. Raises ValueError for a wrong hash.

    Of the processes that torchrun started, the first of each machine downloads and the others wait. So all of
    them must call this together, and all of them fail where one does.
    why of each machine: it may have a cache of its own.
    """
    path = cache() / url.split("/")[-1]
    failure = None
    try:
        waits = has_joined() and int(os.environ.get("LOCAL_RANK") or 0) > 0
        if not (path.exists() or waits):
            fetch([url], path, published_hash(url), DOWNLOAD_LIMIT)
    except ConnectionError as error:
        failure = ConnectionError(f"{error}; --model tiny runs without a download")
    raise_first(failure)

    found = digest(path)
    if found != published_hash(url):
        raise ValueError(f"{path} has SHA-256 {found}, but OpenAI published {published_hash(url)}: "
                         "delete the file, and it will be downloaded again")
    return path


def raise_first(failure):
    """Waits for all processes that work together, and raises the first failure of any of them."""
    failures = [failure]
    if has_joined():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    for failure in filter(None, failures):
        raise failure


def published_hash(url):
    """The SHA-256 that OpenAI writes into a file's address."""
    return url.split("/")[-2]
