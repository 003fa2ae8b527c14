"""Files that are always whole: the old bytes or the new ones, whenever the power goes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from dlora.protocol.errors import StorageError, UsageError
from dlora.protocol.files import sync


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` inside into a ``StorageError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is intact: "
            "free space or choose another place"
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably. Raises ``StorageError``."""
    with storage_errors(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync(each.parent)


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

    One writer a file: the temporary name is fixed, so that what a killed process left is written over.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.writelines((content,) if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            remove_quietly(temporary)
            raise
        sync(path.parent)


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


def read_secret(option: str, path: Path, warn: Callable[[str], None] | None) -> str:
    """The text of a small file, without blanks around it; ``warn`` is called where others can read it too.

    ``option``: that names the file. Raises ``UsageError`` where it cannot be read.
    """
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            readable_by_others = os.fstat(file.fileno()).st_mode & 0o077
            text = file.read(4096).strip()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from None
    if readable_by_others and warn is not None:
        warn(f"{option} {path} can be read by others; run: chmod 600 {path}")
    return text
