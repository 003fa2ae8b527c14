"""Held-out evaluations of a run: kept on disk, the best one with its weights, and when there is no use in going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from dlora.edge.data.examples import Dataset
from dlora.edge.files import write_atomically
from dlora.edge.model.evaluation import Evaluation
from dlora.edge.training.expected import EvaluationPlan
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.trainer import Trainer
from dlora.protocol.errors import StoppedError
from dlora.protocol.files import read_regular

from .display import Display
from .file_names import EVALUATIONS
from .saving import AdapterSaver
from .watcher import Watchers

WORSE_LIVE_NATS, WORSE_LIVE = 0.008, 0.01
"""A loss that is so much above another, in nats or as a share of it, is worse."""
BEST = "best"
EVALUATION = "evaluation.json"


class LiveLoss(NamedTuple):
    """Held-out loss of an adapter that was trained in passes, used live, and whether it is worse than in passes."""

    loss: float
    is_worse: bool


class HeldOut:
    """A run's held-out data, and what was found on it; a resumed run has what was found before.

    The adapter with the lowest loss so far, the untrained one included, lies in ``best/`` beside the last one.

    Args:
        evaluations: what ``load_evaluations`` found.
        should_stop: whether somebody asked to stop.

    Attributes:
        evaluations: step and ``Evaluation`` of each, as JSON has them.
        bytes_up, bytes_down: what those that were made here put on the wire.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        evaluations: list[dict[str, Any]],
        trainer: Trainer,
        saver: AdapterSaver,
        display: Display,
        watchers: Watchers,
        should_stop: Callable[[], bool],
    ) -> None:
        self.evaluations = evaluations
        self.bytes_up = self.bytes_down = 0
        assert trainer.config.saving.out is not None
        self._out = trainer.config.saving.out
        self._dataset = dataset
        self._trainer = trainer
        self._saver = saver
        self._display = display
        self._watchers = watchers
        self._should_stop = should_stop

    def is_due(self) -> bool:
        """Whether one belongs between the last step and the next, and is not there."""
        step, every = self._trainer.next_step, self._trainer.config.evaluate_every
        return every > 0 and step > 0 and step % every == 0 and not self.is_done()

    def is_done(self) -> bool:
        """Whether the present weights were evaluated."""
        return any(row["step"] == self._trainer.next_step for row in self.evaluations)

    def count_left(self, next_step: int) -> int:
        """How many evaluations are still to come at ``next_step``."""
        if self._dataset is None:
            return 0
        config = self._trainer.config
        return EvaluationPlan(self._dataset, config.evaluate_every).count_left(next_step, config.total_steps)

    def add(self, when: str) -> None:
        """Evaluate now, where there is held-out data. Raises ``StoppedError`` soon after somebody asked to stop."""
        if self._dataset is None:
            return
        result = self._evaluate(self._dataset, when)
        row = {"step": self._trainer.next_step, **asdict(result), "data": self._dataset.fingerprint}
        is_best = self.best is None or result.loss < self.best["loss"]
        if is_best:
            # Before the line: where that is missing, both are made again.
            self._saver.save(self._out / BEST, row)
            write_atomically(self._out / BEST / EVALUATION, json.dumps(row).encode() + b"\n")
        self.evaluations.append(row)
        lines = b"".join(json.dumps(each).encode() + b"\n" for each in self.evaluations)
        write_atomically(self._out / EVALUATIONS, lines)
        self._watchers.evaluation(row)
        self._display.say(
            f"held-out loss {when}: {result.loss:.4f} over {result.tokens} tokens, "
            f"{result.token_accuracy:.1%} of tokens right"
            + (", the best so far" if is_best and self.evaluations[1:] else "")
        )

    def live_loss(self, saved_step: int) -> LiveLoss | None:
        """Of the saved adapter, used live, as PEFT does, where it was trained in passes: its loss is said beside that
        of its passes, and kept in its record. None: it was trained live, or nothing can be said."""
        if self._trainer.config.passes is None:
            return None
        if self._dataset is None:
            self._display.warn("without held-out data nobody knows what the adapter is worth live, as PEFT uses it")
            return None
        if saved_step != self._trainer.next_step and not self._trainer.take_adapter(self._out):
            self._display.warn(
                "units were killed since the saved adapter's step: it is not evaluated live, as PEFT uses it"
            )
            return None
        loss = self._evaluate(self._dataset, "live", live=True).loss
        in_passes = next(float(row["loss"]) for row in self.evaluations if row["step"] == saved_step)
        is_worse = loss > in_passes + min(WORSE_LIVE_NATS, WORSE_LIVE * in_passes)
        passes = self._trainer.config.server.passes
        said = f"held-out loss live, as PEFT uses the saved adapter: {loss:.4f}; in passes {passes}: {in_passes:.4f}"
        if is_worse:
            self._display.warn(f"{said}: it is worse where it is used so; train with --passes live, or more passes")
        else:
            self._display.say(said)
        self._trainer.copy_adapter(self._out, self._out, eval_loss_live=loss, is_worse_live=is_worse)
        return LiveLoss(loss, is_worse)

    def _evaluate(self, dataset: Dataset, when: str, *, live: bool = False) -> Evaluation:
        with self._display.evaluating(when, len(dataset)) as advance:

            def after_batch(examples: int, _: int) -> None:
                advance(examples)
                if self._should_stop():
                    raise StoppedError(f"stopped while evaluating; go on with dlora-edge resume {self._out}")

            up, down = self._trainer.traffic
            result = self._trainer.evaluate(dataset, after_batch, live=live)
            self.bytes_up += self._trainer.traffic[0] - up
            self.bytes_down += self._trainer.traffic[1] - down
        return result

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss, the first of equals; None before any."""
        return min(self.evaluations, key=lambda row: float(row["loss"]), default=None)

    def keep_best(self) -> int:
        """Save the best adapter in place of the last one; gives the step of the one that is saved now."""
        best, last = self.best, self._trainer.next_step
        if best is None or best["step"] == last:
            return last
        if self._saved_row() != best:  # the run was resumed from an earlier step, and evaluates at other steps since
            self._display.warn(f"the weights of step {best['step']}, the best evaluation, are gone: the last are kept")
            return last
        self._trainer.copy_adapter(self._out / BEST, self._out)
        if best["step"] == 0:
            self._display.warn(
                "no evaluation was better than the one before training: what is saved is the adapter that the run "
                "began with, which has learnt nothing of the data"
            )
        else:
            self._display.say(f"saved: the adapter of step {best['step']}, which has the lowest held-out loss")
        return int(best["step"])

    def _saved_row(self) -> Any:
        """The evaluation that the adapter in ``best/`` is of; None where nobody can say."""
        try:
            return json.loads(read_regular(self._out / BEST / EVALUATION))
        except (OSError, ValueError):
            return None


class _Line(msgspec.Struct):
    """What an evaluation's line must have."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    loss: float
    data: str


def load_evaluations(
    out: Path, dataset: Dataset | None, next_step: int, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The evaluations of the history that goes on at ``next_step``, of this very data where there are some.

    They are not worth a run, so ``warn`` is called with what is damaged.
    """
    path, found, others = out / EVALUATIONS, list[dict[str, Any]](), 0
    for line in read_regular(path).splitlines() if path.is_file() else []:
        try:
            row = msgspec.json.decode(line, type=_Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            warn(f"{path} has a damaged line, which is not counted")
            continue
        if row.step > next_step or next_step == 0:
            continue
        if dataset is None or row.data == dataset.fingerprint:
            found.append(json.loads(line))
        else:
            others += 1
    if others:
        warn(f"{path}: {others} evaluations of other held-out data are not counted")
    return found


def is_out_of_patience(evaluations: Sequence[dict[str, Any]], config: Resolved) -> bool:
    """Whether the last ``--patience`` evaluations of the present part were no better than one before them in it."""
    losses = [row["loss"] for row in evaluations if row["step"] >= config.part_begins]
    patience = config.saving.patience
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
