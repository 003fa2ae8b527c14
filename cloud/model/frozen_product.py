"""Products with a frozen weight that is made for the product and not kept for the way back, where it is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def multiply_frozen(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` (…, out_features) of ``x`` (…, in_features); ``weight`` makes W (out_features, in_features), in
    the dtype of x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return linear(x, weight(), bias)
    product: Tensor = _FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


def own_storage(output: Tensor) -> Tensor:
    """``output`` of an autograd function, which nobody could change in place if it were a view, as some models do. A
    linear module with a bias gives one."""
    return output.clone() if output._is_view() else output


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return own_storage(linear(x, weight(), bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight(), None, None
