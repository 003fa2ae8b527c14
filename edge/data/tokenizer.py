"""The bundle's tokenizer: text and chats to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.child import library_errors
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.manifest import TokenizerSpec
from dlora.protocol.tensors import IntArray

if TYPE_CHECKING:  # Jinja takes 20 ms to import, and plain text needs none
    from .chat import ChatTemplate

_MAX_IDS: Final = 2**31  # ids are kept as int32


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a text.

    Attributes:
        ids: int32 (tokens,).
        spans: int32 (tokens, 2), first character and one past the last; (0, 0) for added tokens.
        added: bool (tokens,), true where the tokenizer added a token that is not in the text.
    """

    ids: IntArray
    spans: IntArray
    added: npt.NDArray[np.bool_]


class EdgeTokenizer:
    """A ``tokenizer.json`` with its chat template.

    Args:
        spec: its special tokens, as in the manifest; chat_template: Jinja text.
        vocabulary_size: of the base model, whose token ids are below it; None: any may be.

    What a damaged tokenizer makes the tokenizers library do, within its limits and ours, is a ``BundleError``. What it
    makes it do to the process is the business of ``child``.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        spec: TokenizerSpec,
        chat_template: str | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        # The file may carry the settings of whoever saved it; lengths are our business.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._spec = spec
        self._end_of_ids = _MAX_IDS if vocabulary_size is None else vocabulary_size
        if not tokenizer.get_vocab_size(with_added_tokens=True):
            raise BundleError("the bundle's tokenizer has no words; export the bundle again")
        if spec.eos_token_id is not None:
            self._check_ids(np.array([spec.eos_token_id]))
        self._template_source = chat_template
        self._streams: dict[int, decoders.DecodeStream] = {}

    @classmethod
    def open(cls, bundle: Bundle) -> EdgeTokenizer:
        """The tokenizer of a bundle. Raises ``BundleError`` for a file that the tokenizers library cannot read."""
        spec = bundle.manifest.tokenizer
        path = bundle.file(spec.file)
        try:
            content = path.read_bytes()
            with _bundle_errors(f"{path} is damaged or too new", "export again or update tokenizers"):
                tokenizer = tokenizers.Tokenizer.from_buffer(content)
            chat_template = None
            if spec.chat_template is not None:
                path = bundle.file(spec.chat_template)
                chat_template = path.read_text(encoding="utf-8")
            return cls(tokenizer, spec, chat_template, vocabulary_size=bundle.manifest.base_model.vocabulary_size)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); export the bundle again") from None
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is damaged ({error}); export the bundle again") from None

    @property
    def eos_token_id(self) -> int | None:
        return self._spec.eos_token_id

    def longest_token_bytes(self) -> int:
        """UTF-8 bytes of the longest word of its vocabulary. No other token stands for more of a text: only several
        characters that it does not know may be one token, and a normalizer may leave blanks out."""
        return max(len(word.encode(errors="replace")) for word in self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle has one, good or not."""
        return self._template_source is not None

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template, compiled once; raises ``DataError`` where the bundle has none."""
        if self._template_source is None:
            raise DataError("this base model has no chat template; use prompt and completion, or text")
        from .chat import ChatTemplate

        tokens = {"bos_token": self._spec.bos_token, "eos_token": self._spec.eos_token}
        return ChatTemplate(self._template_source, {name: token for name, token in tokens.items() if token is not None})

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        """Tokens of a text; special tokens that stand in the text are recognised either way."""
        with _bundle_errors():
            found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids = np.array(found.ids, np.int64)
        self._check_ids(ids)
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Encoded(ids.astype(np.int32), spans, np.array(found.special_tokens_mask, np.bool_))

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> IntArray:
        """Token ids, int32 (tokens,), of a conversation, ready to be answered. Raises ``DataError``."""
        text = self.chat_template.render(messages, add_generation_prompt=True, tools=tools)
        return self.encode(text, add_special_tokens=False).ids

    def assistant_header(self) -> tuple[int, ...]:
        """The tokens with which the chat template begins an answer; none where it has no such beginning."""
        asked = [{"role": "user", "content": "."}]
        try:
            before, after = (self.chat_template.render(asked, add_generation_prompt=added) for added in (False, True))
        except DataError:
            return ()
        if not after.startswith(before):
            return ()
        return tuple(self.encode(after[len(before) :], add_special_tokens=False).ids.tolist())

    def encode_prompt_text(self, prompt: str) -> IntArray:
        """Token ids, int32 (tokens,), of a text that is to be continued, encoded as prompts of data are: without the
        blanks at its end, which make one token with what follows, and without tokens that the tokenizer adds there."""
        encoded = self.encode(prompt.rstrip(" "), add_special_tokens=True)
        in_text = np.flatnonzero(~encoded.added)
        return encoded.ids[: in_text[-1] + 1] if len(in_text) else encoded.ids

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        with _bundle_errors():
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def decode_step(self, stream: int, token: int) -> str:
        """What a token adds to the text of the ``stream`` so far, special tokens left out."""
        text = self._streams.setdefault(stream, decoders.DecodeStream(skip_special_tokens=True))
        with _bundle_errors():
            return text.step(self._tokenizer, token) or ""

    def end_stream(self, stream: int) -> None:
        """Forget a stream."""
        self._streams.pop(stream, None)

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        outside = ids[(ids < 0) | (ids >= self._end_of_ids)]
        if len(outside):
            raise BundleError(
                f"the bundle's tokenizer has a token {outside[0]}, its base model has {self._end_of_ids} of them; "
                "export the bundle again"
            )


def _bundle_errors(
    problem: str = "the bundle's tokenizer does not work", advice: str = "export the bundle again"
) -> AbstractContextManager[None]:
    return library_errors(BundleError, problem, advice)
