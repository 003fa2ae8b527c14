"""A websocket client that keeps no rules: raw sockets and a framing of its own.

What the peer answers is read as it is; a connection that was closed, reset or never answered all end as a
``Ending``, so that a test names the way in which a server got rid of it.
"""

from __future__ import annotations

import base64
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
TIMEOUT_S = 20.0


class Ending(NamedTuple):
    """How a connection ended: ``close`` frame with a code, or none (``eof``, ``reset``)."""

    how: str
    code: int = 0
    reason: str = ""


class HostileClient:
    """One connection. ``upgrade`` makes it a websocket; everything may be sent before and after, in any form.

    Args:
        url: of the server, ``ws://host:port``.
        source: the address to come from, such as another one of loopback's.
        tls: speak TLS.
        receive_buffer: bytes that the kernel takes for a client that does not read.
    """

    def __init__(
        self,
        url: str,
        *,
        source: str | None = None,
        tls: ssl.SSLContext | None = None,
        receive_buffer: int | None = None,
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source is not None:
            self.socket.bind((source, 0))
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect((parts.hostname, parts.port))
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=parts.hostname)
        self._unread = b""

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Bytes as they are. Raises ``OSError`` where the server has hung up."""
        self.socket.sendall(data)

    # -- HTTP --------------------------------------------------------------------------------------------

    def upgrade(self, path: str = "/", **headers: str) -> int:
        """Ask for a websocket, with more headers or other ones (``Sec_WebSocket_Version``…); gives the HTTP status."""
        self.send(request(path, **headers))
        return self.status()

    def status(self) -> int:
        """The HTTP status of the answer; 0 where there is none."""
        while b"\r\n\r\n" not in self._unread:
            if not self._read():
                return 0
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])

    # -- frames ------------------------------------------------------------------------------------------

    def frame(self, opcode: int, payload: bytes = b"", **breaking: int) -> None:
        """Send one frame; see ``frame``."""
        self.send(frame(opcode, payload, **breaking))

    def hear(self) -> tuple[int, bytes] | None:
        """The next frame, as (opcode, payload); None where the connection is over."""
        head = self._take(2)
        if len(head) < 2:
            return None
        size = head[1] & 127
        if size > 125:
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        payload = self._take(size)
        return (head[0] & 15, payload) if len(payload) == size else None

    def goodbye(self) -> Ending:
        """Read until the server gets rid of us."""
        try:
            while (heard := self.hear()) is not None:
                if heard[0] == CLOSE:
                    code = struct.unpack("!H", heard[1][:2])[0] if heard[1] else 1005
                    return Ending("close", code, heard[1][2:].decode())
        except ConnectionError:
            return Ending("reset")
        return Ending("eof")

    def _take(self, size: int) -> bytes:
        """So many bytes, or what is left where the connection is over."""
        while len(self._unread) < size and self._read():
            pass
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _read(self) -> bool:
        data = self.socket.recv(1 << 16)
        self._unread += data
        return bool(data)


@contextmanager
def hostile(url: str, **how: object) -> Iterator[HostileClient]:
    """A connection that is closed at the end, whatever became of it."""
    client = HostileClient(url, **how)  # type: ignore[arg-type]
    try:
        yield client
    finally:
        client.close()


@contextmanager
def hostile_websocket(url: str, **how: object) -> Iterator[HostileClient]:
    """The same, past the websocket's handshake."""
    with hostile(url, **how) as client:
        assert client.upgrade() == 101
        yield client


def request(path: str = "/", **headers: str) -> bytes:
    """A websocket's opening request; header names with underscores for dashes, later ones replace ours."""
    lines = {
        "Host": "server",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return "\r\n".join(
        [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""]
    ).encode()


def frame(
    opcode: int, payload: bytes = b"", *, fin: int = 1, rsv: int = 0, masked: int = 1, length: int | None = None
) -> bytes:
    """One frame. ``length`` may claim more than ``payload`` has; the mask is zeros, which leaves bytes as they are."""
    claimed = len(payload) if length is None else length
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if claimed < 126:
        head += bytes([masked << 7 | claimed])
    elif claimed < 1 << 16:
        head += bytes([masked << 7 | 126]) + struct.pack("!H", claimed)
    else:
        head += bytes([masked << 7 | 127]) + struct.pack("!Q", claimed)
    return head + (bytes(4) if masked else b"") + payload
