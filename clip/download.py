"""A file from the network. It is kept only when it is whole and has the expected digest."""

if __name__ == "__main__":
    raise SystemExit("clip/download.py is no command: python train.py reads it")

import contextlib
import hashlib
import os
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen


def fetch(addresses, path, expected, limit):
    """Downloads a file to path from the first of these addresses that sends one with the digest `expected`.

    limit: bytes that the file may have. It gets its name only when it is whole and right. Raises
    ConnectionError that says what went wrong at each address, and what to do.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    faults = []
    for address in addresses:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            receive(address, part, limit)
            found = digest(part, like=expected)
            if found != expected:
                raise OSError(f"it sent {part.stat().st_size} bytes with the digest {found}, expected "
                              f"{expected}; does a proxy answer in its place?")
            os.replace(part, path)
            return
        except (OSError, ValueError, HTTPException) as error:
            faults.append(f"{type(error).__name__}: {error}")
            if isinstance(error, HTTPError):
                error.close()
        finally:
            with contextlib.suppress(OSError):     # why: the folder may not exist
                part.unlink(missing_ok=True)

    raise ConnectionError(f"cannot download {' or '.join(addresses)} to {path}: {'; '.join(faults)}. "
                          "Without a connection, fetch the file on another machine and put it there")


def receive(address, path, limit):
    """Writes what an address sends to path. Raises OSError where that breaks off or is too much."""
    print(f"downloading {address}", file=sys.stderr, flush=True)
    with urlopen(address, timeout=60) as response, open(path, "wb") as file:
        total = announced(response) / 2**20        # MiB
        done = 0                                   # bytes
        shown = 0                                  # MiB
        for chunk in chunks(response, limit):
            done += file.write(chunk)
            if sys.stderr.isatty() and done // 2**20 > shown:
                shown = done // 2**20
                print(f"\r{shown} of {total:.0f} MiB ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)


def chunks(response, limit, pace=1000):
    """Yields what a server sends, piece by piece.

    Raises OSError where that is more than `limit` bytes, where it breaks off, and where it is slower, after
    the first minute, than `pace` bytes a second. why a pace: a server that sends a byte now and then never
    times out.
    """
    start = time.monotonic()
    total = announced(response)
    done = 0
    while chunk := response.read1(2**20):
        done += len(chunk)
        if done > limit:
            raise OSError(f"more than the {limit} bytes that it may have came")
        if time.monotonic() - start > 60 + done / pace:
            raise TimeoutError(f"only {done} bytes came in {time.monotonic() - start:.0f} s")
        yield chunk

    if done < total:
        raise OSError(f"only {done} of {total} bytes came")


def announced(response):
    """How many bytes a server says that it sends; 0 where it says nothing."""
    return int(response.headers.get("Content-Length") or 0)


def digest(path, like=""):
    """SHA-256 of a file in hexadecimal; its blob id in git where `like` has 40 digits, as a blob id has."""
    is_blob = len(like) == 40
    found = hashlib.sha1(b"blob %d\0" % os.path.getsize(path)) if is_blob else hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
