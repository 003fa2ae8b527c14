"""Drafts: tokens that may come next, which the server runs along with the one that is known.

They cost no correctness: each is compared with the token that is chosen from the true logits, and all after the first
that differs are dropped. They come from two places:

- the text itself: where its last tokens stood before, what followed them then may follow again (prompt lookup, Saxena
  2023; Yang et al., arXiv 2304.04487). No model is asked.
- the server, which has the base model: what that would say (speculative decoding, Leviathan et al., arXiv 2211.17192,
  with the base model as the one that drafts). It guesses one token after the other, which takes it time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dlora.edge.model.extension import Extension, Guesses
from dlora.protocol.choices import Drafts
from dlora.protocol.messages import MAX_DRAFT

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_WEIGHT: Final = 0.2  # of the newest measurement
_FIRST_ACCEPTED: Final = {"prompt": 0.2, "server": 0.6}  # in answers of chats; in code it is more
_FIRST_EXPECTED: Final = 0.6  # of tokens that are drawn
_FIRST_LENGTH: Final = {"prompt": 1, "server": 4}  # before anything is measured


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


class _Kind:
    """What was measured of one kind of drafts: of each token the time that it takes more, and how often it is right
    where those before it are."""

    def __init__(self, name: str) -> None:
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
        self._token_s = _mean(self.token_s(step_s), extra_s / drafted)

    def observe_tokens(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        """These were or would have been drafted where those were chosen."""
        for draft, choice in zip(drafted, chosen, strict=False):
            self.accepted = _mean(self.accepted, float(draft == choice))
            if draft != choice:  # of those after the first that was wrong nothing is known
                return

    def fade(self) -> None:
        """What was learnt of a part of the text fades, so that drafts are tried again in the next."""
        self.accepted = _mean(self.accepted, self._first, weight=0.02)


class Step(NamedTuple):
    """What the next step is to draft: ``looked_up`` tokens are sent, and the server is asked for ``guesses``."""

    looked_up: npt.NDArray[np.int64]
    guesses: Guesses = Guesses()


@dataclass
class Drafting:
    """Chooses what each step of an answer drafts: whatever gives most tokens a second, from what steps took and drafts
    hit so far.

    Attributes:
        by: who makes them.
        length: of each draft, whatever is measured; None: as above.
        is_greedy: whether always the likeliest token is chosen, which the server then expects.
    """

    by: Drafts = "auto"
    length: int | None = None
    is_greedy: bool = True

    def __post_init__(self) -> None:
        self._prompt, self._server = _Kind("prompt"), _Kind("server")
        self._step_s = 0.0  # that a step takes without a draft
        self._looked_up: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # for this step, whether it is sent or not
        self._expected = 1.0 if self.is_greedy else _FIRST_EXPECTED  # how often the server's next token is chosen

    def first(self, most: int) -> Step:
        """Of the prompt's step, which is to give the first token as soon as it can."""
        return Step(np.zeros(0, np.int64), Guesses(0, self._ahead(self._choose(self._server)[0], most - 1)))

    def next(self, ids: npt.NDArray[np.int64], most: int, expects: int | None = None) -> Step:
        """What to draft after ``ids``, at most ``most`` tokens; ``expects``: the token that the server has gone on
        with, if it has."""
        is_expected = expects == int(ids[-1])
        if expects is not None:
            self._expected = _mean(self._expected, float(is_expected))
        prompt, prompt_rate = self._choose(self._prompt)
        server, server_rate = self._choose(self._server)
        if self.by in ("auto", "prompt"):
            self._looked_up = look_up_draft(ids, MAX_DRAFT)
        looked_up = self._looked_up[: min(prompt, most)]
        # What the server has guessed already costs nothing more.
        if len(looked_up) and not is_expected and (self.by == "prompt" or prompt_rate > server_rate):
            return Step(looked_up)
        if self.by in ("auto", "server"):
            return Step(ids[:0], Guesses(min(server, most), self._ahead(server, most - 1)))
        return Step(ids[:0])

    def observe(self, step: Step, found: Extension, chosen: Sequence[int], seconds: float) -> None:
        """A step gave ``found``, of which the tokens ``chosen`` came, and took ``seconds``."""
        self._prompt.observe_tokens(self._looked_up.tolist(), chosen)
        if len(step.looked_up):
            if self._step_s:
                self._prompt.observe_time(len(step.looked_up), max(0.0, seconds - self._step_s), self._step_s)
            return
        step_s = max(seconds - found.drafts_s, 1e-6)
        self._step_s = _mean(self._step_s, step_s) if self._step_s else step_s
        self._prompt.fade()
        if found.drafts:
            self._server.observe_tokens(found.drafts, chosen)
            self._server.observe_time(len(found.drafts), found.drafts_s, self._step_s)
        else:
            self._server.fade()

    def _ahead(self, length: int, most: int) -> int | None:
        """How many tokens the server is to guess ahead, of at most ``most``; None where that does not pay: where it
        mostly expects another token than is chosen, the device waits for guesses that nobody needs."""
        if self.by not in ("auto", "server") or most < 0:
            return None
        length = min(length, most)
        # One of three round trips is saved, or as many tokens are guessed for nothing.
        saved_s, lost_s = self._step_s / 3, (1 + length) * self._server.token_s(self._step_s)
        return length if self._expected * saved_s >= (1 - self._expected) * lost_s else None

    def _choose(self, kind: _Kind) -> tuple[int, float]:
        if self.length is not None:
            return self.length, kind.accepted
        return kind.best(self._step_s) if self._step_s else (kind.first_length, kind.accepted)


def _mean(mean: float, new: float, weight: float = _WEIGHT) -> float:
    return mean + weight * (new - mean)
