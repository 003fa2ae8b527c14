"""Answers as they come: server-sent events in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answers import End, Piece
from .errors import RequestError
from .formats import Format, Json

PING_EVERY_S: Final = 15.0
UNREAD_S: Final = 60.0  # a client that takes nothing for so long has left


class Events(Protocol):
    """What comes of one request; raises ``RequestError`` where nothing more does."""

    def __aiter__(self) -> AsyncIterator[Piece | End]: ...
    async def close(self) -> None:
        """Give up what is not done yet, and wait until it has ended."""


class EventStream(Response):
    """Server-sent events: a chunk each, comments while nothing comes, and ``[DONE]``.

    Args:
        first: of the events; None: it has not come yet.
    """

    def __init__(
        self,
        events: Events,
        first: Piece | End | None,
        format_: Format,
        *,
        with_usage: bool,
        log: Callable[[], None],
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._first = first
        self._format = format_
        self._with_usage = with_usage
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._texts():
                # A client that does not read fills the socket's buffer, and then this waits.
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": text, "more_body": True}), UNREAD_S
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            self._log()
        except (TimeoutError, OSError):
            pass  # the client has left: the connection closes
        finally:
            await self._events.close()

    async def _texts(self) -> AsyncIterator[bytes]:
        for chunk in self._format.first_chunks():
            yield _event(chunk)
        if self._first is not None:
            for chunk in self._format.take(self._first):
                yield _event(chunk)
        async for made in with_pings(self._chunks()):
            yield made
        yield b"data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                for chunk in self._format.take(event):
                    yield _event(chunk)
        except RequestError as error:
            yield _event(error.body())
            return
        if self._with_usage:
            yield _event(self._format.usage_chunk())


async def with_pings(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """``chunks``, and a comment whenever nothing has come for a while: proxies close what is silent."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(_next(chunks))
            done, _ = await asyncio.wait({waiting}, timeout=PING_EVERY_S)
            if not done:
                yield b": ping\n\n"
                continue
            try:
                made = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield made
    finally:
        if waiting is not None:
            waiting.cancel()


def _next(chunks: AsyncIterator[bytes]) -> Awaitable[bytes]:
    return anext(chunks)


def _event(chunk: Json) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
