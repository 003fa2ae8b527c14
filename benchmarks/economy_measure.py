"""What a run of ``economy.py`` costs and what it is worth, measured beside the trainer."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from economy_runs import Rows, Score

from dlora.edge.data.batches import evaluation_batches
from dlora.edge.data.examples import Dataset
from dlora.edge.model.split import SplitModel
from dlora.edge.training.trainer import Trainer
from dlora.protocol.errors import NonFiniteError


def add_run_options(parser: argparse.ArgumentParser, work: str, names: str) -> None:
    """Data and server of runs, and which of them are made; ``names``: what ``--only`` takes."""
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DLORA_DATA", "../shared/data")))
    parser.add_argument("--dtype", default="bfloat16", help="of the base model on the server")
    parser.add_argument("--work", type=Path, default=Path(work), help="for what several runs use")
    parser.add_argument("--runs", type=Path, help="where finished runs are kept; in --docs by default")
    parser.add_argument("--only", nargs="+", default=[], metavar=names, help="or its first part alone; * as well")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="make no runs, write what stands there")


class Cost(NamedTuple):
    """What was spent so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    round_trips: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def now(cls, trainer: Trainer | None) -> Self:
        counted = (0, 0, 0) if trainer is None else trainer.model.counters
        return cls(*counted, time.process_time(), time.perf_counter())

    @property
    def bytes(self) -> int:
        return self.bytes_up + self.bytes_down

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the processor and by the clock."""
        return round(self.cpu_s, 2), round(self.wall_s, 1)

    def plus(self, other: Cost, sign: int = 1) -> Cost:
        up, down, trips, cpu, wall = (mine + sign * theirs for mine, theirs in zip(self, other, strict=True))
        return Cost(int(up), int(down), int(trips), cpu, wall)


class Meter:
    """What training has cost since the meter was made, and apart from it what evaluations have.

    Attributes:
        trainer: whose connection is counted, once there is one.
        evaluation: the cost of all that was done ``aside``.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.evaluation = Cost()
        self._began = Cost.now(None)
        self._before = Cost()

    def cost(self) -> Cost:
        """What training has cost so far."""
        return Cost.now(self.trainer).plus(self._began, -1).plus(self.evaluation, -1).plus(self._before)

    def begin_again(self, trainer: Trainer, before: Cost) -> None:
        """Measure from now on; what training has cost ``before`` is known."""
        self.trainer, self._began, self._before = trainer, Cost.now(trainer), before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is no training."""
        before = Cost.now(self.trainer)
        try:
            yield
        finally:
            self.evaluation = self.evaluation.plus(Cost.now(self.trainer).plus(before, -1))


class Row(NamedTuple):
    """A held-out row: its summed loss, its labels, and whether all of them were likeliest."""

    loss: float
    labels: int
    is_right: bool


def evaluate_rows(trainer: Trainer, dataset: Dataset, batch_size: int, *, live: bool = True) -> list[Row]:
    """As ``Trainer.evaluate``, but row by row: live, or in the run's passes."""
    rows: list[Row] = []
    model = trainer.model
    for batch in evaluation_batches(dataset.acting_on_answers(trainer.config.invocation), batch_size):
        with model.asked_live() if live and isinstance(model, SplitModel) else nullcontext():
            losses, predictions = model.evaluate(batch)
        ends = np.searchsorted(batch.label_positions, np.cumsum(batch.sequence_lengths))
        is_right, start = predictions == batch.labels, 0
        for end in ends.tolist():
            loss = float(losses[start:end].sum(dtype=np.float64))
            if not math.isfinite(loss):
                raise NonFiniteError("NaN or infinity in a held-out loss")
            rows.append(Row(loss, end - start, bool(is_right[start:end].all())))
            start = end
    return rows


def score(rows: Sequence[Row], *, keep_rows: bool = False) -> Score:
    """Mean loss a label and share of right rows; ``keep_rows``: and each row's."""
    kept = Rows(
        losses=[round(1000 * row.loss) for row in rows],
        labels=[row.labels for row in rows],
        right="".join("1" if row.is_right else "0" for row in rows),
    )
    return Score(
        loss=round(math.fsum(row.loss for row in rows) / sum(row.labels for row in rows), 5),
        accuracy=round(sum(row.is_right for row in rows) / len(rows), 5),
        rows=kept if keep_rows else None,
    )
