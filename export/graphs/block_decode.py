"""The blocks that a device runs itself, token after token: a graph that goes on from keys and values.

::

    block_decode     y = block(x) of tokens that come after others, with the keys and values of both

As in ``block.py``, but of one sequence: ``x`` and ``y`` are (new, width), and what came before are ``past_keys`` and
``past_values`` (past, heads, width). It gives keys and values of the new tokens, which the next call has among its
past ones. One graph serves a prompt, a draft and the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dlora.export.tracing.calls import MASK, BlockCall
from dlora.export.tracing.modules import SCALE
from dlora.export.tracing.past import KEYS, PAST_KEYS, PAST_MASK, PAST_VALUES, VALUES, call_with_past
from dlora.export.tracing.simplify import cut, outputs_of, simplify
from dlora.export.tracing.trace import OUTPUT, X, trace_decode

from .block import RANKS, block_inputs, case_of, in_dtype, traced_graph, with_values
from .block_materials import BlockMaterials
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import TrainingGraph

KINDS: Final = ("block_decode",)
DECODED: Final = ((0, 6), (6, 1), (4, 3))  # that graphs are tried with: tokens before, and new ones


def decode_graph(
    call: BlockCall, argument: str, past: int, weights: Mapping[str, Tensor], targets: Sequence[str], key: str
) -> TrainingGraph:
    """``block_decode`` of one block; arguments as ``trace_decode`` takes them. Raises ``CannotRunOnDevice``."""
    traced = simplify(trace_decode(call, argument, past, weights, targets))
    return traced_graph("block_decode", cut(traced, outputs_of(traced), {}), key, weights)


def decode_tests(block: BlockMaterials, graph: TrainingGraph) -> Iterator[GoldenCase]:
    """As ``block_tests``; what came before are the sequence's own first tokens."""
    for before, new in DECODED:
        rank = RANKS[-1]
        whole = block_inputs(block, (before + new,), rank)
        if SCALE not in {spec.name for spec in graph.inputs}:  # without LoRA
            whole[SCALE] = torch.tensor(0.0)
        values = {**whole, X: whole[X][before:], **block.context_after(before, new)}
        heads = keys_and_values(block, whole, before, torch.float64)
        values |= {PAST_KEYS: heads[0].float(), PAST_VALUES: heads[1].float()}
        exact, single = (decode_reference(block, values, dtype) for dtype in (torch.float64, torch.float32))
        yield case_of(graph, values, exact, single)


def keys_and_values(
    block: BlockMaterials, whole: Mapping[str, Tensor], before: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of the first ``before`` tokens of a sequence, (before, heads, width) each; 0: of one token."""
    before = max(1, before)
    found = decode_reference(block, {**whole, X: whole[X][:before], **block.context((before,))}, dtype)
    return found[KEYS], found[VALUES]


def decode_reference(block: BlockMaterials, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``block_decode`` must give, by the family's own code; without ``past_keys`` nothing came before."""
    values = in_dtype(values, dtype)
    names = (MASK, PAST_MASK, *block.tables, *block.fixed())
    context = {name: values[name] for name in names if name in values}
    past = (values[PAST_KEYS], values[PAST_VALUES]) if PAST_KEYS in values else None
    with torch.no_grad(), with_values(block, values):
        y, keys, new_values = call_with_past(block.call, block.cache_argument, values[X], context, past)
    return {OUTPUT: y, KEYS: keys, VALUES: new_values}


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The graph of every shape of block; none where the device gets no blocks, or they take no keys and values."""
    blocks = () if materials.device_blocks is None else materials.device_blocks.blocks
    for block in {block.key: block for block in blocks}.values():  # the last one of each shape
        if block.decode is not None:
            yield block.decode, decode_tests(block, block.decode)
