"""How long functions take, how much they compute, and how much memory a process has.

Times are medians of rounds in which the functions take turns: what disturbs the machine disturbs all alike.
"""

import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


def take_turns(functions, repeats, device):
    """{name: function} -> {name: median seconds}. A round calls each once; the first warms up."""
    seconds = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            taken = duration(function, device)
            if round_number > 0:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def duration(function, device):
    """Seconds that a function takes; on a GPU those between two of its events."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(tricks, repeats, device):
    """{trick: (plain, ours)}, functions that give tensors -> how many times faster, the largest deviation."""
    table = {}
    for trick, (plain, ours) in tricks.items():
        deviations = [(a - b).abs().max() / a.abs().max() for a, b in zip(plain(), ours(), strict=True)]
        times = take_turns({"plain": plain, "ours": ours}, repeats, device)
        table[f"trick: {trick}, times faster"] = times["plain"] / times["ours"]
        table[f"trick: {trick}, deviation"] = max(deviations).item()
    return table


def gigaflops(function):
    """Of products of matrices and the convolution. why no attention: torch counts some kinds alone."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "attention" not in str(operation)) / 1e9


def kernels(function):
    """How many kernels and copies a function starts on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def memory_rise(function):
    """MiB by which a function raises the peak of this process' memory. Linux alone tells."""
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")         # the peak counts from here on
    function()
    return (status("VmHWM") - resident) / 1024


def status(field):
    """A field of this process' status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
