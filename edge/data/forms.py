"""The forms in which people have data, told apart by their keys, and what each of them says that is to be learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dlora.protocol.errors import DataError

from .lines import json_kind
from .records import Record
from .text_parts import TextPart

Form = Literal[
    "chat messages", "prompt and completion", "prompt and completion as messages", "ShareGPT", "Alpaca", "text",
    "documents",
]  # fmt: skip
KEYS: Final[dict[Form, str]] = {
    "chat messages": "'messages'",
    "prompt and completion": "'prompt' and 'completion'",
    "prompt and completion as messages": "lists of messages as 'prompt' and 'completion'",
    "ShareGPT": "'conversations'",
    "Alpaca": "'instruction' and 'output'",
    "text": "'text'",
    "documents": ".txt and .md files",
}
_NEEDED: Final[dict[Form, set[str]]] = {
    "chat messages": {"messages"},
    "ShareGPT": {"conversations"},
    "prompt and completion": {"prompt", "completion"},
    "Alpaca": {"instruction", "output"},
    "text": {"text"},
}
# ShareGPT's words, and those of LLaMA-Factory for tools, as roles of chat templates.
_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_KEYS: Final = {"from": "role", "value": "content"}
# What Alpaca's models read (Stanford Alpaca, Apache-2.0), for base models without a chat template.
_ALPACA: Final = (
    "Below is an instruction that describes a task{that}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, as chat templates take them.

    Attributes:
        given: how many of the first ones are never learnt from, whoever wrote them.
        settings: what the template may name beside them.
    """

    messages: list[dict[str, Any]]
    given: int = 0
    tools: list[Any] | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The indices of the messages to learn from."""
        indices = range(self.given, len(self.messages))
        return [index for index in indices if self.messages[index]["role"] == "assistant"]

    def has_its_calls_in(self, text: str) -> bool:
        """Whether each function that it calls is named in what the chat template made of it."""
        calls = [call for message in self.messages for call in message.get("tool_calls") or []]
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        names = [function.get("name") for function in functions if isinstance(function, dict)]
        return all(name in text for name in names if isinstance(name, str))


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that continues a prompt; without one, all of it is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Document:
    """A part of a longer text."""

    text: str
    part: TextPart


Sample = Conversation | Completion | Document


def form_of(record: Record) -> Form:
    """The form of a record. Raises ``DataError`` where it has none, or several."""
    fields = record.fields
    if record.part is not None:
        return "documents"
    found = [form for form, needed in _NEEDED.items() if needed <= fields.keys()]
    if "prompt and completion" in found and list in (type(fields["prompt"]), type(fields["completion"])):
        found[found.index("prompt and completion")] = "prompt and completion as messages"
    if len(found) == 1:
        return found[0]
    there = ", ".join(map(repr, fields)) or "nothing"
    choose = "--columns text=COLUMN or prompt=COLUMN,completion=COLUMN chooses"
    if found:
        raise DataError(f"it may be {' or '.join(found)}, for it has {there}; {choose}")
    if "chosen" in fields and "rejected" in fields:
        raise DataError("a pair of a chosen and a rejected answer: train learns from one answer, not from preferences")
    *known, last = (keys for form, keys in KEYS.items() if form != "documents")
    raise DataError(f"no form of data that is known: it needs {', '.join(known)} or {last}, and has {there} ({choose})")


def sample_of(record: Record, form: Form, *, has_chat_template: bool) -> Sample:
    """What a record of that form says. Raises ``DataError``."""
    fields = record.fields
    match form:
        case "documents":
            assert record.part is not None
            return Document(fields["text"], record.part)
        case "text":
            text = _text(fields, "text")
            if not text:
                raise DataError("the text is empty")
            return Completion("", text)
        case "prompt and completion":
            return Completion(_text(fields, "prompt"), _text(fields, "completion"))
        case "prompt and completion as messages":
            prompt, completion = (_messages(fields, name) for name in ("prompt", "completion"))
            return _conversation(prompt + completion, fields, given=len(prompt))
        case "chat messages":
            return _conversation(_messages(fields, "messages"), fields)
        case "ShareGPT":
            return _conversation(_system(fields) + _messages(fields, "conversations"), fields)
        case "Alpaca":
            return _alpaca(fields, has_chat_template=has_chat_template)


def _alpaca(fields: Mapping[str, Any], *, has_chat_template: bool) -> Sample:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    given = _text(fields, "input") if fields.get("input") is not None else ""
    messages = _system(fields)
    for turn in fields.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn)):
            raise DataError("'history' must be a list of pairs, an instruction and its answer each")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if has_chat_template:
        asked = f"{instruction}\n{given}" if given else instruction
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Conversation(messages)
    if messages:
        raise DataError("'system' and 'history' need a chat template, and this base model has none")
    that = ", paired with an input that provides further context" if given else ""
    put = f"\n\n### Input:\n{given}" if given else ""
    return Completion(_ALPACA.format(that=that, instruction=instruction, input=put), output)


def _conversation(messages: list[dict[str, Any]], fields: Mapping[str, Any], given: int = 0) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[given:]):
        where = "the completion" if given else "the conversation"
        raise DataError(f"nothing to learn: no message of {where} has the role 'assistant'")
    tools, settings = fields.get("tools"), fields.get("chat_template_kwargs")
    if isinstance(tools, str):  # as data sets write it whose columns have one type
        tools = _from_json(tools, "'tools'") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise DataError("'tools' must be a list")
    if settings is not None and not isinstance(settings, dict):
        raise DataError("'chat_template_kwargs' must be an object")
    return Conversation(messages, given, tools, settings)


def _system(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = fields.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _messages(fields: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    messages = fields[name]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name!r} must be a list of at least one message, not {_described(messages)}")
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"message {number} must be an object with 'role' and 'content'")
    given = {_KEYS.get(key, str(key)): value for key, value in message.items()}
    role = given.get("role")
    if not isinstance(role, str):
        raise DataError(f"message {number} needs a 'role', a string")
    content = given.get("content")
    if isinstance(content, list):
        content = given["content"] = _joined(content, number)
    calls = given.get("tool_calls")
    if not isinstance(content, str) and not calls:
        raise DataError(f"message {number} needs a 'content', a string")
    if "from" in message and role == "function_call" and isinstance(content, str):
        call = _from_json(content, f"the function call of message {number}")
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    given["role"] = _ROLES.get(role, role) if "from" in message else role
    if isinstance(calls, list):
        given["tool_calls"] = [_tool_call(call, number) for call in calls]
    return given


def _joined(parts: list[Any], number: int) -> str:
    """The text of OpenAI's content parts."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else json_kind(part)
            raise DataError(f"message {number} has a part that is no text ({kind}); only text is learnt")
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, number: int) -> Any:
    """OpenAI writes a call's arguments as JSON in a string; templates take objects."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _from_json(function["arguments"] or "{}", f"the arguments of a tool call of message {number}")
    return {**call, "function": {**function, "arguments": arguments}}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{what} must be JSON") from None


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{name!r} must be a string, not {_described(value)}")
    return value


def _described(value: Any) -> str:
    if value == []:
        return "an empty array"
    kind = json_kind(value)
    return kind if kind == "null" else f"{'an' if kind[0] in 'ao' else 'a'} {kind}"
