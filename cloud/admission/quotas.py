"""How much of the server each caller may use: sessions, tokens, memory and compute.

A refused micro-batch is charged nothing, and its refusal says when the same one will fit. Tokens and compute are
metered by leaky buckets: what was used drains evenly, so a caller that used nothing for a while may do all at once.
Compute is known only afterwards. It may run over by the micro-batches under way, and is then waited for.

A caller's own sessions compete: who comes first takes what is free. So do all callers for the memory of the machine: a
micro-batch waits until there is room for it, in the order in which they came, as it waits for its turn to compute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final, Self

from dlora.protocol.errors import RefusedError, UsageError
from dlora.protocol.messages import ErrorCode

# Of what depends on another session of the caller, nobody knows when it ends.
_RETRY_AFTER_S: Final = 5.0
# More than the rounding of clocks and buckets, so that who comes back at the time that we named is not refused again.
_ROUNDING_S: Final = 0.001
_SWEEP_AT: Final = 64
# Reports and the like: what a session always has room for while nobody reads.
_SMALL_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class QuotaLimits:
    """What one caller may use; None is no limit. Raises ``UsageError`` where a limit is not above 0.

    Attributes:
        sessions: sessions open at a time, parked ones among them.
        tokens_per_minute: tokens of micro-batches, training or evaluating; at once, and then a minute.
        live_bytes: memory of its micro-batches under way and of its frames that nobody has read, over all its sessions.
        compute_s_per_hour: seconds that its sessions computed; at once, and then an hour.
    """

    sessions: int | None = None
    tokens_per_minute: int | None = None
    live_bytes: int | None = None
    compute_s_per_hour: float | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not value > 0:
                text = f"the quota {limit.name} must be above 0, not {value}; leave it out for no limit"
                raise UsageError(text)


class _Bucket:
    """A leaky bucket as a meter: ``capacity`` drains in ``window_s``; None holds everything."""

    def __init__(self, capacity: float | None, window_s: float, now: float) -> None:
        self._capacity = capacity
        self._window_s = window_s
        self._used = 0.0
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` fits; 0 where it does."""
        if self._capacity is None:
            return 0.0
        return max(0.0, self._used_at(now) + amount - self._capacity) * self._window_s / self._capacity

    def add(self, amount: float, now: float) -> None:
        if self._capacity is not None:
            self._used, self._at = self._used_at(now) + amount, now

    def is_empty(self, now: float) -> bool:
        return self._used_at(now) == 0.0

    def _used_at(self, now: float) -> float:
        if self._capacity is None:
            return 0.0
        return max(0.0, self._used - (now - self._at) * self._capacity / self._window_s)


@dataclass
class _Caller:
    """What a caller has open, and what it used of late."""

    tokens: _Bucket
    compute: _Bucket
    sessions: int = 0
    live_bytes: int = 0

    def is_idle(self, now: float) -> bool:
        return not (self.sessions or self.live_bytes) and self.tokens.is_empty(now) and self.compute.is_empty(now)


class Quotas:
    """The quotas of all callers of a server. Threads and the event loop may use it at the same time.

    A caller that has nothing open and whose buckets have drained is forgotten.

    Args:
        total_live_bytes: memory of the micro-batches of all callers together; None is no limit.
        clock: seconds that never go back.

    Attributes:
        live_bytes: memory of all callers' micro-batches and unread frames at the moment.
    """

    def __init__(
        self,
        limits: QuotaLimits,
        clock: Callable[[], float] = time.monotonic,
        *,
        total_live_bytes: int | None = None,
    ) -> None:
        self.limits = limits
        self.total_live_bytes = total_live_bytes
        self.live_bytes = 0
        self._running_bytes = 0  # of the micro-batches alone
        self._clock = clock
        self._callers: dict[str, _Caller] = {}
        self._sweep_at = _SWEEP_AT
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._line: deque[object] = deque()  # the micro-batches that wait for memory
        self._stopped = False

    @property
    def callers(self) -> int:
        """How many are remembered."""
        return len(self._callers)

    @property
    def has_waiting(self) -> bool:
        """Whether a micro-batch waits for memory."""
        return bool(self._line)

    def stop(self) -> None:
        """Let nobody wait for memory any more: the server stops."""
        with self._lock:
            self._stopped = True
            self._freed.notify_all()

    def open_session(self, name: str) -> SessionQuota:
        """Count a session of the caller ``name`` until it is closed.

        Raises ``RefusedError`` (``quota_sessions``, retryable) where it has as many open as it may.
        """
        with self._lock:
            caller = self._caller(name, self._clock())
            most = self.limits.sessions
            if most is not None and caller.sessions >= most:
                text = f"the quota is {most} open at a time; close another session, or come again later"
                raise _refused_for_now(text, ErrorCode.QUOTA_SESSIONS, _RETRY_AFTER_S)
            caller.sessions += 1
        return SessionQuota(self, name)

    def _begin(self, session: SessionQuota, tokens: int, live_bytes: int) -> Charge:
        limits = self.limits
        if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
            text = f"{tokens} tokens are more than the quota of a minute, {limits.tokens_per_minute}"
            raise _refused_for_good(text, ErrorCode.QUOTA_TOKENS)
        if limits.live_bytes is not None and live_bytes and live_bytes + session.held_bytes > limits.live_bytes:
            kept = f", beside {_mb(session.held_bytes)} that it keeps for the session" if session.held_bytes else ""
            text = f"a micro-batch takes {_mb(live_bytes)} of the server{kept}; the quota is {_mb(limits.live_bytes)}"
            raise _refused_for_good(text, ErrorCode.QUOTA_LIVE_BYTES)
        total = self.total_live_bytes
        if total is not None and live_bytes > total:
            text = f"a micro-batch takes {_mb(live_bytes)} of the server, which has {_mb(total)} for all of them"
            raise _refused_for_good(text, ErrorCode.LIMIT)
        with self._lock:
            self._check(session, tokens, live_bytes)
            if live_bytes:
                self._wait_for_memory(session, live_bytes)
                self._check(session, tokens, live_bytes)  # again: the caller's other sessions did not wait
            now = self._clock()
            caller = self._caller(session.name, now)
            caller.tokens.add(tokens, now)
            caller.live_bytes += live_bytes
            session.live_bytes += live_bytes
            self.live_bytes += live_bytes
            self._running_bytes += live_bytes
        return Charge(self, session, live_bytes)

    def _check(self, session: SessionQuota, tokens: int, live_bytes: int) -> None:
        """Raise ``RefusedError`` where its caller is over a quota now."""
        now, most = self._clock(), self.limits.live_bytes
        caller = self._caller(session.name, now)
        room = most is None or not live_bytes or caller.live_bytes + live_bytes <= most
        waits_s = {
            ErrorCode.QUOTA_TOKENS: caller.tokens.wait_s(tokens, now),
            ErrorCode.QUOTA_COMPUTE: caller.compute.wait_s(0.0, now),
            ErrorCode.QUOTA_LIVE_BYTES: 0.0 if room else _RETRY_AFTER_S,
        }
        code = max(waits_s, key=waits_s.__getitem__)
        if waits_s[code] > 0.0:
            raise _refused_for_now(_USED_UP[code], code, waits_s[code] + _ROUNDING_S)

    def _wait_for_memory(self, session: SessionQuota, live_bytes: int) -> None:
        """Wait, in line, until so much is free. Who waits here runs nothing, so that all that runs comes to its end.

        Raises ``RefusedError`` (``busy``, retryable) where the session, or the server, ends meanwhile.
        """

        place = object()

        def may_begin() -> bool:
            # Frames that wait do not stop the line: who stands in it reads none.
            return self._line[0] is place and (self._fits(live_bytes) or not self._running_bytes)

        self._line.append(place)
        try:
            self._freed.wait_for(lambda: may_begin() or self._stopped or not session.is_open)
        finally:
            self._line.remove(place)
            self._freed.notify_all()
        if self._stopped or not session.is_open:
            raise _refused_for_now("the session ended while it waited for memory", ErrorCode.BUSY, _RETRY_AFTER_S)

    def _fits(self, live_bytes: int) -> bool:
        return self.total_live_bytes is None or self.live_bytes + live_bytes <= self.total_live_bytes

    def _queue(self, session: SessionQuota, nbytes: int) -> bool:
        with self._lock:
            caller = self._caller(session.name, self._clock())
            most = self.limits.live_bytes
            room = (most is None or caller.live_bytes + nbytes <= most) and self._fits(nbytes)
            if session.queued_bytes > _SMALL_BYTES and not room:
                return False
            session.queued_bytes += nbytes
            caller.live_bytes += nbytes
            self.live_bytes += nbytes
            return True

    def _unqueue(self, session: SessionQuota, nbytes: int) -> None:
        with self._lock:
            session.queued_bytes -= nbytes
            self._free(session, nbytes)

    def _free(self, session: SessionQuota, nbytes: int) -> None:
        self._caller(session.name, self._clock()).live_bytes -= nbytes
        self.live_bytes -= nbytes
        self._freed.notify_all()

    def _hold(self, session: SessionQuota, nbytes: int, what: str, advice: str) -> None:
        with self._lock:
            if not session.is_open:  # nobody would free it
                raise _refused_for_now("the session ended meanwhile", ErrorCode.BUSY, _RETRY_AFTER_S)
            caller = self._caller(session.name, self._clock())
            most, total, alone = self.limits.live_bytes, self.total_live_bytes, session.held_bytes + nbytes
            if most is not None and alone > most:
                text = f"{what} takes {_mb(alone)} and more of the server, and the quota is {_mb(most)}"
                raise RefusedError(f"{text}; {advice}", ErrorCode.QUOTA_LIVE_BYTES)
            if total is not None and alone > total:
                text = f"{what} takes {_mb(alone)} and more of the server, which has {_mb(total)} for all devices"
                raise RefusedError(f"{text}; {advice}", ErrorCode.LIMIT)
            if most is not None and caller.live_bytes + nbytes > most:
                code = ErrorCode.QUOTA_LIVE_BYTES
                raise _refused_for_now(_USED_UP[code], code, _RETRY_AFTER_S)
            if not self._fits(nbytes):
                raise _refused_for_now(f"there is no memory for {what}", ErrorCode.BUSY, _RETRY_AFTER_S)
            session.held_bytes += nbytes
            caller.live_bytes += nbytes
            self.live_bytes += nbytes

    def _release(self, session: SessionQuota, nbytes: int) -> None:
        with self._lock:
            if session.is_open:
                session.held_bytes -= nbytes
                self._free(session, nbytes)

    def _end(self, session: SessionQuota, live_bytes: int, compute_s: float) -> None:
        with self._lock:
            now = self._clock()
            caller = self._caller(session.name, now)
            caller.compute.add(compute_s, now)
            self._running_bytes -= live_bytes
            session.live_bytes -= live_bytes
            self._free(session, live_bytes)

    def _close(self, session: SessionQuota) -> None:
        with self._lock:
            if session.is_open:
                session.is_open = False
                self._caller(session.name, self._clock()).sessions -= 1
                self._free(session, session.held_bytes)
                session.held_bytes = 0

    def _caller(self, name: str, now: float) -> _Caller:
        found = self._callers.get(name)
        if found is None:
            # Only once they may have doubled, so that it costs each new caller little.
            if len(self._callers) >= self._sweep_at:
                self._callers = {name: caller for name, caller in self._callers.items() if not caller.is_idle(now)}
                self._sweep_at = max(_SWEEP_AT, 2 * len(self._callers))
            tokens = _Bucket(self.limits.tokens_per_minute, 60.0, now)
            compute = _Bucket(self.limits.compute_s_per_hour, 3600.0, now)
            found = self._callers[name] = _Caller(tokens, compute)
        return found


class SessionQuota:
    """What one session uses of its caller's quota; ``Quotas.open_session`` makes it. As a context it closes itself.

    Attributes:
        name: the caller's.
        live_bytes: of its micro-batches under way.
        held_bytes: of what the server keeps for it until it ends.
        queued_bytes: of its frames that nobody has read yet.
    """

    def __init__(self, quotas: Quotas, name: str) -> None:
        self.name = name
        self.live_bytes = 0
        self.held_bytes = 0
        self.queued_bytes = 0
        self.is_open = True
        self._quotas = quotas

    def charge(self, tokens: int, live_bytes: int) -> Charge:
        """Charge a micro-batch, or a report of no tokens, before it runs; the charge must be ended.

        Waits until the server has the memory. Raises ``RefusedError`` (``quota_tokens``, ``quota_live_bytes``,
        ``quota_compute``, ``limit``) and charges nothing: retryable, with the time when the same will fit, or not
        retryable where it never will.
        """
        return self._quotas._begin(self, tokens, live_bytes)

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
        self._quotas._hold(self, nbytes, what, advice)

    def release(self, nbytes: int) -> None:
        """Count no more what was held, before the session is closed."""
        self._quotas._release(self, nbytes)

    def add(self, nbytes: int) -> bool:
        """Count a frame that came and that nobody has read yet; False where there is no room for it.

        One frame of a session always finds room: its conversation is lock-step, so that more is not needed.
        """
        return self._quotas._queue(self, nbytes)

    def remove(self, nbytes: int) -> None:
        """It was read, or dropped."""
        self._quotas._unqueue(self, nbytes)

    def close(self) -> None:
        """The session is gone; a micro-batch that is still under way counts until it ends. Again does nothing."""
        self._quotas._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Charge:
    """What a micro-batch was charged before it ran."""

    def __init__(self, quotas: Quotas, session: SessionQuota, live_bytes: int) -> None:
        self._quotas = quotas
        self._session = session
        self._live_bytes = live_bytes

    def end(self, compute_s: float) -> None:
        """It has ended, however it did: its memory is free, and it computed for ``compute_s`` seconds."""
        self._quotas._end(self._session, self._live_bytes, compute_s)


_USED_UP: Final = {
    ErrorCode.QUOTA_TOKENS: "the quota of tokens a minute is used up",
    ErrorCode.QUOTA_COMPUTE: "the quota of compute seconds an hour is used up",
    ErrorCode.QUOTA_LIVE_BYTES: "the quota of live bytes is taken by other sessions, or by frames that wait",
}


def _refused_for_now(text: str, code: ErrorCode, retry_after_s: float) -> RefusedError:
    return RefusedError(text, code, retryable=True, retry_after_s=retry_after_s)


def _refused_for_good(text: str, code: ErrorCode) -> RefusedError:
    return RefusedError(f"{text}; lower --batch-size, or ask for a shorter text", code)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
