"""What a server is told, and what all of its sessions share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dlora.cloud.admission.guard import ConnectionLimits
from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.admission.quotas import Quotas
from dlora.cloud.exchange.gate import ComputeGate
from dlora.cloud.exchange.shared_gate import SharedGate
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.row_blocks import RowBlocks

from .counts import Counts
from .sessions import Sessions
from .tasks import Tasks
from .threads import Threads
from .timeouts import DeviceDeadlines, SessionTimeouts


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How much a server takes on, and how long it waits.

    Attributes:
        max_sessions: devices that may train at a time; more are told to come again.
        max_tokens: most tokens of one micro-batch; None: what ``live_limit`` allows.
        threads: torch threads of a computing session.
        live_limit: memory of all running micro-batches together, in bytes; None: no limit. Half of it is then the quota
            of a device that ``quotas`` leaves out.
        limits: of strangers' connections; None: as many as suit ``max_sessions``.
        drain_s: how long running steps may take to finish once the server is asked to stop.
        window: the most micro-batches that a session may have under way at a time; None: as many of the usual size as
            a device has memory for, ``USUAL_WINDOW`` at most.
        batch_rows: tokens of several sessions' answers that run side by side; 0: none do.
        clock: seconds that never go back, which everything that a session waits for is measured with.
    """

    max_sessions: int
    max_tokens: int | None
    threads: int
    quotas: QuotaLimits = field(default_factory=QuotaLimits)
    timeouts: SessionTimeouts = field(default_factory=SessionTimeouts)
    limits: ConnectionLimits | None = None
    live_limit: int | None = None
    drain_s: float = 30.0
    window: int | None = None
    batch_rows: int = 64
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, kw_only=True)
class Service:
    """What every session of a server shares.

    Attributes:
        may_pack: whether the base model runs sequences end to end.
        parts: the base model in parts; None where it cannot be run so; row_blocks: likewise.
        max_context_length: the most tokens of a context, in all blocks; 0 where the base model keeps none.
        window: the most micro-batches that a session may have under way at a time.
        opening_bytes: the largest frame before a session is open.
        openings: one thread that decodes and checks what may be large, off the event loop and one after the other.
        draining: set once the server stops: running steps are finished, nothing new is begun.
        gate: of all sessions; shared_gate: where those that answer compute together; None: they do not.
        counts: what was done so far.
        threads: of what sessions compute.
        running: the sessions; closing_tasks: to devices that are told to go, until they have heard it.
    """

    base: BaseModel
    settings: ServerSettings
    may_pack: bool
    live_bytes: LiveBytes
    parts: ModelParts | None
    row_blocks: RowBlocks | None
    max_context_length: int
    max_tokens: int
    window: int
    opening_bytes: int
    ticket_key: bytes
    sessions: Sessions
    quotas: Quotas
    deadlines: DeviceDeadlines
    threads: Threads
    openings: ThreadPoolExecutor
    gate: ComputeGate
    shared_gate: SharedGate | None
    draining: threading.Event = field(default_factory=threading.Event)
    counts: Counts = field(default_factory=Counts)
    running: Tasks = field(default_factory=Tasks)
    closing_tasks: Tasks = field(default_factory=Tasks)
