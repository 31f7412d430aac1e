"""Names and files of every kind give the same model, nothing in a file is run, and each failure says what to do."""

import gzip
import hashlib
import http.server
import os
import pickle
import sys
import threading
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import clip
from clip import download, loader, weights


# ---- files

def small_clip():
    """16 patches, one block of width 64 on each side, 20 tokens with a value, values that float16 holds exactly."""
    model = clip.CLIP(8, 32, 8, 64, 1, 77, 49408, 64, 1)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape).half().float()
    model.token_embedding.weight.data[20:] = 0                          # quickly compressed
    return model


def bookkeeping():
    return {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


def save(state, path):
    """Saves a state dict under this name, as the name's ending says."""
    torch.save(state, path.with_suffix(".tmp"))
    data = path.with_suffix(".tmp").read_bytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def save_archive(module, path, **methods):
    """A TorchScript archive: of the traced methods, or of the whole module where no methods and inputs are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # torch.jit is deprecated, and says so
        script = torch.jit.trace_module(module, methods) if methods else torch.jit.script(module)
        script.save(str(path))
    return path


def jit_load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))


def clip_archive(model, path):
    """The model as OpenAI publishes it: traced, and with three numbers among its weights."""
    model = deepcopy(model)
    del model.context_length
    for name, value in bookkeeping().items():
        model.register_buffer(name, value)
    return save_archive(model, path, encode_image=torch.zeros(1, 3, 32, 32))


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("form", ["plain", "half", "gzipped", "old", "archive"])
def test_every_form_of_a_file_gives_the_same_model(form, tmp_path):
    model, path = small_clip(), tmp_path / "clip.pt"
    state = model.state_dict() | bookkeeping()
    if form == "plain":
        save(state, path)
    elif form == "half":
        save({k: v.half() for k, v in state.items()}, path)
    elif form == "gzipped":
        path = save(state, tmp_path / "clip.pt.gz")
    elif form == "old":                                                 # before torch 1.6 the file was no zip
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "archive":
        clip_archive(model, path)

    loaded, preprocess = clip.load(path)
    assert same(loaded, model)
    assert clip.weights_hash(loaded) == clip.weights_hash(model)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    assert preprocess(Image.new("RGB", (40, 50))).shape == (3, 32, 32)


def test_the_hash_is_over_names_and_float32_values():
    linear = nn.Linear(1, 1).half()
    linear.weight.data.fill_(1.0)                                       # float32: 1 is 3F800000, -2 is C0000000
    linear.bias.data.fill_(-2.0)
    by_hand = b"bias" + bytes.fromhex("000000c0") + b"weight" + bytes.fromhex("0000803f")
    assert clip.weights_hash(linear) == hashlib.sha256(by_hand).hexdigest()


class Masked(nn.Module):
    """Has what is easily read wrongly: half, a view, weights that are None, and a tensor that is no weight."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 1)
        self.conv = nn.Conv2d(3, 8, 4).half()
        self.view = nn.Parameter(torch.randn(6, 4)[1:5].t())
        self.register_buffer("count", torch.tensor(7))
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            self.register_buffer(f"of_{dtype}".replace(".", "_"), torch.arange(1, 4).to(dtype))
        self.mask = torch.zeros(5, 5)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0] + self.count


def test_an_archive_has_the_state_dict_that_torch_reads_in_it(tmp_path):
    path = save_archive(Masked(), tmp_path / "masked.pt")
    ours, theirs = weights.read_state_dict(path), jit_load(path).state_dict()
    assert list(ours) == list(theirs) and "mask" not in ours
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


# ---- files that must not be trusted

class Hostile(nn.Module):
    """A TorchScript module that writes a file while it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = state[0]
        self.training = state[1]
        torch.save(state[0], "written")

    def forward(self, x):
        return x


class Command:
    def __reduce__(self):
        return os.system, ("touch written",)


def refuse(path):
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read as weights"):
        clip.load(path)
    assert not Path("written").exists()


def test_the_program_of_an_archive_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_archive(Hostile(), tmp_path / "hostile.pt")
    jit_load(path)
    assert Path("written").exists()                                     # it does write where it is run
    Path("written").unlink()
    refuse(path)


def test_a_command_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Command()}, "command.pt")
    refuse(Path("command.pt"))
    with zipfile.ZipFile("archive.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Command()}))
        archive.writestr("archive/constants.pkl", b"")
    refuse(Path("archive.pt"))


@pytest.mark.parametrize("ending", [".pt", ".pt.gz", ".archive.pt"])
def test_truncated_and_damaged_files_are_refused(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("clip" + ending)
    if ending == ".archive.pt":
        clip_archive(small_clip(), path)
    else:
        save(small_clip().state_dict(), path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-30], whole[:100], b"", b"junk" * 100, b"PK\x03\x04 and no more"):
        path.write_bytes(data)
        refuse(path)


@pytest.mark.parametrize("form", ["gzipped", "deflated", "archive"])
def test_a_file_that_unpacks_to_too_much_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LIMIT", 100_000)
    path = tmp_path / "bomb.pt"
    if form == "gzipped":
        path.write_bytes(gzip.compress(bytes(10**7)))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb/data/0", bytes(10**7))
            archive.writestr("bomb/constants.pkl" if form == "archive" else "bomb/version", b"")
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="bomb.pt: .*it unpacks to .* than 100000"):
        clip.load(path)


def test_a_storage_that_is_named_again_is_read_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.randn(6))
            self.register_buffer("two", self.one.data[2:])

        def forward(self, x):
            return x + self.one.sum() + self.two.sum()

    state = weights.read_state_dict(save_archive(Twice(), tmp_path / "twice.pt"))
    assert state["one"].untyped_storage().data_ptr() == state["two"].untyped_storage().data_ptr()
    assert torch.equal(state["two"], state["one"][2:])


@pytest.mark.parametrize("ending", [".pt", ".archive.pt"])
def test_a_single_changed_bit_is_noticed(ending, tmp_path):
    path = tmp_path / f"clip{ending}"
    clip_archive(small_clip(), path) if ending == ".archive.pt" else save(small_clip().state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        clip.load(path)


def pickled(function_state):
    """A pickle that asks for _rebuild_tensor_v2 and BUILDs a state on it."""
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + pickle.dumps(function_state, 2)[2:-1] + b"b."


@pytest.mark.parametrize("state", [{"__doc__": "changed"}, (None, {"__doc__": "changed"})], ids=["dict", "slots"])
def test_a_pickle_cannot_change_the_reader(state, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickled(state))
        archive.writestr("a/constants.pkl", b"")
    def known():
        return [(value, getattr(value, "__doc__", None)) for value in weights.ArchiveReader.known.values()]

    before = known()
    refuse(tmp_path / "a.pt")
    assert known() == before


# ---- files of other things

def test_what_is_no_state_dict_is_refused(tmp_path):
    for content in ({"weights": small_clip().state_dict()}, {"state_dict": [torch.zeros(1)]}, [torch.zeros(1)], {0: torch.zeros(1)}, torch.zeros(1)):
        with pytest.raises(ValueError, match="other.pt: holds no plain state dict"):
            clip.load(save(content, tmp_path / "other.pt"))


def test_a_file_that_is_no_clip_is_named(tmp_path):
    state = small_clip().state_dict()
    with pytest.raises(ValueError, match="linear.pt: these weights are no CLIP"):
        clip.load(save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match="resnet.pt: .*ResNet"):
        clip.load(save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt"))
    del state["visual.ln_post.bias"]
    with pytest.raises(ValueError, match="part.pt: .*missing visual.ln_post.bias"):
        clip.load(save(state, tmp_path / "part.pt"))


def test_a_file_of_another_library_is_told_the_way_out(tmp_path):
    state = {"text_model.embeddings.position_ids": torch.zeros(1), "vision_model.post_layernorm.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="hf.pt: these weights have the names of Hugging Face's .*save open_clip's"):
        clip.load(save(state, tmp_path / "hf.pt"))
    head = b'{"logit_scale": {"dtype": "F32"}}'
    (tmp_path / "model.bin").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match="model.bin: this is a safetensors file: torch.save"):
        clip.load(tmp_path / "model.bin")


def test_how_weights_of_others_are_read_is_said(tmp_path, monkeypatch, capsys):
    path = save(small_clip().state_dict(), tmp_path / "clip.pt")
    clip.load(path)
    note = capsys.readouterr().err
    assert note.startswith(f"note: {path} is none of OpenAI's files; it is read with quickgelu and attention heads 64")
    monkeypatch.setattr(loader, "PUBLISHED", {"ViT-B/16": f"x/{download.digest(path)}/ViT-B-16.pt"})
    clip.load(path)
    clip.load("tiny")
    assert capsys.readouterr().err == ""


def test_the_activation_of_others_can_be_named(tmp_path):
    path, x = save(small_clip().state_dict(), tmp_path / "clip.pt"), torch.randn(2, 5, 64)
    plain, other = clip.load(path)[0], clip.load(path, activation="gelu")[0]
    for tower in ("visual.transformer", "transformer"):
        first, second = (model.get_submodule(f"{tower}.resblocks.0.mlp") for model in (plain, other))
        hidden = first.c_fc(x)
        torch.testing.assert_close(first(x), first.c_proj(hidden * torch.sigmoid(1.702 * hidden)),
                                   atol=1e-4, rtol=0)
        # the exact one: x times the normal distribution's function
        torch.testing.assert_close(second(x), first.c_proj(hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2),
                                   atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="tiny was trained with QuickGELU"):
        clip.load("tiny", activation="gelu")


@pytest.mark.parametrize("width, heads", [(1280, 16), (1408, 16), (1664, 16), (1024, 16), (768, 12)])
def test_the_heads_of_large_towers_are_known_by_their_width(width, heads):
    # ViT-H, ViT-g and ViT-bigG of open_clip have 16 heads of 80, 88 and 104; OpenAI's are 64 wide
    model = clip.CLIP(8, 2, 1, width, 1, 77, 49408, 64, 1, width // heads)
    found = clip.build_model({name: torch.zeros(p.shape) for name, p in model.named_parameters()})
    for towers in (model, found):
        assert towers.visual.transformer.resblocks[0].attn.heads == heads
        assert towers.transformer.resblocks[0].attn.heads == 1


def test_other_perceptrons_are_refused(monkeypatch):
    state = small_clip().state_dict()
    state["visual.transformer.resblocks.0.mlp.c_fc.weight"] = torch.zeros(280, 64)
    with pytest.raises(ValueError, match="mlp.c_fc.weight has 280 rows, expected 256; open_clip's ViT-g-14"):
        clip.build_model(state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "clip.", "model.", "module._orig_mod.", "model.clip."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
def test_what_training_programs_put_around_weights_is_taken_off(prefix, entry, tmp_path, capsys):
    state = {f"{prefix}{name}": value for name, value in EMPTY.items()}
    path = save({entry: state, "epoch": 3} if entry else state, tmp_path / "wrapped.pt")
    assert [*weights.read_state_dict(path)] == [*EMPTY]
    said = f"the entry {entry!r} and the beginning" if entry else "the beginning"
    assert f"note: {path}: the weights are read without {said} {prefix!r} of all names" in capsys.readouterr().err


EMPTY = {"visual.conv1.weight": torch.zeros(0), "logit_scale": torch.zeros(0)}


def test_an_entry_without_a_prefix_is_said_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")                      # left over: this process works alone
    model = small_clip()
    loaded, _ = clip.load(save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "entry.pt"))
    assert same(loaded, model) and "without the entry 'state_dict', which" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [None, "model"])
def test_a_clip_that_is_a_part_comes_with_the_line_that_takes_it_out(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_clip()
    state = {f"backbone.clip.{name}": value for name, value in model.state_dict().items()} | {"head.bias": torch.ones(2)}
    path = save({entry: state} if entry else state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="begin with 'backbone.clip.', and it holds others, such as 'head.bias'") as error:
        clip.load(path)
    exec(str(error.value).splitlines()[-1], {})
    assert same(clip.load("clip.pt")[0], model)


def test_openais_file_under_another_name_is_known_by_its_hash(tmp_path, monkeypatch, capsys):
    path = save(small_clip().state_dict(), tmp_path / "ViT-L-14-336px.pt")
    monkeypatch.setattr(loader, "LARGE_336", download.digest(path))
    clip.load(path)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="was trained with QuickGELU"):
        clip.load(path, activation="gelu")


def test_openais_large_model_for_336_pixels_is_theirs():
    assert loader.LARGE_336 == "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"     # openai-clip 1.0.1


def test_a_name_may_be_written_as_others_write_it(tmp_path, monkeypatch):
    assert [clip.full_name(name) for name in ("ViT-B-16", "vit-b/16", "VIT-L-14", "Tiny", "RN50")] == [
        "ViT-B/16", "ViT-B/16", "ViT-L/14", "tiny", "RN50"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").touch()
    assert clip.full_name("mine.pt") == str(tmp_path / "mine.pt")


def test_unknown_names_are_told_the_known_ones():
    for name in ("ViT-B/99", "nowhere/clip.pt"):
        with pytest.raises(FileNotFoundError, match=f"'{name}'.* ViT-B/16, ViT-B/32, ViT-L/14, tiny, .*path"):
            clip.load(name)
    for name in ("RN50", "RN50x64"):
        with pytest.raises(ValueError, match=f"{name} has a ResNet"):
            clip.load(name)


def test_the_tiny_weights_are_the_published_ones_and_have_the_documented_sizes():
    assert hashlib.sha256(loader.TINY.read_bytes()).hexdigest() == \
        "9db95a94dab33b889cf6a14dc743ca1364c83c5262db08e54bdb62929487f265"        # a new one needs all figures anew
    model, preprocess = clip.load("tiny")
    state = model.state_dict()
    assert (model.visual.resolution, state["visual.conv1.weight"].shape) == (64, (128, 3, 8, 8))
    assert state["visual.positional_embedding"].shape == (1 + 8 * 8, 128)
    assert len(model.visual.transformer.resblocks) == 4 and len(model.transformer.resblocks) == 3
    assert state["text_projection"].shape == state["visual.proj"].shape == (128, 128)
    assert state["positional_embedding"].shape == (77, 128)
    table = state["token_embedding.weight"]
    assert table.shape == (49408, 128) and table.any(1).sum() == 106              # of the words that it knows
    assert sum(v.numel() for v in state.values()) - table.numel() == pytest.approx(1.46e6, rel=.01)
    assert preprocess(Image.new("RGB", (70, 80))).shape == (3, 64, 64)


@pytest.mark.parametrize("name", ["tiny", loader.TINY])
def test_a_model_is_put_on_the_device(name):
    assert {p.device.type for p in clip.load(name, device="meta")[0].parameters()} == {"meta"}


def test_a_file_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = small_clip()
    save(model.state_dict(), tmp_path / "clip.pt")
    assert same(clip.load("~/clip.pt")[0], model)


def test_missing_tiny_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "TINY", tmp_path / "tiny.pt.gz")
    with pytest.raises(FileNotFoundError, match="tiny.pt.gz is missing"):
        clip.load("tiny")
    model = small_clip()
    save(model.state_dict(), loader.TINY)
    assert same(clip.load("tiny")[0], model)


# ---- downloads, from this machine itself

class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`, (status, body, promised length), the last one for ever."""

    daemon_threads = True                                               # no answer keeps the tests waiting

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = answers, 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body, length = self.server.answers[min(self.server.requests, len(self.server.answers) - 1)]
        self.server.requests += 1
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """What is on this machine is asked for directly, whatever proxy the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(data, answers): makes ViT-B/16 a file of these bytes on a loopback server; the cache is empty."""
    servers = []

    def start(data, *answers):
        server = Server([(200, data, len(data)), *answers][bool(answers):])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        server.url = f"http://127.0.0.1:{server.server_port}/{hashlib.sha256(data).hexdigest()}/ViT-B-16.pt"
        monkeypatch.setitem(loader.PUBLISHED, "ViT-B/16", server.url)
        return server

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("*"))


def test_a_published_file_is_downloaded_once(publish, tmp_path, capfd):
    model = small_clip()
    server = publish(clip_archive(model, tmp_path / "published.pt").read_bytes())
    for _ in range(2):
        assert same(clip.load("ViT-B/16")[0], model)
    assert server.requests == 1
    assert cached(tmp_path) == ["ViT-B-16.pt"]
    assert capfd.readouterr().err == f"downloading {server.url}\n"


def test_the_cache_may_be_deep_and_is_below_the_home_folder_unless_it_is_named(publish, tmp_path, monkeypatch):
    model = small_clip()
    data = save(model.state_dict(), tmp_path / "clip.pt").read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache, folder in ((None, ".cache/clip"), ("", ".cache/clip"), ("~/one/two", "one/two")):
        monkeypatch.delenv("CLIP_CACHE") if cache is None else monkeypatch.setenv("CLIP_CACHE", cache)
        publish(data)
        assert same(clip.load("ViT-B/16")[0], model)
        (tmp_path / folder / "ViT-B-16.pt").unlink()                    # it was there


class Terminal:
    """Stands in for stderr where someone looks on."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("length, total", [(3 * 2**20, 3), (None, 0)])
def test_a_terminal_shows_how_much_has_come(length, total, publish, tmp_path, monkeypatch):
    model, screen = small_clip(), Terminal()
    data = save(model.state_dict(), tmp_path / "clip.pt.gz").read_bytes().ljust(3 * 2**20, b"\0")     # 3 MiB
    server = publish(data, (200, data, length))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        assert same(clip.load("ViT-B/16")[0], model)
    assert screen.text == f"downloading {server.url}\n" + "".join(f"\r{i} of {total} MiB " for i in (1, 2, 3)) + "\n"
    assert (tmp_path / "cache/ViT-B-16.pt").read_bytes() == data


def test_a_download_does_not_wait_for_ever(publish, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "urlopen", lambda *_, timeout=None: asked.append(timeout) or open(os.devnull + "/x"))
    publish(b"weights")
    with pytest.raises(ConnectionError):
        clip.load("ViT-B/16")
    assert asked == [60]


@pytest.mark.parametrize("answer, words", [
    ((404, b"", 0), "cannot download http.*ViT-B-16.pt to .*404.* put it there; --model tiny runs without a download$"),
    ((200, b"weig", 7), "only 4 of 7 bytes"),
    ((200, b"another", 7), "it sent 7 bytes with the digest .*, expected .*does a proxy answer in its place"),
])
def test_a_failed_download_leaves_nothing(answer, words, publish, tmp_path):
    publish(b"weights", answer)
    with pytest.raises(ConnectionError, match=words):
        clip.load("ViT-B/16")
    assert cached(tmp_path) == []


def test_without_a_connection_the_error_says_where_to_put_the_file(publish, tmp_path):
    server = publish(b"weights")
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=f"cannot download {server.url} to .*cache/ViT-B-16.pt"):
        clip.load("ViT-B/16")


def test_a_cache_that_cannot_be_made_is_explained_too(publish, tmp_path, monkeypatch):
    publish(b"weights")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(ConnectionError, match="cannot download http.* put it there"):
        clip.load("ViT-B/16")


def test_a_server_that_sends_too_much_is_cut_off(publish, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "DOWNLOAD_LIMIT", 1000)
    server = publish(bytes(2000))
    with pytest.raises(ConnectionError, match=f"cannot download {server.url} to .*more than the 1000 bytes"):
        clip.load("ViT-B/16")
    assert cached(tmp_path) == []


def test_a_server_that_drips_is_left(monkeypatch):
    # a byte per call, 20 s apart: after 3 bytes and 60 s it is slower than 1000 bytes per second
    class Drip:
        headers = {"Content-Length": "1000000"}

        def read1(self, n):
            return b"x"

    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    with pytest.raises(TimeoutError, match="only [0-9]+ bytes came in [0-9]+ s"):
        list(download.chunks(Drip(), 10**9))


def test_an_interrupted_download_leaves_nothing(publish, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    publish(b"weights")
    monkeypatch.setattr(download.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clip.load("ViT-B/16")
    assert cached(tmp_path) == []


def test_a_cached_file_with_a_wrong_hash_is_named_and_kept(publish, tmp_path):
    server = publish(b"weights")
    path = tmp_path / "cache" / "ViT-B-16.pt"
    path.parent.mkdir()
    path.write_bytes(b"another")
    found, expected = (hashlib.sha256(data).hexdigest() for data in (b"another", b"weights"))
    with pytest.raises(ValueError, match=f"{path} has SHA-256 {found}, .* {expected}: delete the file"):
        clip.load("ViT-B/16")
    assert path.read_bytes() == b"another" and server.requests == 0


def test_only_a_published_archive_may_run_when_the_reader_fails(tmp_path, monkeypatch):
    def fail(path):
        raise ValueError("the reader failed")

    model = small_clip()
    path = clip_archive(model, tmp_path / "clip.pt")
    monkeypatch.setattr(loader, "read_state_dict", fail)
    with pytest.raises(ValueError, match="clip.pt: the reader failed"):
        clip.load(path)
    monkeypatch.setitem(loader.PUBLISHED, "ViT-B/16", f"https://example.org/{download.digest(path)}/clip.pt")
    assert same(clip.load(path)[0], model)


def test_a_published_file_that_nobody_can_read_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "clip.pt"
    path.write_bytes(b"neither nor")
    monkeypatch.setitem(loader.PUBLISHED, "ViT-B/16", f"https://example.org/{download.digest(path)}/clip.pt")
    with pytest.raises(ValueError, match="clip.pt is OpenAI's file, but neither this program nor torch can read it"):
        clip.load(path)


def test_a_published_archive_is_run_without_a_warning(tmp_path, monkeypatch):
    def fail(path):
        raise ValueError("the reader failed")

    saved = small_clip()
    path = clip_archive(saved, tmp_path / "clip.pt")
    monkeypatch.setattr(loader, "read_state_dict", fail)
    monkeypatch.setitem(loader.PUBLISHED, "ViT-B/16", f"https://example.org/{download.digest(path)}/clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = clip.load(path)
    assert clip.weights_hash(model) == clip.weights_hash(saved)


def test_a_second_process_of_a_machine_downloads_nothing(publish, monkeypatch):
    server = publish(b"weights")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(loader.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loader, "raise_first", lambda failure: None)
    with pytest.raises(FileNotFoundError):
        clip.load("ViT-B/16")
    assert server.requests == 0


@pytest.mark.parametrize("left_over", ["1", "x"])
def test_a_local_rank_that_is_left_over_is_not_read(left_over, publish, monkeypatch):
    server = publish(b"weights")
    monkeypatch.setenv("LOCAL_RANK", left_over)
    loader.download(server.url)
    assert server.requests == 1


def test_what_failed_for_another_process_is_raised_here(publish, tmp_path, monkeypatch):
    def gather(failures, own):
        failures[:] = [ConnectionError("of the other"), own]

    publish(b"weights")
    monkeypatch.setattr(loader.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loader.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loader.dist, "all_gather_object", gather)
    with pytest.raises(ConnectionError, match="of the other"):
        clip.load("ViT-B/16")


def test_the_published_files_are_openais():
    assert clip.available_models() == ["ViT-B/16", "ViT-B/32", "ViT-L/14", "tiny"]
    assert loader.PUBLISHED == {name: f"https://openaipublic.azureedge.net/clip/models/{digest}/{file}"
                                for name, digest, file in [
        ("ViT-B/16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
        ("ViT-B/32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
        ("ViT-L/14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt")]}


# ---- preprocessing

def plain(mode, size=(50, 40)):
    """A picture of the one colour (255, 0, 51), or of grey 51, in this mode."""
    image = Image.new("RGB", size, (255, 0, 51))
    if mode == "RGBA":
        image.putalpha(255)
    elif mode == "P":
        image = image.quantize(2)
    elif mode == "L":
        image = Image.new("L", size, 51)
    elif mode == "CMYK":
        image = Image.new("CMYK", size, (0, 255, 204, 0))              # 255 minus red, green and blue; no black
    return image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_a_picture_of_one_colour_stays_so(mode):
    image = plain(mode)
    assert image.mode == mode
    red, green, blue = (51, 51, 51) if mode == "L" else (255, 0, 51)
    expected = [(red / 255 - 0.48145466) / 0.26862954,                  # CLIP's mean and deviation of each channel
                (green / 255 - 0.4578275) / 0.26130258,
                (blue / 255 - 0.40821073) / 0.27577711]
    pixels = clip.preprocess(16)(image)
    torch.testing.assert_close(pixels, torch.tensor(expected)[:, None, None].expand(3, 16, 16))


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (72, 24)])
def test_the_middle_square_is_kept(size):
    image = Image.new("L", size)
    image.paste(255, (size[0] // 3, 0, 2 * size[0] // 3, size[1]) if size[0] > size[1] else (0, 8, 8, 16))
    pixels = clip.preprocess(8)(image)                                  # the shorter side becomes 8
    white = torch.tensor([(1 - m) / s for m, s in zip(loader.MEAN, loader.STD)])
    assert pixels.shape == (3, 8, 8)
    torch.testing.assert_close(pixels[:, 2:6, 2:6], white[:, None, None].expand(3, 4, 4), atol=0.05, rtol=0)


def bytes_of(pixels):
    """Normalised pixels (3, R, R) -> 0 to 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (loader.MEAN, loader.STD))
    return (pixels * std + mean) * 255


def test_resizing_is_bicubic():
    image = Image.new("L", (8, 8), 64)
    image.paste(192, (4, 0, 8, 8))
    grey = bytes_of(clip.preprocess(16)(image))
    assert grey.min() < 62 and grey.max() > 194        # a cubic goes beyond the values at an edge; a line never does


def test_a_palette_is_resized_before_it_becomes_rgb():
    # Pillow takes the nearest colours of a palette; in RGB it would mix red and blue
    image = Image.new("P", (9, 9))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([i % 2 for i in range(81)])
    colours = bytes_of(clip.preprocess(8)(image)).round().int().flatten(1).T.unique(dim=0)
    assert colours.tolist() == [[0, 0, 255], [255, 0, 0]]


def test_what_is_transparent_becomes_black():
    # Pillow weighs colours with their opacity when it resizes, so that no green is left; in RGB it would be green
    image = Image.new("RGBA", (9, 9), (0, 255, 0, 0))
    assert bytes_of(clip.preprocess(8)(image)).abs().max() < .01


def test_preprocessing_can_be_sent_to_workers():
    again = pickle.loads(pickle.dumps(clip.preprocess(16)))
    assert torch.equal(again(plain("RGB")), clip.preprocess(16)(plain("RGB")))
