"""The blocks that a device runs itself: a graph of each pass, forward and backward, for every shape of block.

::

    block_forward    y = block(x)                                  with LoRA beside its linear modules
    block_backward   grad_x, and the gradient of every lora_A and lora_B, of sum(y * grad)

    last_block_forward, last_block_backward    likewise, of the last block, where y and grad are of labelled rows only

They are the family's own code, traced (``export/tracing``): x, y, grad and grad_x are (positions, width), of all
sequences of a micro-batch one after the other; ``mask`` (1, 1, positions, positions) is added to the scores of
attention and keeps them apart; what else the decoder gives its blocks comes from tables. Weights and LoRA are inputs,
so that one graph serves all blocks of a shape. ``block_forward`` also gives what is kept for the backward pass, the
products with the frozen weights and z = lora_A x^T, so that no large product is computed again.
``label_positions`` int64 (labelled,) are the places of labelled tokens, ``label_index`` int64 (positions,) says which
of them each token is, or ``labelled`` where it is none. For other tokens the last block computes keys and values only
(``export/tracing/labelled.py``).
``final_norm_forward`` and ``final_norm_backward`` are what stands between the last block and the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from dlora.export.tracing.calls import MASK, CannotRunOnDevice
from dlora.export.tracing.modules import PRODUCT, SCALE, Z, is_scale, linears, weight_shape, with_weights
from dlora.export.tracing.onnx_operators import to_nodes
from dlora.export.tracing.onnx_writer import CannotEmitError
from dlora.export.tracing.past import PAST_KEYS, PAST_MASK, PAST_VALUES, call_with_past
from dlora.export.tracing.simplify import ancestors, cut, outputs_of, products_of, simplify
from dlora.export.tracing.to_module import TracedModule
from dlora.export.tracing.trace import (
    GRAD,
    GRAD_X,
    LABEL_INDEX,
    LABEL_POSITIONS,
    OUTPUT,
    X,
    lora_names,
    output_names,
    trace_modules,
)
from dlora.protocol.manifest import TensorSpec

from .arrays import Arrays, to_floats
from .block_materials import BlockMaterials, FinalNormMaterials
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import TrainingGraph
from .tolerances import BLOCK_FLOOR, allowed

KINDS: Final = (
    "block_forward", "block_backward", "last_block_forward", "last_block_backward", "final_norm_forward",
    "final_norm_backward",
)  # fmt: skip
LAST: Final = KINDS[2:4]
LENGTHS: Final = ((3, 4), (6, 3))  # of the sequences that graphs are tried with
LABELLED: Final = ((2, 4, 6), (1, 5, 7, 8))  # likewise: the rows of them that have a label
RANKS: Final = (3, 2)  # likewise; golden vectors travel with every bundle
_DTYPES: Final[dict[torch.dtype, Any]] = {
    torch.float32: "fp32", torch.float16: "fp16", torch.int8: "int8", torch.int64: "int64",
}  # fmt: skip


def block_graphs(
    whole: fx.GraphModule,
    weights: Mapping[str, Tensor],
    targets: Sequence[str],
    key: str,
    kinds: Sequence[str] = KINDS[:2],
) -> tuple[TrainingGraph, TrainingGraph]:
    """A graph of both passes, simplified, as one of each, and what is kept from one to the other.

    Args:
        whole: of ``trace_block``, or of ``trace_labelled``, whose ``kinds`` are ``LAST``.

    Raises ``CannotRunOnDevice``.
    """
    outputs = outputs_of(whole)
    grads = {name: node for name, node in outputs.items() if name != OUTPUT}
    names = [name for name in weights if not is_scale(name)] + [f"{name}.lora_A" for name in targets]
    products = products_of(whole, names)
    needed = ancestors(grads.values(), stop=products)
    kept = {node: _kept_name(name) for node, name in products.items() if node in needed}
    forward = cut(whole, {OUTPUT: outputs[OUTPUT]} | {name: node for node, name in kept.items()}, {})
    backward = cut(whole, grads, kept)
    return traced_graph(kinds[0], forward, key, weights), traced_graph(kinds[1], backward, key, weights)


def final_norm_graphs(
    modules: Sequence[nn.Module], weights: Mapping[str, Tensor], width: int, tokens: int
) -> tuple[TrainingGraph, TrainingGraph]:
    """``final_norm_forward`` and ``final_norm_backward``. Raises ``CannotRunOnDevice``."""
    whole = simplify(trace_modules(modules, weights, width, tokens))
    outputs = outputs_of(whole)
    forward, backward = (cut(whole, {name: outputs[name]}, {}) for name in (OUTPUT, GRAD_X))
    return traced_graph(KINDS[4], forward, "", weights), traced_graph(KINDS[5], backward, "", weights)


def _kept_name(name: str) -> str:
    """What a product is called, given the name of the matrix in it."""
    module, _, matrix = name.rpartition(".")
    return f"{module}.{Z if matrix == 'lora_A' else PRODUCT}"


def traced_graph(kind: str, traced: fx.GraphModule, key: str, weights: Iterable[str]) -> TrainingGraph:
    """A traced graph as one of the bundle. Raises ``CannotRunOnDevice``."""
    inputs = traced.graph.find_nodes(op="placeholder")
    outputs = outputs_of(traced)
    symbols = {  # the names of sizes that are open, by torch's
        str(node.meta["val"].shape[axis]): name for node in inputs for axis, name in node.meta["sizes"].items()
    }
    try:
        nodes = to_nodes(traced, list(outputs))
        return TrainingGraph(
            kind,
            inputs=tuple(_spec(node.meta["name"], node, symbols) for node in inputs),
            outputs=tuple(_spec(name, node, symbols) for name, node in outputs.items()),
            body=nodes,
            module=partial(TracedModule, traced),
            key=key,
            weights=frozenset(weights),
        )
    except CannotEmitError as error:
        raise CannotRunOnDevice(f"its blocks compute what a device cannot: {error}") from None


def _spec(name: str, node: fx.Node, symbols: Mapping[str, str]) -> TensorSpec:
    value = node.meta["val"]
    if value.dtype not in _DTYPES:
        raise CannotEmitError(f"{name} is {value.dtype}")
    shape = tuple(size if isinstance(size, int) else symbols.get(str(size)) for size in value.shape)
    if None in shape:
        raise CannotEmitError(f"{name} has a size that depends on others")
    return TensorSpec(name, _DTYPES[value.dtype], shape)  # type: ignore[arg-type]


def block_tests(block: BlockMaterials, graph: TrainingGraph) -> Iterator[GoldenCase]:
    """Hidden states of the base model, in sequences one after the other; LoRA and the gradient are random."""
    for lengths, rank, labelled in zip(LENGTHS, RANKS, LABELLED, strict=True):
        values, rows = block_inputs(block, lengths, rank), torch.tensor(labelled)
        if graph.kind.startswith("last_"):
            index = torch.full((sum(lengths),), len(rows)).index_put((rows,), torch.arange(len(rows)))
            values |= {LABEL_POSITIONS: rows, LABEL_INDEX: index, GRAD: values[GRAD][rows]}
        exact, single = (reference(block, values, dtype) for dtype in (torch.float64, torch.float32))
        given = values | single  # what is kept from the forward pass
        inputs = {spec.name: _of_rows(given, spec, rows).numpy() for spec in graph.inputs}
        golden, rounded = (
            to_floats(**{spec.name: _of_rows(found, spec, rows) for spec in graph.outputs}) for found in (exact, single)
        )
        yield GoldenCase(inputs, golden, allowed(golden, rounded, BLOCK_FLOOR))


def case_of(
    graph: TrainingGraph, values: Mapping[str, Tensor], exact: Mapping[str, Tensor], single: Mapping[str, Tensor]
) -> GoldenCase:
    """A graph's inputs, of ``values`` and of what a pass in float32 gave, and the outputs that are right for them."""
    given = {**values, **single}
    golden, rounded = (
        to_floats(**{spec.name: found[spec.name] for spec in graph.outputs}) for found in (exact, single)
    )
    inputs = {spec.name: given[spec.name].numpy() for spec in graph.inputs}
    return GoldenCase(inputs, golden, allowed(golden, rounded, BLOCK_FLOOR))


def _of_rows(found: Mapping[str, Tensor], spec: TensorSpec, rows: Tensor) -> Tensor:
    """A value, of which a graph may have the labelled rows only."""
    value = found[spec.name]
    if "labelled" not in spec.shape or value.shape[spec.shape.index("labelled")] == len(rows):
        return value
    return value.index_select(spec.shape.index("labelled"), rows)


def block_inputs(block: BlockMaterials, lengths: Sequence[int], rank: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a block's graphs, but for what is kept from the forward pass."""
    random = torch.Generator().manual_seed(seed)
    hidden_states = block.call.hidden_states()
    values = {
        X: hidden_states[: sum(lengths)].float().clone(),
        GRAD: torch.randn(sum(lengths), hidden_states.shape[1], generator=random),
        SCALE: torch.tensor(1.5),
    }
    for target in block.targets:
        out_features, in_features = weight_shape(block.weights, target)
        values[f"{target}.lora_A"] = torch.randn(rank, in_features, generator=random) / in_features**0.5
        values[f"{target}.lora_B"] = torch.randn(out_features, rank, generator=random) * 0.1
    return {**values, **block.context(lengths), **block.weights}


def reference(block: BlockMaterials, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the graphs of a block must give, all of their outputs, by autograd through the family's own code."""
    values = in_dtype(values, dtype)
    leaves = {name: values[name].detach().clone().requires_grad_() for name in (X, *lora_names(block.targets))}
    values, kept = {**values, **leaves}, dict[str, Tensor]()
    names = (MASK, PAST_MASK, *block.tables, *block.fixed())
    context = {name: values[name] for name in names if name in values}
    with torch.enable_grad(), with_values(block, values, kept):
        if PAST_KEYS in values:
            past = values[PAST_KEYS], values[PAST_VALUES]
            y, _, _ = call_with_past(block.call, block.cache_argument, values[X], context, past)
        else:
            y = block.call(values[X], context)
        y = y[values[LABEL_POSITIONS]] if LABEL_POSITIONS in values else y
        grads = torch.autograd.grad(y, list(leaves.values()), values[GRAD])
    found = {**kept, **dict(zip(output_names(block.targets), (y, *grads), strict=True))}
    return {name: tensor.detach() for name, tensor in found.items()}


def in_dtype(values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """With floating-point tensors in ``dtype``."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in values.items()}


def with_values(
    block: BlockMaterials, values: Mapping[str, Tensor], kept: dict[str, Tensor] | None = None
) -> AbstractContextManager[None]:
    """``with_weights`` of the weights that a bundle has of a block."""
    names = [name for name in block.weights if name not in block.call.context]
    return with_weights(block.call.block, linears(block.call.block), values, names, block.targets, kept)


def final_norm_tests(final_norm: FinalNormMaterials, graph: TrainingGraph) -> Iterator[GoldenCase]:
    """Hidden states of the base model and a random gradient."""
    chain = nn.Sequential(*final_norm.modules)

    def reference(values: Arrays, dtype: torch.dtype) -> Arrays:
        weights = {name: torch.from_numpy(value.copy()).to(dtype) for name, value in values.items()}
        given, grad = weights.pop(X).requires_grad_(), weights.pop(GRAD)
        with torch.enable_grad():
            y = torch.func.functional_call(chain, weights, (given[None],))[0]
        (grad_x,) = torch.autograd.grad(y, [given], grad)
        return to_floats(**{OUTPUT: y, GRAD_X: grad_x})

    x = final_norm.hidden_states[: sum(LENGTHS[-1])].detach().float()
    shape = chain(x[None])[0].shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = {X: x, GRAD: grad, **final_norm.weights}
    yield GoldenCase.of(graph, {name: np.asarray(value) for name, value in values.items()}, reference)


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The graphs of every shape of block, and of the final norm; none where the device gets no blocks."""
    blocks = materials.device_blocks
    if blocks is None:
        return
    for block in {block.key: block for block in blocks.blocks}.values():  # the last one of each shape
        for graph in (block.forward, block.backward):
            yield graph, block_tests(block, graph)
    for graph in (blocks.last_forward, blocks.last_backward):
        yield graph, block_tests(blocks.blocks[-1], graph)
    for graph in (blocks.final_norm.forward, blocks.final_norm.backward):
        yield graph, final_norm_tests(blocks.final_norm, graph)
