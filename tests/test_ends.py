"""How commands end: with one line, and nothing left behind; and what they say of input that cannot work."""

import errno
import http.client
import io
import os
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import data
import evaluate
import ood
from clip import loader
from conftest import COLOURS, copy, random_clip, read, train
from extras import compare, reuse, tables, visualize
from harness import configuration, machine, places, predict, runs, streams
from methods.zero_shot import ZeroShot
from sources import files, folders, listing, overlap
from test_faults import command, error_of, everything
import train as script


# ---- nothing to print to -----------------------------------------------------------------------------------

class Full(io.StringIO):
    """A stream on a full disk."""
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", ["full", "missing", "closed"])
def test_nothing_to_print_to_stops_no_run(stream, options, tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, {"full": Full(), "missing": None, "closed": closed}[stream])
    train(*options, "--epochs", 1, "--output-dir", tmp_path)
    assert read(tmp_path)[2]["epoch"] == 1


def test_a_full_standard_output_is_no_error_at_the_end_either():
    # Python itself flushes what was not written when the program ends
    number = os.fork()
    if not number:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = open(1, "w", closefd=False)
        with machine.plain_errors():
            print("lost")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


# ---- what stops a command from outside ---------------------------------------------------------------------

def test_sigterm_ends_a_run_with_the_command_that_goes_on(options, tmp_path, monkeypatch):
    original = script.train_epoch

    def terminated(run, network, batches, epoch):
        if epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(run, network, batches, epoch)

    monkeypatch.setattr(script, "train_epoch", terminated)
    with pytest.raises(SystemExit, match=f"^terminated: python train.py --resume {tmp_path} goes on after"):
        train(*options, "--output-dir", tmp_path)
    assert read_epoch(tmp_path) == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def read_epoch(run):
    return runs.read_checkpoint(run)["epoch"]


class Slow(torch.utils.data.Dataset):
    """Pictures that take long to read; what reads them leaves its number."""
    def __init__(self, folder, harm=None):
        self.folder, self.harm = folder, harm

    def __getitem__(self, i):
        (Path(self.folder) / str(os.getpid())).touch()
        if self.harm:
            self.harm()
        time.sleep(60)

    collate = staticmethod(list)


def wait_until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="counts processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_that_reads_pictures_outlives_its_command(number, tmp_path):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            with machine.plain_errors():
                next(iter(data.train_loader(Slow(tmp_path), [[0], [1]], workers=2)))
        finally:
            from multiprocessing.util import _exit_function  # as Python does when a program ends
            _exit_function()
            os._exit(1)
    assert wait_until(lambda: len(os.listdir(tmp_path)) == 2)
    os.kill(child, number)
    os.waitpid(child, 0)
    assert wait_until(lambda: not any(map(is_alive, os.listdir(tmp_path))))


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="a signal of Unix")
def test_sigterm_of_a_whole_job_leaves_one_line():
    # torch's own handler of SIGCHLD raises an error for each process of its loaders that the signal ended
    kept = signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("heard of a child"))
    try:
        with pytest.raises(SystemExit, match="^terminated$"), machine.plain_errors():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, kept)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_in_a_destructor_is_not_lost(name):
    class Busy:
        def __del__(self):
            signal.raise_signal(getattr(signal, name))

    with pytest.raises(SystemExit, match="^(terminated|interrupted)$"), machine.plain_errors():
        Busy()
        time.sleep(10)


def test_signals_have_their_defaults_while_a_process_waits_outside_python():
    numbers = signal.SIGINT, signal.SIGTERM
    with machine.plain_errors():
        before = [signal.getsignal(number) for number in numbers]
        with streams.signals_end_at_once():
            during = [signal.getsignal(number) for number in numbers]
        after = [signal.getsignal(number) for number in numbers]
    assert during == [signal.SIG_DFL] * 2
    assert after == before and signal.SIG_DFL not in before


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def refused():
    raise ValueError("cannot read picture a.jpg: it is torn")


def full():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device")


@pytest.mark.parametrize("harm, expected", [
    (killed, "the processes that read pictures cannot go on (DataLoader worker"),
    (full, "the processes that read pictures cannot go on (unable to allocate shared memory"),
    (refused, "error: cannot read picture a.jpg: it is torn")])
def test_what_a_process_that_reads_pictures_meets_is_one_line(harm, expected, tmp_path):
    def read_all():
        with machine.plain_errors():
            [*data.train_loader(Slow(tmp_path, harm), [[0], [1]], workers=1)]

    message = error_of(read_all)
    assert expected in message and (harm is refused or "--workers 0" in message)


@pytest.mark.parametrize("error, expected", [
    (RuntimeError("[gloo/pair.cc:5] Connection closed by peer [::1]:1\nmore"), "another process of this run"),
    (OSError(errno.ENOSPC, "No space left on device"), "--workers 0"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "No space left on device: 'runs/a'"),
    (MemoryError(), "out of memory"), (MemoryError("out of GPU memory: give less"), "out of GPU memory: give"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "")])
def test_errors_in_words(error, expected):
    text = streams.in_words(error)
    assert expected in text and bool(text) == bool(expected) and "\n" not in text


# ---- files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_just_now_is_not_damaged(number, trained, clip_file, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert "damaged" not in error_of(command, evaluate, trained)
    from clip import weights
    with monkeypatch.context() as patch:
        patch.setattr(weights.zipfile, "is_zipfile", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            weights.read_state_dict(clip_file)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_not_damage(error, trained, monkeypatch):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    assert error_of(command, evaluate, trained).startswith("error: out of memory")


@pytest.mark.parametrize("error", [tarfile.ReadError("truncated"), zipfile.BadZipFile("no zip"), EOFError(),
                                   http.client.IncompleteRead(b"half"), KeyboardInterrupt()])
def test_a_download_that_breaks_off_leaves_nothing_and_says_so_in_words(error, tmp_path, monkeypatch):
    class EuroSAT:
        def __init__(self, root, download):
            (Path(root) / "eurosat/2750/a").mkdir(parents=True)
            (Path(root) / "eurosat/2750/a/0.jpg").write_text("half")
            raise error

    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat/mine.txt").write_text("mine")
    (tmp_path / "eurosat.part").mkdir()                                  # somebody's own, too
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", EuroSAT)
    arguments = data.parse_args(["--dataset", "eurosat", "--data-root", str(tmp_path), "--download"])
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    interrupted = isinstance(error, KeyboardInterrupt)
    start = "interrupted" if interrupted else "error: eurosat: torchvision could not download"
    assert str(stop.value).startswith(start)
    assert {path.name for path in tmp_path.rglob("*")} == {"eurosat", "mine.txt", "eurosat.part"}


def test_a_download_joins_what_is_there(tmp_path):
    for name in ("new/eurosat/2750/0.jpg", "new/eurosat/mine.txt", "root/eurosat/mine.txt", "root/eurosat/split.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files.move_into(tmp_path / "new", tmp_path / "root")
    assert (tmp_path / "root/eurosat/2750/0.jpg").exists() and (tmp_path / "root/eurosat/split.json").exists()
    assert (tmp_path / "root/eurosat/mine.txt").read_text() == "root/eurosat/mine.txt"     # not the new one


def test_a_pipe_among_pictures_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="cannot read picture .*a.jpg: OSError: no regular file"):
        data.read_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name, read", [
    ("classnames.txt", folders.own_names), ("result.json", runs.read_result), ("log.jsonl", runs.read_log),
    ("ood.json", lambda folder: reuse.read_measurement(folder / "ood.json")),
    ("compare.json", lambda folder: compare.check_replaceable(folder / "compare.json")),
    ("eurosat/split_zhou_EuroSAT.json", lambda folder: data.load("eurosat", folder, 1, 1)),
    ("last.pt", lambda folder: places.check_free(folder, {}, overwrite=True)),
    ("log.jsonl", lambda folder: places.check_free(folder, {}, resume=True))])
def test_a_pipe_in_place_of_a_list_or_a_file_of_a_run_is_not_waited_for(name, read, tmp_path):
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"{name} is no regular file: put one there, or remove it"):
        read(tmp_path)


def test_two_pipes_among_pictures_are_no_twins(tmp_path):
    items = [(str(tmp_path / name), 0, "a") for name in ("a.jpg", "b.jpg")]
    for path, *_ in items:
        os.mkfifo(path)
    assert files.twins({"train": items}) == []


def test_tilde_is_the_users_folder_in_every_option(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.parse_args(["--output-dir=~/run"]).output_dir == f"{tmp_path}/run"
    args = evaluate.parse_args(["~/run", "--images", "~/a.jpg", "~/b", "--csv=~/all.csv"])
    assert (args.runs, args.images, args.csv) == (
        [f"{tmp_path}/run"], [f"{tmp_path}/a.jpg", f"{tmp_path}/b"], f"{tmp_path}/all.csv")
    assert visualize.parse_args(["run", "--output=~/here"]).output == f"{tmp_path}/here"
    assert f"there is no folder {tmp_path}/gone" in error_of(train, "--resume=~/gone")


# ---- pictures of somebody's own program --------------------------------------------------------------------

def test_a_picture_that_cannot_be_read_has_its_turn(trained, pictures, tmp_path):
    torn = tmp_path / "torn.png"
    content = (pictures / "test/sea/0.png").read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    fine = Image.open(pictures / "test/sea/0.png")
    given = [fine, Image.open(torn), Image.new("RGB", (0, 5)), fine]
    found = [*predict.predictions(evaluate.load_run(trained), given)]
    kinds = [type(prediction).__name__ for _, prediction in found]
    assert kinds == ["Prediction", "ValueError", "ValueError", "Prediction"]
    assert all(f"cannot read picture number {i + 1}, a PIL image: " in str(found[i][1]) for i in (1, 2))


def test_predict_refuses_what_cannot_work(trained, pictures):
    picture = pictures / "test/sea/0.png"
    model = evaluate.load_run(trained)
    for options in (dict(top=0), dict(batch_size=0), dict(batch_size=-1), dict(top=1.5), dict(top="5"),
                    dict(batch_size=None), dict(batch_size=2.5)):
        with pytest.raises(ValueError, match="top and batch_size must be at least 1"):
            next(evaluate.predict(model, picture, **options))
    for other in (model.double(), model.half()):
        with pytest.raises(ValueError, match=r"the model must be in float32, .* found torch.float"):
            next(evaluate.predict(other, picture))


def test_pictures_without_an_end_are_read_as_they_come(trained, pictures):
    def endless():
        while True:
            yield pictures / "test/sea/0.png"

    found = evaluate.predict(evaluate.load_run(trained), endless(), batch_size=2)
    assert len([next(found) for _ in range(3)]) == 3


# ---- options and data that do not go together --------------------------------------------------------------

@pytest.mark.parametrize("given, expected", [
    ("--words=a_photo_of_a", 4), ("--n-context 8", 8), ("--words=a_photo --n-context 2", 2)])
def test_the_configuration_says_how_many_vectors_there_are(given, expected):
    args = script.parse_args(["--method", "coop", *(word.replace("_", " ") for word in given.split())])
    configuration.check_args(args, 1)
    assert args.n_context == expected


@pytest.mark.parametrize("given, complaint", [
    (["--method", "coop", "--words", "a photo of a", "--n-context", "8"], "4 vectors, but --n-context is 8"),
    (["--method", "coop", "--words", "a photo of a", "--n-context", "16"], "4 vectors, but --n-context is 16"),
    (["--warmup-epochs", "5", "--epochs", "4"], "--warmup-epochs 5 is longer than the run, --epochs 4")])
def test_options_that_contradict_each_other_are_refused(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        configuration.check_args(script.parse_args(given), 1)


def test_resume_of_nothing_does_not_hide_what_contradicts(tmp_path):
    given = ["--method", "coop", "--words", "a photo of a", "--n-context", "8", "--resume"]
    with pytest.raises(ValueError, match="4 vectors, but --n-context is 8"):
        configuration.check_args(script.parse_args([*given, "--output-dir", str(tmp_path)]), 1)


def test_a_warm_up_that_is_given_is_kept():
    assert script.parse_args(["--warmup-epochs", "2", "--epochs", "4"]).warmup_epochs == 2
    assert script.parse_args(["--epochs", "4"]).warmup_epochs == pytest.approx(0.4)    # a tenth


@pytest.mark.parametrize("arguments, name", [
    (["--words", "  ", "--method", "coop"], "--words"), (["--resume", ""], "--resume"),
    (["--output-dir", " "], "--output-dir")])
def test_a_blank_text_is_refused(arguments, name, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments)
    assert f"{name} is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.parse_args([""])
    assert "RUN is empty" in capsys.readouterr().err


def test_a_name_that_does_not_fit_the_template_fails_before_training(options, clip_model, tmp_path):
    long = "word " * 72                     # with "a photo of a", the full stop, [SOS] and [EOT] they are 79
    with pytest.raises(ValueError, match="does not fit with the template 'a photo of a {}.' into 77 tokens: "):
        ZeroShot(clip_model, [long])
    assert "does not fit with the template" in error_of(
        train, *options, "--template", 3 * "more " + long + "{}", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- readers of a run --------------------------------------------------------------------------------------

def test_training_pictures_that_changed_are_not_drawn(trained, pictures, tmp_path):
    root = tmp_path / "moved"
    for split in ("train", "test"):
        for name in COLOURS:
            (root / split / name).mkdir(parents=True)
            for path in (pictures / split / name).iterdir():
                (root / split / name / f"x{path.name}").write_bytes(path.read_bytes())
    for option in (("--batch",), ("--split", "train")):
        option = (*option, "--data-root", root, "--output", tmp_path / "out")
        message = error_of(command, visualize, trained, *option)
        assert "other training pictures (9 then, 9 now" in message and "--data-root" in message


def test_data_that_is_gone_names_data_root(trained, tmp_path):
    config = {**read(trained)[2]["config"], "data_root": str(tmp_path / "gone")}
    run = copy(trained, tmp_path / "run", config=config)
    for action in ((command, evaluate, run), (train, "--resume", run)):
        assert "gone, which had the pictures of the run: --data-root names where they" in error_of(*action)


def test_equal_names_elsewhere_are_other_pictures(trained, pictures, tmp_path, capsys):
    import shutil
    # the run was trained on train/<class>/0.png and the like, of another folder
    for name in COLOURS:
        shutil.copytree(pictures / "train" / name, tmp_path / "others/test" / name)
        shutil.copytree(pictures / "train" / name, tmp_path / "others/train" / name)
    checkpoint = runs.read_checkpoint(trained)
    named = [path.replace("train/", "test/") for path in checkpoint["training"]]
    run = copy(trained, tmp_path / "run", training=named)
    command(evaluate, run, "--on", "folder", "--data-root", tmp_path / "others")
    assert "on 12 test images" in capsys.readouterr().out


@pytest.mark.parametrize("harm", [{"config": {}}, {"config": []}, {"config": {"method": "sotglp"}},
                                  {"shots": "many"}])
def test_a_damaged_configuration_is_named_by_the_table(harm, trained, tmp_path):
    run = copy(trained, tmp_path / "runs/one")
    machine.write_json(run / "result.json", {**read(run)[0], **harm})
    assert f"{run}/result.json is damaged" in error_of(command, tables, tmp_path / "runs")


def test_a_table_of_somebodys_own_is_not_replaced(trained, tmp_path):
    run = copy(trained, tmp_path / "runs/one")
    machine.write_json(run / "result.json", {**read(run)[0], "model": "ViT-B/16"})
    (tmp_path / "runs/table.csv").write_text("a,b\n1,2\n")
    assert "table.csv is no table of this program" in error_of(command, tables, tmp_path / "runs")
    (tmp_path / "runs/table.csv").unlink()
    for _ in range(2):                                           # its own table it replaces
        command(tables, tmp_path / "runs")
    assert len(everything(tmp_path / "runs/one")) == len(everything(run))


# ---- what is named before the work -------------------------------------------------------------------------

def test_links_between_class_folders_are_read_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").touch()
        (tmp_path / name / "x").symlink_to(tmp_path / other)
    (tmp_path / "a/up").symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in listing.walk(str(tmp_path / "a")).pictures]
    assert found == ["a/0.jpg", "a/x/0.jpg"]


def test_ood_pictures_that_are_in_distribution_are_named(trained, pictures, tmp_path, capsys):
    import shutil
    shutil.copytree(pictures / "train/sea", tmp_path / "other")          # three of its four were trained on
    shutil.copy(pictures / "test/wood/0.png", tmp_path / "other/x.png")
    command(ood, copy(trained, tmp_path / "run"), "--ood-root", f"other={tmp_path}/other")
    printed = capsys.readouterr().out
    assert "warning: other holds 4 pictures that are in-distribution, first " in printed
    assert printed.index("warning: other holds") < printed.index("FPR95 / AUROC")


def test_equal_sizes_are_not_equal_pictures(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "else")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert overlap.shared([a, c, "critters/test/0/1"], [b, "critters/test/0/1"]) == [a, "critters/test/0/1"]


def test_all_that_ood_cannot_read_is_named_before_the_scores(trained, pictures, tmp_path, monkeypatch):
    (tmp_path / "bad.jpg").write_text("?")
    (tmp_path / "worse.jpg").write_text("?")
    monkeypatch.setattr(ood, "score_sets", None)
    with pytest.raises(SystemExit, match="2 of 9 pictures cannot be read.*\n.*bad.jpg.*\n.*worse.jpg"):
        command(ood, trained, "--ood-root", f"other={tmp_path}")


def test_no_home_names_clip_cache(monkeypatch):
    monkeypatch.delenv("CLIP_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)       # as for a user without a home
    with pytest.raises(FileNotFoundError, match="set .CLIP_CACHE"):
        loader.download("https://example.com/0/ViT-B-16.pt")


@pytest.mark.parametrize("path, complaint", [("critters/test/0/900", "there is no test picture 900"),
                                             ("critters/ood/near/200", "there is no picture 200: each OOD set has 200"),
                                             ("critters/ood/nothing/1", "the drawn OOD sets are near, ")])
def test_a_drawn_picture_that_does_not_exist_is_named(path, complaint):
    with pytest.raises(ValueError, match=f"{path}: {complaint}"):
        data.read_image(path)


def test_a_split_file_nested_without_an_end_is_named(tmp_path):
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="split_zhou_EuroSAT.json should hold lists .* RecursionError"):
        data.load("eurosat", tmp_path, 1, 1)


def test_a_measurement_nested_without_an_end_is_named(tmp_path):
    (tmp_path / "ood.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="ood.json is damaged: .*recursion"):
        reuse.read_measurement(tmp_path / "ood.json")


@pytest.mark.parametrize("text", ["mine", "3", "[[1]]", '[{"row": 1}]'])
def test_a_comparison_of_somebodys_own_is_not_replaced(text, tmp_path):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ValueError, match="compare.json is no table of this program"):
        compare.check_replaceable(tmp_path / "compare.json")
    machine.write_json(tmp_path / "compare.json", [{"dataset": "critters", "shots": 1, "row": "coop"}])
    compare.check_replaceable(tmp_path / "compare.json")
