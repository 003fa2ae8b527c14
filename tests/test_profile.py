"""``--profile``: what both sides did when, on one clock whose error is known; off, it changes nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from processes import run_edge
from test_resume import Place, place

from dlora.edge.report.trace import _offset, trace
from dlora.edge.wire.spans import COMPUTE, ServerMessage, Spans
from dlora.protocol.errors import UsageError
from dlora.protocol.messages import MAX_TIMES

__all__ = ["place"]  # a fixture

Event = dict[str, Any]


def events(path: Path, process: int, lane: str) -> list[Event]:
    """Spans of one lane, in their order."""
    found = json.loads(path.read_bytes())["traceEvents"]
    lanes = {
        event["tid"]: event["args"]["name"]
        for event in found
        if event["ph"] == "M" and event["name"] == "thread_name" and event["pid"] == process
    }
    spans = [event for event in found if event["ph"] == "X" and event["pid"] == process]
    return sorted((each for each in spans if lanes[each["tid"]] == lane), key=lambda each: each["ts"])


def assert_apart(spans: list[Event]) -> None:
    """Of one lane, none begins before the one before it has ended, but for rounding."""
    for one, other in pairwise(spans):
        assert other["ts"] >= one["ts"] + one["dur"] - 0.01


def test_some_steps_of_both_sides_are_on_one_clock(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = run_edge(*place.train(tmp_path / "out", "--steps", 9, "--profile", path, "--profile-steps", 4))
    assert done.code == 0, done.stderr
    steps = [each for each in events(path, 1, "steps") if each["name"].startswith("step ")]
    assert [each["name"] for each in steps] == ["step 3", "step 4", "step 5", "step 6"]
    names = {each["name"] for each in events(path, 1, "computes")}
    assert {"embedding", "head and loss", "optimizer", "forward 0", "input gradient 1", "weight gradients 0"} <= names
    for lane in ("computes", "sends", "waits for the server"):
        assert_apart(events(path, 1, lane))
    assert_apart(events(path, 2, "computes"))
    about = json.loads(path.read_bytes())["otherData"]
    error = about["server_clock_error_us"]
    assert 0 < error < 1e5
    computed = events(path, 2, "computes")
    assert {each["name"] for each in computed} >= {"to group input 0", "to labelled hidden states", "to group grad 0"}
    # The server computes for a step within that step of the device's.
    for step in steps:
        inside = [each for each in computed if step["ts"] - error <= each["ts"] <= step["ts"] + step["dur"]]
        assert len(inside) > 5
        assert all(each["ts"] + each["dur"] <= step["ts"] + step["dur"] + error for each in inside)


def test_off_it_changes_no_bit(place: Place, tmp_path: Path) -> None:
    on, off = tmp_path / "on", tmp_path / "off"
    assert run_edge(*place.train(on, "--steps", 8, "--profile", tmp_path / "trace.json")).code == 0
    assert run_edge(*place.train(off, "--steps", 8)).code == 0
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (on, off)]
    assert weights[0] == weights[1]
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (on, off)]
    for one, other in zip(*rows, strict=True):
        assert [one[name] for name in ("loss", "up", "down")] == [other[name] for name in ("loss", "up", "down")]


def test_a_run_that_ends_early_has_what_there_is(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert run_edge(*place.train(tmp_path / "out", "--steps", 5, "--profile", path)).code == 0
    names = [each["name"] for each in events(path, 1, "steps")]
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4"]
    done = run_edge(*place.train(tmp_path / "other", "--steps", 5, "--profile", tmp_path / "none" / "trace.json"))
    assert (done.code, len(done.errors)) == (UsageError.exit_code, 1), done.stderr
    assert not (tmp_path / "other").exists()


def test_a_clock_that_is_ahead_is_found() -> None:
    """To the error that is told, whatever the wire takes each way."""
    ahead = 1000.0
    messages = [
        ServerMessage("m", 0, sent, sent + up + 0.5 + down, waits(sent + up + ahead, 0.5))
        for sent, up, down in ((0.0, 0.010, 0.030), (2.0, 0.002, 0.004), (4.0, 0.005, 0.001))
    ]
    offset = _offset(0, messages)
    assert abs(offset.seconds - ahead) <= offset.error_s <= 0.0016
    spans = Spans(is_on=True, server=messages)
    spans.add("embedding", COMPUTE, 0.0, 0.1)
    found = json.loads(trace(spans))
    (first, *_) = [each for each in found["traceEvents"] if each["pid"] == 2 and each["ph"] == "X"]
    assert first["ts"] == pytest.approx(0.010 * 1e6, abs=offset.error_s * 1e6)


def waits(arrived: float, computed_s: float) -> tuple[float, ...]:
    """A message that arrives and is answered after some computing."""
    return arrived, arrived, arrived, arrived + computed_s


def test_without_steps_a_trace_is_empty() -> None:
    assert json.loads(trace(Spans()))["otherData"] == {"clock": "the device's, in microseconds since the first span"}
    assert MAX_TIMES % 3 == 1
