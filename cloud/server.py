"""The websocket server: accepts devices, answers ``GET /healthz``, stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import logging
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from dlora.protocol.errors import ConnectionFailedError
from dlora.protocol.messages import Error, ErrorCode
from dlora.protocol.session import Role, Session
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .base_model import BaseModel
from .exchange import install
from .executor import ComputeGate
from .handler import Capacity, Service, handle_connection
from .layout import can_pack

logger = logging.getLogger("dlora.cloud")

PING_EVERY_S = 20.0
# A device computes between messages and may sleep; the pong comes from its reading thread, not its compute.
PING_TIMEOUT_S = 120.0
GOODBYE_TIMEOUT_S = 1.0
CONTROL_BYTES = 8 << 20


class CloudServer:
    """Serves one base model to many devices.

    Args:
        max_sessions: devices that may train at a time; more are told to come again.
        max_tokens: most tokens of one micro-batch.
        threads: torch threads of a computing session.

    Attributes:
        port: the port it listens on, once ``start`` has returned.
    """

    def __init__(
        self, base: BaseModel, *, max_sessions: int, max_tokens: int, threads: int, ticket_key: bytes
    ) -> None:
        install(base)
        # One session computes at a time: on a CPU the cores are shared, on one GPU the device is.
        self.service = Service(base, ComputeGate(), threads, can_pack(base), max_tokens, ticket_key)
        self.port = 0
        self._capacity = Capacity(max_sessions)
        self._threads = ThreadPoolExecutor(max_sessions, thread_name_prefix="session")
        self._server: Server | None = None
        self._started = time.monotonic()

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises ``ConnectionFailedError`` where that address cannot be had."""
        try:
            self._server = await serve(
                self._handle,
                host,
                port,
                process_request=self._answer_http,
                compression=None,  # hidden states do not compress, and a compression bomb is no wish of ours
                max_size=self._max_frame_bytes(),
                max_queue=4,
                ping_interval=PING_EVERY_S,
                ping_timeout=PING_TIMEOUT_S,
                server_header=None,
            )
        except OSError as error:
            raise ConnectionFailedError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def serve_until_stopped(self, host: str, port: int) -> None:
        """Listen until SIGINT or SIGTERM, then close every session and return."""
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        await self.start(host, port)
        logger.info("listening on ws://%s:%d, health at http://%s:%d/healthz", host, self.port, host, self.port)
        await stopped.wait()
        logger.info("stopping; %d sessions are told to come again", self._capacity.used)
        await self.stop()

    async def stop(self) -> None:
        """Stop listening, tell every device to come again, hang up (1001) and wait for the threads to end."""
        if self._server is not None:
            await asyncio.gather(*map(_say_goodbye, self._server.connections))
            self._server.close()
            await self._server.wait_closed()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def _handle(self, connection: ServerConnection) -> None:
        await handle_connection(connection, self.service, self._threads, self._capacity)

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path != "/healthz":
            return None
        body = json.dumps(self.health(), indent=1) + "\n"
        response = connection.respond(http.HTTPStatus.OK, body)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    def health(self) -> dict[str, object]:
        """What ``/healthz`` answers."""
        base = self.service.base
        return {
            "status": "ok",
            "software": SOFTWARE_VERSION,
            "protocol_versions": list(PROTOCOL_VERSIONS),
            "base_model": base.name,
            "base_fingerprint": base.fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": str(base.device),
            "sessions": self._capacity.used,
            "max_sessions": self._capacity.limit,
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    def _max_frame_bytes(self) -> int:
        """The largest frame that any session could need: all target modules of one group, in fp32."""
        base = self.service.base
        groups = base.groups(base.targets)
        width = max(
            base.embedding_size,
            base.hidden_size,
            *(group.in_features for group in groups),
            *(sum(target.out_features for target in group.targets) for group in groups),
        )
        return CONTROL_BYTES + self.service.max_tokens * (width * 4 + 8)


async def _say_goodbye(connection: ServerConnection) -> None:
    """Tell a device why it is about to lose the server; one that does not read is not waited for."""
    text = "shutting down; once it is back, go on with --resume"
    error = Error(code=ErrorCode.SHUTTING_DOWN, message=text, retryable=True)
    with contextlib.suppress(ConnectionClosed, TimeoutError):
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            await connection.send(Session(Role.CLOUD).send(error))
