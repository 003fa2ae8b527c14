"""Open models that requests use one after the other: a few at a time, each with the context that it had last.

A slot is a thread with a model, that is an adapter and a session of its own. A request gets the free slot that knows
most of its context already, so that the next turn of a chat sends only what is new. Where all are taken it waits
in line; where the line is full it is refused at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlora.edge.model.context import Context, common_prefix
from dlora.edge.model.ends import LongArray
from dlora.edge.model.generating import GeneratingModel
from dlora.protocol.errors import DloraError

from .errors import QUEUE_RETRY_S, RequestError


@dataclass(frozen=True)
class ServedAdapter:
    """What a request names.

    Attributes:
        name: as clients spell it; path: None for the plain base model.
        version, inode: of its weights, when they were changed (ns since 1970) and which file they are: others are
            opened anew. A clock that was set back may give two files one time.
    """

    name: str
    path: Path | None
    version: int = 0
    inode: int = 0


OpenModel = Callable[[ServedAdapter], AbstractContextManager[GeneratingModel]]


class Slot:
    """One open model. All but ``fits`` is for its thread.

    Attributes:
        adapter: what is open; None: nothing.
        used_at: when it was last given to a request.
    """

    def __init__(self, number: int) -> None:
        self.thread = ThreadPoolExecutor(1, f"slot-{number}")
        self.adapter: ServedAdapter | None = None
        self.used_at = 0.0
        self._ids: LongArray = np.zeros(0, np.int64)
        self._context: Context | None = None
        self._open = ExitStack()

    def fits(self, adapter: ServedAdapter, ids: LongArray) -> tuple[int, int]:
        """How well it fits a request: best where its text goes on, by the tokens that are known; then an empty one;
        then one with the same adapter open, and last another's."""
        if self.adapter is None:
            return 2, 0
        if self.adapter != adapter:
            return 0, 0
        known = common_prefix(self._ids, ids)
        # What two chats have in common, a system's message say, does not make the one the other's next turn.
        return (3, known) if 2 * known > len(self._ids) else (1, 0)

    def context(self, adapter: ServedAdapter, open_model: OpenModel) -> Context:
        """The context of ``adapter``, opened where it is not. Raises what ``open_model`` does."""
        if self._context is None or self.adapter != adapter:
            self.close()
            self._context = Context(self._open.enter_context(open_model(adapter)))
            self.adapter = adapter
        return self._context

    def remember(self, ids: LongArray) -> None:
        """What the context is now."""
        self._ids = ids

    def close(self) -> None:
        """Close what is open."""
        self.adapter, self._context = None, None
        self.remember(np.zeros(0, np.int64))
        with contextlib.suppress(DloraError):
            self._open.close()


class Slots:
    """A few slots and a line. For the event loop.

    Args:
        count: how many requests are answered at a time.
        queue: how many wait; more are refused with 429.

    Attributes:
        busy: how many requests have a slot, or are about to; waiting: how many stand in line.
    """

    def __init__(self, count: int, queue: int) -> None:
        self._free = [Slot(number) for number in range(count)]
        self._all = tuple(self._free)
        self._queue = queue
        self._turns = asyncio.Semaphore(count)  # who waits longest comes next, also before who comes just then
        self.busy = 0
        self.waiting = 0

    @asynccontextmanager
    async def take(self, adapter: ServedAdapter, encode: Callable[[], Awaitable[LongArray]]) -> AsyncIterator[Slot]:
        """A slot for a request; ``encode`` gives its prompt, once its turn has come: so prompts of those who wait cost
        nothing, and no more are encoded at a time than are answered.

        Raises ``RequestError`` (429) where the line is full, and what ``encode`` does.
        """
        # Both together: whose turn has come counts as waiting until its task runs.
        if self.busy + self.waiting >= len(self._all) + self._queue:
            text = f"{self.busy} answers are under way and {self.waiting} requests wait; come again"
            raise RequestError(429, text, code="queue_full", retry_after_s=QUEUE_RETRY_S)
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        self.busy += 1
        try:
            ids = await encode()
            # Of equal ones the one that was used longest ago gives way.
            slot = max(self._free, key=lambda each: (*each.fits(adapter, ids), -each.used_at))
            self._free.remove(slot)
            slot.used_at = time.monotonic()
            try:
                yield slot
            finally:
                self._free.append(slot)
        finally:
            self.busy -= 1
            self._turns.release()

    async def close(self) -> None:
        """Close all that is open, once what runs there has ended."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(slot.thread, slot.close) for slot in self._all))
        for slot in self._all:
            slot.thread.shutdown(wait=False)
