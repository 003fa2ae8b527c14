"""Tool calls in the forms of three families of models, whole and as they come."""

from __future__ import annotations

import json

import pytest

from dlora.edge.endpoint.tools import ToolCall, ToolForm, may_begin_call, parse_tool_calls, tool_form

ADD = ToolCall("add", '{"x": 7}')
NOW = ToolCall("now", "{}")

TEMPLATES: dict[str, ToolForm | None] = {
    "{% for tool in tools %}{% endfor %}<tool_call>{{ call }}</tool_call>": "tags",
    "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]": "mistral",
    "{% if tools %}{% endif %}<|python_tag|>": "python_tag",
    # Llama 3.2, 1B and 3B: without the mark.
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
    "value}.{% endif %}": "python_tag",
    "{% if tools %}a form of its own{% endif %}": None,
    "{{ messages }}<tool_call>": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_form_is_the_templates(template: str) -> None:
    assert tool_form(template) == TEMPLATES[template]
    assert tool_form(None) is None


ANSWERS: list[tuple[ToolForm, str, str, list[ToolCall]]] = [
    ("tags", '<tool_call>\n{"name": "add", "arguments": {"x": 7}}\n</tool_call>', "", [ADD]),
    ("tags", 'I see.\n<tool_call>{"name": "add", "arguments": {"x": 7}}', "I see.", [ADD]),  # cut at its end
    (
        "tags",
        '<tool_call>{"name": "add", "arguments": {"x": 7}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "",
        [ADD, NOW],
    ),
    ("tags", "<tool_call>add(7)</tool_call>", "<tool_call>add(7)</tool_call>", []),
    ("tags", "<tool_call> <tool_call></tool_call> x", "<tool_call> <tool_call></tool_call> x", []),
    ("tags", r'<tool_call>{"name": "\udfff", "arguments": {}}', r'<tool_call>{"name": "\udfff", "arguments": {}}', []),
    ("tags", "no call < at all", "no call < at all", []),
    ("tags", f'<tool_call>{" " * 9}{{"name": "now", "arguments": {{}}}}\u2003</tool_call>', "", [NOW]),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"x": 7}}, {"name": "now", "arguments": {}}]', "",
     [ADD, NOW]),
    ("mistral", '[{"name": "add", "arguments": {"x": 7}}]', "", [ADD]),
    ("mistral", '[{"name": "add"}]', '[{"name": "add"}]', []),
    ("python_tag", '<|python_tag|>{"name": "add", "parameters": {"x": 7}}', "", [ADD]),
    ("python_tag", '{"name": "add", "parameters": {"x": 7}}; {"name": "now", "parameters": {}}', "", [ADD, NOW]),
    ("python_tag", '{"name": "add", "parameters": {"x": 7}}; {"y": 1}',
     '{"name": "add", "parameters": {"x": 7}}; {"y": 1}', []),
    ("python_tag", r'{"name": "f", "parameters": ["\ud800"]}', r'{"name": "f", "parameters": ["\ud800"]}', []),
    ("python_tag", '{"name": "Ann", "age": 30}', '{"name": "Ann", "age": 30}', []),  # a person
    ("python_tag", '{"name": "add", "parameters": {"x"', '{"name": "add", "parameters": {"x"', []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_calls_are_found_in_their_form_and_the_rest_stays(
    form: ToolForm, answer: str, text: str, calls: list[ToolCall]
) -> None:
    assert parse_tool_calls(answer, form) == (text, calls)
    # While it comes nothing of a call is shown, and where there is none in the end what was held back comes last.
    ends = [may_begin_call(answer[:length], form) for length in range(len(answer) + 1)]
    assert ends == sorted(ends)
    if calls:
        assert answer[: ends[-1]].strip() == text


def test_arguments_that_are_text_stay_as_they_are() -> None:
    answer = json.dumps({"name": "add", "arguments": '{"x":7}'})
    assert parse_tool_calls(f"<tool_call>{answer}</tool_call>", "tags") == ("", [ToolCall("add", '{"x":7}')])


@pytest.mark.timeout(60)
def test_blanks_without_end_in_a_call_are_no_matter() -> None:
    answer = f"<tool_call>x{' ' * 200_000}y"  # a quarter of an hour, when each blank was looked at for each before it
    assert parse_tool_calls(answer, "tags") == (answer, [])
