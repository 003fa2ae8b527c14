"""What training takes of a device's memory where blocks of the base model run on it: an estimate, meant to be a little
high.

One formula for both who ask it: an export that puts as many blocks into a bundle as a device can hold, and
``dlora-edge plan``. Calibrated on SmolLM2-135M; docs/log/decisions/0045 has what was measured beside what it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from .groups import GroupSpec
from .manifest import BlockDtype, StoredDtype

RUNTIME_MB: Final = 130  # Python, libraries that were touched, the engine's graphs, and one slab of the head
USUAL_TOKENS: Final = 256  # of a micro-batch
STORED_DTYPES: Final[dict[StoredDtype, int]] = {"int8": 1, "fp16": 2, "fp32": 4}  # and bytes a value
TRAINED_COPIES: Final = 4  # of what is trained: value, gradient and two moments
_FLOAT: Final = 4
_HEAD_WIDTH: Final = 64  # of attention, in most families
_SCORES: Final = 4  # copies of one block's scores of attention that are alive at a time
_SLACK: Final = 1.05  # what lies between allocations of many sizes
BLOCK_DTYPES: Final[dict[BlockDtype, float]] = {"int4": 0.5 + 2 / 32, "int8": 1, "fp16": 2, "fp32": 4}
"""Bytes a value; of int4 32 share a scale of fp16, as in every model whose widths are multiples of 32."""
_WIDENED_MB: Final[dict[BlockDtype, int]] = {"int4": 12, "int8": 12, "fp16": 0, "fp32": 0}
"""What integers are widened into."""
_WIDE_COPIES: Final = 3  # of a block's widest tensors, in the pass that is under way


@dataclass(frozen=True)
class DeviceModel:
    """What of a base model is on the device.

    Attributes:
        blocks: how many the base model has.
        groups: the exchange groups of all modules that can be trained; all linear modules of the blocks, that is.
        head_dtype, block_dtype: how the weights of head and blocks are stored.
    """

    blocks: int
    hidden_size: int
    vocabulary_size: int
    groups: Sequence[GroupSpec]
    head_dtype: StoredDtype
    block_dtype: BlockDtype

    def groups_here(self, count: int) -> list[GroupSpec]:
        """Those of the last ``count`` blocks."""
        return [group for group in self.groups if group.block >= self.blocks - count]


def lora_numbers(groups: Iterable[GroupSpec], rank: int) -> int:
    """How many numbers LoRA of ``rank`` trains beside all modules of ``groups``."""
    return sum(rank * (group.in_features + target.out_features) for group in groups for target in group.targets)


def block_weight_bytes(groups: Iterable[GroupSpec], dtype: BlockDtype) -> int:
    """Of the linear modules of ``groups``, with a scale of fp32 a row for int8."""
    values = sum(group.in_features * group.out_features for group in groups)
    rows = sum(group.out_features for group in groups)
    return round(values * BLOCK_DTYPES[dtype]) + (_FLOAT * rows if dtype == "int8" else 0)


def head_bytes(vocabulary_size: int, hidden_size: int, dtype: StoredDtype) -> int:
    """Of the LM head's weight, likewise."""
    return vocabulary_size * (hidden_size * STORED_DTYPES[dtype] + (_FLOAT if dtype == "int8" else 0))


def training_bytes(model: DeviceModel, count: int, tokens: int, rank: int, trained: int | None = None) -> float:
    """Peak of a process that trains LoRA in the last ``count`` blocks, which run in it, mapped weights included.

    Args:
        tokens: of the largest micro-batch.
        trained: numbers that are trained; None: LoRA of ``rank`` beside every linear module of these blocks.
    """
    here = model.groups_here(count)
    widest = max((_block_width(groups, rank) for groups in _by_block(here)), default=0)
    # Until backward each block keeps its input, and its products with frozen weights and with lora_A.
    kept = sum(_block_width(groups, rank) + model.hidden_size for groups in _by_block(here))
    scores = tokens * max(1, model.hidden_size // _HEAD_WIDTH)
    numbers = lora_numbers(here, rank) if trained is None else trained
    # The head's pages go before backward begins.
    head = head_bytes(model.vocabulary_size, model.hidden_size, model.head_dtype)
    backward = _FLOAT * tokens * (_WIDE_COPIES * widest + _SCORES * scores)
    return (RUNTIME_MB + _WIDENED_MB[model.block_dtype]) * 1e6 + _SLACK * (
        block_weight_bytes(here, model.block_dtype)
        + _FLOAT * TRAINED_COPIES * numbers
        + _FLOAT * tokens * kept
        + max(head, backward)
    )


def blocks_that_fit(model: DeviceModel, available: float, *, rank: int, tokens: int = USUAL_TOKENS) -> int:
    """The most blocks, of the last ones, whose estimate is within ``available`` bytes; 0 where there is none."""
    counts = range(model.blocks, 0, -1)
    return next((count for count in counts if training_bytes(model, count, tokens, rank) <= available), 0)


def _by_block(groups: Sequence[GroupSpec]) -> list[list[GroupSpec]]:
    found: dict[int, list[GroupSpec]] = {}
    for group in groups:
        found.setdefault(group.block, []).append(group)
    return list(found.values())


def _block_width(groups: Sequence[GroupSpec], rank: int) -> int:
    """Numbers a token of what one block's modules give, and their LoRA's A."""
    return sum(group.out_features + rank * len(group.targets) for group in groups)
