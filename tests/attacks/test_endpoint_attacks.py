"""Strangers at ``dlora-edge serve``: what they may cost before they have shown a key, and after."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from endpoints import ASK, CHAT, GOOD, Place, endpoint_place, endpoint_process, served_by
from processes import END_TIMEOUT_S
from starlette.requests import Request
from waiting import eventually

from dlora.edge.endpoint import bodies, connections
from dlora.edge.endpoint.answers import End, Generation, Piece
from dlora.edge.endpoint.app import local_hosts, make_app
from dlora.edge.endpoint.bodies import Bodies
from dlora.edge.endpoint.connections import Connections
from dlora.edge.endpoint.errors import RequestError
from dlora.edge.endpoint.requests import PromptLimit
from dlora.edge.endpoint.running import http_settings
from dlora.edge.generation.generate import Counters

KEY = "a-long-secret"
BODY = json.dumps({"prompt": "hi"}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
ASKED = HEAD % len(BODY) + BODY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with endpoint_place(tmp_path_factory.mktemp("endpoint")) as made:
        yield made


def connect(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 30)


def raw(
    server: Any, path: str = "/v1/models", host: str | None = "127.0.0.1", more: str = "", method: str = "GET"
) -> int:
    """The status of a request that no client would send."""
    with connect(server) as client:
        named = "" if host is None else f"Host: {host}\r\n"
        version = "1.0" if host is None else "1.1"
        client.sendall(f"{method} {path} HTTP/{version}\r\n{named}{more}Connection: close\r\n\r\n".encode("latin-1"))
        return int(client.makefile("rb").readline().split()[1])


# -- the key ------------------------------------------------------------------------------------------------

# request.url is made of Host: with each of these its path would be /health, or another that needs no key.
HOSTS = [
    "x/health?", "x/health#", "x/health", "/health?", "/health#", "x:80/health?", "a@x/health?", "[::1]/health?",
    "127.0.0.1/health?", "x\\health?", "?", "#", "x y", "é", "[::1", "::1", "", "x:y", "http://x/health?",
]  # fmt: skip
PATHS = [
    "//health", "/health/", "/health/../v1/models", "/v1/models?/health", "/v1/models#/health", "/health;/v1/models",
    "/health%00", "/health%2f..%2fv1/models", "http://x/health?", "http://127.0.0.1/v1/models", "/HEALTH", "*",
]  # fmt: skip


@pytest.mark.parametrize("listens_to", ["itself", "others"])
def test_a_key_is_passed_by_no_spelling_of_host_or_path(listens_to: str) -> None:
    with http_server(api_key=KEY, hosts=None if listens_to == "others" else local_hosts("127.0.0.1")) as server:
        for host in HOSTS:
            for path in ("/v1/models", "/v1/models/base"):
                assert raw(server, path, host) in (400, 401, 403), (host, path)
            assert raw(server, CHAT, host, method="POST") in (400, 401, 403), host
            assert raw(server, "/health", host) in (400, 403), host
            assert raw(server, "/v1/models", host, f"Authorization: Bearer {KEY}\r\n") in (400, 403), host
        for path in PATHS:
            assert raw(server, path) in (400, 401), path
        assert raw(server, "/health") == raw(server, "/") == 200
        assert raw(server, more=f"Authorization: Bearer {KEY}\r\n") == 200
        if listens_to == "others":
            for host in (None, "example.org", "EXAMPLE.org.:1", "10.0.0.1", "[fe80::1]:8080", "my_board.local"):
                assert raw(server, "/health", host) == 200, host
                assert raw(server, "/v1/models", host) == 401, host


def test_a_page_is_the_servers_own_only_where_names_or_a_key_are_asked_for() -> None:
    """Whoever owns a name can point it at this machine: its pages have an origin that equals their ``Host`` then.

    No command starts a server that lets any name in without a key; who builds one lets no page in.
    """
    own = {"127.0.0.1": "Origin: http://127.0.0.1\r\n", "evil.example": "Origin: http://evil.example\r\n"}
    key = f"Authorization: Bearer {KEY}\r\n"
    statuses = {}
    for api_key in (None, KEY):
        for hosts in (None, local_hosts("127.0.0.1")):
            with http_server(api_key=api_key, hosts=hosts) as server:
                found = [raw(server, host=host, more=origin) for host, origin in own.items()]
                found += [raw(server, host=host, more=origin + key) for host, origin in own.items()]
                found.append(raw(server, host="evil.example", more="Origin: null\r\n" + key))
                statuses[api_key is not None, hosts is not None] = found
    assert statuses[False, False] == [403, 403, 403, 403, 403]
    assert statuses[False, True] == [200, 403, 200, 403, 403]
    assert statuses[True, False] == [401, 401, 200, 200, 403]
    assert statuses[True, True] == [401, 403, 200, 403, 403]


# -- connections --------------------------------------------------------------------------------------------


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_HTTP = [
    (b"\0\1\2 no HTTP\r\n\r\n",), (CHUNKED + b"Z\r\n",), (CHUNKED, b"ZZZ\r\n"),
    (CHUNKED + b"0\r\nbad trailer\r\n\r\n",),
    (CHUNKED, b"0\r\nbad trailer\r\n\r\n"), (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"\0\r\n\r\n"),
    (CHUNKED.replace(b"evil", b"127.0.0.1"), b"Z\r\n"),
]  # fmt: skip


def test_half_requests_do_not_lock_the_endpoint(place: Place) -> None:
    """As many as take all files that the process may have open, and as many again."""
    with ExitStack() as held, endpoint_process(place, most_files=512) as running:
        eventually(running.is_ready)
        for number in range(700):
            client = held.enter_context(connect(running))
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: number % 40])
        for said in (*NO_HTTP, *NO_HTTP):
            with connect(running) as client:
                client.settimeout(0.3)  # for an answer; on a busy machine connecting may take longer
                for part in said:
                    client.sendall(part)
                    with suppress(TimeoutError):  # it waits for more
                        client.recv(1 << 16)
        for _ in range(5):
            assert running.request(CHAT, {**GOOD, "model": ""})[0] == 200
        running.process.terminate()
        said = running.process.communicate(timeout=END_TIMEOUT_S)[1]
    assert len(said.splitlines()) < 20, said  # and do not fill its log


@pytest.mark.parametrize(
    "said",
    [
        b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX: ",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",  # after an answer
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",  # a body that nobody asked for
        HEAD % 99,  # a body after 401
    ],
)  # fmt: skip
def test_who_never_asks_is_dropped(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who sends a byte now and then, which uvicorn takes for progress."""
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)
    monkeypatch.setattr(connections, "_LOOK_EVERY_S", 0.05)
    with http_server(api_key=KEY) as server, connect(server) as client:
        client.sendall(said)
        client.settimeout(0.02)

        def is_dropped() -> bool:
            try:
                client.sendall(b"x")
                return not client.recv(1 << 16)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(is_dropped)


def test_an_answer_that_takes_long_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.3)
    monkeypatch.setattr(connections, "_LOOK_EVERY_S", 0.05)
    with http_server(answer_s=1.0) as server, connect(server) as client:
        client.sendall(ASKED)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def is_open(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        return bool(client.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        client.settimeout(30)


def test_the_source_that_has_most_connections_makes_room_with_its_oldest() -> None:
    def connect_from(source: str) -> socket.socket:
        return held.enter_context(socket.create_connection(("127.0.0.1", server.port), 30, (source, 0)))

    kept = Connections(most=6, most_of_one_source=4)
    with http_server(kept) as server, ExitStack() as held:
        greedy = []
        for number in range(6):
            greedy.append(connect_from("127.0.0.2"))
            eventually(lambda: kept.count == min(number + 1, 4))  # noqa: B023
        eventually(lambda: [is_open(each) for each in greedy] == 2 * [False] + 4 * [True])
        others = [connect_from(f"127.0.0.{number}") for number in (3, 4, 5, 6)]
        eventually(lambda: [is_open(each) for each in greedy] == 4 * [False] + 2 * [True])
        assert all(map(is_open, others))
        assert raw(server, "/health") == 200  # of yet another source


def test_who_is_answered_makes_room_for_nobody() -> None:
    answering = threading.Event()
    kept = Connections(most=2)
    with http_server(kept, answers=answering) as server, ExitStack() as held:
        asking = []
        for number in range(2):
            asking.append(held.enter_context(connect(server)))
            asking[-1].sendall(ASKED)
            eventually(lambda: server.slots.busy + server.slots.waiting == number + 1)  # noqa: B023
        late = held.enter_context(connect(server))
        eventually(lambda: not is_open(late))
        answering.set()
        for client in asking:
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_who_never_reads_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to requests behind each other that nobody takes: an honest client comes in, and they are dropped."""
    monkeypatch.setattr(connections, "UNREAD_S", 0.5)
    monkeypatch.setattr(connections, "_LOOK_EVERY_S", 0.05)
    kept = Connections(most=2)
    with http_server(kept, api_key=KEY) as server, ExitStack() as held:
        for _ in range(2):
            client = held.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            client.connect(("127.0.0.1", server.port))
            client.settimeout(0.3)
            with suppress(OSError):  # until nothing more is taken, or it is dropped
                for _ in range(10_000):
                    client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        assert raw(server, "/health") == 200
        eventually(lambda: kept.count == 0)


def test_a_body_in_tiny_chunks_is_dropped() -> None:
    """Each of them costs the event loop as much as a large one."""
    with http_server(api_key=KEY) as server, connect(server) as client:
        client.sendall(CHUNKED)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401 ")

        def is_dropped() -> bool:
            try:
                client.sendall(b"1\r\nx\r\n" * 20_000)
            except ConnectionError:
                return True
            return False

        eventually(is_dropped)
        assert raw(server, "/health") == 200


def test_chunks_of_a_usual_size_are_a_body() -> None:
    body = json.dumps({"prompt": "x" * 50}).encode()
    with http_server() as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("POST", "/v1/completions", iter([body[:20], body[20:], b" " * 100_000]), encode_chunked=True)
        assert connection.getresponse().status == 200


def test_who_asks_again_before_the_answer_and_leaves_frees_its_place() -> None:
    goes_on = threading.Event()
    with http_server(answers=goes_on) as server:
        try:
            with connect(server) as first:
                first.sendall(ASKED)
                eventually(lambda: server.slots.busy == 1)
                with connect(server) as waits:
                    waits.sendall(ASKED)
                    eventually(lambda: server.slots.waiting == 1)
                    for _ in range(3):
                        waits.sendall(b"GET /health HTTP/1.1\r\n")
                        assert raw(server, "/health") == 200
                eventually(lambda: server.slots.waiting == 0)  # though it said more after its request
        finally:
            goes_on.set()


def test_no_answer_sends_a_client_to_another_host() -> None:
    with http_server() as server:
        assert raw(server, f"{CHAT}/", "evil.example", method="POST") == 404


# -- bodies and prompts -------------------------------------------------------------------------------------


class Coming:
    """A request whose body comes in parts, when the test says so."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self._parts.get)

    def send(self, size: int, *, is_last: bool = False) -> None:
        self._parts.put_nowait({"type": "http.request", "body": bytes(size), "more_body": not is_last})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_of_bodies_that_come_at_a_time_the_largest_gives_way() -> None:
    async def run() -> None:
        reader = Bodies(most=1000)
        sizes = (600, 300, 50)
        coming = [Coming() for _ in sizes]
        reading = [asyncio.create_task(reader.read(each.request)) for each in coming]
        for each, size in zip(coming, sizes, strict=True):
            each.send(size)
        await settle()
        coming[2].send(100, is_last=True)  # 1,050 in all
        assert len(await reading[2]) == 150
        coming[0].send(1)
        with pytest.raises(RequestError, match="too many large requests") as refused:
            await reading[0]
        assert refused.value.status == 429
        coming[1].send(600, is_last=True)  # there is room again
        assert len(await reading[1]) == 900

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.2)
    with http_server() as server, connect(server) as client:
        client.sendall(HEAD % 99 + b"{")
        client.settimeout(0.02)
        while True:
            try:
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
                break
            except TimeoutError:
                client.sendall(b" ")


def test_large_prompts_of_clients_that_leave_hold_up_nobody(place: Place) -> None:
    """They are as large as bodies may be, and the context cannot have them."""
    body = json.dumps({**GOOD, "model": "", "messages": [{**ASK[0], "content": "word " * (2 * 10**6 // 5)}]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with endpoint_process(place) as running:
        eventually(running.is_ready)

        def send(reads: bool) -> bytes:
            with connect(running) as client:
                client.sendall(head + body)
                return client.makefile("rb").read(300) if reads else b""

        assert b"context_length_exceeded" in send(reads=True)
        leaving = [threading.Thread(target=send, args=(False,)) for _ in range(40)]
        for each in leaving:
            each.start()
        assert running.request(CHAT, {**GOOD, "model": ""})[0] == 200
        for each in leaving:
            each.join(120)
        running.process.terminate()
        assert running.process.wait(END_TIMEOUT_S) == 0


def test_a_prompt_that_cannot_fit_the_context_is_not_tokenized() -> None:
    encoded = list[str]()

    def encode(text: str) -> Any:
        encoded.append(text)
        return np.zeros(1, np.int64)

    with http_server(encode=encode, prompt_limit=PromptLimit(4, 5)) as server:
        for length in (20, 21):
            connection = HTTPConnection("127.0.0.1", server.port, timeout=120)
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x" * length}))
            assert connection.getresponse().status == (200 if length == 20 else 400)
    assert encoded == ["x" * 20]


def test_a_prompt_that_is_encoded_for_nobody_keeps_its_place_until_it_is_done() -> None:
    """A thread cannot be stopped: who comes and leaves again and again must not have more and more of them."""
    goes_on, encoded = threading.Event(), list[str]()

    def encode(text: str) -> Any:
        encoded.append(text)
        goes_on.wait(120)
        return np.zeros(1, np.int64)

    with http_server(encode=encode) as server:
        for number in range(3):
            with connect(server) as client:
                client.sendall(ASKED)
                eventually(lambda: encoded and server.slots.waiting == min(number, 1))  # noqa: B023
        eventually(lambda: server.slots.waiting == 0)
        assert (encoded, server.slots.busy) == (["hi"], 1)
        goes_on.set()
        eventually(lambda: server.slots.busy == 0)
        assert encoded == ["hi"]


@pytest.mark.parametrize("part", ["x" * 101, ["x" * 101], {"a": {"x" * 101: 1}}, {"x": ["x" * 99]}], ids=str)
def test_whatever_is_in_a_prompt_counts_before_it_is_encoded(part: object) -> None:
    PromptLimit(10, 10).check(["x" * 90])
    with pytest.raises(RequestError, match="say less"):
        PromptLimit(10, 10).check([part])


def test_no_client_gets_more_than_the_owner_of_the_device_gives(place: Place) -> None:
    """Longer answers than it set, or the path of who exported the bundle."""
    with endpoint_process(place, "--max-new-tokens", 3) as running:
        eventually(running.is_ready)
        for most in ({"max_tokens": 50}, {"max_completion_tokens": 50}, {}):
            asked = {"model": "", "messages": ASK, "logit_bias": {"2": -100}, **most}
            status, answer = running.request(CHAT, asked)
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 3
            assert answer["choices"][0]["finish_reason"] == "length"
        (model,) = running.request("/v1/models", method="GET")[1]["data"]
        assert [model["id"]] == running.models == [place.model.name]


# -- a server in this process ---------------------------------------------------------------------------------


class Answering(Generation):
    """Says hello, when it may."""

    waits_for: threading.Event | None = None
    answer_s: float = 0.0

    def run(self, slot: Any, adapter: Any, request: Any, should_stop: Any) -> Iterator[Piece | End]:
        if self.waits_for is not None:
            self.waits_for.wait(120)
        time.sleep(self.answer_s)
        yield Piece(0, "hello", (), {})
        yield End(0, "stop", Counters())


@contextmanager
def http_server(
    kept: Connections | None = None,
    *,
    answers: threading.Event | None = None,
    answer_s: float = 0.0,
    encode: Any = lambda _: np.zeros(1, np.int64),
    **more: Any,
) -> Iterator[SimpleNamespace]:
    """The HTTP side alone, with uvicorn's settings of the command; it answers without a model."""
    kind = type("Answering", (Answering,), {"waits_for": answers, "answer_s": answer_s})
    served = replace(served_by(kind, encode), **more)
    server = uvicorn.Server(http_settings(make_app(served), kept or Connections()))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            eventually(lambda: server.started)
            yield SimpleNamespace(port=listener.getsockname()[1], slots=served.slots)
        finally:
            server.should_exit = True
            thread.join(120)
