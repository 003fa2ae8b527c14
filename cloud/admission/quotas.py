"""How much of the server each caller may use: sessions, tokens, memory and compute.

A refused micro-batch is charged nothing, and its refusal says when the same one will fit. Sessions, tokens and compute
are counted in a ``Ledger``, which several servers may share; memory is this one's. Compute is known only afterwards. It
may run over by the micro-batches under way, and is then waited for.

A caller's own sessions compete: who comes first takes what is free. So do all callers for the memory of the machine: a
micro-batch waits until there is room for it, in the order in which they came, as it waits for its turn to compute.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from dlora.protocol.errors import RefusedError
from dlora.protocol.messages import ErrorCode

from .ledger import Ledger, MemoryLedger, QuotaLimits, UsedUp

# Of what depends on another session of the caller, nobody knows when it ends.
_RETRY_AFTER_S: Final = 5.0
# More than the rounding of clocks and buckets, so that who comes back at the time that we named is not refused again.
_ROUNDING_S: Final = 0.001
# Reports and the like: what a session always has room for while nobody reads.
_SMALL_BYTES: Final = 64 << 10


@dataclass
class _Caller:
    """What a caller has open with this server."""

    sessions: int = 0
    live_bytes: int = 0


class Quotas:
    """The quotas of all callers of a server. Threads and the event loop may use it at the same time.

    Args:
        total_live_bytes: memory of the micro-batches of all callers together; None is no limit.
        ledger: by default one of its own. One that is shared is waited for where a session is opened or a micro-batch
            charged: not on the event loop.
        clock: seconds that never go back.

    Attributes:
        live_bytes: memory of all callers' micro-batches and unread frames at the moment.
        computed_s: seconds that were computed for all; memory_waited_s: that micro-batches waited for memory.
    """

    def __init__(
        self,
        limits: QuotaLimits,
        ledger: Ledger | None = None,
        *,
        total_live_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.ledger = ledger or MemoryLedger()
        self.total_live_bytes = total_live_bytes
        self.live_bytes = 0
        self.computed_s = self.memory_waited_s = 0.0
        self._running_bytes = 0  # of the micro-batches alone
        self._clock = clock
        self._callers: dict[str, _Caller] = {}
        self._sessions: dict[str, str] = {}  # that the ledger counts, each with its caller
        self._freed = threading.Condition(threading.Lock())  # held while any of these numbers is changed
        self._line: deque[object] = deque()  # the micro-batches that wait for memory
        self._stopped = False

    @property
    def has_meters(self) -> bool:
        """Whether anything is metered: where nothing is, no ledger is asked when a micro-batch runs."""
        return self.limits.tokens_per_minute is not None or self.limits.compute_s_per_hour is not None

    @property
    def has_waiting(self) -> bool:
        """Whether a micro-batch waits for memory."""
        return bool(self._line)

    def stop(self) -> None:
        """Let nobody wait for memory any more: the server stops."""
        with self._freed:
            self._stopped = True
            self._freed.notify_all()

    def open_session(self, name: str) -> SessionQuota:
        """Count a session of the caller ``name`` until it is closed.

        Raises ``RefusedError`` (``quota_sessions``, retryable) where it has as many open as it may.
        """
        most, session = self.limits.sessions, secrets.token_hex(8)
        if most is not None:
            if not self.ledger.open_session(name, session, most):
                text = f"the quota is {most} open at a time; close another session, or come again later"
                raise _refused_for_now(text, ErrorCode.QUOTA_SESSIONS)
            self._sessions[session] = name
        with self._freed:
            self._caller(name).sessions += 1
        return SessionQuota(self, name, session)

    def keep_sessions(self) -> None:
        """Let the ledger know, every few seconds, that the sessions are still there."""
        self.ledger.keep_sessions(dict(self._sessions))

    def _fits(self, live_bytes: int) -> bool:
        return self.total_live_bytes is None or self.live_bytes + live_bytes <= self.total_live_bytes

    def _caller(self, name: str) -> _Caller:
        return self._callers.setdefault(name, _Caller())


class SessionQuota:
    """What one session uses of its caller's quota; ``Quotas.open_session`` makes it. As a context it closes itself.

    Attributes:
        name: the caller's.
        live_bytes: of its micro-batches under way.
        held_bytes: of what the server keeps for it until it ends.
        queued_bytes: of its frames that nobody has read yet; queued_frames: how many.
        kept_bytes: of frames that its device has not acknowledged, when they were last counted, but for some.
        sent_ahead: how many frames its device may send before any is read.
    """

    def __init__(self, quotas: Quotas, name: str, session: str) -> None:
        self.name = name
        self._session = session
        self.live_bytes = 0
        self.held_bytes = 0
        self.queued_bytes = 0
        self.queued_frames = 0
        self.kept_bytes = 0
        self.sent_ahead = 1
        self.is_open = True
        self._advice = ""  # what makes smaller what is held
        self._quotas = quotas
        self._freed = quotas._freed

    def charge(self, tokens: int, live_bytes: int) -> Charge:
        """Charge a micro-batch, or a report of no tokens, before it runs; the charge must be ended.

        Waits until the server has the memory. Raises ``RefusedError`` (``quota_tokens``, ``quota_live_bytes``,
        ``quota_compute``, ``limit``) and charges nothing: retryable, with the time when the same will fit, or not
        retryable where it never will.
        """
        quotas, limits, total = self._quotas, self._quotas.limits, self._quotas.total_live_bytes
        if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
            text = f"{tokens} tokens are more than the quota of a minute, {limits.tokens_per_minute}"
            raise _refused_for_good(text, ErrorCode.QUOTA_TOKENS)
        if limits.live_bytes is not None and live_bytes and live_bytes + self.held_bytes > limits.live_bytes:
            kept = f", beside {_mb(self.held_bytes)} that it keeps for the session" if self.held_bytes else ""
            text = f"a micro-batch takes {_mb(live_bytes)} of the server{kept}; the quota is {_mb(limits.live_bytes)}"
            if self.held_bytes > live_bytes:
                advice = f"{self._advice}, or have the server started with a higher --quota-live-mb"
                raise _refused_for_good(text, ErrorCode.QUOTA_LIVE_BYTES, advice)
            raise _refused_for_good(text, ErrorCode.QUOTA_LIVE_BYTES)
        if total is not None and live_bytes > total:
            text = f"a micro-batch takes {_mb(live_bytes)} of the server, which has {_mb(total)} for all of them"
            raise _refused_for_good(text, ErrorCode.LIMIT)
        used_up = quotas.ledger.charge(self.name, tokens, limits) if quotas.has_meters else None
        try:
            with self._freed:
                self._check(live_bytes, used_up)
                if live_bytes:
                    self._wait_for_memory(live_bytes)
                    self._check(live_bytes)  # again: the caller's other sessions did not wait
                self._take(live_bytes)
                self.live_bytes += live_bytes
                quotas._running_bytes += live_bytes
        except RefusedError:
            if used_up is None and quotas.has_meters:
                quotas.ledger.correct(self.name, limits, tokens=-tokens)
            raise
        return Charge(self, live_bytes)

    def hold(
        self,
        nbytes: int,
        what: str = "the part of the adapters that it keeps",
        advice: str = "lower --rank, or train fewer --blocks",
    ) -> None:
        """Count memory that the server keeps for the session until it is closed: for ``what``, which ``advice`` makes
        smaller.

        Raises ``RefusedError``, and counts nothing: ``quota_live_bytes`` or ``limit`` where it is more than the caller
        may have, or the server has; retryable, ``quota_live_bytes`` or ``busy``, where others take the room now.
        """
        with self._freed:
            if not self.is_open:  # nobody would free it
                raise _refused_for_now("the session ended meanwhile", ErrorCode.BUSY)
            most, total, alone = self._quotas.limits.live_bytes, self._quotas.total_live_bytes, self.held_bytes + nbytes
            if most is not None and alone > most:
                text = f"{what} takes {_mb(alone)} and more of the server, and the quota is {_mb(most)}"
                raise RefusedError(f"{text}; {advice}", ErrorCode.QUOTA_LIVE_BYTES)
            if total is not None and alone > total:
                text = f"{what} takes {_mb(alone)} and more of the server, which has {_mb(total)} for all devices"
                raise RefusedError(f"{text}; {advice}", ErrorCode.LIMIT)
            if not self._has_room(nbytes):
                raise _refused_for_now(_USED_UP[ErrorCode.QUOTA_LIVE_BYTES], ErrorCode.QUOTA_LIVE_BYTES)
            if not self._quotas._fits(nbytes):
                raise _refused_for_now(f"there is no memory for {what}", ErrorCode.BUSY)
            self.held_bytes += nbytes
            self._advice = advice
            self._take(nbytes)

    def release(self, nbytes: int) -> None:
        """Count no more what was held, before the session is closed."""
        with self._freed:
            if self.is_open:
                self.held_bytes -= nbytes
                self._free(nbytes)

    def add(self, nbytes: int) -> bool:
        """Count a frame that came and that nobody has read yet; False where there is no room for it.

        As many as a device may send before any is read always find room.
        """
        with self._freed:
            has_more = self.queued_bytes > _SMALL_BYTES and self.queued_frames >= self.sent_ahead
            if has_more and not (self._has_room(nbytes) and self._quotas._fits(nbytes)):
                return False
            self.queued_bytes += nbytes
            self.queued_frames += 1
            self._take(nbytes)
            return True

    def remove(self, nbytes: int) -> None:
        """It was read, or dropped."""
        with self._freed:
            self.queued_bytes -= nbytes
            self.queued_frames -= 1
            self._free(nbytes)

    def count_kept(self, nbytes: int) -> None:
        """So many bytes are kept now of frames that the device has not acknowledged. The last answer always is such."""
        nbytes = max(0, nbytes - _SMALL_BYTES)
        with self._freed:
            if self.is_open:
                self._free(self.kept_bytes - nbytes)
                self.kept_bytes = nbytes

    def close(self) -> None:
        """The session is gone; a micro-batch that is still under way counts until it ends. Again does nothing."""
        with self._freed:
            if not self.is_open:
                return
            self.is_open = False
            self._quotas._caller(self.name).sessions -= 1
            self._free(self.held_bytes + self.kept_bytes)
            self.held_bytes = self.kept_bytes = 0
        if self._quotas._sessions.pop(self._session, None):
            self._quotas.ledger.close_session(self.name, self._session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- with the lock -----------------------------------------------------------------------------------

    def _check(self, live_bytes: int, used_up: UsedUp | None = None) -> None:
        """Raise ``RefusedError`` where its caller is over a quota now: of memory, or as the ledger found."""
        has_room = not live_bytes or self._has_room(live_bytes)
        memory = UsedUp(ErrorCode.QUOTA_LIVE_BYTES, 0.0 if has_room else _RETRY_AFTER_S)
        longest = max(memory, used_up or memory, key=lambda each: each.wait_s)
        if longest.wait_s > 0.0:
            raise _refused_for_now(_USED_UP[longest.code], longest.code, longest.wait_s + _ROUNDING_S)

    def _wait_for_memory(self, live_bytes: int) -> None:
        """Wait, in line, until so much is free. Who waits here runs nothing, so that all that runs comes to its end.

        Raises ``RefusedError`` (``busy``, retryable) where the session, or the server, ends meanwhile.
        """
        quotas, place = self._quotas, object()
        began = quotas._clock()

        def may_begin() -> bool:
            # Frames that wait do not stop the line: who stands in it reads none.
            return quotas._line[0] is place and (quotas._fits(live_bytes) or not quotas._running_bytes)

        quotas._line.append(place)
        try:
            self._freed.wait_for(lambda: may_begin() or quotas._stopped or not self.is_open)
        finally:
            quotas._line.remove(place)
            quotas.memory_waited_s += quotas._clock() - began
            self._freed.notify_all()
        if quotas._stopped or not self.is_open:
            raise _refused_for_now("the session ended while it waited for memory", ErrorCode.BUSY)

    def _has_room(self, nbytes: int) -> bool:
        most = self._quotas.limits.live_bytes
        caller = self._quotas._callers.get(self.name, _Caller())
        return most is None or caller.live_bytes + nbytes <= most

    def _take(self, nbytes: int) -> None:
        caller = self._quotas._caller(self.name)
        caller.live_bytes += nbytes
        self._quotas.live_bytes += nbytes
        if not (caller.sessions or caller.live_bytes):
            del self._quotas._callers[self.name]

    def _free(self, nbytes: int) -> None:
        self._take(-nbytes)
        self._freed.notify_all()


@dataclass(frozen=True)
class Charge:
    """What a micro-batch was charged before it ran."""

    session: SessionQuota
    live_bytes: int

    def end(self, compute_s: float) -> None:
        """It has ended, however it did: its memory is free, and it computed for ``compute_s`` seconds."""
        session, quotas = self.session, self.session._quotas
        if quotas.has_meters:
            quotas.ledger.correct(session.name, quotas.limits, compute_s=compute_s)
        with session._freed:
            quotas.computed_s += max(0.0, compute_s)
            quotas._running_bytes -= self.live_bytes
            session.live_bytes -= self.live_bytes
            session._free(self.live_bytes)


_USED_UP: Final = {
    ErrorCode.QUOTA_TOKENS: "the quota of tokens a minute is used up",
    ErrorCode.QUOTA_COMPUTE: "the quota of compute seconds an hour is used up",
    ErrorCode.QUOTA_LIVE_BYTES: "the quota of live bytes is taken by other sessions, or by frames that wait",
}


def _refused_for_now(text: str, code: ErrorCode, retry_after_s: float | None = None) -> RefusedError:
    return RefusedError(text, code, retryable=True, retry_after_s=retry_after_s or _RETRY_AFTER_S)


def _refused_for_good(
    text: str, code: ErrorCode, advice: str = "lower --batch-size, or ask for a shorter text"
) -> RefusedError:
    return RefusedError(f"{text}; {advice}", code)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
