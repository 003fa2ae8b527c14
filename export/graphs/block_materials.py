"""What the graphs of blocks are made from, and tried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlora.export.tracing.calls import BLOCKED, MASK, BlockCall, sees
from dlora.export.tracing.entry import Entry
from dlora.export.tracing.past import PAST_MASK
from dlora.protocol.manifest import StoredDtype

from .graph import TrainingGraph


@dataclass(frozen=True)
class BlockMaterials:
    """One block: how its decoder calls it, and what a device has of it.

    Attributes:
        key: of its graphs, which blocks of one shape share.
        targets: its linear modules that LoRA may stand beside, by their names in the block.
        weights: by the name of their graph input, as they are stored.
        tables: what the decoder gives it by position, with the axis of these.
        window: as ``calls.windows`` gives it.
        forward, backward: its graphs.
        decode, answers, first_rows: likewise, both passes of answers' rows, and what comes before these;
            cache_argument: of ``past.cache_arguments``. None and empty where it takes no past.
    """

    call: BlockCall
    key: str
    targets: tuple[str, ...]
    weights: Mapping[str, Tensor]
    tables: Mapping[str, tuple[Tensor, int]]
    window: int | None
    forward: TrainingGraph
    backward: TrainingGraph
    decode: TrainingGraph | None = None
    answers: tuple[TrainingGraph, TrainingGraph] | None = None
    first_rows: TrainingGraph | None = None
    cache_argument: str = ""

    def fixed(self) -> dict[str, Tensor]:
        """What the decoder gives it that depends on no token, and is stored among the weights."""
        return {name: self.weights[name] for name in self.call.context if name in self.weights}

    def context(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """What a device makes for sequences of ``lengths`` in place of the decoder."""
        seen = sees(torch.tensor(lengths), self.window)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {MASK: _added(seen), **self._of_positions(positions)}

    def context_after(self, before: int, new: int) -> dict[str, Tensor]:
        """Likewise, for ``new`` tokens of one sequence that come after ``before`` others; 0: after one that none sees,
        for no engine takes an empty array."""
        return self.context_of_answers([before + new], [before])

    def context_of_answers(self, lengths: Sequence[int], firsts: Sequence[int]) -> dict[str, Tensor]:
        """Likewise, for the rows of sequences of ``lengths`` that come after the first ones, ``firsts`` of each."""
        is_first = self.are_first(lengths, firsts)
        seen = sees(torch.tensor(lengths), self.window)[~is_first]
        past = seen[:, is_first] if is_first.any() else torch.zeros(len(seen), 1, dtype=torch.bool)
        positions = torch.cat([torch.arange(length) for length in lengths])[~is_first]
        return {PAST_MASK: _added(past), MASK: _added(seen[:, ~is_first])} | self._of_positions(positions)

    @staticmethod
    def are_first(lengths: Sequence[int], firsts: Sequence[int]) -> Tensor:
        """bool (tokens,): which are among the first ones of their sequence."""
        pairs = zip(lengths, firsts, strict=True)
        return torch.cat([torch.arange(length) < first for length, first in pairs])

    def _of_positions(self, positions: Tensor) -> dict[str, Tensor]:
        return {name: table.index_select(axis, positions) for name, (table, axis) in self.tables.items()}


def _added(seen: Tensor) -> Tensor:
    """float32 (1, 1, rows, columns): what is added to scores."""
    return torch.where(seen, 0.0, BLOCKED)[None, None]


@dataclass(frozen=True)
class FinalNormMaterials:
    """What stands between the last block and the head.

    Attributes:
        weights: ``<place>.<name>`` of the modules' parameters, float32.
        hidden_states: some that come out of the last block, (tokens, width).
    """

    modules: tuple[nn.Module, ...]
    weights: Mapping[str, Tensor]
    hidden_states: Tensor
    forward: TrainingGraph
    backward: TrainingGraph


@dataclass(frozen=True)
class DeviceBlocks:
    """The last blocks of a base model, and what follows them.

    Attributes:
        last_forward, last_backward: graphs of the last block for labelled rows only; last_first_rows: of its keys
            and values alone, None where blocks take no past.
        dtype: how the weights of linear modules are stored.
        max_length: the most tokens of a sequence that tables have rows for.
        entry: what stands before block 0, where that is among them.
        without_decode: why the blocks have no ``block_decode``, nor what goes with it; None where they have.
    """

    blocks: tuple[BlockMaterials, ...]
    final_norm: FinalNormMaterials
    last_forward: TrainingGraph
    last_backward: TrainingGraph
    dtype: StoredDtype
    max_length: int
    entry: Entry | None = None
    without_decode: str | None = None
    last_first_rows: TrainingGraph | None = None
