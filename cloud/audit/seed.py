"""The seed of a run: whether a guess of it can be checked."""

from __future__ import annotations

from dlora.protocol import messages as m

from .finding import Finding, found_by, nothing_there
from .observed import Observed
from .scoring import Attack
from .seed_guessing import SERVER_CANDIDATES, candidates_of
from .truth import Truth


def audit_seed(seen: Observed, truth: Truth) -> Finding:
    """Whether the run's seed can be guessed: A, and the order of the data, are drawn from it."""
    purpose = seen.openings[0].purpose
    if not isinstance(purpose, m.Train):
        return nothing_there("seed", "no number that is drawn from a seed crosses")
    fits = list(candidates_of(purpose.seed, SERVER_CANDIDATES))
    name = f"{len(SERVER_CANDIDATES):,} guesses"
    if fits:
        attack = Attack(name=name, figure=1.0, interval=(1.0, 1.0), found=f"--seed {fits[0]}")
        return found_by("seed", [attack], "the number that the server's draws get fits it; A is drawn from it, too")
    if truth.seed_was_chosen:
        attack = Attack(name="guesses of all 2^32", figure=1.0, interval=(1.0, 1.0), found="in under an hour")
        return found_by("seed", [attack], f"--seed was chosen; it is not among the first {len(SERVER_CANDIDATES):,}")
    attack = Attack(name=name, figure=0.0, interval=(0.0, 0.0), found="none fits")
    return found_by("seed", [attack], "without --seed it is 128 random bits")
