"""Runs side by side: in which settings they differ, what they reached, what it took, and which is best at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.errors import UsageError

from . import numbers
from .run_data import EvaluationLine, RunData, read_run
from .settings import shown_settings
from .time_split import NAMES

Value = float | int | str | None
NOT_COMPARED: Final = ("--out",)


@dataclass(frozen=True)
class Measure:
    """One thing that is compared.

    Attributes:
        key: in JSON; name: for people.
        of: its value, None where a run has none; written: the value for people.
        best: which of several values is; None: none of them.
        alike: what has to be the same of all runs for that: a shorter run has less of everything.
    """

    key: str
    name: str
    of: Callable[[RunData], Value]
    written: Callable[[Any], str]
    best: Literal["lowest", "highest"] | None = None
    alike: Callable[[RunData], object] = lambda _: None


def _held_out(run: RunData) -> object:
    return run.file.eval_data and run.file.eval_data.fingerprint


def _data(run: RunData) -> object:
    return run.file.data.fingerprint


def _machine(run: RunData) -> object:
    return run.file.versions.get("machine")


def _length(run: RunData) -> object:
    return run.steps.tokens, _machine(run)


def _loss(of: EvaluationLine | StepMetrics | None) -> float | None:
    return None if of is None else of.loss


def _ratio(amount: float, whole: float) -> float | None:
    return amount / whole if whole else None


def _time_measure(key: str, name: str) -> Measure:
    def value(run: RunData) -> float | None:
        return _ratio(getattr(run.steps.time, key), run.steps.count)

    return Measure(f"{key}_s_per_step", f"  {name}", value, numbers.seconds, "lowest", _machine)


def _accuracy(key: str, name: str) -> Measure:
    return Measure(key, name, lambda run: getattr(run.after, key, None), "{:.1%}".format, "highest", _held_out)


MEASURES: Final = (
    Measure("done", "done", lambda run: "yes" if run.is_done else "no", str),
    Measure("steps", "steps", lambda run: run.steps.count, numbers.count),
    Measure("tokens", "tokens", lambda run: run.steps.tokens, numbers.count),
    Measure("eval_loss_before", "held-out loss before", lambda run: _loss(run.before), numbers.loss),
    Measure("eval_loss_after", "held-out loss after", lambda run: _loss(run.after), numbers.loss, "lowest", _held_out),
    Measure("eval_loss_best", "held-out loss, best", lambda run: _loss(run.best), numbers.loss, "lowest", _held_out),
    Measure("best_step", "  after steps", lambda run: None if run.best is None else run.best.step, numbers.count),
    Measure("eval_loss_live", "held-out loss used live", lambda run: run.live_loss, numbers.loss, "lowest", _held_out),
    _accuracy("token_accuracy", "held-out tokens right"),
    _accuracy("exact_match", "held-out examples wholly right"),
    Measure("loss_last", "loss of the last step", lambda run: _loss(run.steps.last), numbers.loss, "lowest", _data),
    Measure("bytes_up", "traffic up", lambda run: run.steps.bytes_up, numbers.mb, "lowest", _length),
    Measure("bytes_down", "traffic down", lambda run: run.steps.bytes_down, numbers.mb, "lowest", _length),
    Measure("set_up_bytes", "  of it set-up's", lambda run: run.steps.set_up_bytes, numbers.mb, "lowest", _length),
    Measure("eval_bytes", "evaluations' traffic", lambda run: run.evaluation_bytes, numbers.mb, "lowest", _length),
    Measure(
        "bytes_per_token",
        "bytes a token",
        lambda run: _ratio(run.steps.bytes, run.steps.tokens),
        numbers.count,
        "lowest",
    ),
    Measure(
        "round_trips_per_step",
        "round trips a step",
        lambda run: _ratio(run.steps.round_trips, run.steps.count),
        numbers.short,
        "lowest",
    ),
    Measure(
        "tokens_per_s",
        "tokens a second",
        lambda run: _ratio(run.steps.tokens, run.steps.step_s),
        numbers.count,
        "highest",
        _machine,
    ),
    Measure(
        "s_per_step",
        "time of a step",
        lambda run: _ratio(run.steps.step_s, run.steps.count),
        numbers.seconds,
        "lowest",
        _machine,
    ),
    *(_time_measure(key, name) for key, name in NAMES.items()),
    Measure("steps_s", "time of all steps", lambda run: run.steps.step_s, numbers.seconds, "lowest", _length),
    Measure(
        "peak_rss_mb", "peak memory", lambda run: run.steps.peak_rss_mb or None, "{:,.0f} MB".format, "lowest", _machine
    ),
)


@dataclass(frozen=True)
class Comparison:
    """Some runs.

    Attributes:
        names: of the runs, all different; runs: in the same order.
    """

    names: Sequence[str]
    runs: Sequence[RunData]

    @property
    def differing(self) -> dict[str, list[str]]:
        """The settings that are not the same in all runs, by option; a dash where one is left out or off."""
        found = [
            {"base model": run.file.base_model.get("name", ""), **shown_settings(run.file.settings)}
            for run in self.runs
        ]
        options = dict.fromkeys(option for settings in found for option in settings if option not in NOT_COMPARED)
        rows = {option: [settings.get(option, "–") for settings in found] for option in options}
        return {option: values for option, values in rows.items() if len(set(values)) > 1}

    @property
    def warnings(self) -> list[str]:
        """What makes numbers of these runs less than comparable."""
        said = []
        held_out = [run.file.eval_data.fingerprint for run in self.runs if run.file.eval_data is not None and run.after]
        if len(set(held_out)) > 1:
            said.append("their held-out data are different: their held-out losses are not of the same thing")
        if len({_data(run) for run in self.runs}) > 1:
            said.append("they trained on different data")
        if len({run.file.base_model.get("fingerprint") for run in self.runs}) > 1:
            said.append("they have different base models")
        if len({_machine(run) for run in self.runs}) > 1:
            said.append("they ran on different kinds of machines: times are not of the same thing")
        return said

    @property
    def best(self) -> dict[str, list[bool]]:
        """Whether each run has the best value, by the measure's key. What is written alike is equally good, and where
        all are, none is the best."""
        found = {}
        for measure in MEASURES:
            values = [measure.of(run) for run in self.runs]
            known = [value for value in values if isinstance(value, float | int)]
            if measure.best is None or not known or len({measure.alike(run) for run in self.runs}) > 1:
                continue
            wanted = measure.written(min(known) if measure.best == "lowest" else max(known))
            marks = [value is not None and measure.written(value) == wanted for value in values]
            if sum(marks) < len(known):
                found[measure.key] = marks
        return found

    def to_json(self) -> dict[str, Any]:
        """The settings that differ; every number unrounded, by run; the names of the runs that are best, by measure."""
        return {
            "differing_settings": self.differing,
            "runs": [
                {"name": name, **{measure.key: measure.of(run) for measure in MEASURES}}
                for name, run in zip(self.names, self.runs, strict=True)
            ],
            "best": {
                key: [name for name, is_best in zip(self.names, marks, strict=True) if is_best]
                for key, marks in self.best.items()
            },
            "warnings": self.warnings,
        }

    def rows(self) -> list[tuple[str, list[tuple[str, bool]]]]:
        """Each measure as people read it, and whether it is the best; those that no run has are left out."""
        found, best = [], self.best
        for measure in MEASURES:
            values = [measure.of(run) for run in self.runs]
            if any(value is not None for value in values):
                written = ["–" if value is None else measure.written(value) for value in values]
                marks = best.get(measure.key, [False] * len(values))
                found.append((measure.name, list(zip(written, marks, strict=True))))
        return found


def compare(directories: Sequence[Path]) -> Comparison:
    """Read some runs. Raises ``UsageError`` for fewer than two, or one twice, and ``CheckpointError`` for what is no
    run."""
    if len(directories) < 2:
        raise UsageError("compare takes two runs or more: the directories that were their --out")
    places: dict[Path, Path] = {}
    for directory in directories:
        place = directory.resolve()
        if place in places:
            raise UsageError(f"{directory} is given twice; give each run once")
        places[place] = directory
    return Comparison(_names(list(places)), [read_run(place) for place in places])


def _names(places: Sequence[Path]) -> list[str]:
    """As few of the last parts of each path as make all of them different."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths are different")
