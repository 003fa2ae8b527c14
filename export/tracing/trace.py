"""A block's forward and backward pass as one graph of core ATen operators, with sizes that stay open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils.stateless import _reparametrize_module

from .aten import aten
from .calls import MASK, BlockCall
from .labelled import LabelledRows
from .modules import SCALE, linears, weight_shape, with_weights
from .past import KEYS, PAST_KEYS, PAST_MASK, PAST_VALUES, VALUES, call_with_past
from .simplify import outputs_of

X: Final = "x"
GRAD: Final = "grad"
LABEL_POSITIONS: Final = "label_positions"
LABEL_INDEX: Final = "label_index"
OUTPUT: Final = "y"
GRAD_X: Final = "grad_x"
_RANK: Final = 7  # while tracing; no token count, so that neither is taken for the other


def trace_block(call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]) -> fx.GraphModule:
    """The graph of a block with LoRA beside ``targets``: output y, and the gradients of ``sum(y * grad)``.

    Inputs are named as in its placeholders' ``meta["name"]``: ``x`` and ``grad`` (tokens, width), ``scale``, the
    decoder's tensors, the stored weights, and ``<target>.lora_A`` (rank, in) and ``….lora_B`` (out, rank). Outputs, as
    in ``meta["outputs"]``: ``y``, ``grad_x``, and ``grad.<target>.lora_A`` and so on.
    """
    named, compute = passes_of_block(call, weights, targets)
    open_sizes = _open_sizes(named, (X, GRAD, *call.context), targets, {call.tokens: "positions"})
    return _traced(compute, named, open_sizes, output_names(targets))


def passes_of_block(
    call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> tuple[dict[str, Tensor], Callable[..., list[Tensor]]]:
    """By name what both passes of a block take, its decoder's and its own tensors and random ones; and the passes, of
    these values in their order: the outputs of ``trace_block``."""
    named = _inputs(call, weights, targets, {GRAD: torch.randn_like(call.hidden_states())})
    modules = linears(call.block)
    assert set(targets) <= set(modules)

    def run(values: Mapping[str, Tensor]) -> Tensor:
        with with_weights(call.block, modules, values, weights, targets):
            return call(values[X], {name: values[name] for name in call.context})

    return named, _both_passes(run, named, targets)


def trace_labelled(
    call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str], labelled: int
) -> fx.GraphModule:
    """Likewise, of a block that gives some of its rows only, and computes no more than these need.

    ``label_positions`` int64 (labelled,) says which, and ``label_index`` int64 (tokens,) which of them each token's is,
    or ``labelled``; ``y`` and ``grad`` are (labelled, width).

    Args:
        labelled: a number of tokens that is no other dimension.
    """
    tokens, modules = call.tokens, linears(call.block)
    with torch.no_grad():
        width = call(call.hidden_states(), {}).shape[1]
    sizes = {LABEL_POSITIONS: labelled, LABEL_INDEX: tokens}
    of_rows = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
    of_rows[GRAD] = torch.randn(labelled, width)
    named = _inputs(call, weights, targets, of_rows)
    numbers = {tokens: "positions", labelled: "labelled"}
    open_sizes = _open_sizes(named, (X, *of_rows, *call.context), targets, numbers)

    def forward(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(named, tensors, strict=True))
        with torch.no_grad(), with_weights(call.block, modules, values, weights, targets, as_operators=True):
            return [call(values[X], {name: values[name] for name in call.context})]

    output = outputs_of(_traced(forward, named, open_sizes, [OUTPUT]))[OUTPUT]

    def run(values: Mapping[str, Tensor]) -> Tensor:
        return LabelledRows(values, values[LABEL_POSITIONS], values[LABEL_INDEX], tokens).of(output)

    return _traced(_both_passes(run, named, targets), named, open_sizes, output_names(targets))


def lora_names(targets: Sequence[str]) -> list[str]:
    return [f"{target}.{side}" for target in targets for side in ("lora_A", "lora_B")]


def output_names(targets: Sequence[str]) -> list[str]:
    """Of both passes: ``y``, and the gradients by ``x`` and ``lora_names``."""
    return [OUTPUT, GRAD_X, *(f"grad.{name}" for name in lora_names(targets))]


def _both_passes(
    run: Callable[[Mapping[str, Tensor]], Tensor], named: Mapping[str, Tensor], targets: Sequence[str]
) -> Callable[..., list[Tensor]]:
    """Of the values of ``named``: ``y`` of ``run``, and the gradients of ``sum(y * grad)`` by x and all LoRA."""
    names = lora_names(targets)

    def compute(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(named, tensors, strict=True))
        leaves = {name: values[name].detach().requires_grad_() for name in (X, *names)}
        with torch.enable_grad():
            y = run({**values, **leaves})
        return [y, *torch.autograd.grad(y, list(leaves.values()), values[GRAD])]

    return compute


def trace_decode(
    call: BlockCall, argument: str, past: int, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> fx.GraphModule:
    """The graph of a block whose tokens come after others: output y, and the tokens' keys and values.

    Inputs and outputs are named as in ``trace_block``; beside them ``past_keys`` and ``past_values`` (past, heads,
    width), ``past_mask`` (1, 1, tokens, past), and what comes out, ``keys`` and ``values`` (tokens, heads, width).

    Args:
        argument: of ``cache_arguments``; past: a number of tokens that is no other dimension.

    Raises ``CannotRunOnDevice`` as ``call_with_past`` does.
    """
    named = _inputs(call, weights, targets, {}, _before(call, argument, past))
    run = _with_past(call, argument, weights, targets)

    def compute(*tensors: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [*run(dict(zip(named, tensors, strict=True)))]

    names = (X, PAST_MASK, PAST_KEYS, PAST_VALUES, *call.context)
    open_sizes = _open_sizes(named, names, targets, {call.tokens: "new", past: "past"})
    return _traced(compute, named, open_sizes, [OUTPUT, KEYS, VALUES])


def trace_answers(
    call: BlockCall, argument: str, first: int, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> fx.GraphModule:
    """The graph of a block, as ``trace_block`` gives it, at rows that come after the first ones of their texts.

    What there is of the first rows is named as in ``trace_decode``: ``past_mask`` (1, 1, tokens, first) and so on.
    Raises as that does.

    Args:
        first: a number of tokens that is no other dimension.
    """
    of_rows = {GRAD: torch.randn_like(call.hidden_states())}
    named = _inputs(call, weights, targets, of_rows, _before(call, argument, first))
    run = _with_past(call, argument, weights, targets)
    names = (X, GRAD, PAST_MASK, PAST_KEYS, PAST_VALUES, *call.context)
    open_sizes = _open_sizes(named, names, targets, {call.tokens: "positions", first: "first"})
    compute = _both_passes(lambda values: run(values)[0], named, targets)
    return _traced(compute, named, open_sizes, output_names(targets))


def _before(call: BlockCall, argument: str, past: int) -> dict[str, Tensor]:
    """What a block is given of so many tokens that came before its own, random keys and values."""
    with torch.no_grad():
        _, *made = call_with_past(call, argument, call.hidden_states(), {}, None)
    keys, values = (torch.randn(past, *each.shape[1:]) for each in made)
    return {PAST_MASK: torch.zeros(1, 1, call.tokens, past), PAST_KEYS: keys, PAST_VALUES: values}


def _with_past(
    call: BlockCall, argument: str, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]:
    """A block of a graph's inputs, by name: what ``call_with_past`` gives."""
    modules = linears(call.block)

    def run(given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        context = {name: given[name] for name in (*call.context, PAST_MASK)}
        with with_weights(call.block, modules, given, weights, targets):
            return call_with_past(call, argument, given[X], context, (given[PAST_KEYS], given[PAST_VALUES]))

    return run


def _inputs(
    call: BlockCall,
    weights: Mapping[str, Tensor],
    targets: Sequence[str],
    of_rows: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What a graph of a block takes, in this order: x, what else there is of its rows, the scale, its decoder's
    tensors, what came ``before``, its own weights, and random LoRA."""
    named = {X: call.hidden_states().detach().clone(), **of_rows, SCALE: torch.tensor(2.0)}
    for name, tensor in call.tensors().items():
        named[name] = torch.zeros(tensor.shape) if name == MASK else tensor.detach().clone()
    named |= {**(before or {}), **weights}
    for target in targets:
        out_features, in_features = weight_shape(weights, target)
        named[f"{target}.lora_A"] = torch.randn(_RANK, in_features)
        named[f"{target}.lora_B"] = torch.randn(out_features, _RANK)
    return named


def _open_sizes(
    named: Mapping[str, Tensor], names: Sequence[str], targets: Sequence[str], numbers: Mapping[int, str]
) -> dict[str, dict[int, str]]:
    """By input and axis what an open size is called: those of ``numbers`` in the inputs ``names``, and the rank."""
    found = {
        name: {axis: numbers[size] for axis, size in enumerate(named[name].shape) if size in numbers} for name in names
    }
    for target in targets:
        found |= {f"{target}.lora_A": {0: "rank"}, f"{target}.lora_B": {1: "rank"}}
    return found


def trace_modules(
    modules: Sequence[nn.Module], weights: Mapping[str, Tensor], width: int, tokens: int
) -> fx.GraphModule:
    """The graph of modules one after the other, y of x (tokens, width), and ``grad_x``, as ``trace_block`` names them.

    ``weights``: ``<place>.<name>`` of their parameters.
    """
    chain = nn.Sequential(*modules)
    x = torch.randn(tokens, width)
    with torch.no_grad():
        named = {X: x, GRAD: torch.randn_like(chain(x[None])[0]), **weights}

    def run(values: Mapping[str, Tensor]) -> Tensor:
        with _reparametrize_module(chain, {name: values[name] for name in weights}):
            y: Tensor = chain(values[X].unsqueeze(0)).squeeze(0)
            return y

    open_sizes = {X: {0: "positions"}, GRAD: {0: "positions"}}
    return _traced(_both_passes(run, named, ()), named, open_sizes, output_names(()))


def _traced(
    compute: Any, named: Mapping[str, Tensor], open_sizes: Mapping[str, Mapping[int, str]], outputs: list[str]
) -> fx.GraphModule:
    # Every dimension of one size that is open becomes one symbol: "duck shapes".
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True, specialize_zero_one=True), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # where sizes are open, an entry costs more than it saves
    fakes = [
        mode.from_tensor(
            tensor,
            source=ConstantSource(f"input_{index}"),
            static_shapes=False,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.DUCK if axis in open_sizes.get(name, {}) else DimDynamic.STATIC
                    for axis in range(tensor.ndim)
                ]
            ),
        )
        for index, (name, tensor) in enumerate(named.items())
    ]

    def trace(function: Any) -> fx.GraphModule:
        made = make_fx(function, _decompositions(), "real", _allow_non_fake_inputs=True)
        graph: fx.GraphModule = made(*fakes)
        return graph

    with mode:
        traced = trace(compute)
        if any(_is_in_place(node) for node in traced.graph.nodes):
            traced = trace(torch.func.functionalize(traced))
    traced.graph.eliminate_dead_code()
    for node, name in zip(traced.graph.find_nodes(op="placeholder"), named, strict=True):
        # What an input is called, and its sizes that are open.
        node.meta |= {"name": name, "sizes": open_sizes.get(name, {})}
    traced.meta["outputs"] = list(outputs)
    return traced


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _decompositions() -> dict[Any, Any]:
    others = (
        aten.addmm,
        aten._softmax_backward_data,
        aten.gelu,
        aten.silu,
        aten._unsafe_view,
        aten.native_layer_norm_backward,
    )
    table: dict[Any, Any] = {**torch._decomp.core_aten_decompositions(), **torch._decomp.get_decompositions(others)}
    for kept in (
        aten.slice_backward.default,
        aten.select_backward.default,
        aten.native_layer_norm.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.index_select.default,
    ):
        table.pop(kept, None)
    return table
