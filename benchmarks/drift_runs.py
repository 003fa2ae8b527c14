"""The runs of ``drift.py``: its variants, their order, and what is kept of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import msgspec
from economy_recipes import DEFAULT, RECIPES
from economy_runs import Score, Settings, Trained

Task = Literal["a", "b"]

TASKS: Final[tuple[Task, Task]] = ("a", "b")
FIRST: Final = "first task"
"""The run on task A with all units active, from whose adapter all runs on task B with its seed begin."""

SEEDS: Final = (0, 1, 2)
QUICK_STEPS: Final = 20
QUICK_ROWS: Final = 40
ACTIVE: Final = "1"  # as a step's ``units`` has it
HELD: Final = "3"


@dataclass(frozen=True)
class Variant:
    """What trains on task B.

    Attributes:
        title: for tables.
        kill_revive: fields of ``KillReviveConfig``.
        changes: whether the active units may change, so that the ticks matter.
        role: ``adaptive`` scores are judged against ``rival`` ones, which know nothing of the data.
        seeds: of its runs.
    """

    title: str
    kill_revive: dict[str, Any] = field(default_factory=dict)
    changes: bool = False
    role: Literal["adaptive", "rival", ""] = ""
    seeds: tuple[int, ...] = SEEDS


class Ticks(NamedTuple):
    """When units change, as ``KillReviveConfig`` has it: fit for a run of some 130 steps."""

    kill_every: int = 5
    revive_every: int = 20
    revive_share: float = 0.5
    probation: int = 10


# Of the blocks 15, 17, …, 29. What ``--kr-score static`` takes where none are named: evenly, the last one included.
_TWO: Final[dict[str, Any]] = {"score": "static", "static": (3, 7)}
_ONE: Final[dict[str, Any]] = {"score": "static", "static": (7,)}
_OTHER_TWO: Final[dict[str, Any]] = {"score": "static", "static": (0, 7)}


def _give(title: str, role: Literal["adaptive", "rival", ""] = "", **kill_revive: Any) -> Variant:
    settings = {"active_fraction": 0.25, "on_kill": "give_to_server", **kill_revive}
    changes = settings["score"] not in ("static", "last")
    return Variant(f"{title}, given to the server", settings, changes, role)


def _bypass(title: str, **kill_revive: Any) -> Variant:
    settings = {"active_fraction": 0.25, "on_kill": "bypass", **kill_revive}
    return Variant(f"{title}, bypassed", settings, settings["score"] != "static", seeds=(0,))


VARIANTS: Final[dict[str, Variant]] = {
    "static": _give("static: blocks 21 and 29", "rival", **_TWO),
    "random": _give("random: 2 of 8", "rival", score="random"),
    "grad": _give("grad: 2 of 8", "adaptive", score="grad"),
    "all": Variant("all 8 blocks active", {"active_fraction": 1.0}),
    "change": _give("change: 2 of 8", "adaptive", score="change"),
    "sensitivity": _give("sensitivity: 2 of 8", "adaptive", score="sensitivity"),
    "last": _give("last: blocks 27 and 29", score="last"),
    "static-15-29": _give("static: blocks 15 and 29", **_OTHER_TWO),
    "one-block": _give("one block: 29", **_ONE),
    "static-bypass": _bypass("static: blocks 21 and 29", **_TWO),
    "random-bypass": _bypass("random: 2 of 8", score="random"),
    "grad-bypass": _bypass("grad: 2 of 8", score="grad"),
}

QUICK: Final = ("static", "random", "grad")
RIVALS: Final = tuple(name for name, variant in VARIANTS.items() if variant.role == "rival")
ADAPTIVE: Final = tuple(name for name, variant in VARIANTS.items() if variant.role == "adaptive")

# What is run together, seed by seed; what the verdict rests on first.
_GROUPS: Final = (
    ("static", "random", "grad"),
    ("all", "change", "sensitivity", "last", "one-block", "static-15-29"),
    ("static-bypass", "random-bypass", "grad-bypass"),
)


def order(*, quick: bool = False) -> Iterator[tuple[str, int]]:
    """(variant, seed) of all that is to be run."""
    if quick:
        yield from ((name, 0) for name in QUICK)
        return
    for names in _GROUPS:
        for seed in SEEDS:
            yield from ((name, seed) for name in names if seed in VARIANTS[name].seeds)


class Run(Trained, frozen=True, kw_only=True):
    """One finished run.

    Attributes:
        history: the step and the units of each step whose units are not those of the step before, one digit a unit,
            its ``UnitState``; and what they are after the last step.
        given_bytes: of giving the server what killed units have learnt.
        validation, test: by task, after the run; None where it diverged.
    """

    history: list[tuple[int, str]]
    given_bytes: int
    validation: dict[Task, Score] | None
    test: dict[Task, Score] | None

    @property
    def kills(self) -> int:
        """How often an active unit became one that is not, after the first step."""
        return self._turns(lambda old, new: old == ACTIVE != new)

    @property
    def revivals(self) -> int:
        """How often a unit that was not active became active."""
        return self._turns(lambda old, new: old != ACTIVE == new)

    def _turns(self, counts: Callable[[str, str], bool]) -> int:
        states = [units for _, units in self.history]
        turns = [turn for before, after in pairwise(states) for turn in zip(before, after, strict=True)]
        return sum(counts(*turn) for turn in turns)


Finished = Mapping[str, Run]  # by digest


def changed_units(units: Sequence[str]) -> list[tuple[int, str]]:
    """What ``Run.history`` keeps, of the units in each step and after the last one."""
    before = ["", *units]
    return [(step, new) for step, (old, new) in enumerate(zip(before, units, strict=False)) if new != old]


def steps_held(units: Sequence[str]) -> list[int]:
    """How often each unit was HELD in a step; each time the server is given what it has learnt, before the report."""
    return [sum(state == HELD for state in states) for states in zip(*units, strict=True)]


class Plan:
    """Which runs there are to be, of what is finished.

    Args:
        model, dtype: of the server; quick: few steps, rows, seeds and variants.
    """

    def __init__(self, model: str, dtype: str, ticks: Ticks | None = None, *, quick: bool = False) -> None:
        self.model = model
        self.dtype = dtype
        self.ticks = ticks or Ticks()
        self.quick = quick

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:1] if self.quick else SEEDS

    def order(self) -> Iterator[tuple[str, int]]:
        """(variant, seed) of all that is to be run."""
        return order(quick=self.quick)

    def first(self, seed: int) -> Settings:
        """The settings of the run on task A."""
        begun = self._settings("a", FIRST, {"active_fraction": 1.0}, seed)
        return msgspec.structs.replace(begun, weight_decay=RECIPES[DEFAULT].weight_decay)

    def settings(self, variant: str, seed: int) -> Settings:
        """The settings of a run on task B."""
        chosen = VARIANTS[variant]
        begins_at_once = {"warmup_steps": 0, "warmup_fraction": 0.0, "ramp_fraction": 0.0}
        timing = {**begins_at_once, **self.ticks._asdict()} if chosen.changes else {}
        return self._settings("b", variant, {**chosen.kill_revive, **timing}, seed)

    def find(self, finished: Finished, variant: str) -> list[Run]:
        """The finished runs of a variant that did not diverge, by seed; of ``FIRST``, those on task A."""
        found = [finished.get((self.first(s) if variant == FIRST else self.settings(variant, s)).digest) for s in SEEDS]
        return [run for run in found if run is not None and run.test is not None]

    def _settings(self, task: Task, recipe: str, kill_revive: dict[str, Any], seed: int) -> Settings:
        return Settings(
            set=task,
            recipe=recipe,
            seed=seed,
            lr=RECIPES[DEFAULT].default_lr,
            adapter=RECIPES[DEFAULT].adapter,
            kill_revive=kill_revive,
            steps=QUICK_STEPS if self.quick else None,
            rows=QUICK_ROWS if self.quick else None,
            model=self.model,
            dtype=self.dtype,
        )
