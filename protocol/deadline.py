"""How long to wait for a peer, derived from how long it took so far."""

from __future__ import annotations

from typing import Final

REMEMBERED_WAITS: Final = 64
MAX_FACTOR: Final = 10.0


class Deadline:
    """A deadline for something that happens again and again, and has been measured.

    It is ``factor`` times the longest of the last 64 waits, at least ``floor_s``, in seconds, and at most ten times
    that: a peer that is slow on purpose must not be able to make us wait for hours. The longest and not the mean: a
    wait is mostly over soon, and a peer that is given up too early costs more than one that is given up late.

    It has no clock; the caller measures. Several threads may wait for the same peer.
    """

    def __init__(self, floor_s: float, factor: float = 10.0) -> None:
        assert floor_s > 0, floor_s
        assert factor >= 1, factor
        self._floor_s = floor_s
        self._factor = factor
        self._ceiling_s = MAX_FACTOR * floor_s
        self._waits_s: tuple[float, ...] = ()  # replaced, never changed: another thread may be reading it
        self._multiplier = 1.0

    @property
    def seconds(self) -> float:
        """How long to wait the next time."""
        measured_s = max(self._floor_s, self._factor * max(self._waits_s, default=0.0))
        return min(self._ceiling_s, measured_s * self._multiplier)

    def observe(self, seconds: float) -> None:
        """It happened, after so long.

        More than the deadline itself counts as the deadline: nobody waited longer, so it was a clock that jumped or
        a machine that slept. For the same reason a negative wait is no error.
        """
        self._waits_s = (*self._waits_s[1 - REMEMBERED_WAITS :], min(seconds, self.seconds))
        self._multiplier = 1.0

    def missed(self) -> None:
        """It did not happen in time: the next deadline is twice this one, until one is met."""
        if self.seconds < self._ceiling_s:
            self._multiplier *= 2
