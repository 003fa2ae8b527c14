"""Tasks of the event loop that nobody waits for at once: the loop itself keeps weak references only."""

from __future__ import annotations

import asyncio


class Tasks:
    """Keeps tasks until they are done. For the event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[None]] = set()

    def keep(self, task: asyncio.Future[None]) -> None:
        """Keep ``task`` until it is done."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait(self) -> None:
        """Wait until all that are kept now are done."""
        if self._running:
            await asyncio.wait(set(self._running))
