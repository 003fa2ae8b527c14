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
from dlora.edge.model.ends import LongArray
from dlora.protocol.errors import DataError

FIRST, SECOND = ServedAdapter("first", Path("first")), ServedAdapter("second", Path("second"))


async def no_prompt() -> LongArray:
    return np.zeros(0, np.int64)


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
    async with slots.take(FIRST, no_prompt):
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


def test_whose_turn_has_come_no_longer_fills_the_line() -> None:
    """One ends, and another comes before the task of the one that waited has run."""

    async def three() -> list[str]:
        slots, end = Slots(1, 1), asyncio.Event()
        order: list[str] = []
        end.set()
        async with slots.take(FIRST, no_prompt):
            second = asyncio.create_task(hold(slots, end, order, "second"))
            while not slots.waiting:
                await asyncio.sleep(0)
        await hold(slots, end, order, "third")  # in the same pass of the loop
        await second
        return order

    assert asyncio.run(three()) == ["second", "third"]


def test_prompts_of_those_who_wait_are_not_encoded() -> None:
    """Nor of those for whom there is no place; and one that cannot be encoded gives its place to the next."""

    async def run() -> list[str]:
        slots, encoded = Slots(1, 2), list[str]()
        until = asyncio.Event()

        async def ask(name: str) -> None:
            async def encode() -> LongArray:
                encoded.append(name)
                await until.wait()
                if name == "b":
                    raise DataError("say less")
                return await no_prompt()

            async with slots.take(FIRST, encode):
                assert slots.busy == 1

        asked = [asyncio.create_task(ask(name)) for name in "abcd"]
        (refused,), _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(refused.exception(), RequestError)
        assert encoded == ["a"]
        assert (slots.busy, slots.waiting) == (1, 2)
        until.set()
        done = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
        assert [type(each) for each in done] == [type(None), DataError, type(None), RequestError]
        assert (slots.busy, slots.waiting) == (0, 0)
        return encoded

    assert asyncio.run(run()) == ["a", "b", "c"]


@pytest.mark.parametrize("cancel_first", [True, False])
def test_one_who_leaves_the_line_takes_no_place(cancel_first: bool) -> None:
    """Also in the very moment in which it would be their turn."""

    async def run() -> list[str]:
        slots, order = Slots(1, 4), list[str]()
        first, rest = asyncio.Event(), asyncio.Event()
        rest.set()
        tasks = []
        for name in ("holder", "leaver", "other"):
            tasks.append(asyncio.create_task(hold(slots, first if name == "holder" else rest, order, name)))
            await asyncio.sleep(0)
        if cancel_first:
            tasks[1].cancel()
        first.set()
        await asyncio.sleep(0)
        if not cancel_first:
            tasks[1].cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert done[0] is None
        assert done[2] is None
        assert isinstance(done[1], asyncio.CancelledError | None)
        assert (slots.busy, slots.waiting) == (0, 0)
        async with slots.take(FIRST, no_prompt):  # there is a place again
            pass
        return order

    order = asyncio.run(run())
    assert order[0] == "holder"
    assert order[-1] == "other"
