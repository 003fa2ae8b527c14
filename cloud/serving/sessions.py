"""The sessions of a server: who has one, how many fit, and how a device comes back to its own.

A session that is parked makes room for a new one where the server is full, for its own device's next one, and, where
it holds memory in the middle of a step, for micro-batches that wait for that: whatever is lost with it, the device runs
its step again elsewhere from its ticket. So parked sessions cost nothing that somebody else needs.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from websockets.asyncio.server import ServerConnection

from dlora.cloud.admission.access import Caller
from dlora.cloud.admission.quotas import SessionQuota
from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError
from dlora.protocol.session import Session

from .transport import DeviceGoneError, SessionTransport

logger = logging.getLogger("dlora.cloud")

BUSY_RETRY_S = 5.0
IDLE_S = 5.0  # a context that says nothing for so long gives way: between two tokens it never does


class EvictedError(DeviceGoneError):
    """Others needed what the session had."""


@dataclass(eq=False)
class ServerSession:
    """One session, connected or parked.

    Attributes:
        name: in messages and logs, random.
        caller: who may resume it.
        device_id: the stable name that the device gives itself; "" for none.
        cache_bytes: of the keys and values that are kept for it.
        idle_since: since when it waits for its device to begin something; None while a micro-batch of it is under way.
    """

    name: str
    caller: Caller
    device_id: str
    session: Session
    transport: SessionTransport
    quota: SessionQuota
    cache_bytes: int = 0
    idle_since: float | None = None
    resume_token_digest: bytes = field(default=b"", repr=False)

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """For lines about it as it is now, of which device, session and step are fields."""
        about = {"device": self.caller.name, "session": self.name, "step": self.session.step}
        return logging.LoggerAdapter(logger, about)

    def new_resume_token(self) -> bytes:
        """A token that resumes this session once; only its digest is kept."""
        token = secrets.token_bytes(m.RESUME_TOKEN_BYTES)
        self.resume_token_digest = hashlib.sha256(token).digest()
        return token


class Sessions:
    """All sessions of a server. For the event loop.

    Args:
        limit: sessions at a time, parked ones included.
        clock: as the service's.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._live: dict[str, ServerSession] = {}
        self._of_device: defaultdict[tuple[Caller, str], set[ServerSession]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[ServerSession]:
        return iter(list(self._live.values()))

    @property
    def parked(self) -> int:
        """How many wait for their device."""
        return len(self._parked())

    def end_parked_of_device(self, caller: Caller, device_id: str) -> None:
        """End what a device has parked that opens another session; ``device_id`` is "" for one without a name."""
        for live in list(self._of_device.get((caller, device_id), ())) if device_id else ():
            if live.transport.parked_at is not None:
                self._evict(live, "its device opened another session")

    def make_room(self) -> None:
        """Where the server is full, end the session that was parked longest, or else as ``end_idle``.

        Raises ``RefusedError`` (``busy``) where there is none to be ended.
        """
        if len(self) < self.limit or self._evict_longest(self._parked(), "another device needed the room"):
            return
        if not self.end_idle():
            text = f"the server is full ({self.limit} sessions)"
            raise RefusedError(text, m.ErrorCode.BUSY, retryable=True, retry_after_s=BUSY_RETRY_S)

    def make_memory_free(self) -> None:
        """End the session that was parked longest of those that hold memory; where there is none, as ``end_idle``."""
        holding = [live for live in self._parked() if live.quota.live_bytes or live.quota.held_bytes]
        if not self._evict_longest(holding, "others needed the memory"):
            self.end_idle()

    def end_idle(self, caller: Caller | None = None) -> bool:
        """End the session with keys and values that has been idle longest, ``caller``'s or anybody's; False where none
        has been for long enough. Its device opens another once it goes on, and sends its context again."""
        now = self._clock()
        idle = [
            (since, live)
            for live in self
            # Read once: its own thread writes it.
            if (since := live.idle_since) is not None and live.cache_bytes and now - since >= IDLE_S
            if caller is None or live.caller == caller
        ]
        if not idle:
            return False
        self._evict(min(idle, key=lambda each: each[0])[1], "others needed the memory of its idle context")
        return True

    def add(self, live: ServerSession) -> None:
        self._live[live.name] = live
        self._of_device[live.caller, live.device_id].add(live)

    def resume(
        self, request: m.ResumeSession, caller: Caller, connection: ServerConnection, handshake: Session
    ) -> ServerSession | None:
        """Move a session over to ``connection``; None where there is no such session for that token and caller.

        Raises ``RemoteProtocolError`` where the device claims to have what it cannot have.
        """
        live = self._live.get(request.session)
        digest = hashlib.sha256(request.token).digest()
        known = live.resume_token_digest if live is not None else bytes(len(digest))
        if not hmac.compare_digest(digest, known) or live is None or live.caller != caller:
            return None
        answer = handshake.send(m.SessionResumed(token=live.new_resume_token(), received=live.session.link.received))
        live.transport.attach(connection, lambda: [answer, *live.session.resume(handshake, request.received)])
        return live

    def remove(self, live: ServerSession) -> None:
        """Forget a session; harmless when it is forgotten already."""
        if self._live.pop(live.name, None) is not None:
            others = self._of_device[live.caller, live.device_id]
            others.remove(live)
            if not others:
                del self._of_device[live.caller, live.device_id]
        live.quota.close()

    def _parked(self) -> list[ServerSession]:
        return [live for live in self if live.transport.parked_at is not None]

    def _evict_longest(self, parked: list[ServerSession], reason: str) -> bool:
        """End the one that was parked longest; False where there is none."""
        if parked:
            self._evict(min(parked, key=lambda live: live.transport.parked_at or 0.0), reason)
        return bool(parked)

    def _evict(self, live: ServerSession, reason: str) -> None:
        self.remove(live)
        live.transport.end(EvictedError(f"evicted: {reason}"))
