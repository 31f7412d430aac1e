"""What a command prints to, what stops it from outside, and torch's errors in one line."""

import contextlib
import errno
import os
import signal
import sys
import threading

from clip.weights import is_memory

# What torch says where a process that reads pictures is gone, or shared memory is full, where it puts them.
LOADER = ("DataLoader worker", "shared memory", "/torch_", "[Errno 28] No space left on device")
# What torch says where another process of a run is gone.
PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")


class ReaderGone(Exception):
    """Who reads what is printed closed the pipe, as `| head -1` does."""


class Terminated(KeyboardInterrupt):
    """The system asks this program to end, by SIGTERM, as schedulers do."""


class Stream:
    """Standard output or error. What cannot be printed is lost, and stops no run."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):                 # a character that the terminal lacks is escaped
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def isatty(self):
        return not self.stream.closed and self.stream.isatty()

    def attempt(self, action, *arguments):
        """Prints. What a full disk or a closed stream refuses is lost."""
        try:
            action(*arguments)
        except BrokenPipeError as error:
            self.lose()
            raise ReaderGone from error
        except (OSError, ValueError):
            self.lose()

    def lose(self):
        """Leads what the stream holds, and all that comes, to nowhere. why: Python flushes it once more."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def safe_streams():
    """Puts a `Stream` in place of standard output and error, also where there is none."""
    kept = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (Stream(stream or nowhere) for stream in kept)
        try:
            yield
            sys.stdout.flush()
        except BaseException:
            with contextlib.suppress(ReaderGone):          # why: what ends the program now is said first
                sys.stdout.flush()
            raise
        finally:
            sys.stdout, sys.stderr = kept


@contextlib.contextmanager
def safe_end():
    """Lets SIGTERM end the program as Ctrl-C does. why: else the processes that it started would live on."""
    def end(*_):
        if hasattr(signal, "SIGCHLD"):
            # why: schedulers signal all processes of a job, and torch raises an error for each one that reads
            # pictures and is gone
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    mine = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    kept = sys.unraisablehook
    if mine:
        signal.signal(signal.SIGTERM, end)
        sys.unraisablehook = send_again(kept)
    try:
        yield
    finally:
        sys.unraisablehook = kept
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def send_again(otherwise):
    """A hook for errors that Python ignores, as in destructors: a signal that raised one is sent again."""
    def hook(ignored):
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            return otherwise(ignored)
        number = signal.SIGTERM if issubclass(ignored.exc_type, Terminated) else signal.SIGINT
        # why later: the destructor is still under way
        again = threading.Timer(0.1, os.kill, [os.getpid(), number])
        again.daemon = True
        again.start()
    return hook


def let_signals_end():
    """Lets Ctrl-C and SIGTERM end the program at once, without a word -> what they did, {signal: handler}."""
    return {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}


@contextlib.contextmanager
def signals_end_at_once():
    """`let_signals_end` for a while. why: what waits outside Python hears them late."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    kept = let_signals_end() if in_main_thread else {}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def is_shared_memory(error):
    """Whether an error says that something is full, but names no file."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None


def in_words(error):
    """An error in one line, as one says it to a user; "" for one of torch's that is our own fault."""
    lines = str(error).splitlines() or [""]
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"
    # torch puts the traceback of a process that reads pictures before its error
    if "in DataLoader worker process" in lines[0]:
        lines = [lines[-1].removeprefix(f"{type(error).__name__}: ")]
    elif not isinstance(error, RuntimeError) and not is_shared_memory(error):
        return str(error) or type(error).__name__

    if is_memory(error):
        return f"out of memory: {lines[0]}"
    if any(words in lines[0] for words in LOADER):
        return (f"the processes that read pictures cannot go on ({lines[0]}): is memory full, or shared "
                "memory (docker run --shm-size=8g gives more)? --workers 0 reads without such processes")
    if any(words in lines[0] for words in PEER):
        return f"another process of this run ended ({lines[0]})"
    return lines[0] if isinstance(error, (OSError, ValueError)) else ""
