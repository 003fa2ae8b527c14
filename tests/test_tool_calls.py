"""Tool calls in the forms of three families of models, whole and as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from dlora.edge.data.prompt import AnswerShape
from dlora.edge.endpoint.errors import RequestError
from dlora.edge.endpoint.plain_tools import in_plain_words
from dlora.edge.endpoint.requests import GenerationRequest, PromptLimit, read_chat
from dlora.edge.endpoint.tools import ToolCall, ToolForm, call_shape, may_begin_call, parse_tool_calls, tool_form
from dlora.edge.generation.sampling import Sampling

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


ANSWERS: list[tuple[ToolForm, str, str, list[ToolCall]]] = [
    ("tags", '<tool_call>\n{"name": "add", "arguments": {"x": 7}}\n</tool_call>', "", [ADD]),
    ("tags", 'I see.\n<tool_call>{"name": "add", "arguments": {"x": 7}}', "I see.", [ADD]),  # cut at its end
    ("tags", '<tool_call>{"name": "add", "arguments": {"x": 7}}</tool_call><tool_call>{"name": "now", "arguments": {}}',
     "", [ADD, NOW]),
    ("tags", r'<tool_call>{"name": "add", "arguments": "{\"x\": 7}"}</tool_call>', "", [ADD]),  # text stays as it is
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


def chat(**body: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "7 + 1?"}], **body}).encode()


def read(body: bytes, *, knows_tools: bool = False, form: ToolForm | None = "tags") -> GenerationRequest:
    return read_chat(body, Sampling(), PromptLimit(10_000, 100), knows_tools=knows_tools, tool_form=form)


@pytest.mark.timeout(60)
def test_blanks_without_end_in_a_call_are_no_matter() -> None:
    answer = f"<tool_call>x{' ' * 200_000}y"  # a quarter of an hour, when each blank was looked at for each before it
    assert parse_tool_calls(answer, "tags") == (answer, [])


# -- what is forced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add", 'a"b\\c/d', "é\u2028\x1b😀"])
@pytest.mark.parametrize("form", get_args(ToolForm))
def test_a_forced_call_is_what_is_read_again(form: ToolForm, name: str) -> None:
    shape = call_shape(name, None, form)
    assert parse_tool_calls(f"{shape.before}{{}}{shape.after}", form) == ("", [ToolCall(name, "{}")])


def test_arguments_of_a_forced_call_are_an_object_whatever_the_schema_says() -> None:
    given = {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "integer"}}}
    assert call_shape("f", given, "tags").schema == {**given, "type": "object"}
    assert call_shape("f", {"type": "string"}, "tags").schema == {"type": "object"}
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert call_shape("f", None, "mistral") == AnswerShape('[{"name": "f", "arguments": ', nothing, "}]")


# -- chat templates that know no tools ----------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "add", "arguments": {"x": 7}}}
SAID = '<tool_call>\n{"name": "add", "arguments": {"x": 7}}\n</tool_call>'


def test_tools_stand_at_the_end_of_the_systems_message_which_is_made_where_there_is_none() -> None:
    user = {"role": "user", "content": "7 + 1?"}
    made, said = in_plain_words([user], [TOOL])
    assert said == user
    assert made["role"] == "system"
    assert json.dumps(TOOL) in made["content"].splitlines()
    told, _ = in_plain_words([{"role": "system", "content": "Be brief."}, user], [TOOL])
    assert told == {"role": "system", "content": f"Be brief.\n\n{made['content']}"}
    assert in_plain_words([user], []) == (user,)
    how_to = Path(__file__).parents[1] / "docs" / "how-to" / "openai.md"
    assert made["content"].replace(json.dumps(TOOL), "{…}") in how_to.read_text().replace("\n  ", "\n")


def test_calls_and_results_are_turns_of_text() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "7 + 1 and 7 + 2?"},
        {"role": "assistant", "content": "I see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "8"},
        {"role": "tool", "tool_call_id": "b", "content": "9"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "10"},
    ]
    found = in_plain_words(chat, [])
    assert [each["role"] for each in found] == ["user", "assistant", "user", "assistant", "user"]
    assert found[1] == {"role": "assistant", "content": f"I see.\n{SAID}\n{SAID}"}
    assert parse_tool_calls(found[1]["content"], "tags") == ("I see.", [ADD, ADD])
    assert found[2]["content"] == "<tool_response>\n8\n</tool_response>\n<tool_response>\n9\n</tool_response>"
    assert [each["content"] for each in found[3:]] == [SAID, "<tool_response>\n10\n</tool_response>"]


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_lists_within_lists_are_refused_and_no_fault_of_ours(tool_choice: str) -> None:
    """At any depth: what can be read cannot always be written again."""
    said = set()
    for depth in range(900, 1000):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        body = (
            b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "%s", '
            b'"tools": [{"function": {"name": "f", "parameters": %s}}]}' % (tool_choice.encode(), deep)
        )
        try:
            read(body)
        except RequestError as error:
            said.add(str(error).partition(":")[0])
    assert said == {
        "the body is not a request that can be answered",
        "there are lists within lists in messages or tools; shorten them",
    }


def test_a_template_that_knows_no_tools_is_answered_in_the_form_that_it_was_taught() -> None:
    asked = read(chat(tools=[TOOL]))
    (prompt,) = asked.prompts
    assert (prompt.tools, prompt.text, asked.tool_form, asked.shapes) == (None, None, "tags", ())
    assert prompt.messages == in_plain_words([{"role": "user", "content": "7 + 1?"}], [TOOL])
    asked = read(chat())
    assert (asked.prompts[0].text, asked.tool_form) == ("7 + 1?", None)


def test_a_call_can_be_forced_where_nobody_knows_the_templates_form() -> None:
    asked = read(chat(tools=[TOOL], tool_choice="required"), knows_tools=True, form=None)
    assert asked.tool_form == "tags"
    assert asked.shapes == (call_shape("add", {"type": "object"}, "tags"),)
    assert asked.prompts[0].tools == (TOOL,)
