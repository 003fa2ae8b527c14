"""What is asked, as the tokens that stand before the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dlora.edge.data.examples import last_occurrence
from dlora.edge.data.prompt import Message, PromptTokenizer
from dlora.edge.model.ends import LongArray
from dlora.protocol.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A chat to answer, or a text to continue.

    Attributes:
        messages: None for a text that is continued as it stands.
        text: what a single user's turn says; None where there are more messages, which are no text.
        tools: what the chat template is told of tools.
    """

    messages: tuple[Message, ...] | None
    text: str | None = None
    tools: tuple[Any, ...] | None = None

    @classmethod
    def of_text(cls, text: str, tokenizer: PromptTokenizer, *, system: str | None = None, as_it_is: bool) -> Prompt:
        """A user's turn where there is a chat template, unless it is to be continued ``as_it_is``."""
        if as_it_is or not tokenizer.has_chat_template:
            return cls(messages=None, text=text)
        before = () if system is None else ({"role": "system", "content": system},)
        return cls(messages=(*before, {"role": "user", "content": text}), text=text if system is None else None)

    def encode(
        self, tokenizer: PromptTokenizer, invocation: tuple[int, ...] = (), warn: Callable[[str], None] = lambda _: None
    ) -> LongArray:
        """Token ids, int64 (tokens,).

        An adapter that acts on answers does nothing where its ``invocation`` is missing. One that learnt from prompts
        and completions has its own: a text with that is continued as it stands, and else ``warn`` is told.
        Raises ``DataError``.
        """
        ids = self._encode_messages(tokenizer)
        if not invocation or _occurs(invocation, ids):
            return ids
        if self.messages is not None and self.text is not None:
            as_it_is = tokenizer.encode_text(self.text)
            if _occurs(invocation, as_it_is):
                return as_it_is
        warn("the prompt does not contain this adapter's invocation, so the adapter does nothing")
        return ids

    def _encode_messages(self, tokenizer: PromptTokenizer) -> LongArray:
        if self.messages is None:
            assert self.text is not None
            return tokenizer.encode_text(self.text)
        return tokenizer.encode_chat(self.messages, self.tools)


def check_messages(found: Any) -> tuple[Message, ...]:
    """A chat as people write it, ``[{"role": …, "content": …}, …]``. Raises ``DataError``."""
    if isinstance(found, dict) and "messages" in found:
        found = found["messages"]
    if not isinstance(found, list) or not found:
        raise DataError('messages must be a list of at least one: [{"role": "user", "content": "Hello"}]')
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'message {number} must be an object with a role: {{"role": "user", "content": "Hello"}}')
    return tuple(found)


def _occurs(tokens: Sequence[int], ids: LongArray) -> bool:
    return last_occurrence(ids.astype("int32"), tokens) < len(ids)
