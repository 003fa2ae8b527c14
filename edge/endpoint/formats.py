"""Answers in OpenAI's form: whole, and in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlora.edge.generation.generate import Counters
from dlora.edge.generation.sampling import Choice

from .answers import End, Piece
from .errors import RequestError
from .requests import GenerationRequest
from .tools import ToolCall, may_begin_call, parse_tool_calls

Json = dict[str, Any]


@dataclass
class Answer:
    """One answer so far; ``shown``: characters of it that the client has."""

    text: str = ""
    shown: int = 0
    choices: list[Choice] = field(default_factory=list)
    end: End | None = None


class Format(ABC):
    """Makes the HTTP answer to one request out of what comes.

    Args:
        name: of the model, as the client knows it.
    """

    stream_end = b"data: [DONE]\n\n"

    def __init__(self, request: GenerationRequest, name: str) -> None:
        self._request = request
        self._name = name
        self._texts: dict[int, str] = {}
        self._answers = [Answer() for _ in range(request.choices * len(request.prompts))]

    def take(self, event: Piece | End) -> list[Json]:
        """Take what comes; gives the chunks that a client that streams gets for it."""
        answer = self._answers[event.index]
        if isinstance(event, Piece):
            answer.text += event.text
            answer.choices += event.choices
            self._texts |= event.texts
            return [*self._chunks(event, answer)]
        answer.end = event
        return [*self._last_chunks(event, answer)]

    def counters(self) -> Sequence[Counters]:
        """Of the answers that have ended."""
        return [answer.end.counters for answer in self._answers if answer.end is not None]

    @abstractmethod
    def whole(self) -> Json:
        """The answer to a client that does not stream."""

    @abstractmethod
    def first_chunks(self) -> Iterator[Json]:
        """Before anything has come."""

    def after_chunks(self) -> Iterator[Json]:
        """After all answers have ended."""
        yield from ()

    def error_chunk(self, error: RequestError) -> Json:
        """What ends a stream in which something went wrong."""
        return error.body()

    @abstractmethod
    def _chunks(self, piece: Piece, answer: Answer) -> Iterator[Json]: ...

    @abstractmethod
    def _last_chunks(self, end: End, answer: Answer) -> Iterator[Json]: ...

    def _usage(self) -> tuple[int, int, int]:
        """Tokens of prompts, of answers, and those of prompts that the server held already."""
        counters = self.counters()
        firsts = counters[:: self._request.choices]  # OpenAI counts a prompt once, however many answers it has
        return (
            sum(each.prompt_tokens for each in firsts), sum(each.tokens for each in counters),
            sum(each.reused_tokens for each in firsts),
        )  # fmt: skip


class ChoicesFormat(Format):
    """What chats and completions have alike: several answers, each a choice."""

    object_name: str
    chunk_name: str
    prefix: str

    def __init__(self, request: GenerationRequest, name: str) -> None:
        super().__init__(request, name)
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "object": self.object_name, "created": int(time.time()),
            "model": name,
        }  # fmt: skip
        self._chunk_head = {**self._head, "object": self.chunk_name}

    def whole(self) -> Json:
        choices = []
        for index, answer in enumerate(self._answers):
            assert answer.end is not None
            said = self._choice(index, answer, answer.end)
            choices.append({"index": index, **said, "logprobs": self._logprobs(answer.choices)})
        return {**self._head, "choices": choices, "usage": self._usage_entry()}

    def after_chunks(self) -> Iterator[Json]:
        if self._request.with_usage:
            yield {**self._chunk_head, "choices": [], "usage": self._usage_entry()}

    def _usage_entry(self) -> Json:
        prompt, completion, cached = self._usage()
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    @abstractmethod
    def _choice(self, index: int, answer: Answer, end: End) -> Json: ...

    def _chunk(
        self, index: int, said: Json, *, reason: str | None = None, choices: Sequence[Choice] | None = None
    ) -> Json:
        """What more there is of an answer: ``said``, in the form's own words."""
        logprobs = None if choices is None else self._logprobs(choices)
        return {
            **self._chunk_head, "choices": [{"index": index, **said, "finish_reason": reason, "logprobs": logprobs}],
        }  # fmt: skip

    def _logprobs(self, choices: Sequence[Choice]) -> Json | None:
        return None if self._request.sampling.logprobs is None else self._logprobs_of(choices)

    @abstractmethod
    def _logprobs_of(self, choices: Sequence[Choice]) -> Json: ...


class ChatFormat(ChoicesFormat):
    """``/v1/chat/completions``."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self) -> Iterator[Json]:
        for index in range(len(self._answers)):
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def _chunks(self, piece: Piece, answer: Answer) -> Iterator[Json]:
        ready = len(answer.text)
        if self._request.tool_form is not None:  # what may be a tool call waits for its end
            ready = max(answer.shown, may_begin_call(answer.text, self._request.tool_form))
        text, answer.shown = answer.text[answer.shown : ready], ready
        if text or (piece.choices and self._request.sampling.logprobs is not None):
            yield self._chunk(piece.index, {"delta": {"content": text}}, choices=piece.choices)

    def _last_chunks(self, end: End, answer: Answer) -> Iterator[Json]:
        text, calls = self._parse(answer)
        shown = answer.text[: answer.shown].strip() if calls else answer.text[: answer.shown]
        if rest := text.removeprefix(shown):
            yield self._chunk(end.index, {"delta": {"content": rest}})
        if calls:
            given = [{"index": number, **_tool_call(call)} for number, call in enumerate(calls)]
            yield self._chunk(end.index, {"delta": {"tool_calls": given}})
        yield self._chunk(end.index, {"delta": {}}, reason="tool_calls" if calls else reason_of(end))

    def _choice(self, index: int, answer: Answer, end: End) -> Json:
        text, calls = self._parse(answer)
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        return {"message": message, "finish_reason": "tool_calls" if calls else reason_of(end)}

    def _parse(self, answer: Answer) -> tuple[str, list[ToolCall]]:
        form = self._request.tool_form
        return (answer.text, []) if form is None else parse_tool_calls(answer.text, form)

    def _logprobs_of(self, choices: Sequence[Choice]) -> Json:
        return {"content": [
            {**self._token(each.token, each.logprob), "top_logprobs": [self._token(*top) for top in each.top]}
            for each in choices
        ]}  # fmt: skip

    def _token(self, token: int, logprob: float | None) -> Json:
        text = self._texts[token]
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionFormat(ChoicesFormat):
    """``/v1/completions``."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl"

    def first_chunks(self) -> Iterator[Json]:
        if self._request.echo:
            for index in range(len(self._answers)):
                yield self._chunk(index, {"text": self._prompt(index)})

    def _chunks(self, piece: Piece, answer: Answer) -> Iterator[Json]:
        yield self._chunk(piece.index, {"text": piece.text}, choices=piece.choices)

    def _last_chunks(self, end: End, answer: Answer) -> Iterator[Json]:
        yield self._chunk(end.index, {"text": ""}, reason=reason_of(end))

    def _choice(self, index: int, answer: Answer, end: End) -> Json:
        text = (self._prompt(index) if self._request.echo else "") + answer.text
        return {"text": text, "finish_reason": reason_of(end)}

    def _prompt(self, index: int) -> str:
        return self._request.prompts[index // self._request.choices].text or ""

    def _logprobs_of(self, choices: Sequence[Choice]) -> Json:
        return {
            "tokens": [self._texts[each.token] for each in choices],
            "token_logprobs": [each.logprob for each in choices],
            "top_logprobs": [{self._texts[token]: logprob for token, logprob in each.top} for each in choices],
        }


def reason_of(end: End) -> str:
    """In OpenAI's words, which have none for a server that stops."""
    return "length" if end.finish_reason == "cancelled" else end.finish_reason


def _tool_call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
