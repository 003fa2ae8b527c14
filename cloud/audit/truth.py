"""The truth of a recording, to score attacks against. No attacker may import this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from dlora.protocol.errors import DataError
from dlora.protocol.recording import TRUTH_DIRECTORY, TRUTH_FILE, TRUTH_FORMAT
from dlora.protocol.tensors import FloatArray

TOKENIZER_FILE = "tokenizer.json"


class _SnapshotAbout(msgspec.Struct, frozen=True):
    micro_batch: int
    scales: list[float]
    names: list[list[str]]


class _GradientsAbout(msgspec.Struct, frozen=True):
    snapshot: int
    first: int
    end: int


class _About(msgspec.Struct, frozen=True):
    format: int
    recording: str
    software: str
    modes: list[str]
    snapshots: list[_SnapshotAbout]
    gradients: list[_GradientsAbout]
    examples: int


@dataclass(frozen=True)
class TrueMicroBatch:
    """One micro-batch: ids int64 (tokens,), sequence lengths, label positions and labels int64 (labelled,)."""

    mode: str
    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    label_positions: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]

    def texts(self) -> list[npt.NDArray[np.int64]]:
        """Each sequence's tokens."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])

    def label_positions_of_texts(self) -> list[npt.NDArray[np.int64]]:
        """Of each sequence, counted from its own start."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        positions = self.label_positions.astype(np.int64)
        return [
            positions[(positions >= start) & (positions < end)] - start for start, end in zip(starts, ends, strict=True)
        ]


@dataclass(frozen=True)
class Parameters:
    """What was trained, from one micro-batch on.

    Attributes:
        micro_batch: the number of the first that it holds for.
        scales: of each exchange group, what its effect is multiplied by; groups: its parameters, by full name.
    """

    micro_batch: int
    scales: list[float]
    groups: list[dict[str, FloatArray]]


@dataclass(frozen=True)
class Gradients:
    """The gradients of ``parameters``, summed over the micro-batches ``first`` to ``end - 1``, by full name."""

    parameters: Parameters
    first: int
    end: int
    values: dict[str, FloatArray]


@dataclass(frozen=True)
class TrueExample:
    """One text of the data: ids int64 (tokens,), and ascending positions whose next token is a label."""

    ids: npt.NDArray[np.int64]
    label_positions: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """All of it.

    Attributes:
        tokenizer: of the base model; None where the recording has none.
    """

    recording: str
    micro_batches: list[TrueMicroBatch]
    parameters: list[Parameters]
    gradients: list[Gradients]
    examples: list[TrueExample]
    tokenizer: Tokenizer | None

    def text_of(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Tokens as words, or as numbers where there is no tokenizer."""
        numbers = [int(token) for token in ids]
        if self.tokenizer is None:
            return " ".join(map(str, numbers))
        return str(self.tokenizer.decode(numbers, skip_special_tokens=False))


def load_truth(directory: Path, recording_id: bytes, micro_batches: int) -> Truth:
    """The truth in ``directory``, or in its ``truth``.

    Raises ``DataError`` where there is none, it is damaged, or it belongs to other frames than those of
    ``recording_id``, which have so many micro-batches.
    """
    path = directory / TRUTH_FILE
    if not path.is_file() and (directory / TRUTH_DIRECTORY).is_dir():
        path = directory / TRUTH_DIRECTORY / TRUTH_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: give DIR/truth of a --record DIR whose run has ended")
    try:
        truth = _read(path)
    except (OSError, SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no truth that can be read ({type(error).__name__}); record it again") from None
    if truth.recording != recording_id.hex():
        raise DataError(f"{path} is the truth of another recording; give --frames and --truth of the same --record DIR")
    if len(truth.micro_batches) != micro_batches:
        raise DataError(
            f"{path} has {len(truth.micro_batches):,} micro-batches, and the frames have {micro_batches:,}: one of "
            "the two is not whole; record them again"
        )
    return truth


def _read(path: Path) -> Truth:
    with safe_open(path, framework="np") as file:
        about = msgspec.json.decode((file.metadata() or {})["truth"], type=_About)
        if about.format != TRUTH_FORMAT:
            raise ValueError(about.format)
        names = set(file.keys())

        def tensor(name: str) -> Any:
            return file.get_tensor(name)

        micro_batches = [
            TrueMicroBatch(
                mode,
                tensor(f"micro_batch.{index}.ids").astype(np.int64),
                tensor(f"micro_batch.{index}.lengths"),
                tensor(f"micro_batch.{index}.label_positions"),
                tensor(f"micro_batch.{index}.labels"),
            )
            for index, mode in enumerate(about.modes)
        ]
        parameters = [
            Parameters(
                each.micro_batch,
                each.scales,
                [{name: tensor(f"parameters.{index}.{name}") for name in group} for group in each.names],
            )
            for index, each in enumerate(about.snapshots)
        ]
        gradients = []
        for index, each in enumerate(about.gradients):
            start = f"gradients.{index}."
            values = {name.removeprefix(start): tensor(name) for name in names if name.startswith(start)}
            gradients.append(Gradients(parameters[each.snapshot], each.first, each.end, values))
        examples = [
            TrueExample(
                tensor(f"example.{index}.ids").astype(np.int64),
                tensor(f"example.{index}.label_positions").astype(np.int64),
            )
            for index in range(about.examples)
        ]
    return Truth(about.recording, micro_batches, parameters, gradients, examples, _tokenizer(path.parent))


def _tokenizer(directory: Path) -> Tokenizer | None:
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is no tokenizer that can be read; record it again ({error})") from None
