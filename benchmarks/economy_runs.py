"""Finished runs of ``economy.py``: what a run is, the file that keeps them, and which one comes next."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from economy_data import SETS
from economy_recipes import GRID, RECIPES, Recipe

from dlora.edge.choices import ScheduleName

CHOOSING_SEED: Final = 0
CURVE: Final = (0.1, 0.25, 0.5, 0.75)  # shares of a run's steps after which it is evaluated, and at its end
CURVE_ROWS: Final = 100


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What makes a run: with the same there is no second one.

    A field that is added must have a default that is what runs were before: then those that are there still count.

    Attributes:
        recipe: its name, which also says what is not here: whether it has gains.
        adapter, kill_revive: the recipe's, as it was when the run was made.
        lr: None: found before the first step, as for a user who gives none.
        steps: None: one epoch.
        model: the base model's name.
        warmup: as the command has it; it and ``schedule`` are what the command takes by default.
        dtype: of the base model on the server.
        rows: most rows of each evaluation; None: all.
        device_blocks: how many of the last blocks run on the device.
    """

    set: str
    recipe: str
    seed: int
    lr: float | None
    adapter: dict[str, Any]
    kill_revive: dict[str, Any]
    steps: int | None
    model: str
    dtype: str
    batch_size: int = 8
    schedule: ScheduleName = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    rows: int | None = None
    device_blocks: int = 0

    @property
    def optimizer(self) -> dict[str, Any]:
        """Its optimizer's settings."""
        return {name: getattr(self, name) for name in ("lr", "schedule", "warmup", "weight_decay")}

    @property
    def digest(self) -> str:
        """Short hex digest of all of it."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Each held-out row: its loss in thousandths of a nat, its labels, and ``1`` where all of them were likeliest."""

    losses: list[int]
    labels: list[int]
    right: str


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Mean loss a label, and the share of rows whose every label was the likeliest token, as greedy decoding has it."""

    loss: float
    accuracy: float
    rows: Rows | None = None


class Point(msgspec.Struct, frozen=True, array_like=True):
    """What a run had cost at a step, and its loss on at most 100 validation rows."""

    step: int
    bytes: int
    loss: float
    round_trips: int
    cpu_s: float
    wall_s: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What one finished run was, what it cost, and what it is worth.

    Attributes:
        settings, digest: what was run.
        data: fingerprint of the tokens; commit: of dlora; date: when it was finished.
        steps, tokens, labelled: done, sent through the model, and labels among them.
        bytes_up, bytes_down: of all frames but those of evaluations: greeting, session, adapter state and steps.
        set_up_bytes: those before the first step, but for ``rate_bytes``, which finding the learning rate took;
            report_bytes: those of reports and their signals.
        found_lr: the learning rate, where it was found.
        evaluation_bytes: of evaluations, which are not in any other number.
        bytes_per_token: up and down.
        round_trips_per_step: median.
        edge_compute_s: what the device's graphs took; device_cpu_s: processor time of its whole process.
        train_loss_last: mean loss of the last 50 steps; it, validation and test are None where the run diverged.
        validation, test: with the adapter used live, as PEFT does; test_in_passes: used in the passes of its training.
        reconnects, steps_rerun: 0 where nothing went wrong; their bytes are counted.
    """

    digest: str
    settings: Settings
    data: str
    commit: str
    date: str
    steps: int
    tokens: int
    labelled: int
    bytes_up: int
    bytes_down: int
    set_up_bytes: int
    report_bytes: int
    evaluation_bytes: int
    bytes_per_token: float
    round_trips_per_step: float
    edge_compute_s: float
    device_cpu_s: float
    wall_s: float
    train_loss_last: float | None
    reconnects: int
    steps_rerun: int
    found_lr: float | None = None
    rate_bytes: int = 0
    curve: list[Point]
    validation: Score | None
    test: Score | None
    test_in_passes: Score | None = None

    @property
    def validation_loss(self) -> float:
        """Infinite where the run diverged."""
        return math.inf if self.validation is None else self.validation.loss


Finished = Mapping[str, Run]  # by digest


class RunsFile:
    """A JSON line for each finished run, appended to.

    A last line that is torn, because its writer was killed, is no run; the next one takes its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        self._whole = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                run = msgspec.json.decode(line, type=Run)
            except msgspec.MsgspecError as error:
                raise SystemExit(f"error: {path}:{number} is not a run ({error})") from None
            self.runs[run.digest] = run
            self._whole += len(line)

    def append(self, run: Run) -> None:
        """Keep a run; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._whole)
            file.write(msgspec.json.encode(run) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        self.runs[run.digest] = run


class Plan:
    """Which runs there are to be, of what is finished.

    Args:
        model, dtype: of the server; quick: short runs of few rows, with nothing but the first rate.
        recipes: by name.
        grid: the learning rates that a recipe chooses among.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        *,
        quick: bool = False,
        recipes: Mapping[str, Recipe] = RECIPES,
        grid: Sequence[float] = GRID,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.recipes = recipes
        self._grid = grid
        self._quick = quick

    def settings(self, set_name: str, recipe_name: str, lr: float | None, seed: int) -> Settings:
        """The settings of one run; ``lr``: None: it is found."""
        recipe = self.recipes[recipe_name]
        # Left out where it is nothing: msgspec leaves out the default itself, and not what equals it.
        more: dict[str, Any] = {"weight_decay": recipe.weight_decay} if recipe.weight_decay else {}
        more |= {"device_blocks": recipe.device_blocks} if recipe.device_blocks else {}
        return Settings(
            set=set_name, recipe=recipe_name, seed=seed, lr=lr, adapter=recipe.adapter, kill_revive=recipe.kill_revive,
            steps=20 if self._quick else SETS[set_name].steps, rows=40 if self._quick else None, model=self.model,
            dtype=self.dtype, **more,
        )  # fmt: skip

    def find(self, finished: Finished, set_name: str, recipe_name: str, lr: float | None, seed: int) -> Run | None:
        """A finished run."""
        return finished.get(self.settings(set_name, recipe_name, lr, seed).digest)

    def tried(self, finished: Finished, set_name: str, recipe_name: str) -> dict[float, float]:
        """Validation losses of the grid's rates, as far as they were tried."""
        runs = {rate: self.find(finished, set_name, recipe_name, rate, CHOOSING_SEED) for rate in self._grid}
        return {rate: run.validation_loss for rate, run in runs.items() if run is not None}

    def chosen_lr(self, finished: Finished, set_name: str, recipe_name: str) -> float | None:
        """The rate of a recipe on a set; None where it is not chosen yet, or nothing of the grid converged."""
        tried = self.tried(finished, set_name, recipe_name)
        if not self._chooses(recipe_name) or self._next_rate(tried, set_name, recipe_name) is not None:
            return None
        return best_rate(tried)

    def next(self, finished: Finished, set_name: str, recipe_name: str) -> Settings | None:
        """The next run of a recipe on a set: to choose its rate, then with every seed; None where all are there."""
        return next(self._open(finished, set_name, recipe_name), None)

    def _open(self, finished: Finished, set_name: str, recipe_name: str) -> Iterator[Settings]:
        recipe = self.recipes[recipe_name]
        found = self.settings(set_name, recipe_name, None, CHOOSING_SEED)
        if recipe.usual_lr(set_name) is None and found.digest not in finished:
            yield found
        if self._chooses(recipe_name):
            rate = self._next_rate(self.tried(finished, set_name, recipe_name), set_name, recipe_name)
            if rate is not None:
                yield self.settings(set_name, recipe_name, rate, CHOOSING_SEED)
        # The rates that are reported: the chosen one, and the one of a user who gives none.
        chosen = self.chosen_lr(finished, set_name, recipe_name)
        for lr in dict.fromkeys([*([] if chosen is None else [chosen]), recipe.usual_lr(set_name)]):
            for seed in (0,) if self._quick else recipe.seeds(set_name):
                if self.find(finished, set_name, recipe_name, lr, seed) is None:
                    yield self.settings(set_name, recipe_name, lr, seed)

    def _chooses(self, recipe_name: str) -> bool:
        return self.recipes[recipe_name].has_grid and not self._quick

    def _next_rate(self, tried: Mapping[float, float], set_name: str, recipe_name: str) -> float | None:
        recipe = self.recipes[recipe_name]
        return next_rate(tried, recipe.usual_lr(set_name) or recipe.default_lr, self._grid)


def next_rate(tried: Mapping[float, float], start: float, grid: Sequence[float] = GRID) -> float | None:
    """The rate to try next, of those tried so far and their validation losses; None where the best is known.

    From the grid's rate that is nearest to ``start`` outward while that gains something: the best so far must have both
    its neighbours tried, the larger one first.
    """
    if not tried:
        return min(grid, key=lambda rate: abs(math.log(rate / start)))
    best = grid.index(min(tried, key=lambda rate: (tried[rate], rate)))
    neighbours = [grid[place] for place in (best + 1, best - 1) if 0 <= place < len(grid)]
    return next((rate for rate in neighbours if rate not in tried), None)


def best_rate(tried: Mapping[float, float]) -> float | None:
    """The rate with the lowest validation loss; None where no run converged."""
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate), default=None)
