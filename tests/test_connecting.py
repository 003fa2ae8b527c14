"""Reaching a server that is there, while something else answers in its place for a while."""

from __future__ import annotations

import datetime
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import trustme
from families import VOCABULARY
from msgspec import structs
from serving import config, random_dataset, serving, training
from tiny import TinyFactory
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.sync.server import Request, Response, ServerConnection, serve

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.engine.bundle import Bundle
from dlora.edge.wire import connection as edge
from dlora.edge.wire.connecting import ConnectSettings, Retry, websocket_url
from dlora.edge.wire.connection import CONTROL_BYTES, Connection
from dlora.edge.wire.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.errors import ConnectionFailedError, ModelMismatchError, UsageError
from dlora.protocol.frames import encode
from dlora.protocol.version import PROTOCOL_VERSIONS

HOST = "127.0.0.1"
PATIENT = Retry(max_s=None, at_start=True, first_s=0.01, ceiling_s=0.01)
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
WELCOME = m.Welcome(
    protocol_version=PROTOCOL_VERSIONS[-1], software="x", base_model="x", base_fingerprint="x",
    base_weight_format="full", embedding_size=1, hidden_size=1, max_sequence_length=1, max_tokens=1, packs=True,
)  # fmt: skip


def greet(connection: ServerConnection) -> None:
    connection.recv()
    connection.send(encode(WELCOME))
    connection.recv()


@contextmanager
def greeting(answer: Callable[[ServerConnection], None] = greet, **settings: Any) -> Iterator[int]:
    """A server that greets, or does something else; its port."""
    with serve(answer, HOST, 0, compression=None, **settings) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


@pytest.mark.parametrize("location", ["http://portal.example/login", "/login", "ws://[::1", "ws://h:99999/"])
def test_http_redirect_is_not_followed(location: str) -> None:
    asked: list[str] = []

    def redirect(connection: ServerConnection, request: Request) -> Response | None:
        asked.append(request.path)
        if len(asked) > 3:
            return None
        response = connection.respond(HTTPStatus.FOUND, "log in first")
        response.headers["Location"] = location
        return response

    with greeting(process_request=redirect) as port:
        url = f"ws://{HOST}:{port}"
        with pytest.raises(ConnectionFailedError, match="HTTP 302"):
            Connection(url)
        with Connection(url, ConnectSettings(retry=PATIENT)) as connection:
            assert connection.reconnects == 1
    assert asked == ["/"] * 4


def test_untrusted_certificate_is_retried_during_a_run(tmp_path: Path) -> None:
    """A clock that is wrong for a while, or a portal, is no reason to end a run; a first try ends at once."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    expired, good = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.issue_cert(HOST, not_after=LONG_AGO, not_before=LONG_AGO.replace(year=2019)).configure_cert(expired)
    authority.issue_cert(HOST).configure_cert(good)
    handshakes = 0

    def choose(tls: ssl.SSLSocket | ssl.SSLObject, *_: object) -> None:
        nonlocal handshakes
        handshakes += 1
        if handshakes > 3:
            tls.context = good

    expired.sni_callback = choose
    said: list[str] = []
    credentials = Credentials("a-token", ca=tmp_path / "ca.pem")
    with greeting(ssl=expired) as port:
        url = f"wss://{HOST}:{port}"
        with pytest.raises(ConnectionFailedError, match="not to be trusted"):
            Connection(url, ConnectSettings(credentials))
        with Connection(url, ConnectSettings(credentials, retry=PATIENT, say=said.append)) as connection:
            assert connection.reconnects == 1
    assert sum("not to be trusted" in line for line in said) == 2


@pytest.mark.parametrize(("address", "meant"), [
    ("127.0.0.1:8765", "ws://127.0.0.1:8765"), ("localhost:8765", "ws://localhost:8765"), ("[::1]:1", "ws://[::1]:1"),
    ("http://h:8765/dlora", "ws://h:8765/dlora"), ("https://h", "wss://h"), ("HTTPS://h:1", "wss://h:1"),
    *((f"ws://{host}:8765",) * 2 for host in ("localhost", "[fe80::1%eth0]", "example.org.", "bücher.de")),
])  # fmt: skip
def test_addresses_as_browsers_and_shells_have_them_are_websocket_addresses(address: str, meant: str) -> None:
    assert websocket_url(address) == meant


@pytest.mark.parametrize("address", [
    "localhost", "h:", "h:0", "h:99999", "wss:h:1", "ftp://h:1", "", ":8765", "ws://a..b:8765",
    f"ws://{'a' * 64}.org:8765",
])  # fmt: skip
def test_what_is_no_address_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match=r"no server's address; write HOST:PORT"):
        websocket_url(address)


def test_a_token_for_a_bare_address_asks_for_tls() -> None:
    with pytest.raises(UsageError, match=r"could be read on the way to ws://10\.0\.0\.1:1; write wss://"):
        Connection("10.0.0.1:1", ConnectSettings(Credentials("a-token")))


def test_large_frame_before_a_session_is_refused() -> None:
    def greet_at_length(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(bytes(CONTROL_BYTES + 1))
        with suppress(ConnectionClosed):
            connection.recv()
        closed.put(connection.close_code)

    closed: queue.Queue[int | None] = queue.Queue()
    with greeting(greet_at_length) as port, pytest.raises(ConnectionFailedError, match="before it greeted"):
        Connection(f"ws://{HOST}:{port}")
    assert closed.get(timeout=120) == CloseCode.MESSAGE_TOO_BIG


def test_frame_limit_in_a_session_fits_its_answers(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a connection that comes later as well; with hardly any allowance beside, so that the rest must suffice."""
    monkeypatch.setattr(edge, "CONTROL_BYTES", 4096)
    data = random_dataset(VOCABULARY, longest=60)
    with (
        serving(tiny().base) as server,
        training(tiny().bundle, server.url, config(batch_size=12), data, ConnectSettings(retry=PATIENT)) as trainer,
    ):
        connection, forward = trainer.side.crossed, trainer.model._compute.forward
        largest = 0

        def count(frame: bytes) -> m.AnyMessage | None:
            nonlocal largest
            largest = max(largest, len(frame))
            return receive(frame)

        def hang_up_once(*given: Any, **more: Any) -> Any:
            if not connection.resumed:
                connection._disconnect()
            return forward(*given, **more)

        receive = connection.session.receive
        monkeypatch.setattr(connection.session, "receive", count)
        monkeypatch.setattr(trainer.model._compute, "forward", hang_up_once)
        trainer.run_step()
        assert (connection.reconnects, connection.resumed, trainer.steps_rerun) == (1, 1, 0)
        assert 4096 < largest <= connection._frame_bytes < 2 * largest


def test_server_with_a_wrong_hidden_size_is_refused(tiny: TinyFactory) -> None:
    """The fingerprint is right, and what it calls a hidden state would be of any size."""
    bundle = Bundle.open(tiny().bundle)
    base = bundle.manifest.base_model
    welcome = structs.replace(
        WELCOME, base_fingerprint=base.fingerprint, embedding_size=base.embedding_size, hidden_size=base.hidden_size
    )
    check_base_model(bundle, welcome)
    with pytest.raises(ModelMismatchError, match="wide"):
        check_base_model(bundle, structs.replace(welcome, hidden_size=1 << 24))


def test_retries_use_all_of_max_retry_s() -> None:
    """It once gave up before its first pause of half a minute, after 0 s of 2, and said so."""
    said: list[str] = []
    retry = Retry(max_s=2.0, at_start=True, first_s=60.0)
    # Bound and not listening: nobody else has the port, and connections to it are refused.
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        began = time.monotonic()
        with pytest.raises(ConnectionFailedError, match=r"gave up after (\d+) s \(--max-retry-s\)") as caught:
            Connection(f"ws://{HOST}:{taken.getsockname()[1]}", ConnectSettings(retry=retry, say=said.append))
        took = time.monotonic() - began
    (after,) = re.findall(r"gave up after (\d+) s", str(caught.value))
    assert took >= 2.0
    assert 2 <= int(after) <= took + 1
    assert len(said) == 2, "one try at once, and one after all that is left"
    (pause,) = re.findall(r"trying again in ([\d.]+) s", said[1])
    assert 0 < float(pause) <= 2


def test_retry_after_beyond_max_retry_s_ends_the_run() -> None:
    def full(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(encode(m.Error(code="limit", message="full", retryable=True, retry_after_s=500.0)))
        connection.recv()

    text = "again in 500 s, and --max-retry-s leaves"
    with greeting(full) as port, pytest.raises(ConnectionFailedError, match=text):
        Connection(f"ws://{HOST}:{port}", ConnectSettings(retry=Retry(max_s=60.0, at_start=True, first_s=60.0)))
