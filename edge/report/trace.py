"""A profile of some steps as Chrome and Perfetto read traces: both sides, on the device's clock.

The server's clock is another. Whenever the device sends at d0, the server has it at s1, answers at s2, and the device
has that at d3, the server's clock is ahead by at least s2 - d3 and at most s1 - d0, as nothing arrives before it was
sent. All exchanges of a step together leave an interval: its middle is taken, and half of it is the largest error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from dlora.edge.wire.spans import COMPUTE, SEND, STEPS, WAIT, ServerMessage, Spans

_DEVICE: Final = (1, "device", (STEPS, COMPUTE, SEND, WAIT))
_SERVER_LANES: Final = ("computes", "waits for its turn", "waits for the device")
_SERVER: Final = (2, "server, on the device's clock", _SERVER_LANES)


@dataclass(frozen=True)
class Offset:
    """By how many seconds the server's clock is ahead in a step, and how wrong that may be."""

    step: int
    seconds: float
    error_s: float


def trace(spans: Spans) -> bytes:
    """The JSON. Times are microseconds since the first span began."""
    zero = min((span.start for span in spans.device), default=0.0)
    events = [*_names(_DEVICE), *(_names(_SERVER) if spans.server else [])]
    for span in spans.device:
        lane = _DEVICE[2].index(span.lane) + 1
        events.append(_event(span.name, 1, lane, span.start - zero, span.end - zero, span.args))
    offsets = []
    for step, messages in groupby(spans.server, key=lambda each: each.step):
        of_step = list(messages)
        offsets.append(offset := _offset(step, of_step))
        for name, lane, start, end in _server_spans(of_step):
            ahead = offset.seconds + zero
            events.append(_event(name, 2, lane + 1, start - ahead, end - ahead, {}))
    about: dict[str, Any] = {"clock": "the device's, in microseconds since the first span"}
    if offsets:
        about["server_clock_error_us"] = round(max(offset.error_s for offset in offsets) * 1e6, 1)
        about["server_clock"] = (
            "each step's offset is the middle of what its exchanges leave; a span of the server's is off by at most "
            "server_clock_error_us"
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}).encode() + b"\n"


def _offset(step: int, messages: Sequence[ServerMessage]) -> Offset:
    least, most = -float("inf"), float("inf")
    for message in messages:
        *waits, sent = message.times
        least = max(least, sent - message.received)
        # What waited for its turn had come before.
        arrived = [
            received
            for began, received, turn in zip(waits[::3], waits[1::3], waits[2::3], strict=True)
            if began < received or received == turn
        ]
        if arrived:
            most = min(most, arrived[-1] - message.sent)
    if most == float("inf"):
        most = least
    return Offset(step, (least + most) / 2, abs(most - least) / 2)


def _server_spans(messages: Sequence[ServerMessage]) -> Iterator[tuple[str, int, float, float]]:
    """Name, lane, start and end by the server's clock: it computes from a turn to the next wait, or to a message."""
    since: float | None = None
    before = ""
    for message in messages:
        *waits, sent = message.times
        for began, received, turn in zip(waits[::3], waits[1::3], waits[2::3], strict=True):
            is_first = began == received == turn  # a micro-batch has arrived
            if since is not None and not is_first and began > since:
                yield f"after {before}" if before else "begins", 0, since, began
            if received > began:
                yield "waits", 2, began, received
            if turn > received:
                yield "turn", 1, received, turn
            since = turn
        if since is not None:
            yield f"to {message.name}", 0, since, sent
        since, before = sent, message.name


def _event(name: str, process: int, lane: int, start: float, end: float, args: dict[str, int]) -> dict[str, Any]:
    return {
        "name": name, "ph": "X", "pid": process, "tid": lane, "ts": round(start * 1e6, 3),
        "dur": round(max(0.0, end - start) * 1e6, 3), **({"args": args} if args else {}),
    }  # fmt: skip


def _names(process: tuple[int, str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    number, name, lanes = process
    yield {"name": "process_name", "ph": "M", "pid": number, "tid": 0, "args": {"name": name}}
    for index, lane in enumerate(lanes):
        yield {"name": "thread_name", "ph": "M", "pid": number, "tid": index + 1, "args": {"name": lane}}
