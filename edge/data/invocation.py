"""Adapters that act on answers only: the tokens that invoke them, and from which row on they act in an example.

This is PEFT's activated LoRA (Greenewald et al., arXiv 2504.12397; ``alora_invocation_tokens``): an adapter acts from
the first token of the invocation's last occurrence on, and everything before it is the base model's own.
"""

from __future__ import annotations

from typing import Final

from dlora.protocol.errors import UsageError

from .examples import Dataset, Example, last_occurrence

MAX_TOKENS: Final = 64  # of an invocation; headers of templates have two to eight


def find_invocation(dataset: Dataset) -> tuple[int, ...]:
    """The tokens that every prompt of ``dataset`` ends with and no answer contains: the chat template's header of an
    assistant's turn, or the shortest that will do.

    ``dataset`` has one answer an example. Raises ``UsageError`` where there are none, also where nothing comes before
    them in any example: adapters would act everywhere after all.
    """
    header = dataset.assistant_header
    tail = _common_tail(dataset)
    shortest_first = [tail[-length:] for length in range(1, len(tail) + 1)]
    if header and tail[-len(header) :] == header:
        shortest_first.insert(0, header)
    for tokens in shortest_first:
        starts = [_answer_start(example) - len(tokens) for example in dataset]
        found = (last_occurrence(example.ids, tokens) for example in dataset)
        if any(starts) and all(start == each for start, each in zip(starts, found, strict=True)):
            return tokens
    what = "no answer contains" if tail else "all prompts share"
    raise UsageError(
        f"--adapt answer: the prompts have no last tokens that {what}, so nothing can say where an answer begins; use "
        "--adapt all, or end every prompt with the same words"
    )


def _common_tail(dataset: Dataset) -> tuple[int, ...]:
    """The last tokens that all prompts share, at most ``MAX_TOKENS``."""
    tail: tuple[int, ...] | None = None
    for example in dataset:
        end = _answer_start(example)
        prompt = tuple(example.ids[max(0, end - MAX_TOKENS) : end].tolist())
        if tail is None:
            tail = prompt
        while tail and prompt[-len(tail) :] != tail:
            tail = tail[1:]
    return tail or ()


def _answer_start(example: Example) -> int:
    """The row of the first labelled token."""
    return int(example.label_positions[0]) + 1
