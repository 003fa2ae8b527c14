"""Files that are always whole: the old bytes or the new ones, whenever the power goes."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Final

from dlora.protocol.errors import StorageError, UsageError
from dlora.protocol.files import sync

_MAX_SECRET_BYTES: Final = 4096
_FOR_A_WRITER_S: Final = 3.0  # a shell's, which has opened its pipe or is about to
_FOR_BYTES_S: Final = 60.0  # of a writer that asks its user for a passphrase first


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` inside into a ``StorageError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably. Raises ``StorageError``."""
    with storage_errors(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync(each.parent)


def check_writable(directory: Path) -> None:
    """Raise ``StorageError`` where no file can be made in ``directory``: its disk is read-only, or it is not ours."""
    probe = directory / ".writable.tmp"
    with storage_errors(directory):
        try:
            remove_quietly(probe)  # a link, say, that somebody put there
            probe.open("xb").close()
        finally:
            remove_quietly(probe)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory; the lock ends with the process, however it ends, and leaves no file.

    Raises ``UsageError`` where another process holds it.
    """
    with storage_errors(directory):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"another run is writing into {directory}; choose another --out, or wait for it") from None
    except OSError:
        pass  # some network and phone file systems have no locks: nothing to hold then
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def turn_in(directory: Path) -> Iterator[None]:
    """Wait until no other process has its turn in a directory, and have it: for what takes a moment.

    Raises ``OSError`` where the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network and phone file systems have no locks: the last to write wins there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Replace ``path`` by ``content``, whole or in pieces, durably. Raises ``StorageError`` and leaves the old file as
    it was.

    One writer a file: the temporary name is fixed, so that what a killed process left is removed. What somebody else
    put there is as well: a link is not followed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            remove_quietly(temporary)
            with temporary.open("xb") as file:
                file.writelines((content,) if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            remove_quietly(temporary)
            raise
        sync(path.parent)


def open_own(path: Path) -> int:
    """Open a file to read and write it, for its owner only where it is made; returns the descriptor.

    The directory may be somebody else's: raises ``StorageError`` for a link, a pipe or a device, and follows and waits
    for none. What is in the file is untouched, and so is its mode: look whose it is before you change it.
    """
    with storage_errors(path):
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600
            )
        except OSError:
            if not path.is_symlink():
                raise
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    raise StorageError(f"{path} is no regular file; remove it, or choose another place")


def write_whole(file: FileIO, content: bytes) -> None:
    """Append all of it to a file without a buffer. A filling disk takes what fits, and only complains at the next
    write."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def remove_quietly(path: Path) -> None:
    """Remove a file that nobody needs; a disk that will not let go of it is no reason to stop."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def read_small(path: Path, most: int) -> bytes:
    """All of a file that a user has named, at most so many bytes.

    It may be a pipe, as of ``<(pass show key)``: 3 seconds are given for somebody to write to it, and 60 to whoever
    does, until all is there. Raises ``OSError`` for what takes longer, is larger or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found, began = bytearray(), time.monotonic()
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        has_writer = has_ended = False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while len(found) <= most:
            try:
                some = os.read(descriptor, most + 1 - len(found))
            except BlockingIOError:
                has_writer = True
            else:
                found += some
                if some:
                    continue
                if not is_pipe or found or has_writer or has_ended:
                    return bytes(found)
            left = (_FOR_BYTES_S if has_writer or found else _FOR_A_WRITER_S) - (time.monotonic() - began)
            if left <= 0:
                raise OSError(errno.ETIMEDOUT, "it is a pipe, and nobody writes to it", str(path))
            has_ended = any(mask & select.POLLHUP for _, mask in poll.poll(left * 1000))
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    finally:
        os.close(descriptor)


def read_secret(option: str, path: Path, warn: Callable[[str], None] | None) -> str:
    """The text of a small file, or of a pipe as ``read_small`` reads it, without blanks around it.

    ``option``: that names the file; ``warn`` is called where others can read it too. Raises ``UsageError`` where it
    cannot be read.
    """
    try:
        text = read_small(path, _MAX_SECRET_BYTES).decode("ascii", errors="replace").strip()
        readable_by_others = path.stat().st_mode & 0o077
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from None
    if readable_by_others and warn is not None:
        warn(f"{option} {path} can be read by others; run: chmod 600 {path}")
    return text
