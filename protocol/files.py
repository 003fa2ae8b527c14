"""Files that are read without waiting for ever, and written so that they survive a power cut."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path
from typing import BinaryIO, Final

_FOR_A_WRITER_S: Final = 3.0  # a shell's, which has opened its pipe or is about to
_FOR_BYTES_S: Final = 60.0  # of a writer that asks its user for a passphrase first
_NO_FILE: Final = "it is no regular file"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises ``OSError``, for a pipe or a device too, and waits for nobody."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _NO_FILE, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """All of a regular file. Raises ``OSError``, as ``open_regular`` does."""
    with open_regular(path) as file:
        return file.read()


def read_small(path: Path, most: int) -> bytes:
    """All of a file that a user has named, at most so many bytes.

    It may be a pipe, as of ``<(pass show key)``: 3 seconds are given for somebody to write to it, and 60 to whoever
    does, until all is there. Raises ``OSError`` for what takes longer, is larger or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found, began = b"", time.monotonic()
        has_writer = False
        while len(found) <= most:
            try:
                some = os.read(descriptor, most + 1 - len(found))
            except BlockingIOError:
                has_writer = True
            else:
                found += some
                if not some and (found or has_writer or not stat.S_ISFIFO(os.fstat(descriptor).st_mode)):
                    return found
                if some:
                    continue
            left = (_FOR_BYTES_S if has_writer or found else _FOR_A_WRITER_S) - (time.monotonic() - began)
            if left <= 0:
                raise OSError(errno.ETIMEDOUT, "it is a pipe, and nobody writes to it", str(path))
            select.select([descriptor], [], [], left)
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    finally:
        os.close(descriptor)


def check_readable(path: Path) -> None:
    """Raise ``OSError`` where a library that opens the file by its name could not read it, or might wait for ever.

    A pipe is well only where this process holds it already (``/dev/fd``, a shell's ``<(…)``): opening it waits for
    nobody.
    """
    if path.parts[:3] == ("/", "dev", "fd"):
        path.open("rb").close()
    else:
        open_regular(path).close()


def sync(path: Path) -> None:
    """Put on the disk what a file holds, or which names a directory has. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and phone file systems cannot do that for directories
            raise
    finally:
        os.close(descriptor)
