"""Reaching a server that is there, while something else answers in its place for a while."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.sync.server import Request, Response, ServerConnection, serve

from dlora.edge.connection import Connection, Dialing, Retry, check_url
from dlora.edge.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.codec import encode
from dlora.protocol.errors import ConnectionFailedError, UsageError

HOST = "127.0.0.1"
PATIENT = Retry(max_s=None, at_start=True, first_s=0.01, ceiling_s=0.01)
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
WELCOME = m.Welcome(
    protocol_version=1, software="x", base_model="x", base_fingerprint="x", embedding_size=1, hidden_size=1,
    max_sequence_length=1, max_tokens=1,
)  # fmt: skip


@contextmanager
def greeting(**settings: Any) -> Iterator[int]:
    """A server that greets; its port."""

    def greet(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(encode(WELCOME))
        connection.recv()

    with serve(greet, HOST, 0, compression=None, **settings) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


@pytest.mark.parametrize("location", ["http://portal.example/login", "/login", "ws://[::1", "ws://h:99999/"])
def test_a_portals_redirect_is_not_followed(location: str) -> None:
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
        with Connection(url, Dialing(retry=PATIENT)) as connection:
            assert connection.reconnects == 1
    assert asked == ["/"] * 4


def test_a_certificate_that_is_not_to_be_trusted_now_may_be_later(tmp_path: Path) -> None:
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
            Connection(url, Dialing(credentials))
        with Connection(url, Dialing(credentials, retry=PATIENT, say=said.append)) as connection:
            assert connection.reconnects == 1
    assert sum("not to be trusted" in line for line in said) == 2


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".org"])
def test_a_name_that_cannot_be(host: str) -> None:
    with pytest.raises(UsageError, match="no websocket address"):
        check_url(f"ws://{host}:8765")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "[fe80::1%eth0]", "example.org.", "bücher.de"])
def test_a_name_that_can(host: str) -> None:
    check_url(f"ws://{host}:8765")
