"""Checkpoints: one self-verifying file each, the last two kept.

``checkpoint-000020.safetensors`` holds the tensors; its metadata holds the state and a SHA-256 over both.
Step 20 means that step 20 comes next. A file is written under another name and renamed, so a power cut leaves
the older ones; what a bad disk damages later is found by the digest and passed over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import safetensors

from dlora.edge.engine.engine import Array
from dlora.edge.files import make_directory, remove_quietly, write_atomically
from dlora.edge.tensor_file import safetensors_chunks
from dlora.protocol.errors import CheckpointError
from dlora.protocol.files import open_regular

KEPT: Final = 2
FORMAT: Final = 3
_KEY: Final = "dlora-checkpoint"
_NAME: Final = re.compile(r"checkpoint-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified.

    Attributes:
        step: the step that comes next.
        tensors: by name, as they were saved.
        state: the state as plain JSON values; ``msgspec.convert`` makes it the struct that was saved.
    """

    step: int
    tensors: dict[str, Array]
    state: Any
    path: Path


class _DamagedError(Exception):
    """The file is not what was written."""


class _Header(msgspec.Struct, frozen=True):
    """What stands beside the tensors, in one metadata entry: safetensors writes several in no fixed order."""

    format: int
    step: int
    sha256: str
    state: msgspec.Raw


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints, whole or not, newest first; none where there is no directory."""
    try:
        found = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def save_checkpoint(directory: Path, step: int, tensors: Mapping[str, Array], state: msgspec.Struct) -> Path:
    """Write a checkpoint, then delete all but the last two that verify.

    Later checkpoints than ``step`` are deleted too: the run was resumed from an earlier step, and they are not of
    the run as it goes on now.

    Raises ``StorageError``; the earlier checkpoints are then as they were.
    """
    make_directory(directory)
    for left in directory.glob(".checkpoint-*.safetensors.tmp"):  # by a killed save; only its own step would replace it
        remove_quietly(left)
    path = directory / f"checkpoint-{step:06d}.safetensors"
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    raw = msgspec.json.encode(state)
    header = _Header(FORMAT, step, _digest(whole, step, raw), msgspec.Raw(raw))
    write_atomically(path, safetensors_chunks(whole, {_KEY: msgspec.json.encode(header).decode()}))
    _delete_old(directory, step)
    return path


def load_latest(directory: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is none at all.

    ``warn``: called with one line about each newer one that is damaged.

    Raises ``CheckpointError`` where there are some and every one is damaged, or where another version saved one.
    """
    damaged = 0
    for step, path in list_checkpoints(directory):
        try:
            return _load(path, step)
        except _DamagedError as error:
            damaged += 1
            if warn is not None:
                warn(f"{path} is damaged ({error}); trying the one before")
    if damaged:
        raise CheckpointError(f"no checkpoint in {directory} is whole ({damaged} damaged); start anew in another --out")
    return None


def _load(path: Path, step: int) -> Checkpoint:
    try:
        open_regular(path).close()  # the library would wait for a pipe's writer
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # Copies: the file may be deleted or replaced while the run goes on.
            tensors: dict[str, Array] = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise _DamagedError(str(error)) from None
    try:
        header = msgspec.json.decode(metadata.get(_KEY, ""), type=_Header)
        state = msgspec.json.decode(header.state)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _DamagedError(f"its header cannot be read: {error}") from None
    if header.format != FORMAT:
        raise CheckpointError(
            f"{path} was saved by another version of dlora (format {header.format}, this one has {FORMAT}): finish the "
            "run with that version, or start anew in another --out"
        )
    if header.step != step or header.sha256 != _digest(tensors, step, bytes(header.state)):
        raise _DamagedError("its SHA-256 differs")
    return Checkpoint(step, tensors, state, path)


def _delete_old(directory: Path, step: int) -> None:
    kept = 0
    for found, path in list_checkpoints(directory):
        if found > step or kept == KEPT:
            remove_quietly(path)
        elif found == step:
            kept += 1
        else:
            with suppress(_DamagedError, CheckpointError):
                _load(path, found)
                kept += 1


def _digest(tensors: Mapping[str, Array], step: int, state: bytes) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of all tensors, the step and the state."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype.str, tensor.shape)).encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    digest.update(repr((step, state)).encode())
    return digest.hexdigest()
