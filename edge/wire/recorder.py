"""Keeps the frames of a short run as they crossed and, apart from them, the truth to score attacks against.

Off unless a user asks for it. The truth is what never leaves the device: tokens, labels, what is trained, gradients.
Only its owner may read it (0600, in a directory of 0700).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.data.batches import MicroBatch
from dlora.edge.files import make_directory, storage_errors, write_atomically
from dlora.edge.tensor_file import safetensors_chunks
from dlora.protocol.errors import UsageError
from dlora.protocol.recording import (
    FRAMES_DIRECTORY,
    FRAMES_FILE,
    ID_BYTES,
    TOKENIZER_FILE,
    TRUTH_DIRECTORY,
    TRUTH_FILE,
    TRUTH_FORMAT,
    FramesWriter,
)
from dlora.protocol.tensors import FloatArray, IntArray
from dlora.protocol.version import SOFTWARE_VERSION

MOST_BYTES: Final = 1 << 30
"""Of frames: a recording that has as many takes no more. A few steps are enough for an audit."""
MOST_TRUTH_BYTES: Final = 1 << 28
"""Of truth, likewise: it is kept in memory until the end."""
MOST_EXAMPLES: Final = 4096


def check_directory(directory: Path) -> None:
    """Raise ``UsageError`` where there is a recording in ``directory`` already, or it is none."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--record {directory} is a file; name a directory")
    if any((directory / name).exists() for name in (FRAMES_DIRECTORY, TRUTH_DIRECTORY)):
        raise UsageError(f"--record {directory}: there is a recording already; choose another directory")


class Recorder:
    """A recording under way.

    Attributes:
        is_full: whether it takes no more frames, and no more truth.
        seed_was_chosen: whether the run's seed is a number that its user gave; None where nothing is drawn.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        """Begin one in ``directory``. Raises what ``check_directory`` does, and ``StorageError``."""
        self.directory = directory
        self.is_full = False
        self.seed_was_chosen: bool | None = None
        self._warn = warn
        self._id = secrets.token_bytes(ID_BYTES)
        self._began = time.monotonic()
        self._tensors: dict[str, npt.NDArray[Any]] = {}
        self._truth_bytes = 0
        self._modes: list[str] = []
        self._snapshots: list[dict[str, Any]] = []
        self._gradients: list[dict[str, int]] = []
        self._examples = 0
        self._tokenizer = b""
        check_directory(directory)
        frames = directory / FRAMES_DIRECTORY / FRAMES_FILE
        make_directory(frames.parent)
        with storage_errors(directory):
            (directory / TRUTH_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
            self._file: BinaryIO = os.fdopen(os.open(frames, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            self._writer = FramesWriter(self._file, self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_frame(self, frame: bytes | bytearray, *, up: bool) -> None:
        """A frame that was sent, or that has come. Raises ``StorageError``."""
        if self.is_full:
            return
        with storage_errors(self.directory):
            self._writer.add(time.monotonic() - self._began, frame, up=up)

    def add_micro_batch(self, mode: str, batch: MicroBatch) -> None:
        """Of each ``embeddings`` that is sent, in that order: its packed tokens, the lengths of its sequences, and
        positions and values of its labels. What is generated has none."""
        if self.is_full:
            return
        labelled = len(batch.labels) if mode != "decode" else 0  # its positions are those that logits are asked for
        name = f"micro_batch.{len(self._modes)}"
        self._modes.append(mode)
        self._keep(f"{name}.ids", batch.ids.copy())
        self._keep(f"{name}.lengths", batch.sequence_lengths.astype(np.int32))
        self._keep(f"{name}.label_positions", batch.label_positions[:labelled].astype(np.int32))
        self._keep(f"{name}.labels", batch.labels[:labelled].astype(np.int64))
        # Here only: each of the micro-batches that began has its truth.
        if self._writer.nbytes >= MOST_BYTES or self._truth_bytes >= MOST_TRUTH_BYTES:
            self.is_full = True
            megabytes = (self._writer.nbytes + self._truth_bytes) / 1e6
            self._warn(f"--record has {megabytes:,.0f} MB and takes no more; the run goes on. A few --steps are enough")

    def add_parameters(self, groups: Sequence[tuple[float, Mapping[str, FloatArray]]]) -> None:
        """From the next micro-batch on: of each exchange group what its effect is multiplied by, and what is trained,
        by name."""
        if self.is_full:
            return
        for _, parameters in groups:
            for name, values in parameters.items():
                self._keep(f"parameters.{len(self._snapshots)}.{name}", values.copy())
        self._snapshots.append(
            {
                "micro_batch": len(self._modes),
                "scales": [float(scale) for scale, _ in groups],
                "names": [list(parameters) for _, parameters in groups],
            }
        )

    def add_gradients(self, gradients: Mapping[str, FloatArray | None]) -> None:
        """Of the micro-batches since the last ``add_parameters``, summed, by name."""
        if self.is_full or not self._snapshots:
            return
        for name, values in gradients.items():
            if values is not None:
                self._keep(f"gradients.{len(self._gradients)}.{name}", values.copy())
        self._gradients.append(
            {"snapshot": len(self._snapshots) - 1, "first": self._snapshots[-1]["micro_batch"], "end": len(self._modes)}
        )

    def add_examples(self, examples: Iterable[tuple[IntArray, IntArray]]) -> None:
        """Some of the data: token ids, and ascending positions whose next token is a label."""
        for ids, positions in examples:
            if self._examples == MOST_EXAMPLES or self._truth_bytes >= MOST_TRUTH_BYTES // 4:
                return
            self._keep(f"example.{self._examples}.ids", np.array(ids, np.int32))
            self._keep(f"example.{self._examples}.label_positions", np.array(positions, np.int32))
            self._examples += 1

    def add_tokenizer(self, content: bytes) -> None:
        """The base model's ``tokenizer.json``, so that an audit can show words."""
        self._tokenizer = content

    def close(self) -> None:
        """Write the truth, and say where all of it lies. Where nothing crossed, nothing is left. Raises
        ``StorageError``."""
        if self._file.closed:
            return
        with storage_errors(self.directory):
            self._file.close()
        if not self._modes:
            self._remove()
            self._warn("--record: nothing crossed, so that there is no recording")
            return
        about = {
            "format": TRUTH_FORMAT,
            "recording": self._id.hex(),
            "software": SOFTWARE_VERSION,
            "modes": self._modes,
            "snapshots": self._snapshots,
            "gradients": self._gradients,
            "examples": self._examples,
            "seed_was_chosen": self.seed_was_chosen,
        }
        truth = self.directory / TRUTH_DIRECTORY
        metadata = {"truth": msgspec.json.encode(about).decode()}
        write_atomically(truth / TRUTH_FILE, safetensors_chunks(self._tensors, metadata))
        if self._tokenizer:
            write_atomically(truth / TOKENIZER_FILE, self._tokenizer)
        with storage_errors(truth):  # beside the directory's 0700, for whoever copies them
            for path in truth.iterdir():
                path.chmod(0o600)
        self._warn(
            f"recorded {len(self._modes)} micro-batches, {self._writer.nbytes / 1e6:,.1f} MB, in {self.directory}; "
            "delete truth/ when the audit is done"
        )

    def _keep(self, name: str, values: npt.NDArray[Any]) -> None:
        self._tensors[name] = values
        self._truth_bytes += values.nbytes

    def _remove(self) -> None:
        """A recording of nothing, so that the same command can be tried again."""
        (self.directory / FRAMES_DIRECTORY / FRAMES_FILE).unlink(missing_ok=True)
        for directory in (FRAMES_DIRECTORY, TRUTH_DIRECTORY, ""):
            with suppress(OSError):  # something else is in it
                (self.directory / directory).rmdir()


@contextmanager
def recording(record: Path | None, tokenizer: Path, warn: Callable[[str], None]) -> Iterator[Recorder | None]:
    """A recording in ``record``, whole when the block ends, with the bundle's ``tokenizer.json``; None: none.

    Raises ``UsageError`` and ``StorageError``.
    """
    if record is None:
        yield None
        return
    with Recorder(record, warn) as recorder:
        warn(
            f"--record: {record} gets this run's text, labels, adapter and gradients, in the clear; only its owner may "
            "read them"
        )
        recorder.add_tokenizer(tokenizer.read_bytes())
        yield recorder


def check_record(record: Path | None, *, is_local: bool) -> None:
    """Raise ``UsageError`` where nothing crosses that could be recorded, or there is a recording already."""
    if record is None:
        return
    if is_local:
        raise UsageError("--record keeps what crosses, and with --device-blocks all nothing does: leave it out")
    check_directory(record)
