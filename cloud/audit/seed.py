"""The seed of a run: whether a guess of it can be checked."""

from __future__ import annotations

from dlora.protocol import messages as m

from .finding import Finding, found_by, nothing_there
from .observed import Observed
from .scoring import Attack
from .truth import Truth


def audit_seed(seen: Observed, truth: Truth) -> Finding:
    """Whether the run's seed can be guessed: A, and the order of the data, are drawn from it.

    A guess can be checked against the number that crosses for the server's draws; of those that a user can choose there
    are 2^32.
    """
    if not isinstance(seen.openings[0].purpose, m.Train):
        return nothing_there("seed", "no number that is drawn from a seed crosses")
    if truth.seed_was_chosen:
        attack = Attack(name="guesses of all 2^32", figure=1.0, interval=(1.0, 1.0), found="in under an hour")
        return found_by("seed", [attack], "--seed was chosen: the number that the server's draws get fits no other")
    attack = Attack(name="guesses of all 2^32", figure=0.0, interval=(0.0, 0.0), found="none fits")
    return found_by("seed", [attack], "without --seed it is 128 random bits")
