"""A block's forward and backward pass as one graph of core ATen operators, with sizes that stay open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils.stateless import _reparametrize_module

from .calls import MASK, BlockCall
from .modules import Lora, linears, with_weights

X: Final = "x"
GRAD: Final = "grad"
SCALE: Final = "scale"
OUTPUT: Final = "y"
GRAD_X: Final = "grad_x"
_RANK: Final = 7  # while tracing; no token count, so that neither is taken for the other

aten = torch.ops.aten


def trace_block(call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]) -> fx.GraphModule:
    """The graph of a block with LoRA beside ``targets``: output y, and the gradients of ``sum(y * grad)``.

    Inputs are named as in its placeholders' ``meta["name"]``: ``x`` and ``grad`` (tokens, width), ``scale``, the
    decoder's tensors, the stored weights, and ``<target>.lora_A`` (rank, in) and ``….lora_B`` (out, rank). Outputs, as
    in ``meta["outputs"]``: ``y``, ``grad_x``, and ``grad.<target>.lora_A`` and so on.
    """
    tokens = call.tokens
    x = call.hidden_states()
    named: dict[str, Tensor] = {X: x.detach().clone(), GRAD: torch.randn_like(x), SCALE: torch.tensor(2.0)}
    for name, tensor in call.tensors().items():
        named[name] = torch.zeros(tensor.shape) if name == MASK else tensor.detach().clone()
    named |= weights
    modules = linears(call.block)
    for target in targets:
        shape = weights[f"{target}.weight"].shape
        named[f"{target}.lora_A"] = torch.randn(_RANK, shape[1])
        named[f"{target}.lora_B"] = torch.randn(shape[0], _RANK)
    assert set(targets) <= set(modules)
    outputs: list[str] = []

    def compute(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(named, tensors, strict=True))
        x = values[X].detach().requires_grad_()
        lora = {}
        for target in targets:
            lora_a, lora_b = (values[f"{target}.{side}"].detach().requires_grad_() for side in ("lora_A", "lora_B"))
            lora[target] = Lora(lora_a, lora_b, values[SCALE])
        context = {name: values[name] for name in call.context}
        with torch.enable_grad(), with_weights(
            call.block, modules, {name: values[name] for name in weights}, lora
        ):
            y = call(x, context)
        leaves = [x, *(matrix for each in lora.values() for matrix in (each.lora_A, each.lora_B))]
        grads = torch.autograd.grad(y, leaves, values[GRAD])
        names = [f"grad.{target}.{side}" for target in targets for side in ("lora_A", "lora_B")]
        outputs[:] = [OUTPUT, GRAD_X, *names]
        return [y, *grads]

    open_sizes = {
        name: {axis: tokens for axis, size in enumerate(tensor.shape) if size == tokens}
        for name, tensor in named.items()
        if name in (X, GRAD) or name in call.context
    }
    for target in targets:
        open_sizes[f"{target}.lora_A"] = {0: _RANK}
        open_sizes[f"{target}.lora_B"] = {1: _RANK}
    return _traced(compute, named, open_sizes, outputs)


def trace_modules(
    modules: Sequence[nn.Module], weights: Mapping[str, Tensor], width: int, tokens: int
) -> fx.GraphModule:
    """The graph of modules one after the other, y of x (tokens, width), and ``grad_x``, as ``trace_block`` names them.

    ``weights``: ``<place>.<name>`` of their parameters.
    """
    chain = nn.ModuleList(modules)
    named = {X: torch.randn(tokens, width), GRAD: torch.empty(0), **weights}
    with torch.no_grad():
        y = named[X].unsqueeze(0)
        for module in chain:
            y = module(y)
    named[GRAD] = torch.randn_like(y.squeeze(0))

    def compute(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(named, tensors, strict=True))
        x = values[X].detach().requires_grad_()
        with torch.enable_grad(), _reparametrize_module(chain, {name: values[name] for name in weights}):
            y = x.unsqueeze(0)
            for module in chain:
                y = module(y)
            y = y.squeeze(0)
        return [y, *torch.autograd.grad(y, [x], values[GRAD])]

    return _traced(compute, named, {X: {0: tokens}, GRAD: {0: tokens}}, [OUTPUT, GRAD_X])


def _traced(
    compute: Any, named: Mapping[str, Tensor], open_sizes: Mapping[str, Mapping[int, int]], outputs: list[str]
) -> fx.GraphModule:
    # Every dimension of one size that is open becomes one symbol: "duck shapes".
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True, specialize_zero_one=True), allow_non_fake_inputs=True)
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
    with mode:
        traced = make_fx(
            compute, decomposition_table=_decompositions(), tracing_mode="real", _allow_non_fake_inputs=True
        )(*fakes)
        if any(_is_in_place(node) for node in traced.graph.nodes):
            traced = make_fx(
                torch.func.functionalize(traced),
                decomposition_table=_decompositions(),
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )(*fakes)
    traced.graph.eliminate_dead_code()
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, named, strict=True):
        node.meta["name"] = name
    traced.meta["outputs"] = list(outputs)
    return traced


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _decompositions() -> dict[Any, Any]:
    table: dict[Any, Any] = dict(torch._decomp.core_aten_decompositions())
    table |= torch._decomp.get_decompositions(
        [
            aten.addmm,
            aten._softmax_backward_data,
            aten.gelu,
            aten.silu,
            aten._unsafe_view,
            aten.native_layer_norm_backward,
        ]
    )
    for kept in (
        aten.slice_backward.default,
        aten.select_backward.default,
        aten.native_layer_norm.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    ):
        table.pop(kept, None)
    return table
