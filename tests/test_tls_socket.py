"""A TLS connection that two threads use at a time."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trustme

from dlora.edge.wire.tls_socket import TakingTurns

NBYTES = 8 << 20


@contextmanager
def connected() -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """A server's end, which sends session tickets, and a device's."""
    authority = trustme.CA()
    serving, connecting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(serving)
    authority.configure_trust(connecting)
    connecting.sslsocket_class = TakingTurns
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[ssl.SSLSocket] = []
        accepting = threading.Thread(
            target=lambda: accepted.append(serving.wrap_socket(listener.accept()[0], server_side=True))
        )
        accepting.start()
        tcp = socket.create_connection(listener.getsockname())
        device = connecting.wrap_socket(tcp, server_hostname="localhost")
        accepting.join(60)
    with accepted[0] as server, device:
        device.settimeout(None)
        yield server, device


def echo(server: ssl.SSLSocket) -> None:
    while received := server.recv(1 << 16):
        server.sendall(received)


def test_one_thread_reads_what_another_writes() -> None:
    """And the other end sends it back meanwhile, so that both directions are full at times."""
    with connected() as (server, device):
        assert isinstance(device, TakingTurns)
        sent, received = memoryview(bytes(range(256)) * (NBYTES // 256)), bytearray()
        threads = [threading.Thread(target=echo, args=(server,)), threading.Thread(target=device.sendall, args=(sent,))]
        for thread in threads:
            thread.start()
        while len(received) < NBYTES:
            received += device.recv(1 << 16)
        assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()
        device.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_whoever_waits_too_long_is_told() -> None:
    with connected() as (server, device):
        device.settimeout(0.05)
        with pytest.raises(TimeoutError):
            device.recv()
        server.sendall(b"late")
        device.settimeout(60.0)
        assert device.recv() == b"late"


@pytest.mark.parametrize("who", ["device", "server"])
def test_a_reader_ends_when_the_connection_does(who: str) -> None:
    with connected() as (server, device):
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.append(device.recv()))
        reading.start()
        if who == "device":
            device.shutdown(socket.SHUT_RDWR)
        else:
            server.close()
        reading.join(60)
        assert found == [b""]
        if who == "device":
            with pytest.raises(ConnectionAbortedError):
                device.sendall(b"not in the clear")
