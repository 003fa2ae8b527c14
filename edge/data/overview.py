"""What would be learnt of data: counts, lengths, rows to look at, and what is wrong with them. For the child process.

What is kept of a row while it is read is 20 bytes, whatever its length.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.files import make_directory, write_atomically
from dlora.protocol.errors import DataError

from .encoding import TokenSequence
from .examples import DataFacts, Places
from .read_settings import Look, ReadSettings
from .reading import SequenceReader
from .records import read_records
from .split import held_out_rows
from .tokenizer import EdgeTokenizer

TRAIN_FILE: Final = "train.jsonl"
HELD_OUT_FILE: Final = "held-out.jsonl"
_BARS: Final = 12


class Bar(msgspec.Struct, frozen=True):
    """How many examples have more than the bar before it and at most so many tokens."""

    up_to: int
    examples: int


class ShownRow(msgspec.Struct, frozen=True):
    """A row as the model reads it.

    Attributes:
        tokens: their texts; ids: token ids; learnt: whether each is a label.
    """

    place: str
    tokens: list[str]
    ids: list[int]
    learnt: list[bool]


class Overview(msgspec.Struct):
    """What was found in data.

    Attributes:
        form: of the rows; has_marks: whether the chat template's own marks say what is learnt.
        rows: records or documents; examples: what is learnt of them: pieces, of documents.
        labelled: tokens that are labels.
        lengths: tokens an example: the least, the median, of 95 in 100, the most; histogram of them.
        truncated, skipped: those that were, for that reason.
        empty_answers: with nothing but blanks; wordless_answers: with no letter or digit.
        calls_left_out: as ``DataFacts`` has it.
        duplicates: rows that say the same as one before; in_held_out: rows that say the same as one held out.
        problems: rows that cannot be learnt from; reasons: the first few of them, in words.
        held_out: examples, where there are some.
        shown: rows to look at.
    """

    max_length: int
    form: str = ""
    has_marks: bool = False
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    labelled: int = 0
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)
    histogram: list[Bar] = []
    truncated: Places = msgspec.field(default_factory=Places)
    skipped: Places = msgspec.field(default_factory=Places)
    empty_answers: Places = msgspec.field(default_factory=Places)
    wordless_answers: Places = msgspec.field(default_factory=Places)
    calls_left_out: Places = msgspec.field(default_factory=Places)
    duplicates: Places = msgspec.field(default_factory=Places)
    in_held_out: Places = msgspec.field(default_factory=Places)
    problems: Places = msgspec.field(default_factory=Places)
    reasons: list[str] = []
    held_out: int = 0
    shown: list[ShownRow] = []


class _Table:
    """What is kept of each example: 20 bytes."""

    def __init__(self) -> None:
        self._lengths, self._digests, self.lines = array("i"), array("Q"), array("Q")
        self._files, self._begins = list[str](), list[int]()  # of each file, the number of its first example

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, place: str, sequence: TokenSequence) -> None:
        file, _, line = place.rpartition(":")
        if not self._files or self._files[-1] != file:
            self._files.append(file)
            self._begins.append(len(self))
        self.lines.append(int(line))
        self._lengths.append(sequence.tokens)
        self._digests.append(sequence.digest)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._lengths, np.int32)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._digests, np.uint64)

    def place(self, index: int) -> str:
        return f"{self._files[bisect_right(self._begins, index) - 1]}:{self.lines[index]}"

    def places(self, indices: npt.NDArray[np.int64]) -> Places:
        found = Places()
        for index in indices[:4].tolist():
            found.add(self.place(index))
        found.count = len(indices)
        return found


def look_at(
    path: Path,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    look: Look,
    on_place: Callable[[str], None] = lambda _: None,
) -> Overview:
    """Read ``path`` as training would, and say what was found; rows that cannot be learnt from are counted, not raised.

    Raises ``DataError`` for a file that cannot be read, and for a split that cannot be; ``StorageError``.
    """
    reader = SequenceReader(path, tokenizer, settings, on_place)
    found = Overview(settings.max_length)
    table = _read(reader, found, look)
    if len(table):
        _count(table, found)
    if look.held_out is not None:
        others = replace(reader, path=look.held_out, settings=replace(settings, part="test"))
        held_out = _read(others, Overview(settings.max_length), Look())
        found.held_out = len(held_out)
        found.in_held_out = table.places(np.flatnonzero(np.isin(table.digests, held_out.digests)))
    elif settings.split and len(table):
        is_held = held_out_rows(table.digests, settings.split)
        found.held_out = int(is_held.sum())
        if look.out is not None and found.held_out:
            make_directory(look.out)
            for name, part in ((TRAIN_FILE, ~is_held), (HELD_OUT_FILE, is_held)):
                rows = (fields for index, fields in _again(reader, table) if part[index])
                write_atomically(look.out / name, (msgspec.json.encode(fields) + b"\n" for fields in rows))
    return found


def _read(template: SequenceReader, found: Overview, look: Look) -> _Table:
    """What is kept of each example that a reader like ``template`` gives, and in ``found`` what was found."""

    def on_problem(problem: DataError) -> None:
        text = str(problem)
        found.problems.add(text)
        if len(found.reasons) < len(found.problems.first):
            found.reasons.append(text)

    facts, table = DataFacts(), _Table()
    for record, sequence in replace(template, on_problem=on_problem, facts=facts):
        place = record.place
        table.add(place, sequence)
        found.tokens += len(sequence.ids)
        found.labelled += len(sequence.positions)
        if not any(map(str.isalnum, sequence.answer)) and not sequence.has_empty_answer:
            found.wordless_answers.add(place)
        if table.lines[-1] in look.lines if look.lines else len(found.shown) < look.show:
            found.shown.append(_shown(place, sequence, template.tokenizer))
    for name in ("form", "has_marks", "rows", "truncated", "skipped", "empty_answers", "calls_left_out"):
        setattr(found, name, getattr(facts, name))
    found.examples = len(table)
    return table


def _count(table: _Table, found: Overview) -> None:
    lengths = np.sort(table.lengths)
    last = len(lengths) - 1
    least, median, most_of_them, most = (int(lengths[round(share * last)]) for share in (0, 0.5, 0.95, 1))
    found.lengths = (least, median, most_of_them, most)
    width = max(1, -(-most // _BARS))
    width = next(size for size in (step * 10**power for power in range(9) for step in (1, 2, 5)) if size >= width)
    edges = np.arange(width, most + width, width)
    counts = np.diff(np.searchsorted(lengths, edges, side="right"), prepend=0)
    found.histogram = [Bar(int(edge), int(count)) for edge, count in zip(edges, counts, strict=True)]
    _, firsts = np.unique(table.digests, return_index=True)
    is_first = np.zeros(len(table), np.bool_)
    is_first[firsts] = True
    found.duplicates = table.places(np.flatnonzero(~is_first))


def _shown(place: str, sequence: TokenSequence, tokenizer: EdgeTokenizer) -> ShownRow:
    tokens, end = list[str](), 0
    for token, (_, stop) in zip(sequence.ids.tolist(), sequence.spans.tolist(), strict=True):
        if stop:  # tokens of one character show it once; blanks that a span leaves out go with what follows them
            tokens.append(sequence.text[end:stop])
            end = max(end, stop)
        else:
            tokens.append(tokenizer.decode([token], skip_special_tokens=False))
    learnt = [False, *sequence.is_label[1:].tolist()]  # nothing predicts the first
    return ShownRow(place, tokens, sequence.ids.tolist(), learnt)


def _again(template: SequenceReader, table: _Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each example of ``table``, and the row that it was made of, as it stands in its file; a piece of a
    document as the text that it is."""
    index = 0
    for record in read_records(template.path, template.settings.columns, part=template.settings.part):
        template.on_place(record.place)
        if record.part is not None:
            pieces = replace(template, on_problem=lambda _: None, facts=DataFacts())
            yield from enumerate({"text": sequence.text} for _, sequence in pieces)
            return
        if index < len(table) and record.place == table.place(index):  # the others were problems
            yield index, record.fields
            index += 1
