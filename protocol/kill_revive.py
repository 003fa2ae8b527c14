"""Kill and Revive as both sides know it: its settings, its units, and the states a unit can be in.

Scores are computed on the device (``dlora.edge.training.scores``), decisions are made in the cloud
(``dlora.protocol.controller``), the device obeys. See docs/concepts/kill-and-revive.md.
"""

from __future__ import annotations

import bisect
import math
from enum import IntEnum
from typing import Annotated, Final

import msgspec

from .choices import OnKill, ScoreName, UnitKind
from .errors import UsageError
from .limits import MAX_STEPS

Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]

MAX_UNITS: Final = 16_384
DEFAULT_WARMUP_STEPS: Final = 20
DEFAULT_RAMP_FRACTION: Final = 0.25
TRIAL_SHARE: Final = 0.25
"""Share of the active units (at least one) that revived units may take."""
MARGIN: Final = 0.10
"""A unit loses its place only if it scores below the threshold by this share of it."""
QUIET_SHARE: Final = 0.05
"""Share of the last steps (at least one) without kills or revivals."""


class UnitState(IntEnum):
    """What a unit does in a step. Those of ``LIVE`` exchange in the forward pass; only ``ACTIVE`` ones are trained."""

    KILLED = 0
    ACTIVE = 1
    FADING = 2  # its scale goes 1 -> 0 over kill_every steps; not trained
    HELD = 3  # it keeps its effect on the forward pass; not trained
    GIVEN = 4  # the server has its parameters and applies them, so that nothing of it crosses; not trained


LIVE: Final = frozenset({UnitState.ACTIVE, UnitState.FADING, UnitState.HELD})
"""States in which a unit exchanges."""


class KillReviveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings that a device chooses when it opens a session.

    Attributes:
        active_fraction: rho; ``k = max(1, ceil(rho * units))`` units stay active. 1.0 turns kill-and-revive off. The
            baseline ``static`` has its own units instead.
        unit: what is switched: a whole ``block`` (all its exchange groups) or a single exchange ``group``.
        score: what the device reports and the cloud ranks by; ``random`` and ``static`` ignore it.
        warmup_fraction: share of the steps, from the first on, in which nothing is killed; ``warmup_steps`` at least.
        ramp_fraction: share of the steps at which the cubic budget reaches ``k``.
        kill_every, revive_every: ticks, in steps. revive_every 0: never revive.
        probation: steps for which a revived unit is not ranked.
        on_kill: what a killed unit does at first, see ``UnitState``.
        pinned: units that are never killed.
        static: the units of the baseline ``static``; none, with an active_fraction of 0, is the bare base model.
    """

    active_fraction: Fraction = 1.0
    unit: UnitKind = "block"
    score: ScoreName = "static"
    warmup_fraction: Fraction = 0.05
    warmup_steps: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = DEFAULT_WARMUP_STEPS
    ramp_fraction: Fraction = DEFAULT_RAMP_FRACTION
    kill_every: Annotated[int, msgspec.Meta(ge=1, le=10**9)] = 25
    revive_every: Count = 50
    probation: Count = 25
    on_kill: OnKill = "fade"
    pinned: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_UNITS)] = ()
    static: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_UNITS)] = ()

    @property
    def gives_to_server(self) -> bool:
        """Whether the device hands the parameters of killed units over: HELD is then a state of one step."""
        return self.on_kill == "give_to_server"

    def budget_floor(self, units: int) -> int:
        """``k``: how many of ``units`` units stay active once the budget has come down."""
        if self.score == "static" and (self.static or not self.active_fraction):
            return len(set(self.static) | set(self.pinned))
        return min(units, max(1, math.ceil(self.active_fraction * units - 1e-9), len(set(self.pinned))))

    def check(self, units: int) -> None:
        """Raise ``UsageError`` where the settings cannot work for ``units`` units."""
        for option, chosen in (("--pin", self.pinned), ("--static-units", self.static)):
            for unit in chosen:
                if not 0 <= unit < units:
                    raise UsageError(f"{option}: there is no {self.unit} {unit}; they are 0 to {units - 1}")
        if self.score == "static" and not self.static and 0 < self.active_fraction < 1:
            raise UsageError("--kr-score static needs --static-units, such as 26-29")


class Timetable:
    """When what happens in a run of ``total_steps`` steps with ``units`` units.

    ::

        warm-up          ramp                    steady                                  quiet
        0 ─────────── warmup ─────────── ramp_end ──┬────────┬────────┬──────── last_change ──── total
        all ACTIVE       budget N -> k, cubic      ticks, each kill_every / revive_every    no change

    Attributes:
        floor: k, the budget once the ramp is over.
        warmup: the first step for which a unit may be killed; ramp_end: whose budget is k.
        last_change: the last step at whose start a state may change.
    """

    def __init__(self, config: KillReviveConfig, units: int, total_steps: int) -> None:
        self.config = config
        self.units = units
        self.total_steps = total_steps
        self.floor = min(units, config.budget_floor(units))
        quiet_steps = max(1, math.floor(QUIET_SHARE * total_steps + 1e-9))
        self.last_change = max(0, total_steps - quiet_steps)
        self.warmup = max(config.warmup_steps, math.ceil(config.warmup_fraction * total_steps - 1e-9))
        ramp_fraction_end = min(math.ceil(config.ramp_fraction * total_steps - 1e-9), self.last_change)
        self.ramp_end = max(self.warmup, ramp_fraction_end)

    @property
    def is_fixed(self) -> bool:
        """Whether the active set never changes: kill-and-revive is off, or the score is ``static``."""
        return self.config.score == "static" or self.floor == self.units

    @property
    def begins_at_floor(self) -> bool:
        """Whether the budget is k from step 0 on: no warm-up, no ramp."""
        return self.ramp_end == 0

    def budget(self, step: int) -> int:
        """b(t): how many units are ACTIVE in ``step``; AdaLoRA's cubic schedule (arXiv 2303.10512)."""
        step = min(step, self.last_change)
        if step < self.warmup:
            return self.units
        if step >= self.ramp_end:
            return self.floor
        left = 1.0 - (step - self.warmup) / (self.ramp_end - self.warmup)
        return self.floor + math.ceil((self.units - self.floor) * left**3 - 1e-9)

    def is_kill_tick(self, step: int) -> bool:
        """Whether trials are judged at ``step``: each kill_every steps, and a last time before the quiet phase."""
        return self._ticks(step, self.config.kill_every) or self.ramp_end < step == self.last_change

    def is_revive_tick(self, step: int) -> bool:
        """Whether trials may begin at ``step``: only if they can end before the quiet phase."""
        config = self.config
        return self._ticks(step, config.revive_every) and step + max(1, config.probation) <= self.last_change

    def unchanged_steps(self, step: int) -> range:
        """The steps around ``step`` in which the units' states stay as they are; in the ramp, ``step`` alone."""
        if self.is_fixed:
            return range(self.total_steps)
        if step < self.ramp_end:
            return range(step, step + 1)
        edges = [self.ramp_end, self.last_change, self.total_steps]
        if self.begins_at_floor:
            edges.append(1)  # the first report may choose anew
        for every in (self.config.kill_every, self.config.revive_every):
            if every:
                last_tick = self.ramp_end + max(0, step - self.ramp_end) // every * every
                edges += [tick for tick in (last_tick, last_tick + every) if self.ramp_end < tick < self.last_change]
        return range(max(edge for edge in edges if edge <= step), min(edge for edge in edges if edge > step))

    @property
    def is_long_enough(self) -> bool:
        """Whether the run is long enough for warm-up, ramp and, where units are revived, at least one trial."""
        every, trial = self.config.revive_every, max(1, self.config.probation)
        has_ramp = self.begins_at_floor or self.warmup < self.ramp_end <= self.last_change
        return has_ramp and (not every or self.ramp_end + every + trial <= self.last_change)

    def can_fade(self, step: int) -> bool:
        """Whether a fade that begins at ``step`` ends by ``ramp_end``: later, traffic is promised to be k units'."""
        return step + self.config.kill_every <= self.ramp_end

    def _ticks(self, step: int, every: int) -> bool:
        return every > 0 and self.ramp_end < step <= self.last_change and (step - self.ramp_end) % every == 0


def steps_needed(config: KillReviveConfig, units: int) -> int:
    """The fewest steps of a run that has warm-up, ramp and trials; ``MAX_STEPS`` where none has."""

    def is_enough(steps: int) -> bool:
        return Timetable(config, units, steps).is_long_enough

    return 1 + bisect.bisect_left(range(1, MAX_STEPS), True, key=is_enough)
