"""The device's end of the wire: typed messages in and out, over websockets that come and go.

A session outlives its connection. When one is lost, stalls, or the server asks to come again, the next ``send`` or
``receive`` connects anew with growing pauses and resumes; callers see nothing of it. Where the server has forgotten
the session, they see ``SessionLostError`` and open another. Every other failure is one clear line.
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
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect

from dlora.protocol import messages as m
from dlora.protocol.codec import Decoder
from dlora.protocol.deadline import Deadline
from dlora.protocol.errors import (
    ConnectionFailedError,
    DamagedFrameError,
    DloraError,
    ModelMismatchError,
    ProtocolError,
    RefusedError,
    RemoteProtocolError,
    SessionLostError,
    StoppedError,
    UsageError,
)
from dlora.protocol.session import Role, Session
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .credentials import Credentials, refusal_in, split_url, tls_failure

MAX_FRAME_BYTES: Final = 1 << 30
CONTROL_BYTES: Final = 2 << 20  # what is no tensor of tokens: a ticket, states, headers, padding
GOODBYE_TIMEOUT_S: Final = 2.0
STOP_CHECK_S: Final = 0.2

# What websockets raises when the peer is gone. Beside its own exception it lets a failed write through, and trips
# over an assertion of its own where the peer hangs up while we send (17.4).
HUNG_UP: Final = (ConnectionClosed, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, AssertionError)

# Its own account of the same, with a traceback, is not for our users.
_silent = logging.getLogger("dlora.edge.websocket")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False

M = TypeVar("M", bound=m.Message)


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

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures in a row (from 1)."""
        longest = min(self.ceiling_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)


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


def _say_nothing(line: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Dialing:
    """How to reach a server, and what to do when it is gone.

    Attributes:
        device: this device's stable name.
        say: told one line when the connection is lost and when it is back.
        should_stop: asked while waiting for a server; true raises ``StoppedError``.
    """

    credentials: Credentials = field(default_factory=Credentials)
    device: str = ""
    retry: Retry = field(default_factory=Retry)
    liveness: Liveness = field(default_factory=Liveness)
    say: Callable[[str], None] = _say_nothing
    should_stop: Callable[[], bool] = _never


class _LostError(Exception):
    """The connection is of no more use; another one may be.

    Attributes:
        final: what to raise where nothing more is tried.
    """

    def __init__(self, final: DloraError, retry_after_s: float | None = None) -> None:
        super().__init__(str(final))
        self.final = final
        self.retry_after_s = retry_after_s


class _SilentError(_LostError):
    """Nothing came in time."""


class Connection:
    """A conversation with one server, past the greeting.

    Attributes:
        session: the protocol's state, and the counters of bytes and round trips over all connections so far.
        reconnects: how often a connection was lost and replaced; resumed: how often the session went on where it
            stood.
    """

    def __init__(self, url: str, dialing: Dialing | None = None) -> None:
        """Connect and greet. Raises ``UsageError``, ``ConnectionFailedError``, ``ProtocolError``, ``RefusedError``."""
        self.url = check_url(url)
        self.session = Session(Role.EDGE)
        self.reconnects = 0
        self.resumed = 0
        self._dialing = dialing or Dialing()  # no credentials, no second try
        self._deadline = Deadline(self._dialing.liveness.exchange_s)
        self._closing = contextlib.ExitStack()
        self._socket: ClientConnection | None = None
        self._opened: m.SessionOpened | None = None
        self._token = b""
        self._frame_bytes = CONTROL_BYTES  # the largest frame that the server can have reason to send
        # Of the present outage, which ends with the next message of the session: a server that lets us in and no more
        # is as good as away.
        self._failures = 0
        self._away_s = 0.0
        try:
            self.session = self._dial()
        except _LostError as lost:
            if not self._dialing.retry.at_start:
                raise lost.final from None
            self.session = self._dial_again(lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def welcome(self) -> m.Welcome:
        """What the server said of itself."""
        assert self.session.welcome is not None
        return self.session.welcome

    # -- the conversation --------------------------------------------------------------------------------

    def open(self, opening: m.OpenSession) -> m.SessionOpened:
        """Open a session; after ``SessionLostError``, another one. Raises what the server's refusal means."""
        while True:
            try:
                self._write(self.session.send(opening))
                opened = self._read(self.session)
                break
            except _LostError as lost:
                if self._opened is None and not self._dialing.retry.at_start:
                    raise lost.final from None
                self._replace_session(self._dial_again(lost))
        if not isinstance(opened, m.SessionOpened):
            raise RemoteProtocolError(f"{type(opened).__name__} where SessionOpened was due")
        self._opened, self._token = opened, opened.token
        return opened

    def send(self, message: m.AnyMessage) -> None:
        """Send; returns when the message is on its way or kept for the next connection."""
        frame = self.session.send(message)
        if isinstance(message, m.Embeddings):
            self._allow_answers(message)
        try:
            self._write(frame)
        except _LostError as lost:
            self._come_back(lost)

    def receive(self, kind: type[M]) -> M:
        """The next message, which must be of ``kind`` (a union is written as a common base)."""
        message = self.receive_any()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{type(message).__name__} where {kind.__name__} was due")
        return message

    def receive_any(self) -> m.AnyMessage:
        """The next message; an ``Error`` of the server's is raised as what it means."""
        while True:
            started = time.monotonic()
            try:
                message = self._read(self.session, self._deadline.seconds)
            except _LostError as lost:
                if isinstance(lost, _SilentError):
                    self._deadline.missed()
                self._come_back(lost)
                continue
            self._deadline.observe(time.monotonic() - started)
            self._failures, self._away_s = 0, 0.0
            return message

    def close(self) -> None:
        """Say goodbye where the rules allow it, and hang up."""
        with contextlib.suppress(DloraError, _LostError):
            self._write(self.session.send(m.CloseSession()))
        with contextlib.suppress(*HUNG_UP):
            self._closing.close()

    # -- coming back -------------------------------------------------------------------------------------

    def _come_back(self, lost: _LostError) -> None:
        """Connect again and resume the session.

        Raises ``SessionLostError`` where it is gone; the connection is then past the greeting, for ``open``.
        """
        if self._opened is None:
            raise lost.final from None
        while True:
            handshake = self._dial_again(lost)
            try:
                resumed = self._resume(handshake)
                break
            except _LostError as again:
                lost = again
        if not resumed:
            self._replace_session(handshake)
            raise SessionLostError("the server no longer has the session")
        self.resumed += 1

    def _resume(self, handshake: Session) -> bool:
        """Whether the server still has the session; what it lacks is then sent again."""
        assert self._opened is not None
        resume = m.ResumeSession(session=self._opened.session, token=self._token, received=self.session.link.received)
        self._write(handshake.send(resume))
        resumed = self._read(handshake, self._dialing.liveness.open_s)
        if not isinstance(resumed, m.SessionResumed):
            return False
        self._token = resumed.token
        for frame in self.session.resume(handshake, resumed.received):
            self._write(frame)
        return True

    def _dial_again(self, lost: _LostError) -> Session:
        """Connect and greet, with pauses, until it works or patience ends."""
        retry, say = self._dialing.retry, self._dialing.say
        if retry.max_s == 0:
            raise lost.final from None
        began = time.monotonic() - self._away_s
        try:
            while True:
                pause_s = self._pause_s(lost)
                away_s = time.monotonic() - began
                if retry.max_s is not None and away_s + pause_s > retry.max_s:
                    text = f"{lost.final}; gave up after {away_s:.0f} s (--max-retry-s)"
                    raise ConnectionFailedError(text) from None
                say(f"{lost.final}; trying again in {pause_s:.1f} s" if pause_s else str(lost.final))
                self._sleep(pause_s)
                self._failures += 1
                try:
                    greeted = self._dial()
                    break
                except _LostError as again:
                    lost = again
        finally:
            self._away_s = time.monotonic() - began
        self.reconnects += 1
        say(f"connected to {self.url} again after {self._away_s:.1f} s")
        return greeted

    def _pause_s(self, lost: _LostError) -> float:
        """How long to wait now: as the server asks, but never so little that we would hammer at it."""
        retry = self._dialing.retry
        own_s = retry.pause_s(self._failures) if self._failures else 0.0
        if lost.retry_after_s is None:
            return own_s
        # Not in step with the others that were sent away, and not so late that the server has given us up.
        spread_s = min(lost.retry_after_s / 4, retry.ceiling_s)
        return max(own_s, lost.retry_after_s + random.uniform(0.0, spread_s))

    def _sleep(self, seconds: float) -> None:
        """Sleep, and raise ``StoppedError`` soon after somebody asked to stop; for 0 s, too: outages may be many."""
        end = time.monotonic() + seconds
        while True:
            if self._dialing.should_stop():
                raise StoppedError("stopped while the server was away; go on with --resume")
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, STOP_CHECK_S))

    def _replace_session(self, handshake: Session) -> None:
        """Go on in a new session, past its greeting; counters go on too."""
        handshake.bytes_sent += self.session.bytes_sent
        handshake.bytes_received += self.session.bytes_received
        handshake.round_trips += self.session.round_trips
        self.session = handshake

    def _allow_answers(self, micro_batch: m.Embeddings) -> None:
        """Take frames as large as the answers to ``micro_batch`` may be, over this connection and those to come."""
        assert self._socket is not None
        groups = self.session.groups
        width = max(
            self.welcome.hidden_size,
            *(group.in_features for group in groups),
            *(sum(target.out_features for target in group.targets) for group in groups),
        )
        needed = CONTROL_BYTES + micro_batch.hidden_states.shape[0] * width * 4
        self._frame_bytes = min(max(self._frame_bytes, needed), MAX_FRAME_BYTES)
        protocol = self._socket.protocol
        # The name before websockets 16.
        name = "max_message_size" if hasattr(protocol, "max_message_size") else "max_size"
        assert hasattr(protocol, name), "websockets keeps its frame limit elsewhere"
        setattr(protocol, name, self._frame_bytes)

    # -- one websocket -----------------------------------------------------------------------------------

    def _dial(self) -> Session:
        """Connect and greet once. Raises ``_LostError`` for what may pass."""
        self._hang_up()
        session = Session(Role.EDGE)
        self._closing = contextlib.ExitStack()
        self._socket = _connect(self.url, self._dialing, self._closing, self._frame_bytes)
        hello = m.Hello(
            protocol_versions=list(PROTOCOL_VERSIONS),
            software=f"dlora-edge {SOFTWARE_VERSION}",
            device=self._dialing.device,
        )
        self._write(session.send(hello))
        welcome = self._read(session, self._dialing.liveness.open_s)
        if not isinstance(welcome, m.Welcome):
            raise RemoteProtocolError(f"{type(welcome).__name__} where Welcome was due")
        known = self.session.welcome
        if known is not None and _model_of(welcome) != _model_of(known):
            raise ModelMismatchError(
                f"the server {self.url} came back with another base model ({welcome.base_model}); "
                "serve the model that the bundle was exported from, and go on with --resume"
            )
        return session

    def _hang_up(self) -> None:
        """Leave the connection without waiting for the peer's part of the goodbye: it may be gone."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(*HUNG_UP):
            self._closing.close()

    def _write(self, frame: bytearray) -> None:
        assert self._socket is not None
        try:
            self._socket.send(frame)
        except HUNG_UP:
            self._raise_last_words()

    def _read(self, session: Session, timeout_s: float | None = None) -> m.AnyMessage:
        """The next message that did not come before. Raises ``_LostError`` or what an ``Error`` means."""
        assert self._socket is not None
        timeout_s = self._dialing.liveness.open_s if timeout_s is None else timeout_s
        while True:
            try:
                message = session.receive(self._socket.recv(timeout=timeout_s, decode=False))
            except HUNG_UP:
                raise self._lost() from None
            except TimeoutError:
                text = f"the server {self.url} was silent for {timeout_s:.0f} s {self._where()}"
                raise _SilentError(ConnectionFailedError(text)) from None
            except DamagedFrameError as error:
                raise _LostError(error) from None
            if isinstance(message, m.Error):
                self._raise_refusal(message)
            if message is not None:
                return message

    def _raise_last_words(self) -> NoReturn:
        """Why a peer went away may stand in what it said last."""
        assert self._socket is not None
        last: m.AnyMessage | None = None
        with contextlib.suppress(*HUNG_UP, TimeoutError, ProtocolError):
            while not isinstance(last, m.Error):
                last = Decoder().decode(self._socket.recv(timeout=GOODBYE_TIMEOUT_S, decode=False))
        if isinstance(last, m.Error):
            self._raise_refusal(last)
        raise self._lost() from None

    def _raise_refusal(self, error: m.Error) -> NoReturn:
        refusal = refusal_of(error, self.url)
        if error.retryable:
            raise _LostError(refusal, error.retry_after_s) from None
        raise refusal from None

    def _lost(self) -> _LostError:
        if self.session.welcome is None:
            text = f"{self.url} hung up before it greeted; is it a dlora server?"
        else:
            text = f"lost the server {self.url} {self._where()}"
        return _LostError(ConnectionFailedError(text))

    def _where(self) -> str:
        return f"at step {self.session.step}" if self._opened is not None else "before a session was open"


def check_url(url: str) -> str:
    """``url`` if it is a websocket address without a secret in it; raises ``UsageError``."""
    parts = split_url(url)
    try:
        usable = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, or too large a one; a name with a part that is empty or too long
        usable = False
    if not usable:
        raise UsageError(f"--server {url!r} is no websocket address; write ws://HOST:PORT or wss://HOST:PORT")
    return url


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


def _model_of(welcome: m.Welcome) -> tuple[str, int, int]:
    return welcome.base_fingerprint, welcome.embedding_size, welcome.hidden_size


def _connect(url: str, dialing: Dialing, closing: contextlib.ExitStack, frame_bytes: int) -> ClientConnection:
    liveness, credentials = dialing.liveness, dialing.credentials
    try:
        websocket = closing.enter_context(
            connect(
                url,
                additional_headers=credentials.headers(url),
                ssl=credentials.ssl_context(url),
                compression=None,
                max_size=frame_bytes,
                open_timeout=liveness.open_s,
                ping_interval=liveness.ping_every_s,
                ping_timeout=liveness.ping_timeout_s,
                close_timeout=GOODBYE_TIMEOUT_S,
                proxy=None,
                logger=_silent,
                create_connection=_NoRedirects,
            )
        )
    except InvalidURI:
        raise UsageError(f"--server {url!r} is no websocket address; write ws://HOST:PORT") from None
    except _OtherAnswerError as error:
        raise _refused_at_door(error.response, url) from None
    except (InvalidHandshake, EOFError, *HUNG_UP) as error:
        reason = str(error) or "it hung up"
        text = f"{url} answers, but is no dlora server ({reason})"
        raise _LostError(ConnectionFailedError(text)) from None
    except TimeoutError:
        text = f"{url} did not answer in {liveness.open_s:g} s; is it a dlora server?"
        raise _LostError(ConnectionFailedError(text)) from None
    except ssl.SSLError as error:
        raise _LostError(tls_failure(error, url)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        text = f"cannot reach {url}: {reason}; start the server with: dlora-cloud serve MODEL"
        raise _LostError(ConnectionFailedError(text)) from None
    if sys.platform == "linux":
        # Writing has no deadline of its own: a server that stands still would hold up a large frame, and the pings that
        # wait behind it, for ever.
        timeout_ms = round(liveness.ping_timeout_s * 1000)
        with contextlib.suppress(OSError):  # it hung up already, which whoever reads will find
            websocket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return websocket


def _refused_at_door(response: Response, url: str) -> Exception:
    """What to raise for an HTTP answer other than 101: a server that lets nobody in says why as the wire does."""
    found = refusal_in(response.body)
    if found is None:
        text = f"{url} answers, but is no dlora server (HTTP {response.status_code})"
        return _LostError(ConnectionFailedError(text))
    refusal = refusal_of(found, url)
    return _LostError(refusal, found.retry_after_s) if found.retryable else refusal


def refusal_of(error: m.Error, url: str) -> DloraError:
    """What an ``Error`` of the server's means to the user."""
    text = f"the server {url} refused: {error.message}"
    match error.code:
        case m.ErrorCode.BASE_MODEL_MISMATCH | m.ErrorCode.UNKNOWN_TARGET:
            return ModelMismatchError(f"{text}; serve the model that the bundle was exported from")
        case m.ErrorCode.VERSION:
            return ProtocolError(f"{text}; update the older side")
        case m.ErrorCode.PROTOCOL | m.ErrorCode.NON_FINITE | m.ErrorCode.DAMAGED:
            return ProtocolError(text)
        case _:
            return RefusedError(text, error.code, retryable=error.retryable, retry_after_s=error.retry_after_s)
