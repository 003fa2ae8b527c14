"""Data sets for a run, read and tokenized in a child process, and gone from memory but for their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.choices import TooLong
from dlora.edge.engine.bundle import Bundle
from dlora.protocol.errors import BundleError, DataError, UsageError
from dlora.protocol.manifest import Manifest

from .child import Buffer, Child, Note
from .examples import Dataset, load_examples

TOKENIZER_PLACE: Final = "the bundle's tokenizer"
DEFAULT_MAX_LENGTH: Final = 512


@dataclass(frozen=True)
class Reading:
    """Which files to read, and how; ``columns``, ``max_length`` and ``too_long`` as ``load_examples`` has them."""

    bundle: Bundle
    paths: Sequence[Path]
    columns: Mapping[str, str] | None
    max_length: int
    too_long: TooLong


def resolve_max_length(asked: int | None, manifest: Manifest) -> int:
    """The most tokens of an example: what was asked for, else ``DEFAULT_MAX_LENGTH``,
    or what the base model takes if that is less.

    Raises ``UsageError`` where more is asked for than the base model takes.
    """
    longest = manifest.base_model.max_sequence_length
    if asked is not None and asked > longest:
        raise UsageError(f"--max-length {asked} is over the {longest} tokens that the base model takes; lower it")
    return min(asked or DEFAULT_MAX_LENGTH, longest)


def load_datasets(reading: Reading, on_tick: Callable[[str], None] = lambda _: None) -> list[Dataset]:
    """The data set of each file. Call it before there are threads or an engine.

    ``on_tick`` is called once a second with what is read now: the tokenizer, the file, ``file:line``.

    Raises ``DataError`` with file and line, or ``BundleError``: also where what the bundle's tokenizer and chat
    template make of a line never ends, takes all memory or crashes.
    """
    note = Note()
    with Child(lambda _: _read(reading, note), note, on_tick) as child:
        parts = child.call()
    per_file = len(parts) // len(reading.paths)
    return [_unpacked(parts[start : start + per_file]) for start in range(0, len(parts), per_file)]


class _Facts(msgspec.Struct):
    """What a data set is besides its arrays."""

    skipped: int
    truncated: int
    skipped_places: tuple[str, ...]
    truncated_places: tuple[str, ...]
    assistant_header: tuple[int, ...]
    dtypes: tuple[str, ...]


def _read(reading: Reading, note: Note) -> list[Buffer]:
    note.set_place(TOKENIZER_PLACE, BundleError)
    from .tokenizer import EdgeTokenizer  # here, in the child: it takes 30 MB, and training needs none

    tokenizer = EdgeTokenizer.open(reading.bundle)
    parts: list[Buffer] = []
    for path in reading.paths:
        dataset = load_examples(
            path,
            tokenizer,
            columns=reading.columns,
            max_length=reading.max_length,
            too_long=reading.too_long,
            on_place=lambda place: note.set_place(place, DataError),
        )
        parts += _packed(dataset)
    return parts


def _packed(dataset: Dataset) -> list[Buffer]:
    facts = _Facts(
        dataset.skipped,
        dataset.truncated,
        dataset.skipped_places,
        dataset.truncated_places,
        dataset.assistant_header,
        tuple(array.dtype.str for array in dataset.arrays),
    )
    return [msgspec.msgpack.encode(facts), *(array.data.cast("B") for array in dataset.arrays)]


def _unpacked(parts: Sequence[Buffer]) -> Dataset:
    facts = msgspec.msgpack.decode(parts[0], type=_Facts)
    arrays: list[npt.NDArray[Any]] = [
        np.frombuffer(part, dtype) for part, dtype in zip(parts[1:], facts.dtypes, strict=True)
    ]
    return Dataset(
        *arrays,
        skipped=facts.skipped,
        truncated=facts.truncated,
        skipped_places=facts.skipped_places,
        truncated_places=facts.truncated_places,
        assistant_header=facts.assistant_header,
    )
