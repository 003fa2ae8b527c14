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
from dlora.edge.model.measured_drafts import DraftKind, MeasuredDrafts, moving_mean
from dlora.protocol.choices import Drafts
from dlora.protocol.messages import MAX_DRAFT

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_FIRST_EXPECTED: Final = 0.6  # of tokens that are drawn


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


class Step(NamedTuple):
    """What the next step is to draft: ``looked_up`` tokens are sent, and the server is asked for ``guesses``."""

    looked_up: npt.NDArray[np.int64]
    guesses: Guesses = Guesses()


@dataclass
class Drafting:
    """Chooses what each step of an answer drafts: whatever gives most tokens a second, from what steps took and drafts
    hit so far.

    Attributes:
        measured: of the model, by this answer and those before it.
        by: who makes them.
        length: of each draft, whatever is measured; None: as above.
        is_greedy: whether always the likeliest token is chosen, which the server then expects.
    """

    measured: MeasuredDrafts
    by: Drafts = "auto"
    length: int | None = None
    is_greedy: bool = True

    def __post_init__(self) -> None:
        self._looked_up: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # for this step, whether it is sent or not
        self._expected = 1.0 if self.is_greedy else _FIRST_EXPECTED  # how often the server's next token is chosen

    def first(self, most: int) -> Step:
        """Of the prompt's step, which is to give the first token as soon as it can."""
        return Step(np.zeros(0, np.int64), Guesses(0, self._ahead(self._choose(self.measured.server)[0], most - 1)))

    def next(self, ids: npt.NDArray[np.int64], most: int, expects: int | None = None) -> Step:
        """What to draft after ``ids``, at most ``most`` tokens; ``expects``: the token that the server has gone on
        with, if it has."""
        is_expected = expects == int(ids[-1])
        if expects is not None:
            self._expected = moving_mean(self._expected, float(is_expected))
        prompt, prompt_rate = self._choose(self.measured.prompt)
        server, server_rate = self._choose(self.measured.server)
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
        self.measured.prompt.observe_tokens(self._looked_up.tolist(), chosen)
        known_s = self.measured.step_s
        if len(step.looked_up):
            if known_s:
                self.measured.prompt.observe_time(len(step.looked_up), max(0.0, seconds - known_s), known_s)
            return
        step_s = max(seconds - found.drafts_s, 1e-6)
        self.measured.step_s = moving_mean(self.measured.step_s, step_s) if self.measured.step_s else step_s
        self.measured.prompt.fade()
        if found.drafts:
            self.measured.server.observe_tokens(found.drafts, chosen)
            self.measured.server.observe_time(len(found.drafts), found.drafts_s, self.measured.step_s)
        else:
            self.measured.server.fade()

    def _ahead(self, length: int, most: int) -> int | None:
        """How many tokens the server is to guess ahead, of at most ``most``; None where that does not pay: where it
        mostly expects another token than is chosen, the device waits for guesses that nobody needs."""
        if self.by not in ("auto", "server") or most < 0:
            return None
        length = min(length, most)
        # One of three round trips is saved, or as many tokens are guessed for nothing.
        saved_s, lost_s = self.measured.step_s / 3, (1 + length) * self.measured.server.token_s(self.measured.step_s)
        return length if self._expected * saved_s >= (1 - self._expected) * lost_s else None

    def _choose(self, kind: DraftKind) -> tuple[int, float]:
        if self.length is not None:
            return self.length, kind.accepted
        return kind.best(self.measured.step_s) if self.measured.step_s else (kind.first_length, kind.accepted)
