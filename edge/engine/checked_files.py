"""Which large files of bundles had the right digest, so that none is read whole again before every run.

A file counts as the one that was checked while its device, inode, size and times are the same; its time of change is
among them, which on usual file systems no program sets. One that has just changed might change again within a tick of
that clock, and is not remembered yet. They stand beside this device's id, not in the bundle: that is a stranger's.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from dlora.edge.files import make_directory, turn_in, write_atomically
from dlora.edge.state import state_directory
from dlora.protocol.errors import StorageError
from dlora.protocol.files import read_regular
from dlora.protocol.manifest import FileSpec, check_file

FILE_NAME: Final = "checked-files.json"
LEAST_BYTES: Final = 1 << 20  # smaller ones are read anyway
SETTLED_S: Final = 2.0  # the ticks of most file systems are far shorter; of FAT they are this long
_MOST_FILES: Final = 4096  # remembered, the newest


class CheckedFiles:
    """The files that were checked, on this device and by this user; those of other users are not believed."""

    def __init__(self) -> None:
        self._path = state_directory() / FILE_NAME
        self._digests, self._found = _read(self._path), dict[str, str]()

    def check(self, bundle: Path, name: str, spec: FileSpec, *, again: bool) -> None:
        """As ``check_file``; ``again``: whatever is remembered."""
        if spec.bytes < LEAST_BYTES:
            check_file(bundle, name, spec)
            return
        before = _state_of(bundle / name)
        is_known = before is not None and self._digests.get(_key(before)) == spec.sha256
        if before is not None and is_known and before.st_size == spec.bytes and not again:
            return
        check_file(bundle, name, spec)
        after = _state_of(bundle / name)
        if before is None or after is None or _key(before) != _key(after):
            return
        if time.time() - before.st_ctime >= SETTLED_S:
            self._found[_key(before)] = spec.sha256

    def save(self) -> None:
        """Remember; a device that cannot write checks anew each time."""
        if not self._found:
            return
        with suppress(StorageError, OSError):
            make_directory(self._path.parent)
            with turn_in(self._path.parent):
                known = _read(self._path)  # of another process, too
                others = [(key, digest) for key, digest in known.items() if key not in self._found]
                newest = dict([*others, *self._found.items()][-_MOST_FILES:])
                write_atomically(self._path, msgspec.json.encode(newest))


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_regular(path), type=dict[str, str])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}


def _state_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _key(state: os.stat_result) -> str:
    """What tells a file's content from any other that it had."""
    return f"{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"
