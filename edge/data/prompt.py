"""A prompt to tokens and an answer to text, in a child process: the device itself holds no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.tensors import IntArray

from .child import Buffer, Child, Note, Work
from .loading import TOKENIZER_PLACE

if TYPE_CHECKING:
    from .tokenizer import EdgeTokenizer


class PromptTokenizer:
    """What generation needs of a bundle's tokenizer; all of it raises ``DataError`` or ``BundleError``.

    Attributes:
        stop_token_ids: tokens that end an answer.
    """

    def __init__(self, child: Child, stop_token_ids: tuple[int, ...]) -> None:
        self._child = child
        self.stop_token_ids = stop_token_ids

    def encode_prompt(self, prompt: str) -> IntArray:
        """Token ids, int32 (tokens,), of what comes before an answer: a user's turn where there is a chat template."""
        try:
            request = msgspec.msgpack.encode(_Encode(prompt))
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8; say it in another way") from None
        (ids,) = self._child.call(request)
        return np.frombuffer(ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        (text,) = self._child.call(msgspec.msgpack.encode(_Decode(tuple(ids))))
        return text.decode()


@contextmanager
def prompt_tokenizer(bundle: Bundle) -> Iterator[PromptTokenizer]:
    """A bundle's tokenizer, in a child that lives as long as the context. Enter it before there is an engine."""
    note = Note()
    with Child(_tokenizer_worker(bundle, note), note) as child:
        yield PromptTokenizer(child, bundle.manifest.tokenizer.all_stop_token_ids)


class _Encode(msgspec.Struct, tag=True):
    prompt: str


class _Decode(msgspec.Struct, tag=True):
    ids: tuple[int, ...]


def _tokenizer_worker(bundle: Bundle, note: Note) -> Work:
    @cache
    def tokenizer() -> EdgeTokenizer:
        note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer  # here, in the child

        return EdgeTokenizer.open(bundle)

    def answer(request: bytes) -> Sequence[Buffer]:
        opened = tokenizer()
        call: _Encode | _Decode = msgspec.msgpack.decode(request, type=_Encode | _Decode)
        if isinstance(call, _Encode):
            note.set_place("the prompt", DataError)
            return (opened.encode_prompt(call.prompt).tobytes(),)
        note.set_place("the text of the answer", BundleError)
        return (opened.decode(call.ids).encode(),)

    return answer
