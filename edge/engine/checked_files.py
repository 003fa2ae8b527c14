"""Which large files of bundles had the right digest, so that none is read whole again before every run.

A file counts as the one that was checked while its device, inode, size and times are the same; its time of change is
among them, which no program sets. They are remembered beside this device's id, not in the bundle: that is a stranger's.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from dlora.edge.files import make_directory, write_atomically
from dlora.edge.state import state_directory
from dlora.protocol.errors import StorageError
from dlora.protocol.files import read_regular
from dlora.protocol.manifest import FileSpec, check_file

FILE_NAME: Final = "checked-files.json"
LEAST_BYTES: Final = 1 << 20  # smaller ones are read anyway
_MOST_FILES: Final = 4096  # remembered, the newest


class CheckedFiles:
    """The files that were checked, on this device and by this user; those of other users are not believed."""

    def __init__(self) -> None:
        self._path = state_directory() / FILE_NAME
        self._is_changed = False
        self._digests: dict[str, str] = {}
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._digests = msgspec.json.decode(read_regular(self._path), type=dict[str, str])

    def check(self, bundle: Path, name: str, spec: FileSpec, *, again: bool) -> None:
        """As ``check_file``; ``again``: whatever is remembered."""
        if spec.bytes < LEAST_BYTES:
            check_file(bundle, name, spec)
            return
        before = _key(bundle / name)
        if before is not None and not again and self._digests.get(before) == spec.sha256:
            return
        check_file(bundle, name, spec)
        if before is not None and before == _key(bundle / name):
            self._digests.pop(before, None)
            self._digests[before] = spec.sha256
            self._is_changed = True

    def save(self) -> None:
        """Remember; a device that cannot write checks anew each time."""
        if not self._is_changed:
            return
        newest = dict(list(self._digests.items())[-_MOST_FILES:])
        with suppress(StorageError, OSError):
            make_directory(self._path.parent)
            write_atomically(self._path, msgspec.json.encode(newest))


def _key(path: Path) -> str | None:
    """What tells a file's content from any other that it had."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
