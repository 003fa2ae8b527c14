"""A comparison as a page: runs side by side, their curves in the same plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .comparison import Comparison
from .document import document
from .plots import Look, Plot, Value, joined
from .run_data import RunData
from .steps import MOST_PLOTTED
from .tables import Best, Table

_COLOURS: Final = (0, 10, 4, 3, 7, 8, 1, 5, 2, 6)  # neighbours in this order are easy to tell apart


def comparison_page(comparison: Comparison) -> bytes:
    """The page."""
    names = comparison.names
    plots = [
        _plot(
            comparison,
            "held-out",
            "Held-out loss",
            "loss",
            lambda run: {each.step: each.loss for each in run.evaluations},
            look="points",
        ),
        _plot(
            comparison,
            "loss",
            "Loss of the steps",
            "mean of some steps",
            lambda run: {step.step: mean for step, mean in run.steps.by_loss.with_means},
        ),
        _plot(
            comparison,
            "traffic",
            "Traffic",
            "MB a step",
            lambda run: {step.step: step.bytes_up + step.bytes_down for step in run.steps.by_traffic.kept},
            factor=1e-6,
        ),
        _plot(
            comparison,
            "time",
            "Time",
            "seconds a step",
            lambda run: {step.step: step.step_s for step in run.steps.by_time.kept},
        ),
    ]
    plots = [plot for plot in plots if plot.steps]
    rows = [
        (name.replace("  ", "\N{EM SPACE}"), *(Best(value) if is_best else value for value, is_best in values))
        for name, values in comparison.rows()
    ]
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
