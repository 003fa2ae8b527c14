"""The linear modules of a block with the weights that a device has: the frozen one as it is stored, and LoRA.

Both are ``autograd.Function`` with the gradients written out, so that a trace has the products in the order that is
cheapest: a rank is the short side of a wide matrix (see ``graphs/lora.py``), a stored weight is widened where it is
multiplied and never scaled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from transformers.pytorch_utils import Conv1D

from dlora.cloud.model.widening import class_of
from dlora.protocol.manifest import StoredDtype

from .int4 import group_size, quantise_groups, widen_int4

ROW_SCALES: Final = "row_scales"
GROUP_SCALES: Final = "group_scales"
_SCALES: Final = (ROW_SCALES, GROUP_SCALES)
PRODUCT: Final = "product"
Z: Final = "z"
SCALE: Final = "scale"


def linears(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear modules of a block that compute nothing but ``x W^T + bias``, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _is_plain(module)
    }


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear module does what its name says, whatever class of its own a family has for it."""
    if class_of(module) in (nn.Linear, Conv1D):
        return True
    features = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
    x = torch.linspace(-1, 1, features, device=module.weight.device)[None]
    weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).float()
    bias = None if module.bias is None else module.bias.float()
    with torch.no_grad():
        try:
            found = module(x)
        except (RuntimeError, TypeError, ValueError):
            return False
    return isinstance(found, Tensor) and torch.allclose(found, nn.functional.linear(x, weight, bias), atol=1e-5)


def stored_weights(block: nn.Module, dtype: StoredDtype) -> dict[str, Tensor]:
    """A block's weights as a device has them, by the name of their graph input: those of linear modules
    (out_features, in_features) in ``dtype``, with ``row_scales`` (out_features,) for int8; for int4 as
    ``quantise_groups`` has them, with ``group_scales``, and int8 where a row has no groups. All others are float32, or
    what they are where they are no floats."""
    weights: dict[str, Tensor] = {}
    inside = {f"{name}.weight": module for name, module in linears(block).items()}
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name not in inside:
            weights[name] = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            continue
        wide = tensor.detach().float()
        wide = wide.T.contiguous() if isinstance(inside[name], Conv1D) else wide
        if dtype == "int4" and (size := group_size(wide.shape[1])) is not None:
            weights[name], weights[f"{name}.{GROUP_SCALES}"] = quantise_groups(wide, size)
        elif dtype in ("int8", "int4"):
            weights[name], weights[f"{name}.{ROW_SCALES}"] = quantise_rows(wide)
        else:
            weights[name] = wide.half() if dtype == "fp16" else wide
    return weights


def is_scale(name: str) -> bool:
    """Whether a graph input is the scales of a weight."""
    return name.endswith(_SCALES)


def weight_shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear module's weight, given all of ``stored_weights``."""
    weight = weights[f"{name}.weight"]
    return weight.shape[0], weight[0].numel() * (2 if f"{name}.weight.{GROUP_SCALES}" in weights else 1)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale a row: ``weight ~ quantised * scales[:, None]``; a row of zeros has scale 1."""
    scales = weight.float().abs().amax(dim=1) / 127
    scales[scales == 0] = 1.0
    return torch.round(weight.float() / scales[:, None]).clamp(-127, 127).to(torch.int8), scales


@contextmanager
def with_weights(
    block: nn.Module,
    modules: Mapping[str, nn.Linear | Conv1D],
    values: Mapping[str, Tensor],
    names: Collection[str],
    targets: Collection[str],
    kept: dict[str, Tensor] | None = None,
    *,
    as_operators: bool = False,
) -> Iterator[None]:
    """While ``block`` computes with weights and LoRA out of ``values``.

    Args:
        modules: its ``linears``.
        names: of the weights, of ``stored_weights``; modules whose weight is not among them stay as they are.
        targets: the modules with LoRA: ``<module>.lora_A`` (rank, in), ``<module>.lora_B`` (out, rank), and ``scale``,
            alpha over rank (0-d), which all share.
        kept: takes what a device may keep for the backward pass: ``<module>.product`` (tokens, out), before row scales
            and bias, and ``<module>.z`` (rank, tokens).
        as_operators: a trace has both products as the operators of ``ROW_BY_ROW``.
    """
    changed = {name: module for name, module in modules.items() if f"{name}.weight" in names}
    own = {f"{name}.weight" for name in modules}
    given = {name: values[name] for name in names if name not in own and not name.endswith(_SCALES)}
    before = {name: module.__dict__.get("forward") for name, module in changed.items()}
    with _reparametrize_module(block, given):
        try:
            for name, module in changed.items():
                module.forward = _forward(name, module, values, name in targets, kept, as_operators)  # type: ignore[method-assign]
            yield
        finally:
            for name, forward in before.items():
                if forward is None:
                    changed[name].__dict__.pop("forward", None)
                else:
                    changed[name].forward = forward  # type: ignore[method-assign]


def _forward(
    name: str,
    module: nn.Linear | Conv1D,
    values: Mapping[str, Tensor],
    has_lora: bool,
    kept: dict[str, Tensor] | None,
    as_operators: bool,
) -> Any:
    frozen, delta = (_frozen, _delta) if as_operators else (_Frozen.apply, _Delta.apply)
    weight = values[f"{name}.weight"]
    row_scales, group_scales = (values.get(f"{name}.weight.{scales}") for scales in _SCALES)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = frozen(rows, weight, group_scales)
        if kept is not None:
            kept[f"{name}.{PRODUCT}"] = y.detach()
            if has_lora:
                kept[f"{name}.{Z}"] = (values[f"{name}.lora_A"] @ rows.t()).detach()
        if row_scales is not None:
            y = y * row_scales
        if module.bias is not None:
            y = y + module.bias
        if has_lora:
            y = y + delta(rows, values[f"{name}.lora_A"], values[f"{name}.lora_B"], values[SCALE])
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


class _Frozen(torch.autograd.Function):
    """``x W^T`` of a stored weight: gradient by x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group_scales: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, group_scales)
        return torch.mm(x, _widened(weight, group_scales, x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, group_scales = ctx.saved_tensors
        return torch.mm(grad, _widened(weight, group_scales, grad.dtype)), None, None


def _widened(weight: Tensor, group_scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (weight if group_scales is None else widen_int4(weight, group_scales)).to(dtype)


class _Delta(torch.autograd.Function):
    """``scale * x A^T B^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
        z_by_rank = torch.mm(lora_a, x.t())
        ctx.save_for_backward(x, lora_a, lora_b, scale, z_by_rank)
        return torch.mm(z_by_rank.t() * scale, lora_b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, lora_a, lora_b, scale, z_by_rank = ctx.saved_tensors
        dz = torch.mm(grad, lora_b) * scale
        grad_b_by_rank = torch.mm(z_by_rank, grad) * scale
        return torch.mm(dz, lora_a), torch.mm(dz.t(), x), grad_b_by_rank.t(), None


@torch.library.custom_op(
    "dlora::frozen", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? group_scales) -> Tensor"
)
def _frozen(x: Tensor, weight: Tensor, group_scales: Tensor | None) -> Tensor:
    return torch.mm(x, _widened(weight, group_scales, x.dtype).t())


@torch.library.custom_op(
    "dlora::delta", mutates_args=(), schema="(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scale) -> Tensor"
)
def _delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    return torch.mm(torch.mm(x, lora_a.t()) * scale, lora_b.t())


@_frozen.register_fake
def _(x: Tensor, weight: Tensor, group_scales: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_delta.register_fake
def _(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], lora_b.shape[0])


ROW_BY_ROW: Final[Mapping[Any, Callable[..., Tensor]]] = {
    torch.ops.dlora.frozen.default: _Frozen.apply,
    torch.ops.dlora.delta.default: _Delta.apply,
}
"""What a trace has for the two products of a linear module, as one operator each, and what computes it with gradients
of the order that is wanted: of each row of x (rows, in) by itself."""
