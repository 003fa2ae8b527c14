"""Answers as they come: server-sent events in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answers import Events
from .errors import RequestError
from .formats import Format, Json

PING_EVERY_S: Final = 15.0
UNREAD_S: Final = 60.0  # a client that takes nothing for so long has left


class EventStream(Response):
    """Server-sent events: a chunk each, comments while nothing comes, and what the format has as an end."""

    def __init__(self, events: Events, format_: Format, *, log: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._format = format_
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._texts():
                # A client that does not read fills the socket's buffer, and then this waits.
                await asyncio.wait_for(send({"type": "http.response.body", "body": text, "more_body": True}), UNREAD_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            self._log()
        except (TimeoutError, OSError):
            pass  # the client has left: the connection closes
        finally:
            await self._events.close()

    async def _texts(self) -> AsyncIterator[bytes]:
        for chunk in self._format.first_chunks():
            yield _event(chunk)
        while True:
            try:
                event = await asyncio.wait_for(anext(self._events), PING_EVERY_S)
            except TimeoutError:
                yield b": ping\n\n"  # proxies close what is silent
                continue
            except RequestError as error:
                yield _event(self._format.error_chunk(error))
                break
            except StopAsyncIteration:
                for chunk in self._format.after_chunks():
                    yield _event(chunk)
                break
            for chunk in self._format.take(event):
                yield _event(chunk)
        yield self._format.stream_end


def _event(chunk: Json) -> bytes:
    """A chunk with a type (``/v1/responses``) is an event of that name."""
    name = f"event: {chunk['type']}\n".encode() if "type" in chunk else b""
    return name + b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
