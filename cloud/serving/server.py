"""The websocket server: lets devices in, answers ``GET /healthz``, drains before it stops."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import http
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import cast
from weakref import WeakKeyDictionary

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from dlora.cloud.admission.access import Access, AccessDeniedError, Caller
from dlora.cloud.admission.guard import ConnectionLimits, Guard, GuardedConnection
from dlora.cloud.admission.ledger import Ledger, MemoryLedger
from dlora.cloud.admission.quotas import Quotas
from dlora.cloud.admission.trusted_proxies import TrustedProxies
from dlora.cloud.exchange.gate import ComputeGate
from dlora.cloud.exchange.shared_gate import SharedGate
from dlora.cloud.exchange.target_modules import wrap_target_modules
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import can_pack
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.cloud.model.memory import collect_garbage
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.row_blocks import RowBlocks
from dlora.protocol import interrupts
from dlora.protocol.connections import source_of
from dlora.protocol.device_memory import USUAL_TOKENS
from dlora.protocol.errors import DloraError
from dlora.protocol.limits import USUAL_WINDOW
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .handler import handle_connection, opening_limit
from .listening import cannot_listen
from .service import ServerSettings, Service
from .session_loop import shutting_down, use_threads
from .sessions import Sessions
from .threads import Threads
from .timeouts import DeviceDeadlines

logger = logging.getLogger("dlora.cloud")

PING_CHECK_S = 10.0
RECHECK_EVERY_S = 5.0  # docs say 10 s, which a busy machine keeps too
KEEP_SESSIONS_EVERY_S = 10.0
RELEASE_EVERY_S = 5.0
END_PARKED_EVERY_S = 1.0
DRAIN_CHECK_S = 0.05
DRAINING_RETRY_S = 1.0  # soon, as there may be others behind the same address
LEAST_TOKENS, MOST_TOKENS = 256, 8192


class CloudServer:
    """Serves one base model to many devices.

    Args:
        ticket_key: signs tickets, 32 bytes.
        access: who may come in; by default everybody.
        proxies: those in front of it that are believed; by default none.
        ledger: where callers are counted; by default one of its own, in memory.
        tls: speak TLS.

    Attributes:
        port: the port it listens on, once ``start`` has returned.
        largest_micro_batch: bytes that one of ``max_tokens`` may take.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: ServerSettings,
        *,
        ticket_key: bytes,
        access: Access | None = None,
        proxies: TrustedProxies | None = None,
        ledger: Ledger | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        wrap_target_modules(base)
        self.port = 0
        self.scheme = "ws" if tls is None else "wss"
        self.guard = Guard(settings.limits or ConnectionLimits(sessions=settings.max_sessions), tls=tls)
        self._access = access or Access(None, required=False)
        self._proxies = proxies or TrustedProxies()
        self._admitting = asyncio.Lock()
        # Weak: a request that names no websocket is let in here, and refused by websockets after.
        self._callers: WeakKeyDictionary[ServerConnection, Caller] = WeakKeyDictionary()
        self._server: Server | None = None
        self._housekeeping: list[asyncio.Task[None]] = []
        self._changes_seen = self._changes_released = (0, 0)
        self._started = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None  # once it serves until it is stopped
        self._stopped = asyncio.Event()
        self._failure: DloraError | None = None
        parts, gate = ModelParts.of(base), ComputeGate()
        row_blocks = RowBlocks.of(parts)
        live_bytes, may_pack, quotas = LiveBytes.measure(base, row_blocks), can_pack(base), settings.quotas
        max_tokens, live_limit = settings.max_tokens, settings.live_limit
        # Sequences end to end are one row, whatever each of them may have.
        longest = (max_tokens or MOST_TOKENS) if may_pack else base.max_sequence_length
        if max_tokens is None:
            max_tokens = default_max_tokens(live_bytes, longest, live_limit)
        self.largest_micro_batch = live_bytes.largest(max_tokens, longest)
        if live_limit is not None and quotas.live_bytes is None:
            # Whoever stalls in the middle of a step must not hold up all others.
            quotas = replace(quotas, live_bytes=min(live_limit, max(live_limit // 2, self.largest_micro_batch)))
        # At most half of what a device may have, so that there is room to compute.
        context_bytes = None if quotas.live_bytes is None else quotas.live_bytes // 2
        self.service = Service(
            base=base,
            settings=settings,
            may_pack=may_pack,
            live_bytes=live_bytes,
            parts=parts,
            row_blocks=row_blocks,
            max_context_length=parts.most_context(context_bytes, live_bytes.context_token_bytes) if parts else 0,
            max_tokens=max_tokens,
            window=settings.window or default_window(live_bytes, min(max_tokens, longest), quotas.live_bytes),
            opening_bytes=max(opening_limit(base), self.guard.limits.first_frame_bytes),
            ticket_key=ticket_key,
            sessions=Sessions(settings.max_sessions, settings.clock),
            quotas=Quotas(
                quotas, ledger or MemoryLedger(settings.clock), total_live_bytes=live_limit, clock=settings.clock
            ),
            gate=gate,
            shared_gate=SharedGate.of(gate, parts, settings.batch_rows, settings.clock),
            deadlines=DeviceDeadlines(settings.timeouts),
            threads=Threads("session", partial(use_threads, settings.threads)),
            openings=ThreadPoolExecutor(1, thread_name_prefix="opening"),
        )

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises ``ConnectionFailedError`` where that address cannot be had."""
        try:
            self._server = await serve(
                self._handle,
                host,
                port,
                process_request=self._answer_http,
                ping_interval=None,  # Guard.ping_silent does it
                **self.guard.settings(),
            )
        except OSError as error:
            raise cannot_listen(host, port, error) from None
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        regularly = (
            (RECHECK_EVERY_S, self._recheck_access),
            (KEEP_SESSIONS_EVERY_S, self._keep_sessions),
            (PING_CHECK_S, self._ping_silent),
            (RELEASE_EVERY_S, self._release_memory),
            (END_PARKED_EVERY_S, self._end_parked),
        )
        self._housekeeping = [asyncio.create_task(_repeat(every_s, work)) for every_s, work in regularly]

    async def serve_until_stopped(self, host: str, port: int, on_listening: Callable[[], None]) -> None:
        """Listen until SIGINT, SIGTERM or SIGHUP, then close every session and return.

        Raises what ``fail`` was given, once every session is closed.
        """
        loop = self._loop = asyncio.get_running_loop()

        def stop() -> None:
            interrupts.leave_closed_output()
            self._stopped.set()

        for number in interrupts.not_ignored():
            loop.add_signal_handler(number, stop)
        if self._failure is not None:
            raise self._failure
        await self.start(host, port)
        logger.info(
            "listening on %s://%s:%d, health at http%s://%s:%d/healthz",
            self.scheme,
            host,
            self.port,
            self.scheme.removeprefix("ws"),
            host,
            self.port,
        )
        on_listening()
        await self._stopped.wait()
        logger.info(
            "stopping: %d sessions may finish their step, for at most %.0f s",
            len(self.service.sessions),
            self._drain_s,
        )
        await self.stop()
        if self._failure is not None:
            raise self._failure

    def fail(self, error: DloraError) -> None:
        """Stop as if asked to: nothing can be computed any more. In any thread."""
        self._failure = error
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stopped.set)

    @property
    def _drain_s(self) -> float:
        return self.service.settings.drain_s if self._failure is None else 0.0

    async def stop(self) -> None:
        """Let running steps finish, tell every device to come again, hang up and wait for the threads to end."""
        await self._drain()
        for task in self._housekeeping:
            task.cancel()
        self.guard.abort_unfinished()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await self.service.running.wait()
        for threads in (self.service.threads, self.service.openings):
            await asyncio.to_thread(threads.shutdown, wait=True, cancel_futures=True)
        await asyncio.to_thread(self.service.quotas.ledger.close)

    async def _drain(self) -> None:
        sessions = self.service.sessions
        self.service.draining.set()
        until = time.monotonic() + self._drain_s
        while len(sessions) and time.monotonic() < until:
            for live in sessions:
                if live.session.is_between_steps or live.transport.parked_at is not None:
                    live.transport.end(shutting_down())
            await asyncio.sleep(DRAIN_CHECK_S)
        for live in sessions:
            live.transport.end(shutting_down())
        self.service.quotas.stop()
        await self.service.closing_tasks.wait()

    async def _recheck_access(self) -> None:
        """End the sessions of devices whose token was revoked or has expired."""
        sessions = list(self.service.sessions)
        try:
            denied = await asyncio.to_thread(self._access.recheck, {live.caller for live in sessions})
        except AccessDeniedError:  # the tokens cannot be read just now
            return
        for live in sessions:
            if live.caller in denied:
                live.transport.end(denied[live.caller])

    async def _ping_silent(self) -> None:
        self.guard.ping_silent()

    async def _keep_sessions(self) -> None:
        self.service.quotas.keep_sessions()

    async def _release_memory(self) -> None:
        """Give freed memory back once nothing computes: sessions that stay would keep what they used. And again once
        their threads have ended, which had some of their own."""
        changes = self.service.gate.changes, len(self.service.threads)
        if changes == self._changes_seen != self._changes_released:
            await asyncio.to_thread(collect_garbage)
            self._changes_released = changes
        self._changes_seen = changes

    async def _end_parked(self) -> None:
        """Where others wait for memory, end a session a second that holds some and does nothing."""
        if self.service.quotas.has_waiting:
            self.service.sessions.make_memory_free()

    async def _handle(self, connection: ServerConnection) -> None:
        await handle_connection(cast(GuardedConnection, connection), self._callers[connection], self.service)

    async def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        stopping = None
        if self.service.draining.is_set():
            told = shutting_down()
            stopping = AccessDeniedError(str(told), told.code, status=503, retry_after_s=DRAINING_RETRY_S)
        if request.path == "/healthz":
            health = json.dumps(self.health(), indent=1).encode() + b"\n"
            return _json_response(http.HTTPStatus.OK, health) if stopping is None else _refusal(stopping, health)
        if stopping is not None:  # before the websocket opens, so that a proxy can still take it to another server
            self.service.counts.refusals.add(label=stopping.code)
            return _refusal(stopping)
        authorization = request.headers.get_all("Authorization")
        guarded = cast(GuardedConnection, connection)
        certificate = connection.transport.get_extra_info("peercert")
        origin = self._proxies.origin(guarded.address, certificate, request.headers)
        guarded.source = source = source_of(origin.address)
        try:
            async with self._admitting:
                # In a thread: a token file that somebody locks must not hold up the sessions that are open.
                self._callers[connection] = await asyncio.to_thread(
                    self._access.admit,
                    authorization[0] if len(authorization) == 1 else None,
                    origin,
                    has_query="?" in request.path,
                )
        except AccessDeniedError as denied:
            self.service.counts.refusals.add(label=denied.code)
            if denied.should_log:
                logger.warning("%s refused: %s: %s", source, denied.code, denied)
            return _refusal(denied)
        except Exception as error:
            # Of ours. websockets answers 500, and refers the device to a log in which it is silent.
            self.guard.log_bug(error, source)
            raise
        return None

    def health(self) -> dict[str, object]:
        """What ``/healthz`` answers."""
        base, sessions = self.service.base, self.service.sessions
        return {
            "status": "draining" if self.service.draining.is_set() else "ok",
            "software": SOFTWARE_VERSION,
            "protocol_versions": list(PROTOCOL_VERSIONS),
            "base_model": base.public_name,
            "base_fingerprint": base.fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "weight_format": base.weight_format,
            "device": str(base.device),
            "tensor_parallel": base.processes,
            "sessions": len(sessions),
            "parked_sessions": sessions.parked,
            "max_sessions": sessions.limit,
            "max_tokens": self.service.max_tokens,
            "window": self.service.window,
            "max_context_length": self.service.max_context_length,
            "live_mb": round(self.service.quotas.live_bytes / 1e6, 1),
            "live_mb_limit": None if (limit := self.service.quotas.total_live_bytes) is None else round(limit / 1e6, 1),
            "uptime_s": round(time.monotonic() - self._started, 1),
        }


async def _repeat(every_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do it again whatever it raises: a session whose token was revoked would stay for ever."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except Exception:
            logger.exception("internal error between sessions")


def default_max_tokens(live_bytes: LiveBytes, longest: int, live_limit: int | None) -> int:
    """The most tokens of a micro-batch that takes at most half of ``live_limit`` bytes, so that nobody has all of it.

    At least ``LEAST_TOKENS``, at most ``MOST_TOKENS``, in steps of the former. ``longest``: tokens of a sequence.
    """
    if live_limit is None:
        return MOST_TOKENS
    tokens = range(LEAST_TOKENS, MOST_TOKENS + 1, LEAST_TOKENS)
    fitting = bisect.bisect_right(tokens, live_limit // 2, key=lambda many: live_bytes.largest(many, longest))
    return tokens[max(0, fitting - 1)]


def default_window(live_bytes: LiveBytes, longest: int, limit: int | None) -> int:
    """How many micro-batches of the usual size take at most ``limit`` bytes together: at least one, at most
    ``USUAL_WINDOW``. ``longest``: tokens of a sequence."""
    if limit is None:
        return USUAL_WINDOW
    return max(1, min(USUAL_WINDOW, limit // live_bytes.largest(min(USUAL_TOKENS, longest), longest)))


def _refusal(denied: AccessDeniedError, body: bytes | None = None) -> Response:
    return _json_response(denied.status, denied.body() if body is None else body, denied.headers())


def _json_response(status: http.HTTPStatus, body: bytes, more: Mapping[str, str] = MappingProxyType({})) -> Response:
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **more}
    return Response(status.value, status.phrase, Headers(headers), body)
