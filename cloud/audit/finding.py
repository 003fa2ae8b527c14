"""What an audit says of one secret."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .scoring import Attack, Verdict


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the audit.

    Attributes:
        secret: what might be recovered.
        verdict: of the best attack; None where the recording has nothing of the kind.
        attacks: all that were tried, the best first.
        why: what it comes from, in words.
    """

    secret: str
    verdict: Verdict | None
    attacks: tuple[Attack, ...] = ()
    why: str = ""

    @property
    def best(self) -> Attack | None:
        """The attack that won."""
        return self.attacks[0] if self.attacks else None


def found_by(secret: str, attacks: Sequence[Attack], why: str = "") -> Finding:
    """A finding of what attacks found: the verdict is that of the best of them. One that was tried and found nothing
    at all says no more than that."""
    ordered = tuple(sorted(attacks, key=lambda attack: -attack.figure))
    return Finding(secret=secret, verdict=ordered[0].verdict if ordered else None, attacks=ordered, why=why)


def by_construction(secret: str, why: str) -> Finding:
    """A finding of what nothing that crossed was computed from."""
    return Finding(secret=secret, verdict=Verdict.BY_CONSTRUCTION, why=why)


def nothing_there(secret: str, why: str) -> Finding:
    """A finding of what the recording has none of."""
    return Finding(secret=secret, verdict=None, why=why)
