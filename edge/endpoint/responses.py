"""OpenAI's Responses API, for text and without a state: read as a chat, and answered in its own form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from dlora.edge.data.prompt import Message
from dlora.edge.generation.sampling import Sampling

from .answers import End, Piece
from .errors import RequestError
from .formats import Answer, Format, Json, reason_of
from .requests import Chat, FormatType, GenerationRequest, PromptLimit, chat_request, decode, read_message, shapes_of

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXT_PARTS: Final = ("input_text", "output_text", "text")
# A client that believes that it was obeyed is worse off.
_REFUSED: Final = {
    "previous_response_id": "no answer is kept here; give the whole chat as input",
    "conversation": "no chat is kept here; give the whole chat as input",
    "prompt": "no prompts are kept here; give instructions and input",
    "store": "no answer is kept here; leave it out, or make it false",
    "background": "no answer is kept here; stream it",
    "tools": "give tools to /v1/chat/completions",
    "top_logprobs": "ask /v1/chat/completions for them",
    "include": "there is nothing to add to an answer",
}


class _TextFormat(msgspec.Struct):
    type: FormatType = "text"
    schema: dict[str, Any] | None = None


class _Text(msgspec.Struct):
    format: _TextFormat | None = None


class _Response(msgspec.Struct, kw_only=True):
    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: _Text | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    store: Any = None
    background: Any = None
    tools: Any = None
    top_logprobs: Any = None
    include: Any = None


def read_response(body: bytes | bytearray, defaults: Sampling, limit: PromptLimit) -> GenerationRequest:
    """A request of ``/v1/responses``. Raises ``RequestError``."""
    asked: _Response = decode(body, _Response)
    for name, why in _REFUSED.items():
        if getattr(asked, name):
            raise RequestError(400, f"{name} is not supported: {why}", param=name)
    if asked.max_output_tokens is not None and asked.max_output_tokens < 1:
        text = f"max_output_tokens must be at least 1, not {asked.max_output_tokens}"
        raise RequestError(400, text, param="max_output_tokens")
    if not asked.input:
        raise RequestError(400, "input must be a text or at least one message", param="input")
    items = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    messages = [_message(f"input[{number}]", item) for number, item in enumerate(items)]
    if asked.instructions:  # chat templates take one message of the system, at the beginning
        said = [asked.instructions]
        if messages[0]["role"] == "system":
            said.append(messages.pop(0)["content"])
        messages.insert(0, {"role": "system", "content": "\n\n".join(said)})
    chat = Chat(
        model=asked.model,
        messages=[dict(each) for each in messages],
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        stream=asked.stream,
    )
    request = chat_request(chat, defaults, limit, knows_tools=True, tool_form=None)  # it has no tools
    form = asked.text.format if asked.text is not None else None
    shapes = () if form is None else shapes_of(form.type, form.schema, "text.format")
    return replace(request, shapes=shapes, shaped_by="text.format")


def _message(param: str, item: Mapping[str, Any]) -> Message:
    if (kind := item.get("type", "message")) != "message":
        raise RequestError(400, f"{param} is of type {str(kind)[:40]!r}; only messages are understood", param=param)
    if item.get("role") not in _ROLES:
        raise RequestError(400, f"{param} must have one of the roles {', '.join(_ROLES)}", param=f"{param}.role")
    content = item.get("content")
    if isinstance(content, list):
        content = [
            {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else part
            for part in content
        ]
    return read_message(param, {"role": item["role"], "content": content})


class ResponsesFormat(Format):
    """``/v1/responses``: one answer, as the one part of one message. Each event of a stream has a number."""

    stream_end = b""  # its last event says that it is the last one

    def __init__(self, request: GenerationRequest, name: str) -> None:
        super().__init__(request, name)
        self._head = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time())}
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._events = 0

    def whole(self) -> Json:
        (answer,) = self._answers
        assert answer.end is not None
        return self._ended(answer, answer.end)

    def first_chunks(self) -> Iterator[Json]:
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress"))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def error_chunk(self, error: RequestError) -> Json:
        codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
        told = {"code": codes.get(error.status, "server_error"), "message": str(error)}
        return self._event("response.failed", response=self._response("failed", error=told))

    def _chunks(self, piece: Piece, answer: Answer) -> Iterator[Json]:
        if piece.text:
            yield self._event("response.output_text.delta", **self._place, delta=piece.text, logprobs=[])

    def _last_chunks(self, end: End, answer: Answer) -> Iterator[Json]:
        ended = self._ended(answer, end)
        (item,) = ended["output"]
        yield self._event("response.output_text.done", **self._place, text=answer.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=item["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _event(self, kind: str, **said: Any) -> Json:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **said}

    def _ended(self, answer: Answer, end: End) -> Json:
        is_cut = reason_of(end) == "length"
        status = "incomplete" if is_cut else "completed"
        prompt, completion, cached = self._usage()
        usage = {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + completion,
        }  # fmt: skip
        cut = {"reason": "max_output_tokens"} if is_cut else None
        output = [self._item(status, [_part(answer.text)])]
        return self._response(status, output=output, incomplete_details=cut, usage=usage)

    def _response(self, status: str, **said: Any) -> Json:
        request, sampling = self._request, self._request.sampling
        return {
            **self._head, "status": status, "model": self._name, "output": [], "error": None,
            "incomplete_details": None, "usage": None, "max_output_tokens": request.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "store": False, "background": False,
            "previous_response_id": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False,
            "metadata": None, **said,
        }  # fmt: skip

    def _item(self, status: str, content: Sequence[Json] = ()) -> Json:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
