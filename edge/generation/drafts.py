"""Drafts: tokens that may come next, which the server runs along with the one that is known.

They cost no correctness: each is compared with the token that is chosen from the true logits, and all after the first
that differs are dropped. They are looked up in the text itself: where its last tokens stood before, what
followed them then may follow again (prompt lookup, Saxena 2023; Yang et al., arXiv 2304.04487). No model is asked.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

MAX_DRAFT: Final = 16
_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_WEIGHT: Final = 0.2  # of the newest measurement
_FIRST_ACCEPTED: Final = 0.3  # in answers of chats; in code it is more


def look_up_draft(ids: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` tokens that followed the last occurrence of what ``ids`` ends with; none where there is none.

    The longest match counts, of four tokens down to two.
    """
    for length in range(min(_LONGEST_MATCH, len(ids) - 1), _SHORTEST_MATCH - 1, -1):
        if most < 1:
            break
        tail = ids[-length:]
        # Windows of all places but the last one, which is the tail itself.
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], length)
        places = np.flatnonzero((windows == tail).all(axis=1))
        if len(places):
            start = int(places[-1]) + length
            return ids[start : start + most]
    return ids[:0]


class DraftLength:
    """How long drafts should be: whatever gives most tokens a second, from what steps took and drafts hit so far.

    A draft of k tokens of which each is right with probability a, where those before it are, gives 1 + a + … + a^k
    tokens in t + k·e seconds. Both times and a are measured while generating.

    Args:
        fixed: the length, whatever is measured; None: as above.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._accepted = _FIRST_ACCEPTED
        self._step_s = 0.0
        self._extra_s = 0.0  # of a drafted token

    @property
    def length(self) -> int:
        """How many tokens the next draft should have at most."""
        if self._fixed is not None:
            return self._fixed
        if not self._step_s:
            return 1
        lengths = np.arange(MAX_DRAFT + 1)
        tokens = np.cumsum(self._accepted**lengths)
        rates = tokens / (self._step_s + lengths * self._drafted_token_s)
        return int(rates.argmax())

    @property
    def _drafted_token_s(self) -> float:
        # At first a twentieth of a step, lest one long draft that came for nothing decide.
        return self._extra_s or self._step_s / 20

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        """A step with ``drafted`` tokens took ``seconds``, and the first ``accepted`` of them were right."""
        if not drafted:
            self._step_s = _mean(self._step_s, seconds) if self._step_s else seconds
            # What was learnt of a part of the text fades, so that drafts are tried again in the next.
            self._accepted = _mean(self._accepted, _FIRST_ACCEPTED, weight=0.02)
            return
        if self._step_s:
            extra_s = max(0.0, seconds - self._step_s) / drafted
            self._extra_s = _mean(self._drafted_token_s, extra_s)
        tried = min(drafted, accepted + 1)  # of those after the first that was wrong nothing is known
        for number in range(tried):
            self._accepted = _mean(self._accepted, float(number < accepted))


def _mean(mean: float, new: float, weight: float = _WEIGHT) -> float:
    return mean + weight * (new - mean)
