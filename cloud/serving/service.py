"""What every session of a server shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from dlora.cloud.admission.quotas import Quotas
from dlora.cloud.exchange.gate import ComputeGate
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.decoding import Decoding
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.cloud.model.parts import ModelParts

from .sessions import Sessions
from .tasks import Tasks
from .timeouts import DeviceDeadlines, SessionTimeouts


@dataclass(frozen=True)
class Service:
    """What every session of a server shares.

    Attributes:
        threads: torch threads of a computing micro-batch.
        may_pack: whether the base model runs sequences end to end.
        window: the most micro-batches that a session may have under way at a time.
        parts: the base model in parts; None where it cannot be run so.
        decoding: what keeps contexts; None where the base model cannot.
        opening_bytes: the largest frame before a session is open.
        openings: one thread that decodes and checks what may be large, off the event loop and one after the other.
        clock: seconds that never go back, which everything that a session waits for is measured with.
        draining: set once the server stops: running steps are finished, nothing new is begun.
        running: the sessions' threads; closing_tasks: to devices that are told to go, until they have heard it.
    """

    base: BaseModel
    gate: ComputeGate
    threads: int
    may_pack: bool
    window: int
    live_bytes: LiveBytes
    parts: ModelParts | None
    decoding: Decoding | None
    max_tokens: int
    opening_bytes: int
    ticket_key: bytes
    sessions: Sessions
    quotas: Quotas
    timeouts: SessionTimeouts
    deadlines: DeviceDeadlines
    pool: Executor
    openings: Executor
    draining: threading.Event
    clock: Callable[[], float] = time.monotonic
    running: Tasks = field(default_factory=Tasks)
    closing_tasks: Tasks = field(default_factory=Tasks)
