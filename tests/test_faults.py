"""What goes wrong: nobody loses a run, gets a number out of garbage, or reads a traceback for a typing error."""

import contextlib
import io
import itertools
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

import clip
import data
import evaluate
import ood
from extras import compare, tables, visualize
from harness import machine, places, processes, runs
import train as script
from conftest import copy, random_clip, read, train


def command(module, *arguments):
    """evaluate.py or ood.py with these arguments, in this process."""
    module.main(module.parse_args([*map(str, arguments), "--device", "cpu"]))


def error_of(action, *arguments):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        action(*arguments)
    assert "\n" not in str(stop.value) and str(stop.value).startswith("error: ")
    return str(stop.value)


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


# ---- no number from values that are not finite ---------------------------------------------------------------

def test_a_step_that_ends_in_infinity_is_not_saved(options, tmp_path):
    assert "epoch 1: plan_entropy nan, row_error nan, prompt_cosine nan: try a smaller --lr" in error_of(
        train, *options, "--lr", 3e38, "--weight-decay", 1000, "--batch-size", 9, "--output-dir", tmp_path / "run")
    assert everything(tmp_path / "run") == {}


def test_the_last_good_checkpoint_stays(options, tmp_path, monkeypatch):
    original = script.learning_rate
    monkeypatch.setattr(script, "learning_rate", lambda progress, args: math.inf if progress > 2.5 else
                        original(progress, args))
    assert "epoch 3: " in error_of(train, *options, "--output-dir", tmp_path)
    log, last = runs.read_log(tmp_path), runs.read_checkpoint(tmp_path)
    assert last["epoch"] == len(log) == 2 and not (tmp_path / "result.json").exists()
    assert all(tensor.isfinite().all() for tensor in last["learned"].values())


@pytest.mark.parametrize("action", ["evaluate", "images", "ood", "resume"])
def test_a_checkpoint_that_is_not_finite_is_refused_by_name(action, trained, options, pictures, tmp_path):
    learned = dict(read(trained)[2]["learned"])
    learned["local_prompts"] = learned["local_prompts"].clone()
    learned["local_prompts"][0, 0, 0, 0] = math.nan
    folder = copy(trained, tmp_path, learned=learned)
    actions = {"evaluate": (command, evaluate, folder), "resume": (train, *options, "--output-dir", folder, "--resume"),
               "images": (command, evaluate, folder, "--images", pictures / "test/sea/0.png"),
               "ood": (command, ood, folder, "--ood-root", f"sea={pictures}/test/sea")}
    assert "last.pt: local_prompts has values that are not finite" in error_of(*actions[action])


def test_weights_that_are_not_finite_are_refused_by_name(options, tmp_path):
    state = random_clip().state_dict()
    state["visual.ln_post.bias"][3] = math.inf
    torch.save(state, tmp_path / "clip.pt")
    assert "clip.pt: these weights: visual.ln_post.bias has values that are not finite" in error_of(
        train, *options, "--model", tmp_path / "clip.pt", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scores_that_are_not_finite_give_no_accuracy(trained, monkeypatch):
    monkeypatch.setattr("sotglp.SOTGLP.scores", lambda self, outputs: {"fused": outputs[0] * math.nan})
    found = error_of(command, evaluate, trained)
    assert "the fused scores of some test images are not finite numbers: check the weights, or use --amp off" in found


# ---- one writer, and no run lost -----------------------------------------------------------------------------

@contextlib.contextmanager
def child(function):
    """Another process in which the function runs, then waits; it is killed in the end."""
    ready, done = os.pipe()
    number = os.fork()
    if not number:
        kept = [function()]                                      # why kept: a lock lasts as long as its file
        os.write(done, b"!" * len(kept))
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"!"
    try:
        yield number
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(ready)
        os.close(done)


def test_a_second_writer_is_refused_with_the_number_of_the_first(options, tmp_path):
    with child(lambda: places.lock(tmp_path / "run")) as number:
        assert f"process {number} writes to {tmp_path}/run" in error_of(
            train, *options, "--output-dir", tmp_path / "run")
        assert everything(tmp_path / "run") == {}
    train(*options, "--epochs", 1, "--output-dir", tmp_path / "run")          # the killed process holds nothing


def test_a_process_that_was_just_killed_is_waited_for(tmp_path):
    with child(lambda: places.lock(tmp_path)) as number:
        start = time.time()
        threading.Timer(0.5, os.kill, (number, signal.SIGKILL)).start()
        places.lock(tmp_path).close()
        assert time.time() - start > 0.4


def test_a_lock_holds_the_number_of_its_process_and_no_older_one(tmp_path):
    (tmp_path / "lock").write_text("987654321")
    with places.lock(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "last.pt.tmp123").write_bytes(b"half")
    places.lock(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def wait_as_a_rank(parent):
    processes.end_with_parent()
    time.sleep(60)


def wait_as_a_command(parent):
    os.environ[processes.STARTED_BY] = str(parent)
    with machine.plain_errors():
        time.sleep(60)


@pytest.mark.parametrize("wait", [wait_as_a_rank, wait_as_a_command])
def test_a_process_ends_when_its_parent_is_gone(wait):
    # parent (killed) -> process, which holds the writing end of a pipe: the pipe ends when the process does
    reading, writing = os.pipe()

    def parent():
        number = os.getpid()
        if not os.fork():
            wait(number)
            os._exit(0)
        os.close(writing)

    with child(parent) as number:
        os.close(writing)
        os.kill(number, signal.SIGKILL)
        start = time.time()
        assert os.read(reading, 1) == b"" and time.time() - start < 10
    os.close(reading)


def test_a_command_ends_where_the_program_that_started_it_is_gone_already():
    number = os.fork()
    if not number:
        wait_as_a_command(os.getpid())                           # nobody's parent, as if it were gone
        os._exit(0)
    start = time.time()
    _, status = os.waitpid(number, 0)
    assert os.waitstatus_to_exitcode(status) == 1 and time.time() - start < 10


@pytest.mark.parametrize("left", ["last.pt", "result.json"])
def test_a_run_is_not_replaced_unasked(left, trained, options, tmp_path):
    shutil.copy(trained / left, tmp_path)
    before = everything(tmp_path)
    message = error_of(train, *options, "--output-dir", tmp_path)
    assert all(option in message for option in (str(tmp_path), "--overwrite", "--output-dir"))
    if left == "last.pt":
        assert f"python train.py --resume {tmp_path} goes on with it" in message
    else:                                                        # what was learned is gone, the result must not go too
        message = error_of(train, *options, "--output-dir", tmp_path, "--resume")
        assert "holds a run already, without a last.pt to go on from" in message
    assert everything(tmp_path) == before


def test_a_refusal_says_what_differs_and_what_works(trained, options, pictures, tmp_path):
    run = copy(trained, tmp_path / "run")
    options = (*options, "--output-dir", run)
    message = error_of(train, *options)
    assert f"{run} holds a run already, with the same options: python train.py --resume {run} shows its" in message
    (tmp_path / "run-2").mkdir()
    message = error_of(train, *options, "--seed", 2, "--epsilon", 0.2)
    assert f"with other options (seed was 1, is 2; epsilon was 0.1, is 0.2): --output-dir {run}-3 leaves" in message
    shutil.copytree(pictures, tmp_path / "others")
    message = error_of(train, *options, "--data-root", tmp_path / "others")
    assert f"with other options (data_root was {pictures}, is {tmp_path}/others)" in message
    message = error_of(train, *options, "--epsilon", 0.2, "--resume")
    assert f"(epsilon was 0.1, is 0.2): python train.py --resume {run} goes on with its own" in message


def test_overwrite_replaces_a_run_once_a_new_checkpoint_stands(trained, options, tmp_path):
    copy(trained, tmp_path)
    for name in ("evaluation.json", "evaluation.csv", "ood.json"):
        (tmp_path / name).write_text("{}")
    before = everything(tmp_path)
    error_of(train, *options, "--output-dir", tmp_path, "--overwrite", "--lr", 3e38, "--weight-decay", 1000)
    assert everything(tmp_path) == before                        # it failed before its first checkpoint
    train(*options, "--output-dir", tmp_path, "--overwrite", "--epochs", 1)
    assert {*everything(tmp_path)} == {"last.pt", "log.jsonl", "per_class.csv", "confusion.csv", "result.json"}
    assert len(read(tmp_path)[1]) == 1


def test_a_finished_run_says_so_and_stays(trained, options, tmp_path, capsys):
    before = everything(copy(trained, tmp_path))
    train(*options, "--output-dir", tmp_path, "--resume")
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path} is finished" and second.startswith(f"accuracy {read(trained)[0]['accuracy']:.2f} %")
    assert everything(tmp_path) == before


# ---- resume means the same run -------------------------------------------------------------------------------

def test_resume_without_a_checkpoint_starts_anew(trained, options, tmp_path, capsys):
    train(*options, "--output-dir", tmp_path / "run", "--resume")
    assert f"nothing to resume in {tmp_path}/run, which has no last.pt: the run starts anew" in capsys.readouterr().out
    assert read(tmp_path / "run")[0]["accuracy"] == read(trained)[0]["accuracy"]


@pytest.mark.parametrize("harm", ["missing", "short", "long", "torn"])
def test_the_log_is_mended_from_the_checkpoint(harm, trained, options, tmp_path):
    copy(trained, tmp_path)
    (tmp_path / "result.json").unlink()
    log = (tmp_path / "log.jsonl").read_text()
    harmed = {"short": log[: log.index("\n") + 1], "long": log + '{"epoch": 4}\n', "torn": log[:-20]}.get(harm)
    (tmp_path / "log.jsonl").unlink() if harmed is None else (tmp_path / "log.jsonl").write_text(harmed)
    train(*options, "--output-dir", tmp_path, "--resume")
    assert (tmp_path / "log.jsonl").read_text() == log


def test_resume_takes_every_option_from_the_run(trained, tmp_path, capsys):
    copy(trained, tmp_path)
    (tmp_path / "result.json").unlink()                          # killed before the test
    train("--resume", tmp_path)
    result = read(tmp_path)[0]
    assert result["accuracy"] == read(trained)[0]["accuracy"] and result["config"]["output_dir"] == str(tmp_path)
    args = script.parse_args(["--resume", str(trained), "--data-root", "elsewhere", "--workers", "3"])
    assert (args.data_root, args.workers, args.lr, args.shots, args.dataset) == (
        os.path.abspath("elsewhere"), 3, 0.5, 3, "folder")
    assert "lr was 0.5, is 0.1" in error_of(train, "--resume", copy(trained, tmp_path / "again"), "--lr", 0.1)
    with pytest.raises(SystemExit):
        script.parse_args(["--resume", str(trained), "--method", "gallop"])
    assert f"--resume {trained}: its method is sotglp, not gallop" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse_args(["--resume", str(trained), "--output-dir", "other"])
    assert f"--resume {trained} goes on in this folder: leave out --output-dir other" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "test"])
def test_resume_with_other_pictures_is_refused(part, options, pictures, tmp_path, monkeypatch):
    root, folder = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, root)
    options = (*options, "--data-root", root, "--output-dir", folder)
    train(*options)
    (folder / "result.json").unlink()
    if part == "train":                                          # the draw of 3 of 4 changes with the names
        for path in (root / "train/sea").iterdir():
            path.rename(path.with_stem(f"x{path.stem}"))
    else:
        (root / "test/sea/1.png").unlink()
    expected = {"train": "other training pictures (9 then, 9 now", "test": "other test pictures (7 then, 6 now"}[part]
    assert expected in error_of(train, *options, "--resume")


def test_other_precision_and_threads_are_noted(trained, options, tmp_path, capsys):
    copy(trained, tmp_path, threads=7)
    (tmp_path / "result.json").unlink()
    train(*options, "--output-dir", tmp_path, "--resume", "--amp", "bf16")
    printed = capsys.readouterr().out
    assert "note: precision was off, is bf16" in printed and "note: threads was 7, is 1" in printed


# ---- damaged and foreign files -------------------------------------------------------------------------------

HARM = {"truncated": lambda content: content[: len(content) // 2], "empty": lambda content: b"",
        "of something else": lambda content: b"junk" * 99, "no checkpoint": lambda content: pickle.dumps([1], 2),
        "changed by one bit": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]}


@pytest.mark.parametrize("harm", [*HARM, "incomplete", "of other types", "without an option"])
@pytest.mark.parametrize("action", ["evaluate", "ood", "resume"])
def test_a_damaged_checkpoint_is_one_line_in_every_command(harm, action, trained, options, tmp_path):
    copy(trained, tmp_path)
    path, checkpoint = tmp_path / "last.pt", read(trained)[2]
    if harm in HARM:
        path.write_bytes(HARM[harm](path.read_bytes()))
    elif harm == "incomplete":
        torch.save({name: value for name, value in checkpoint.items() if name != "learned"}, path)
    elif harm == "of other types":
        torch.save({**checkpoint, "class_names": [1, 2, 3]}, path)
    else:
        torch.save({**checkpoint, "config": {k: v for k, v in checkpoint["config"].items() if k != "n_iters"}}, path)
    actions = {"evaluate": (command, evaluate, tmp_path), "ood": (command, ood, tmp_path),
               "resume": (train, *options, "--output-dir", tmp_path, "--resume")}
    message = error_of(*actions[action])
    assert f"{path} is damaged" in message and "weights_only" not in message
    assert action != "resume" or path.read_bytes() != b"" or harm == "empty"


def test_a_checkpoint_of_an_unfitting_optimizer_is_damaged(trained, options, tmp_path):
    optimizer = read(trained)[2]["optimizer"]
    for harm in ({}, {**optimizer, "param_groups": []}):
        copy(trained, tmp_path, optimizer=harm)
        assert "is damaged: its optimizer state does not fit" in error_of(
            train, *options, "--output-dir", tmp_path, "--resume")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"accuracy": "high"}'])
def test_a_damaged_result_is_named_by_the_table(content, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(content)
    assert f"{tmp_path}/a/result.json is damaged" in error_of(command, tables, tmp_path)
    assert "there is no folder" in error_of(command, tables, tmp_path / "nothing")


# ---- a result is not lost, and no wrong one is made ---------------------------------------------------------------

@pytest.mark.parametrize("name", ["last.pt", "result.json", "evaluation-new.csv", "log.jsonl"])
def test_csv_replaces_no_file_of_a_run(name, trained, tmp_path):
    copy(trained, tmp_path)
    before = everything(tmp_path)
    for module in (evaluate, ood):
        assert f"--csv {tmp_path / name} has the name of a file of a run" in error_of(
            command, module, tmp_path, "--csv", tmp_path / name)
        assert f"--csv {tmp_path} is a folder" in error_of(command, module, tmp_path, "--csv", tmp_path)
    assert everything(tmp_path) == before


def test_runs_at_different_epochs_are_not_averaged_and_an_unfinished_one_is_named(trained, tmp_path, capsys):
    half = copy(trained, tmp_path / "half", epoch=1)
    assert f"{half} is another kind of run than {trained}: it stands at epoch 1, the first one at epoch 3" in error_of(
        command, evaluate, trained, half)
    command(evaluate, half)
    assert f"note: {half} is not finished: it stands at epoch 1 of 3" in capsys.readouterr().out


def test_equal_runs_are_not_averaged(trained, tmp_path):
    again = copy(trained, tmp_path / "again")
    for runs_ in ((trained, again), (trained, trained)):
        assert f"{runs_[1]} has the seeds of {trained}" in error_of(command, evaluate, *runs_)


def test_a_run_that_ends_in_the_folder_meanwhile_is_not_replaced(trained, options, tmp_path, monkeypatch):
    # a second command waits for the folder, and gets it when the first one has put its run there
    lock = places.lock
    monkeypatch.setattr(places, "lock", lambda folder: (copy(trained, folder), lock(folder))[1])
    assert f"{tmp_path / 'run'} holds a run already" in error_of(train, *options, "--output-dir", tmp_path / "run")
    assert read(tmp_path / "run")[0] == read(trained)[0]


def test_a_full_disk_names_the_file(tmp_path):
    def write(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write {tmp_path}/a.json: No space left on device"):
        machine.write_whole(tmp_path / "a.json", write)


def test_a_run_that_cannot_be_written_is_read_and_its_table_goes_elsewhere(trained, pictures, tmp_path, monkeypatch,
                                                                           capsys):
    run = copy(trained, tmp_path / "run")
    before = everything(run)
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(run))
    for module, more in ((evaluate, ()), (ood, ("--ood-root", f"sea={pictures}/train/sea"))):
        command(module, run, *more, "--csv", tmp_path / "all.csv")
        printed = capsys.readouterr().out
        assert f"note: {run} is read-only here" in printed and f"wrote {tmp_path}/all.csv" in printed
    assert everything(run) == before


def test_a_run_that_does_not_exist_is_said_to_be_missing(tmp_path):
    message = (f"error: there is no folder {tmp_path}/gone: name one that train.py wrote, such as "
               "runs/critters-16shot-seed1")
    for module in (evaluate, ood, visualize):
        assert error_of(command, module, tmp_path / "gone") == message
    assert error_of(command, compare, "--weights", tmp_path / "gone") == message
    assert error_of(train, "--resume", tmp_path / "gone") == message


def test_too_many_prompts_are_too_much_memory(options, tmp_path):
    # 2 PB: more than a process can address, so that no machine tries
    message = error_of(train, *options, "--n-global", 10**12, "--output-dir", tmp_path / "run")
    assert message.startswith("error: out of memory: ")


def test_damaged_logs_and_results_say_what_to_do(trained, tmp_path):
    copy(trained, tmp_path)
    for line in ("{", "{}", "[]"):
        (tmp_path / "log.jsonl").write_text(line)
        with pytest.raises(ValueError, match=f"log.jsonl is damaged: .*train.py --resume {tmp_path} writes it again"):
            runs.read_log(tmp_path)
    (tmp_path / "result.json").write_text("{")
    assert f"remove it, and train.py --resume {tmp_path} tests the run again" in error_of(train, "--resume", tmp_path)


# ---- typing errors -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("option", ["--output-dir", "--model", "--data-root"])
def test_an_empty_text_does_not_count_as_nothing(option, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([option, ""])
    assert f"{option} is empty" in capsys.readouterr().err


def test_fewer_workers_than_none_are_refused(trained):
    assert "--workers must not be negative, got -1" in error_of(command, evaluate, trained, "--workers", -1)


@pytest.mark.parametrize("option, complaint", [
    *((("--device", name), f"--device {name!r} is unknown") for name in ("foo", "", "mps")),
    *((("--device", name), "torch sees 0: give --device cpu") for name in ("cuda", "cuda:7")),
    *(((f"--{name}", value), f"--{name} must be a finite number and not negative, got {value}")
      for name in ("lr", "weight-decay", "epsilon", "lambda-local", "warmup-epochs") for value in ("nan", "inf")),
    *(((f"--{name}", "-1"), f"--{name} must be a finite number and not negative, got -1")
      for name in ("warmup-epochs", "workers", "lr")),
    *(((f"--{name}", str(2**64)), f"--{name} must have 64 bits at most") for name in ("seed", "split-seed"))])
def test_an_option_that_cannot_work_is_one_line_and_leaves_nothing(option, complaint, options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert complaint in error_of(train, *options, *option, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.check_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="needs 3 GPU.s., one for each process, torch sees 2"):
        machine.check_device("cuda")


def test_seeds_of_sixty_four_bits_train(options, tmp_path):
    train(*options, "--epochs", 1, "--seed", 2**63 - 1, "--split-seed", -2**63, "--output-dir", tmp_path)
    assert math.isfinite(read(tmp_path)[1][0]["loss"])


def test_a_label_of_infinity_is_named(tmp_path):
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    split = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    split.write_text('{"train": [["a.jpg", Infinity, "a"]], "val": [], "test": []}')
    with pytest.raises(ValueError, match="split_zhou_EuroSAT.json should hold lists .* OverflowError"):
        data.load("eurosat", tmp_path, 1, 1)


def test_a_folder_that_cannot_be_written_is_named(options, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in error_of(train, *options, "--output-dir", tmp_path / "file" / "run")


def test_a_full_disk_leaves_the_last_checkpoint(trained, options, tmp_path, monkeypatch):
    def save(checkpoint, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nand more")

    copy(trained, tmp_path)
    before = everything(tmp_path)
    monkeypatch.setattr(torch, "save", save)
    assert f"cannot write {tmp_path}/last.pt, is the disk full? [enforce fail" in error_of(
        train, *options, "--output-dir", tmp_path, "--overwrite")
    assert everything(tmp_path) == before


def test_each_rank_prints_its_own_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="^rank 1: error: no$"), machine.plain_errors():
        raise ValueError("no")


def test_ctrl_c_names_the_command_that_goes_on(options, tmp_path, monkeypatch):
    original, run = script.train_epoch, tmp_path / "my run"

    def interrupt(run, network, batches, epoch):
        if epoch == last:
            raise KeyboardInterrupt
        return original(run, network, batches, epoch)

    monkeypatch.setattr(script, "train_epoch", interrupt)
    for last, message in enumerate((
            "no epoch was finished; the same command starts anew",
            f"python train.py --resume '{run}' goes on after the last epoch that was finished")):
        with pytest.raises(SystemExit, match=f"^interrupted: {message}$"):
            train(*options, "--output-dir", run)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert script.how_to_go_on(script.parse_args(["--output-dir", str(run)])).startswith(
        f"torchrun --nproc_per_node=4 train.py --resume '{run}' goes on")


def test_out_of_memory_says_what_helps(options, tmp_path, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(script, "train_epoch", fill)
    message = error_of(train, *options, "--output-dir", tmp_path)
    assert "every prompt of 3 classes" in message and "--text-chunk" in message and "--checkpoint-text" in message


# ---- names and terminals -------------------------------------------------------------------------------------

def test_a_character_that_the_terminal_lacks_is_escaped(trained, pictures, tmp_path, monkeypatch):
    run = copy(trained, tmp_path, class_names=["b é", "crab 🦀", "wood"])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    command(evaluate, run, "--images", pictures / "test/sea/0.png")
    terminal.flush()
    assert b"crab \\U0001f980" in terminal.buffer.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, rank, shown", [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)])
def test_progress_is_a_line_of_rank_0_on_a_terminal(stream, rank, shown, monkeypatch):
    # each look at the clock is a second later: step i ends 2 i s after the start, so that (4 - i) * 2 s are left
    clock = itertools.count(1)
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(machine.progress(range(4), "test", rank)) == [0, 1, 2, 3]
    expected = "".join(f"\rtest {i}/4, {left} s left " for i, left in ((1, 6), (2, 4), (3, 2), (4, 0))) + "\r\033[K"
    assert sys.stderr.getvalue() == (expected if shown else "")


def test_a_closed_pipe_ends_a_command_quietly(trained):
    # as `| head -1`: nobody reads what is printed
    reading, writing = os.pipe()
    os.close(reading)
    number = os.fork()
    if not number:
        os.dup2(writing, 1)
        errors = os.open(trained.parent / "errors", os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        code = 0
        try:
            command(tables, trained.parent)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 1
    assert (trained.parent / "errors").read_text() == ""


# ---- averages and warnings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("option, complaint", [(("--lambda-local", 0.5), "lambda_local was 0.25, is 0.5"),
                                               (("--shots", 2), "shots was 3, is 2")])
def test_runs_that_differ_are_not_averaged(option, complaint, trained, options, tmp_path):
    train(*options, *option, "--seed", 2, "--epochs", 3, "--output-dir", tmp_path)
    assert f"{tmp_path} is another kind of run than {trained}: {complaint}" in error_of(
        command, evaluate, trained, tmp_path)


def test_runs_on_other_classes_or_weights_are_not_averaged(trained, tmp_path):
    changes = {"other classes": {"class_names": ["a", "b", "c"]}, "CLIP weights": {"clip_sha256": "0" * 64}}
    for complaint, change in changes.items():
        copy(trained, tmp_path / complaint, **change)
        assert complaint in error_of(command, evaluate, trained, tmp_path / complaint)


def test_names_that_the_model_cannot_tell_apart_are_a_warning(options, pictures, clip_file, tmp_path, capsys):
    state = torch.load(clip_file, weights_only=True)
    for word in ("sea", "wood"):
        state["token_embedding.weight"][clip.tokenize(word)[0, 1]] = 0
    torch.save(state, tmp_path / "clip.pt")
    train(*options, "--epochs", 1, "--model", tmp_path / "clip.pt", "--output-dir", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "warning: 3 class names are only 2 different texts to this model" in printed
    assert "\n  one text: sea, wood\n" in printed and "106 words" not in printed
    train(*options, "--epochs", 1, "--output-dir", tmp_path / "other")
    assert "warning" not in capsys.readouterr().out
