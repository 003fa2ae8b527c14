"""A run as a page: a function of what its directory has."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from .document import document
from .map import has_changed, kr_map
from .numbers import count, loss, mb, seconds
from .plots import curve_plot, loss_plot, time_plot, traffic_plot
from .run_data import RunData, read_run
from .settings import shown_settings
from .steps import MOST_PLOTTED
from .tables import data_table, evaluations_table, time_table, traffic_table, versions

_WHERE: Final = {"0": "frozen blocks on the server", "all": "all blocks on the device"}
_BOTH: Final = "first blocks on the server, last ones on the device"


class Card(NamedTuple):
    """One of the things that matter most.

    Attributes:
        below: a line in small letters; is_bad: whether it is red.
    """

    name: str
    value: str
    below: str
    is_bad: bool = False


def run_page(out: Path) -> bytes:
    """The page of the run in ``out``. Raises ``CheckpointError`` where there is none, or a file is damaged."""
    run = read_run(out)
    steps, file = run.steps, run.file
    about: dict[str, object] = {
        "run": run,
        "where": _WHERE.get(file.settings.placement.device_blocks, _BOTH),
        "data": data_table(run),
        "settings": shown_settings(file.settings),
        "versions": versions(run),
        "most_plotted": MOST_PLOTTED,
    }
    if not steps.count:
        return document("run", run.name, (), **about)
    plots = {
        "loss": loss_plot(run),
        "rate": curve_plot(run, "rate", "Learning rate", "learning rate", lambda step: step.learning_rate),
        "gradient": curve_plot(run, "gradient", "Gradients before clipping", "norm", lambda step: step.grad_norm),
        "traffic": traffic_plot(run),
        "time": time_plot(run),
    }
    units = len(steps.states[0][1])
    unit = "group" if file.blocks is None else "block"
    names = file.blocks if file.blocks is not None and len(file.blocks) == units else range(units)
    return document(
        "run",
        f"{run.name}: a run of dlora",
        [plot for plot in plots.values() if plot.steps],
        **about,
        **plots,
        saved_step=(run.summary or {}).get("saved_step"),
        cards=_cards(run),
        evaluations=evaluations_table(run),
        traffic_by_role=traffic_table(run),
        time_by_part=time_table(run),
        units=units,
        unit=unit,
        map=kr_map(steps, unit, names) if units and has_changed(steps) else None,
    )


def _cards(run: RunData) -> list[Card]:
    """What matters most, in a row."""
    steps, summary = run.steps, run.summary or {}
    made = []
    if run.before is not None and run.after is not None:
        best = run.best
        below = f"best {loss(best.loss)} after {count(best.step)} steps" if best is not None else ""
        values = f"{loss(run.before.loss)} → {loss(run.after.loss)}"
        made.append(Card("held-out loss", values, below, run.worsening is not None))
        if run.live_loss is not None:
            in_passes = f"the run's own are in passes {run.file.settings.server.passes}"
            is_worse = bool(summary.get("is_worse_live"))
            made.append(Card("held-out loss live, as PEFT", loss(run.live_loss), in_passes, is_worse))
        right, whole = (
            f"{getattr(run.before, name):.1%} → {getattr(run.after, name):.1%}"
            for name in ("token_accuracy", "exact_match")
        )
        made.append(Card("held-out tokens right", right, f"examples wholly right {whole}"))
    elif steps.last is not None:
        made.append(Card("loss of the last step", loss(steps.last.loss), f"step {count(steps.last.step)}"))
    each = f"{mb(steps.bytes_up)} ↑ · {mb(steps.bytes_down)} ↓"
    if not steps.crossed:
        each = "all of it before the steps" if steps.bytes else "no server was asked"
    elif steps.set_up_bytes:
        each += f"; of it set-up {mb(steps.set_up_bytes)}"
    made.append(Card("traffic", mb(steps.bytes), each))
    wall = summary.get("wall_s") if not summary.get("first_step") else None
    below = f"{seconds(steps.step_s / steps.count)} a step"
    if isinstance(wall, float):
        below += f"; with set-up and evaluations {seconds(wall)}"
    made.append(Card("time of the steps", seconds(steps.step_s), below))
    tokens = f"{count(steps.tokens)} tokens, {count(steps.labelled)} labels"
    made.append(Card("speed", f"{count(steps.tokens / steps.step_s)} tokens/s", tokens))
    made.append(Card("peak memory", f"{count(steps.peak_rss_mb)} MB", "of the device's process"))
    return made
