"""``dlora-edge serve`` as clients meet it: OpenAI's own client, and raw HTTP for what that would never send."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from canaries import Scanner
from endpoints import ASK, CHAT, GOOD, TOOL, Endpoint, Place, byte_tokenizer, endpoint_place, endpoint_process
from families import tiny_model
from processes import END_TIMEOUT_S, cloud_process, run_edge
from proxy import payloads, recording_proxy
from serving import serving
from test_cli import assert_fails, free_port
from test_peft_adapter import random_modules
from waiting import eventually

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.adapters.peft import load_adapter, save_adapter
from dlora.edge.endpoint.plain_tools import in_plain_words
from dlora.protocol.errors import CheckpointError, ConnectionFailedError, ModelMismatchError, UsageError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with endpoint_place(tmp_path_factory.mktemp("endpoint")) as made:
        yield made


@pytest.fixture(scope="module")
def endpoint(place: Place) -> Iterator[Endpoint]:
    with endpoint_process(place, "--adapters", place.adapters, "--queue", 8) as running:
        eventually(running.is_ready)
        yield running


def ask(endpoint: Endpoint, **asked: Any) -> Any:
    """What OpenAI's client makes of the answer of the first adapter."""
    return endpoint.client().chat.completions.create(**{"model": "first", "messages": ASK, **asked})


# -- what clients ask for -----------------------------------------------------------------------------------


def test_a_chat_gets_the_answer_that_generate_gives(place: Place, endpoint: Endpoint, tmp_path: Path) -> None:
    """Of each adapter and of the plain model, each of them another."""
    base = endpoint.models[-1]
    assert endpoint.models == [each.id for each in endpoint.client().models.list()] == ["first", "second", base]
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps(ASK))
    answers = {}
    for model in endpoint.models:
        adapter = [] if model == base else ["--adapter", place.adapters / model]
        done = run_edge(
            "generate", "--bundle", place.bundle, "--server", place.cloud.url, *adapter, "--messages", messages,
            "--max-new-tokens", 16, "--wire-dtype", "fp32", "--json",
        )  # fmt: skip
        wanted = json.loads(done.stdout)
        found = ask(endpoint, model=model, max_tokens=16, temperature=0)
        assert found.choices[0].message.content == wanted["answer"]
        assert (found.choices[0].finish_reason, found.model) == (wanted["finish_reason"], model)
        assert found.usage.prompt_tokens == wanted["prompt_tokens"]
        assert found.usage.total_tokens == wanted["prompt_tokens"] + found.usage.completion_tokens
        answers[model] = found.choices[0].message.content
    assert len(set(answers.values())) == 3


def test_a_stream_has_the_same_text_and_says_what_it_took(endpoint: Endpoint) -> None:
    asked: dict[str, Any] = {"model": "first", "messages": ASK, "max_completion_tokens": 30, "seed": 3}
    whole = ask(endpoint, **asked)
    chunks = list(ask(endpoint, **asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 10
    connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps({**asked, "stream": True}))
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.read().endswith(b"data: [DONE]\n\n")


def test_choices_stop_and_seed(endpoint: Endpoint) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "temperature": 1.2}
    once, again, other = (ask(endpoint, **asked, seed=seed, n=2) for seed in (5, 5, 8))
    texts = [[choice.message.content for choice in each.choices] for each in (once, again, other)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4
    assert once.usage.prompt_tokens == again.usage.prompt_tokens  # once for both choices
    stop = texts[0][0][4:6]
    stopped = ask(endpoint, **asked, seed=5, stop=["nowhere", stop]).choices[0]
    assert stopped.message.content == texts[0][0][: texts[0][0].index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs_are_of_each_token(endpoint: Endpoint) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    found = ask(endpoint, **asked)
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)  # the likeliest was taken
    assert all(len(each.top_logprobs) == 3 for each in content)
    streamed = [
        token
        for chunk in ask(endpoint, **asked, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    # How many tokens are guessed at a time follows from what steps take, and sums of several rows round otherwise.
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in content], abs=1e-4)


def test_completions_continue_texts(endpoint: Endpoint) -> None:
    client = endpoint.client()
    asked: dict[str, Any] = {"model": "second", "max_tokens": 10, "temperature": 0}
    both = client.completions.create(**asked, prompt=["one", "another"], logprobs=2)
    alone = [client.completions.create(**asked, prompt=prompt).choices[0].text for prompt in ("one", "another")]
    assert [choice.text for choice in both.choices] == alone
    assert len(both.choices[0].logprobs.tokens) == 10
    echoed = client.completions.create(**asked, prompt="one", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "one" + alone[0]


def test_the_next_turn_sends_only_what_is_new(endpoint: Endpoint) -> None:
    messages = [{"role": "user", "content": "A question that nobody else asks"}]
    first = ask(endpoint, max_tokens=8, temperature=0, messages=messages)
    messages += [{"role": "assistant", "content": "whatever"}, {"role": "user", "content": "And then?"}]
    second = ask(endpoint, max_tokens=8, temperature=0, messages=messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 12 <= cached <= first.usage.prompt_tokens + 8
    assert first.usage.prompt_tokens_details.cached_tokens < 8


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_obeys_its_schema(endpoint: Endpoint, temperature: float) -> None:
    """Even of a model of random weights."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = ask(endpoint, max_tokens=200, temperature=temperature, seed=1, response_format=form, presence_penalty=2)
    person = json.loads(found.choices[0].message.content)
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)
    assert found.choices[0].finish_reason == "stop"
    found = ask(endpoint, max_tokens=24, temperature=temperature, response_format={"type": "json_object"})
    assert found.choices[0].message.content.lstrip().startswith("{")


SUM = {
    "type": "function",
    "function": {
        "name": "sum",
        "parameters": {  # what it refers to begins at its own root
            "properties": {"x": {"$ref": "#/$defs/digit"}}, "required": ["x"], "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tool_choice", "names"),
    [("required", {"sum", "now"}), ({"type": "function", "function": {"name": "sum"}}, {"sum"})],
)
def test_a_call_can_be_forced(endpoint: Endpoint, tool_choice: Any, names: set[str], stream: bool) -> None:
    """Of a model of random weights; whatever ``response_format`` says, for the answer has no content."""
    found = set()
    for seed in range(4):
        answer = ask(
            endpoint, max_tokens=200, temperature=1.5, tools=[SUM, NOW], tool_choice=tool_choice, seed=seed,
            stream=stream, response_format={"type": "json_object"},
        )  # fmt: skip
        if stream:
            chunks = list(answer)
            (calls,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            message, reason = answer.choices[0].message, answer.choices[0].finish_reason
            calls, content = message.tool_calls, message.content or ""
        (call,) = calls
        assert (content, reason) == ("", "tool_calls")
        arguments = json.loads(call.function.arguments)
        assert arguments == {} if call.function.name == "now" else arguments["x"] in range(10)
        found.add(call.function.name)
    assert found == names


def test_calls_are_parsed_in_the_form_of_the_template(endpoint: Endpoint) -> None:
    """Llama 3's; a schema makes the model of random weights say what a trained one would."""
    said = schema(const={"name": "add", "parameters": {"x": 7}})
    answer = ask(endpoint, max_tokens=200, temperature=0, tools=[TOOL], **said).choices[0]
    (call,) = answer.message.tool_calls
    told = call.function.name, json.loads(call.function.arguments), answer.finish_reason
    assert told == ("add", {"x": 7}, "tool_calls")


def test_tools_and_their_results_are_part_of_the_prompt(endpoint: Endpoint) -> None:
    def tokens(messages: list[dict[str, Any]], **more: Any) -> int:
        return int(ask(endpoint, messages=messages, max_tokens=1, **more).usage.prompt_tokens)

    plain = tokens(ASK)
    assert tokens(ASK, tools=[TOOL]) > plain + len(json.dumps(TOOL)) - 10
    assert tokens(ASK, tools=[TOOL], tool_choice="none") == plain
    called = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "8"}
    told = tokens([*ASK, {"role": "assistant", "content": None, "tool_calls": [called]}, result])
    assert told > plain + len('{"x": 7}')
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say something."}]}]
    assert tokens(parts) == plain
    assert tokens([{"role": "developer", "content": "x"}, *ASK]) == tokens([{"role": "system", "content": "x"}, *ASK])


def test_a_template_that_knows_no_tools_has_them_in_the_systems_message(place: Place, tmp_path: Path) -> None:
    """As an answer of the plain model with the same words, for a call and its result too; and a call can be forced."""
    template = "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    with endpoint_process(place.with_template(template, tmp_path / "bundle"), "--adapters", place.adapters) as running:
        eventually(running.is_ready)
        asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
        called = {"id": "c", "type": "function", "function": {"name": "sum", "arguments": '{"x": 7}'}}
        result = {"role": "tool", "tool_call_id": "c", "content": "8"}
        chat = [*ASK, {"role": "assistant", "content": None, "tool_calls": [called]}, result]
        found = ask(running, **asked, messages=chat, tools=[SUM])
        answer = {"role": "assistant", "content": '<tool_call>\n{"name": "sum", "arguments": {"x": 7}}\n</tool_call>'}
        turns = [*ASK, answer, {"role": "user", "content": "<tool_response>\n8\n</tool_response>"}]
        same = ask(running, **asked, messages=in_plain_words(turns, [SUM]))
        assert found.choices == same.choices
        assert found.usage.prompt_tokens == same.usage.prompt_tokens
        plain = ask(running, **asked).usage.prompt_tokens
        assert ask(running, **asked, tools=[SUM], tool_choice="none").usage.prompt_tokens == plain
        forced = ask(running, max_tokens=99, temperature=0, tools=[SUM], tool_choice="required").choices[0]
        assert [call.function.name for call in forced.message.tool_calls] == ["sum"]


# -- what cannot be -----------------------------------------------------------------------------------------

COMPLETION = "/v1/completions"


def called(tool_calls: object) -> dict[str, Any]:
    return said(role="assistant", tool_calls=tool_calls)


def forced(tool_choice: Any, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"tools": tools or [TOOL], "tool_choice": tool_choice}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def forced_schema(parameters: object) -> dict[str, Any]:
    return forced("required", {"function": {"name": "f", "parameters": parameters}})


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


def schema(**given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": given}}}


# Chats: what is other than in a good one.
BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "empty messages": ({"messages": []}, "at least one message"),
    "no role": (said(content="x"), "has no role"),
    "no content": (said(role="user"), "has no content"),
    "an image": (said(role="user", content=[{"type": "image_url"}]), "only text"),
    "hot": ({"temperature": -1}, "temperature must be from 0"),
    "a text for a number": ({"temperature": "x"}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "many choices": ({"n": 1000}, "n must be from 1"),
    "an empty stop": ({"stop": [""]}, "stop must be"),
    "too long": (said(role="user", content="x" * 3000), "say less"),
    "more than the context": (said(role="user", content="x" * 10**5), "say less"),
    "more messages than tokens": ({"messages": ASK * 5000}, "say less"),
    "tools without end": ({"tools": [TOOL] * 5000}, "say less"),
    "no tool to force": ({"tool_choice": "required"}, "tool_choice required needs tools"),
    "a tool that is not there": (forced(named("sub")), "a function that is not among tools"),
    "a choice of its own": (forced("any"), "tool_choice must be none, auto, required or {"),
    "a forced tool without a name": (forced("required", {"function": {}}), "needs a function with a name"),
    "a forced tool of no schema": (forced_schema(5), "a JSON schema as parameters"),
    "a forced tool of an impossible schema": (
        forced_schema({"properties": {"x": {"type": "odd"}}}),
        "this JSON schema cannot be obeyed",
    ),
    "many forced tools": (forced("required", *[{"function": {"name": "f"}}] * 129), "at most 128 tools"),
    "a forced tool without end": (forced_schema({"enum": [10**9] * 13_000}), "have 128 KB"),
    "broken arguments": (called([{"function": {"name": "f", "arguments": "{"}}]), "not JSON"),
    "tool calls that are no list": (called(5), "no list"),
    "deep arguments": (called([{"function": {"name": "f", "arguments": "[" * 9**4}}]), "not JSON"),
    "an endless seed": ({"seed": 10**400}, "seed must be from 0"),
    "an endless number": (said(**ASK[0], z=10**30), "a number that is too large"),
    "an impossible schema": (schema(type="nonsense"), "this JSON schema cannot be obeyed"),
    "a schema that is missing": ({"response_format": {"type": "json_schema"}}, "needs its schema"),
    "a schema without end": (schema(enum=["x" * 2**17]), "a JSON schema may have 128 KB"),
    "many biases": ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "1024 tokens"),
}
BAD_REQUESTS: dict[str, tuple[str, Any, int, str]] = {
    **{name: (CHAT, {**GOOD, **changes}, 400, words) for name, (changes, words) in BAD_CHATS.items()},
    "no JSON": (CHAT, b"{", 400, "the body is not a request"),
    "no UTF-8": (CHAT, b'{"model": "\xff"}', 400, "the body is not a request"),
    "nothing": (CHAT, b"", 400, "the body is not a request"),
    "deep": (CHAT, b"[" * 200_000, 400, "the body is not a request"),
    "no messages": (CHAT, {"model": "first"}, 400, "`messages`"),
    "an unknown model": (CHAT, {**GOOD, "model": "nobody"}, 404, "there is no model 'nobody'; there are first, second"),
    "a directory": (CHAT, {**GOOD, "model": "../adapters/first"}, 404, "there is no model"),
    "what is no adapter": (CHAT, {**GOOD, "model": "broken"}, 404, "there is no model"),
    "a suffix": (COMPLETION, {"model": "first", "prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
    "logprobs of a prompt": (COMPLETION, {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo with logprobs"),
    "tokens": (COMPLETION, {"model": "first", "prompt": [1, 2]}, 400, "prompt"),
    "one long prompt of two": (COMPLETION, {"model": "first", "prompt": ["x", "x" * 10**5]}, 400, "say less"),
    "large": (CHAT, b" " * (3 << 20), 413, "2 MB"),
    "elsewhere": ("/v1/embeddings", {"input": "x"}, 404, "there is no POST /v1/embeddings here"),
    "GET": (CHAT, None, 405, "takes no GET"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_one_line(endpoint: Endpoint, name: str) -> None:
    path, body, status, words = BAD_REQUESTS[name]
    found, answer = endpoint.request(path, body, method="GET" if body is None else "POST")
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["code"] == "context_length_exceeded") == (words == "say less")
    assert endpoint.request(CHAT, {**GOOD, "unknown_key": {"x": 1}, "user": "me"})[0] == 200


def test_pages_of_other_sites_are_kept_out(place: Place, endpoint: Endpoint) -> None:
    evil = "evil.example"
    for name in (f"[::1]:{endpoint.port}", "[::1]", "LOCALHOST", "localhost.", "127.0.0.1:1"):
        assert endpoint.request("/health", method="GET", Host=name)[0] == 200, name
    for headers in ({"Origin": f"https://{evil}"}, {"Host": evil}, {"Host": f"{evil}:{endpoint.port}"}):
        status, answer = endpoint.request(CHAT, GOOD, **headers)
        assert status == 403, headers
        assert "access-control-allow-origin" not in answer
    assert endpoint.request("/health", method="GET", Host=f"localhost:{endpoint.port}")[0] == 200
    with endpoint_process(place, "--cors", "https://chat.example") as allowing:
        eventually(allowing.is_ready)
        connection = HTTPConnection("127.0.0.1", allowing.port, timeout=120)
        connection.request("POST", CHAT, json.dumps({**GOOD, "model": ""}), {"Origin": "https://chat.example"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://chat.example")
        assert allowing.request(CHAT, GOOD, Origin="https://evil.example")[0] == 403
        own = f"127.0.0.1:{allowing.port}"  # its own page is among those that may, still
        assert allowing.request(CHAT, {**GOOD, "model": ""}, Host=own, Origin=f"http://{own}")[0] == 200


def test_a_key_lets_in_who_has_it(place: Place, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-long-secret\n")
    with endpoint_process(place, "--api-key-file", tmp_path / "key", "--adapters", place.adapters) as locked:
        eventually(locked.is_ready)  # which everybody may ask
        with pytest.raises(openai.AuthenticationError):
            locked.client("wrong").models.list()
        assert locked.request(CHAT, GOOD)[0] == 401
        found = locked.client("a-long-secret").chat.completions.create(model="first", messages=ASK, max_tokens=2)
        assert found.usage.completion_tokens == 2


def test_an_adapter_of_another_base_model_is_refused_and_the_others_are_served(place: Place, tmp_path: Path) -> None:
    """One that says so is no model here; of one that does not it shows when it is asked for."""
    adapters = tmp_path / "adapters"
    shutil.copytree(place.adapters / "first", adapters / "mine")
    module = "model.layers.0.self_attn.q_proj"
    for name, width, fingerprint in (("a-wide-one", 64, None), ("foreign", 16, "ab" * 32)):
        (adapters / name).mkdir()
        modules = random_modules({module: (width, width)}, r=4)
        save_adapter(adapters / name, modules, r=4, lora_alpha=8.0, base_model_name="x", base_fingerprint=fingerprint)
    with endpoint_process(place, "--adapters", adapters) as running:
        eventually(running.is_ready)  # though the first of them cannot be opened
        assert running.models[:2] == ["a-wide-one", "mine"]
        status, answer = running.request(CHAT, {**GOOD, "model": "a-wide-one"})
        assert (status, answer["error"]["param"]) == (409, "model")
        assert module in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]
        assert running.request(CHAT, {**GOOD, "model": "foreign"})[0] == 404
        assert running.request(CHAT, {**GOOD, "model": "mine"})[0] == 200


def test_a_device_without_the_extra_for_schemas_says_so_and_answers_the_rest(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llguidance.py").write_text("raise ModuleNotFoundError('not here', name='llguidance')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with endpoint_process(place) as running:
        eventually(running.is_ready)
        asked = {**GOOD, "model": ""}
        status, answer = running.request(CHAT, {**asked, "response_format": {"type": "json_object"}})
        assert (status, answer["error"]["param"]) == (400, "response_format")
        assert "dlora[json-schema]" in answer["error"]["message"]
        status, answer = running.request(CHAT, {**asked, "tools": [TOOL], "tool_choice": "required"})
        assert (status, answer["error"]["param"]) == (400, "tool_choice")
        assert "dlora[json-schema]" in answer["error"]["message"]
        assert running.request(CHAT, {**asked, "tools": [TOOL]})[0] == 200
        assert running.request(CHAT, asked)[0] == 200


# -- what crosses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
def test_nothing_that_is_said_or_known_is_in_what_crosses(place: Place, wire_dtype: str) -> None:
    """Neither as text nor as token ids: prompts, answers, tools, schemas, names; and no number of the adapter."""
    secret, tokenizer, scanner = "CanaryZebra4711", byte_tokenizer(), Scanner()
    form = {"type": "json_schema", "json_schema": {"name": secret, "schema": {"const": {secret: 7}}}}
    tool = {"type": "function", "function": {"name": secret, "description": secret}}
    chat = [{"role": "system", "content": secret}, {"role": "user", "content": f"Who is {secret}?"}]
    with recording_proxy(place.cloud.url) as proxy:
        arguments = ["--adapters", place.adapters, "--wire-dtype", wire_dtype]
        with endpoint_process(place, *arguments, server=proxy.url) as running:
            eventually(running.is_ready)
            create = running.client(secret).chat.completions.create
            asked = {"model": "second", "messages": chat, "max_tokens": 60, "user": secret, "seed": 1}
            answers = [create(**asked, stop=secret, tools=[tool]), create(**asked, response_format=form, logprobs=True)]
            assert secret in answers[1].choices[0].message.content
    for text in (secret, json.dumps(chat), *(answer.choices[0].message.content for answer in answers)):
        scanner.add_tokens(tokenizer(text).input_ids, "what was said")
    for name in (secret, "second"):
        scanner.add_text(name)
    for module in load_adapter(place.adapters / "second").modules.values():
        scanner.add_matrix(module.lora_A, f"{module.name} A")
        scanner.add_matrix(module.lora_B, f"{module.name} B")
    sent = b"".join(payload for recording in proxy.recordings for payload in payloads(recording.up))
    assert len(sent) > 10_000
    assert list(scanner.find({"the wire": sent})) == []


# -- clients and servers that come and go -------------------------------------------------------------------


def ask_raw(endpoint: Endpoint, tokens: int, receive_buffer: int | None = None, stream: bool = True) -> socket.socket:
    """A client that has asked, and not read yet."""
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", endpoint.port))
    body = json.dumps({**GOOD, "max_tokens": tokens, "stream": stream, "temperature": 0, "logit_bias": {"2": -100}})
    client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def answering(endpoint: Endpoint) -> int:
    return int(endpoint.request("/health", method="GET")[1]["answering"])


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_given_up_when_its_client_leaves(endpoint: Endpoint, stream: bool) -> None:
    clients = [ask_raw(endpoint, 1900, stream=stream) for _ in range(2)]
    eventually(lambda: answering(endpoint) == 2)
    for client in clients:
        client.close()
    eventually(lambda: answering(endpoint) == 0)
    assert endpoint.request(CHAT, GOOD)[0] == 200


@pytest.mark.slow
def test_a_client_that_never_reads_holds_up_nobody(endpoint: Endpoint) -> None:
    client = ask_raw(endpoint, 400, receive_buffer=1024)
    try:
        for _ in range(4):
            assert endpoint.request(CHAT, GOOD)[0] == 200
        eventually(lambda: answering(endpoint) == 0)  # the answer is made, whoever reads it
    finally:
        client.close()


def test_two_hundred_requests_at_once_are_answered_or_told_to_come_again(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda _: endpoint.request(CHAT, {**GOOD, "max_tokens": 4}), range(200)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    refusal = next(answer for status, answer in found if status == 429)
    assert refusal["error"]["code"] == "queue_full"
    assert endpoint.request(CHAT, GOOD)[0] == 200
    assert endpoint.process.poll() is None


def test_each_of_many_chats_gets_what_it_gets_alone(place: Place) -> None:
    with endpoint_process(place, "--adapters", place.adapters, "--parallel", 8) as wide:
        eventually(wide.is_ready)

        def answer(number: int) -> str:
            model, messages = ("first", "second")[number % 2], [{"role": "user", "content": f"Question {number}"}]
            found = ask(wide, model=model, messages=messages, max_tokens=24, seed=number)
            return str(found.choices[0].message.content)

        alone = [answer(number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(answer, range(8))) == alone
        assert len(set(alone)) == 8


def test_a_tokenizer_that_is_killed_is_replaced(endpoint: Endpoint) -> None:
    """Whatever a text makes it do: one request fails, and not the server."""
    (between,) = psutil.Process(endpoint.process.pid).children()
    (tokenizer,) = between.children()
    tokenizer.kill()
    status, answer = endpoint.request(CHAT, GOOD)
    assert status in (400, 500)  # it was nobody's fault that we know of
    assert "memory" in answer["error"]["message"]
    assert endpoint.request(CHAT, GOOD)[0] == 200


@pytest.mark.slow
def test_a_model_server_that_is_killed_and_started_again_is_not_noticed(place: Place, tmp_path: Path) -> None:
    port = free_port()
    arguments = ["--adapters", place.adapters]
    with endpoint_process(place, *arguments, server=f"ws://127.0.0.1:{port}") as waiting:
        status, answer = waiting.request(CHAT, GOOD)
        assert status == 503
        assert "not ready yet" in answer["error"]["message"]
        asked = {**GOOD, "max_tokens": 150, "seed": 1, "logit_bias": {"2": -100}}
        with cloud_process(place.model, tmp_path, "--port", port):
            eventually(waiting.is_ready)
            wanted = waiting.request(CHAT, asked)[1]["choices"]
            found: list[Any] = []
            thread = threading.Thread(target=lambda: found.append(waiting.request(CHAT, asked)))
            thread.start()
            eventually(lambda: answering(waiting) == 1)
        assert not found  # the context has ended: that server is gone
        with cloud_process(place.model, tmp_path, "--port", port):
            thread.join(END_TIMEOUT_S)
        assert found[0] == (200, {**found[0][1], "choices": wanted})


def test_it_ends_when_it_is_told_to(place: Place) -> None:
    with endpoint_process(place) as running:
        eventually(running.is_ready)
        client = ask_raw(running, 1900)  # and nobody is waited for
        assert client.recv(10)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0
        client.close()


# -- mistakes at the start ----------------------------------------------------------------------------------


def test_mistakes_at_the_start_are_one_line(place: Place, tmp_path: Path) -> None:
    where = ["serve", "--bundle", place.bundle, "--server", place.cloud.url]
    assert_fails(run_edge(*where, "--host", "0.0.0.0"), UsageError.exit_code, "--api-key-file")
    assert_fails(run_edge(*where, "--adapters", tmp_path / "no"), UsageError.exit_code, "is no directory")
    assert_fails(run_edge(*where, "--api-key-file", tmp_path / "no"), UsageError.exit_code, "cannot be read")
    (tmp_path / "key").write_text("short")
    assert_fails(run_edge(*where, "--api-key-file", tmp_path / "key"), UsageError.exit_code, "at least 8")
    assert_fails(run_edge(*where, "--top-p", 2), UsageError.exit_code, "top_p")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_edge(*where, "--port", taken.getsockname()[1])
        assert_fails(done, ConnectionFailedError.exit_code, "cannot listen on", "choose another --port")


def test_what_cannot_be_opened_ends_it_at_once(place: Place, tmp_path: Path) -> None:
    where = ["serve", "--bundle", place.bundle, "--port", 0]
    done = run_edge(*where, "--server", place.cloud.url, "--adapter", tmp_path / "typo")
    assert_fails(done, CheckpointError.exit_code, "is not a PEFT adapter")
    with serving(BaseModel.from_model(tiny_model("llama", seed=9), "another")) as other:
        done = run_edge(*where, "--server", other.url)
    assert_fails(done, ModelMismatchError.exit_code, "the server serves")
