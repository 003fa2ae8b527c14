"""One device's connection: the handshake on the event loop, then a session, or back to the one that it has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from websockets.exceptions import ConnectionClosed

from dlora.cloud.admission.access import Caller
from dlora.cloud.admission.guard import LOGGED_CHARACTERS, GuardedConnection
from dlora.cloud.admission.quotas import SessionQuota
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.memory import is_out_of_memory
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec, largest_row, largest_state_bytes, parameter_bytes
from dlora.protocol.controller import Controller
from dlora.protocol.errors import NonFiniteError, RefusedError, RemoteProtocolError, UsageError
from dlora.protocol.frames import encode
from dlora.protocol.groups import without_gains
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.link import frame_count
from dlora.protocol.passes import MOST_PIECES
from dlora.protocol.session import Session, choose_version
from dlora.protocol.states import Side
from dlora.protocol.text import one_line
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION
from dlora.protocol.wire_codecs import Codecs

from .counts import KINDS, OTHER
from .service import Service
from .session_device import DeviceGaveUpError
from .session_loop import SessionLoop, is_given, shutting_down
from .sessions import EvictedError, ServerSession
from .ticket import load_ticket, ticket_bytes
from .transport import DeviceGoneError, SessionTransport, as_refusal, close_with_error

logger = logging.getLogger("dlora.cloud")

HANDSHAKE_TIMEOUT_S = 30.0
OPENING_SPARE_BYTES = 4 << 10  # longer numbers and names than opening_limit reckons with
MEMORY_RETRY_S = 30.0

_LOST: Final = {EvictedError: "evicted", DeviceGoneError: "away", DeviceGaveUpError: "gave_up"}

T = TypeVar("T")


async def handle_connection(connection: GuardedConnection, caller: Caller, service: Service) -> None:
    """Serve one connection to its end; every end is logged in one line, never with payload, but for bugs of ours."""
    handshake = Session(Side.CLOUD)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            live = await _Handshake(connection, caller, handshake, service).run()
        if live is not None:
            await connection.wait_closed()
            live.transport.handle_closed(connection)
    except TimeoutError:
        late = RefusedError("too slow at the handshake", m.ErrorCode.DEADLINE, retryable=True)
        await _refuse(connection, caller, late)
    except (RefusedError, RemoteProtocolError) as error:
        await _refuse(connection, caller, as_refusal(error))
    except ConnectionClosed:
        logger.debug("%s left in the handshake", caller.name)
    except Exception as error:
        connection.guard.log_bug(error, caller.name)
        await close_with_error(connection, as_internal_error(error))


async def _refuse(connection: GuardedConnection, caller: Caller, refusal: RefusedError) -> None:
    connection.guard.log_refusal(refusal.code, caller.name, str(refusal))
    await close_with_error(connection, refusal)


@dataclass(frozen=True)
class _Handshake:
    """From ``hello`` to a session that is open, or open again."""

    connection: GuardedConnection
    caller: Caller
    session: Session
    service: Service

    async def run(self) -> ServerSession | None:
        """The session that the connection now belongs to, or None."""
        hello = await self._receive()
        if not isinstance(hello, m.Hello):
            return None
        self.connection.limit_frames(self.service.opening_bytes)
        await self._send(self._welcome(hello))
        while True:
            match await self._receive():
                case m.OpenSession() as opening:
                    controller = await self._run_in_thread(check_opening, opening, self.session, self.service)
                    return await self._open(controller, hello.device)
                case m.ResumeSession() as request:
                    live = self._resume(request)
                    if live is not None:
                        return live
                    await self._send(m.SessionGone())
                case _:  # a device that only wanted to know who we are
                    return None

    async def _receive(self) -> m.AnyMessage:
        message = None
        while message is None:
            frame = await self.connection.recv(decode=False)
            message = await self._run_in_thread(self.session.receive, frame)
            self.service.counts.received.add(len(frame), OTHER if message is None else KINDS[type(message)])
        return message

    async def _run_in_thread(self, function: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.service.openings, function, *given)

    async def _send(self, message: m.AnyMessage) -> None:
        frame = self.session.send(message)
        self.service.counts.sent.add(len(frame), KINDS[type(message)])
        await self.connection.send(frame)

    def _welcome(self, hello: m.Hello) -> m.Welcome:
        version = choose_version(hello.protocol_versions)
        if version is None:
            text = f"this server speaks wire versions {list(PROTOCOL_VERSIONS)}, the device {hello.protocol_versions}"
            raise RefusedError(text, m.ErrorCode.VERSION)
        base, max_tokens = self.service.base, self.service.max_tokens
        return m.Welcome(
            protocol_version=version,
            software=f"dlora-cloud {SOFTWARE_VERSION}",
            base_model=base.public_name,
            base_fingerprint=base.fingerprint,
            base_weight_format=base.weight_format,
            embedding_size=base.embedding_size,
            hidden_size=base.hidden_size,
            max_sequence_length=min(base.max_sequence_length, max_tokens),
            max_tokens=max_tokens,
            packs=self.service.may_pack,
            window=self.service.window,
            max_context_length=self.service.max_context_length,
        )

    def _resume(self, request: m.ResumeSession) -> ServerSession | None:
        service = self.service
        live = service.sessions.resume(request, self.caller, self.connection, self.session)
        if live is None:
            return None
        self.connection.session_opened(live.quota)
        self.connection.limit_frames(frame_limit(service, live.session))
        service.counts.resumed.add()
        live.log.info("session %s: resumed at step %d by %s", live.name, live.session.step, self.caller.name)
        return live

    async def _open(self, controller: Controller | None, device_id: str) -> ServerSession:
        service, session, caller = self.service, self.session, self.caller
        service.sessions.end_parked_of_device(caller, device_id)
        with contextlib.ExitStack() as undo:
            # Before somebody else's session makes room: who may not open another displaces nobody.
            quota = undo.enter_context(await self._open_quota())
            if service.draining.is_set():
                raise shutting_down()
            service.sessions.make_room()
            name = secrets.token_hex(4)
            opening = session.opened_with
            assert opening is not None
            transport = SessionTransport(
                asyncio.get_running_loop(),
                self.connection,
                name=name,
                device=caller.name,
                frames_ahead=0 if opening.window == 1 else frame_count(opening.window, len(opening.groups)),
                park_s=service.settings.timeouts.park_s,
                closing_tasks=service.closing_tasks,
                clock=service.settings.clock,
            )
            purpose = opening.purpose
            may_send_early = isinstance(purpose, m.Train) or (isinstance(purpose, m.Use) and purpose.passes is not None)
            quota.sent_ahead = opening.window * (MOST_PIECES if may_send_early else 1)
            live = ServerSession(name, caller, device_id, session, transport, quota)
            loop = SessionLoop(service, live, controller, service.deadlines.of(caller, device_id))
            limit = frame_limit(service, session)
            opened = session.send(loop.opened_message(live.name, live.new_resume_token()))
            undo.pop_all()
        service.sessions.add(live)
        self.connection.session_opened(quota)
        self.connection.limit_frames(limit)
        live.log.info(
            "session %s: opened at step %d by %s with %d groups", live.name, session.step, caller.name,
            len(session.groups),
        )  # fmt: skip
        service.counts.opened.add()
        service.counts.sent.add(len(opened), KINDS[m.SessionOpened])
        transport.send(opened)
        service.running.keep(asyncio.ensure_future(_run(live, loop, service)))
        return live

    async def _open_quota(self) -> SessionQuota:
        """In a thread, as a ledger may be far away."""
        opening = self.service.openings.submit(self.service.quotas.open_session, self.caller.name)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:  # too late: what is opened all the same counts for nobody
            opening.add_done_callback(_close_quota)
            raise


def _close_quota(opening: Future[SessionQuota]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _run(live: ServerSession, loop: SessionLoop, service: Service) -> None:
    """Run a session to its end, whatever connections it has on the way."""
    session, name, why = live.session, live.name, "internal"
    refusal: RefusedError | None = None
    try:
        await _answer_all(loop, service)
        live.log.info(
            "session %s: closed at step %d, %.1f MB in, %.1f MB out", name, session.step,
            session.bytes_received / 1e6, session.bytes_sent / 1e6,
        )  # fmt: skip
        why = "closed"
    except (DeviceGoneError, DeviceGaveUpError) as error:
        live.log.info("session %s: ended at step %d: %s", name, session.step, _log_text(error))
        why = _LOST[type(error)]
    except (RefusedError, RemoteProtocolError, NonFiniteError) as error:
        refusal = as_refusal(error)
        level = logging.INFO if refusal.retryable else logging.WARNING
        text = "session %s: ended at step %d: %s: %s"
        live.log.log(level, text, name, session.step, refusal.code, _log_text(refusal))
        why = "refused"
    except Exception as error:
        refusal = as_internal_error(error)
        if refusal.retryable:
            live.log.error("session %s: ended at step %d: out of memory: %s", name, session.step, _log_text(error))
        else:
            live.log.exception("session %s: internal error", name)
    finally:
        service.counts.ended.add(label=why)
        if refusal is not None:
            service.counts.refusals.add(label=refusal.code)
        service.sessions.remove(live)
        # Without the frames that it came through: they hold tensors, and the transport keeps the error.
        ended = refusal or DeviceGoneError("the session is closed")
        ended.__traceback__ = ended.__context__ = ended.__cause__ = None
        live.transport.end(ended)


async def _answer_all(loop: SessionLoop, service: Service) -> None:
    in_thread = partial(asyncio.get_running_loop().run_in_executor, service.threads)
    try:
        await loop.wait()
        while await in_thread(loop.answer):
            await loop.wait()
    finally:
        await in_thread(loop.close)


def _log_text(error: Exception) -> str:
    return one_line(str(error), LOGGED_CHARACTERS)


def as_internal_error(error: Exception) -> RefusedError:
    """What a device is told of an error that it has no part in, a ``LocalProtocolError`` as any other: only whether it
    may try again. It may where memory ran out: others may have taken it, and give it back."""
    if is_out_of_memory(error):
        text = "the server is out of memory; if it stays so, lower --batch-size"
        return RefusedError(text, m.ErrorCode.INTERNAL, retryable=True, retry_after_s=MEMORY_RETRY_S)
    return RefusedError("internal error; the server's log has it", m.ErrorCode.INTERNAL)


def opening_limit(base: BaseModel) -> int:
    """The largest frame, in bytes, that a device can have reason to send before it has a session.

    It is an ``open_session`` of all target modules there are, each group a unit of its own, all of them pinned.
    """
    groups = base.groups(base.targets)
    units = tuple(range(len(groups)))
    every = KillReviveConfig(unit="group", pinned=units, static=units)
    largest = m.OpenSession(
        base_fingerprint=base.fingerprint,
        groups=groups,
        adapter=AdapterSpec(),
        codecs=Codecs.all("fp32"),
        evaluation_codecs=Codecs.all("fp32"),
        purpose=m.Train(kill_revive=every, seed=0, total_steps=0, ticket=bytes(ticket_bytes(len(units)))),
    )
    return len(encode(largest)) + OPENING_SPARE_BYTES


def frame_limit(service: Service, session: Session) -> int:
    """The largest frame that a device can have reason to send in this session, in bytes."""
    opening, base = session.opened_with, service.base
    assert opening is not None
    ends = base.embedding_size, base.hidden_size, opening.encoded_width
    widest = largest_row(opening.adapter, opening.groups, *ends)
    micro_batch = service.max_tokens * (widest * 4 + 12)
    kept = largest_state_bytes(opening.adapter, opening.groups)
    if is_given(opening.purpose):
        kept = max((kept, *(parameter_bytes(opening.adapter, group) for group in opening.groups)))
    return CONTROL_BYTES + max(micro_batch, kept)


CONTROL_BYTES = 1 << 20


def _check_encode(purpose: m.Encode, service: Service) -> None:
    """Raise ``RefusedError`` for blocks that the server cannot run by themselves."""
    base, parts = service.base, service.parts
    if parts is None:
        text = f"{base.public_name} cannot be run in parts, so that no device can run its last blocks"
        raise RefusedError(text, m.ErrorCode.LIMIT)
    if purpose.blocks > base.blocks or purpose.width != parts.width_after(purpose.blocks):
        text = f"no {purpose.blocks} first blocks of {base.public_name} give hidden states of width {purpose.width}"
        raise RefusedError(text, m.ErrorCode.LIMIT)


def check_opening(opening: m.OpenSession, session: Session, service: Service) -> Controller | None:
    """Check what a device asks for against the base model, and make its kill-and-revive controller, where it trains.

    Raises ``RefusedError``.
    """
    base = service.base
    if opening.base_fingerprint != base.fingerprint:
        text = f"this server serves {base.public_name} ({base.fingerprint[:12]}…), not {opening.base_fingerprint[:12]}…"
        raise RefusedError(text, m.ErrorCode.BASE_MODEL_MISMATCH)
    names = [target.name for group in opening.groups for target in group.targets]
    unknown = [name for name in names if name not in base.targets]
    if unknown or len(set(names)) != len(names) or base.groups(names) != without_gains(opening.groups):
        text = f"no such exchange groups in {base.public_name}" + (f": {unknown[0][:100]}" if unknown else "")
        raise RefusedError(text, m.ErrorCode.UNKNOWN_TARGET)
    purpose = opening.purpose
    if isinstance(purpose, m.Encode):
        _check_encode(purpose, service)
    if not isinstance(purpose, m.Train):
        return None
    if not opening.groups:
        raise RefusedError("a run that trains nothing: no exchange groups", m.ErrorCode.LIMIT)
    try:
        purpose.kill_revive.check(len(session.units.groups))
    except UsageError as error:
        raise RefusedError(str(error), m.ErrorCode.LIMIT) from None
    controller = Controller(
        purpose.kill_revive,
        opening.groups,
        seed=purpose.seed,
        total_steps=purpose.total_steps,
        adapter=opening.adapter,
        learnt=purpose.learnt,
    )
    if purpose.ticket is not None:
        load_ticket(controller, purpose.ticket, service.ticket_key, purpose.next_step)
    elif purpose.next_step:
        raise RefusedError("a run that goes on needs its ticket", m.ErrorCode.TICKET)
    return controller
