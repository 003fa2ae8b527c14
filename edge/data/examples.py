"""Training examples: token ids and which of them are labels."""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dlora.edge.choices import TooLong
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import IntArray

from .records import FIELDS, parse_columns, read_records

if TYPE_CHECKING:  # training needs data sets, and no tokenizer
    from .tokenizer import EdgeTokenizer

BoolArray = npt.NDArray[np.bool_]
MAX_PLACES: Final = 3
_SAMPLE: Final = 1000


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


class Dataset:
    """Examples in four flat arrays, so that a million tokens take a few megabytes.

    Args:
        ids: int32 (tokens,) of all examples; starts: int64 (examples + 1,).
        label_positions: int32 (labels,), counted from each example's start; label_starts: int64 (examples + 1,).

    Attributes:
        assistant_header: the tokens with which the chat template begins an answer; none where it had no part in this.
        invocation: the tokens from which on adapters act (``invocation.py``); none: they act everywhere.
        skipped, truncated: how many examples were, for their length; one that lost its whole answer was skipped.
        skipped_places, truncated_places: ``file:line`` of the first few of them.
    """

    def __init__(
        self,
        ids: IntArray,
        starts: npt.NDArray[np.int64],
        label_positions: IntArray,
        label_starts: npt.NDArray[np.int64],
        *,
        skipped: int = 0,
        truncated: int = 0,
        skipped_places: tuple[str, ...] = (),
        truncated_places: tuple[str, ...] = (),
        assistant_header: tuple[int, ...] = (),
    ) -> None:
        self.assistant_header = assistant_header
        self.invocation: tuple[int, ...] = ()
        self._ids = ids
        self._starts = starts
        self._label_positions = label_positions
        self._label_starts = label_starts
        self.skipped = skipped
        self.truncated = truncated
        self.skipped_places = skipped_places
        self.truncated_places = truncated_places

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """The four arrays that make a data set, in the order of the arguments."""
        return self._ids, self._starts, self._label_positions, self._label_starts

    @classmethod
    def of(cls, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Dataset:
        """A data set from (ids, label positions) pairs that are in memory already."""
        building = _Builder()
        for ids, positions in examples:
            building.add(np.asarray(ids, np.int32), np.asarray(positions, np.int32))
        return building.dataset()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self._ids[self._starts[index] : self._starts[index + 1]]
        positions = self._label_positions[self._label_starts[index] : self._label_starts[index + 1]]
        acts_from = last_occurrence(ids, self.invocation) if self.invocation else None
        return Example(ids, positions, ids[positions + 1].astype(np.int64), acts_from)

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def labelled(self) -> int:
        """How many tokens are labels."""
        return len(self._label_positions)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 (examples,)."""
        return np.diff(self._starts)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over all ids, label positions and boundaries: a resumed run must find the same."""
        digest = hashlib.sha256(b"dlora data set 1\0")
        for part in (self._starts, self._label_starts, self._ids, self._label_positions):
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
        acting = copy.copy(self)
        acting.invocation = invocation
        return acting

    def one_answer_each(self) -> Dataset:
        """Each answer an example of its own, with all that comes before it and nothing after; itself where it is so."""
        if all(_is_one_answer(example) for example in self):
            return self
        building = _Builder()
        for example in self:
            gaps = np.flatnonzero(np.diff(example.label_positions) > 1) + 1
            for answer in np.split(example.label_positions, gaps):
                building.add(example.ids[: answer[-1] + 2], answer)
        made = building.dataset()
        made.assistant_header = self.assistant_header
        for name in ("skipped", "truncated", "skipped_places", "truncated_places"):
            setattr(made, name, getattr(self, name))
        return made

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Dataset:
        """The examples of ``indices``, in that order, copied."""
        building = _Builder()
        for index in indices:
            example = self[int(index)]
            building.add(example.ids, example.label_positions)
        made = building.dataset()
        made.assistant_header, made.invocation = self.assistant_header, self.invocation
        return made


def _is_one_answer(example: Example) -> bool:
    positions = example.label_positions
    is_one_run = int(positions[-1] - positions[0]) + 1 == len(positions)
    return is_one_run and int(positions[-1]) + 2 == len(example.ids)


def load_examples(
    path: Path,
    tokenizer: EdgeTokenizer,
    *,
    columns: str | Mapping[str, str] | None = None,
    max_length: int,
    too_long: TooLong = "error",
    on_place: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Read and tokenize a JSONL, CSV or TSV file.

    A record has ``messages`` (loss on the assistant's turns), ``prompt`` and ``completion`` (loss on the
    completion), or ``text`` (loss on all of it). The last two end with the end-of-sequence token.

    Args:
        columns: our field to the file's column, or the same as text, ``prompt=COLUMN,completion=COLUMN``.
        max_length: most tokens of an example; ``too_long`` says what happens to longer ones.
        on_place: is called with what is read now: the file, ``file:line`` of an example, what follows it.

    Raises ``DataError`` with file and line.
    """
    chosen = parse_columns(columns) if isinstance(columns, str) else columns
    building = _Builder()
    record = None
    is_chat = True
    on_place(str(path))
    for record in read_records(path, chosen):
        on_place(record.place)
        try:
            encoded = _encode_record(record.fields, tokenizer, max_length, truncate=too_long == "truncate")
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
        on_place(f"what follows {record.place}")
        is_chat &= "messages" in record.fields
        is_too_long = encoded.tokens > max_length
        if is_too_long and too_long == "error":
            raise DataError(
                f"{record.place}: {encoded.tokens} tokens, the limit is {max_length}; "
                "raise --max-length, or choose --too-long truncate or skip"
            )
        # A token is a label of the row before it; the first has none.
        positions = np.flatnonzero(encoded.is_label[1:]).astype(np.int32)
        if not len(positions):
            if not is_too_long:
                raise DataError(f"{record.place}: nothing to learn: no token of it follows another and is a label")
            building.skip(record.place)
            continue
        if is_too_long:
            building.truncate(record.place)
        building.add(encoded.ids, positions)
    if record is None:
        raise DataError(f"{path}: no examples in it")
    if not len(building):
        left = ", and truncated to it none has a label" if too_long == "truncate" else ""
        raise DataError(f"{path}: every example is over the limit of {max_length} tokens{left}; raise --max-length")
    dataset = building.dataset()
    if is_chat:
        on_place("the chat template")
        dataset.assistant_header = tokenizer.assistant_header()
    return dataset


def split_holdout(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and held-out parts, drawn without replacement; each keeps the file's order and at least one example.

    Raises ``DataError`` for fewer than two examples.
    """
    count = len(dataset)
    if count < 2:
        raise DataError("a held-out part needs at least two examples; give --eval a file of its own")
    held = min(count - 1, max(1, round(fraction * count)))
    drawn = np.random.default_rng([seed, 0xE]).permutation(count)
    return dataset.subset(np.sort(drawn[held:])), dataset.subset(np.sort(drawn[:held]))


class _Builder:
    def __init__(self) -> None:
        self._ids, self._positions = array("i"), array("i")
        self._starts, self._label_starts = array("q", [0]), array("q", [0])
        self._skipped = self._truncated = 0
        self._skipped_places: list[str] = []
        self._truncated_places: list[str] = []

    def __len__(self) -> int:
        return len(self._starts) - 1

    def skip(self, place: str) -> None:
        self._skipped += 1
        self._skipped_places += [place][: MAX_PLACES - len(self._skipped_places)]

    def truncate(self, place: str) -> None:
        self._truncated += 1
        self._truncated_places += [place][: MAX_PLACES - len(self._truncated_places)]

    def add(self, ids: IntArray, positions: IntArray) -> None:
        self._ids.frombytes(ids.tobytes())
        self._positions.frombytes(positions.tobytes())
        self._starts.append(len(self._ids))
        self._label_starts.append(len(self._positions))

    def dataset(self) -> Dataset:
        return Dataset(
            np.frombuffer(self._ids, np.int32),
            np.frombuffer(self._starts, np.int64),
            np.frombuffer(self._positions, np.int32),
            np.frombuffer(self._label_starts, np.int64),
            skipped=self._skipped,
            truncated=self._truncated,
            skipped_places=tuple(self._skipped_places),
            truncated_places=tuple(self._truncated_places),
        )


class _Encoded(NamedTuple):
    """A record as tokens, truncated to the limit: ids int32, which are labels bool; and how many there were before.

    A record over the limit that is not to be truncated has none of either: what its labels are may take long to find
    out.
    """

    ids: IntArray
    is_label: BoolArray
    tokens: int


def _encode_record(fields: Mapping[str, Any], tokenizer: EdgeTokenizer, max_length: int, *, truncate: bool) -> _Encoded:
    given = [name for name in FIELDS if name in fields]
    if given == ["messages"]:
        return _encode_messages(fields["messages"], fields.get("tools"), tokenizer, max_length, truncate=truncate)
    if given == ["prompt", "completion"]:
        ids, is_label = _encode_text(_text(fields, "prompt"), _text(fields, "completion"), tokenizer)
        return _limited(ids, is_label, max_length, truncate=truncate)
    if given == ["text"]:
        text = _text(fields, "text")
        if not text:
            raise DataError("the text is empty")
        return _limited(*_encode_text("", text, tokenizer), max_length, truncate=truncate)
    found = ", ".join(map(repr, fields)) or "nothing"
    raise DataError(
        f"needs either 'messages', or 'prompt' and 'completion', or 'text'; it has {found} "
        "(--columns text=COLUMN or prompt=COLUMN,completion=COLUMN chooses)"
    )


def _limited(ids: IntArray, is_label: BoolArray, max_length: int, *, truncate: bool) -> _Encoded:
    kept = min(len(ids), max_length) if truncate or len(ids) <= max_length else 0
    return _Encoded(ids[:kept], is_label[:kept], len(ids))


def _encode_text(prompt: str, completion: str, tokenizer: EdgeTokenizer) -> tuple[IntArray, BoolArray]:
    encoded = tokenizer.encode(prompt + completion, add_special_tokens=True)
    # "Answer: " + "yes" makes one token of " yes": blanks at the prompt's end go with the completion's first word.
    starts, ends = encoded.spans[:, 0], encoded.spans[:, 1]
    is_label = (starts >= len(prompt.rstrip())) & (ends > len(prompt)) & ~encoded.added
    ids = encoded.ids
    # Tokens that the tokenizer puts at the end (some add EOS by themselves) belong to the completion.
    trailing = len(ids)
    while trailing and encoded.added[trailing - 1]:
        trailing -= 1
    is_label[trailing:] = True
    eos = tokenizer.eos_token_id
    if eos is not None and (not len(ids) or ids[-1] != eos):
        ids, is_label = np.append(ids, np.int32(eos)), np.append(is_label, True)
    return ids, is_label


def _encode_messages(
    messages: Any, tools: Any, tokenizer: EdgeTokenizer, max_length: int, *, truncate: bool
) -> _Encoded:
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} must be an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number} needs a 'role', a string")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"message {number} needs a 'content', a string")
    if tools is not None and not isinstance(tools, list):
        raise DataError("'tools' must be a list")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("nothing to learn: no message has the role 'assistant'")
    template = tokenizer.chat_template
    text = template.render(messages, tools=tools)
    encoded = tokenizer.encode(text, add_special_tokens=False)  # templates write their own
    kept = _limited(encoded.ids, np.zeros(len(encoded.ids), np.bool_), max_length, truncate=truncate)
    if not len(kept.ids):
        return kept
    # Turns are found by rendering all that precedes them: only those of which a token is left.
    spans = encoded.spans[: len(kept.ids)]
    is_label = kept.is_label
    for start, end in template.assistant_spans(messages, text, tools=tools, end=int(spans.max())):
        is_label |= (spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > start)
    return kept._replace(is_label=is_label)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{name!r} must be a string, not {type(value).__name__}")
    return value
