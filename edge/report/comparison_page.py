"""A comparison as a page: runs side by side, their curves in the same plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dlora.edge.training.metrics import StepMetrics

from .comparison import Comparison
from .document import document
from .plots import Look, Plot, Value, joined
from .run_data import RunData
from .steps import MOST_PLOTTED, Thinned
from .tables import Best, Table

_COLOURS: Final = (0, 10, 4, 3, 7, 8, 1, 5, 2, 6)  # neighbours in this order are easy to tell apart


def comparison_page(comparison: Comparison) -> bytes:
    """The page."""
    names = comparison.names
    held_out = _held_out_plot(comparison)
    loss = _plot(comparison, "loss", "Loss of the steps", "mean of some steps", _mean_losses)
    traffic = _plot(comparison, "traffic", "Traffic", "MB a step", _of(_traffic, _bytes), factor=1e-6)
    time = _plot(comparison, "time", "Time", "seconds a step", _of(_time, lambda step: step.step_s))
    plots = [plot for plot in (held_out, loss, traffic, time) if plot.steps]
    rows = [(_indented(name), *(_marked(*value) for value in values)) for name, values in comparison.rows()]
    differing = [(option, *values) for option, values in comparison.differing.items()]
    return document(
        "comparison",
        f"{len(names)} runs of dlora",
        plots,
        plots=plots,
        names=names,
        runs=comparison.runs,
        warnings=comparison.warnings,
        differing=Table("Settings that differ", ("option", *names), differing, has_numbers=False),
        measures=Table("Of all steps; the best of a row is bold", ("measure", *names), rows),
        is_thinned=any(run.steps.is_thinned for run in comparison.runs),
        most_plotted=MOST_PLOTTED,
    )


def _marked(value: str, is_best: bool) -> str:
    return Best(value) if is_best else value


def _indented(name: str) -> str:
    return name.replace("  ", "\N{EM SPACE}")


def _held_out_plot(comparison: Comparison) -> Plot:
    return _plot(
        comparison,
        "held-out",
        "Held-out loss",
        "loss",
        lambda run: {each.step: each.loss for each in run.evaluations},
        look="points",
    )


def _plot(
    comparison: Comparison,
    name: str,
    title: str,
    y: str,
    values: Callable[[RunData], dict[int, Value]],
    *,
    factor: float = 1.0,
    look: Look = "strong",
) -> Plot:
    """One line a run; a run that has no values is left out."""
    lines = [
        (run_name, look, _COLOURS[index % len(_COLOURS)], found)
        for index, (run_name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True))
        if (found := values(run))
    ]
    return joined(name, title, y, lines, factor)


def _mean_losses(run: RunData) -> dict[int, Value]:
    kept = run.steps.by_loss
    return {step.step: mean for step, mean in zip(kept.kept, kept.means, strict=True)}


def _of(
    thinned: Callable[[RunData], Thinned], value: Callable[[StepMetrics], Value]
) -> Callable[[RunData], dict[int, Value]]:
    return lambda run: {step.step: value(step) for step in thinned(run).kept}


def _traffic(run: RunData) -> Thinned:
    return run.steps.by_traffic


def _time(run: RunData) -> Thinned:
    return run.steps.by_time


def _bytes(step: StepMetrics) -> int:
    return step.bytes_up + step.bytes_down
