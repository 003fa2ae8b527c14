"""A run as a page: a function of what its directory has."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .document import document, plot_place, without_script
from .html import Html, element, section
from .map import MOST_COLUMNS, has_changed, kr_map
from .numbers import count, loss, mb, seconds
from .plots import Plot, gradient_plot, learning_rate_plot, loss_plot, time_plot, traffic_plot
from .run_data import RunData, read_run
from .steps import MOST_PLOTTED
from .tables import (
    data_table,
    evaluations_table,
    settings_table,
    time_table,
    traffic_table,
    values_table,
    versions_table,
)
from .time_split import MEANING

_MODES: Final = {
    "split": "frozen blocks on the server",
    "trunk": "first blocks on the server, last ones on the device",
    "local": "all blocks on the device",
}


def run_page(out: Path) -> bytes:
    """The page of the run in ``out``. Raises ``CheckpointError`` where there is none, or a file is damaged."""
    return page_of(read_run(out))


def page_of(run: RunData) -> bytes:
    """The page of a run."""
    if not run.steps.count:
        parts = [_header(run), element("p", "No step is done yet.")]
        return document(run.name, (), *parts, *_about(run))
    loss_, rate, gradient = loss_plot(run), learning_rate_plot(run), gradient_plot(run)
    traffic, time = traffic_plot(run), time_plot(run)
    return document(
        f"{run.name}: a run of dlora",
        [loss_, rate, gradient, *([traffic] if run.steps.crossed else []), time],
        _header(run),
        _worse(run),
        cards(run),
        without_script(),
        section(
            "Loss",
            plot_place(loss_, tall=True),
            values_table(loss_),
            evaluations_table(run) if run.evaluations else None,
        ),
        element("div", _small(rate), _small(gradient), class_="pair"),
        _traffic(run, traffic),
        section("Where the time went", plot_place(time, tall=True), values_table(time), time_table(run), note=MEANING),
        _map(run),
        *_about(run),
    )


def _header(run: RunData) -> Html:
    settings, steps = run.file.settings, run.steps
    done = f"{count(steps.count)} of {count(steps.total)} steps" if steps.count else "no steps yet"
    state = "done" if run.is_done else "not done"
    what = f"{run.file.base_model.get('name', '')} · {settings.kind or ''} · {_MODES.get(settings.mode, settings.mode)}"
    return element("header", element("h1", run.name), element("p", f"{what} · {done}, {state}"))


def _worse(run: RunData) -> Html | None:
    """That the run makes the model worse, and which adapter it has saved."""
    if run.worsening is None:
        return None
    saved = (run.summary or {}).get("saved_step")
    kept = ""
    if saved is not None and saved < run.steps.count:
        kept = f" Saved is the adapter of step {count(saved)}." if saved else " Saved is what the run began with."
    return element("p", f"Worse than before: {run.worsening}.{kept}", class_="worse")


def cards(run: RunData) -> Html:
    """What matters most, in a row."""
    steps, summary = run.steps, run.summary or {}
    made = []
    if run.before is not None and run.after is not None:
        best = run.best
        below = f"best {loss(best.loss)} after {count(best.step)} steps" if best is not None else ""
        values = f"{loss(run.before.loss)} → {loss(run.after.loss)}"
        made.append(_card("held-out loss", values, below, is_bad=run.worsening is not None))
        right, whole = (
            f"{getattr(run.before, name):.1%} → {getattr(run.after, name):.1%}"
            for name in ("token_accuracy", "exact_match")
        )
        made.append(_card("held-out tokens right", right, f"examples wholly right {whole}"))
    elif steps.last is not None:
        made.append(_card("loss of the last step", loss(steps.last.loss), f"step {count(steps.last.step)}"))
    each = f"{mb(steps.bytes_up)} ↑ · {mb(steps.bytes_down)} ↓"
    if not steps.crossed:
        each = "all of it before the steps" if steps.bytes else "no server was asked"
    elif steps.set_up_bytes:
        each += f"; of it set-up {mb(steps.set_up_bytes)}"
    made.append(_card("traffic", mb(steps.bytes), each))
    wall = summary.get("wall_s") if not summary.get("first_step") else None
    below = f"{seconds(steps.step_s / steps.count)} a step"
    if isinstance(wall, float):
        below += f"; with set-up and evaluations {seconds(wall)}"
    made.append(_card("time of the steps", seconds(steps.step_s), below))
    tokens = f"{count(steps.tokens)} tokens, {count(steps.labelled)} labels"
    made.append(_card("speed", f"{count(steps.tokens / steps.step_s)} tokens/s", tokens))
    made.append(_card("peak memory", f"{count(steps.peak_rss_mb)} MB", "of the device's process"))
    return element("dl", *made, class_="cards")


def _card(name: str, value: str, below: str, *, is_bad: bool = False) -> Html:
    class_ = "card bad" if is_bad else "card"
    return element("div", element("dt", name), element("dd", value), element("dd", below), class_=class_)


def _small(plot: Plot) -> Html:
    return section(plot.title, plot_place(plot), values_table(plot))


def _traffic(run: RunData, plot: Plot) -> Html:
    evaluations, set_up = run.evaluation_bytes, run.steps.set_up_bytes
    apart = ""
    if evaluations:
        apart = f" Evaluations took {mb(evaluations)} in the last start of the run, which is not counted here."
    if not run.steps.crossed:
        before = f" Before them {mb(set_up)} crossed." if set_up else ""
        return section("Traffic", element("p", f"No step asked a server for anything.{before}{apart}"))
    note = f"Whole frames, by the role of the tensors in them, as the device counts them.{apart}"
    return section("Traffic", plot_place(plot, tall=True), values_table(plot), traffic_table(run), note=note)


def _map(run: RunData) -> Html:
    steps, blocks = run.steps, run.file.blocks
    units = len(steps.states[0][1])
    name = "group" if blocks is None else "block"
    numbers = blocks if blocks is not None and len(blocks) == units else range(units)
    if not units or not has_changed(steps):
        said = f"All {units} {name}s were active in all steps." if units else "No unit is switched."
        return section("Kill and Revive", element("p", said))
    note = "Which unit did what when."
    if steps.count > MOST_COLUMNS:
        note += f" A column stands for about {count(steps.count / MOST_COLUMNS)} steps, and shows the commonest state."
    return section("Kill and Revive", kr_map(steps, name, numbers), note=note)


def _about(run: RunData) -> list[Html]:
    steps = run.steps
    thinned = "All steps are plotted, as metrics.jsonl has them."
    if steps.is_thinned:
        thinned = (
            f"About {count(MOST_PLOTTED)} of the {count(steps.count)} steps are plotted: of each {steps.range_steps} "
            "in a row those of the least and the largest value (of loss, bytes, seconds), and the first and the last. "
            "Each is as metrics.jsonl has it; sums and means are of all steps."
        )
    return [
        section("Data", data_table(run), note="Counts and lengths; nothing of what they say."),
        section("Settings", settings_table(run), note="Options of the run, given or chosen."),
        section("Versions", versions_table(run)),
        element(
            "footer",
            element("p", thinned),
            element("p", "Plots by uPlot, whose licence (MIT) is in this file. It asks for nothing from anywhere."),
        ),
    ]
