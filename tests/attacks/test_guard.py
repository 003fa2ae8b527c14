"""The guard alone: a bare websocket server that echoes, and peers that break its rules on real sockets."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import trustme
from hostile import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    TIMEOUT_S,
    Ending,
    HostileClient,
    frame,
    hostile,
    hostile_websocket,
    request,
)
from waiting import StandingClock, eventually, loop_in_thread
from websockets.asyncio.server import ServerConnection, serve

from dlora.cloud.admission.guard import PIECE_BYTES, ConnectionLimits, Guard, GuardedConnection
from dlora.protocol.connections import raise_file_limit

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FLOOD = Ending("close", 1008, "flood")
PROTOCOL = Ending("close", 1008, "protocol")
DROPPED = ("eof", "reset")


class Room:
    """Room for so many bytes of messages that nobody has taken."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.taken = 0

    def add(self, nbytes: int) -> bool:
        if self.taken + nbytes > self.nbytes:
            return False
        self.taken += nbytes
        return True

    def remove(self, nbytes: int) -> None:
        self.taken -= nbytes


class EchoServer:
    """Where a guarded server listens. It echoes, and does what a message asks it to (``_serve``)."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.url = ""
        self.clock = guard.clock
        self.most_unread = 0
        self.room = Room(GIB)

    async def handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, GuardedConnection)
        answers = []
        async for message in connection:
            match bytes(message).split():
                case [b"open"]:
                    connection.session_opened(self.room)
                case [b"limit", size]:
                    connection.limit_frames(int(size))
                case [b"hold"]:
                    await connection.wait_closed()
                case [b"pour", times]:
                    for _ in range(int(times)):
                        answers.append(asyncio.create_task(self._pour(connection)))
                    continue
            await connection.send(message)
        await asyncio.gather(*answers, return_exceptions=True)

    async def _pour(self, connection: GuardedConnection) -> None:
        """Send without waiting, as a session does that holds the compute gate."""
        sending = asyncio.create_task(connection.send(bytes(60 * KIB)))
        await asyncio.sleep(0)
        self.most_unread = max(self.most_unread, connection.transport.get_write_buffer_size())
        await sending


@contextmanager
def echoing(
    tls: ssl.SSLContext | None = None, clock: Callable[[], float] | None = None, **limits: Any
) -> Iterator[EchoServer]:
    """An echo server in a thread of its own."""
    guard = Guard(ConnectionLimits(**{"sessions": 2, **limits}), tls=tls, clock=clock or StandingClock())
    server = EchoServer(guard)

    async def start() -> Any:
        listening = await serve(server.handle, "127.0.0.1", 0, ping_interval=None, **guard.settings())
        port = next(iter(listening.sockets)).getsockname()[1]
        server.url = f"ws://127.0.0.1:{port}"
        return listening

    async def stop(listening: Any) -> None:
        listening.close()
        guard.abort_unfinished()
        await listening.wait_closed()

    with loop_in_thread() as run:
        listening = run(start())
        yield server
        run(stop(listening))


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    """One server for whatever needs no limits of its own."""
    with echoing(close_s=1.0) as server:
        yield server


def says(client: HostileClient, message: bytes, *, answered: bool = True) -> None:
    """Say something, and hear it back."""
    client.frame(BINARY, message)
    if answered:
        assert client.hear() == (BINARY, message)


# -- how many --------------------------------------------------------------------------------------------


def test_oldest_connection_without_session_is_dropped() -> None:
    """Whatever it has sent."""
    with echoing(unfinished=3) as server, ExitStack() as held:
        clients = [held.enter_context(hostile(server.url)) for _ in range(2)]
        clients[1].send(request()[:40])
        for _ in range(5):
            clients.append(held.enter_context(hostile_websocket(server.url)))
            says(clients[-1], b"here")
        assert all(client.goodbye().how in DROPPED for client in clients[:4])
        for client in clients[4:]:
            says(client, b"still here")
        assert server.guard.unfinished == 3


def test_connection_with_session_is_never_dropped() -> None:
    with echoing(sessions=2, unfinished=2) as server, ExitStack() as held:
        devices = [held.enter_context(hostile_websocket(server.url)) for _ in range(2)]
        for device in devices:
            says(device, b"open")
        for _ in range(9):
            says(held.enter_context(hostile_websocket(server.url)), b"here")
        for device in devices:
            says(device, b"still here")
        assert (server.guard.opened, server.guard.unfinished) == (2, 2)


def test_a_flood_from_one_address_costs_another_nothing() -> None:
    with echoing(unfinished=3) as server, ExitStack() as held:
        slow = held.enter_context(hostile_websocket(server.url, source="127.0.0.2"))
        for _ in range(20):
            says(held.enter_context(hostile_websocket(server.url)), b"flood")
        says(slow, b"open")
        assert (server.guard.opened, server.guard.unfinished) == (1, 2)


def test_connections_never_exceed_sessions_plus_unfinished() -> None:
    """Where more sessions are open than were announced (resumed before the old connection was missed)."""
    with echoing(sessions=1, unfinished=2) as server, ExitStack() as held:
        for _ in range(3):
            says(held.enter_context(hostile_websocket(server.url)), b"open")
        with hostile(server.url) as late:
            assert late.goodbye().how in DROPPED


def test_bytes_before_a_session_are_limited() -> None:
    with echoing(unfinished_bytes=100 * KIB) as server, ExitStack() as held:
        clients = [held.enter_context(hostile_websocket(server.url)) for _ in range(3)]
        clients[0].send(frame(BINARY, bytes(30 * KIB), length=60 * KIB))
        eventually(lambda: server.guard._unfinished_bytes > 30 * KIB)
        clients[1].send(frame(BINARY, bytes(50 * KIB), length=60 * KIB))
        eventually(lambda: server.guard._unfinished_bytes > 80 * KIB)
        clients[2].send(frame(BINARY, bytes(30 * KIB), length=60 * KIB))
        assert clients[1].goodbye().how in DROPPED
        eventually(lambda: server.guard.unfinished == 2)
        clients[0].send(bytes(30 * KIB))  # the rest of it
        assert clients[0].hear() == (BINARY, bytes(60 * KIB))


def test_bytes_of_closed_connections_are_released() -> None:
    with echoing(unfinished_bytes=100 * KIB) as server:
        for _ in range(9):
            with hostile_websocket(server.url) as client:
                says(client, bytes(40 * KIB))
            eventually(lambda: server.guard.unfinished == 0)
        assert server.guard._unfinished_bytes == 0


# -- frames ----------------------------------------------------------------------------------------------


def test_frame_limit_follows_negotiation(echo: EchoServer) -> None:
    with hostile_websocket(echo.url) as client:
        says(client, bytes(64 * KIB))
        says(client, b"limit 1000000")
        says(client, bytes(1_000_000))
        client.send(frame(BINARY, length=1_000_001))  # nothing but the claim
        assert client.goodbye().code == 1009


@pytest.mark.parametrize("length", [64 * KIB + 1, 1 << 31, (1 << 63) - 1])
def test_a_frame_that_claims_too_much_is_refused_before_it_comes(echo: EchoServer, length: int) -> None:
    with hostile_websocket(echo.url) as client:
        client.send(frame(BINARY, length=length))
        assert client.goodbye().code == 1009


@pytest.mark.parametrize(
    "frames",
    [
        frame(BINARY, b"half", fin=0),
        frame(BINARY, fin=0) + frame(CONT, fin=0) * 10_000,
        frame(TEXT, b"hello"),
        frame(TEXT, b"\xff\xfe"),
        frame(TEXT, b"half", fin=0),
    ],
    ids=["fragment", "10,000 empty fragments", "text", "bad text", "text fragment"],
)
def test_frames_that_no_device_sends_are_refused(echo: EchoServer, frames: bytes) -> None:
    with hostile_websocket(echo.url) as client:
        client.send(frames)
        assert client.goodbye() == PROTOCOL


@pytest.mark.parametrize(
    "broken",
    [
        frame(BINARY, b"x", masked=0),
        frame(BINARY, b"x", rsv=4),
        frame(3, b"x"),
        frame(PING, bytes(126)),
        frame(PING, fin=0),
        frame(CONT, b"of nothing"),
    ],
    ids=["unmasked", "reserved bit", "unknown opcode", "long ping", "ping in fragments", "continuation"],
)
def test_broken_websocket_frames_are_refused(echo: EchoServer, broken: bytes) -> None:
    with hostile_websocket(echo.url) as client:
        client.send(broken)
        assert client.goodbye().code == 1002


@pytest.mark.parametrize("opcode", [PING, PONG])
def test_ping_flood_is_refused(opcode: int) -> None:
    clock = StandingClock()
    with echoing(clock=clock) as server, hostile_websocket(server.url) as client:
        for _ in range(3):
            client.send(frame(opcode) * 60)
            for _ in range(60 if opcode == PING else 0):
                assert client.hear() == (PONG, b"")
            says(client, b"alive")  # and so it has counted them
            clock.now += 10
        client.send(frame(opcode) * 40_000)
        heard = []
        while (found := client.hear()) is not None and found[0] == PONG:
            heard.append(found)
        assert len(heard) <= (PIECE_BYTES // len(frame(PING)) + 1 if opcode == PING else 0)
        assert found is not None
        assert found[1][2:] == b"flood"


def test_messages_that_come_faster_than_read_are_refused(echo: EchoServer) -> None:
    with hostile_websocket(echo.url) as client:
        client.frame(BINARY, b"hold")
        client.send(frame(BINARY) * 1000)
        assert client.goodbye() == FLOOD


def test_unread_messages_count_until_read() -> None:
    with echoing() as server, hostile_websocket(server.url) as client:
        server.room.nbytes = 10 * KIB
        says(client, b"open")
        for _ in range(20):
            says(client, bytes(KIB))
        assert server.room.taken == 0
        says(client, b"hold", answered=False)
        client.send(frame(BINARY, bytes(KIB)) * 3)
        eventually(lambda: server.room.taken == 3 * KIB)
        client.send(frame(BINARY, bytes(8 * KIB)))
        assert client.goodbye() == FLOOD
        eventually(lambda: server.room.taken == 0)


def test_unread_bytes_of_a_lost_connection_are_released() -> None:
    with echoing() as server:
        with hostile_websocket(server.url) as client:
            says(client, b"open")
            says(client, b"hold", answered=False)
            client.send(frame(BINARY, bytes(KIB)) * 3)
            eventually(lambda: server.room.taken == 3 * KIB)
        eventually(lambda: server.room.taken == 0)


def test_peer_that_reads_nothing_is_dropped() -> None:
    with echoing() as server, hostile_websocket(server.url, receive_buffer=4096) as client:
        client.frame(BINARY, b"pour 2000")
        eventually(lambda: server.guard.unfinished == 0)
        assert server.most_unread < 2 * MIB


def test_peer_that_reads_slowly_gets_everything(echo: EchoServer) -> None:
    with hostile_websocket(echo.url, receive_buffer=4096) as client:
        client.frame(BINARY, b"pour 15")
        for _ in range(15):
            assert client.hear() == (BINARY, bytes(60 * KIB))


def test_peer_that_does_not_close_is_dropped() -> None:
    with echoing(close_s=0.05) as server, hostile_websocket(server.url) as client:
        client.frame(TEXT, b"hello")
        eventually(lambda: server.guard.unfinished == 0)
        assert client.goodbye() == PROTOCOL  # it had been told


# -- HTTP and TLS ----------------------------------------------------------------------------------------


def test_browsers_are_refused(echo: EchoServer) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1"):
        with hostile(echo.url) as page:
            assert page.upgrade(Origin=origin) == 403


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        bytes(100_000),
        request(Sec_WebSocket_Version="99"),
        request(Sec_WebSocket_Key="short"),
        request(Upgrade="h2c"),
    ],
    ids=["huge header", "many headers", "huge path", "POST", "TLS hello", "zeros", "version", "key", "no upgrade"],
)
def test_invalid_http_handshake_is_refused(echo: EchoServer, nonsense: bytes) -> None:
    with hostile(echo.url) as client:
        client.send(nonsense)
        try:
            assert client.status() in (0, 400, 405, 413, 414, 426, 431)
            assert client.goodbye().how in DROPPED
        except ConnectionResetError:
            pass  # it did not even read all of it
    eventually(lambda: echo.guard.unfinished == 0)


def test_compression_is_not_negotiated(echo: EchoServer) -> None:
    with hostile(echo.url) as client:
        assert client.upgrade(Sec_WebSocket_Extensions="permessage-deflate; client_max_window_bits") == 101
        client.send(frame(BINARY, b"x", rsv=4))
        assert client.goodbye().code == 1002


def test_slow_http_request_is_dropped() -> None:
    with echoing(handshake_s=0.05) as server, hostile(server.url) as client:
        client.send(request()[:-5])
        assert client.goodbye().how in DROPPED


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


HALF_A_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def test_tls_handshakes_count_before_they_are_done(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    with echoing(server_tls, unfinished=3) as server, ExitStack() as held:
        halves = [held.enter_context(hostile(server.url)) for _ in range(9)]
        for half in halves[:6]:
            assert half.goodbye().how in DROPPED
        for half in halves[6:]:
            half.send(HALF_A_TLS_HELLO)
        device = held.enter_context(hostile_websocket(server.url, tls=client_tls))
        for _ in range(9):
            held.enter_context(hostile(server.url)).send(HALF_A_TLS_HELLO)
            says(device, b"open")
        assert server.guard.unfinished <= 3


def test_slow_tls_handshake_is_dropped(server_tls: ssl.SSLContext) -> None:
    with echoing(server_tls, handshake_s=0.05) as server, hostile(server.url) as client:
        client.send(HALF_A_TLS_HELLO)
        assert client.goodbye().how in DROPPED
        eventually(lambda: server.guard.unfinished == 0)


@pytest.mark.parametrize("nonsense", [request(), bytes(100_000)], ids=["plain HTTP", "zeros"])
def test_connection_without_tls_handshake_is_dropped(server_tls: ssl.SSLContext, nonsense: bytes) -> None:
    with echoing(server_tls) as server, hostile(server.url) as client:
        client.send(nonsense)
        client.goodbye()
        eventually(lambda: server.guard.unfinished == 0)


@pytest.mark.parametrize(
    "burst",
    [
        b"GARBAGE\r\n\r\n" + bytes(8 * KIB),
        request() + frame(CLOSE, b"\x03\xe8") + bytes(8 * KIB),
        request() + frame(BINARY, b"unmasked", masked=0) + bytes(8 * KIB),
        request() + frame(BINARY, length=1 << 30) + bytes(8 * KIB),
    ],
    ids=["no HTTP", "close", "unmasked", "too long"],
)
def test_a_peer_that_leaves_within_one_read_is_no_error_of_ours(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, burst: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it, and TLS's own goodbye, come in one read. asyncio would log what is raised, a traceback each time."""
    with echoing(server_tls) as server:
        port = int(server.url.rpartition(":")[2])
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as tcp:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    tcp.sendall(outgoing.read())
                    incoming.write(tcp.recv(64 * KIB))
            tcp.sendall(outgoing.read())
            eventually(lambda: server.guard.unfinished == 1)
            tls.write(burst)
            with suppress(ssl.SSLError):
                tls.unwrap()
            tcp.sendall(outgoing.read())
            while tcp.recv(64 * KIB):
                pass
        eventually(lambda: server.guard.unfinished == server.guard.opened == 0)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_large_messages_pass_over_tls(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    with echoing(server_tls, close_s=0.2) as server, hostile_websocket(server.url, tls=client_tls) as client:
        says(client, b"limit 3000000")
        says(client, bytes(3_000_000))
        client.frame(TEXT, b"hello")
        assert client.goodbye() == PROTOCOL
        eventually(lambda: server.guard.unfinished == 0)


def test_stopping_server_does_not_wait_for_slow_peers(server_tls: ssl.SSLContext) -> None:
    with ExitStack() as held:
        with echoing(server_tls, handshake_s=3600.0) as server:
            clients = [held.enter_context(hostile(server.url)) for _ in range(3)]
            for client in clients:
                client.send(HALF_A_TLS_HELLO)
            eventually(lambda: server.guard.unfinished == 3)
        for client in clients:
            assert client.goodbye().how in DROPPED


# -- the log, and files ----------------------------------------------------------------------------------


def test_a_flood_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = StandingClock()
    guard = Guard(ConnectionLimits(sessions=1), clock=clock)
    with caplog.at_level(logging.WARNING, "dlora.cloud"):
        for _ in range(2):
            for number in range(1000):
                guard.log_refusal("a text frame", f"10.0.0.{number % 9}")
            clock.now += 10
        guard.log_refusal("a flood of pings", "10.0.0.1")
    assert caplog.messages == [
        "refused 1 × a text frame; the last from 10.0.0.0",
        "refused 1000 × a text frame; the last from 10.0.0.0",
        "refused 1 × a flood of pings; the last from 10.0.0.1",
    ]


def test_file_limit_is_raised_to_the_maximum() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 512), before[1]))
        assert raise_file_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
