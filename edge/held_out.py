"""Held-out evaluations of a run: kept on disk, the best one with its weights, and when there is no use in going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlora.protocol.errors import StoppedError

from .atomic import write_atomically
from .data import Dataset
from .report import Reporter
from .trainer import Trainer

EVALUATIONS = "evaluations.jsonl"
BEST = "best"
EVALUATION = "evaluation.json"


class HeldOut:
    """A run's held-out data, and what was found on it; a resumed run has what was found before.

    The adapter with the lowest loss so far, the untrained one included, lies in ``best/`` beside the last one.

    Args:
        every: steps between evaluations; 0: none on the way.
        patience: how many evaluations in a row may be no better before the run ends; None: any number.
        stop: whether somebody asked to stop.

    Attributes:
        rows: step and ``Evaluation`` of each, as JSON has them.
    """

    def __init__(
        self,
        out: Path,
        dataset: Dataset | None,
        *,
        every: int,
        patience: int | None,
        trainer: Trainer,
        reporter: Reporter,
        stop: Callable[[], bool],
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._out = out
        self._dataset = dataset
        self._every = every
        self._patience = patience
        self._trainer = trainer
        self._reporter = reporter
        self._stop = stop
        self._data = "" if dataset is None else dataset.fingerprint
        if trainer.next_step:
            # Those of the history that goes on.
            self.rows = [row for row in self._load() if row["step"] <= trainer.next_step]

    def due(self) -> bool:
        """Whether one belongs between the last step and the next, and is not there."""
        step = self._trainer.next_step
        return self._every > 0 and step > 0 and step % self._every == 0 and not self.is_done()

    def is_done(self) -> bool:
        """Whether there is one of the weights as they are."""
        return any(row["step"] == self._trainer.next_step for row in self.rows)

    def add(self, when: str) -> None:
        """Evaluate now, where there is held-out data. Raises ``StoppedError`` soon after somebody asked to stop."""
        if self._dataset is None:
            return
        with self._reporter.evaluating(when, len(self._dataset)) as advance:

            def after_batch(examples: int, _: int) -> None:
                advance(examples)
                if self._stop():
                    raise StoppedError(f"stopped while evaluating; go on with dlora-edge resume {self._out}")

            result = self._trainer.evaluate(self._dataset, after_batch)
        row = {"step": self._trainer.next_step, **asdict(result), "data": self._data}
        is_best = self.best is None or result.loss < self.best["loss"]
        if is_best:
            # Before the row: where that is missing, both are made again.
            self._trainer.save_adapter(self._out / BEST)
            write_atomically(self._out / BEST / EVALUATION, json.dumps(row).encode() + b"\n")
        self.rows.append(row)
        write_atomically(self._out / EVALUATIONS, b"".join(json.dumps(row).encode() + b"\n" for row in self.rows))
        self._reporter.say(
            f"held-out loss {when}: {result.loss:.4f} over {result.tokens} tokens, "
            f"{result.token_accuracy:.1%} of tokens right" + (", the best so far" if is_best and self.rows[1:] else "")
        )

    @property
    def best(self) -> dict[str, Any] | None:
        """The row with the lowest loss, the first of equals; None before any."""
        return min(self.rows, key=lambda row: float(row["loss"]), default=None)

    def is_out_of_patience(self) -> bool:
        """Whether the last ``patience`` evaluations were no better than one before them in this part of the run."""
        losses = [row["loss"] for row in self.rows if row["step"] >= self._trainer.config.part_begins]
        if self._patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self._patience

    def keep_best(self) -> None:
        """Save the best adapter in place of the last one."""
        best = self.best
        if best is None or best["step"] == self._trainer.next_step:
            return
        if self._saved_row() != best:  # the run went back behind them, and evaluates at other steps since
            self._reporter.warn(f"the weights of step {best['step']}, the best evaluation, are gone: the last are kept")
            return
        self._trainer.copy_adapter(self._out / BEST, self._out)
        if best["step"] == 0:
            self._reporter.warn("no evaluation was better than the one before training; try a lower --lr, or more data")
        self._reporter.say(f"saved: the adapter of step {best['step']}, which has the lowest held-out loss")

    def _saved_row(self) -> Any:
        """The evaluation that the adapter in ``best/`` is of; None where nobody can say."""
        try:
            return json.loads((self._out / BEST / EVALUATION).read_bytes())
        except (OSError, ValueError):
            return None

    def _load(self) -> list[dict[str, Any]]:
        """What stands in the file of this very data; it is not worth a run, so damage is told."""
        path, found, others = self._out / EVALUATIONS, [], 0
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                float(row["step"] + row["loss"])
                if self._dataset is None or row["data"] == self._data:
                    found.append(row)
                else:
                    others += 1
            except (ValueError, TypeError, KeyError, RecursionError):
                self._reporter.warn(f"{path} has a damaged line, which is left out")
        if others:
            self._reporter.warn(f"{path}: {others} evaluations of other held-out data are left out")
        return found
