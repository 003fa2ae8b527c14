"""What training takes of a device's memory where blocks of the base model run on it: an estimate, meant to be a little
high.

One formula for both who ask it: an export that puts as many blocks into a bundle as a device can hold, and
``dlora-edge plan``. Calibrated on SmolLM2-135M; docs/log/decisions/0045 has what was measured beside what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .groups import GroupSpec
from .manifest import StoredDtype

RUNTIME_MB: Final = 130  # Python, libraries that were touched, the engine's graphs, and one slab of the head
USUAL_TOKENS: Final = 256  # of a micro-batch
STORED_DTYPES: Final[dict[StoredDtype, float]] = {"int4": 0.5 + 2 / 32, "int8": 1, "fp16": 2, "fp32": 4}
"""Bytes a value; of int4 32 share a scale of fp16, as in every model whose widths are multiples of 32."""
TRAINED_COPIES: Final = 4  # of what is trained: value, gradient and two moments
_FLOAT: Final = 4
_HEAD_WIDTH: Final = 64  # of attention, in most families
_SCORES: Final = 4  # copies of one block's scores of attention that are alive at a time
_SLACK: Final = 1.05  # what lies between allocations of many sizes
_WIDENED_MB: Final[dict[StoredDtype, int]] = {"int4": 12, "int8": 12, "fp16": 0, "fp32": 0}
"""What integers are widened into."""
_WIDE_COPIES: Final = 3  # of a block's widest tensors, in the pass that is under way


@dataclass(frozen=True)
class DeviceModel:
    """What of a base model with so many ``blocks`` is on the device; ``groups`` are the exchange groups of all modules
    that can be trained, of all linear modules of the blocks, that is."""

    blocks: int
    hidden_size: int
    vocabulary_size: int
    groups: Sequence[GroupSpec]
    head_dtype: StoredDtype
    block_dtype: StoredDtype


def head_bytes(vocabulary_size: int, hidden_size: int, dtype: StoredDtype) -> float:
    """Of the LM head's weight, with a scale of fp32 a row for int8."""
    return vocabulary_size * (hidden_size * STORED_DTYPES[dtype] + (_FLOAT if dtype == "int8" else 0))


def training_bytes(model: DeviceModel, count: int, tokens: int, rank: int, trained: int | None = None) -> float:
    """Peak of a process that trains LoRA in the last ``count`` blocks, which run in it, mapped weights included.

    Args:
        tokens: of the largest micro-batch.
        trained: numbers that are trained; None: LoRA of ``rank`` beside every linear module of these blocks.
    """
    here = [group for group in model.groups if group.block >= model.blocks - count]
    # Numbers a token of what each block's modules give, and their LoRA's A.
    widths = Counter[int]()
    for group in here:
        widths[group.block] += group.out_features + rank * len(group.targets)
    # Until backward each block keeps its input, and its products with frozen weights and with lora_A.
    kept = widths.total() + model.hidden_size * len(widths)
    scores = tokens * max(1, model.hidden_size // _HEAD_WIDTH)
    if trained is None:
        trained = sum(rank * (group.in_features + target.out_features) for group in here for target in group.targets)
    weights = sum(group.in_features * group.out_features for group in here) * STORED_DTYPES[model.block_dtype]
    row_scales = sum(group.out_features for group in here) if model.block_dtype == "int8" else 0
    # The head's pages go before backward begins.
    head = head_bytes(model.vocabulary_size, model.hidden_size, model.head_dtype)
    backward = _FLOAT * tokens * (_WIDE_COPIES * max(widths.values(), default=0) + _SCORES * scores)
    return (RUNTIME_MB + _WIDENED_MB[model.block_dtype]) * 1e6 + _SLACK * (
        round(weights) + _FLOAT * (row_scales + TRAINED_COPIES * trained + tokens * kept) + max(head, backward)
    )


def blocks_that_fit(model: DeviceModel, available: float, *, rank: int, tokens: int = USUAL_TOKENS) -> int:
    """The most blocks, of the last ones, whose estimate is within ``available`` bytes; 0 where there is none."""
    counts = range(model.blocks, 0, -1)
    return next((count for count in counts if training_bytes(model, count, tokens, rank) <= available), 0)
