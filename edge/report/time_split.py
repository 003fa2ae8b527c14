"""What the time of a step was spent on: shares that add up to it."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Final

from dlora.edge.training.metrics import StepMetrics

NAMES: Final = {
    "device": "device computes",
    "server": "server computes",
    "turn": "waiting for a turn",
    "wire": "wire",
    "rest": "rest",
}


def names_of(time: Split) -> dict[str, str]:
    """What each part of a run's time is called. Where no server told of its time, that is in the wire's."""
    return NAMES if time.server else {**NAMES, "wire": "server and wire"}


@dataclass(frozen=True)
class Split:
    """Seconds.

    Attributes:
        device: it computes; server: that computes, and the device waits; turn: the server computes for others, and the
            device waits; wire: the rest of what it waits; rest: of the step.
    """

    device: float = 0.0
    server: float = 0.0
    turn: float = 0.0
    wire: float = 0.0
    rest: float = 0.0

    def __add__(self, other: Split) -> Split:
        return Split(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def split_of(step: StepMetrics) -> Split:
    """Of one step. What the server computes while the device does is the device's."""
    device = min(step.edge_compute_s, step.step_s)
    waiting = min(step.waiting_s, step.step_s - device)
    server = min(step.server_compute_s, waiting)
    turn = min(step.server_queued_s, waiting - server)
    return Split(device, server, turn, waiting - server - turn, step.step_s - device - waiting)
