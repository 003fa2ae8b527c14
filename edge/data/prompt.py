"""Prompts to tokens and answers to text, in a child process: the device itself holds no tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.choices import TrainOn
from dlora.edge.engine.bundle import Bundle
from dlora.protocol.child import Buffer, Child, Note, ReplacedChild, Work
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

    def __init__(
        self, child: Child, stop_token_ids: tuple[int, ...], *, vocabulary_size: int, has_chat_template: bool
    ) -> None:
        self._child = child
        self._lock = threading.Lock()
        self._numbers = count()
        self._vocabulary_size = vocabulary_size
        self.stop_token_ids = stop_token_ids
        self.has_chat_template = has_chat_template

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a chat that is to be answered, as the chat template writes it."""
        return self._encode(_Chat([*map(dict, messages)], None if tools is None else [*tools]))

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a text that is to be continued: what data's prompts are encoded as.

        Blanks at its end are left out, for they are the first token of what follows.
        """
        return self._encode(_Text(text))

    def encode_example(self, fields: Mapping[str, Any], settings: ReadSettings | None = None) -> Example:
        """A row of data, of any form that files may have, as an example."""
        chosen = settings or ReadSettings(max_length=2**31 - 1)
        ids, positions = self.call(_Row(dict(fields), chosen.max_length, chosen.train_on))
        return Example.of(np.frombuffer(ids, np.int32), np.frombuffer(positions, np.int32))

    def longest_token_bytes(self) -> int:
        """Of a text, as many bytes as a token can stand for."""
        (count,) = self.call(_LongestToken())
        return int.from_bytes(count, "little")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        (text,) = self.call(_Decode(tuple(ids)))
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
        self.call(_Constrain(constraint.number, given))
        return constraint

    def call(self, request: _Request) -> list[bytearray]:
        """What the child answers."""
        try:
            encoded = msgspec.msgpack.encode(request)
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8; say it in another way") from None
        except (OverflowError, RecursionError):
            raise DataError("the prompt has a number that is too large, or lists within lists; shorten it") from None
        with self._lock:
            return self._child.call(encoded)

    def _encode(self, request: _Chat | _Text) -> npt.NDArray[np.int64]:
        (ids,) = self.call(request)
        return np.frombuffer(ids, np.int32).astype(np.int64)


class TextStream:
    """The text of tokens as they come, special tokens left out."""

    def __init__(self, tokenizer: PromptTokenizer, number: int) -> None:
        self._tokenizer = tokenizer
        self._number = number

    def push(self, token: int) -> str:
        """What the next token adds: nothing where it ends in the middle of a character."""
        (text,) = self._tokenizer.call(_Step(self._number, token))
        return text.decode()

    def close(self) -> None:
        """Forget it."""
        self._tokenizer.call(_Forget(self._number))


class Constraint:
    """Which tokens may come next in an answer.

    Attributes:
        number: of it, in the child.
    """

    def __init__(self, tokenizer: PromptTokenizer, number: int, vocabulary_size: int) -> None:
        self.number = number
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._accepted: int | None = None

    def accept(self, token: int) -> None:
        """It came."""
        self._accepted = token

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool (vocabulary,), after what was accepted."""
        (bits,) = self._tokenizer.call(_Allowed(self.number, self._accepted))
        self._accepted = None
        found = np.zeros(self._vocabulary_size, np.bool_)
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._vocabulary_size]
        found[: len(unpacked)] = unpacked
        return found

    def close(self) -> None:
        """Forget it."""
        self._tokenizer.call(_Forget(self.number))


@contextmanager
def prompt_tokenizer(bundle: Bundle, *, for_long: bool = False) -> Iterator[PromptTokenizer]:
    """A bundle's tokenizer, in a child that lives as long as the context. Enter it before there is an engine.

    ``for_long``: whether another child takes its place where something ends it, as a server needs.
    """
    note, spec = Note(ADVICE), bundle.manifest.tokenizer
    with (ReplacedChild if for_long else Child)(_tokenizer_worker(bundle, note), note) as child:
        yield PromptTokenizer(
            child,
            spec.all_stop_token_ids,
            vocabulary_size=bundle.manifest.base_model.vocabulary_size,
            has_chat_template=spec.chat_template is not None,
        )


class _Request(msgspec.Struct, tag=True):
    """To the child."""


class _Chat(_Request):
    messages: list[dict[str, Any]]
    tools: list[Any] | None


class _Text(_Request):
    text: str


class _Row(_Request):
    fields: dict[str, Any]
    max_length: int
    train_on: TrainOn


class _LongestToken(_Request):
    pass


class _Decode(_Request):
    ids: tuple[int, ...]


class _Step(_Request):
    stream: int
    token: int


class _Constrain(_Request):
    number: int
    shapes: list[tuple[str, str, str]]


class _Allowed(_Request):
    number: int
    accepted: int | None


class _Forget(_Request):
    number: int


_AnyRequest = _Chat | _Text | _Row | _LongestToken | _Decode | _Step | _Constrain | _Allowed | _Forget


def _tokenizer_worker(bundle: Bundle, note: Note) -> Work:
    @cache
    def tokenizer() -> EdgeTokenizer:
        note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer  # here, in the child

        return EdgeTokenizer.open(bundle)

    @cache
    def matchers() -> Matchers:
        from .constraint import Matchers

        return Matchers(bundle)

    def answer(request: bytes) -> Sequence[Buffer]:
        match msgspec.msgpack.decode(request, type=_AnyRequest):
            case _Chat(messages, tools):
                opened = tokenizer()
                note.set_place("the prompt", DataError)
                return (opened.encode_chat(messages, tools=tools).tobytes(),)
            case _Text(text):
                opened = tokenizer()
                note.set_place("the prompt", DataError)
                return (opened.encode_prompt_text(text).tobytes(),)
            case _Row(fields, max_length, train_on):
                opened = tokenizer()
                note.set_place("the row", DataError)
                from .reading import encode_row

                sequence = encode_row(fields, opened, ReadSettings(max_length=max_length, train_on=train_on))
                return sequence.ids.tobytes(), sequence.positions.tobytes()
            case _LongestToken():
                return (tokenizer().longest_token_bytes.to_bytes(8, "little"),)
            case _Decode(ids):
                note.set_place("the text of the answer", BundleError)
                return (tokenizer().decode(ids).encode(),)
            case _Step(stream, token):
                note.set_place("the text of the answer", BundleError)
                return (tokenizer().decode_step(stream, token).encode(),)
            case _Constrain(number, shapes):
                note.set_place("the JSON schema", DataError)
                matchers().begin(number, shapes)
            case _Allowed(number, accepted):
                note.set_place("the JSON schema", DataError)
                return (matchers().allowed(number, accepted),)
            case _Forget(number):
                tokenizer().end_stream(number)
                if matchers.cache_info().currsize:
                    matchers().end(number)
        return ()

    return answer
