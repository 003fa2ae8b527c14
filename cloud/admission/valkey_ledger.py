"""A ledger that several servers share: in Valkey or Redis, over the network.

Where it cannot be asked, quotas hold nobody up (what is used meanwhile is not counted) and failed logins are counted by
this server alone, but no token is let in: who was revoked must stay out. It is asked again half a second later.

What is charged is checked and counted by one script, which Valkey runs as a whole. Times are Valkey's own: servers need
not agree on theirs. Keys begin with ``dlora:`` and end by themselves, but for those of revoked tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import valkey
from valkey.backoff import NoBackoff
from valkey.exceptions import ConnectionError as LostError
from valkey.exceptions import ValkeyError
from valkey.retry import Retry

from dlora.protocol.connections import source_of
from dlora.protocol.errors import StorageError, UsageError
from dlora.protocol.messages import ErrorCode

from .ledger import COMPUTE_WINDOW_S, TOKENS_WINDOW_S, WINDOW_S, Ledger, MemoryLedger, QuotaLimits, UsedUp

T = TypeVar("T")

logger = logging.getLogger("dlora.cloud")

TIMEOUT_S: Final = 0.5
ASK_AGAIN_S: Final = 0.5
LEASE_S: Final = 30.0  # of a session whose server no longer says that it is there; it does every 10 s
LOG_EVERY_S: Final = 10.0

_NOW: Final = """
local now = tonumber(ARGV[1])
if not now then
    local time = redis.call('TIME')
    now = time[1] + time[2] / 1e6
end
"""
# Of each meter: its key, and what to add, its capacity ('' holds everything) and its window. The first argument beside
# the time says whether all must fit. Answers '' or which does not, and in how many seconds it will.
_METER: Final = (
    _NOW
    + """
local longest, which = 0, ''
for i, key in ipairs(KEYS) do
    local amount, capacity, window = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
    if capacity then
        local left = math.max(0, (tonumber(redis.call('GET', key)) or 0) - now)
        local wait = left + (amount / capacity - 1) * window
        if wait > longest then longest, which = wait, i end
    end
end
if ARGV[2] == 'check' and which ~= '' then return {which, string.format('%.17g', longest)} end
for i, key in ipairs(KEYS) do
    local amount, capacity, window = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
    if capacity and amount ~= 0 then
        local empty_at = math.max(tonumber(redis.call('GET', key)) or 0, now) + amount / capacity * window
        redis.call('SET', key, string.format('%.17g', empty_at), 'EX', math.ceil(math.max(1, empty_at - now)) + 60)
    end
end
return {'', '0'}
"""
)
# A sorted set of sessions by when they end unless they are kept. Answers 1 where the session is among them.
_OPEN: Final = (
    _NOW
    + """
local session, most, lease = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if not redis.call('ZSCORE', KEYS[1], session) and redis.call('ZCARD', KEYS[1]) >= most then return 0 end
redis.call('ZADD', KEYS[1], now + lease, session)
redis.call('EXPIRE', KEYS[1], 2 * lease)
return 1
"""
)
_KEEP: Final = (
    _NOW
    + """
for i, key in ipairs(KEYS) do
    redis.call('ZADD', key, now + tonumber(ARGV[2]), ARGV[i + 2])
    redis.call('EXPIRE', key, 2 * tonumber(ARGV[2]))
end
"""
)
_FAIL: Final = """
local failures = redis.call('INCR', KEYS[1])
if failures == 1 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return {failures, redis.call('PTTL', KEYS[1])}
"""


class ValkeyLedger(Ledger):
    """What several servers count together.

    Args:
        url: ``valkey://HOST:PORT/DATABASE``, ``valkeys://`` with TLS, ``unix://PATH``; ``redis://`` and ``rediss://``
            likewise. A password may stand in it: it is never shown.
        now: the time, for tests; None: Valkey's.

    Raises ``UsageError`` where that is no such address.
    """

    def __init__(self, url: str, now: Callable[[], float] | None = None) -> None:
        try:
            # A connection of the pool may have been lost long ago, so that one more try is due.
            self._valkey: Any = valkey.Valkey.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
                retry_on_error=[LostError],
            )
        except (ValueError, ValkeyError):
            raise UsageError("--ledger is no address; write valkey://HOST:PORT/0, or valkeys:// with TLS") from None
        self.errors = 0
        self._now = now
        self._monotonic = time.monotonic
        self._ask_again_at = self._logged_at = -LOG_EVERY_S
        self._own = MemoryLedger()
        self._later = ThreadPoolExecutor(1, "ledger")  # what nobody waits for, in its order
        self._meter, self._open, self._keep, self._fail = map(
            self._valkey.register_script, (_METER, _OPEN, _KEEP, _FAIL)
        )

    def open_session(self, caller: str, session: str, most: int) -> bool:
        args = [self._time(), session, most, LEASE_S]
        # After those that are being closed.
        opening = self._later.submit(self._ask, lambda: self._open([_key(caller, "sessions")], args), 1)
        return bool(opening.result())

    def keep_sessions(self, sessions: Mapping[str, str]) -> None:
        if sessions:
            keys = [_key(caller, "sessions") for caller in sessions.values()]
            self._later.submit(self._ask, lambda: self._keep(keys, [self._time(), LEASE_S, *sessions]), None)

    def close_session(self, caller: str, session: str) -> None:
        self._later.submit(self._ask, lambda: self._valkey.zrem(_key(caller, "sessions"), session), None)

    def charge(self, caller: str, tokens: int, limits: QuotaLimits) -> UsedUp | None:
        args = [self._time(), "check", *_metered(limits, tokens, 0.0)]
        which, wait_s = self._ask(lambda: self._meter(_meters(caller), args), (b"", b"0"))
        return UsedUp(_CODES[int(which) - 1], float(wait_s)) if which else None

    def correct(self, caller: str, limits: QuotaLimits, *, tokens: int = 0, compute_s: float = 0.0) -> None:
        args = [self._time(), "", *_metered(limits, tokens, compute_s)]
        self._later.submit(self._ask, lambda: self._meter(_meters(caller), args), None)

    def count_failure(self, address: str) -> tuple[int, float]:
        key = _key(source_of(address), "failures")
        failures, left_ms = self._ask(lambda: self._fail([key], [round(WINDOW_S)]), (0, 0))
        return (failures, left_ms / 1000) if failures else self._own.count_failure(address)

    def revoked(self, token_ids: Collection[str]) -> set[str]:
        if not token_ids:
            return set()
        found = self._ask(lambda: self._valkey.mget(map(_revoked_key, token_ids)), None)
        if found is None:
            raise StorageError("cannot ask the ledger (--ledger) which tokens were revoked; is it running?")
        return {token_id for token_id, value in zip(token_ids, found, strict=True) if value is not None}

    def revoke(self, token_ids: Collection[str]) -> None:
        """Let no server let these in any more. Raises ``StorageError`` where it cannot be told."""
        told = self._ask(lambda: self._valkey.mset({_revoked_key(token_id): 1 for token_id in token_ids}), False)
        if not told:
            raise StorageError("cannot tell the ledger (--ledger) what was revoked; is it running? Then repeat this")

    def close(self) -> None:
        """Finish what is under way."""
        self._later.shutdown()
        self._valkey.close()

    def _time(self) -> float | str:
        return "" if self._now is None else self._now()

    def _ask(self, command: Callable[[], T], otherwise: T) -> T:
        """What a command answers, or ``otherwise`` where the ledger does not, or did not just now."""
        if self._monotonic() < self._ask_again_at:
            self.errors += 1
            return otherwise
        try:
            answer = command()
        except ValkeyError as error:
            self.errors, self.is_up, now = self.errors + 1, False, self._monotonic()
            self._ask_again_at = now + ASK_AGAIN_S
            if now - self._logged_at >= LOG_EVERY_S:
                self._logged_at = now
                logger.warning("the ledger does not answer, so quotas do not count and no token is let in: %s", error)
            return otherwise
        self.is_up = True
        return answer


_CODES: Final = (ErrorCode.QUOTA_TOKENS, ErrorCode.QUOTA_COMPUTE)


def _metered(limits: QuotaLimits, tokens: int, compute_s: float) -> tuple[float | str, ...]:
    """The script's arguments for both meters."""
    capacities = ["" if limit is None else limit for limit in (limits.tokens_per_minute, limits.compute_s_per_hour)]
    return tokens, capacities[0], TOKENS_WINDOW_S, compute_s, capacities[1], COMPUTE_WINDOW_S


def _meters(caller: str) -> list[str]:
    return [_key(caller, "tokens"), _key(caller, "compute")]


def _key(caller: str, what: str) -> str:
    return f"dlora:{caller}:{what}"


def _revoked_key(token_id: str) -> str:
    return f"dlora:revoked:{token_id}"
