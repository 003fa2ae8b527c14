"""Generates the tokens of an answer, one step with the model after the other."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dlora.edge.data.examples import last_occurrence
from dlora.edge.data.prompt import Constraint
from dlora.edge.model.context import Context
from dlora.edge.model.ends import LongArray
from dlora.protocol.choices import Drafts
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import FloatArray

from .drafts import Drafting
from .sampling import Choice, Sampler, Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Counters:
    """What an answer took.

    Attributes:
        prompt_tokens: of the prompt; reused_tokens: those of them that the server held already.
        tokens: produced, a stop token among them.
        drafted, accepted: tokens that were proposed, and that were right.
        first_token_s: until the first token; seconds: in all.
        bytes_sent, bytes_received, round_trips: on the wire.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    round_trips: int = 0


class TokenAnswer:
    """One answer, made token by token.

    Args:
        context: what it belongs to; it may have been used for another before.
        prompt: int64 (tokens,), all that comes before the answer.
        stop_token_ids: tokens that end it.
        drafts: who makes them; draft_length: of each; None: what pays.
        constraint: which tokens it may have; None: any.
        should_stop: whether the user wants no more; asked before each step.

    Attributes:
        counters: so far.
        finish_reason: once it has ended: ``stop`` for a stop token, ``length`` where ``max_new_tokens`` or the limit of
            the context was reached, ``cancelled`` where ``should_stop`` said so.

    Raises ``DataError`` for a prompt that is empty or too long.
    """

    def __init__(
        self,
        context: Context,
        prompt: LongArray,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        drafts: Drafts = "auto",
        draft_length: int | None = None,
        constraint: Constraint | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if not len(prompt):
            raise DataError("the prompt is empty; say something")
        if len(prompt) >= context.limit:
            raise DataError(f"the prompt has {len(prompt)} tokens, the server takes {context.limit}; say less")
        self.counters = Counters(prompt_tokens=len(prompt))
        self.finish_reason: FinishReason | None = None
        self._context = context
        self._ids = prompt
        self._prompt_tokens = len(prompt)
        self._sampler = Sampler(sampling, prompt)
        self._most = min(max_new_tokens, context.limit - len(prompt))
        self._stop_token_ids = frozenset(stop_token_ids)
        self._drafting = Drafting(
            context.drafts, _who_drafts(drafts, context), draft_length, is_greedy=sampling.temperature == 0.0
        )
        self._expects: int | None = None  # the token with which the server has gone on
        self._constraint = constraint
        self._should_stop = should_stop
        self._acts_from = acts_from(prompt, context.model.invocation)

    def __iter__(self) -> Iterator[Choice]:
        """Its tokens as they are chosen; not the stop token. Raises what ``Context.logits`` does."""
        started, before = time.perf_counter(), self._context.model.counters
        try:
            while self.finish_reason is None:
                for choice in self._step():
                    self.counters.tokens += 1
                    self.counters.seconds = time.perf_counter() - started
                    if self.counters.tokens == 1:
                        self.counters.first_token_s = self.counters.seconds
                    if choice.token in self._stop_token_ids:
                        self.finish_reason = "stop"
                        return
                    yield choice
        finally:
            self.counters.seconds = time.perf_counter() - started
            counted = self._context.model.counters
            self.counters.bytes_sent, self.counters.bytes_received, self.counters.round_trips = (
                now - then for now, then in zip(counted, before, strict=True)
            )

    def _step(self) -> Iterator[Choice]:
        """One step with the model: the next token, and those after it that a draft had right."""
        produced = len(self._ids) - self._prompt_tokens
        if produced == self._most:
            self.finish_reason = "length"
            return
        if self._should_stop():
            self.finish_reason = "cancelled"
            return
        step = self._drafting.first(self._most - 1)
        if produced:
            step = self._drafting.next(self._ids, self._most - produced - 1, self._expects)
        started = time.perf_counter()
        ids = np.concatenate([self._ids, step.looked_up]).astype(np.int64)
        found = self._context.extend(ids, self._acts_from, len(step.looked_up) + 1, step.guesses)
        if not produced:
            self.counters.reused_tokens = self._context.reused
        seconds, self._expects = time.perf_counter() - started, found.expects
        draft = (*step.looked_up.tolist(), *found.drafts)
        chosen: list[int] = []
        try:
            for row, drafted in zip(found.logits, (*draft, None), strict=True):
                choice = self._choose(row)
                self._ids = np.append(self._ids, choice.token)
                chosen.append(choice.token)
                yield choice
                if choice.token != drafted or len(self._ids) - self._prompt_tokens == self._most:
                    break
        finally:  # also where the answer ends in the middle
            self.counters.drafted += len(draft)
            self.counters.accepted += sum(map(operator.eq, draft, chosen))
        if produced:  # the first step was the prompt's
            self._drafting.observe(step, found, chosen, seconds)

    def _choose(self, row: FloatArray) -> Choice:
        if self._constraint is None:
            return self._sampler.choose(row)
        choice = self._sampler.choose(row, self._constraint.allowed())
        self._constraint.accept(choice.token)
        return choice


def _who_drafts(asked: Drafts, context: Context) -> Drafts:
    """Where no server guesses, only the text itself is left."""
    if context.model.can_guess or asked in ("prompt", "off"):
        return asked
    return "prompt" if asked == "auto" else "off"


def acts_from(prompt: LongArray, invocation: tuple[int, ...]) -> int:
    """The row from which on the adapters act; one that is never reached where the prompt does not invoke them."""
    if not invocation:
        return 0
    found = last_occurrence(prompt.astype(np.int32), invocation)
    return found if found < len(prompt) else 2**31 - 1
