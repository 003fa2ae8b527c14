"""A TCP proxy that lets every byte arrive later: half of a round-trip time each way. For benchmarks on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def delaying_proxy(url: str, round_trip_s: float) -> Iterator[str]:
    """The address of a proxy to the websocket server at ``url``, until the context ends; ``url`` itself for 0."""
    if not round_trip_s:
        yield url
        return
    host, port = url.removeprefix("ws://").split(":")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_pump(reader, theirs[1], round_trip_s / 2), _pump(theirs[0], writer, round_trip_s / 2))

    async def start() -> int:
        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    try:
        yield f"ws://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), loop).result(10)}"
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Every piece arrives ``delay_s`` after it came, however many are on their way."""
    loop = asyncio.get_running_loop()

    def write(piece: bytes) -> None:
        if not writer.is_closing():
            writer.write(piece)

    with suppress(OSError):
        while piece := await reader.read(1 << 16):
            loop.call_later(delay_s, write, piece)
        loop.call_later(delay_s, writer.close)
