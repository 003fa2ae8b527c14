"""How many steps a second a fleet does, by a formula: a closed network with think times, solved by mean value analysis.

Devices think, then ask for a step, which needs processor time on a few cores that all share, and then think again. The
formula is exact for one core where times are exponential (Reiser & Lavenberg, Mean-value analysis of closed multichain
queuing networks, J. ACM 27(2), 1980); several cores are one core that is as fast as all of them, and a delay for the
rest of a step that runs on one (Seidmann, Schweitzer & Shalev-Oren, Computerized closed queueing network models of
flexible manufacturing systems, Large Scale Systems 12, 1987).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What one step takes, in seconds.

    Attributes:
        computed_s: of the cores that the devices share; waited_s: of anything else, such as the network.
    """

    computed_s: float
    waited_s: float = 0.0


@dataclass(frozen=True)
class Throughput:
    """What a fleet reaches.

    Attributes:
        steps_a_s: of all devices together; step_s: how long one step of a device takes; busy: share of all cores.
    """

    steps_a_s: float
    step_s: float
    busy: float


def throughput(devices: int, think_s: float, step: Step, cores: float) -> Throughput:
    """Of so many devices that think for ``think_s`` on the average between steps, on ``cores`` in all."""
    fast_s, delay_s = step.computed_s / cores, step.computed_s * (cores - 1) / cores + step.waited_s
    queue = steps_a_s = step_s = 0.0
    for there in range(1, devices + 1):
        queued_s = fast_s * (1 + queue)
        step_s = queued_s + delay_s
        steps_a_s = there / (think_s + step_s)
        queue = steps_a_s * queued_s
    return Throughput(steps_a_s, step_s, steps_a_s * fast_s)
