"""The blocks that a device trains where adapters act on answers only: passes at the rows of answers.

::

    answer_block_forward, answer_block_backward    as ``block.py``'s, of rows that come after the first ones of their
                                                   texts, against keys and values of those
    first_rows                                     ``block_decode`` without LoRA, for the first rows themselves
    last_first_rows                                their keys and values alone: more of the last block is not needed

Nothing that an adapter changes reaches a row before the answer: these are run once, and what has gradients are the
others. ``x``, ``y``, ``grad`` and ``grad_x`` are (positions, width), of all answers of a micro-batch
one after the other; ``past_keys`` and ``past_values`` (first, heads, width) are of all their first rows, and
``past_mask`` (1, 1, positions, first) says which of these each sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dlora.export.tracing.calls import BlockCall
from dlora.export.tracing.modules import SCALE
from dlora.export.tracing.past import KEYS, PAST_KEYS, PAST_VALUES, VALUES
from dlora.export.tracing.simplify import cut, outputs_of, simplify
from dlora.export.tracing.trace import GRAD, X, trace_answers, trace_decode

from .block import LENGTHS, RANKS, block_graphs, block_inputs, case_of, reference, traced_graph
from .block_decode import decode_reference, decode_tests
from .block_materials import BlockMaterials
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import TrainingGraph

KINDS: Final = ("answer_block_forward", "answer_block_backward", "first_rows", "last_first_rows")
FIRSTS: Final = ((0, 0), (4, 2))  # of the sequences that graphs are tried with: how many rows are first ones


def answer_graphs(
    call: BlockCall, argument: str, first: int, weights: Mapping[str, Tensor], targets: Sequence[str], key: str
) -> tuple[TrainingGraph, TrainingGraph]:
    """Both passes of one block at the rows of answers; arguments as ``trace_answers`` takes them.

    Raises ``CannotRunOnDevice``.
    """
    traced = simplify(trace_answers(call, argument, first, weights, targets))
    return block_graphs(traced, weights, targets, key, KINDS[:2])


def first_rows_graphs(
    call: BlockCall, argument: str, past: int, weights: Mapping[str, Tensor], key: str
) -> tuple[TrainingGraph, TrainingGraph]:
    """``first_rows`` and ``last_first_rows``; arguments as ``trace_decode`` takes them.

    Raises ``CannotRunOnDevice``.
    """
    traced = simplify(trace_decode(call, argument, past, weights, ()))
    outputs = outputs_of(traced)
    only_keys = {name: outputs[name] for name in (KEYS, VALUES)}
    whole, keys = (cut(traced, wanted, {}) for wanted in (outputs, only_keys))
    return traced_graph(KINDS[2], whole, key, weights), traced_graph(KINDS[3], keys, key, weights)


def answer_tests(block: BlockMaterials, graph: TrainingGraph) -> Iterator[GoldenCase]:
    """As ``block_tests``; the first rows are those of the sequences themselves, without LoRA."""
    for lengths, firsts, rank in zip(LENGTHS, FIRSTS, RANKS, strict=True):
        values = answer_inputs(block, lengths, firsts, rank)
        exact, single = (reference(block, values, dtype) for dtype in (torch.float64, torch.float32))
        yield case_of(graph, values, exact, single)


def answer_inputs(block: BlockMaterials, lengths: Sequence[int], firsts: Sequence[int], rank: int) -> dict[str, Tensor]:
    """Inputs of the passes, but for what is kept from the forward pass; ``firsts``: first rows of each sequence."""
    whole = block_inputs(block, lengths, rank)
    without_lora = whole | {SCALE: torch.tensor(0.0)} | block.context(lengths)
    found = decode_reference(block, without_lora, torch.float64)
    is_first = block.are_first(lengths, firsts)
    past = is_first if is_first.any() else torch.arange(len(is_first)) == 0  # no engine takes an empty array
    heads = {PAST_KEYS: found[KEYS][past].float(), PAST_VALUES: found[VALUES][past].float()}
    own = {X: whole[X][~is_first], GRAD: whole[GRAD][~is_first]}
    return whole | own | heads | block.context_of_answers(lengths, firsts)


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The graphs of every shape of block; none where the device gets no blocks, or they take no keys and values."""
    blocks = materials.device_blocks
    for block in {} if blocks is None else {block.key: block for block in blocks.blocks}.values():  # the last of each
        for graph in block.answers or ():
            yield graph, answer_tests(block, graph)
        if block.first_rows is not None:
            yield block.first_rows, decode_tests(block, block.first_rows)
    if blocks is not None and blocks.last_first_rows is not None:
        yield blocks.last_first_rows, decode_tests(blocks.blocks[-1], blocks.last_first_rows)
