"""Connects one websocket, and turns each failure into an error.

A failure that may be temporary is a ``ConnectionLostError``, which carries what to raise where nothing more is tried.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect

from dlora.protocol import messages as m
from dlora.protocol.errors import (
    ConnectionFailedError,
    DloraError,
    ModelMismatchError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    UsageError,
)

from .cookies import Cookies
from .credentials import Credentials, refusal_in, split_url, tls_failure
from .recorder import Recorder
from .spans import Spans

CLOSE_TIMEOUT_S: Final = 2.0
STOP_CHECK_S: Final = 0.2

# What websockets raises when the peer is gone. Beside its own exception it lets a failed write through, and trips
# over an assertion of its own where the peer hangs up while we send (17.4).
PEER_GONE: Final = (ConnectionClosed, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, AssertionError)

# Its own account of the same, with a traceback, is not for our users.
_muted_logger = logging.getLogger("dlora.edge.websocket")
_muted_logger.addHandler(logging.NullHandler())
_muted_logger.propagate = False


@dataclass(frozen=True)
class Retry:
    """When to connect again, and for how long.

    Attributes:
        max_s: how long an outage may last; None: for ever, 0: give up at once.
        at_start: whether the very first connection may wait as well; otherwise it fails at once.
        first_s, ceiling_s: pauses double from the one to the other; each is shortened by up to half at random, so
            that devices do not come back in step.
    """

    max_s: float | None = 0.0
    at_start: bool = False
    first_s: float = 0.5
    ceiling_s: float = 30.0

    def pause_s(self, failures: int, asked_s: float | None) -> float:
        """The pause after so many failures in a row: as long as the server asks, but never so little that we would
        hammer at it. ``asked_s``: None where it does not ask."""
        own_s = 0.0
        if failures:
            own_s = min(self.ceiling_s, self.first_s * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
        if asked_s is None:
            return own_s
        # Not in step with the others that were sent away, and not so late that the server has given us up.
        return max(own_s, asked_s + random.uniform(0.0, min(asked_s / 4, self.ceiling_s)))


@dataclass(frozen=True)
class Liveness:
    """When a silent server counts as lost, in seconds.

    Attributes:
        exchange_s: least time that an answer may take; slow answers raise it.
        open_s: to connect and greet.
        ping_every_s, ping_timeout_s: pings do not depend on what the server computes.
    """

    exchange_s: float = 120.0
    open_s: float = 10.0
    ping_every_s: float = 20.0
    ping_timeout_s: float = 60.0


@dataclass(frozen=True)
class ConnectSettings:
    """How to reach a server, and what to do when it is gone.

    Attributes:
        device_id: this device's stable name.
        say: called with one line when the connection is lost and when it is back.
        should_stop: asked while waiting for a server; true raises ``StoppedError``.
        recorder: keeps frames and truth, where a user asks for it; spans: when what happened, likewise.
        clock: seconds that never go back; sleep: waits so many of them.
    """

    credentials: Credentials = field(default_factory=Credentials)
    device_id: str = ""
    retry: Retry = field(default_factory=Retry)
    liveness: Liveness = field(default_factory=Liveness)
    say: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    recorder: Recorder | None = None
    spans: Spans = field(default_factory=Spans)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class ConnectionLostError(Exception):
    """This connection is lost; another one may work.

    Attributes:
        final: what to raise where nothing more is tried.
        retry_after_s: seconds that the server asks to wait; None where it did not say.
        is_between_servers: whether a proxy, or a server that stops, says that there is none just now: even a first
            connection is then tried again.
    """

    def __init__(self, final: DloraError, retry_after_s: float | None = None) -> None:
        super().__init__(str(final))
        self.final = final
        self.retry_after_s = retry_after_s
        self.is_between_servers = False


class AnswerTimeoutError(ConnectionLostError):
    """Nothing came in time."""


def least_ping_s(websocket: ClientConnection, timeout_s: float, times: int = 5) -> float:
    """Seconds until its peer answers a ping, the least of so many; 0: it does not, or is gone."""
    found = []
    with contextlib.suppress(*PEER_GONE):
        for _ in range(times):
            started = time.perf_counter()
            if not websocket.ping().wait(timeout_s):
                break
            found.append(time.perf_counter() - started)
    return min(found, default=0.0)


# Bad gateway, service unavailable, gateway timeout: of a proxy whose servers start, stop or are gone, and of a server
# that stops.
_NO_SERVER_NOW: Final = (502, 503, 504)
_SCHEMES: Final = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


def websocket_url(address: str) -> str:
    """The websocket address that a user means: ``HOST:PORT`` and ``http://`` are ``ws://``, ``https://`` is ``wss://``.

    Raises ``UsageError`` where it is none, or has a secret in it.
    """
    has_scheme = "://" in address
    parts = split_url(address if has_scheme else f"ws://{address}")
    try:
        usable = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
        usable = usable and (has_scheme or parts.port is not None)  # a word alone is a slip, and no host
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, or too large a one; a name with a part that is empty or too long
        usable = False
    if not usable:
        raise UsageError(
            f"--server {address!r} is no server's address; write HOST:PORT, ws://HOST:PORT or wss://HOST:PORT"
        )
    return parts._replace(scheme=_SCHEMES[parts.scheme]).geturl()


class _OtherAnswerError(Exception):
    """An HTTP answer other than 101."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class _NoRedirects(ClientConnection):
    """Takes the answer that comes. websockets follows redirects, a captive portal's too, wherever they lead."""

    def handshake(self, *given: Any, **more: Any) -> None:
        try:
            super().handshake(*given, **more)
        except InvalidStatus as error:
            raise _OtherAnswerError(error.response) from None


def open_websocket(
    url: str, settings: ConnectSettings, closing: contextlib.ExitStack, frame_bytes: int, cookies: Cookies
) -> ClientConnection:
    """Open a websocket, which ``closing`` will close; it takes frames of ``frame_bytes`` at most.

    ``cookies`` are shown, and those that it sets are kept there.

    Raises ``ConnectionLostError`` for what may pass; ``UsageError``, and what a server that refuses means, for what
    may not.
    """
    liveness, credentials = settings.liveness, settings.credentials
    try:
        websocket = closing.enter_context(
            connect(
                url,
                additional_headers=credentials.headers(url) | cookies.headers(),
                ssl=credentials.ssl_context(url),
                compression=None,
                max_size=frame_bytes,
                open_timeout=liveness.open_s,
                ping_interval=liveness.ping_every_s,
                ping_timeout=liveness.ping_timeout_s,
                close_timeout=CLOSE_TIMEOUT_S,
                proxy=None,
                logger=_muted_logger,
                create_connection=_NoRedirects,
            )
        )
    except InvalidURI:
        raise UsageError(f"--server {url!r} is no websocket address; write ws://HOST:PORT") from None
    except _OtherAnswerError as error:
        raise _http_refusal(error.response, url) from None
    except (InvalidHandshake, EOFError, *PEER_GONE) as error:
        reason = str(error) or "it hung up"
        over_tls = "; is it wss://?" if url.startswith("ws://") else ""
        text = f"{url} answers, but is no dlora server ({reason}){over_tls}"
        raise ConnectionLostError(ConnectionFailedError(text)) from None
    except TimeoutError:
        text = f"{url} did not answer in {liveness.open_s:g} s; is it a dlora server?"
        raise ConnectionLostError(ConnectionFailedError(text)) from None
    except ssl.SSLError as error:
        raise ConnectionLostError(tls_failure(error, url)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        nobody = "check the address" if isinstance(error, socket.gaierror) else "start it: dlora-cloud serve MODEL"
        text = f"cannot reach {url}: {reason}; {nobody}"
        raise ConnectionLostError(ConnectionFailedError(text)) from None
    assert websocket.response is not None  # it was 101
    cookies.keep(websocket.response.headers)
    if sys.platform == "linux":
        # Writing has no deadline of its own: a server that stands still would hold up a large frame, and the pings that
        # wait behind it, for ever.
        timeout_ms = round(liveness.ping_timeout_s * 1000)
        with contextlib.suppress(OSError):  # it hung up already, which whoever reads will find
            websocket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return websocket


def _http_refusal(response: Response, url: str) -> Exception:
    """What to raise for an HTTP answer other than 101: a server that lets nobody in says why as the wire does."""
    found, status = refusal_in(response.body), response.status_code
    error: Exception
    if found is not None:
        error = refusal_of(found, url)
    elif status in _NO_SERVER_NOW:
        text = f"{url} has no server to hand us on to just now (HTTP {status})"
        error = ConnectionLostError(ConnectionFailedError(text), _retry_after_s(response))
    else:
        error = ConnectionLostError(ConnectionFailedError(f"{url} answers, but is no dlora server (HTTP {status})"))
    if isinstance(error, ConnectionLostError):
        error.is_between_servers = status in _NO_SERVER_NOW
    return error


def _retry_after_s(response: Response) -> float | None:
    """What a proxy asks for, in seconds; None where it names none, or a date."""
    found = response.headers.get_all("Retry-After")
    is_number = len(found) == 1 and found[0].isascii() and found[0].isdecimal()
    return float(min(int(found[0][:10]), m.MAX_RETRY_AFTER_S)) if is_number else None


def refusal_of(error: m.Error, url: str) -> Exception:
    """What to raise for an ``Error`` of the server at ``url``: ``ConnectionLostError`` where it may be asked again."""
    refusal = _meaning_of(error, url)
    return ConnectionLostError(refusal, error.retry_after_s) if error.retryable else refusal


def _meaning_of(error: m.Error, url: str) -> DloraError:
    text = f"the server {url} refused: {error.message}"
    match error.code:
        case m.ErrorCode.BASE_MODEL_MISMATCH | m.ErrorCode.UNKNOWN_TARGET:
            return ModelMismatchError(f"{text}; serve the model that the bundle was exported from")
        case m.ErrorCode.VERSION:
            return ProtocolError(f"{text}; update the older side")
        case m.ErrorCode.NON_FINITE:
            return NonFiniteError(text)
        case m.ErrorCode.PROTOCOL | m.ErrorCode.DAMAGED:
            return ProtocolError(text)
        case _:
            return RefusedError(text, error.code, retryable=error.retryable, retry_after_s=error.retry_after_s)
