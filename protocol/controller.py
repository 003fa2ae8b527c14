"""Kill and Revive's controller: from the device's scores to the state of every unit in the next step.

One rule holds at every step: exactly ``budget(step)`` units are ACTIVE. The rest follows from three questions,
asked for the step ``t`` that comes next (docs/concepts/kill-and-revive.md tells the whole story, ``Timetable`` has the
times):

1. Does a fade end?          FADING -> KILLED; and HELD -> GIVEN, where the device gives the server what it held.
2. Is the budget exceeded?   The lowest ranked go, at once; only the ramp has such steps.
3. Is it a tick?             Units on trial are judged, and new trials begin; always one seat for one seat.

A run without warm-up and ramp begins with k units, evenly along the depth; the first report says of every unit what the
device knows of it by then, and from step 1 on the k best are active.

Everything is deterministic: random draws come from ``(seed, t)``, and there is no other random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .adapters import AdapterSpec, Crossing, crossings
from .errors import RemoteProtocolError
from .groups import GroupSpec, evenly, group_units
from .kill_revive import MARGIN, TRIAL_SHARE, KillReviveConfig, Timetable, UnitState

Floats = npt.NDArray[np.float64]
States = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

EMA_DECAY: Final = 0.85
"""Of the moving average of a unit's scores."""
# The revive draw: a floor, so that a unit that once scored nothing still gets its turn, and a bonus for waiting.
DRAW_FLOOR: Final = 0.1
DRAW_IDLE_TICKS: Final = 4

_KILLED, _ACTIVE, _FADING, _HELD, _GIVEN = (np.uint8(state) for state in UnitState)


class Controller:
    """Decides which units are active, one step at a time.

    Args:
        config: the device's settings. Raises ``UsageError`` where they cannot work for these groups.
        groups: the exchange groups in execution order.
        seed: of the draws; total_steps: length of the run.
        adapter: what crosses for each group, and so what it costs; LoRA by default.
        counts_costs: whether units are ranked by score per cost, instead of by score.
        learnt: units that have an effect before step 0.

    Attributes:
        digest: SHA-256, 32 bytes, of all that the controller was made with: a ``state`` belongs to no other.
        next_step: the step for which ``states`` holds.
    """

    def __init__(
        self,
        config: KillReviveConfig,
        groups: Sequence[GroupSpec],
        *,
        seed: int,
        total_steps: int,
        adapter: AdapterSpec | None = None,
        counts_costs: bool = True,
        learnt: Sequence[int] = (),
    ) -> None:
        adapter = adapter or AdapterSpec()
        units = group_units(groups, config.unit)
        config.check(len(units))
        self.config = config
        self.next_step = 0
        self.timetable = Timetable(config, len(units), total_steps)
        self._seed = seed
        self._total_steps = total_steps
        costs = unit_costs(groups, units, crossings(adapter, groups))
        self._costs = costs if counts_costs else np.ones_like(costs)
        made_with = (config, tuple(groups), adapter, seed, total_steps, self._costs.tobytes())
        self.digest = hashlib.sha256(msgspec.msgpack.encode(made_with)).digest()
        self._pinned = np.isin(np.arange(len(units)), config.pinned)
        self._states: States = np.full(len(units), _ACTIVE)
        self._since = np.zeros(len(units), np.int64)  # step at which a unit was last killed or revived
        self._on_trial = np.zeros(len(units), np.bool_)  # revived, and not judged since
        self._ema = np.zeros(len(units), np.float64)
        has_learnt = np.isin(np.arange(len(units)), learnt)
        if self.timetable.is_fixed:
            self._begin_with(self._fixed_set(), has_learnt)
        elif self.timetable.begins_at_floor:
            self._begin_with(self._first_set(has_learnt), has_learnt)
        else:
            self._kill_over_budget(0)

    @property
    def states(self) -> States:
        """uint8 (units,), a ``UnitState`` each, for ``next_step``; a copy."""
        return self._states.copy()

    @property
    def trial_seats(self) -> int:
        """How many of the k seats units on trial may take; one unit that is not pinned always keeps its own."""
        floor = self.timetable.floor
        seats = max(1, math.floor(TRIAL_SHARE * floor + 1e-9))
        return max(0, min(seats, floor - int(self._pinned.sum()) - 1, self._states.size - floor))

    def report(self, step: int, scores: npt.ArrayLike) -> States:
        """Take the scores of ``step``, (units,), and return the states for ``step + 1``, uint8 (units,).

        The scores of units that were not ACTIVE are ignored, but for those of step 0 where the run began without
        warm-up. Raises ``RemoteProtocolError`` unless ``step`` is ``next_step`` and a step of the run, and the scores
        are finite, not negative and as many as the units.
        """
        given = np.asarray(scores, np.float64)
        if step != self.next_step or step >= self._total_steps:
            raise RemoteProtocolError(f"report of step {step} where step {self.next_step} comes next")
        if given.shape != self._states.shape:
            raise RemoteProtocolError(f"{self._states.size} scores expected, one a unit")
        if not np.isfinite(given).all():
            raise RemoteProtocolError(f"a score of step {step} is not finite", code="non_finite")
        if (given < 0).any():
            raise RemoteProtocolError(f"a score of step {step} is negative")
        decay = EMA_DECAY if step else 0.0
        scored = self._states == _ACTIVE
        is_first_choice = step == 0 and self.timetable.begins_at_floor
        if is_first_choice:
            scored[:] = True
        elif step == 1 and self.timetable.begins_at_floor:
            # What came with the first report was a mean of many batches; from here on it is in one step's measure.
            before = self._ema[scored].sum()
            self._ema *= given[scored].sum() / before if before else 1.0
            decay = 0.0
        self._ema[scored] = decay * self._ema[scored] + (1.0 - decay) * given[scored]
        self.next_step = step + 1
        if self.config.gives_to_server:
            self._states[self._states == _HELD] = _GIVEN
        if not self.timetable.is_fixed and self.next_step <= self.timetable.last_change:
            if is_first_choice:
                self._choose_best(self.next_step)
            self._end_fades(self.next_step)
            self._kill_over_budget(self.next_step)
            self._tick(self.next_step)
        return self.states

    def state(self) -> bytes:
        """Everything that the next step's decision depends on: ``state_bytes(units)`` bytes."""
        return (
            self.next_step.to_bytes(8, "little")
            + self._states.tobytes()
            + self._on_trial.astype(np.uint8).tobytes()
            + self._since.astype("<i8").tobytes()
            + self._ema.astype("<f8").tobytes()
        )

    def load_state(self, state: bytes) -> None:
        """Go on where the controller stood whose ``state`` this is. Raises ``ValueError`` for one of other units."""
        units = self._states.size
        if len(state) != state_bytes(units):
            raise ValueError(f"{len(state)} bytes are no state of {units} units")
        self.next_step = int.from_bytes(state[:8], "little")
        self._states = np.frombuffer(state, np.uint8, units, 8).copy()
        self._on_trial = np.frombuffer(state, np.uint8, units, 8 + units).astype(np.bool_)
        self._since = np.frombuffer(state, "<i8", units, 8 + 2 * units).astype(np.int64)
        self._ema = np.frombuffer(state, "<f8", units, 8 + 10 * units).astype(np.float64)

    def _fixed_set(self) -> Flags:
        if self.timetable.floor == self._states.size:
            return np.ones(self._states.size, np.bool_)
        chosen = self._pinned.copy()
        chosen[list(self.config.static)] = True
        return chosen

    def _first_set(self, has_learnt: Flags) -> Flags:
        """The pinned units; of the others first those that have learnt something; each time evenly along the depth."""
        chosen = self._pinned.copy()
        for among in (has_learnt, ~has_learnt):
            left = np.flatnonzero(among & ~chosen).tolist()
            count = min(len(left), self.timetable.floor - int(chosen.sum()))
            chosen[list(evenly(left, count))] = True
        return chosen

    def _begin_with(self, chosen: Flags, has_learnt: Flags) -> None:
        """The others are killed from step 0 on; those that have learnt nothing have no effect that could be kept."""
        self._states[~chosen] = _KILLED
        self._kill(np.flatnonzero(~chosen & has_learnt), 0)

    def _choose_best(self, step: int) -> None:
        """Swap what is active for the best of all units, where the report said something of the others."""
        rank_values = self._rank_values(step)
        if not rank_values[self._states != _ACTIVE].any():
            return
        best = self._ranked(np.ones(self._states.size, np.bool_), rank_values)[: self.timetable.floor]
        is_best = np.isin(np.arange(self._states.size), best)
        is_active = self._states == _ACTIVE
        self._swap(np.flatnonzero(is_active & ~is_best), np.flatnonzero(is_best & ~is_active), step)

    def _rank_values(self, step: int) -> Floats:
        """What units are ranked by, (units,): the score's moving average, per cost."""
        if self.config.score == "random":
            return np.random.default_rng([self._seed, step, 0]).random(self._states.size)
        return self._ema / self._costs

    def _ranked(self, among: Flags, rank_values: Floats) -> Indices:
        """Indices of the units ``among``, best first: pinned ones, then by worth; a tie goes to the deeper unit.

        Worth counts times the gap that a unit fills: the worst is taken out, its neighbours' gaps grow, and so on (the
        crowding distance of NSGA-II, Deb et al. 2002, along the depth).
        """
        left, taken = np.flatnonzero(among), []
        while len(left):
            edges = np.concatenate(([-1], left, [self._states.size]))
            crowded = rank_values[left] * (edges[2:] - edges[:-2])
            worst = np.lexsort((left, crowded, self._pinned[left]))[0]
            taken.append(left[worst])
            left = np.delete(left, worst)
        return np.array(taken[::-1], np.intp)

    def _end_fades(self, step: int) -> None:
        done = (self._states == _FADING) & (step - self._since >= self.config.kill_every)
        self._states[done] = _KILLED

    def _kill_over_budget(self, step: int) -> None:
        active = self._states == _ACTIVE
        budget = self.timetable.budget(step)
        if active.sum() > budget:
            self._kill(self._ranked(active, self._rank_values(step))[budget:], step)

    def _tick(self, step: int) -> None:
        revive, judge = self.timetable.is_revive_tick(step), self.timetable.is_kill_tick(step)
        if not (revive or judge):
            return
        rank_values = self._rank_values(step)
        idle = np.isin(self._states, (_KILLED, _HELD, _GIVEN))
        on_probation = self._on_trial & (step - self._since < self.config.probation)
        judged = self._on_trial & ~on_probation
        self._on_trial = on_probation
        replaceable = self._replaceable_units(step, rank_values, on_probation, judged)
        if revive:
            seats = self.trial_seats - int(on_probation.sum())
            drawn = self._draw(step, rank_values, idle, min(seats, len(replaceable)))
            self._swap(replaceable[: len(drawn)], drawn, step)
            self._on_trial[drawn] = True
        else:
            # No new trial can use a seat that a trial lost, so it goes back to the best that we remember.
            failed = replaceable[judged[replaceable]]
            best = self._ranked(idle, rank_values)[: len(failed)]
            failed = failed[: len(best)]
            better = rank_values[best] > rank_values[failed]
            self._swap(failed[better], best[better], step)

    def _replaceable_units(self, step: int, rank_values: Floats, on_probation: Flags, judged: Flags) -> Indices:
        """Units that may lose their seat, worst first: clearly below the last seat that no trial may take."""
        order = self._ranked((self._states == _ACTIVE) & ~on_probation, rank_values)
        safe = self.timetable.floor - self.trial_seats
        if len(order) <= safe:
            return order[:0]
        rest = order[safe:]
        old_enough = judged[rest] | (step - self._since[rest] >= self.config.kill_every)
        below = rank_values[rest] < rank_values[order[safe - 1]] * (1.0 - MARGIN)
        replaceable: Indices = rest[old_enough & below & ~self._pinned[rest]][::-1]
        return replaceable

    def _draw(self, step: int, rank_values: Floats, idle: Flags, count: int) -> Indices:
        """Draw ``count`` of the ``idle`` units without replacement, p ~ (I/max I + 0.1)·(1 + idle/(4·revive_every)),
        times the distance to the nearest active unit, with I = max I for a unit that was never scored."""
        indices = np.flatnonzero(idle)
        if self.config.score == "random" or not rank_values[indices].any():
            weight = np.full(len(indices), DRAW_FLOOR)
        else:
            weight = rank_values[indices] / rank_values[indices].max() + DRAW_FLOOR
            weight[rank_values[indices] == 0] = 1.0 + DRAW_FLOOR  # never scored: it may be the best
            active = np.flatnonzero(self._states == _ACTIVE)
            if len(active):
                weight = weight * np.abs(indices[:, None] - active).min(axis=1)
        weight *= 1.0 + (step - self._since[indices]) / (DRAW_IDLE_TICKS * self.config.revive_every)
        # Efraimidis and Spirakis: the smallest of Exp(1)/weight are a weighted draw without replacement.
        keys = np.random.default_rng([self._seed, step, 1]).standard_exponential(len(indices)) / weight
        return indices[np.argsort(keys, kind="stable")[: max(0, count)]]

    def _swap(self, out: Indices, into: Indices, step: int) -> None:
        self._kill(out, step)
        self._states[into] = _ACTIVE
        self._since[into] = step

    def _kill(self, units: Indices, step: int) -> None:
        if self.config.on_kill == "hold_forward" or self.config.gives_to_server:
            self._states[units] = _HELD
        elif self.config.on_kill == "fade" and step and self.timetable.can_fade(step):
            self._states[units] = _FADING
        else:
            self._states[units] = _KILLED
        self._since[units] = step


def unit_costs(groups: Sequence[GroupSpec], units: Sequence[Sequence[int]], crossings: Sequence[Crossing]) -> Floats:
    """What each unit costs relative to the others: float64 (units,), positive, mean 1.

    The mean of three costs, each with mean 1: numbers on the wire for each row that crosses (forward and backward, so
    twice the widths of what crosses for a group), round trips (two a group), and the blocks that backward must
    pass to reach the unit from the last block of ``groups``. ``units`` as ``group_units`` gives them.
    """
    if not units:
        return np.ones(0)
    last_block = max(group.block for group in groups)
    rows = []
    for unit in units:
        widths = [crossings[index].total_width for index in unit]
        lowest = min(groups[index].block for index in unit)
        rows.append((2 * sum(widths), 2 * len(unit), 1 + last_block - lowest))
    table = np.array(rows, np.float64)  # (units, 3)
    costs: Floats = (table / table.mean(axis=0)).mean(axis=1)
    return costs


def state_bytes(units: int) -> int:
    """Size of a controller's ``state``, in bytes."""
    # The step; then for each unit its state, whether it is on trial, since when, and its score.
    return 8 + units * (1 + 1 + 8 + 8)
