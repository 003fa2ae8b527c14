"""What is learnt of one record: its tokens, and which of them are labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dlora.protocol.tensors import IntArray

from .forms import Completion, Conversation, Document, Sample
from .read_settings import ReadSettings
from .tokenizer import EdgeTokenizer, Encoded

BoolArray = npt.NDArray[np.bool_]
_EARLIEST_BREAK: Final = 0.5  # of a piece's tokens: no line break before it ends the piece


class TokenSequence(NamedTuple):
    """A record, or a piece of one, as tokens.

    Attributes:
        ids: int32 (tokens,), truncated to the limit; none where it is too long and is not to be truncated.
        is_label: bool (tokens,).
        tokens: how many there were before.
        text: what it was made of.
        spans: int32 (tokens, 2), the characters of ``text`` of each token.
        answer: what is learnt of it, without the template's own words; of a call of a tool, something.
    """

    ids: IntArray
    is_label: BoolArray
    tokens: int
    text: str
    spans: IntArray
    answer: str

    @property
    def has_empty_answer(self) -> bool:
        return not self.answer.strip()

    @property
    def positions(self) -> IntArray:
        """Rows whose next token is a label, int32 (labels,): a token is a label of the row before it; the first has
        none."""
        return np.flatnonzero(self.is_label[1:]).astype(np.int32)

    @property
    def digest(self) -> int:
        """64 bits of the text, whatever its case and its blanks: of two texts that differ in these only, the same."""
        plain = " ".join(self.text.casefold().split()).encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")


def encode_sample(sample: Sample, tokenizer: EdgeTokenizer, settings: ReadSettings) -> Iterator[TokenSequence]:
    """The sequence of a conversation or a completion; of a document, pieces of ``max_length`` tokens at most.

    Raises ``DataError`` for what cannot be learnt from.
    """
    match sample:
        case Conversation():
            yield _of_conversation(sample, tokenizer, settings)
        case Completion():
            yield _of_completion(sample, tokenizer, settings)
        case Document():
            yield from _of_document(sample, tokenizer, settings.max_length)


def _limited(encoded: Encoded, text: str, is_label: BoolArray, answer: str, settings: ReadSettings) -> TokenSequence:
    count = len(encoded.ids)
    kept = min(count, settings.max_length) if settings.too_long == "truncate" or count <= settings.max_length else 0
    return TokenSequence(encoded.ids[:kept], is_label[:kept], count, text, encoded.spans[:kept], answer)


def _of_completion(sample: Completion, tokenizer: EdgeTokenizer, settings: ReadSettings) -> TokenSequence:
    text = sample.prompt + sample.completion
    encoded = tokenizer.encode(text, add_special_tokens=True)
    # "Answer: " + "yes" makes one token of " yes": what has a character of the completion is the completion's.
    is_label = (encoded.spans[:, 1] > len(sample.prompt)) & ~encoded.added
    # Tokens that the tokenizer puts at the end (some add EOS by themselves) belong to the completion.
    trailing = len(encoded.ids)
    while trailing and encoded.added[trailing - 1]:
        trailing -= 1
    is_label[trailing:] = True
    encoded, is_label = _with_eos(encoded, is_label, tokenizer.eos_token_id)
    if settings.train_on == "all":
        is_label[:] = True
    return _limited(encoded, text, is_label, sample.completion, settings)


def _with_eos(encoded: Encoded, is_label: BoolArray, eos: int | None) -> tuple[Encoded, BoolArray]:
    if eos is None or (len(encoded.ids) and encoded.ids[-1] == eos):
        return encoded, is_label
    ids, spans = np.append(encoded.ids, np.int32(eos)), np.append(encoded.spans, np.zeros((1, 2), np.int32), axis=0)
    return Encoded(ids, spans, np.append(encoded.added, True)), np.append(is_label, True)


def _of_conversation(said: Conversation, tokenizer: EdgeTokenizer, settings: ReadSettings) -> TokenSequence:
    template = tokenizer.chat_template
    text, marks = template.render_marked(said.messages, tools=said.tools, settings=said.settings)
    encoded = tokenizer.encode(text, add_special_tokens=False)  # templates write their own
    answers = [said.messages[index] for index in said.answers]
    answer = "\n".join("a call" if each.get("tool_calls") else each.get("content") or "" for each in answers)
    kept = _limited(encoded, text, np.zeros(len(encoded.ids), np.bool_), answer, settings)
    if not len(kept.ids):
        return kept
    if settings.train_on == "all":
        kept.is_label[:] = True
        return kept
    # Turns are found by rendering all that precedes them: only those of which a token is left.
    end, only_last = int(kept.spans.max()), settings.train_on == "last"
    firsts, ends = kept.spans[:, 0], kept.spans[:, 1]
    for start, stop in template.answer_spans(said, text, marks, only_last=only_last, end=end):
        # A token that is partly the assistant's is, as transformers has it.
        kept.is_label[(firsts < stop) & (ends > start) & (ends > firsts)] = True
    return kept


def _of_document(sample: Document, tokenizer: EdgeTokenizer, max_length: int) -> Iterator[TokenSequence]:
    """Pieces that end with a paragraph where one ends in their second half, or with a line, or with any token."""
    encoded = tokenizer.encode(sample.text, add_special_tokens=True)
    inner = np.flatnonzero(~encoded.added)
    if not len(inner):
        return
    first = 0 if sample.part.begins else int(inner[0])
    end = len(encoded.ids) if sample.part.ends else int(inner[-1]) + 1
    encoded = Encoded(encoded.ids[first:end], encoded.spans[first:end], encoded.added[first:end])
    if sample.part.ends:
        encoded, _ = _with_eos(encoded, np.ones(len(encoded.ids), np.bool_), tokenizer.eos_token_id)
    start, count = 0, len(encoded.ids)
    while start < count:
        stop = count
        if count - start > max_length:
            stop = _break(encoded, sample.text, start, start + max_length)
        if count - stop == 1:  # a last piece of one token has nothing to predict
            stop -= 1
        spans = encoded.spans[start:stop]
        written = spans[spans[:, 1] > spans[:, 0]]  # tokens that the tokenizer adds stand nowhere
        begin, end = (int(written[0, 0]), int(written[-1, 1])) if len(written) else (0, 0)
        text, spans = sample.text[begin:end], np.maximum(spans - begin, 0)
        yield TokenSequence(encoded.ids[start:stop], np.ones(stop - start, np.bool_), stop - start, text, spans, text)
        start = stop


def _break(encoded: Encoded, text: str, start: int, limit: int) -> int:
    """Where a piece from ``start`` to ``limit`` at most ends."""
    earliest = start + max(1, int((limit - start) * _EARLIEST_BREAK))
    ends = encoded.spans[earliest - 1 : limit, 1]
    begin, end = int(ends[0]), int(ends[-1])
    for mark in ("\n\n", "\n"):
        place = text.rfind(mark, begin, end)
        if place >= 0:
            inside = np.flatnonzero(ends <= place + len(mark))
            if len(inside):
                return earliest + int(inside[-1])
    return limit
