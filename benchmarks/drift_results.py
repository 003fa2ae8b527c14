"""What finished runs of ``drift.py`` come to: medians of a variant, what scores gain on their rivals, the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from bars import Entry, at_most
from drift_runs import ADAPTIVE, RIVALS, SEEDS, Run, Task
from economy_runs import Score

BAR: Final = "drift"
COMMAND: Final = "python benchmarks/drift.py --only " + " ".join((*RIVALS, *ADAPTIVE))
NONE_BEATS: Final = (
    "no score beats static and random by more than their spread over three seeds; static is the default"
)

Losses = Mapping[int, float]  # by seed


class Range(msgspec.Struct, frozen=True):
    """Of a number over the seeds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        return cls(*(round(value, 5) for value in (statistics.median(values), min(values), max(values))))


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A score's loss above that of the better one of its rivals.

    Attributes:
        by_seed: of each seed that all of them have, the rivals compared seed by seed.
        median: of them.
        spread: the larger of the two rivals' ranges over these seeds.
        beats: whether the median is below 0 by more than the spread; None until all of ``SEEDS`` are there: with
            one, there is no spread.
    """

    by_seed: dict[int, float]
    median: float
    spread: float
    beats: bool | None


# -- of a run --------------------------------------------------------------------------------------------


def scores(run: Run) -> dict[Task, Score]:
    """On test rows, of a run that did not diverge."""
    assert run.test is not None
    return run.test


def loss_b(run: Run) -> float:
    return scores(run)["b"].loss


def mean_loss(run: Run) -> float:
    """Of both tasks."""
    return statistics.mean(each.loss for each in scores(run).values())


def validation_loss_b(run: Run) -> float:
    assert run.validation is not None
    return run.validation["b"].loss


MEASURES: Final[dict[str, Callable[[Run], float]]] = {
    "loss_b": loss_b,
    "right_b": lambda run: scores(run)["b"].accuracy,
    "loss_a": lambda run: scores(run)["a"].loss,
    "right_a": lambda run: scores(run)["a"].accuracy,
    "mean_loss": mean_loss,
    "validation_loss_b": validation_loss_b,
    "bytes_per_token": lambda run: run.bytes_per_token,
    "given_bytes": lambda run: run.given_bytes,
    "set_up_bytes": lambda run: run.set_up_bytes,
    "round_trips_per_step": lambda run: run.round_trips_per_step,
    "device_cpu_s": lambda run: run.device_cpu_s,
    "wall_s": lambda run: run.wall_s,
    "kills": lambda run: run.kills,
    "revivals": lambda run: run.revivals,
}
"""By name, as ``drift.json`` has them."""


# -- of variants -----------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> dict[str, Range]:
    """Each of ``MEASURES`` over the runs of one variant, at least one."""
    return {name: Range.of([measure(run) for run in runs]) for name, measure in MEASURES.items()}


def by_seed(runs: Sequence[Run], measure: Callable[[Run], float]) -> dict[int, float]:
    return {run.settings.seed: measure(run) for run in runs}


def gap(ours: Losses, rivals: Sequence[Losses]) -> Gap | None:
    """A score against its rivals, over the seeds that all have; None where there are none."""
    seeds = sorted(set(ours).intersection(*rivals))
    if not seeds:
        return None
    gaps = {seed: ours[seed] - min(rival[seed] for rival in rivals) for seed in seeds}
    median = statistics.median(gaps.values())
    spread = max(max(rival[seed] for seed in seeds) - min(rival[seed] for seed in seeds) for rival in rivals)
    return Gap(
        by_seed={seed: round(value, 5) for seed, value in gaps.items()},
        median=round(median, 5),
        spread=round(spread, 5),
        beats=median < -spread if set(seeds) >= set(SEEDS) else None,
    )


def gaps(runs: Mapping[str, Sequence[Run]], measure: Callable[[Run], float]) -> dict[str, Gap]:
    """Of each adaptive score that has a seed in common with all rivals; ``runs`` by variant."""
    rivals = [by_seed(runs[name], measure) for name in RIVALS]
    found = {name: gap(by_seed(runs[name], measure), rivals) for name in ADAPTIVE}
    return {name: each for name, each in found.items() if each is not None}


def verdict(runs: Mapping[str, Sequence[Run]]) -> Entry | None:
    """The bar, as ``economy.json`` has it; None until every score and rival has every seed. ``runs`` by variant.

    What counts is the loss on task B. The score that is judged is the one whose mean loss on validation rows is the
    least, so that test rows choose nothing.
    """
    if any({run.settings.seed for run in runs[name]} != set(SEEDS) for name in (*RIVALS, *ADAPTIVE)):
        return None
    chosen = min(ADAPTIVE, key=lambda name: statistics.mean(validation_loss_b(run) for run in runs[name]))
    found = gaps(runs, loss_b)
    entry = at_most(-found[chosen].spread, found[chosen].median, COMMAND)
    if found[chosen].beats:
        return entry
    others = [name for name in ADAPTIVE if found[name].beats]
    reason = f"{chosen}, which validation rows choose, does not; on test rows does {', '.join(others)}"
    return {**entry, "holds": False, "reason": reason if others else NONE_BEATS}


def to_json(value: Any) -> Any:
    """Structures of this module as JSON has them."""
    return msgspec.to_builtins(value, str_keys=True)
