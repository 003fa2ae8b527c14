"""``/v1/responses``: OpenAI's own client, whole and as a stream, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any, Literal

import openai
import pydantic
import pytest
from endpoints import ASK, Endpoint, endpoint_place, endpoint_process
from openai.types.responses import ResponseCreatedEvent, ResponseTextDeltaEvent
from waiting import eventually

from dlora.edge.endpoint.answers import Piece
from dlora.edge.endpoint.errors import RequestError
from dlora.edge.endpoint.requests import PromptLimit
from dlora.edge.endpoint.responses import ResponsesFormat, read_response
from dlora.edge.generation.sampling import Sampling

RESPONSES = "/v1/responses"
TEXT = "Say something."
ASKED: dict[str, Any] = {"model": "first", "input": TEXT, "max_output_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with (
        endpoint_place(tmp_path_factory.mktemp("endpoint")) as place,
        endpoint_process(place, "--adapters", place.adapters) as running,
    ):
        eventually(running.is_ready)
        yield running


def ask(endpoint: Endpoint, **asked: Any) -> Any:
    return endpoint.client().responses.create(**{**ASKED, **asked})


def chat(endpoint: Endpoint, messages: list[Any], **asked: Any) -> Any:
    settings = {"model": "first", "temperature": 0, "max_tokens": 12, **asked}
    return endpoint.client().chat.completions.create(messages=messages, **settings)


# -- what clients ask for -----------------------------------------------------------------------------------


def test_a_response_has_the_answer_of_a_chat(endpoint: Endpoint) -> None:
    for wanted, asked in (
        (ASK, {"input": TEXT}),
        (ASK, {"input": ASK}),
        (ASK, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT}]}]}),
        ([{"role": "system", "content": "Be brief."}, *ASK], {"instructions": "Be brief."}),
        (
            [{"role": "system", "content": "Be brief.\n\nBe kind."}, *ASK],
            {"instructions": "Be brief.", "input": [{"role": "developer", "content": "Be kind."}, *ASK]},
        ),
        (
            [*ASK, {"role": "assistant", "content": "No.\nNever."}, *ASK],
            {
                "input": [
                    *ASK,
                    {
                        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                        "content": [
                            {"type": "output_text", "text": "No.", "annotations": []},
                            {"type": "output_text", "text": "Never."},
                        ],
                    },
                    *ASK,
                ]
            },
        ),
    ):  # fmt: skip
        found, same = ask(endpoint, **asked), chat(endpoint, wanted)
        assert found.output_text == same.choices[0].message.content
        assert found.usage.input_tokens == same.usage.prompt_tokens
        assert found.usage.output_tokens == same.usage.completion_tokens
        assert found.usage.total_tokens == same.usage.total_tokens
    assert (found.object, found.model, found.store, found.error) == ("response", "first", False, None)
    assert found.id.startswith("resp_")
    assert abs(found.created_at - time.time()) < 600
    assert (found.temperature, found.max_output_tokens) == (0, 12)
    assert [(each.type, each.role, each.status) for each in found.output] == [("message", "assistant", found.status)]


def test_an_answer_that_is_cut_is_incomplete(endpoint: Endpoint) -> None:
    found = ask(endpoint, max_output_tokens=1)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    events = list(ask(endpoint, max_output_tokens=1, stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "incomplete")


def test_what_was_answered_is_given_back_as_input(endpoint: Endpoint) -> None:
    """As OpenAI's guide has it: a chat whose turns are the outputs before."""
    turns: list[Any] = [*ASK]
    first = ask(endpoint, input=turns)
    turns += [*first.output, {"role": "user", "content": "And then?"}]
    told = [*ASK, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And then?"}]
    assert ask(endpoint, input=turns).output_text == chat(endpoint, told).choices[0].message.content


def test_a_stream_has_the_same_text_in_the_events_of_openai(endpoint: Endpoint) -> None:
    whole = ask(endpoint)
    events = list(ask(endpoint, stream=True))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    kinds = [each.type for each in events]
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 1
    end = f"response.{whole.status}"
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done", "response.content_part.done", "response.output_item.done", end,
    ]  # fmt: skip
    assert isinstance(events[0], ResponseCreatedEvent)
    assert isinstance(events[4], ResponseTextDeltaEvent)
    assert events[0].response.status == "in_progress"
    assert events[-4].text == events[-3].part.text == events[-2].item.content[0].text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert len({events[0].response.id, events[1].response.id, events[-1].response.id}) == 1
    assert len({each.item_id for each in events if hasattr(each, "item_id")} | {events[2].item.id}) == 1


def test_the_clients_own_stream_makes_the_response_of_the_events(endpoint: Endpoint) -> None:
    asked = {key: value for key, value in ASKED.items() if key != "stream"}
    with endpoint.client().responses.stream(**asked) as stream:
        snapshot = [each.snapshot for each in stream if each.type == "response.output_text.delta"][-1]
        assert snapshot == ask(endpoint).output_text


def test_events_stand_in_lines_with_their_name(endpoint: Endpoint) -> None:
    connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=60)
    connection.request("POST", RESPONSES, json.dumps({**ASKED, "stream": True}))
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *events, rest = answer.read().decode().split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


class Person(pydantic.BaseModel):
    """What the client makes a schema of."""

    age: Literal[7, 8]


def test_an_answer_obeys_its_schema(endpoint: Endpoint) -> None:
    schema = {
        "type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "name": "person", "schema": schema, "strict": True}
    found = ask(endpoint, text={"format": form}, max_output_tokens=60)
    assert set(json.loads(found.output_text)) == {"age"}
    assert ask(endpoint, text={"format": {"type": "json_object"}}, max_output_tokens=8).output_text.startswith("{")
    assert ask(endpoint, text={"format": {"type": "text"}}).output_text == ask(endpoint).output_text
    parsed = endpoint.client().responses.parse(**{**ASKED, "max_output_tokens": 60}, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    assert (parsed.status, parsed.incomplete_details) == ("completed", None)


# -- what cannot be -----------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no input": ({"input": None}, "`$.input`", "input"),
    "an empty text": ({"input": ""}, "input must be", "input"),
    "no messages": ({"input": []}, "input must be", "input"),
    "a response before": ({"previous_response_id": "resp_1"}, "give the whole chat as input", "previous_response_id"),
    "a conversation": ({"conversation": {"id": "x"}}, "give the whole chat as input", "conversation"),
    "a prompt by its name": ({"prompt": {"id": "x"}}, "prompt is not supported", "prompt"),
    "to be kept": ({"store": True}, "store is not supported", "store"),
    "in the background": ({"background": True}, "background is not supported", "background"),
    "tools": ({"tools": [{"type": "web_search"}]}, "/v1/chat/completions", "tools"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text", "input[0]"),
    "a part of no kind": ({"input": [{"role": "user", "content": [{"type": ["text"]}]}]}, "only text", "input[0]"),
    "a call": ({"input": [*ASK, {"type": "function_call_output"}]}, "only messages are understood", "input[1]"),
    "an odd type": ({"input": [{"type": {"x": ["y" * 999]}}]}, "only messages are understood", "input[0]"),
    "a tool's turn": ({"input": [{"role": "tool", "content": "x"}]}, "must have one of the roles", "input[0].role"),
    "no content": ({"input": [{"role": "user"}]}, "has no content", "input[0].content"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens must be at least 1", "max_output_tokens"),
    "hot": ({"temperature": -1}, "temperature must be", "temperature"),
    "no schema": ({"text": {"format": {"type": "json_schema"}}}, "needs its schema", "text.format"),
    "a schema without end": (
        {"text": {"format": {"type": "json_schema", "schema": {"enum": ["x" * 2**17]}}}}, "128 KB", "text.format",
    ),
    "too long": ({"input": "x" * 10**5}, "say less", None),
    "long instructions": ({"instructions": "x" * 10**5}, "say less", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    changes, words, param = BAD[name]
    with pytest.raises(RequestError) as refused:
        read_response(json.dumps({**ASKED, **changes}).encode(), Sampling(), PromptLimit(2000, 8))
    error = refused.value.body()["error"]
    assert (refused.value.status, error["param"]) == (400, param)
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300


def test_the_client_is_told_and_what_is_unknown_is_left_out(endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        ask(endpoint, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        ask(endpoint, model="nobody")
    with pytest.raises(openai.BadRequestError, match="say less") as refused:
        ask(endpoint, input="x" * 3000, stream=True)
    assert refused.value.code == "context_length_exceeded"
    found = ask(
        endpoint, store=False, background=False, tools=[], tool_choice="auto", metadata={"x": "y"}, user="me",
        truncation="disabled", include=[], reasoning={"effort": "low"}, parallel_tool_calls=True,
        extra_body={"unknown_key": 1},
    )  # fmt: skip
    assert found.output_text == ask(endpoint).output_text
    assert endpoint.request(f"{RESPONSES}/resp_1", method="GET")[0] == 404


def test_what_goes_wrong_in_a_stream_is_its_last_event() -> None:
    asked = read_response(json.dumps(ASKED).encode(), Sampling(), PromptLimit(2000, 8))
    format_ = ResponsesFormat(asked, "first")
    chunks = [*format_.first_chunks(), *format_.take(Piece(0, "hal", (), {}))]
    chunks.append(format_.error_chunk(RequestError(503, "the server is away")))
    assert [each["sequence_number"] for each in chunks] == list(range(len(chunks)))
    last = chunks[-1]["response"]
    assert (chunks[-1]["type"], last["status"]) == ("response.failed", "failed")
    assert last["error"] == {"code": "server_error", "message": "the server is away"}
