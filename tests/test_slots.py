"""The line before the endpoint's slots: who comes next, and that nobody who leaves takes a place along."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from dlora.edge.adapters.peft import WEIGHTS_NAME
from dlora.edge.endpoint.errors import RequestError
from dlora.edge.endpoint.running import _version
from dlora.edge.endpoint.slots import ServedAdapter, Slot, Slots

FIRST, SECOND = ServedAdapter("first", Path("first")), ServedAdapter("second", Path("second"))
NOTHING = np.zeros(0, np.int64)


def opened(slot: Slot, adapter: ServedAdapter, *ids: int) -> Slot:
    slot.adapter = adapter
    slot.remember(np.array(ids, np.int64))
    return slot


def test_a_request_gets_the_slot_that_knows_its_text() -> None:
    slots = [Slot(number) for number in range(4)]
    opened(slots[0], SECOND, 1, 2, 3, 4)
    opened(slots[1], FIRST, 1, 2, 9, 9, 9, 9, 9)
    opened(slots[2], FIRST, 1, 2, 3, 4)
    asked = np.array([1, 2, 3, 4, 5])
    ranks = [slot.fits(FIRST, asked) for slot in slots]
    assert sorted(range(4), key=ranks.__getitem__, reverse=True) == [2, 3, 1, 0]


def test_other_weights_of_the_same_time_are_another_version(tmp_path: Path) -> None:
    """The clock was set back in between."""
    weights, new = tmp_path / WEIGHTS_NAME, tmp_path / "new"
    weights.write_bytes(b"one")
    time = weights.stat().st_mtime_ns
    before = _version(tmp_path)
    new.write_bytes(b"two")
    os.utime(new, ns=(time, time))
    new.replace(weights)
    assert _version(tmp_path) != before


async def hold(slots: Slots, until: asyncio.Event, order: list[str], name: str) -> None:
    async with slots.take(FIRST, NOTHING):
        order.append(name)
        await until.wait()


def test_who_waits_longest_comes_next_and_the_line_has_an_end() -> None:
    async def run() -> list[str]:
        slots, order = Slots(1, 2), list[str]()
        events = {name: asyncio.Event() for name in "abcd"}
        tasks = {}
        for name in "abc":
            tasks[name] = asyncio.create_task(hold(slots, events[name], order, name))
            await asyncio.sleep(0)
        assert (slots.busy, slots.waiting) == (1, 2)
        with pytest.raises(RequestError, match="come again"):
            await hold(slots, events["d"], order, "d")
        for name in "abc":
            events[name].set()
            await tasks[name]
        assert (slots.busy, slots.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]


@pytest.mark.parametrize("cancel_first", [True, False])
def test_one_who_leaves_the_line_takes_no_place(cancel_first: bool) -> None:
    """Also in the very moment in which it would be their turn."""

    async def run() -> list[str]:
        slots, order = Slots(1, 4), list[str]()
        first, rest = asyncio.Event(), asyncio.Event()
        rest.set()
        holder = asyncio.create_task(hold(slots, first, order, "holder"))
        await asyncio.sleep(0)
        leaver = asyncio.create_task(hold(slots, rest, order, "leaver"))
        await asyncio.sleep(0)
        other = asyncio.create_task(hold(slots, rest, order, "other"))
        await asyncio.sleep(0)
        if cancel_first:
            leaver.cancel()
            first.set()
        else:
            first.set()
            await asyncio.sleep(0)
            leaver.cancel()
        done = await asyncio.wait_for(asyncio.gather(holder, leaver, other, return_exceptions=True), 10)
        assert done[0] is None
        assert done[2] is None
        assert isinstance(done[1], asyncio.CancelledError | None)
        assert (slots.busy, slots.waiting) == (0, 0)
        async with slots.take(FIRST, NOTHING):  # there is a place again
            pass
        return order

    order = asyncio.run(run())
    assert order[0] == "holder"
    assert order[-1] == "other"
