"""Adapters to answer with, and answers of an open model, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from families import VOCABULARY
from serving import config, random_dataset, randomize_all, training

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


def save_random_adapter(bundle: Path, url: str, directory: Path, seed: int = 0) -> None:
    """A LoRA of random weights, large enough to change what is said."""
    with training(bundle, url, config(), random_dataset(VOCABULARY)) as trainer:
        randomize_all(trainer, seed)
        trainer.save_adapter(directory)
