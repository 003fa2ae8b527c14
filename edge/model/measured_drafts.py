"""What was measured of a model's drafts: what a step and a drafted token take, and how often drafts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from dlora.protocol.messages import MAX_DRAFT

_FIRST_ACCEPTED: Final = {"prompt": 0.2, "server": 0.6}  # in answers of chats; in code it is more
_FIRST_LENGTH: Final = {"prompt": 1, "server": 4}  # before anything is measured
_WEIGHT_OF_TOKEN: Final = 0.1  # the newest: some wrong ones in a row are common where most are right
_FADING: Final = 0.05


class DraftKind:
    """What was measured of one kind of drafts: of each token the time that it takes more, and how often it is right
    where those before it are."""

    def __init__(self, name: Literal["prompt", "server"]) -> None:
        self.first_length = _FIRST_LENGTH[name]
        self._first = self.accepted = _FIRST_ACCEPTED[name]
        self._token_s = 0.0

    def token_s(self, step_s: float) -> float:
        """Seconds that a token takes: at first a twentieth of a step, lest one long draft that came for nothing
        decide."""
        return self._token_s or step_s / 20

    def best(self, step_s: float) -> tuple[int, float]:
        """The length that gives most tokens a second, and how many that are.

        A draft of k tokens of which each is right with probability a, where those before it are, gives 1 + a + … + a^k
        tokens in t + k·e seconds.
        """
        lengths = np.arange(MAX_DRAFT + 1)
        rates = np.cumsum(self.accepted**lengths) / (step_s + lengths * self.token_s(step_s))
        return int(rates.argmax()), float(rates.max())

    def observe_time(self, drafted: int, extra_s: float, step_s: float) -> None:
        """So many tokens took ``extra_s``."""
        self._token_s = moving_mean(self.token_s(step_s), extra_s / drafted)

    def observe_tokens(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        """These were or would have been drafted where those were chosen."""
        for draft, choice in zip(drafted, chosen, strict=False):
            self.accepted = moving_mean(self.accepted, float(draft == choice), _WEIGHT_OF_TOKEN)
            if draft != choice:  # of those after the first that was wrong nothing is known
                return

    def fade(self) -> None:
        """What was learnt of a part of the text fades, so that drafts are tried again in the next."""
        self.accepted = moving_mean(self.accepted, self._first, _FADING)


class MeasuredDrafts:
    """Of one model, for all answers of a context.

    Attributes:
        prompt, server: of what is looked up in the text, and of what the server guesses.
        step_s: that a step takes without a draft; 0: not measured yet.
    """

    def __init__(self) -> None:
        self.prompt, self.server = DraftKind("prompt"), DraftKind("server")
        self.step_s = 0.0


def moving_mean(mean: float, new: float, weight: float = 0.2) -> float:
    """With a ``weight`` of the newest measurement."""
    return mean + weight * (new - mean)
