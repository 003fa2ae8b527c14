"""The bundle's tokenizer: text and chats to token ids and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.manifest import TokenizerSpec
from dlora.protocol.tensors import IntArray

from .bundle import Bundle

if TYPE_CHECKING:  # Jinja takes 20 ms to import, and plain text needs none
    from .chat import ChatTemplate


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
        spec: its special tokens; chat_template: Jinja text.
        spec: as in the manifest, but its ``chat_template`` is the template itself, not its file.
        now: the date for chat templates that print it; fix it where a run must be repeatable on another day.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        spec: TokenizerSpec,
        chat_template: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        # The file may carry the settings of whoever saved it; lengths are our business.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._spec = spec
        self._now = now
        self._template_source = chat_template
        self._template: ChatTemplate | None = None

    @classmethod
    def open(cls, bundle: Bundle) -> EdgeTokenizer:
        """The tokenizer of a bundle. Raises ``BundleError`` for a file that the tokenizers library cannot read."""
        spec = bundle.manifest.tokenizer
        path = bundle.file(spec.file)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
            chat_template = None
            if spec.chat_template is not None:
                path = bundle.file(spec.chat_template)
                chat_template = path.read_text(encoding="utf-8")
            return cls(tokenizer, spec, chat_template)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); export the bundle again") from None
        except ValueError as error:
            raise BundleError(f"{path} is damaged or too new ({error}); export again or update tokenizers") from None

    @property
    def eos_token_id(self) -> int | None:
        return self._spec.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        eos = () if self._spec.eos_token_id is None else (self._spec.eos_token_id,)
        return tuple(dict.fromkeys((*self._spec.stop_token_ids, *eos)))

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template, compiled once; raises ``DataError`` where the bundle has none."""
        if self._template is None:
            if self._template_source is None:
                raise DataError("this base model has no chat template; use prompt and completion, or text")
            from .chat import ChatTemplate

            tokens = {"bos_token": self._spec.bos_token, "eos_token": self._spec.eos_token}
            known = {name: token for name, token in tokens.items() if token is not None}
            self._template = ChatTemplate(self._template_source, known, self._now)
        return self._template

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        """Tokens of a text; special tokens that stand in the text are recognised either way."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Encoded(np.array(found.ids, np.int32), spans, np.array(found.special_tokens_mask, np.bool_))

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> IntArray:
        """Token ids, int32 (tokens,), of a conversation, ready to be answered. Raises ``DataError``."""
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> IntArray:
        """Token ids, int32 (tokens,), of what comes before an answer: a user's turn where there is a chat template."""
        if self._template_source is not None:
            return self.encode_chat([{"role": "user", "content": prompt}])
        return self.encode(prompt, add_special_tokens=True).ids

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))
