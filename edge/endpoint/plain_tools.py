"""Tools, their calls and their results as plain text, for chat templates that know none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dlora.edge.data.prompt import Message

# The words of Qwen 2.5's chat template, and nearly those of Hermes: some models have learnt from them.
_WORDS: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def in_plain_words(messages: Sequence[Message], tools: Sequence[Any]) -> tuple[Message, ...]:
    """The same chat for a template that knows no tools.

    ``tools``, where there are any, are described at the end of the system's message, which is made where there is none.
    Calls of tools become part of the assistant's text, and results of tools a user's turn, one for all that stand
    together: many templates want user and assistant in turn.
    """
    found: list[Message] = []
    is_result = False
    for message in messages:
        was_result, is_result = is_result, message["role"] == "tool"
        if calls := message.get("tool_calls"):
            parts = [message["content"], *(_call(each["function"]) for each in calls)]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            found.append({**rest, "content": "\n".join(filter(None, parts))})
        elif is_result:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if was_result:
                content = f"{found.pop()['content']}\n{content}"
            found.append({"role": "user", "content": content})
        else:
            found.append(message)
    if tools:
        system: Message = found.pop(0) if found[0]["role"] == "system" else {"role": "system", "content": ""}
        described = _WORDS.format(tools="\n".join(map(_to_json, tools)))
        found.insert(0, {**system, "content": "\n\n".join(filter(None, (system["content"], described)))})
    return tuple(found)


def _call(function: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{_to_json({'name': function['name'], 'arguments': function['arguments']})}\n</tool_call>"


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
