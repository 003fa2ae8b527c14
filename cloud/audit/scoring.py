"""What an attack's result is worth: a figure, an interval, and one of four words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from statistics import NormalDist, median
from typing import Final

import msgspec
import torch
from torch import Tensor

_Z: Final = NormalDist().inv_cdf(0.975)
EXPOSED_FROM: Final = 0.9
RESISTED_UP_TO: Final = 0.05
RESISTED_INTERVAL: Final = 0.25


class Verdict(StrEnum):
    """What is left of a secret, once every attack has been tried."""

    EXPOSED = "EXPOSED"  # the best attack finds at least EXPOSED_FROM of it
    PARTIAL = "PARTIAL"
    RESISTED = "RESISTED"  # at most RESISTED_UP_TO of what a guess does not find, and surely less than a quarter
    BY_CONSTRUCTION = "BY CONSTRUCTION"  # nothing that crosses was computed from it


class Attack(msgspec.Struct, frozen=True, kw_only=True):
    """What one attack found.

    Attributes:
        name: of the attack; figure: the share of the secret that it found, 0 to 1; interval: of that figure.
        found: the same for people.
        guess: the figure of a guess that looks at nothing.
        may_resist: whether finding nothing says something: where more of the same would be solved, it does not.
    """

    name: str
    figure: float
    interval: tuple[float, float]
    found: str
    guess: float = 0.0
    may_resist: bool = True

    @property
    def verdict(self) -> Verdict:
        """Of this attack alone."""
        if self.figure >= EXPOSED_FROM:
            return Verdict.EXPOSED
        room = max(1.0 - self.guess, 1e-9)
        found, at_most = ((each - self.guess) / room for each in (self.figure, self.interval[1]))
        resisted = self.may_resist and found <= RESISTED_UP_TO and at_most <= RESISTED_INTERVAL
        return Verdict.RESISTED if resisted else Verdict.PARTIAL


def share(name: str, right: int, of: int, texts: int, what: str, *, guess: float = 0.0) -> Attack:
    """An attack that found ``right`` of so many things.

    The interval is Wilson's of 95 % (https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval), with each
    of the ``texts``, that differ, counted once: what is in one text is not independent, and one that crosses again is
    no other one.
    """
    figure = right / of if of else 0.0
    found = f"{right:,} of {of:,} {what} ({100 * figure:.1f} %)"
    return Attack(name=name, figure=figure, interval=wilson(figure, texts), found=found, guess=guess)


def commonest(values: Tensor) -> float:
    """The share of the commonest of some tokens, int64 (tokens,): who guesses without looking says it each time."""
    return int(torch.bincount(values).max()) / len(values)


def wilson(figure: float, count: int) -> tuple[float, float]:
    """The interval of a share that ``count`` independent trials gave."""
    if not count:
        return 0.0, 1.0
    middle = figure + _Z**2 / (2 * count)
    half = _Z * math.sqrt(figure * (1 - figure) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def matrices(name: str, errors: Sequence[float], what: str) -> Attack:
    """An attack that found matrices, with these relative errors: the figure is the share of the squared norm that the
    median one explains, the interval that of the worst and the best.

    Of one that finds little no RESISTED follows: equations that are too few for now are solved with more tokens.
    """
    errors = [error if math.isfinite(error) else math.inf for error in errors]
    middle = median(errors)
    figure, low, high = (max(0.0, 1.0 - error**2) for error in (middle, max(errors), min(errors)))
    found = f"{what} to {_percent(middle)} ({_percent(min(errors))} to {_percent(max(errors))})"
    return Attack(name=name, figure=figure, interval=(low, high), found=found, may_resist=False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, over the norm of what is wanted."""
    return float(torch.linalg.norm((found - wanted).double()) / torch.linalg.norm(wanted.double()).clamp_min(1e-300))


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"
