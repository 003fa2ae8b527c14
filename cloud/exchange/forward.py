"""Forward passes of sessions' contexts, with what their adapters add: each alone, or several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import find_head
from dlora.cloud.model.part_forward import PartForward, few_rows_in_one_thread
from dlora.cloud.model.side_by_side import SideBySide

from .passes import PassRunner
from .single_rows import SingleRows, twice
from .target_modules import original_forward, running_targets


@dataclass(eq=False)
class Forward:
    """Tokens that go on in a session's context, through some blocks. Under ``torch.no_grad``.

    Attributes:
        runner: of the session's groups; None: the base model alone.
        likeliest_from: the first of its tokens that the likeliest next one is wanted of; None: of none.
        hidden_states: once it has run, (1, tokens, width).
        likeliest: once it has run, of each of those tokens.
    """

    part: PartForward
    runner: PassRunner | None = None
    likeliest_from: int | None = None
    hidden_states: Tensor = field(init=False)
    likeliest: list[int] = field(init=False, default_factory=list)

    @property
    def tokens(self) -> int:
        return self.part.tokens

    @property
    def blocks(self) -> tuple[int, int | None]:
        return self.part.begin, self.part.end

    @property
    def base(self) -> BaseModel:
        return self.part.parts.base

    def run(self, single_rows: SingleRows = SingleRows()) -> None:
        """Alone; ``single_rows``: what is multiplied twice where it has one token."""
        is_twice = self.tokens == 1 and bool(single_rows.modules)
        with running_targets(_SideBySideRunner([self], single_rows) if is_twice else self.runner):
            self.hidden_states = self.part.run()
        _find_likeliest([self], single_rows)


Forwards = Iterator[Forward]
"""Passes of one session, each made once the one before has run."""


def run_side_by_side(side_by_side: SideBySide, forwards: Sequence[Forward]) -> None:
    """Several, of the same blocks, at once. After an error their caches are as before."""
    lengths = [forward.part.cache.length for forward in forwards]
    try:
        with running_targets(_SideBySideRunner(forwards, SingleRows())):
            found = side_by_side.run([forward.part for forward in forwards])
        for forward, hidden_states in zip(forwards, found, strict=True):
            forward.hidden_states = hidden_states
        _find_likeliest(forwards, SingleRows())
    except BaseException:
        for forward, length in zip(forwards, lengths, strict=True):
            forward.part.cache.cut(length)
        raise


def _find_likeliest(forwards: Sequence[Forward], single_rows: SingleRows) -> None:
    asking = [forward for forward in forwards if forward.likeliest_from is not None]
    if not asking:
        return
    wanted = [forward.hidden_states[0, forward.likeliest_from :] for forward in asking]
    rows, head = torch.cat(wanted), find_head(asking[0].base)
    logits = twice(head, rows) if len(rows) == 1 and single_rows.head else head(rows)
    for forward, found in zip(asking, logits.argmax(-1).split(list(map(len, wanted))), strict=True):
        forward.likeliest = found.tolist()


class _SideBySideRunner:
    """Runs target modules once for the tokens of all, and adds to each session's what its adapters give."""

    def __init__(self, forwards: Sequence[Forward], single_rows: SingleRows) -> None:
        self._parts = forwards[0].part.parts
        ends = list(accumulate(forward.tokens for forward in forwards))
        rows = [slice(end - forward.tokens, end) for forward, end in zip(forwards, ends, strict=True)]
        runners = zip((forward.runner for forward in forwards), rows, strict=True)
        self._runners = [(runner, own) for runner, own in runners if runner is not None]
        self._twice = single_rows.modules if ends[-1] == 1 else frozenset[str]()

    def run_target(self, name: str, x: Tensor) -> Tensor:
        """The output of a target module."""
        original = original_forward(self._parts.base, name)
        output = twice(original, x) if name in self._twice else original(x)
        for runner, rows in self._runners:
            if runner.runs(name):
                # As alone: with another number of threads a product in float32 is another to the bit.
                with few_rows_in_one_thread(self._parts, rows.stop - rows.start):
                    runner.add_deltas(name, x[..., rows, :], output[..., rows, :])
        return output

    def forget(self) -> None:
        """Drop the forward pass's tensors."""
        for runner, _ in self._runners:
            runner.forget()
