"""Products with a frozen weight that is not kept for the way back: it is made for each product, or is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class FrozenWeight(Protocol):
    """A weight W (out_features, in_features), by what is done with it."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``, (…, out_features), of x (…, in_features)."""

    def multiply_back(self, grad: Tensor) -> Tensor:
        """``grad W``, (…, in_features), of grad (…, out_features)."""


class MadeWeight(NamedTuple):
    """A weight that ``make`` makes, in the dtype of what it is multiplied with."""

    make: Callable[[], Tensor]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``FrozenWeight.multiply``."""
        return linear(x, self.make(), bias)

    def multiply_back(self, grad: Tensor) -> Tensor:
        """``FrozenWeight.multiply_back``."""
        return grad @ self.make()


def multiply_frozen(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` (…, out_features) of ``x`` (…, in_features)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return weight.multiply(x, bias)
    product: Tensor = _FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


def own_storage(output: Tensor) -> Tensor:
    """``output`` of an autograd function, which nobody could change in place if it were a view, as some models do. A
    linear module with a bias gives one."""
    return output.clone() if output._is_view() else output


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return own_storage(weight.multiply(x, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight: FrozenWeight = ctx.weight
        return weight.multiply_back(grad), None, None
