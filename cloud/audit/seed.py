"""The seed of a run: whether a guess of it can be checked."""

from __future__ import annotations

from dlora.protocol import messages as m

from .finding import Finding, found_by, nothing_there
from .observed import Observed
from .scoring import Attack
from .seed_guessing import SERVER_CANDIDATES, candidates_of


def audit_seed(seen: Observed) -> Finding:
    """Whether the run's ``--seed`` is one that is guessed: A, and the order of the data, are drawn from it.

    No truth is needed: that one of 2^20 guesses fits by chance happens in one of 4,096 runs.
    """
    purpose = seen.openings[0].purpose
    if not isinstance(purpose, m.Train):
        return nothing_there("seed", "nothing is drawn where nothing is trained")
    fits = list(candidates_of(purpose.seed, SERVER_CANDIDATES))
    name = f"{len(SERVER_CANDIDATES):,} guesses"
    if fits:
        attack = Attack(name=name, figure=1.0, interval=(1.0, 1.0), found=f"--seed {fits[0]}")
        return found_by("seed", [attack], "the number that the server's draws get fits it; A is drawn from it, too")
    attack = Attack(name=name, figure=0.0, interval=(0.0, 0.0), found="none fits")
    why = "128 random bits, or a number that was not among the guesses: all 2^32 of --seed take under an hour"
    return found_by("seed", [attack], why)
