"""Answers of an open model, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlora.edge.generation.generate import TokenAnswer
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.split import SplitModel


def generated(
    model: SplitModel | Context,
    prompt: Sequence[int],
    count: int,
    *,
    sampling: Sampling = Sampling(),
    draft_length: int | None = 0,
    stop: Sequence[int] = (),
) -> list[int]:
    """The tokens of an answer."""
    context = model if isinstance(model, Context) else Context(model)
    answer = TokenAnswer(
        context,
        np.array(prompt, np.int64),
        sampling,
        max_new_tokens=count,
        stop_token_ids=stop,
        draft_length=draft_length,
    )
    return [choice.token for choice in answer]
