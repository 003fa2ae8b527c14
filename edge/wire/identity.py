"""Who this device is: an id of its own, made once and kept on disk.

The server tells by it which sessions are one device's. It is no secret and proves nothing: tokens do.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec

from dlora.edge.files import make_directory, turn_in, write_atomically
from dlora.edge.state import STATE_VARIABLE, state_directory
from dlora.protocol.errors import StorageError
from dlora.protocol.files import read_regular
from dlora.protocol.structure_words import structure_words

FILE_NAME: Final = "device.json"


class _Identity(msgspec.Struct, frozen=True):
    """What ``device.json`` holds."""

    device: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]


def load_device_id(state_dir: Path | None = None, warn: Callable[[str], None] = lambda _: None) -> str:
    """This device's id, 32 hex digits; made and written the first time.

    A device that cannot write must still train: it gets an id for this run only.

    Args:
        state_dir: where it is kept; by default ``$DLORA_EDGE_STATE``, else the user's state directory.
        warn: called with one line where a damaged file is replaced, or nothing can be kept.
    """
    directory = state_directory(state_dir)
    try:
        make_directory(directory)
        with turn_in(directory):
            return _load_or_make(directory / FILE_NAME, warn)
    except (StorageError, OSError) as error:
        reason = error.__cause__ or error
        warn(
            f"no device id can be kept in {directory} ({getattr(reason, 'strerror', None) or reason}): this run has "
            f"one of its own; set {STATE_VARIABLE} to a directory that can be written"
        )
        return secrets.token_hex(16)


def _load_or_make(path: Path, warn: Callable[[str], None]) -> str:
    try:
        return msgspec.json.decode(read_regular(path), type=_Identity).device
    except FileNotFoundError:
        pass
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        warn(f"{path} is damaged ({structure_words(error)}); this device gets a new id")
    identity = _Identity(secrets.token_hex(16))
    write_atomically(path, msgspec.json.encode(identity) + b"\n")
    with suppress(OSError):  # phone and memory-card file systems have no modes
        path.chmod(0o600)
    return identity.device
