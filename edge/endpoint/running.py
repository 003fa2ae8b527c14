"""The server's process: it listens, connects to the base model's server, and ends when it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import cast

import numpy as np
import uvicorn
from starlette.types import ASGIApp

from dlora.edge.adapters.store import AdapterStore
from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.files import read_secret
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.ends import LongArray
from dlora.edge.model.generating import GeneratingModel
from dlora.protocol import interrupts
from dlora.protocol.adapter_record import WEIGHTS_NAME, load_record
from dlora.protocol.choices import Drafts
from dlora.protocol.errors import CheckpointError, ConnectionFailedError, RefusedError, UsageError
from dlora.protocol.text import name_without_path, one_line

from .answers import Generation
from .app import Served, local_hosts, make_app
from .connections import ACCEPTED_AT_ONCE, MAX_HEAD_BYTES, Connections
from .requests import PromptLimit
from .slots import ServedAdapter, Slots
from .tools import PLAIN_FORM, tool_form

_KEY_VARIABLE = "DLORA_API_KEY"
_RETRY_S = 2.0
_GRACE_S = 3


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and whom it lets in."""

    host: str
    port: int
    api_key: str | None
    origins: tuple[str, ...]

    @classmethod
    def checked(cls, host: str, port: int, key_file: Path | None, origins: Sequence[str]) -> Listening:
        """Raises ``UsageError``."""
        key = os.environ.get(_KEY_VARIABLE) or None
        if key_file is not None:
            key = read_secret("--api-key-file", key_file, None)
        if key is not None and (len(key) < 8 or not key.isascii() or any(each.isspace() for each in key)):
            raise UsageError("the key must be at least 8 ASCII characters without blanks")
        if local_hosts(host) is None and key is None:
            raise UsageError(f"--host {host} lets others in: give them a key with --api-key-file")
        return cls(host, port, key, tuple(origin.rstrip("/") for origin in origins))


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Everything that ``run`` needs.

    Attributes:
        open_model: opens the model with the adapter of a directory; None: without.
        stopping: set once it is told to end.
        adapter: one adapter; adapters: a directory of them, of which those are served that may fit the bundle.
    """

    bundle: Bundle
    tokenizer: PromptTokenizer
    open_model: Callable[[Path | None], AbstractContextManager[GeneratingModel]]
    adapter: Path | None
    adapters: Path
    listening: Listening
    parallel: int
    queue: int
    context_length: int
    max_new_tokens: int
    sampling: Sampling
    drafts: Drafts
    json_output: bool
    stopping: threading.Event

    def served_adapters(self) -> list[ServedAdapter]:
        """What there is now, the single one first."""
        found = []
        if self.adapter is not None:  # whatever is wrong with it is said when it is opened
            found.append(ServedAdapter(self.adapter.resolve().name, self.adapter, *(_version(self.adapter) or ())))
        store = AdapterStore(self.adapters)
        fingerprint = self.bundle.manifest.base_model.fingerprint
        for name in store.names():
            path = store.directory / name
            try:
                record, version = load_record(path), _version(path)
            except CheckpointError:  # whoever looks at it with dlora-edge adapters is told why
                continue
            fits = record is None or record.base_fingerprint == fingerprint
            if version is not None and fits and name not in {each.name for each in found}:
                found.append(ServedAdapter(name, path, *version))
        return found


def _version(adapter: Path) -> tuple[int, int] | None:
    """As ``ServedAdapter`` has it; None where it has no weights."""
    try:
        found = (adapter / WEIGHTS_NAME).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Raises ``ConnectionFailedError`` where it cannot listen, and what the base model's server refuses for good.
    """
    listener = _listen(settings.listening)
    asyncio.run(_Running(settings, listener).serve())


def _listen(listening: Listening) -> socket.socket:
    host, port = listening.host, listening.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        raise ConnectionFailedError(text) from None


def http_settings(app: ASGIApp, connections: Connections) -> uvicorn.Config:
    """How uvicorn serves ``app``."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], connections.protocol),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",  # a line for each request that is no HTTP would let a stranger fill the disk
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        backlog=ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn sends them again once it has ended, which would end us a second time."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Running:
    def __init__(self, settings: ServeSettings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._problem: str | None = "connecting to the base model's server"
        self._failure: Exception | None = None
        self._slots = Slots(settings.parallel, settings.queue)
        spec = settings.bundle.manifest.tokenizer
        template = ""
        if spec.chat_template is not None:
            template = settings.bundle.file(spec.chat_template).read_text(encoding="utf-8")
        knows_tools = "tools" in template
        generation = Generation(
            settings.tokenizer,
            lambda adapter: settings.open_model(adapter.path),
            settings.max_new_tokens,
            settings.drafts,
            _log,
        )
        served = Served(
            base_name=name_without_path(settings.bundle.manifest.base_model.name),
            adapters=settings.served_adapters,
            generation=generation,
            slots=self._slots,
            defaults=settings.sampling,
            knows_tools=knows_tools,
            tool_form=tool_form(template) if knows_tools else PLAIN_FORM,
            prompt_limit=PromptLimit(settings.context_length, settings.tokenizer.longest_token_bytes()),
            api_key=settings.listening.api_key,
            hosts=local_hosts(settings.listening.host) if settings.listening.api_key is None else None,
            origins=settings.listening.origins,
            log=_log,
            problem=lambda: self._problem,
            is_stopping=settings.stopping.is_set,
        )
        self._served = served
        self._connections = Connections()
        self._server = _Server(http_settings(make_app(served), self._connections))

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in interrupts.not_ignored():
            loop.add_signal_handler(number, self._stop)
        connecting = asyncio.create_task(self._connect())
        self._announce()
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            connecting.cancel()
            await self._slots.close()
        if self._failure is not None:
            raise self._failure

    def _stop(self) -> None:
        interrupts.leave_closed_output()
        self._settings.stopping.set()
        self._server.should_exit = True
        self._connections.stop()

    async def _connect(self) -> None:
        """Open the first model, so that a mistake shows at once, and the first request need not wait for it.

        An adapter of the directory that cannot be opened is no mistake of who started the server, unless it was named.
        """
        adapters, plain = self._settings.served_adapters(), ServedAdapter(self._served.base_name, None)
        adapter = adapters[0] if adapters else plain
        while True:
            async with self._slots.take(adapter, _no_prompt) as slot:
                opening = asyncio.get_running_loop().run_in_executor(
                    slot.thread, slot.context, adapter, self._served.generation.open_model
                )
                # It is asked for, also where nobody waits for it any more.
                opening.add_done_callback(lambda done: done.cancelled() or done.exception())
                try:
                    await asyncio.shield(opening)
                    break
                except Exception as error:
                    is_refused_now = isinstance(error, RefusedError) and error.retryable
                    if is_refused_now or isinstance(error, ConnectionFailedError):
                        if self._problem != str(error):
                            _log(f"warning: {error}; trying again")
                        self._problem = str(error)
                    elif adapter != plain and self._settings.adapter is None:
                        _log(f"warning: {adapter.name} cannot be used: {error}")
                        adapter = plain
                        continue
                    else:
                        self._failure = error
                        self._server.should_exit = True
                        return
            await asyncio.sleep(_RETRY_S)
        self._problem = None
        _log("ready")

    def _announce(self) -> None:
        host, port = self._listener.getsockname()[:2]
        page = page_url(host, port)
        names = [*(each.name for each in self._settings.served_adapters()), self._served.base_name]
        if self._settings.json_output:
            print(json.dumps({"url": f"{page}v1", "page": page, "models": names}), flush=True)
        text = f"open {page} to chat; clients take {page}v1"
        if self._settings.listening.api_key is not None:
            text += "; both ask for the key"
        if ip_address(host).is_unspecified:
            text += "; elsewhere with this machine's name or address"
        _log(f"{text}; models: {', '.join(names)}")


def page_url(host: str, port: int) -> str:
    """The page's address, of a server that listens on ``host``, an IP address: where that is all of a machine's
    addresses, it is the machine's own, for no browser opens ``0.0.0.0``."""
    address = ip_address(host)
    if address.is_unspecified:
        address = ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://{f'[{address}]' if address.version == 6 else address}:{port}/"


async def _no_prompt() -> LongArray:
    return np.zeros(0, np.int64)


def _log(text: str) -> None:
    print(one_line(text), file=sys.stderr, flush=True)
