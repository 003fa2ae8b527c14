"""The truth of a recording, to score attacks against. No attacker may import this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dlora.protocol.adapters import kind_of
from dlora.protocol.errors import DataError
from dlora.protocol.messages import OpenSession
from dlora.protocol.recording import TRUTH_DIRECTORY, TRUTH_FILE, TRUTH_FORMAT, find_recorded
from dlora.protocol.tensors import FloatArray

from .observed import Observed, SeenMicroBatch
from .tokenizer import TruthTokenizer

LARGEST_SCALE = 1e6
MOST_WITHOUT_TRUTH = 4  # micro-batches that began when a run was interrupted


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
    seed_was_chosen: bool | None


@dataclass(frozen=True)
class TrueMicroBatch:
    """One micro-batch: ids int64 (tokens,), sequence lengths, label positions and labels int64 (labelled,)."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    label_positions: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]

    def texts(self) -> list[npt.NDArray[np.int64]]:
        """Each sequence's tokens."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


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
        seed_was_chosen: whether the run's seed is a number that its user gave; None where nothing is drawn.
        tokenizer: of the base model; None where texts are shown as numbers.
    """

    recording: str
    micro_batches: list[TrueMicroBatch]
    parameters: list[Parameters]
    gradients: list[Gradients]
    examples: list[TrueExample]
    seed_was_chosen: bool | None
    tokenizer: TruthTokenizer | None

    def text_of(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Tokens as words, or as numbers where there is no tokenizer."""
        numbers = [int(token) for token in ids]
        if self.tokenizer is None:
            return " ".join(map(str, numbers))
        return self.tokenizer.decode(numbers)


def load_truth(directory: Path, recording_id: bytes, seen: Observed, tokenizer: TruthTokenizer | None = None) -> Truth:
    """The truth in ``directory``, or in its ``truth``; it may be the file itself.

    Raises ``DataError`` where there is none, it is damaged, or it belongs to other frames than ``seen``, those of
    ``recording_id``.
    """
    path = find_recorded(directory, TRUTH_DIRECTORY, TRUTH_FILE)
    if not path.is_file():
        raise DataError(f"{path} does not exist: give DIR/truth of a --record DIR whose run has ended")
    try:
        truth = _read(path, tokenizer)
    except (OSError, SafetensorError, msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no truth that can be read ({type(error).__name__}); record it again") from None
    if truth.recording != recording_id.hex():
        raise DataError(f"{path} is the truth of another recording; give --frames and --truth of the same --record DIR")
    try:
        _check(truth, seen)
    except _NotOfFramesError as error:
        raise DataError(f"{path} is not what was recorded with the frames: {error}; record them again") from None
    return truth


class _NotOfFramesError(Exception):
    """What in a truth cannot be."""


def _check(truth: Truth, seen: Observed) -> None:
    """Shapes, dtypes and numbers, as far as the frames say what they must be: attacks are scored with them."""
    count, there = len(truth.micro_batches), len(seen.micro_batches)
    if not count or not count <= there <= count + MOST_WITHOUT_TRUTH:
        raise _NotOfFramesError(f"it has {count:,} micro-batches, and they have {there:,}")
    for index, (each, crossed) in enumerate(zip(truth.micro_batches, seen.micro_batches, strict=False)):
        _check_micro_batch(f"micro-batch {index}", each, crossed)
    for example in truth.examples:
        positions = example.label_positions
        inside = len(positions) and positions.min() >= 0 and positions.max() + 1 < len(example.ids)
        if example.ids.ndim != 1 or positions.ndim != 1 or not inside or not _are_tokens(example.ids):
            raise _NotOfFramesError("an example has labels that are none")
    for parameters in truth.parameters:
        _check_parameters(parameters, seen.opening, count)
    first = next((index for index, each in enumerate(seen.micro_batches) if each.deltas), None)
    if first is not None and not any(each.micro_batch <= first for each in truth.parameters):
        raise _NotOfFramesError("it has no parameters of the first micro-batch that exchanges")
    for gradients in truth.gradients:
        if not 0 <= gradients.first <= gradients.end <= count:
            raise _NotOfFramesError("gradients of micro-batches that there are not")
        shapes = {name: values.shape for named in gradients.parameters.groups for name, values in named.items()}
        _check_values(gradients.values, {name: shapes.get(name, ()) for name in gradients.values})


def _check_micro_batch(name: str, true: TrueMicroBatch, crossed: SeenMicroBatch) -> None:
    for values in (true.ids, true.lengths, true.label_positions, true.labels):
        if values.ndim != 1 or values.dtype.kind != "i":
            raise _NotOfFramesError(f"{name} has something else than rows of whole numbers")
    if len(true.ids) != crossed.begun.tokens or true.lengths.tolist() != crossed.lengths:
        raise _NotOfFramesError(f"{name} has other lengths")
    if len(true.labels) != len(true.label_positions):
        raise _NotOfFramesError(f"{name} has labels without a position")
    if len(true.labels) and true.label_positions.tolist() != crossed.label_positions:
        raise _NotOfFramesError(f"{name} has other label positions")
    if not _are_tokens(true.ids) or not _are_tokens(true.labels):
        raise _NotOfFramesError(f"{name} has tokens that are none")


def _check_parameters(parameters: Parameters, opening: OpenSession, micro_batches: int) -> None:
    groups, kind = opening.groups, kind_of(opening.adapter)
    of_groups = len(parameters.scales) == len(parameters.groups) == len(groups)
    if not of_groups or not 0 <= parameters.micro_batch <= micro_batches:
        raise _NotOfFramesError("parameters of other groups")
    if not all(0 <= scale <= LARGEST_SCALE for scale in parameters.scales):
        raise _NotOfFramesError("a scale that is none")
    for group, named in zip(groups, parameters.groups, strict=True):
        _check_values(named, kind.parameter_shapes(opening.adapter, group))


def _check_values(values: Mapping[str, FloatArray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if set(values) != set(shapes):
        raise _NotOfFramesError("parameters of other names")
    for name, each in values.items():
        if each.dtype != np.float32 or each.shape != shapes[name] or not np.isfinite(each).all():
            raise _NotOfFramesError(f"{name[:100]} has another shape, or values that are no numbers")


def _are_tokens(ids: npt.NDArray[np.int64]) -> bool:
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < 2**31)


def _read(path: Path, tokenizer: TruthTokenizer | None) -> Truth:
    with safe_open(path, framework="np") as file:
        about = msgspec.json.decode((file.metadata() or {})["truth"], type=_About)
        if about.format != TRUTH_FORMAT:
            raise ValueError(about.format)
        _check_is_bounded(about)
        names = set(file.keys())

        tensor = file.get_tensor
        of_micro_batch = ("ids", "lengths", "label_positions", "labels")
        micro_batches = [
            TrueMicroBatch(*(tensor(f"micro_batch.{index}.{name}") for name in of_micro_batch))
            for index in range(len(about.modes))
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
            if each.snapshot < 0:
                raise ValueError(each.snapshot)
            gradients.append(Gradients(parameters[each.snapshot], each.first, each.end, values))
        examples = [
            TrueExample(*(_whole(tensor(f"example.{index}.{name}")) for name in ("ids", "label_positions")))
            for index in range(about.examples)
        ]
    return Truth(about.recording, micro_batches, parameters, gradients, examples, about.seed_was_chosen, tokenizer)


def _check_is_bounded(about: _About) -> None:
    """A description must not have tensors read again and again: there is no more of anything than micro-batches, which
    have tensors of their own. Raises ``ValueError``."""
    most = 2 * len(about.modes) + 2
    if len(about.gradients) > most or len(about.snapshots) > most:
        raise ValueError(most)
    for each in about.snapshots:
        names = [name for group in each.names for name in group]
        if len(set(names)) < len(names):
            raise ValueError(names)


def _whole(values: Any) -> Any:
    if values.dtype.kind != "i":
        raise ValueError(values.dtype)
    return values.astype(np.int64)
