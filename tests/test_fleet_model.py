"""benchmarks/fleet_model.py: its steps a second, against what is known of such queues."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from fleet_model import throughput


@pytest.mark.parametrize("devices", [1, 3, 10])
def test_one_core_is_the_machine_repair_model(devices: int) -> None:
    """Which has a closed form: the core is idle with probability 1 / sum(N! / (N - n)! (computed / think)^n)."""
    think_s, computed_s = 2.0, 0.5
    ways = sum(math.perm(devices, n) * (computed_s / think_s) ** n for n in range(devices + 1))
    found = throughput(devices, think_s, computed_s, cores=1)
    assert found.steps_a_s == pytest.approx((1 - 1 / ways) / computed_s)
    assert found.busy == pytest.approx(1 - 1 / ways)


def test_few_devices_wait_for_nobody_and_many_for_the_cores() -> None:
    alone, crowd = (throughput(devices, 1.0, 0.5, cores=4) for devices in (1, 1000))
    assert alone.step_s == pytest.approx(0.5)
    assert alone.steps_a_s == pytest.approx(1 / 1.5)
    assert crowd.steps_a_s == pytest.approx(8, rel=1e-3)
    assert crowd.step_s == pytest.approx(1000 / 8 - 1.0, rel=1e-3)
