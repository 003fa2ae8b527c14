"""Training examples: token ids and which of them are labels."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.protocol.tensors import IntArray

MAX_PLACES: Final = 3
_SAMPLE: Final = 1000


class Places(msgspec.Struct):
    """How many rows of data there are to tell of.

    Attributes:
        first: ``file:line`` of the first few.
    """

    count: int = 0
    first: tuple[str, ...] = ()

    def add(self, place: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < MAX_PLACES:
            self.first = (*self.first, place)

    def __str__(self) -> str:
        """The first few of them."""
        return ", ".join(self.first) + (", …" if self.count > len(self.first) else "")


class DataFacts(msgspec.Struct):
    """What was found while a data set was read.

    Attributes:
        form: of the data, in words (``forms.Form``); nothing where they were not read.
        rows: records, or documents.
        skipped, truncated: for their length; a row that lost its whole answer was skipped.
        empty_answers: rows whose answer has no word.
        calls_left_out: rows with calls of tools that the chat template does not write.
        assistant_header: the tokens with which the chat template begins an answer; none where it had no part in this.
        has_marks: whether the chat template itself said what the assistant wrote.
    """

    form: str = ""
    rows: int = 0
    skipped: Places = msgspec.field(default_factory=Places)
    truncated: Places = msgspec.field(default_factory=Places)
    empty_answers: Places = msgspec.field(default_factory=Places)
    calls_left_out: Places = msgspec.field(default_factory=Places)
    assistant_header: tuple[int, ...] = ()
    has_marks: bool = False

    @property
    def is_plain_text(self) -> bool:
        """Whether the data are texts to go on with, so that there are no answers in them."""
        return self.form in ("text", "documents")


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        ids: int32 (tokens,).
        label_positions: int32 (labels,), ascending rows whose *next* token is a label.
        labels: int64 (labels,), ``ids[label_positions + 1]``.
        acts_from: the row from which adapters act; None: all of them.
    """

    ids: IntArray
    label_positions: IntArray
    labels: npt.NDArray[np.int64]
    acts_from: int | None = None

    @classmethod
    def of(cls, ids: IntArray, label_positions: IntArray) -> Example:
        """From its tokens and the rows whose next token is a label."""
        return cls(ids, label_positions, ids[label_positions + 1].astype(np.int64))

    @property
    def crossing_rows(self) -> range:
        """The rows at which adapters act: the last ones that predict a label among them, and none after those."""
        return range(self.acts_from or 0, int(self.label_positions[-1]) + 1)


def last_occurrence(ids: IntArray, tokens: Sequence[int]) -> int:
    """Where ``tokens`` begin for the last time in ``ids``; its length where they do not occur."""
    starts = len(ids) - len(tokens) + 1
    if starts <= 0:
        return len(ids)
    matches = np.ones(starts, np.bool_)
    for offset, token in enumerate(tokens):
        matches &= ids[offset : offset + starts] == token
    found = np.flatnonzero(matches)
    return int(found[-1]) if found.size else len(ids)


@dataclass(eq=False)
class Dataset:
    """Examples in four flat arrays, so that a million tokens take a few megabytes.

    Attributes:
        ids: int32 (tokens,) of all examples; starts: int64 (examples + 1,).
        label_positions: int32 (labels,), counted from each example's start; label_starts: int64 (examples + 1,).
        facts: what was found when they were read.
        invocation: the tokens from which on adapters act (``invocation.py``); none: they act everywhere.
    """

    ids: IntArray
    starts: npt.NDArray[np.int64]
    label_positions: IntArray
    label_starts: npt.NDArray[np.int64]
    facts: DataFacts = field(default_factory=DataFacts)
    invocation: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        examples: Iterable[tuple[Sequence[int] | IntArray, Sequence[int] | IntArray]],
        facts: DataFacts | None = None,
    ) -> Dataset:
        """A data set from (ids, label positions) pairs as they come, in the memory that its tokens take."""
        ids, label_positions = array("i"), array("i")
        starts, label_starts = array("q", [0]), array("q", [0])
        for tokens, positions in examples:
            ids.frombytes(np.asarray(tokens, np.int32).tobytes())
            label_positions.frombytes(np.asarray(positions, np.int32).tobytes())
            starts.append(len(ids))
            label_starts.append(len(label_positions))
        return cls(
            np.frombuffer(ids, np.int32),
            np.frombuffer(starts, np.int64),
            np.frombuffer(label_positions, np.int32),
            np.frombuffer(label_starts, np.int64),
            facts or DataFacts(),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.ids[self.starts[index] : self.starts[index + 1]]
        positions = self.label_positions[self.label_starts[index] : self.label_starts[index + 1]]
        acts_from = last_occurrence(ids, self.invocation) if self.invocation else None
        return Example(ids, positions, ids[positions + 1].astype(np.int64), acts_from)

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> int:
        """How many tokens are labels."""
        return len(self.label_positions)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 (examples,)."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over all ids, label positions and boundaries: a resumed run must find the same."""
        digest = hashlib.sha256(b"dlora data set 1\0")
        for part in (self.starts, self.label_starts, self.ids, self.label_positions):
            digest.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()

    @property
    def mean_crossing_rows(self) -> float:
        """At how many rows of an example adapters act, about: the tokens of it that cross at each exchange group."""
        if not self.invocation:
            return self.tokens / len(self)
        sample = range(0, len(self), -(-len(self) // _SAMPLE))
        return sum(len(self[index].crossing_rows) for index in sample) / len(sample)

    def acting_on_answers(self, invocation: tuple[int, ...]) -> Dataset:
        """The same examples, with adapters that act from the last ``invocation`` on."""
        return replace(self, invocation=invocation)

    def one_answer_each(self) -> Dataset:
        """Each answer an example of its own, with all that comes before it and nothing after; itself where it is so, or
        where there are no answers."""
        if self.facts.is_plain_text or all(_is_one_answer(example) for example in self):
            return self
        return Dataset.of((each for example in self for each in _answers_of(example)), self.facts)

    def joined(self, max_length: int) -> Dataset:
        """Examples that follow each other as one, as many as fit into ``max_length`` tokens: parts of texts. The first
        token of each stays no label."""
        return Dataset.of(map(_joined, self._runs(max_length)), self.facts)

    def _runs(self, max_length: int) -> Iterator[list[Example]]:
        run, size = list[Example](), 0
        for example in self:
            if run and size + len(example.ids) > max_length:
                yield run
                run, size = [], 0
            run.append(example)
            size += len(example.ids)
        if run:
            yield run

    def subset(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> Dataset:
        """The examples of ``indices``, in that order, copied."""
        examples = (self[int(index)] for index in indices)
        made = Dataset.of(((example.ids, example.label_positions) for example in examples), self.facts)
        return replace(made, invocation=self.invocation)


def _is_one_answer(example: Example) -> bool:
    positions = example.label_positions
    is_one_run = int(positions[-1] - positions[0]) + 1 == len(positions)
    return is_one_run and int(positions[-1]) + 2 == len(example.ids)


def _answers_of(example: Example) -> Iterator[tuple[IntArray, IntArray]]:
    gaps = np.flatnonzero(np.diff(example.label_positions) > 1) + 1
    for answer in np.split(example.label_positions, gaps):
        yield example.ids[: answer[-1] + 2], answer


def _joined(examples: Sequence[Example]) -> tuple[IntArray, IntArray]:
    starts = np.cumsum([0, *(len(example.ids) for example in examples[:-1])], dtype=np.int32)
    positions = [example.label_positions + start for example, start in zip(examples, starts, strict=True)]
    return np.concatenate([example.ids for example in examples]), np.concatenate(positions)
