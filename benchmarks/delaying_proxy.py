"""A network in a process of its own: a TCP proxy that lets every byte arrive later, and so many a second at most.

python benchmarks/delaying_proxy.py HOST PORT ROUND_TRIP_S BITS_PER_S    (0 bits: as many as come)
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_PIECE: Final = 16 << 10
_MOST_WAITING_S: Final = 0.25
"""Of bytes that wait for their turn: a network takes in no more, so that whoever sends notices."""


@contextmanager
def delaying_proxy(url: str, round_trip_s: float, bits_per_s: float = 0.0) -> Iterator[str]:
    """The address of a proxy to the websocket server at ``url``, until the context ends; ``url`` itself for no delay
    and no limit. Half of the round-trip time passes each way, and each way has all of ``bits_per_s``."""
    if not round_trip_s and not bits_per_s:
        yield url
        return
    host, port = url.removeprefix("ws://").split(":")
    command = [sys.executable, __file__, host, port, str(round_trip_s), str(bits_per_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"ws://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(10)


async def _serve(host: str, port: int, round_trip_s: float, bits_per_s: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection(host, port)
        delay_s = round_trip_s / 2
        await asyncio.gather(
            _pump(reader, theirs[1], delay_s, bits_per_s / 8), _pump(theirs[0], writer, delay_s, bits_per_s / 8)
        )

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, bytes_per_s: float) -> None:
    """A piece leaves when those before it have left, and arrives ``delay_s`` later."""
    loop = asyncio.get_running_loop()
    free_at = 0.0

    def write(piece: bytes) -> None:
        if not writer.is_closing():
            writer.write(piece)

    with suppress(OSError):
        while piece := await reader.read(_PIECE):
            free_at = max(free_at, loop.time()) + (len(piece) / bytes_per_s if bytes_per_s else 0.0)
            loop.call_at(free_at + delay_s, write, piece)
            await asyncio.sleep(max(0.0, free_at - loop.time() - _MOST_WAITING_S))
    loop.call_at(max(free_at, loop.time()) + delay_s, writer.close)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
