"""What finished runs of ``economy.py`` come to: means of a recipe on a set, differences with intervals, the bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from economy_data import SETS
from economy_recipes import BARRED_SETS, BASELINE, DEFAULT, FP16_ALL, INTENTS, PASSES, RECIPES, SECOND
from economy_runs import Finished, Plan, Rows, Run, Score

Rate = Literal["chosen", "default"]

RESAMPLES: Final = 4000


@dataclass(frozen=True)
class Result:
    """The finished runs of one recipe on one set with one rate; at least one, and none of them diverged.

    Attributes:
        lr: None: each found its own.
    """

    set_name: str
    recipe: str
    lr: float | None
    runs: tuple[Run, ...]

    def mean(self, value: Callable[[Run], float]) -> float:
        return statistics.mean(value(run) for run in self.runs)

    @property
    def loss(self) -> float:
        return self.mean(lambda run: test_score(run).loss)

    @property
    def validation_loss(self) -> float:
        return self.mean(lambda run: run.validation_loss)

    @property
    def accuracy(self) -> float:
        return self.mean(lambda run: test_score(run).accuracy)

    @property
    def rate(self) -> float:
        """The learning rate, given or found; of several that were found, their median."""
        return statistics.median(run.found_lr or 0.0 for run in self.runs) if self.lr is None else self.lr

    @property
    def bytes_per_token(self) -> float:
        return self.mean(lambda run: run.bytes_per_token)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.settings.seed for run in self.runs)

    @property
    def is_complete(self) -> bool:
        """Whether all its seeds are there."""
        return set(self.seeds) >= set(RECIPES[self.recipe].seeds(self.set_name))

    def of_seeds(self, seeds: Sequence[int]) -> Result:
        """The same, of these seeds only."""
        kept = tuple(run for run in self.runs if run.settings.seed in seeds)
        return Result(self.set_name, self.recipe, self.lr, kept)

    def fewer_bytes(self, baseline: Result) -> float:
        """Percent fewer bytes a token than ``baseline``."""
        return 100 * (1 - self.bytes_per_token / baseline.bytes_per_token)


def find_result(finished: Finished, plan: Plan, set_name: str, recipe: str, rate: Rate) -> Result | None:
    """What is finished of a recipe with its chosen rate or with the one of a user who gives none, which is both of a
    recipe that has no grid.

    None where the rate is not chosen yet, or no run of it ended well.
    """
    of_recipe = plan.recipes[recipe]
    is_chosen = rate == "chosen" and of_recipe.has_grid
    lr = plan.chosen_lr(finished, set_name, recipe) if is_chosen else of_recipe.usual_lr(set_name)
    if lr is None and is_chosen:
        return None
    found = [plan.find(finished, set_name, recipe, lr, seed) for seed in of_recipe.seeds(set_name)]
    runs = tuple(run for run in found if run is not None and run.test is not None)
    return Result(set_name, recipe, lr, runs) if runs else None


def test_score(run: Run) -> Score:
    """Of a run that did not diverge."""
    assert run.test is not None
    return run.test


# -- differences -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far ours is above theirs, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def loss_difference(ours: Result, theirs: Result) -> Difference | None:
    """Of the mean loss a label; None where no seed is in both."""
    return _difference(ours, theirs, lambda rows: np.array(rows.losses) / 1000, lambda rows: np.array(rows.labels))


def accuracy_difference(ours: Result, theirs: Result) -> Difference | None:
    """Of the share of rows that are right, in points; None where no seed is in both."""

    def points(rows: Rows) -> Any:
        return 100 * np.array(list(rows.right), np.float64)

    return _difference(ours, theirs, points, lambda rows: np.ones(len(rows.right)))


def _difference(
    ours: Result, theirs: Result, value_of: Callable[[Rows], Any], weight_of: Callable[[Rows], Any]
) -> Difference | None:
    """Of the rows' summed values over their summed weights; the interval is a bootstrap over rows.

    A row's gap is its mean over the seeds: the seeds of a row are not independent, so they are drawn together.
    """
    others = {run.settings.seed: _rows(run) for run in theirs.runs}
    pairs = [(_rows(run), others[run.settings.seed]) for run in ours.runs if run.settings.seed in others]
    if not pairs:
        return None
    gaps = np.mean([value_of(one) - value_of(other) for one, other in pairs], axis=0)
    weights = weight_of(pairs[0][0]).astype(np.float64)
    counts = _resamples(len(gaps))
    low, high = np.percentile(counts @ gaps / (counts @ weights), [2.5, 97.5])
    return Difference(float(gaps.sum() / weights.sum()), float(low), float(high))


def _rows(run: Run) -> Rows:
    rows = test_score(run).rows
    assert rows is not None
    return rows


@cache
def _resamples(rows: int) -> Any:
    """How often each row is drawn in each resample, the same for all differences: (resamples, rows)."""
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    return drawn.astype(np.float64)


# -- the bars --------------------------------------------------------------------------------------------

ACCURACY_BAR: Final = -1.5  # points

Find = Callable[[str, str, Rate], Result | None]
Pair = tuple[Result, Result]  # of the same seeds


@dataclass(frozen=True)
class Bar:
    """A number that has to be reached.

    Attributes:
        sets, recipe: what is compared, where; against: with which recipe.
        measure: gives bar and value, of a pair of each set.
        most: whether the bar is the most that is allowed, and not the least.
        of_what: for people, with its unit.
    """

    sets: tuple[str, ...]
    recipe: str
    of_what: str
    measure: Callable[[list[Pair]], tuple[float, float]]
    most: bool
    against: str = BASELINE

    def find(self, find: Find, rate: Rate) -> tuple[float, float] | None:
        """Bar and value of what ``find_result`` finds, with chosen rates or without ``--lr``; None where runs are
        missing."""
        pairs = [_pair(find, rate, set_name, self.recipe, self.against) for set_name in self.sets]
        there = [pair for pair in pairs if pair is not None]
        return self.measure(there) if len(there) == len(pairs) else None

    def holds(self, bar: float, value: float) -> bool:
        return value <= bar if self.most else value >= bar

    @property
    def what(self) -> str:
        """For people, with its unit."""
        return f"{', '.join(SETS[name].title for name in self.sets)}: {self.of_what}"

    @property
    def command(self) -> str:
        pairs = [f"{set_name}/{recipe}" for set_name in self.sets for recipe in (self.against, self.recipe)]
        return f"python benchmarks/economy.py --only {' '.join(pairs)}"


def _pair(find: Find, rate: Rate, set_name: str, recipe: str, against: str = BASELINE) -> Pair | None:
    """A recipe and another, with the same seeds; None unless all the recipe's are there in both."""
    ours, theirs = find(set_name, recipe, rate), find(set_name, against, rate)
    if ours is None or theirs is None or not ours.is_complete or not set(theirs.seeds) >= set(ours.seeds):
        return None
    return ours, theirs.of_seeds(ours.seeds)


def loss_above(ours: Result, theirs: Result) -> float:
    """How far a mean loss is above another: in nats a label, or in percent where the set's bar is relative."""
    gap = ours.loss - theirs.loss
    return 100 * gap / theirs.loss if SETS[ours.set_name].relative else gap


def is_not_worse(ours: Result, theirs: Result) -> bool:
    """Loss and accuracy within the set's bars, of results with the same seeds."""
    of_set = SETS[ours.set_name]
    allowed = 100 * of_set.loss_bar if of_set.relative else of_set.loss_bar
    is_close = loss_above(ours, theirs) <= allowed
    return is_close and (of_set.relative or 100 * (ours.accuracy - theirs.accuracy) >= ACCURACY_BAR)


def _loss(set_name: str, recipe: str, bar: float) -> Bar:
    unit = "%" if SETS[set_name].relative else "nats a label"
    what = f"{RECIPES[recipe].title}: mean loss above the baseline's, {unit}"
    return Bar((set_name,), recipe, what, lambda pairs: (bar, loss_above(*pairs[0])), most=True)


def _accuracy(set_name: str) -> Bar:
    def measure(pairs: list[Pair]) -> tuple[float, float]:
        ours, theirs = pairs[0]
        return ACCURACY_BAR, 100 * (ours.accuracy - theirs.accuracy)

    what = f"{RECIPES[DEFAULT].title}: accuracy above the baseline's, points"
    return Bar((set_name,), DEFAULT, what, measure, most=False)


def _traffic(sets: tuple[str, ...], recipe: str, bar: float) -> Bar:
    """The least saving of the sets."""

    def measure(pairs: list[Pair]) -> tuple[float, float]:
        return bar, min(ours.fewer_bytes(theirs) for ours, theirs in pairs)

    what = f"{RECIPES[recipe].title}: fewer bytes a token than the baseline, %"
    return Bar(sets, recipe, what, measure, most=False)


def _chat_loss(pairs: list[Pair]) -> tuple[float, float]:
    """The bar is the noise: half of the difference's 95 % interval."""
    found = loss_difference(*pairs[0])
    assert found is not None
    return found.half_width, found.mean


def _chat_traffic(pairs: list[Pair]) -> tuple[float, float]:
    return 6.0, 100 - pairs[0][0].fewer_bytes(pairs[0][1])


def _as_live(set_name: str) -> dict[str, Bar]:
    """What the default in passes may lose against the default, both used live."""
    what, relative = f"{RECIPES[PASSES].title}: mean loss above the default's", SETS[set_name].relative
    bar, unit = (1.0, "%") if relative else (0.008, "nats a label")
    loss = Bar(
        (set_name,), PASSES, f"{what}, {unit}", lambda pairs: (bar, loss_above(*pairs[0])), most=True, against=DEFAULT
    )
    if relative:
        return {f"passes_{set_name}_loss": loss}
    points = Bar(
        (set_name,),
        PASSES,
        f"{RECIPES[PASSES].title}: accuracy above the default's, points",
        lambda pairs: (-0.7, 100 * (pairs[0][0].accuracy - pairs[0][1].accuracy)),
        most=False,
        against=DEFAULT,
    )
    return {f"passes_{set_name}_loss": loss, f"passes_{set_name}_accuracy": points}


def _passes_traffic(pairs: list[Pair]) -> tuple[float, float]:
    return 1.3, max(ours.bytes_per_token / theirs.bytes_per_token for ours, theirs in pairs)


def _worse(pairs: list[Pair]) -> tuple[float, float]:
    return 0.0, float(sum(not is_not_worse(*pair) for pair in pairs))


TITLE: Final = RECIPES[DEFAULT].title
BARS: Final[dict[str, Bar]] = {
    **{f"{name}_loss": _loss(name, DEFAULT, 0.02) for name in INTENTS},
    **{f"{name}_accuracy": _accuracy(name) for name in INTENTS},
    **{f"{name}_traffic": _traffic((name,), DEFAULT, 97.0) for name in INTENTS},
    "dialogue_loss": _loss("dialogue", DEFAULT, 2.5),
    "dialogue_traffic": _traffic(("dialogue",), DEFAULT, 95.5),
    "second_loss": _loss("dialogue", SECOND, 1.0),
    "second_traffic": _traffic(("dialogue",), SECOND, 92.0),
    "fp16_all_traffic": _traffic((*INTENTS, "dialogue"), FP16_ALL, 88.0),
    "chat60_loss": Bar(
        ("chat60",), DEFAULT, f"{TITLE}: mean loss above the baseline's; half its interval", _chat_loss, most=True
    ),
    "chat60_traffic": Bar(
        ("chat60",), DEFAULT, f"{TITLE}: bytes a token, % of the baseline's", _chat_traffic, most=True
    ),
    **{name: bar for set_name in BARRED_SETS for name, bar in _as_live(set_name).items()},
    "passes_traffic": Bar(
        BARRED_SETS,
        PASSES,
        f"{RECIPES[PASSES].title}: bytes a token over the default's",
        _passes_traffic,
        most=True,
        against=DEFAULT,
    ),
    "passes_worse": Bar(
        BARRED_SETS, PASSES, f"{RECIPES[PASSES].title}: sets on which it is worse than the baseline", _worse, most=True
    ),
}


def measure_bars(finder: Find) -> dict[str, dict[str, Any]]:
    """Each bar whose runs are there, as ``economy.json`` has it."""
    found: dict[str, dict[str, Any]] = {}
    for name, bar in BARS.items():
        measured = bar.find(finder, "chosen")
        if measured is None:
            continue
        wanted, value = measured
        holds, limit = bar.holds(wanted, value), "at most" if bar.most else "at least"
        reason = "" if holds else f"{value:.4g} where {limit} {wanted:.4g} is wanted"
        plain = bar.find(finder, "default")
        if holds and plain is not None and not bar.holds(*plain):  # what a user gets who gives no rate
            holds, reason = False, f"{plain[1]:.4g} without --lr, where {limit} {plain[0]:.4g} is wanted"
        if name == "fp16_all_traffic" and holds:  # the saving is for being not worse
            pairs = [_pair(finder, "chosen", set_name, bar.recipe) for set_name in bar.sets]
            worse = [pair[0].set_name for pair in pairs if pair is not None and not is_not_worse(*pair)]
            holds, reason = not worse, f"worse than the baseline on {', '.join(worse)}"
        entry: dict[str, Any] = {"bar": round(wanted, 4), "value": round(value, 4), "holds": holds}
        found[name] = {**entry, "command": bar.command, **({} if holds else {"reason": reason})}
    return found
