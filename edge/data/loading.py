"""Data sets for a run, read and tokenized in a child process, and gone from memory but for their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.settings import Data
from dlora.protocol.child import Buffer, Child, Note
from dlora.protocol.errors import BundleError, DataError

from .examples import DataFacts, Dataset
from .question import Question, Wanted
from .read_settings import Look, ReadSettings, read_settings

if TYPE_CHECKING:
    from .tokenizer import EdgeTokenizer

OnPlace = Callable[[str], None]
TOKENIZER_PLACE: Final = "the bundle's tokenizer"
ADVICE: Final = "shorten it, or export the bundle again if its tokenizer or its chat template is at fault"
_PARTS: Final = 5  # of a data set: its header, and its arrays


@dataclass(frozen=True)
class Reading:
    """Which files to read, and how.

    Attributes:
        paths: the data to train on, and those to evaluate on where there are some.
    """

    bundle: Bundle
    paths: Sequence[Path]
    settings: ReadSettings

    @classmethod
    def of(cls, data: Data, bundle: Bundle) -> Reading:
        """What ``dlora-edge train`` reads. ``data.data`` is given. Raises ``UsageError``."""
        assert data.data is not None
        paths = [data.data] if data.eval is None else [data.data, data.eval]
        return cls(bundle, paths, read_settings(data, bundle.manifest))


def load_datasets(reading: Reading, on_tick: OnPlace = lambda _: None) -> list[Dataset]:
    """The data set of each file, and the part of an only one that is held out, where one is. Call it before there are
    threads or an engine.

    ``on_tick`` is called once a second with what is read now: the tokenizer, the file, ``file:line``.

    Raises ``DataError`` with file and line, or ``BundleError``: also where what the bundle's tokenizer and chat
    template make of a line never ends, takes all memory or crashes.
    """

    def read(tokenizer: EdgeTokenizer, on_place: OnPlace) -> list[Buffer]:
        from .reading import load_split

        found: list[Dataset] = []
        settings = reading.settings
        for path in reading.paths:
            found += load_split(path, tokenizer, settings, on_place)
            settings = replace(settings, part="test")
        return [part for dataset in found for part in _packed(dataset)]

    parts = _in_child(reading.bundle, read, on_tick)
    return [_unpacked(parts[start : start + _PARTS]) for start in range(0, len(parts), _PARTS)]


def load_questions(
    bundle: Bundle, path: Path, settings: ReadSettings, wanted: Wanted, on_tick: OnPlace = lambda _: None
) -> list[Question]:
    """What ``questions.read_questions`` reads. Raises as it does, and likewise."""

    def read(tokenizer: EdgeTokenizer, on_place: OnPlace) -> list[Buffer]:
        from .questions import read_questions

        return [msgspec.msgpack.encode(read_questions(path, tokenizer, settings, wanted, on_place))]

    (encoded,) = _in_child(bundle, read, on_tick)
    return msgspec.msgpack.decode(encoded, type=list[Question])


def load_overview(
    bundle: Bundle, path: Path, settings: ReadSettings, look: Look, on_tick: OnPlace = lambda _: None
) -> dict[str, Any]:
    """What ``overview.look_at`` finds, as JSON has it. Raises as it does, and likewise."""

    def read(tokenizer: EdgeTokenizer, on_place: OnPlace) -> list[Buffer]:
        from .overview import look_at

        return [msgspec.json.encode(look_at(path, tokenizer, settings, look, on_place))]

    (encoded,) = _in_child(bundle, read, on_tick)
    found: dict[str, Any] = msgspec.json.decode(encoded)
    return found


def _in_child(
    bundle: Bundle, read: Callable[[EdgeTokenizer, OnPlace], list[Buffer]], on_tick: OnPlace
) -> list[bytearray]:
    """What ``read`` makes with the bundle's tokenizer: it takes 30 MB, which this process does without."""
    note = Note(ADVICE)

    def work(_: bytes) -> list[Buffer]:
        note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer

        return read(EdgeTokenizer.open(bundle), lambda place: note.set_place(place, DataError))

    with Child(work, note, on_tick) as child:
        return child.call()


class _Header(msgspec.Struct):
    """What a data set is besides its arrays."""

    facts: DataFacts
    dtypes: tuple[str, ...]


def _packed(dataset: Dataset) -> list[Buffer]:
    arrays = dataset.ids, dataset.starts, dataset.label_positions, dataset.label_starts
    header = _Header(dataset.facts, tuple(array.dtype.str for array in arrays))
    return [msgspec.msgpack.encode(header), *(array.data.cast("B") for array in arrays)]


def _unpacked(parts: Sequence[Buffer]) -> Dataset:
    header = msgspec.msgpack.decode(parts[0], type=_Header)
    ids, starts, positions, label_starts = map(np.frombuffer, parts[1:], header.dtypes)
    return Dataset(ids, starts, positions, label_starts, header.facts)
