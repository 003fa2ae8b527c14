"""The key that signs tickets, in the server's state directory."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

from dlora.protocol import interrupts
from dlora.protocol.errors import StorageError
from dlora.protocol.files import read_regular, sync

KEY_BYTES: Final = 32


def load_key(state_dir: Path) -> bytes:
    """The key that signs kill-and-revive tickets, 32 bytes; made on first use, readable by its owner only.

    It is whole and on the disk before it has its name: a key that a power cut took away would take every ticket along,
    and an empty one would sign for anybody. Of servers that begin together, all get the same.
    """
    path = state_dir / "ticket.key"
    try:
        if not path.exists():
            state_dir.mkdir(parents=True, exist_ok=True)
            with interrupts.raise_on_signal():
                _make_key(path)
        key = read_regular(path)
    except OSError as error:
        raise StorageError(f"cannot keep the ticket key in {path}: {error.strerror}; choose --state-dir") from None
    if len(key) != KEY_BYTES:
        text = f"the ticket key {path} has {len(key)} bytes, not {KEY_BYTES}; restore it from a backup"
        raise StorageError(f"{text}, or remove it: runs whose session is gone then cannot go on")
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another server was faster: its key counts
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
