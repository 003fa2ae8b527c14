"""Examples with a prompt, an invocation at its end, and an answer."""

from __future__ import annotations

import numpy as np
from families import VOCABULARY

from dlora.edge.data.examples import Dataset

INVOCATION = (7, 8)


def answered(prompt: list[int], answer: list[int], tail: tuple[int, ...] = INVOCATION) -> tuple[list[int], list[int]]:
    """An example of ``prompt``, ``tail`` and ``answer``, whose tokens are labels."""
    ids = [*prompt, *tail, *answer]
    return ids, list(range(len(ids) - len(answer) - 1, len(ids) - 1))


def random_answers(examples: int = 9, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset.of(
        [
            answered(rng.integers(9, VOCABULARY, rng.integers(1, 7)).tolist(), rng.integers(9, VOCABULARY, 3).tolist())
            for _ in range(examples)
        ]
    )
