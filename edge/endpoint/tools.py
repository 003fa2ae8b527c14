"""Tool calls in the text of an answer, in the forms that models' chat templates teach them: read, and forced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dlora.edge.data.prompt import AnswerShape

ToolForm = Literal["tags", "python_tag", "mistral"]
"""``tags``: ``<tool_call>{"name": …, "arguments": …}</tool_call>`` (Hermes, Qwen, SmolLM 2 and 3); ``python_tag``: the
answer is the object, with ``parameters`` (Llama 3); ``mistral``: ``[TOOL_CALLS]`` and a list of them."""

PLAIN_FORM: Final[ToolForm] = "tags"
"""Where no chat template teaches another one."""

_MARKS: Final[dict[ToolForm, str]] = {"tags": "<tool_call>", "mistral": "[TOOL_CALLS]", "python_tag": "<|python_tag|>"}
# The small models of Llama 3.2 are told of the object and not of the mark.
_LLAMA_OBJECT: Final = '"parameters": dictionary of argument name'
# Before a call, its key for arguments, after it. Without the marks that are special tokens, which are no text.
_FRAMES: Final[dict[ToolForm, tuple[str, str, str]]] = {
    "tags": ("<tool_call>\n", "arguments", "\n</tool_call>"),
    "mistral": ("[", "arguments", "]"),
    "python_tag": ("", "parameters", ""),
}
_BEGINNINGS: Final[dict[ToolForm, tuple[str, ...]]] = {
    "tags": ("<tool_call>",),
    # Both marks are special tokens, which the text does not have; what follows them is JSON.
    "mistral": ("[TOOL_CALLS]", "[{"),
    "python_tag": ("<|python_tag|>", '{"'),
}


@dataclass(frozen=True)
class ToolCall:
    """A call of a function: its name, and its arguments as JSON."""

    name: str
    arguments: str


def tool_form(chat_template: str) -> ToolForm | None:
    """The form that a chat template teaches; None where it knows no tools, or their form is not known."""
    if "tools" not in chat_template:
        return None
    found = next((form for form, mark in _MARKS.items() if mark in chat_template), None)
    return "python_tag" if found is None and _LLAMA_OBJECT in chat_template else found


def call_shape(name: str, parameters: Mapping[str, Any] | None, form: ToolForm) -> AnswerShape:
    """An answer that is one call of this function and nothing else, as ``parse_tool_calls`` reads it.

    ``parameters``: the JSON schema of its arguments, which are an object whatever it says; None: it has none.
    """
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    before, key, after = _FRAMES[form]
    start = f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
    return AnswerShape(start, {**parameters, "type": "object"}, f"}}{after}")


def may_begin_call(text: str, form: ToolForm) -> int:
    """Where in ``text`` a tool call begins, or may once more of it has come; its length where none does."""
    beginnings = _BEGINNINGS[form]
    if form != "tags":  # the whole answer is calls, or none of it is
        start = len(text) - len(text.lstrip())
        rest = text[start:]
        return start if any(rest.startswith(each) or each.startswith(rest) for each in beginnings) else len(text)
    found = text.find(beginnings[0])
    if found >= 0:
        return found
    for length in range(min(len(beginnings[0]) - 1, len(text)), 0, -1):
        if beginnings[0].startswith(text[-length:]):
            return len(text) - length
    return len(text)


def parse_tool_calls(text: str, form: ToolForm) -> tuple[str, list[ToolCall]]:
    """The text beside tool calls, and these. What is not in the form stays text."""
    if form == "tags":
        calls: list[ToolCall] = []

        def take(match: re.Match[str]) -> str:
            found = _calls_of(match[1].strip())
            calls.extend(found)
            return "" if found else match[0]

        beside = re.sub(r"<tool_call>(.*?)(?:</tool_call>|\Z)", take, text, flags=re.DOTALL)
        return beside.strip() if calls else text, calls
    plain = text.strip()
    for beginning in _MARKS.values():
        plain = plain.removeprefix(beginning).strip()
    found = _calls_of(plain)
    if not found and form == "python_tag":  # several, one after the other
        parts = [_calls_of(part) for part in re.split(r"(?<=\})\s*;\s*(?=\{)", plain)]
        found = [call for part in parts for call in part] if all(parts) else []
    return ("", found) if found else (text, [])


def _calls_of(text: str) -> list[ToolCall]:
    """The calls that a JSON text is; none where it is something else."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # half a character, \\ud800, is no text that can be sent
    except (ValueError, RecursionError):
        return []
    calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None] if all(calls) else []


def _call(found: Any) -> ToolCall | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))  # without either it is some other object with a name
    if isinstance(arguments, str):
        return ToolCall(found["name"], arguments)
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
