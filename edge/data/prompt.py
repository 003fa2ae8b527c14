"""Prompts to tokens and answers to text, in a child process: the device itself holds no tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.child import Buffer, Child, Note, ReplacedChild
from dlora.protocol.errors import BundleError, DataError

from .examples import Example
from .loading import ADVICE, TOKENIZER_PLACE
from .read_settings import ReadSettings

if TYPE_CHECKING:
    from .constraint import Matchers
    from .tokenizer import EdgeTokenizer

Message = Mapping[str, Any]


class AnswerShape(msgspec.Struct, frozen=True):
    """What an answer may be: JSON of a JSON schema, between two texts, which may be empty."""

    before: str
    schema: Mapping[str, Any]
    after: str


class PromptTokenizer:
    """What generation needs of a bundle's tokenizer; all of it raises ``DataError`` or ``BundleError``. For threads.

    Attributes:
        stop_token_ids: tokens that end an answer.
        has_chat_template: whether it can make a prompt of messages.
    """

    def __init__(self, child: Child, bundle: Bundle) -> None:
        self._child = child
        self._lock = threading.Lock()
        self._numbers = count()
        self._vocabulary_size = bundle.manifest.base_model.vocabulary_size
        self.stop_token_ids = bundle.manifest.tokenizer.all_stop_token_ids
        self.has_chat_template = bundle.manifest.tokenizer.chat_template is not None

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a chat that is to be answered, as the chat template writes it."""
        (ids,) = self.call("chat", [*map(dict, messages)], tools)
        return np.frombuffer(ids, np.int32).astype(np.int64)

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a text that is to be continued: what data's prompts are encoded as.

        Blanks at its end are left out, for they are the first token of what follows.
        """
        (ids,) = self.call("text", text)
        return np.frombuffer(ids, np.int32).astype(np.int64)

    def encode_example(self, fields: Mapping[str, Any]) -> Example:
        """A row of data, of any form that files may have, as an example."""
        ids, positions = self.call("row", dict(fields))
        return Example.of(np.frombuffer(ids, np.int32), np.frombuffer(positions, np.int32))

    def longest_token_bytes(self) -> int:
        """Of a text, as many bytes as a token can stand for."""
        (count,) = self.call("longest_token")
        return int.from_bytes(count, "little")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        (text,) = self.call("decode", ids)
        return text.decode()

    def stream(self) -> TextStream:
        """A text that grows token by token."""
        return TextStream(self, next(self._numbers))

    def constrain(self, shapes: Sequence[AnswerShape]) -> Constraint:
        """What keeps an answer to one of these shapes, at least one.

        Raises ``MissingExtraError`` without llguidance, and ``DataError`` for a schema that it cannot obey.
        """
        constraint = Constraint(self, next(self._numbers), self._vocabulary_size)
        given = [(shape.before, msgspec.json.encode(shape.schema).decode(), shape.after) for shape in shapes]
        self.call("constrain", constraint.number, given)
        return constraint

    def call(self, request: str, *arguments: object) -> list[bytearray]:
        """What the child answers: a method of ``_Worker``."""
        try:
            encoded = msgspec.msgpack.encode((request, *arguments))
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8; say it in another way") from None
        except (OverflowError, RecursionError):
            raise DataError("the prompt has a number that is too large, or lists within lists; shorten it") from None
        with self._lock:
            return self._child.call(encoded)


@dataclass(frozen=True)
class TextStream:
    """The text of tokens as they come, special tokens left out; ``number``: of it, in the child."""

    tokenizer: PromptTokenizer
    number: int

    def push(self, token: int) -> str:
        """What the next token adds: nothing where it ends in the middle of a character."""
        (text,) = self.tokenizer.call("step", self.number, token)
        return text.decode()

    def close(self) -> None:
        """Forget it."""
        self.tokenizer.call("forget", self.number)


@dataclass
class Constraint:
    """Which tokens may come next in an answer; ``number``: of it, in the child."""

    tokenizer: PromptTokenizer
    number: int
    vocabulary_size: int
    _accepted: int | None = None

    def accept(self, token: int) -> None:
        """It came."""
        self._accepted = token

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool (vocabulary,), after what was accepted."""
        (bits,) = self.tokenizer.call("allowed", self.number, self._accepted)
        self._accepted = None
        found = np.zeros(self.vocabulary_size, np.bool_)
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self.vocabulary_size]
        found[: len(unpacked)] = unpacked
        return found

    def close(self) -> None:
        """Forget it."""
        self.tokenizer.call("forget", self.number)


@contextmanager
def prompt_tokenizer(bundle: Bundle, *, for_long: bool = False) -> Iterator[PromptTokenizer]:
    """A bundle's tokenizer, in a child that lives as long as the context. Enter it before there is an engine.

    ``for_long``: whether another child takes its place where something ends it, as a server needs.
    """
    note = Note(ADVICE)
    worker = _Worker(bundle, note)
    with (ReplacedChild if for_long else Child)(worker.answer, note) as child:
        yield PromptTokenizer(child, bundle)


@dataclass
class _Worker:
    """In the child: a method for each request. Tokenizer and grammars are opened where they are first asked for."""

    bundle: Bundle
    note: Note

    def answer(self, request: bytes) -> Sequence[Buffer]:
        name, *arguments = msgspec.msgpack.decode(request)
        found: Sequence[Buffer] = getattr(self, name)(*arguments)
        return found

    @cached_property
    def tokenizer(self) -> EdgeTokenizer:
        self.note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer  # here, in the child

        return EdgeTokenizer.open(self.bundle)

    @cached_property
    def matchers(self) -> Matchers:
        from .constraint import Matchers

        return Matchers(self.bundle)

    def at(self, place: str) -> EdgeTokenizer:
        opened = self.tokenizer
        self.note.set_place(place, DataError)
        return opened

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Sequence[Buffer]:
        return (self.at("the prompt").encode_chat(messages, tools).tobytes(),)

    def text(self, text: str) -> Sequence[Buffer]:
        return (self.at("the prompt").encode_prompt_text(text).tobytes(),)

    def row(self, fields: dict[str, Any]) -> Sequence[Buffer]:
        opened = self.at("the row")
        from .reading import encode_row

        sequence = encode_row(fields, opened, ReadSettings(max_length=2**31 - 1))
        return sequence.ids.tobytes(), sequence.positions.tobytes()

    def longest_token(self) -> Sequence[Buffer]:
        return (self.tokenizer.longest_token_bytes.to_bytes(8, "little"),)

    def decode(self, ids: list[int]) -> Sequence[Buffer]:
        self.note.set_place("the text of the answer", BundleError)
        return (self.tokenizer.decode(ids).encode(),)

    def step(self, stream: int, token: int) -> Sequence[Buffer]:
        self.note.set_place("the text of the answer", BundleError)
        return (self.tokenizer.decode_step(stream, token).encode(),)

    def constrain(self, number: int, shapes: list[tuple[str, str, str]]) -> Sequence[Buffer]:
        self.note.set_place("the JSON schema", DataError)
        self.matchers.begin(number, shapes)
        return ()

    def allowed(self, number: int, accepted: int | None) -> Sequence[Buffer]:
        self.note.set_place("the JSON schema", DataError)
        return (self.matchers.allowed(number, accepted),)

    def forget(self, number: int) -> Sequence[Buffer]:
        self.tokenizer.end_stream(number)
        if "matchers" in vars(self):
            self.matchers.end(number)
        return ()
