"""The device's end of the wire: typed messages in and out, over websockets that come and go.

A session outlives its connection. When one is lost, stalls, or the server asks to come again, the next ``send`` or
``receive`` connects anew with growing pauses and resumes; callers see nothing of it. Where the server has forgotten
the session, they see ``SessionLostError`` and open another. Every other failure is one clear line.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from typing import Final, Self, TypeVar

from websockets.sync.client import ClientConnection

from dlora.protocol import messages as m
from dlora.protocol.adapters import largest_row, largest_state_bytes
from dlora.protocol.deadline import Deadline
from dlora.protocol.errors import (
    ConnectionFailedError,
    DamagedFrameError,
    DloraError,
    ModelMismatchError,
    ProtocolError,
    RemoteProtocolError,
    SessionLostError,
    StoppedError,
)
from dlora.protocol.frames import Decoder
from dlora.protocol.session import Session
from dlora.protocol.states import Side, State
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .connecting import (
    CLOSE_TIMEOUT_S,
    PEER_GONE,
    STOP_CHECK_S,
    AnswerTimeoutError,
    ConnectionLostError,
    ConnectSettings,
    least_ping_s,
    open_websocket,
    refusal_of,
    websocket_url,
)
from .cookies import Cookies
from .usage import WireCounters, WireUsage
from .write_watch import WriteWatch

MAX_FRAME_BYTES: Final = 1 << 30
CONTROL_BYTES: Final = 2 << 20  # what is no tensor of tokens: a ticket, states, headers, padding

M = TypeVar("M", bound=m.Message)


class Connection:
    """A conversation with one server, past the greeting.

    Attributes:
        session: the protocol's state, and the counters of bytes and round trips over all connections so far.
        recorder: keeps what crosses, and what must not; None where nobody asks for that.
        usage: what the conversation took so far; spans: when what happened, where somebody wants to know.
        reconnects: how often a connection was lost and replaced; resumed: how often the session went on where it
            stood.
    """

    def __init__(self, url: str, connecting: ConnectSettings | None = None) -> None:
        """Connect and greet. Raises ``UsageError``, ``ConnectionFailedError``, ``ProtocolError``, ``RefusedError``."""
        self.url = websocket_url(url)
        self.session = Session(Side.EDGE)
        self.usage = WireUsage()
        self.reconnects = 0
        self.resumed = 0
        self._settings = connecting or ConnectSettings()  # no credentials, no second try
        self.recorder = self._settings.recorder
        self.spans = self._settings.spans
        self._deadline = Deadline(self._settings.liveness.exchange_s)
        self._closing = contextlib.ExitStack()
        self._watch = WriteWatch(self._settings.should_stop, STOP_CHECK_S, grace_s=self._settings.liveness.open_s)
        self._socket: ClientConnection | None = None
        self._cookies = Cookies()
        self._opened: m.SessionOpened | None = None
        self._resume_token = b""
        self._frame_bytes = CONTROL_BYTES  # the largest frame that the server can have reason to send
        # The present outage: it begins with the silence before it is noticed, and ends with the next message of the
        # session. A server that lets us in and no more is as good as away.
        self._away_s = 0.0
        self._failures = 0  # how often we connected again of late, which the pauses grow with
        self._connected_at = 0.0
        try:
            self.session = self._connect()
        except ConnectionLostError as lost:
            if not (self._settings.retry.at_start or lost.is_between_servers):
                raise lost.final from None
            self.session = self._connect_again(lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def welcome(self) -> m.Welcome:
        """What the server said of itself."""
        assert self.session.welcome is not None
        return self.session.welcome

    @property
    def counters(self) -> WireCounters:
        """Bytes up, bytes down and round trips so far; a lost session takes none of it with it."""
        return self.session.counters

    def ping_s(self) -> float:
        """Seconds that the server takes to answer a ping of the websocket: the least of several; 0: it does not."""
        return least_ping_s(self._socket, self._settings.liveness.open_s) if self._socket is not None else 0.0

    def open(self, opening: m.OpenSession) -> m.SessionOpened:
        """Open a session; after ``SessionLostError``, another one. Raises what the server's refusal means."""
        with self._waiting():
            while True:
                try:
                    self._write(self.session.send(opening))
                    opened = self._read(self.session)
                    break
                except ConnectionLostError as lost:
                    if self._opened is None and not self._settings.retry.at_start:
                        raise lost.final from None
                    self._replace_session(self._connect_again(lost))
        if not isinstance(opened, m.SessionOpened):
            raise RemoteProtocolError(f"{type(opened).__name__} where SessionOpened was due")
        self._opened, self._resume_token = opened, opened.token
        self._allow_frames(largest_state_bytes(opening.adapter, opening.groups))
        return opened

    def send(self, message: m.AnyMessage) -> None:
        """Send; returns when the message is on its way or kept for the next connection."""
        frame = self.session.send(message)
        self.usage.add_sent(message, len(frame))
        if isinstance(message, m.Embeddings):
            opening = self.session.opened_with
            assert opening is not None
            widest = largest_row(opening.adapter, opening.groups, self.welcome.hidden_size, opening.encoded_width)
            self._allow_frames((message.tokens + message.guesses) * widest * 4)  # its answers may be as large
        started = time.perf_counter()
        try:
            self._write(frame)
        except ConnectionLostError as lost:
            with self._waiting():
                self._reconnect_and_resume(lost)
        self.spans.add_sent(message, started, time.perf_counter(), len(frame))

    def receive(self, kind: type[M]) -> M:
        """The next message, which must be of ``kind`` (a union is written as a common base)."""
        message = self.receive_any()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{type(message).__name__} where {kind.__name__} was due")
        return message

    def receive_any(self) -> m.AnyMessage:
        """The next message; an ``Error`` of the server's is raised as what it means."""
        started = time.perf_counter()
        with self._waiting():
            message = self._receive_any()
        self.spans.add_received(message, started, time.perf_counter())
        if not self.session.under_way:
            self.usage.forget_micro_batches()
        return message

    def _receive_any(self) -> m.AnyMessage:
        longest_s = self._settings.retry.max_s or math.inf  # no longer than an outage may
        while True:
            started = self._settings.clock()
            try:
                message = self._read(self.session, min(self._deadline.seconds, longest_s))
            except ConnectionLostError as lost:
                if isinstance(lost, AnswerTimeoutError):
                    self._deadline.missed()
                    self._away_s += self._settings.clock() - started
                self._reconnect_and_resume(lost)
                continue
            self._deadline.observe(self._settings.clock() - started)
            self._away_s = 0.0
            if self.session.state is State.IDLE:
                # A micro-batch is through, or a report is answered. Not at every message: a server that gives one and
                # hangs up would be connected to as fast as it can hang up.
                self._failures = min(self._failures, 1)
            return message

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Within, the device waits for the server."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.usage.waited_s += time.perf_counter() - started

    def close(self) -> None:
        """Send ``CloseSession`` where the rules allow it, and close the websocket."""
        if self.session.may_close:
            close_frame = self.session.send(m.CloseSession())
            with contextlib.suppress(DloraError, ConnectionLostError):
                self._write(close_frame)
        self._watch.close()
        self._close_websocket()

    # -- coming back -------------------------------------------------------------------------------------

    def _reconnect_and_resume(self, lost: ConnectionLostError) -> None:
        """Connect again and resume the session.

        Raises ``SessionLostError`` where it is gone; the connection is then past the greeting, for ``open``.
        """
        if self._opened is None:
            raise lost.final from None
        if self._settings.clock() - self._connected_at >= self._settings.retry.ceiling_s:
            self._failures = 0
        while True:
            handshake = self._connect_again(lost)
            try:
                is_resumed = self._resume(handshake, self._opened.session)
                break
            except ConnectionLostError as again:
                lost = again
        if not is_resumed:
            self._replace_session(handshake)
            raise SessionLostError("the server no longer has the session")
        self.resumed += 1

    def _resume(self, handshake: Session, session: str) -> bool:
        """Whether the server still has the session; what it lacks is then sent again."""
        received = self.session.link.received
        self._write(handshake.send(m.ResumeSession(session=session, token=self._resume_token, received=received)))
        resumed = self._read(handshake)
        if not isinstance(resumed, m.SessionResumed):
            return False
        self._resume_token = resumed.token
        for frame in self.session.resume(handshake, resumed.received):
            self._write(frame)
        return True

    def _connect_again(self, lost: ConnectionLostError) -> Session:
        """Connect and greet, with pauses, until it works or its time is up."""
        retry, say = self._settings.retry, self._settings.say
        self._raise_if_stopped()
        if retry.max_s == 0:
            raise lost.final from None
        began = self._settings.clock() - self._away_s
        try:
            while True:
                away_s = self._settings.clock() - began
                left_s = math.inf if retry.max_s is None else retry.max_s - away_s
                if left_s <= 0:
                    text = f"{lost.final}; gave up after {away_s:.0f} s (--max-retry-s)"
                    raise ConnectionFailedError(text) from None
                if lost.retry_after_s is not None and lost.retry_after_s > left_s:
                    text = f"{lost.final}; it is to be asked again in {lost.retry_after_s:.0f} s, and --max-retry-s"
                    raise ConnectionFailedError(f"{text} leaves {left_s:.0f} s: raise it") from None
                pause_s = min(retry.pause_s(self._failures, lost.retry_after_s), left_s)  # all of the time is used
                say(f"{lost.final}; trying again in {pause_s:.1f} s" if pause_s else str(lost.final))
                self._sleep(pause_s)
                self._failures += 1
                try:
                    greeted = self._connect()
                    break
                except ConnectionLostError as again:
                    lost = again
        finally:
            self._away_s = self._settings.clock() - began
        self.reconnects += 1
        say(f"connected to {self.url} again after {self._away_s:.1f} s")
        return greeted

    def _sleep(self, seconds: float) -> None:
        """Sleep, and raise ``StoppedError`` soon after somebody asked to stop; for 0 s, too: outages may be many."""
        end = self._settings.clock() + seconds
        while True:
            self._raise_if_stopped()
            left = end - self._settings.clock()
            if left <= 0:
                return
            self._settings.sleep(min(left, STOP_CHECK_S))

    def _raise_if_stopped(self) -> None:
        if self._settings.should_stop():
            raise StoppedError("stopped while the server was away; go on with dlora-edge resume")

    def _replace_session(self, handshake: Session) -> None:
        """Go on in a new session, past its greeting; counters go on too."""
        handshake.go_on_counting(self.session)
        self.session = handshake

    def _allow_frames(self, nbytes: int) -> None:
        """Take frames with so many bytes of tensors, over this connection and those to come."""
        assert self._socket is not None
        self._frame_bytes = min(max(self._frame_bytes, CONTROL_BYTES + nbytes), MAX_FRAME_BYTES)
        self._socket.protocol.max_message_size = self._frame_bytes  # inside websockets: what it got as ``max_size``

    # -- one websocket -----------------------------------------------------------------------------------

    def _connect(self) -> Session:
        """Connect and greet once. Raises ``ConnectionLostError`` for what may pass."""
        self._disconnect()
        session = Session(Side.EDGE)
        self._closing = contextlib.ExitStack()
        self._socket = open_websocket(self.url, self._settings, self._closing, self._frame_bytes, self._cookies)
        self._connected_at = self._settings.clock()
        versions, software = list(PROTOCOL_VERSIONS), f"dlora-edge {SOFTWARE_VERSION}"
        hello = m.Hello(protocol_versions=versions, software=software, device=self._settings.device_id)
        self._write(session.send(hello))
        welcome = self._read(session)
        if not isinstance(welcome, m.Welcome):
            raise RemoteProtocolError(f"{type(welcome).__name__} where Welcome was due")
        known = self.session.welcome or welcome
        sizes = (welcome.embedding_size, welcome.hidden_size)
        if welcome.base_fingerprint != known.base_fingerprint or sizes != (known.embedding_size, known.hidden_size):
            raise ModelMismatchError(
                f"the server {self.url} came back with another base model ({welcome.base_model}); serve the model that "
                f"the bundle is of, with --weights {known.base_weight_format}, and go on with dlora-edge resume"
            )
        return session

    def _disconnect(self) -> None:
        """Leave the connection without waiting for the peer to close its side: it may be gone."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.socket.shutdown(socket.SHUT_RDWR)
        self._close_websocket()

    def _close_websocket(self) -> None:
        with contextlib.suppress(*PEER_GONE):
            self._closing.close()

    def _write(self, frame: bytearray) -> None:
        assert self._socket is not None
        try:
            with self._watch.writing(self._socket.socket, len(frame)):
                self._socket.send(frame)
        except PEER_GONE:
            raise self._last_error() from None
        if self.recorder is not None:
            self.recorder.add_frame(frame, up=True)

    def _read(self, session: Session, timeout_s: float | None = None) -> m.AnyMessage:
        """The next message that did not come before. Raises ``ConnectionLostError`` or what an ``Error`` means.

        A frame that came before is no answer: it does not begin the time anew.
        """
        assert self._socket is not None
        liveness = self._settings.liveness
        timeout_s = liveness.open_s if timeout_s is None else timeout_s
        until, stopping = self._settings.clock() + timeout_s, False
        while True:
            if not stopping and self._settings.should_stop():
                # A step that the server works on is mostly over soon. One that is given up is run again with --resume.
                until, stopping = min(until, self._settings.clock() + liveness.open_s), True
            left_s = until - self._settings.clock()
            if left_s <= 0:
                text = f"the server {self.url} said nothing new for {timeout_s:.0f} s {self._where_in_run()}"
                raise AnswerTimeoutError(ConnectionFailedError(text))
            try:
                frame = self._socket.recv(timeout=min(left_s, STOP_CHECK_S), decode=False)
                if self.recorder is not None:
                    self.recorder.add_frame(frame, up=False)
                message = session.receive(bytes(frame))
            except TimeoutError:
                continue
            except PEER_GONE:
                raise self._lost_error() from None
            except DamagedFrameError as error:
                raise ConnectionLostError(error) from None
            if isinstance(message, m.Error):
                raise refusal_of(message, self.url) from None
            if message is not None:
                self.usage.add_received(message, len(frame))
                return message

    def _last_error(self) -> Exception:
        """Why a peer went away may stand in what it said last."""
        assert self._socket is not None
        until = self._settings.clock() + CLOSE_TIMEOUT_S
        with contextlib.suppress(*PEER_GONE, TimeoutError, ProtocolError):
            while True:
                left_s = max(0.0, until - self._settings.clock())
                last = Decoder().decode(self._socket.recv(timeout=left_s, decode=False))
                if isinstance(last, m.Error):
                    return refusal_of(last, self.url)
        return self._lost_error()

    def _lost_error(self) -> ConnectionLostError:
        no_server = f"{self.url} hung up before it greeted; is it a dlora server?"
        text = no_server if self.session.welcome is None else f"lost the server {self.url} {self._where_in_run()}"
        return ConnectionLostError(ConnectionFailedError(text))

    def _where_in_run(self) -> str:
        return f"at step {self.session.step}" if self._opened is not None else "before a session was open"
