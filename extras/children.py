"""Runs the commands of jobs side by side, and lets none of them outlive this program.

Each command is a process of its own, which is told who started it, and ends when that process is gone.
Read it from `run_all`.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import processes, results, runs

PROJECT = Path(__file__).parent.parent
PAUSE = 0.2              # seconds between two looks at the running commands
PATIENCE = 20            # seconds that they have to end when they are asked to
LINES_OF_AN_ERROR = 10   # that are shown; output.txt has all


def run_all(jobs, at_once, threads):
    """Runs what is missing, `at_once` jobs at a time, and says after each how long the rest takes.

    threads: how many each has, 0: as many as it likes. Raises ValueError where some failed, when all others
    are done.
    """
    waiting = [job for job in jobs if job.missing]
    running = []
    failed = []
    n_jobs = len(waiting)
    announce(jobs, waiting, at_once)
    try:
        while waiting or running:
            start_ready(waiting, running, at_once, threads)
            if not running:
                failed += [f"{job}: the run that it starts from failed" for job in waiting]
                break

            time.sleep(PAUSE)
            for child in [*running]:
                if child.has_ended():
                    running.remove(child)
                    left = waiting + [other.job for other in running]
                    report(child, f"{n_jobs - len(left)} of {n_jobs}", minutes(jobs, left, at_once))
                    if child.error:
                        failed.append(f"{child.job}: {child.error}")
    finally:
        end(running)

    if failed:
        raise ValueError(f"{len(failed)} runs failed, the others are kept; RUN/output.txt has more:\n"
                         + "\n".join(failed))


def start_ready(waiting, running, at_once, threads):
    """Moves jobs from waiting to running: as many as may run, of those whose start is finished."""
    for job in [*waiting]:
        if len(running) < at_once and (job.after is None or (job.after / "result.json").exists()):
            waiting.remove(job)
            running.append(Child(job, threads))


def report(child, position, left):
    """One line about a job that has ended, more where its error has more."""
    result = child.error or results.accuracies_line(runs.read_result(child.job.folder))
    print(f"{position}: {child.job}: {result}; {left} left", flush=True)


# ---- one job -----------------------------------------------------------------------------------------------

class Child:
    """A job under way: the commands that it lacks, one after the other, until one fails."""

    def __init__(self, job, threads):
        self.job = job
        self.commands = [*job.missing.values()]
        self.process = None
        self.error = ""
        # why the encoding: output.txt is read in UTF-8
        self.environment = processes.alone()
        self.environment |= {processes.STARTED_BY: str(os.getpid()), "PYTHONIOENCODING": "utf-8"}
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.start()

    def start(self):
        """Starts the next command; what it prints goes to the end of RUN/output.txt."""
        command = [sys.executable, *self.commands.pop(0)]
        try:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            with open(self.job.folder / "output.txt", "ab") as output:
                self.printed_before = output.tell()
                self.process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=output,
                                                stderr=subprocess.STDOUT, env=self.environment)
        except OSError as error:
            self.error = f"cannot be started: {error}"

    def has_ended(self):
        """Whether nothing is left to do. Starts the next command where one has ended well."""
        if self.error:
            return True
        code = self.process.poll()
        if code is None:
            return False
        if code:
            self.error = self.reason(code)
        elif self.commands:
            self.start()
            return False
        elif self.job.missing:
            self.error = f"ended without an error, but did not write {', '.join(self.job.missing)}"
        return True

    def reason(self, code):
        """Why a command failed: the signal that ended it, or its own error message."""
        if code < 0:
            return f"killed by signal {-code}" + ("; out of memory?" if -code == signal.SIGKILL else "")
        with open(self.job.folder / "output.txt", "rb") as output:
            output.seek(self.printed_before)
            printed = output.read().decode("utf-8", errors="replace")
        return error_message(printed) or f"ended with code {code}, without an error message"


def error_message(printed):
    """The last error in what a command printed, with all its lines, or ""."""
    lines = printed.rstrip().splitlines()
    for i in reversed(range(len(lines))):
        if re.match(r"(rank \d+: )?(error|interrupted|terminated)\b", lines[i]):
            return "\n".join(lines[i:][:LINES_OF_AN_ERROR])
        if lines[i].startswith("Traceback (most recent call last)"):
            unindented = [line for line in lines[i + 1:] if not line.startswith(" ")]
            return "\n".join(unindented[:LINES_OF_AN_ERROR])
    return ""


def end(children):
    """Asks jobs to end, and kills what does not."""
    processes = [child.process for child in children if child.process]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---- how long it takes -------------------------------------------------------------------------------------

def announce(jobs, left, at_once):
    """Prints how many runs there are, and of those that are left about the seconds of each."""
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} finished already; {at_once} at a time, "
          f"{minutes(jobs, left, at_once)}")
    for (row, dataset, shots), seconds in expected_seconds(jobs, left).items():
        n_runs = sum(job[:3] == (row, dataset, shots) for job in left)
        each = "unknown until one is finished" if seconds is None else f"about {seconds:.0f} s each"
        print(f"  {row}, {dataset}, {shots} shots: {n_runs} to run, {each}", flush=True)


def minutes(jobs, left, at_once):
    """About how long the jobs that are left take, as text; an unknown one as the median of the rest."""
    seconds = expected_seconds(jobs, jobs)
    known = [each for each in seconds.values() if each is not None]
    if not known:
        return "an unknown time"
    usual = statistics.median(known)
    total = sum(seconds[job[:3]] or usual for job in left)
    return f"about {total / at_once / 60:.0f} min"


def expected_seconds(jobs, left):
    """{(row, dataset, shots): about the seconds of a run}: as long as finished ones, else as foreseen."""
    finished = {}
    for job in jobs:
        if job.is_trained:
            finished.setdefault(job[:3], []).append(runs.read_result(job.folder)["seconds"])
    known = {key: statistics.median(seconds) for key, seconds in finished.items()}
    return {job[:3]: known.get(job[:3], job.seconds) for job in left}
