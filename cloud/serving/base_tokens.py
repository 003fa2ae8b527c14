"""Tokens that go on in a session's context in the base model, or with an adapter that was lent, and guesses after them.

What is to be computed is handed out pass by pass, so that whoever computes can run it beside that of other sessions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.cloud.exchange.forward import Forward, Forwards
from dlora.cloud.exchange.passes import PassRunner
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.model.context import Context
from dlora.protocol.micro_batch import GroupStates


class BaseTokens:
    """Tokens of one micro-batch.

    Args:
        states: groups that the server applies; and those whose reads are wanted, where tokens run in passes. Without
            either the blocks from ``Ways.lowest`` on run when they are needed.
        as_ids: as ``SessionModel.embed`` takes it.

    Attributes:
        ids: of those that were guessed, the last ones.
        embeds: (tokens, embedding_size) of all; hidden_states: what came out of the first blocks; last_hidden_states:
            once all have run; (1, tokens, width) each.
    """

    def __init__(
        self, model: SessionModel, context: Context, states: GroupStates, *, in_passes: bool, as_ids: bool
    ) -> None:
        self.ids: list[int] = []
        self._model = model
        self._context = context
        self._reading = states.live if in_passes else ()
        self._given = states.given
        self._in_passes = in_passes
        self._as_ids = as_ids
        self._next = 0  # what is likeliest to follow
        self._embeds: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._last: list[Tensor] = []
        self._reads: dict[int, list[Tensor]] = {group: [] for group in self._reading}
        self._not_run = 0  # of the last ones, through the other blocks

    @property
    def embeds(self) -> Tensor:
        return torch.cat(self._embeds)

    @property
    def hidden_states(self) -> Tensor:
        return torch.cat(self._hidden, 1)

    @property
    def last_hidden_states(self) -> Tensor:
        return torch.cat(self._last, 1)

    @property
    def reads(self) -> dict[int, Tensor]:
        """What each group reads at the tokens at which adapters act."""
        return {group: torch.cat(each) for group, each in self._reads.items()}

    def take(self, embeds: Tensor, acts_from: int = 0, *, goes_on: bool = False) -> Forwards:
        """Take in tokens, (tokens, embedding_size); adapters act from number ``acts_from`` of these on.

        ``goes_on``: whether ``guess`` follows.
        """
        self._embeds.append(embeds)
        hidden_states, first = embeds[None], self._context.first(embeds[None])
        if first is not None:
            yield (forward := Forward(first))
            hidden_states = forward.hidden_states
        self._context.take(hidden_states)
        self._hidden.append(hidden_states)
        self._not_run += len(embeds)
        if (self._reading or self._given) and acts_from < len(embeds):
            rows = torch.arange(acts_from, len(embeds)) if acts_from else None
            runner = self._model.pass_runner(self._reading, self._given, rows)
            yield from self._run(runner, goes_on=goes_on)
            for group, read in runner.reads.items():
                self._reads[group].append(read)
        elif self._in_passes:
            yield from self._run(goes_on=goes_on)

    def take_expected(self, token: int, guesses: int) -> Forwards:
        """Take in a token that the device has not sent, as it would embed it, and guesses after it."""
        yield from self.take(self._model.embed([token], as_ids=self._as_ids), goes_on=guesses > 0)
        yield from self.guess(guesses)

    def guess(self, count: int) -> Forwards:
        """Take in so many tokens more, each the likeliest one after those before it."""
        for left in reversed(range(count)):
            yield from self._run(goes_on=True)
            self.ids.append(self._next)
            yield from self.take(self._model.embed([self._next], as_ids=self._as_ids), goes_on=left > 0)

    def run(self) -> Forwards:
        """Run all blocks on what was taken in."""
        return self._run(goes_on=False)

    def _run(self, runner: PassRunner | None = None, *, goes_on: bool) -> Forwards:
        """``goes_on``: whether the likeliest next token is wanted."""
        if self._not_run:
            part = self._context.base()
            yield (forward := Forward(part, runner, part.tokens - 1 if goes_on else None))
            if goes_on:
                (self._next,) = forward.likeliest
            self._last.append(forward.hidden_states[:, -self._not_run :])
            self._not_run = 0
