"""Which GPU and which place among the processes a command takes, on machines that are not here."""

import errno
import fcntl
import signal
import sys

import pytest
import torch
import torch.distributed as dist

import data
import evaluate
import ood
import train as script
from conftest import train
from extras import compare, draw_critters, linear_probe, pretrain_tiny, tables, visualize
from harness import machine, places, processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
TWO = dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="here", MASTER_PORT="1")
ALONE = [(evaluate, ["RUN"]), (ood, ["RUN"]), (tables, ["RUN"]), (visualize, ["RUN"]), (linear_probe, []),
         (compare, [])]


@pytest.fixture
def gpus(monkeypatch):
    """A machine with some GPUs -> what was done to it: the GPU that became the current one, the backend joined."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def build(count, capability=(9, 0)):
        def set_device(device):                          # torch asks for an index
            done.append(torch.device("cuda", torch.device(device).index + 0))

        done = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: done.append(backend))
        monkeypatch.setattr(machine, "end_with_parent", lambda: done.append("watch"))
        return done
    return build


def set_environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name, index", [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_without_a_number_is_the_first_one(name, index, gpus):
    done = gpus(2)
    args = script.parse_args(["--device", name])
    assert machine.start_processes(args) == (0, 1, torch.device("cuda", index))
    assert machine.use_device(name) == torch.device("cuda", index)
    assert done == [torch.device("cuda", index)] * 2
    assert machine.use_device("cpu") == torch.device("cpu") and len(done) == 2


@pytest.fixture
def tf32():
    """TF32 and cuDNN's attention are on, as in a fresh process; afterwards all is as before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_gpu_computes_in_float32_and_without_cudnns_attention(gpus, tf32):
    gpus(1)
    machine.use_device("cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bfloat16_is_refused_where_a_gpu_lacks_it(gpus):
    gpus(1, capability=(7, 5))
    machine.check_device("cuda", "fp16")
    with pytest.raises(ValueError, match="--amp bf16 needs a GPU of compute capability 8.0 .* cuda has 7.5"):
        machine.check_device("cuda", "bf16")
    gpus(1, capability=(8, 0))
    machine.check_device("cuda", "bf16")


@pytest.mark.parametrize("count, variables, index", [
    (4, dict(LOCAL_RANK="1"), 1),                        # torchrun
    (1, dict(LOCAL_RANK="3"), 0), (1, dict(), 0)])       # srun shows each task one GPU
def test_each_process_takes_its_own_gpu(count, variables, index, gpus, monkeypatch):
    done = gpus(count)
    set_environment(monkeypatch, **TWO, **variables)
    args = script.parse_args(["--device", "cuda"])
    assert machine.start_processes(args) == (1, 2, torch.device("cuda", index))
    assert done == [torch.device("cuda", index), "nccl"]


@pytest.mark.parametrize("device, variables, complaint", [
    ("cuda", dict(), "LOCAL_RANK is not set, and this process sees 2 GPUs: set it to"),
    ("cuda", dict(LOCAL_RANK="2"), "LOCAL_RANK=2 asks for GPU 2 of this machine, torch sees 2"),
    ("cuda", dict(LOCAL_RANK="x"), "LOCAL_RANK='x' in the environment is not the number that torchrun sets"),
    ("cuda:1", dict(LOCAL_RANK="0"), "--device cuda:1 is one GPU for several processes: give --device cuda")])
def test_a_process_that_has_no_gpu_of_its_own_is_told_so(device, variables, complaint, gpus, monkeypatch):
    done = gpus(2)
    set_environment(monkeypatch, **TWO, **variables)
    with pytest.raises(ValueError, match=complaint):
        machine.start_processes(script.parse_args(["--device", device]))
    assert done == []


def test_processes_that_torchrun_started_watch_it_and_others_say_that_they_wait(gpus, monkeypatch, capsys):
    done = gpus(0)
    set_environment(monkeypatch, **TWO)
    args = script.parse_args(["--device", "cpu"])
    machine.start_processes(args)
    assert capsys.readouterr().out == "process 1 of 2 waits at here:1 for the others, up to 60 minutes\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    machine.start_processes(args)
    assert done == ["gloo", "watch", "gloo"] and capsys.readouterr().out == ""


def test_a_process_that_waits_for_others_hears_sigterm(gpus, monkeypatch):
    gpus(0)
    set_environment(monkeypatch, **TWO)
    heard = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: heard.append(signal.getsignal(signal.SIGTERM)))
    with machine.plain_errors():
        machine.start_processes(script.parse_args(["--device", "cpu"]))
    assert heard == [signal.SIG_DFL]                     # no handler of Python's, which would wait as well


def test_gloo_joins_the_gpus_where_there_is_no_nccl(gpus, monkeypatch):
    done = gpus(1)
    set_environment(monkeypatch, **TWO)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    machine.start_processes(script.parse_args(["--device", "cuda"]))
    assert done[-1] == "gloo"


def test_processes_that_do_not_come_are_one_line(gpus, monkeypatch):
    def fail(*_, **__):
        raise dist.DistStoreError("Timed out after 3601 seconds waiting for clients. 1/2 clients joined.")

    gpus(0)
    set_environment(monkeypatch, **TWO)
    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(OSError, match="the 2 processes did not meet at here:1: Timed out after 3601 seconds"):
        machine.start_processes(script.parse_args(["--device", "cpu"]))


@pytest.mark.parametrize("variables, complaint", [
    (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 says that 2 processes .* but RANK, MASTER_ADDR, MASTER_PORT is"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="here"), "but MASTER_PORT is not set: start them with torchrun"),
    (dict(TWO, RANK="2"), "RANK=2 must be below WORLD_SIZE=2"),
    (dict(TWO, MASTER_PORT="a"), "MASTER_PORT='a' in the environment is not the number"),
    (dict(TWO, RANK="-1"), "RANK='-1' in the environment is not the number that torchrun sets: unset it"),
    (dict(WORLD_SIZE="two"), "WORLD_SIZE='two' in the environment is not the number")])
def test_half_an_environment_is_named_by_training(variables, complaint, gpus, monkeypatch, options, tmp_path):
    gpus(0)
    set_environment(monkeypatch, **variables)
    with pytest.raises(SystemExit, match=complaint):
        train(*options, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, argv", ALONE)
def test_what_is_left_of_an_environment_does_not_matter_to_other_commands(module, argv, gpus, monkeypatch):
    gpus(1)
    set_environment(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert machine.use_device("cuda") == torch.device("cuda", 0)
    if argv:
        with pytest.raises(SystemExit, match="^error: "):     # there is no RUN
            module.main(module.parse_args([*argv, "--device", "cpu"]))
    assert "WORLD_SIZE" not in processes.alone()


@pytest.mark.parametrize("module, argv", [
    *ALONE, (visualize, ["--curves", "RUN"]), (data, ["--dataset", "folder", "--check"]),
    (draw_critters, ["--output", "a.png"]), (pretrain_tiny, [])])
def test_torchrun_is_refused_by_commands_that_work_alone(module, argv, gpus, monkeypatch):
    gpus(1)
    set_environment(monkeypatch, **TWO, TORCHELASTIC_RUN_ID="1")
    with pytest.raises(SystemExit, match="^rank 1: error: this command works as one process: start it"):
        module.main(module.parse_args(argv))


def test_a_restart_by_torchrun_resumes(gpus, monkeypatch):
    gpus(0)
    assert script.parse_args([]).resume is False
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert script.parse_args([]).resume is True
    # what --overwrite found in the folder may be another run
    assert script.parse_args(["--overwrite"]).resume is False


@pytest.mark.skipif(sys.platform == "win32", reason="other locks")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_noted(number, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    places.lock(tmp_path / "run").close()
    assert f"note: {tmp_path}/run is on a file system without locks" in capsys.readouterr().out
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        places.lock(tmp_path / "run")
