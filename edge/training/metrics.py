"""What a step cost and gained, and ``metrics.jsonl``, which keeps it: one JSON object a step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from dlora.edge.files import make_directory, storage_errors, write_atomically, write_whole
from dlora.protocol.errors import CheckpointError
from dlora.protocol.files import open_regular, read_regular
from dlora.protocol.structure_words import structure_words
from dlora.protocol.tensors import ByteArray


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One training step.

    Attributes:
        step, total_steps: counted from 0; how many there are.
        loss: mean over the step's labels.
        learning_rate, grad_norm: of the step; before clipping.
        tokens, labelled: of the step's sequences; labels among them.
        bytes_up, bytes_down, round_trips: on the wire.
        active_units, live_units: trained; taking part in the forward pass.
        edge_compute_s, step_s: seconds that this device computed; wall time.
        units: one digit a unit, its state in this step: 0 killed, 1 active, 2 fading, 3 held, 4 given to the server.
        up, down: bytes by the role of what crossed, and ``other``; they add up to ``bytes_up`` and ``bytes_down``.
        waiting_s: seconds that the device waited for the server.
        server_compute_s, server_queued_s: that the server says it computed, maybe while the device did; that it says
            the device waited for its turn.
        peak_rss_mb: the most memory that this process had by then, in megabytes (10**6 bytes).
        paused_s: for how long ``--pause-when`` held this step up, before ``step_s`` begins.
        set_up_bytes_up, set_up_bytes_down: what crossed before the run began to step, in the first step of each of its
            starts; in no other number of the step.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    labelled: int
    bytes_up: int
    bytes_down: int
    round_trips: int
    active_units: int
    live_units: int
    edge_compute_s: float
    step_s: float
    units: str
    up: dict[str, int]
    down: dict[str, int]
    waiting_s: float
    server_compute_s: float
    server_queued_s: float
    peak_rss_mb: float
    paused_s: float = 0.0
    set_up_bytes_up: int = 0
    set_up_bytes_down: int = 0

    @property
    def states(self) -> ByteArray:
        """``units`` as uint8 (units,)."""
        return np.frombuffer(self.units.encode(), np.uint8) - np.uint8(ord("0"))


class MetricsLog:
    """``metrics.jsonl``, appended to; every line reaches the system before the next step begins.

    ``first_step``: the step that comes next; lines of it and of later steps, from a run that went on past its last
    checkpoint, are cut off.

    Raises ``StorageError``.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self._path = path
        make_directory(path.parent)
        with storage_errors(path):
            lines = read_regular(path).splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if (step := _step(line)) is not None and step < first_step]
        write_atomically(path, b"".join(kept))
        with storage_errors(path):
            self._file = path.open("ab", buffering=0)

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        line = msgspec.json.encode(asdict(metrics)) + b"\n"
        with storage_errors(self._path):
            start = self._file.seek(0, os.SEEK_END)
            try:
                write_whole(self._file, line)
            except OSError:
                self._file.truncate(start)
                raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """All whole lines of a ``metrics.jsonl``; a torn last line is left out.

    Raises ``CheckpointError`` for a file that is something else.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[StepMetrics]:
    """As ``read_metrics``, one step at a time: the file of a long run takes more memory than a device has to spare."""
    decoder = msgspec.json.Decoder(StepMetrics)
    try:
        with open_regular(path) as file:
            for line in file:
                if _step(line) is not None:
                    yield decoder.decode(line)
    except FileNotFoundError:
        return
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a metrics file of this version ({structure_words(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class _Step(msgspec.Struct):
    step: int


def _step(line: bytes) -> int | None:
    """The step of a whole line; None of one that is torn."""
    try:
        return msgspec.json.decode(line, type=_Step).step if line.endswith(b"\n") else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def history(metrics: list[StepMetrics]) -> list[tuple[int, Any]]:
    """(step, states) of the steps that recorded their units, for ``kr_map.render_map``."""
    return [(each.step, each.states) for each in metrics if each.units]
