"""Prompts to tokens and answers to text, in a child process: the device itself holds no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.errors import BundleError, DataError

from .child import Buffer, Child, Note, Work
from .loading import TOKENIZER_PLACE

if TYPE_CHECKING:
    from .tokenizer import EdgeTokenizer

Message = Mapping[str, Any]


class PromptTokenizer:
    """What generation needs of a bundle's tokenizer; all of it raises ``DataError`` or ``BundleError``.

    Attributes:
        stop_token_ids: tokens that end an answer.
        has_chat_template: whether it can make a prompt of messages.
    """

    def __init__(self, child: Child, stop_token_ids: tuple[int, ...], *, has_chat_template: bool) -> None:
        self._child = child
        self._streams = count()
        self.stop_token_ids = stop_token_ids
        self.has_chat_template = has_chat_template

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a conversation that is to be answered, as the chat template writes it."""
        return self._encode(_Chat([*map(dict, messages)], None if tools is None else [*tools]))

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a text that is to be continued: what data's prompts are encoded as.

        Blanks at its end are left out, for they are the first token of what follows.
        """
        return self._encode(_Text(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        (text,) = self._child.call(msgspec.msgpack.encode(_Decode(tuple(ids))))
        return text.decode()

    def stream(self) -> TextStream:
        """A text that grows token by token."""
        return TextStream(self._child, next(self._streams))

    def _encode(self, request: _Chat | _Text) -> npt.NDArray[np.int64]:
        try:
            encoded = msgspec.msgpack.encode(request)
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8; say it in another way") from None
        (ids,) = self._child.call(encoded)
        return np.frombuffer(ids, np.int32).astype(np.int64)


class TextStream:
    """The text of tokens as they come, special tokens left out."""

    def __init__(self, child: Child, number: int) -> None:
        self._child = child
        self._number = number

    def push(self, token: int) -> str:
        """What the next token adds: nothing where it ends in the middle of a character."""
        (text,) = self._child.call(msgspec.msgpack.encode(_Step(self._number, token)))
        return text.decode()

    def close(self) -> None:
        """Forget it."""
        self._child.call(msgspec.msgpack.encode(_EndOfStream(self._number)))


@contextmanager
def prompt_tokenizer(bundle: Bundle) -> Iterator[PromptTokenizer]:
    """A bundle's tokenizer, in a child that lives as long as the context. Enter it before there is an engine."""
    note, spec = Note(), bundle.manifest.tokenizer
    with Child(_tokenizer_worker(bundle, note), note) as child:
        yield PromptTokenizer(child, spec.all_stop_token_ids, has_chat_template=spec.chat_template is not None)


class _Chat(msgspec.Struct, tag=True):
    messages: list[dict[str, Any]]
    tools: list[Any] | None


class _Text(msgspec.Struct, tag=True):
    text: str


class _Decode(msgspec.Struct, tag=True):
    ids: tuple[int, ...]


class _Step(msgspec.Struct, tag=True):
    stream: int
    token: int


class _EndOfStream(msgspec.Struct, tag=True):
    stream: int


def _tokenizer_worker(bundle: Bundle, note: Note) -> Work:
    @cache
    def tokenizer() -> EdgeTokenizer:
        note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer  # here, in the child

        return EdgeTokenizer.open(bundle)

    def answer(request: bytes) -> Sequence[Buffer]:
        opened = tokenizer()
        match msgspec.msgpack.decode(request, type=_Chat | _Text | _Decode | _Step | _EndOfStream):
            case _Chat(messages, tools):
                note.set_place("the prompt", DataError)
                return (opened.encode_chat(messages, tools=tools).tobytes(),)
            case _Text(text):
                note.set_place("the prompt", DataError)
                return (opened.encode_prompt_text(text).tobytes(),)
            case _Decode(ids):
                note.set_place("the text of the answer", BundleError)
                return (opened.decode(ids).encode(),)
            case _Step(stream, token):
                note.set_place("the text of the answer", BundleError)
                return (opened.decode_step(stream, token).encode(),)
            case _EndOfStream(stream):
                opened.end_stream(stream)
        return ()

    return answer
