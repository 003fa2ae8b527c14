"""Streams in which nothing comes for a while, where comments keep them open, and those that nobody reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoints import served_by

from dlora.edge.endpoint import app, event_stream
from dlora.edge.endpoint.answers import End, Generation, Piece
from dlora.edge.endpoint.app import Served, make_app
from dlora.edge.endpoint.requests import GenerationRequest
from dlora.edge.endpoint.slots import ServedAdapter, Slot
from dlora.edge.generation.generate import Counters
from dlora.protocol.errors import DataError

PING = b": ping\n\n"


class Slow(Generation):
    """Takes a while for each token, and fails where the prompt says so."""

    def run(
        self, slot: Slot, adapter: ServedAdapter, request: GenerationRequest, should_stop: Callable[[], bool]
    ) -> Iterator[Piece | End]:
        time.sleep(0.2)
        if request.prompts[0].text == "fail":
            raise DataError("this cannot be answered; say less")
        yield Piece(0, "hel", (), {})
        time.sleep(0.2)
        yield Piece(0, "lo", (), {})
        yield End(0, "stop", Counters())


def ask(prompt: str, *, stream: bool, served: Served | None = None, reads: bool = True) -> tuple[int, bytes]:
    """Status and content of what a client gets; one that does not read takes the status only."""
    body = json.dumps({"prompt": prompt, "stream": stream}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    sent: list[Any] = []

    async def run() -> None:
        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return coming.pop() if coming else await asyncio.Event().wait()  # and never leaves

        async def send(message: Any) -> None:
            if not reads and sent:
                await asyncio.Event().wait()
            sent.append(message)

        await asyncio.wait_for(make_app(served or served_by(Slow))(scope, receive, send), 30)

    asyncio.run(run())
    return sent[0]["status"], b"".join(each["body"] for each in sent[1:])


def test_a_stream_that_is_silent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In comments, which clients pass over, also before its first token: a proxy would close what is silent. An error
    is an event then, and else a status."""
    assert ask("fail", stream=True)[0] == 400
    for module in (app, event_stream):
        monkeypatch.setattr(module, "PING_EVERY_S", 0.05)
    status, content = ask("hi", stream=True)
    assert status == 200
    assert content.startswith(PING)
    first, last = content.index(b'"text":"hel"'), content.index(b'"text":"lo"')
    assert PING in content[first:last]
    assert content.endswith(b"data: [DONE]\n\n")
    status, content = ask("fail", stream=True)
    assert status == 200
    assert b'"message":"this cannot be answered; say less"' in content
    assert ask("fail", stream=False)[0] == 400
    status, content = ask("hi", stream=False)
    assert (status, json.loads(content)["choices"][0]["text"]) == (200, "hello")


def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "UNREAD_S", 0.05)
    served = served_by(Slow)
    assert ask("hi", stream=True, served=served, reads=False) == (200, b"")
    assert served.slots.busy == 0
