"""A thousand sessions that are open and do nothing, and five thousand that come and go: a part of fleet.py."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import psutil
from bars import Entry, at_most
from children import cloud_process, cpu_seconds, log, pss_mb

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS / "faults"), str(_TESTS)]

import conversations  # noqa: E402
from families import save_tiny  # noqa: E402
from forked import free_port  # noqa: E402
from websockets.asyncio.client import ClientConnection, connect  # noqa: E402

from dlora.cloud.model.base_model import BaseModel, load_base_model  # noqa: E402
from dlora.protocol import messages as m  # noqa: E402
from dlora.protocol.connections import raise_file_limit  # noqa: E402
from dlora.protocol.session import Session  # noqa: E402
from dlora.protocol.states import Side  # noqa: E402

SESSIONS: Final = 1000
COMING_AND_GOING: Final = 5000
AT_ONCE: Final = 20
IDLE_S: Final = 60.0
GROUP: Final = 50
"""Of how many openings the processor time is told together: one alone is less than the clock's ticks."""


def measure(directory: Path) -> dict[str, Any]:
    """One server, and its devices in this process: they ping as devices do, each 20 s."""
    raise_file_limit()
    save_tiny(directory / "model")
    base = load_base_model(str(directory / "model"))
    metrics = free_port()
    options = ("--max-sessions", str(2 * SESSIONS), "--idle-timeout-s", "36000", "--metrics", str(metrics))
    with cloud_process(str(directory / "model"), 1, *options) as (url, process):
        return asyncio.run(_measure(base, url, f"http://127.0.0.1:{metrics}/metrics", process))


def bars(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """The sixth of the issue's."""
    return {
        "sessions: kB of an idle one, of 1,000": at_most(60, found["kb_each"], command),
        "sessions: % of a core, 1,000 idle": at_most(1, found["idle_percent_of_a_core"], command),
        "sessions: CPU of the last 250 openings of 1,000 to the first": at_most(1.3, found["last_to_first"], command),
        "sessions: threads, 1,000 idle": at_most(50, found["threads_idle"], command),
        "metrics: series with 1,000 sessions": at_most(2000, found["series"], command),
        "sessions: left of 5,000 that came and went": at_most(0, found["left"], command),
    }


async def _measure(base: BaseModel, url: str, metrics_url: str, process: int) -> dict[str, Any]:
    server = psutil.Process(process)
    async with AsyncExitStack() as warm_up:
        for _ in range(GROUP):
            await _open(warm_up, base, url)
    await asyncio.sleep(12)
    before_kb, openings_s = 1000 * pss_mb(process), []
    async with AsyncExitStack() as stack:
        for number in range(SESSIONS // GROUP):
            began = cpu_seconds(process)
            for _ in range(GROUP):
                await _open(stack, base, url)
            openings_s.append(cpu_seconds(process) - began)
            log(f"{(number + 1) * GROUP} sessions: {openings_s[-1] / GROUP * 1e3:.1f} ms CPU each")
        await asyncio.sleep(15)
        began, started = cpu_seconds(process), time.monotonic()
        await asyncio.sleep(IDLE_S)
        idle = (cpu_seconds(process) - began) / (time.monotonic() - started)
        kb_each, threads = (1000 * pss_mb(process) - before_kb) / SESSIONS, server.num_threads()
        page = (await asyncio.to_thread(read_page, metrics_url)).decode()
        series = sum(not line.startswith("#") for line in page.splitlines())
        log(f"idle: {100 * idle:.2f} % of a core, {kb_each:.0f} kB each, {threads} threads")
    await asyncio.sleep(12)
    gone_kb = 1000 * pss_mb(process)
    for _ in range(COMING_AND_GOING // AT_ONCE):
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(_open(stack, base, url) for _ in range(AT_ONCE)))
    await asyncio.sleep(12)
    health = json.loads(await asyncio.to_thread(read_page, url.replace("ws://", "http://") + "/healthz"))
    return {
        "sessions": SESSIONS, "kb_each": kb_each, "idle_percent_of_a_core": 100 * idle, "threads_idle": threads,
        "opening_ms": [round(each / GROUP * 1e3, 2) for each in openings_s],
        "last_to_first": sum(openings_s[-5:]) / sum(openings_s[:5]), "came_and_went": COMING_AND_GOING,
        "left": health["sessions"], "series": series,
        "before_kb": before_kb, "gone_kb": gone_kb, "end_kb": 1000 * pss_mb(process),
    }  # fmt: skip


async def _open(stack: AsyncExitStack, base: BaseModel, url: str) -> None:
    """A device that opens a session and then thinks."""
    socket = await stack.enter_async_context(connect(url, compression=None, proxy=None))
    session = Session(Side.EDGE)
    await _say(socket, session, conversations.hello(), m.Welcome)
    groups = base.groups(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    opening = conversations.open_session(base_fingerprint=base.fingerprint, groups=groups)
    await _say(socket, session, opening, m.SessionOpened)
    stack.push_async_callback(socket.send, session.send(m.CloseSession()))


async def _say(socket: ClientConnection, session: Session, message: m.AnyMessage, answer: type[m.Message]) -> None:
    await socket.send(session.send(message))
    assert isinstance(session.receive(await socket.recv(decode=False)), answer)


def read_page(url: str) -> bytes:
    """What answers there."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())
