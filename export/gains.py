"""What adapters of each target module are multiplied by, so that a learning rate means the same for all of them.

AdamW moves each trained number by about its learning rate, whatever the sizes of what goes into a module and comes out
of it. How much that changes the output, as a share of it, is the rate times ``‖x‖ / ‖y‖``, which differs tenfold
between models and between modules of one. Multiplied by the module's *gain*, ``‖y‖ / ‖x‖``, it is the same share
everywhere. Changes of weights that leave the model's function as it is leave a run as it is, then: larger norms before
smaller modules, or larger values before a smaller output projection.

Gains are measured on random tokens: those of real texts are near them (docs/log/experiments.md). So a bundle has them,
and a device and its server need not agree on any others. It has them as powers of two: multiplying by one rounds
nothing, so that an adapter that is saved, loaded and trained on has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.cloud.model.base_model import BaseModel, model_code
from dlora.cloud.model.ends import EmbeddingEnd
from dlora.protocol.groups import MAX_GAIN, GroupSpec, with_gains

REFERENCE_GAIN: Final = 5.0
"""What a bundle has as 1: about the mean of SmolLM2-135M's modules, on which default rates were first chosen."""

_TOKENS: Final = 128
_SEED: Final = 3


def with_measured_gains(base: BaseModel, embedding: EmbeddingEnd, groups: Sequence[GroupSpec]) -> tuple[GroupSpec, ...]:
    """``groups`` with the gain of each of their target modules, of a base model with this ``embedding``."""
    gains = _measure_gains(base, embedding, [target.name for group in groups for target in group.targets])
    return with_gains(groups, lambda name: relative_gain(gains.get(name, math.nan)))


def relative_gain(gain: float) -> float:
    """What a bundle has of a measured gain: over ``REFERENCE_GAIN``, as a power of two; 1 where there is none to
    measure, as of a weight of zeros, or of a module that no token came to."""
    if not (math.isfinite(gain) and gain > 0):
        return 1.0
    return min(max(2.0 ** round(math.log2(gain / REFERENCE_GAIN)), 1 / MAX_GAIN), MAX_GAIN)


def _measure_gains(base: BaseModel, embedding: EmbeddingEnd, names: Sequence[str]) -> dict[str, float]:
    """``‖y‖ / ‖x‖`` of each module, a median over tokens: of a few tokens hidden states are thousands of times as large
    as of all others, and sums would be theirs alone."""
    tokens = min(_TOKENS, base.max_sequence_length)
    ids = torch.from_numpy(np.random.default_rng(_SEED).integers(0, len(embedding.weight), (1, tokens)))
    gains: dict[str, float] = {}

    def measuring(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = (torch.linalg.vector_norm(tensor.float(), dim=-1).flatten() for tensor in (inputs[0], output))
            gains[name] = float((y / x)[x > 0].median()) if bool((x > 0).any()) else 0.0

        return hook

    with ExitStack() as hooks, torch.no_grad(), model_code(base.name, base.architecture):
        for name in names:
            hooks.callback(base.targets[name].module.register_forward_hook(measuring(name)).remove)
        base.last_hidden_state(embedding(ids))
    return gains
