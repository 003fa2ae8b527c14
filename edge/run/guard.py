"""Whether a run has made the model worse than it was: by its held-out losses, or by its training loss without them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from dlora.edge.choices import OnWorse
from dlora.protocol.errors import WorseError

STEPS_OF_A_MEAN: Final = 10
MOST_ABOVE: Final = 1.1
"""A loss that is at most so many times the one before training says nothing yet: a run may begin with some bad steps,
and without held-out data the loss before training is that of a few texts."""


class Worsening(NamedTuple):
    """A loss that is above the one before training.

    Attributes:
        name: of the loss; before, now: means over labels.
    """

    name: str
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.name} {self.now:.4f}, {self.before:.4f} before training"


def held_out_worsening(evaluations: Sequence[Mapping[str, Any]], most_above: float = 1.0) -> Worsening | None:
    """Of a run's evaluations, ascending, each with ``step`` and ``loss``: the last against ``most_above`` times the one
    before training."""
    if not evaluations or evaluations[0]["step"] != 0 or evaluations[-1]["step"] == 0:
        return None
    before, now = (float(row["loss"]) for row in (evaluations[0], evaluations[-1]))
    return Worsening("held-out loss", before, now) if not now <= most_above * before else None


class TrainingLosses:
    """The losses of a run's steps, from the first one on, which is the loss before training."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = deque[float](maxlen=STEPS_OF_A_MEAN)

    def add(self, loss: float) -> None:
        """Of the next step."""
        if self._first is None:
            self._first = loss
        else:
            self._last.append(loss)

    @property
    def worsening(self) -> Worsening | None:
        """None, too, of too few steps to tell."""
        if self._first is None or len(self._last) < STEPS_OF_A_MEAN:
            return None
        now = math.fsum(self._last) / len(self._last)
        is_worse = not now <= MOST_ABOVE * self._first
        return Worsening(f"training loss of the last {STEPS_OF_A_MEAN} steps", self._first, now) if is_worse else None


class Guard:
    """Tells when a run has become worse, or better again.

    Args:
        evaluations: the run's held-out evaluations, as ``HeldOut`` has them, to which it appends; has_held_out: whether
            there will be any.

    Attributes:
        losses: of the steps so far, those of before a resumption included.
    """

    def __init__(self, evaluations: Sequence[Mapping[str, Any]], *, has_held_out: bool) -> None:
        self.losses = TrainingLosses()
        self._evaluations = evaluations
        self._has_held_out = has_held_out
        self._was_worse = False

    @property
    def worsening(self) -> Worsening | None:
        """How the model is worse at the end than before training; None where it is not, or nobody can say."""
        return held_out_worsening(self._evaluations) if self._has_held_out else self.losses.worsening

    def has_worsened(self) -> Worsening | None:
        """How it is worse by now, by far; once: not again until it was better in between."""
        found = held_out_worsening(self._evaluations, MOST_ABOVE) if self._has_held_out else self.losses.worsening
        is_new = found is not None and not self._was_worse
        self._was_worse = found is not None
        return found if is_new else None


def check_outcome(summary: Mapping[str, Any], on_worse: OnWorse) -> None:
    """Raise ``WorseError`` for the summary of a run that has made the model worse and was not to."""
    if on_worse == "stop" and summary["is_worse"]:
        steps, saved = summary["steps"], summary["saved_step"]
        kept = "the adapter that it began with" if saved == 0 else f"the adapter of step {saved}"
        raise WorseError(f"training has made the model worse by step {steps}; saved: {kept}")


def worse_line(worsening: Worsening, learning_rate: float) -> str:
    """What a user is told, with what helps, as a rule."""
    tenth = f"{learning_rate / 10:.2g}"
    return f"worse than before: {worsening}; try a tenth of the learning rate, --lr {tenth}, or more data"
