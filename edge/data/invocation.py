"""Adapters that act on answers only: the tokens that invoke them, and from which row on they act in an example.

This is PEFT's activated LoRA (Greenewald et al., arXiv 2504.12397; ``alora_invocation_tokens``): an adapter acts from
the first token of the invocation's last occurrence on, and everything before it is the base model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from dlora.protocol.errors import UsageError

from .examples import Dataset, Example, last_occurrence

MAX_TOKENS: Final = 64  # of an invocation; headers of templates have two to eight


def find_invocation(dataset: Dataset, held_out: Sequence[Dataset] = ()) -> tuple[int, ...]:
    """The tokens that every prompt of ``dataset`` ends with and no answer contains: the chat template's header of an
    assistant's turn, or the shortest that will do, in ``held_out`` as well where there are such.

    All of them have one answer an example. Raises ``UsageError`` where there are none, also where nothing comes before
    them in any example: adapters would act everywhere after all.
    """
    header = dataset.facts.assistant_header
    tail = _common_tail(dataset)
    candidates = [tail[-length:] for length in range(1, len(tail) + 1)]
    if header and tail[-len(header) :] == header:
        candidates.insert(0, header)
    best: tuple[int, ...] = ()
    fewest = math.inf
    for tokens in candidates:
        has_prompts = any(_answer_start(example) > len(tokens) for example in dataset)
        if has_prompts and not uninvoked(dataset, tokens):
            count = sum(uninvoked(each, tokens) for each in held_out)
            if count < fewest:
                best, fewest = tokens, count
            if not count:
                break
    if not best:
        what = "no answer contains" if tail else "all prompts share"
        raise UsageError(
            f"--active-from answer: the prompts have no last tokens that {what}, so nothing can say where an answer "
            "begins; use --active-from start, or end every prompt with the same words"
        )
    return best


def uninvoked(dataset: Dataset, tokens: tuple[int, ...]) -> int:
    """How many examples do not begin their answer after the last ``tokens``: adapters do not act on all of it there."""
    return sum(last_occurrence(each.ids, tokens) != _answer_start(each) - len(tokens) for each in dataset)


def uninvoked_line(dataset: Dataset, tokens: tuple[int, ...]) -> str | None:
    """What to tell a user of them; None where there are none."""
    count = uninvoked(dataset, tokens)
    if not count:
        return None
    return (
        f"warning: in {count:,} of {len(dataset):,} examples the prompt does not end with the adapter's invocation, or "
        "the answer contains it: there the adapter does not act on the whole answer"
    )


def _common_tail(dataset: Dataset) -> tuple[int, ...]:
    """The last tokens that all prompts share, at most ``MAX_TOKENS``."""
    prompts = (tuple(each.ids[: _answer_start(each)][-MAX_TOKENS:].tolist()) for each in dataset)
    tail = next(prompts, ())
    for prompt in prompts:
        while tail and prompt[-len(tail) :] != tail:
            tail = tail[1:]
    return tail


def _answer_start(example: Example) -> int:
    """The row of the first labelled token."""
    return int(example.label_positions[0]) + 1
