"""What clients ask for: OpenAI's request bodies, checked, as prompts and settings of ours. Unknown keys are fine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec

from dlora.edge.data.prompt import AnswerShape, Message
from dlora.edge.generation.prompt import Prompt
from dlora.edge.generation.sampling import Sampling
from dlora.edge.generation.text import MAX_STOPS
from dlora.protocol.errors import UsageError

from .errors import RequestError
from .plain_tools import in_plain_words
from .tools import PLAIN_FORM, ToolForm, call_shape

MAX_CHOICES: Final = 16
MAX_PROMPTS: Final = 64
MAX_BIASED_TOKENS: Final = 1024
MAX_FORCED_TOOLS: Final = 128  # llguidance takes a second for a thousand
_ROLES: Final = {"developer": "system", "function": "tool"}  # what templates call them

MAX_SCHEMA_BYTES: Final = 128 << 10  # llguidance takes seconds for a schema of half a MB


@dataclass(frozen=True)
class PromptLimit:
    """What no prompt has that fits the context, so that it is refused before it is tokenized.

    Attributes:
        tokens: of the longest context; token_bytes: of the longest token.
    """

    tokens: int
    token_bytes: int

    def check(self, parts: Sequence[object]) -> None:
        """Raise ``RequestError`` (400) where texts, or JSON values with texts in them, cannot be so few tokens."""
        most = self.tokens * self.token_bytes
        if len(parts) > self.tokens or _text_bytes(parts, most) > most:
            raise RequestError(
                400,
                f"the prompt is longer than the {self.tokens} tokens that it may have; say less",
                code="context_length_exceeded",
            )


def _text_bytes(values: Sequence[object], enough: int) -> int:
    """Bytes of all texts in JSON values; whatever else is in them counts as one. It stops beyond ``enough``."""
    count, rest = 0, list(values)
    while rest and count <= enough:
        match rest.pop():
            case str() as text:
                count += len(text.encode())
            case list() as items:
                count += 1
                rest.extend(items)
            case dict() as fields:
                count += 1
                rest.extend((*fields, *fields.values()))
            case _:
                count += 1
    return count


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _JsonSchema(msgspec.Struct):
    schema: dict[str, Any] = {}


FormatType = Literal["text", "json_object", "json_schema"]


class _ResponseFormat(msgspec.Struct):
    type: FormatType = "text"
    json_schema: _JsonSchema | None = None


class _Common(msgspec.Struct, kw_only=True):
    """What chats and completions have alike; None is the server's default."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None


class Chat(_Common, kw_only=True):
    """A body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class _Completion(_Common, kw_only=True):
    prompt: str | list[str]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request.

    Attributes:
        model: the adapter's name, or the base model's; "" for the default one.
        prompts: each of them is answered ``choices`` times.
        max_new_tokens: of each answer; None: the server's default.
        stop: texts that end an answer.
        shapes: answers must have one of them; empty: they may be any text.
        shaped_by: the key of the request that says so.
        tool_form: how the model writes tool calls, where it was given tools.
        echo: whether a completion begins with its prompt.
        stream: whether the answer is to come token by token; with_usage: and what it took at its end.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    choices: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    shapes: tuple[AnswerShape, ...]
    shaped_by: str = "response_format"
    tool_form: ToolForm | None = None
    echo: bool = False
    stream: bool
    with_usage: bool


def read_chat(
    body: bytes | bytearray, defaults: Sampling, limit: PromptLimit, *, knows_tools: bool, tool_form: ToolForm | None
) -> GenerationRequest:
    """A request of ``/v1/chat/completions``. Raises ``RequestError``.

    ``limit``: of its prompt; ``knows_tools``: whether the chat template has tools, else the messages have them in plain
    words; ``tool_form``: how answers call them, None where nobody knows.
    """
    return chat_request(decode(body, Chat), defaults, limit, knows_tools=knows_tools, tool_form=tool_form)


def chat_request(
    asked: Chat, defaults: Sampling, limit: PromptLimit, *, knows_tools: bool, tool_form: ToolForm | None
) -> GenerationRequest:
    """A request in the form of a chat, as ``read_chat`` takes it."""
    limit.check(asked.messages)
    limit.check(asked.tools or ())
    tools = tuple(asked.tools) if asked.tools and asked.tool_choice != "none" else None
    forced = _forced_tools(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = asked.top_logprobs or 0 if asked.logprobs else None
    if not asked.messages:
        raise RequestError(400, "messages must have at least one message", param="messages")
    messages = tuple(read_message(f"messages[{number}]", each) for number, each in enumerate(asked.messages))
    if not knows_tools:
        try:
            messages = in_plain_words(messages, tools or ())
        except RecursionError:
            raise RequestError(400, "there are lists within lists in messages or tools; shorten them") from None
    text = messages[0].get("content") if len(messages) == 1 else None
    prompt = Prompt(messages=messages, text=text, tools=tools if knows_tools else None)
    request = _common(asked, defaults, (prompt,), logprobs)
    if forced:  # the answer has no content, which is what response_format is of
        tool_form = tool_form or PLAIN_FORM
        request = replace(request, shapes=_call_shapes(forced, tool_form), shaped_by="tool_choice")
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    return replace(request, max_new_tokens=_max_new_tokens(most), tool_form=tool_form if tools else None)


def read_completion(body: bytes | bytearray, defaults: Sampling, limit: PromptLimit) -> GenerationRequest:
    """A request of ``/v1/completions``: its prompts are continued as they stand. Raises ``RequestError``."""
    asked = decode(body, _Completion)
    texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    if not 0 < len(texts) <= MAX_PROMPTS:
        raise RequestError(400, f"prompt must be one text or up to {MAX_PROMPTS}", param="prompt")
    for text in texts:
        limit.check((text,))
    if asked.suffix:
        raise RequestError(400, "suffix is not supported: the model only continues a text", param="suffix")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise RequestError(400, "best_of is not supported; use n", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise RequestError(400, "echo with logprobs is not supported: they are of the answer's tokens", param="echo")
    prompts = tuple(Prompt(messages=None, text=text) for text in texts)
    request = _common(asked, defaults, prompts, asked.logprobs)
    return replace(request, max_new_tokens=_max_new_tokens(asked.max_tokens), echo=bool(asked.echo))


def decode(body: bytes | bytearray, kind: type[Any]) -> Any:
    """A body as this structure. Raises ``RequestError``."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = str(error)
        param = text.rsplit("`$.", 1)[-1].split("`")[0] if "`$." in text else None
        raise RequestError(400, f"the body is not a request that can be answered: {text}", param=param) from None


def _common(asked: _Common, defaults: Sampling, prompts: tuple[Prompt, ...], logprobs: int | None) -> GenerationRequest:
    choices = 1 if asked.n is None else asked.n
    if not 1 <= choices <= MAX_CHOICES:
        raise RequestError(400, f"n must be from 1 to {MAX_CHOICES}, not {choices}", param="n")
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    if len(stop) > MAX_STOPS or not all(stop):
        raise RequestError(400, f"stop must be at most {MAX_STOPS} texts, none of them empty", param="stop")
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "seed")
        if (value := getattr(asked, name)) is not None
    }  # fmt: skip
    try:
        sampling = replace(defaults, **given, logit_bias=_logit_bias(asked.logit_bias), logprobs=logprobs)
    except UsageError as error:
        param = str(error).split(" ", 1)[0]
        raise RequestError(400, str(error), param=param) from None
    return GenerationRequest(
        model=asked.model,
        prompts=prompts,
        sampling=sampling,
        choices=choices,
        max_new_tokens=None,
        stop=stop,
        shapes=_shapes(asked.response_format),
        stream=bool(asked.stream),
        with_usage=asked.stream_options is not None and asked.stream_options.include_usage,
    )


def _max_new_tokens(tokens: int | None) -> int | None:
    if tokens is not None and tokens < 1:
        raise RequestError(400, f"max_tokens must be at least 1, not {tokens}", param="max_tokens")
    return tokens


def _logit_bias(asked: Mapping[str, float] | None) -> dict[int, float]:
    if asked is not None and len(asked) > MAX_BIASED_TOKENS:
        raise RequestError(400, f"logit_bias may have {MAX_BIASED_TOKENS} tokens", param="logit_bias")
    try:
        return {int(token): max(-100.0, min(100.0, bias)) for token, bias in (asked or {}).items()}
    except ValueError:
        raise RequestError(400, "logit_bias must map token ids to numbers", param="logit_bias") from None


def _shapes(asked: _ResponseFormat | None) -> tuple[AnswerShape, ...]:
    if asked is None:
        return ()
    return shapes_of(asked.type, None if asked.json_schema is None else asked.json_schema.schema, "response_format")


def shapes_of(kind: FormatType, schema: dict[str, Any] | None, param: str) -> tuple[AnswerShape, ...]:
    """What an answer has to be that ``param`` of a request asks for. Raises ``RequestError``."""
    if kind == "text":
        return ()
    if kind == "json_object":
        return (AnswerShape("", {"type": "object"}, ""),)
    if schema is None:
        raise RequestError(400, f"{param} json_schema needs its schema", param=param)
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_BYTES:
        raise RequestError(400, f"a JSON schema may have {MAX_SCHEMA_BYTES >> 10} KB", param=param)
    return (AnswerShape("", schema, ""),)


def read_message(param: str, found: Mapping[str, Any]) -> Message:
    """As chat templates take them: contents as text, arguments of tool calls as objects. Raises ``RequestError``.

    ``param``: what the request calls it.
    """
    role = found.get("role")
    if not isinstance(role, str):
        raise RequestError(400, f"{param} has no role", param=f"{param}.role")
    content = found.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise RequestError(400, f"{param} has content that is no text; only text is understood", param=param)
        content = "\n".join(parts)  # type: ignore[arg-type]
    elif content is not None and not isinstance(content, str):
        raise RequestError(400, f"{param} has content that is no text", param=f"{param}.content")
    message = {**found, "role": _ROLES.get(role, role), "content": content}
    if calls := found.get("tool_calls"):
        if not isinstance(calls, list):
            raise RequestError(400, f"{param} has tool_calls that are no list", param=f"{param}.tool_calls")
        message["tool_calls"] = [_call(param, call) for call in calls]
        message["content"] = content or ""
    elif content is None:
        raise RequestError(400, f"{param} has no content", param=f"{param}.content")
    return message


def _call(param: str, found: Any) -> Mapping[str, Any]:
    function = found.get("function") if isinstance(found, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(400, f"{param} has a tool call without a function", param=f"{param}.tool_calls")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(400, f"{param} has a tool call whose arguments are not JSON", param=param) from None
    return {**found, "function": {**function, "arguments": arguments}}


def _forced_tools(asked: Chat) -> list[dict[str, Any]]:
    """The tools of which one has to be called; none where nothing has to."""
    wanted: str | None = None
    match asked.tool_choice:
        case None | "auto" | "none":
            return []
        case "required":
            pass
        case {"type": "function", "function": {"name": str(name)}}:
            wanted = name
        case _:
            text = 'tool_choice must be none, auto, required or {"type": "function", "function": {"name": …}}'
            raise RequestError(400, text, param="tool_choice")
    found = [tool for tool in asked.tools or () if wanted in (None, _function_name(tool))]
    if not found:
        text = "tool_choice names a function that is not among tools" if wanted else "tool_choice required needs tools"
        raise RequestError(400, text, param="tool_choice")
    return found


def _function_name(tool: Mapping[str, Any]) -> str | None:
    match tool:
        case {"function": {"name": str(name)}}:
            return name
    return None


def _call_shapes(tools: Sequence[Mapping[str, Any]], form: ToolForm) -> tuple[AnswerShape, ...]:
    if len(tools) > MAX_FORCED_TOOLS:
        text = f"one of at most {MAX_FORCED_TOOLS} tools can be forced; name it, or give fewer"
        raise RequestError(400, text, param="tools")
    shapes = []
    for number, tool in enumerate(tools):
        name, parameters = _function_name(tool), tool.get("function", {}).get("parameters")
        if name is None or not isinstance(parameters, dict | None):
            text = f"tools[{number}] cannot be forced: it needs a function with a name, and a JSON schema as parameters"
            raise RequestError(400, text, param=f"tools[{number}]")
        shapes.append(call_shape(name, parameters, form))
    if len(msgspec.json.encode(shapes)) > MAX_SCHEMA_BYTES:
        raise RequestError(400, f"tools that are forced may have {MAX_SCHEMA_BYTES >> 10} KB", param="tools")
    return tuple(shapes)
