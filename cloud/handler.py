"""One device's connection: handshake on the event loop, then the session in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from dlora.protocol import messages as m
from dlora.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, UsageError
from dlora.protocol.session import Role, Session, choose_version
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .base_model import BaseModel
from .executor import ComputeGate, DeviceGaveUpError, SessionExecutor
from .kill_revive import Controller

logger = logging.getLogger("dlora.cloud")

HANDSHAKE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Service:
    """What every session of a server shares."""

    base: BaseModel
    gate: ComputeGate
    threads: int
    may_pack: bool
    max_tokens: int
    ticket_key: bytes


class ThreadTransport:
    """Frames over an asyncio websocket, from a session's thread.

    Reading only when asked leaves backpressure to the websocket. Sending never waits: a session sends while it
    holds the compute gate, and a device that does not read must stall nobody but itself. It is waited for before
    the next message is read, so that no more than one answer's frames pile up.
    """

    def __init__(self, connection: ServerConnection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._sending: list[Future[None]] = []

    def send(self, frame: bytearray) -> None:
        self._sending.append(asyncio.run_coroutine_threadsafe(self._connection.send(frame), self._loop))

    def receive(self) -> bytes:
        self.flush()
        return asyncio.run_coroutine_threadsafe(self._connection.recv(decode=False), self._loop).result()

    def flush(self) -> None:
        """Wait for what was sent to leave; raises ``ConnectionClosed`` if it could not."""
        sending, self._sending = self._sending, []
        for sent in sending:
            sent.result()


async def handle_connection(connection: ServerConnection, service: Service, threads: Executor, free: Capacity) -> None:
    """Serve one device from hello to goodbye; every end is logged in one line, never with payload."""
    name = secrets.token_hex(4)
    session = Session(Role.CLOUD)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            controller = await _shake_hands(connection, session, service)
        if controller is None:
            return
        if not free.take():
            raise RemoteProtocolError("the server is full", m.ErrorCode.BUSY)
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(threads, _run_session, name, connection, loop, session, service, controller)
        finally:
            free.give_back()
    except (ProtocolError, TimeoutError) as error:
        await _give_up(connection, session, name, error)
    except (DeviceGaveUpError, ConnectionClosed) as error:
        logger.info("session %s: the device left at step %d (%s)", name, session.step, str(error)[:200])
    except Exception as error:
        logger.exception("session %s: internal error", name)
        await _give_up(connection, session, name, error)


class Capacity:
    """How many more sessions fit."""

    def __init__(self, sessions: int) -> None:
        self.limit = sessions
        self.used = 0

    def take(self) -> bool:
        if self.used >= self.limit:
            return False
        self.used += 1
        return True

    def give_back(self) -> None:
        self.used -= 1


async def _shake_hands(connection: ServerConnection, session: Session, service: Service) -> Controller | None:
    base = service.base
    hello = session.receive(await connection.recv(decode=False))
    if not isinstance(hello, m.Hello):
        return None
    version = choose_version(hello.protocol_versions)
    if version is None:
        text = f"this server speaks wire versions {list(PROTOCOL_VERSIONS)}, the device {hello.protocol_versions}"
        raise RemoteProtocolError(text, m.ErrorCode.VERSION)
    welcome = m.Welcome(
        protocol_version=version,
        software=f"dlora-cloud {SOFTWARE_VERSION}",
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        embedding_size=base.embedding_size,
        hidden_size=base.hidden_size,
        max_sequence_length=min(base.max_sequence_length, service.max_tokens),
        max_tokens=service.max_tokens,
    )
    await connection.send(session.send(welcome))
    opening = session.receive(await connection.recv(decode=False))
    if not isinstance(opening, m.OpenSession):  # a device that only wanted to know who we are
        return None
    return _open(opening, session, service)


def _open(opening: m.OpenSession, session: Session, service: Service) -> Controller:
    """Check what a device asks for against the base model, and make its kill-and-revive controller."""
    base = service.base
    if opening.base_fingerprint != base.fingerprint:
        text = f"this server serves {base.name} ({base.fingerprint[:12]}…), not {opening.base_fingerprint[:12]}…"
        raise RemoteProtocolError(text, m.ErrorCode.BASE_MODEL_MISMATCH)
    names = [target.name for group in opening.groups for target in group.targets]
    unknown = [name for name in names if name not in base.targets]
    if unknown or len(set(names)) != len(names) or base.groups(names) != opening.groups:
        text = f"no such exchange groups in {base.name}" + (f": {unknown[0][:100]}" if unknown else "")
        raise RemoteProtocolError(text, m.ErrorCode.UNKNOWN_TARGET)
    config = opening.kill_revive
    try:
        config.check(len(session.unit_groups))
    except UsageError as error:
        raise RemoteProtocolError(str(error), m.ErrorCode.LIMIT) from None
    if opening.ticket is not None:
        return Controller.from_ticket(
            opening.ticket,
            service.ticket_key,
            config,
            opening.groups,
            seed=opening.seed,
            total_steps=opening.total_steps,
            next_step=opening.next_step,
        )
    if opening.next_step:
        raise RemoteProtocolError("a run that goes on needs its ticket", m.ErrorCode.TICKET)
    return Controller(config, opening.groups, seed=opening.seed, total_steps=opening.total_steps)


def _run_session(
    name: str,
    connection: ServerConnection,
    loop: asyncio.AbstractEventLoop,
    session: Session,
    service: Service,
    controller: Controller,
) -> None:
    transport = ThreadTransport(connection, loop)
    executor = SessionExecutor(
        service.base,
        session,
        transport,
        controller,
        ticket_key=service.ticket_key,
        gate=service.gate,
        threads=service.threads,
        may_pack=service.may_pack,
    )
    logger.info(
        "session %s: opened at step %d with %d groups, %s", name, session.step, len(session.groups),
        connection.remote_address[0] if connection.remote_address else "?",
    )  # fmt: skip
    transport.send(session.send(executor.opened(name)))
    executor.run()
    logger.info(
        "session %s: closed at step %d, %.1f MB in, %.1f MB out", name, session.step,
        session.bytes_received / 1e6, session.bytes_sent / 1e6,
    )  # fmt: skip


async def _give_up(connection: ServerConnection, session: Session, name: str, error: Exception) -> None:
    """Tell the device why, in one message, and hang up."""
    retryable = False
    match error:
        case RemoteProtocolError():
            code, text = error.code, str(error)
            retryable = code == m.ErrorCode.BUSY
        case LocalProtocolError():
            code, text = m.ErrorCode.NON_FINITE, str(error)
        case TimeoutError():
            code, text = m.ErrorCode.PROTOCOL, "too slow at the handshake"
        case _:
            code, text = m.ErrorCode.INTERNAL, "internal error; the server's log has it"
    logger.warning("session %s: gave up at step %d: %s: %s", name, session.step, code, text[:300])
    refusal = m.Error(code=code, message=text[:1024], retryable=retryable, retry_after_s=5.0 if retryable else None)
    try:
        await connection.send(Session(Role.CLOUD).send(refusal))
        await connection.close(1008, code)
    except ConnectionClosed:
        pass
