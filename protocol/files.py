"""Files that are read without waiting for ever, and written so that they survive a power cut."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from .errors import UsageError

_NO_FILE: Final = "it is no regular file"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises ``OSError``, for a pipe or a device too, and waits for nobody."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, text = (errno.EISDIR, os.strerror(errno.EISDIR)) if stat.S_ISDIR(mode) else (errno.EINVAL, _NO_FILE)
        raise OSError(number, text, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """All of a regular file. Raises ``OSError``, as ``open_regular`` does."""
    with open_regular(path) as file:
        return file.read()


def check_readable(option: str, path: Path | None) -> None:
    """Raise ``UsageError`` where a library that opens an option's file by its name could not read it, or might wait for
    ever.

    A pipe is well only where this process holds it already (``/dev/fd``, a shell's ``<(…)``): opening it waits for
    nobody.
    """
    if path is None:
        return
    try:
        if path.parts[:3] == ("/", "dev", "fd"):
            path.open("rb").close()
        else:
            open_regular(path).close()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from None


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
