"""What is counted of callers over all servers that share a ledger: sessions, tokens, compute, failures, revocations.

``MemoryLedger`` is one server's own; ``valkey_ledger`` has one that several share. Memory is a machine's, and counted
in ``quotas``. Tokens and compute are metered by leaky buckets: what was used drains evenly, so a caller that used
nothing for a while may do all at once.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Final, NamedTuple

from dlora.protocol.connections import source_of
from dlora.protocol.errors import UsageError
from dlora.protocol.messages import ErrorCode

WINDOW_S: Final = 60.0
MAX_ADDRESSES: Final = 4096
TOKENS_WINDOW_S: Final = 60.0
COMPUTE_WINDOW_S: Final = 3600.0
_SWEEP_AT: Final = 64


@dataclass(frozen=True)
class QuotaLimits:
    """What one caller may use; None is no limit. Raises ``UsageError`` where a limit is not above 0.

    Attributes:
        sessions: sessions open at a time, parked ones among them.
        tokens_per_minute: tokens of micro-batches, training or evaluating; at once, and then a minute.
        live_bytes: memory of its micro-batches under way and of its frames that nobody has read, over all its sessions
            with one server.
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


class UsedUp(NamedTuple):
    """A quota that is used up: its ``ErrorCode``, and in how many seconds the same will fit."""

    code: ErrorCode
    wait_s: float


class Ledger(ABC):
    """Counts callers, by name, for one server or several. Threads may use it at the same time.

    Attributes:
        errors: how often it could not be asked; is_up: whether it could the last time.
    """

    errors: int = 0
    is_up: bool = True

    @abstractmethod
    def open_session(self, caller: str, session: str, most: int) -> bool:
        """Count a session of a caller's, by its name; False, and nothing is counted, where it has ``most`` open."""

    @abstractmethod
    def keep_sessions(self, sessions: Mapping[str, str]) -> None:
        """Go on counting these, each with its caller: a server that says it no more is gone, and they with it."""

    @abstractmethod
    def close_session(self, caller: str, session: str) -> None:
        """Count it no more."""

    @abstractmethod
    def charge(self, caller: str, tokens: int, limits: QuotaLimits) -> UsedUp | None:
        """Count the tokens of a micro-batch that is about to run; where a quota is used up nothing is counted, and what
        takes longest is told."""

    @abstractmethod
    def correct(self, caller: str, limits: QuotaLimits, *, tokens: int = 0, compute_s: float = 0.0) -> None:
        """Count what is known only later: seconds of computing, and, below 0, tokens that were charged and not run."""

    @abstractmethod
    def count_failure(self, address: str) -> tuple[int, float]:
        """Count a failed login: how many there were of late, and in how many seconds they are forgotten. Addresses
        count as ``source_of`` has them."""

    @abstractmethod
    def revoked(self, token_ids: Collection[str]) -> set[str]:
        """Those that were revoked for all servers. Raises ``StorageError`` where that cannot be known now."""

    def close(self) -> None:  # noqa: B027  # most have nothing to do
        """Finish what is under way."""


@dataclass
class _Bucket:
    """A leaky bucket as a meter: a capacity drains in ``window_s``; a capacity of None holds everything.

    It is all told by when it will be empty, as in the generic cell rate algorithm of ATM (ITU-T I.371).
    """

    window_s: float
    empty_at: float = -math.inf

    def wait_s(self, amount: float, capacity: float | None, now: float) -> float:
        """Seconds until ``amount`` fits; 0 where it does."""
        if capacity is None:
            return 0.0
        return max(0.0, max(0.0, self.empty_at - now) + (amount / capacity - 1.0) * self.window_s)

    def add(self, amount: float, capacity: float | None, now: float) -> None:
        if capacity is not None:
            self.empty_at = max(self.empty_at, now) + amount / capacity * self.window_s


@dataclass
class _Account:
    """What a caller has open, and what it used of late."""

    tokens: _Bucket = field(default_factory=lambda: _Bucket(TOKENS_WINDOW_S))
    compute: _Bucket = field(default_factory=lambda: _Bucket(COMPUTE_WINDOW_S))
    sessions: set[str] = field(default_factory=set)

    def is_idle(self, now: float) -> bool:
        return not self.sessions and max(self.tokens.empty_at, self.compute.empty_at) <= now


class MemoryLedger(Ledger):
    """One server's own, in memory. A caller that has nothing open and whose buckets have drained is forgotten.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _SWEEP_AT
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()  # address: (start, failures)

    def open_session(self, caller: str, session: str, most: int) -> bool:
        with self._lock:
            sessions = self._account(caller).sessions
            if len(sessions) < most:
                sessions.add(session)
            return session in sessions

    def keep_sessions(self, sessions: Mapping[str, str]) -> None:
        """Nothing to do: they go where this goes."""

    def close_session(self, caller: str, session: str) -> None:
        with self._lock:
            self._account(caller).sessions.discard(session)

    def charge(self, caller: str, tokens: int, limits: QuotaLimits) -> UsedUp | None:
        with self._lock:
            account, now = self._account(caller), self._clock()
            waits = (
                UsedUp(ErrorCode.QUOTA_TOKENS, account.tokens.wait_s(tokens, limits.tokens_per_minute, now)),
                UsedUp(ErrorCode.QUOTA_COMPUTE, account.compute.wait_s(0.0, limits.compute_s_per_hour, now)),
            )
            longest = max(waits, key=lambda each: each.wait_s)
            if longest.wait_s > 0.0:
                return longest
            account.tokens.add(tokens, limits.tokens_per_minute, now)
            return None

    def correct(self, caller: str, limits: QuotaLimits, *, tokens: int = 0, compute_s: float = 0.0) -> None:
        with self._lock:
            account, now = self._account(caller), self._clock()
            account.tokens.add(tokens, limits.tokens_per_minute, now)
            account.compute.add(compute_s, limits.compute_s_per_hour, now)

    def count_failure(self, address: str) -> tuple[int, float]:
        """As the ledger's; the addresses that failed last are remembered."""
        with self._lock:
            now, source = self._clock(), source_of(address)
            start, failures = self._failures.pop(source, (now, 0))
            if now - start >= WINDOW_S:
                start, failures = now, 0
            self._failures[source] = start, failures + 1
            if len(self._failures) > MAX_ADDRESSES:
                self._failures.popitem(last=False)
            return failures + 1, start + WINDOW_S - now

    def revoked(self, token_ids: Collection[str]) -> set[str]:
        """None: this server's own file of tokens has all that were revoked."""
        return set()

    def _account(self, caller: str) -> _Account:
        found = self._accounts.get(caller)
        if found is None:
            # Only once they may have doubled, so that it costs each new caller little.
            if len(self._accounts) >= self._sweep_at:
                now = self._clock()
                self._accounts = {name: each for name, each in self._accounts.items() if not each.is_idle(now)}
                self._sweep_at = max(_SWEEP_AT, 2 * len(self._accounts))
            found = self._accounts[caller] = _Account()
        return found
