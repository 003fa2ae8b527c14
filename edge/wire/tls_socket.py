"""A TLS connection that one thread reads while another writes.

websockets does that, and OpenSSL allows no two calls on a connection at a time while one of them handles a message of
the handshake. In TLS 1.3 those come later as well: a proxy's session tickets arrive just as both threads begin, and one
connection in 300 never got anything again (docs/log/experiments.md). Newer versions of Python take turns by themselves.
"""

from __future__ import annotations

import errno
import select
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

T = TypeVar("T")


class TakingTurns(ssl.SSLSocket):
    """As ``ssl.SSLSocket``, for ``SSLContext.sslsocket_class``: waits outside of OpenSSL, and calls it one at a time.

    Once a thread has shut it down nothing is read any more, and nothing written: it would not be encrypted.
    """

    _turn: threading.Lock
    _wait_s: float | None
    _is_waiting_outside: bool
    _is_shut_down: bool

    def __new__(cls, *given: Any, **more: Any) -> Self:
        made = super().__new__(cls, *given, **more)  # SSLContext.wrap_socket does not call __init__
        made._turn, made._wait_s, made._is_waiting_outside, made._is_shut_down = threading.Lock(), None, False, False
        return made

    def settimeout(self, value: float | None, /) -> None:
        """As ``socket.settimeout``."""
        self._wait_s = value
        super().settimeout(0.0 if self._is_waiting_outside else value)

    def shutdown(self, how: int, /) -> None:
        """As ``socket.shutdown``."""
        self._is_shut_down = True
        super().shutdown(how)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As ``socket.recv``."""
        return self._take_turns(lambda: b"" if self._is_shut_down else super(TakingTurns, self).recv(buflen, flags))

    def send(self, data: Any, flags: int = 0) -> int:
        """As ``socket.send``."""

        def send() -> int:
            if self._is_shut_down:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the TLS connection was shut down")
            return super(TakingTurns, self).send(data, flags)

        return self._take_turns(send)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As ``socket.sendall``."""
        with memoryview(data) as view, view.cast("B") as left:
            sent = 0
            while sent < len(left):
                sent += self.send(left[sent:], flags)

    def _take_turns(self, call: Callable[[], T]) -> T:
        """Try until it goes through. Raises ``TimeoutError`` where it takes longer than the socket's timeout."""
        until = None if self._wait_s is None else time.monotonic() + self._wait_s
        while True:
            with self._turn:
                if not self._is_waiting_outside:  # the handshake, which is over now, waited inside
                    self._is_waiting_outside = True
                    super().settimeout(0.0)
                try:
                    return call()
                except ssl.SSLWantReadError:
                    wanted = select.POLLIN
                except ssl.SSLWantWriteError:
                    wanted = select.POLLOUT
            ready = select.poll()
            ready.register(self.fileno(), wanted)
            if not ready.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError("the TLS connection was silent for too long")
