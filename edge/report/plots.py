"""What is plotted, as the page's script takes it: numbers as they stand in ``metrics.jsonl``, none rounded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from dlora.edge.training.metrics import StepMetrics
from dlora.edge.wire.usage import OTHER, REPORT, SIGNAL
from dlora.protocol.wire_codecs import TensorRole

from .run_data import RunData
from .time_split import names_of, split_of

# Of each role the same on every page; from below to the top.
_COLOURS_UP: Final = {
    TensorRole.EMBEDDINGS.value: 0,
    TensorRole.DELTA.value: 1,
    TensorRole.INPUT_GRAD.value: 2,
    TensorRole.LAST_HIDDEN_STATES_GRAD.value: 3,
    TensorRole.ADAPTER_STATE.value: 7,
    TensorRole.GROUP_PARAMETERS.value: 10,
    REPORT: 8,
    OTHER: 9,
}
_COLOURS_DOWN: Final = {
    TensorRole.GROUP_INPUT.value: 4,
    TensorRole.DELTA_GRAD.value: 5,
    TensorRole.LAST_HIDDEN_STATES.value: 6,
    TensorRole.ADAPTER_STATE.value: 7,
    TensorRole.GROUP_PARAMETERS.value: 10,
    SIGNAL: 8,
    OTHER: 9,
}
_TIME_COLOURS: Final = {"device": 0, "server": 4, "turn": 7, "wire": 5, "rest": 9}

Look = Literal["line", "faint", "strong", "points", "area"]
Value = float | int | None
Drawn = tuple[str, Look, int, Mapping[int, Value]]
"""A line's label, look and colour, and its values by step."""


class Series(msgspec.Struct, frozen=True):
    """One line, some points, or a layer of areas on top of each other.

    Attributes:
        values: one for each of the plot's steps; None where there is none.
        colour: a number, as the stylesheet has it; 0 is the accent.
    """

    label: str
    look: Look
    colour: int
    values: Sequence[Value]


class Plot(msgspec.Struct, frozen=True):
    """One plot over steps.

    Attributes:
        id: of its place in the page; x, y: what its axes say.
        steps: how many steps were done before each value's.
        factor: that values are shown with: 1e-6 for bytes as megabytes.
    """

    id: str
    title: str
    y: str
    steps: Sequence[int]
    series: Sequence[Series]
    factor: float = 1.0
    starts_at_zero: bool = False
    x: str = "step"


def loss_plot(run: RunData) -> Plot:
    """The loss of steps, its mean, and held-out losses."""
    thinned = run.steps.by_loss
    drawn: list[Drawn] = [("loss of a step", "faint", 0, {step.step: step.loss for step in thinned.kept})]
    if run.steps.count > run.steps.mean_of:
        means = {step.step: mean for step, mean in thinned.with_means}
        drawn.append((f"mean of {run.steps.mean_of} steps", "strong", 0, means))
    if run.evaluations:
        drawn.append(("held-out loss", "points", 10, {each.step: each.loss for each in run.evaluations}))
    return joined("loss", "Loss", "loss", drawn)


def joined(name: str, title: str, y: str, drawn: Sequence[Drawn], factor: float = 1.0) -> Plot:
    """A plot of lines that each have steps of their own."""
    steps = sorted({step for *_, values in drawn for step in values})
    series = [
        Series(label, look, colour, [values.get(step) for step in steps]) for label, look, colour, values in drawn
    ]
    return Plot(name, title, y, steps, series, factor)


def curve_plot(run: RunData, name: str, title: str, y: str, value: Callable[[StepMetrics], float]) -> Plot:
    """One number of the steps."""
    return joined(name, title, y, [(y, "strong", 0, {step.step: value(step) for step in run.steps.by_loss.kept})])


def traffic_plot(run: RunData) -> Plot:
    """What each step put on the wire, by role."""
    kept = run.steps.by_traffic.kept
    series = [
        Series(f"{role_name(role)}\N{NO-BREAK SPACE}↑", "area", colour, [step.up.get(role, 0) for step in kept])
        for role, colour in _COLOURS_UP.items()
        if role in run.steps.up
    ]
    series += [
        Series(f"{role_name(role)}\N{NO-BREAK SPACE}↓", "area", colour, [step.down.get(role, 0) for step in kept])
        for role, colour in _COLOURS_DOWN.items()
        if role in run.steps.down
    ]
    steps = [step.step for step in kept]
    return Plot("traffic", "Traffic", "MB a step", steps, series, factor=1e-6, starts_at_zero=True)


def time_plot(run: RunData) -> Plot:
    """What the time of each step was spent on."""
    kept = run.steps.by_time.kept
    splits = [split_of(step) for step in kept]
    series = [
        Series(label, "area", _TIME_COLOURS[name], [getattr(split, name) for split in splits])
        for name, label in names_of(run.steps.time).items()
        if getattr(run.steps.time, name) > 0
    ]
    return Plot("time", "Time", "seconds a step", [step.step for step in kept], series, starts_at_zero=True)


def role_name(role: str) -> str:
    """A role in words."""
    return role.replace("_grad", " gradients").replace("_", " ").replace("delta gradients", "gradients of deltas")


def picked(plot: Plot, most: int = 25) -> list[int]:
    """The places of some steps, evenly over the run, the first and the last among them: for a table."""
    if len(plot.steps) <= most:
        return list(range(len(plot.steps)))
    first, last = plot.steps[0], plot.steps[-1]
    wanted = (first + (last - first) * index / (most - 1) for index in range(most))
    return sorted({min(bisect_left(plot.steps, step), len(plot.steps) - 1) for step in wanted})
