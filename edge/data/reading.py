"""Data files to token sequences, row by row, and to data sets."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dlora.edge.choices import TooLong, TrainOn
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import IntArray

from .encoding import TokenSequence, encode_sample
from .examples import DataFacts, Dataset, Places
from .forms import KEYS, Conversation, Form, form_of, sample_of
from .read_settings import ReadSettings
from .records import Record, parse_columns, read_records
from .split import held_out_rows
from .tokenizer import EdgeTokenizer


@dataclass
class SequenceReader:
    """The token sequences of a file or a directory, as they are read; iterate over it once.

    Attributes:
        on_place: is called with what is read now: the file, ``file:line`` of a row, what follows it.
        on_problem: is called with what is wrong with a row, which is then left out; None: it is raised.
        facts: what was found so far.

    Iterating raises ``DataError`` with file and line.
    """

    path: Path
    tokenizer: EdgeTokenizer
    settings: ReadSettings
    on_place: Callable[[str], None] = lambda _: None
    on_problem: Callable[[DataError], None] | None = None
    facts: DataFacts = field(default_factory=DataFacts)
    _first: tuple[Form, str] | None = None  # the form of the first row, and its place
    _is_chat: bool = False  # whether the chat template writes the rows

    def __iter__(self) -> Iterator[tuple[Record, TokenSequence]]:
        """Each record, and what is learnt of it: at least one token. Of a document, several."""
        self.on_place(str(self.path))
        kept = 0
        for record in read_records(
            self.path, self.settings.columns, lambda path: self.on_place(str(path)), self.settings.part
        ):
            self.on_place(record.place)
            try:
                for sequence in self._sequences(record):
                    kept += 1
                    yield record, sequence
            except DataError as error:
                problem = DataError(f"{record.place}: {error}")
                if self.on_problem is None:
                    raise problem from None
                self.on_problem(problem)
            self.on_place(f"what follows {record.place}")
        self._check_end(kept)

    def _sequences(self, record: Record) -> Iterator[TokenSequence]:
        if record.part is None or record.part.ends:
            self.facts.rows += 1
        form = self._check_form(record)
        settings, facts, place = self.settings, self.facts, record.place
        sample = sample_of(record, form, has_chat_template=self.tokenizer.has_chat_template)
        if isinstance(sample, Conversation) and not self._is_chat:
            self._is_chat, facts.has_marks = True, self.tokenizer.chat_template.has_marks
        for sequence in encode_sample(sample, self.tokenizer, settings):
            is_too_long = sequence.tokens > settings.max_length
            if is_too_long and settings.too_long == "error":
                raise DataError(
                    f"{sequence.tokens} tokens, the limit is {settings.max_length}; "
                    "raise --max-length, or choose --too-long truncate or skip"
                )
            if isinstance(sample, Conversation) and not sample.has_its_calls_in(sequence.text):
                facts.calls_left_out.add(place)
            if sequence.has_empty_answer:
                facts.empty_answers.add(place)
            if len(sequence.positions):
                if is_too_long:
                    facts.truncated.add(place)
                yield sequence
            elif is_too_long:
                facts.skipped.add(place)
            elif form != "documents":  # of these it is a word of a text, or half of one
                raise DataError("nothing to learn: no token of it follows another and is a label")

    def _check_form(self, record: Record) -> Form:
        form = form_of(record)
        if self._first is None:
            self._first, self.facts.form = (form, record.place), form
        first, place = self._first
        if form != first:
            raise DataError(
                f"this is {form} ({KEYS[form]}), and the rows from {place} on are {first} ({KEYS[first]}); "
                "give each form a file of its own"
            )
        return form

    def _check_end(self, kept: int) -> None:
        facts, settings = self.facts, self.settings
        if not kept and self.on_problem is None:
            what = "no examples in it"
            if facts.form == "documents":
                what += ": its texts have less than two tokens"
            elif facts.rows:
                left = ", and truncated to it none has a label" if settings.too_long == "truncate" else ""
                what = f"every example is over the limit of {settings.max_length} tokens{left}; raise --max-length"
            raise DataError(f"{self.path}: {what}")
        if facts.rows and facts.empty_answers.count == facts.rows and settings.train_on != "all":
            raise DataError(
                f"{facts.empty_answers.first[0]}: its answer is empty, and so is every other: there is nothing to "
                "learn; --columns chooses the columns of a table"
            )
        if kept and self._is_chat:
            self.on_place("the chat template")
            facts.assistant_header = self.tokenizer.assistant_header()


def encode_row(fields: Mapping[str, Any], tokenizer: EdgeTokenizer, settings: ReadSettings) -> TokenSequence:
    """What is learnt of one row. Raises ``DataError``."""
    record = Record("the row", dict(fields))
    sample = sample_of(record, form_of(record), has_chat_template=tokenizer.has_chat_template)
    (sequence,) = encode_sample(sample, tokenizer, settings)
    if not len(sequence.positions):
        raise DataError("nothing to learn: no token of the row follows another and is a label")
    return sequence


def load_examples(
    path: Path,
    tokenizer: EdgeTokenizer,
    *,
    columns: str | Mapping[str, str] | None = None,
    max_length: int,
    too_long: TooLong = "error",
    train_on: TrainOn = "answers",
    on_place: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Read and tokenize a file or a directory, of any form that ``forms`` knows.

    Args:
        columns: as ``ReadSettings`` has them, or as text, ``prompt=COLUMN,completion=COLUMN``.

    Raises ``DataError`` with file and line.
    """
    chosen = parse_columns(columns) if isinstance(columns, str) else columns
    settings = ReadSettings(chosen, max_length, too_long, train_on)
    return load_split(path, tokenizer, settings, on_place)[0]


def load_split(
    path: Path, tokenizer: EdgeTokenizer, settings: ReadSettings, on_place: Callable[[str], None] = lambda _: None
) -> list[Dataset]:
    """Likewise, without the rows that are held out, and these where some are."""
    reader = SequenceReader(path, tokenizer, settings, on_place=on_place)
    digests = array("Q")

    def examples() -> Iterator[tuple[IntArray, IntArray]]:
        for _, sequence in reader:
            if settings.split:
                digests.append(sequence.digest)
            yield sequence.ids, sequence.positions

    found = [Dataset.of(examples(), reader.facts)]
    if settings.split:
        try:
            is_held = held_out_rows(np.frombuffer(digests, np.uint64), settings.split)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if is_held.any():
            trained, held = (found[0].subset(np.flatnonzero(rows)) for rows in (~is_held, is_held))
            held.facts = msgspec.structs.replace(reader.facts, skipped=Places(), truncated=Places())
            found = [trained, held]
    if reader.facts.form == "documents":
        found = [dataset.joined(settings.max_length) for dataset in found]
    return found
