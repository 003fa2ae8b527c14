"""The commands as users start them, through a real TCP proxy, killed and frozen for real."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Boundary, Fault, Plan
from fault_run import FaultRun, Place, Reference, Replicas, make_place, record, replicas
from forked import spawn_command
from matrix import DEVICE, SERVER
from repeated_kills import storm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return replace(make_place(tmp_path_factory.mktemp("processes")), start=spawn_command)


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[Replicas]:
    with replicas(place, place.directory / "servers", SERVER, count=1) as found:
        yield found


@pytest.fixture(scope="module")
def reference(place: Place, running: Replicas) -> Reference:
    return record(place, running, place.directory / "reference" / "out", DEVICE, watch=False)


RECOVERIES = {
    Fault.KILL_SERVER: "step run again", Fault.KILL_DEVICE: "process restarted",
    Fault.FREEZE_SERVER: "resumed in place", Fault.FREEZE_DEVICE: "resumed in place",
}  # fmt: skip


@pytest.mark.parametrize("fault", RECOVERIES, ids=lambda fault: fault.name.lower())
def test_killed_or_frozen_process_changes_no_bit(
    place: Place, running: Replicas, reference: Reference, fault: Fault, tmp_path: Path
) -> None:
    message = random.Random(fault.name).randrange(12)
    fault_run = FaultRun(place, running, tmp_path / "out", DEVICE)
    fault_run.proxy.plan(Plan(fault, Boundary(step=2, nth=message)))
    outcome = fault_run.run()
    fault_run.compare(outcome, reference)
    assert not outcome.wrong
    assert outcome.recovery == RECOVERIES[fault]


def test_repeated_kills_change_no_bit(place: Place, running: Replicas, reference: Reference, tmp_path: Path) -> None:
    result = storm(place, running, reference, tmp_path / "out", DEVICE, kills=3, steps=5)
    assert result["bit_equal"], result["wrong"]
    assert (result["kills_server"], result["kills_device"]) == (1, 2)
    assert result["steps_lost"] == result["steps_doubled"] == 0
