"""Prompts to tokens and answers to text, in a child process: the device itself holds no tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.child import Buffer, Child, Note, ReplacedChild
from dlora.protocol.errors import BundleError, DataError, DloraError
from dlora.protocol.tensors import IntArray

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
        ids = self.call("encode_chat", [*map(dict, messages)], tools)
        return np.frombuffer(ids, np.int32).astype(np.int64)

    def encode_text(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids, int64 (tokens,), of a text that is to be continued: what data's prompts are encoded as.

        Blanks at its end are left out, for they are the first token of what follows.
        """
        return np.frombuffer(self.call("encode_prompt_text", text), np.int32).astype(np.int64)

    def encode_example(self, fields: Mapping[str, Any]) -> Example:
        """A row of data, of any form that files may have, as an example."""
        ids, positions = self.call("encode_row", dict(fields))
        return Example.of(np.frombuffer(ids, np.int32), np.frombuffer(positions, np.int32))

    def longest_token_bytes(self) -> int:
        """Of a text, as many bytes as a token can stand for."""
        return int(self.call("longest_token_bytes"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.call("decode", ids))

    def stream(self) -> TextStream:
        """A text that grows token by token."""
        return TextStream(self, next(self._numbers))

    def constrain(self, shapes: Sequence[AnswerShape]) -> Constraint:
        """What keeps an answer to one of these shapes, at least one.

        Raises ``MissingExtraError`` without llguidance, and ``DataError`` for a schema that it cannot obey.
        """
        constraint = Constraint(self, next(self._numbers), self._vocabulary_size)
        given = [(shape.before, msgspec.json.encode(shape.schema).decode(), shape.after) for shape in shapes]
        self.call("begin", constraint.number, given)
        return constraint

    def call(self, request: str, *arguments: object) -> Any:
        """What the child answers to one of ``_REQUESTS``; arrays as bytes."""
        try:
            encoded = msgspec.msgpack.encode((request, *arguments))
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8; say it in another way") from None
        except (OverflowError, RecursionError):
            raise DataError("the prompt has a number that is too large, or lists within lists; shorten it") from None
        with self._lock:
            (answer,) = self._child.call(encoded)
        return msgspec.msgpack.decode(answer)


@dataclass(frozen=True)
class TextStream:
    """The text of tokens as they come, special tokens left out; ``number``: of it, in the child."""

    tokenizer: PromptTokenizer
    number: int

    def push(self, token: int) -> str:
        """What the next token adds: nothing where it ends in the middle of a character."""
        return str(self.tokenizer.call("decode_step", self.number, token))

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
        bits = self.tokenizer.call("allowed", self.number, self._accepted)
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


# What may be asked of the child, each a method of its tokenizer, of its grammars or of ``_Worker``: what it works on
# meanwhile, and whose fault it is if that never ends.
_REQUESTS: Final[dict[str, tuple[str, type[DloraError]]]] = {
    "encode_chat": ("the prompt", DataError),
    "encode_prompt_text": ("the prompt", DataError),
    "encode_row": ("the row", DataError),
    "longest_token_bytes": (TOKENIZER_PLACE, BundleError),
    "decode": ("the text of the answer", BundleError),
    "decode_step": ("the text of the answer", BundleError),
    "forget": ("the text of the answer", BundleError),
    "begin": ("the JSON schema", DataError),
    "allowed": ("the JSON schema", DataError),
}


@dataclass
class _Worker:
    """In the child: tokenizer and grammars, each opened where it is first asked for."""

    bundle: Bundle
    note: Note

    def answer(self, request: bytes) -> Sequence[Buffer]:
        name, *arguments = msgspec.msgpack.decode(request)
        receiver: Any = self
        if name in ("begin", "allowed"):
            receiver = self.matchers
        elif name not in ("encode_row", "forget"):
            receiver = self.tokenizer
        self.note.set_place(*_REQUESTS[name])
        found = getattr(receiver, name)(*arguments)
        return (msgspec.msgpack.encode(found, enc_hook=np.ndarray.tobytes),)

    @cached_property
    def tokenizer(self) -> EdgeTokenizer:
        self.note.set_place(TOKENIZER_PLACE, BundleError)
        from .tokenizer import EdgeTokenizer  # here, in the child

        return EdgeTokenizer.open(self.bundle)

    @cached_property
    def matchers(self) -> Matchers:
        from .constraint import Matchers

        return Matchers(self.bundle)

    def encode_row(self, fields: dict[str, Any]) -> tuple[IntArray, IntArray]:
        from .reading import encode_row

        sequence = encode_row(fields, self.tokenizer, ReadSettings(max_length=2**31 - 1))
        return sequence.ids, sequence.positions

    def forget(self, number: int) -> None:
        self.tokenizer.end_stream(number)
        if "matchers" in vars(self):
            self.matchers.end(number)
