"""The device's end of one websocket: typed messages in and out, and every failure as one clear line."""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from dlora.protocol import messages as m
from dlora.protocol.errors import (
    ConnectionFailedError,
    ModelMismatchError,
    ProtocolError,
    RefusedError,
    RemoteProtocolError,
    UsageError,
)
from dlora.protocol.session import Role, Session
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

OPEN_TIMEOUT_S = 10.0
PING_EVERY_S = 20.0
PING_TIMEOUT_S = 120.0
MAX_FRAME_BYTES = 1 << 30

# What websockets raises when the peer is gone. Beside its own exception it lets a failed write through, and trips
# over an assertion of its own where the peer hangs up while we send (17.4).
HUNG_UP = (ConnectionClosed, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, AssertionError)

# Its own account of the same, with a traceback, is not for our users.
_silent = logging.getLogger("dlora.edge.websocket")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False

M = TypeVar("M", bound=m.Message)


class Connection:
    """A connection to a server, past the greeting.

    Attributes:
        session: the protocol's state, and the counters of bytes and round trips.
        welcome: what the server said of itself.
    """

    def __init__(self, url: str) -> None:
        """Connect and greet. Raises ``ConnectionFailedError``, ``ProtocolError``, ``RefusedError``."""
        self.url = url
        self.session = Session(Role.EDGE)
        self._closing = contextlib.ExitStack()
        self._socket = _connect(url, self._closing)
        self.send(
            m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software=f"dlora-edge {SOFTWARE_VERSION}")
        )
        self.welcome = self.receive(m.Welcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, message: m.AnyMessage) -> None:
        frame = self.session.send(message)
        try:
            self._socket.send(frame)
        except HUNG_UP:
            # Why it went away may stand in what the server said last.
            self._raise_lost()

    def receive(self, kind: type[M]) -> M:
        """The next message, which must be of ``kind`` (a union is written as a common base)."""
        message = self.receive_any()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{type(message).__name__} where {kind.__name__} was due")
        return message

    def receive_any(self) -> m.AnyMessage:
        """The next message; an ``Error`` of the server's is raised as what it means."""
        try:
            frame = self._socket.recv(decode=False)
        except HUNG_UP:
            raise self._lost() from None
        message = self.session.receive(frame)
        if isinstance(message, m.Error):
            raise _refusal(message, self.url)
        return message

    def close(self) -> None:
        """Say goodbye where the rules allow it, and hang up."""
        with contextlib.suppress(ProtocolError, ConnectionFailedError, RefusedError):
            self.send(m.CloseSession())
        self._closing.close()

    def _raise_lost(self) -> None:
        while True:
            try:
                message = self.session.receive(self._socket.recv(decode=False, timeout=1.0))
            except (*HUNG_UP, TimeoutError, ProtocolError):
                raise self._lost() from None
            if isinstance(message, m.Error):
                raise _refusal(message, self.url)

    def _lost(self) -> ConnectionFailedError:
        step = self.session.step
        if self.session.welcome is None:
            return ConnectionFailedError(f"{self.url} hung up before it greeted; is it a dlora server?")
        return ConnectionFailedError(
            f"lost the server {self.url} at step {step}; start it again and train with --resume"
        )


def _connect(url: str, closing: contextlib.ExitStack) -> ClientConnection:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large a one
        usable = False
    if not usable:
        raise UsageError(f"--server {url!r} is no websocket address; write ws://HOST:PORT")
    try:
        return closing.enter_context(
            connect(
                url,
                compression=None,
                max_size=MAX_FRAME_BYTES,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=PING_EVERY_S,
                ping_timeout=PING_TIMEOUT_S,
                close_timeout=5,
                proxy=None,
                logger=_silent,
            )
        )
    except InvalidURI:
        raise UsageError(f"--server {url!r} is no websocket address; write ws://HOST:PORT") from None
    except (InvalidHandshake, EOFError, *HUNG_UP) as error:
        reason = str(error) or "it hung up"
        raise ConnectionFailedError(f"{url} answers, but is no dlora server ({reason})") from None
    except TimeoutError:
        raise ConnectionFailedError(f"{url} did not answer in {OPEN_TIMEOUT_S:g} s; is it a dlora server?") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConnectionFailedError(
            f"cannot reach {url}: {reason}; start the server with: dlora-cloud serve MODEL"
        ) from None


def _refusal(error: m.Error, url: str) -> Exception:
    text = f"the server {url} refused: {error.message}"
    match error.code:
        case m.ErrorCode.BASE_MODEL_MISMATCH | m.ErrorCode.UNKNOWN_TARGET:
            return ModelMismatchError(f"{text}; serve the model that the bundle was exported from")
        case m.ErrorCode.VERSION:
            return ProtocolError(f"{text}; update the older side")
        case m.ErrorCode.PROTOCOL | m.ErrorCode.NON_FINITE:
            return ProtocolError(text)
        case _:
            return RefusedError(
                text, error.code, retryable=error.retryable, retry_after_s=error.retry_after_s
            )


