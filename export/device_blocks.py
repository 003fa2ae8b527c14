"""The last blocks of a base model, made ready for a device: what each needs, and which of them share a graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from dlora.cloud.model.base_model import BaseModel, quiet
from dlora.protocol.errors import DloraError
from dlora.protocol.manifest import StoredDtype
from dlora.protocol.text import first_line

from .graphs.answer_block import answer_graphs, first_rows_graphs
from .graphs.block import LAST, block_graphs, final_norm_graphs
from .graphs.block_decode import decode_graph
from .graphs.block_materials import BlockMaterials, DeviceBlocks, FinalNormMaterials
from .graphs.graph import TrainingGraph
from .tracing.calls import (
    MASK,
    BlockCall,
    CannotRunOnDevice,
    final_modules,
    near,
    random_embeds,
    record_calls,
    table_rows,
    tables,
    unusual_number,
    windows,
)
from .tracing.entry import find_entry
from .tracing.modules import linears, stored_weights
from .tracing.past import PAST_KEYS, PAST_MASK, PAST_VALUES, cache_arguments, call_with_past
from .tracing.simplify import simplify
from .tracing.to_module import TracedModule
from .tracing.trace import passes_of_block, trace_block, trace_labelled

Say = Callable[[str], None]


@contextmanager
def _one_reason() -> Iterator[None]:
    """Whatever a family's code does while it is traced is ``CannotRunOnDevice``, and nothing is printed."""
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")  # tells with a traceback what we tell in a line
    level = torch_log.level
    torch_log.setLevel(logging.CRITICAL)
    try:
        with quiet():
            yield
    except DloraError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CannotRunOnDevice(f"its blocks cannot be traced ({reason[:160]})") from None
    finally:
        torch_log.setLevel(level)


@_one_reason()
def prepare_blocks(
    base: BaseModel, trainable: Sequence[str], count: int, dtype: StoredDtype, say: Say, tell: Say = lambda _: None
) -> DeviceBlocks:
    """The last ``count`` blocks of ``base``, their graphs made and not yet verified.

    Args:
        trainable: full names of the modules that can be targets.
        dtype: how the weights of linear modules are stored.
        say: is called with what is being done; tell: with a line after each block.

    Raises ``CannotRunOnDevice`` where the family's blocks cannot be run without its decoder; ``CannotBeginOnDevice``
    where ``count`` is all of them, and only what stands before the first one cannot be.
    """
    first = base.blocks - count
    for index, module in enumerate(base.block_modules[first:], first):
        if any("expert" in name for name, _ in module.named_modules()):
            raise CannotRunOnDevice(f"block {index} is a mixture of experts, which runs what its data choose")
    entry = find_entry(base) if not first else None
    of_block = windows(base)
    calls = record_calls(base)
    shapes: dict[tuple[object, ...], tuple[fx.GraphModule, TrainingGraph, TrainingGraph]] = {}
    blocks = []
    for call in calls[first:]:
        plain = linears(call.block)
        targets = tuple(name for name in (full.removeprefix(f"{call.path}.") for full in trainable) if name in plain)
        weights = stored_weights(call.block, dtype)
        shape = next((each for each in shapes.values() if gives_the_same(each[0], call, weights, targets)), None)
        if shape is None:
            say(f"tracing block {call.index}")
            traced = simplify(trace_block(call, weights, targets))
            made = block_graphs(traced, weights, targets, str(len(shapes)))
            shape = shapes.setdefault(_content(made), (traced, *made))
        _, forward, backward = shape
        block = BlockMaterials(call, forward.key, targets, weights, {}, of_block[call.index], forward, backward)
        inputs = _inputs(block)
        used = {name: tensor for name, tensor in weights.items() if name in inputs}
        blocks.append(replace(block, weights=used))
        tell(f"block {len(blocks)} of {count} is ready")
    blocks = _with_tables(base, blocks)
    modules = final_modules(base)
    with torch.no_grad():
        last_hidden_states = calls[-1](calls[-1].hidden_states(), {})
    final_weights = {
        f"{place}.{name}": parameter.detach().float()
        for place, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
    of_norm = final_norm_graphs(modules, final_weights, last_hidden_states.shape[1], calls[-1].tokens)
    final_norm = FinalNormMaterials(modules, final_weights, last_hidden_states, *of_norm)
    last, labelled = blocks[-1], unusual_number(base, but=calls[-1].tokens)
    say("tracing the last block for labelled tokens")
    whole = simplify(trace_labelled(last.call, weights, last.targets, labelled))  # weights are the last block's
    passes = block_graphs(whole, weights, last.targets, last.key, LAST)
    made_ready = DeviceBlocks(tuple(blocks), final_norm, *passes, dtype, table_rows(base), entry)
    _check_chain(base, made_ready)
    return _with_decode(base, made_ready, say)


def _with_decode(base: BaseModel, made: DeviceBlocks, say: Say) -> DeviceBlocks:
    """With the graphs that go on from keys and values for each shape; without any where the family does not so."""
    say("tracing blocks that go on from earlier tokens")
    try:
        blocks, last = _decoding(base, made.blocks)
        return replace(made, blocks=blocks, last_first_rows=last)
    except CannotRunOnDevice as error:
        reason = str(error)
    except Exception as error:  # whatever a family's code does with a cache that it does not know
        reason = f"its blocks cannot be traced with a cache ({type(error).__name__}: {first_line(error)[:120]})"
    return replace(made, without_decode=reason)


def _decoding(base: BaseModel, blocks: Sequence[BlockMaterials]) -> tuple[tuple[BlockMaterials, ...], TrainingGraph]:
    """The blocks with these graphs, and the last one's of keys and values alone."""
    arguments, past = cache_arguments(base), unusual_number(base, but=blocks[0].call.tokens)
    graphs: dict[str, tuple[TrainingGraph, ...]] = {}
    made = []
    for block in blocks:
        argument = arguments[block.call.index]
        if not argument:
            raise CannotRunOnDevice("its decoder hands its blocks no cache")
        _check_past(block, argument)
        if block.key not in graphs:
            given = block.call, argument, past, block.weights, block.targets, block.key
            of_first = first_rows_graphs(block.call, argument, past, block.weights, block.key)
            graphs[block.key] = decode_graph(*given), *answer_graphs(*given), *of_first
            known = _inputs(block) | {PAST_KEYS, PAST_VALUES, PAST_MASK}
            if unknown := {spec.name for spec in graphs[block.key][0].inputs} - known:
                raise CannotRunOnDevice(f"its blocks take {sorted(unknown)[0]} only with a cache")
        decode, forward, backward, first_rows, keys = graphs[block.key]
        made.append(
            replace(block, decode=decode, answers=(forward, backward), first_rows=first_rows, cache_argument=argument)
        )
    return tuple(made), keys


def _check_past(block: BlockMaterials, argument: str) -> None:
    """What a block gives for tokens that come after others is what it gives for all of them at once."""
    before, tokens = 4, 7
    x = block.call.hidden_states()[:tokens]
    with torch.no_grad():
        wanted = block.call(x, block.context((tokens,)) | block.fixed())[before:]
        _, *past = call_with_past(block.call, argument, x[:before], block.context((before,)) | block.fixed(), None)
        context = block.context_after(before, tokens - before) | block.fixed()
        found, _, _ = call_with_past(block.call, argument, x[before:], context, (past[0], past[1]))
    if not near(found, wanted):
        raise CannotRunOnDevice(f"block {block.call.index} gives something else with a cache than without")


def _inputs(block: BlockMaterials) -> set[str]:
    """Of the graphs of its two passes."""
    return {spec.name for graph in (block.forward, block.backward) for spec in graph.inputs}


def _content(made: tuple[TrainingGraph, TrainingGraph]) -> tuple[object, ...]:
    """What makes blocks share their graphs."""
    return tuple(part for graph in made for part in (graph.inputs, graph.outputs, str(graph.body)))


def _with_tables(base: BaseModel, blocks: list[BlockMaterials]) -> list[BlockMaterials]:
    """With the tables that graphs take; what of the context depends on nothing becomes a weight."""
    names = {}
    for block in blocks:
        inputs = _inputs(block)
        names[block.call.index] = [name for name in block.call.context if name in inputs and name != MASK]
    found = tables(base, names) if any(names.values()) else {}
    completed = []
    for block in blocks:
        mine = found.get(block.call.index, {})
        by_position = {name: (table.float(), axis) for name, (table, axis) in mine.items() if axis is not None}
        fixed = {name: tensor.float() for name, (tensor, axis) in mine.items() if axis is None}
        completed.append(replace(block, tables=by_position, weights={**block.weights, **fixed}))
    return completed


def _check_chain(base: BaseModel, made: DeviceBlocks) -> None:
    """The blocks one after the other, on packed sequences, with the context that a device makes, give what the decoder
    gives for each sequence by itself."""
    small = min((block.window for block in made.blocks if block.window), default=0)
    lengths = [min(base.max_sequence_length, small + 3 if small < 64 else 9), 5]
    hidden, wanted = [], []
    with torch.no_grad():
        for seed, length in enumerate(lengths):
            embeds = random_embeds(base, length, seed)
            if made.entry is None:
                hidden.append(record_calls(base, length, seed=seed)[made.blocks[0].call.index].hidden_states())
            else:
                hidden.append(made.entry(embeds[0], torch.arange(length)))
            wanted.append(base.last_hidden_state(embeds)[0])
        found = torch.cat(hidden)
        for block in made.blocks:
            found = block.call(found, block.context(lengths) | block.fixed())
        found = nn.Sequential(*made.final_norm.modules)(found[None])
    if not near(found[0], torch.cat(wanted)):
        raise CannotRunOnDevice("its blocks give something else without their decoder")


def gives_the_same(
    traced: fx.GraphModule, call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> bool:
    """Whether the graph of another block, of ``trace_block``, gives this block's output and gradients: both are run.

    Tracing takes seconds a block, and most models have one or two shapes of block. What two blocks may differ in beside
    their inputs, as where the scores of attention have another scale in each, changes some gradient by far more than
    rounding does.
    """
    named, passes = passes_of_block(call, weights, targets)
    inputs = traced.graph.find_nodes(op="placeholder")
    if len(inputs) != len(named) or not all(_takes(*each) for each in zip(inputs, named.items(), strict=True)):
        return False
    expected = passes(*named.values())
    with torch.no_grad():
        found = TracedModule(traced)(*named.values())
    return all(one.shape == other.shape and near(one, other) for one, other in zip(found, expected, strict=True))


def _takes(node: fx.Node, given: tuple[str, Tensor]) -> bool:
    """Whether an input of a graph has this name, this dtype, and this shape but for its sizes that are open."""
    name, tensor = given
    known, open_sizes = node.meta["val"], node.meta["sizes"]
    if (node.meta["name"], known.dtype, known.ndim) != (name, tensor.dtype, tensor.ndim):
        return False
    return all(axis in open_sizes or known.shape[axis] == size for axis, size in enumerate(tensor.shape))
