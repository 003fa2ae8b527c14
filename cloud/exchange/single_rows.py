"""Products of one row, which on some machines round otherwise than the same row does among others.

In half precision a product of two rows gives what a product of many gives, and one of a single row may not: it is
computed in another order. Where that is so, a single row is multiplied twice, so that what a device gets does not
depend on who else asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.held_linear import HeldLinear
from dlora.cloud.model.placement import parameter_of
from dlora.cloud.model.targets import widths_of

_ROWS: Final = 4


@dataclass(frozen=True)
class SingleRows:
    """Which products give something else for a single row.

    Attributes:
        modules: names of target modules; head: whether the LM head does.
    """

    modules: frozenset[str] = frozenset()
    head: bool = False

    @classmethod
    def of(cls, base: BaseModel) -> SingleRows:
        """Of what two rows put right; none in float32, where that does not."""
        if base.dtype == torch.float32:
            return cls()
        found: dict[tuple[tuple[int, int], bool], bool] = {}

        def differs(module: torch.nn.Module) -> bool:
            assert isinstance(module, torch.nn.Linear | Conv1D)
            key = widths_of(module), isinstance(module, Conv1D)
            if key not in found:
                found[key] = _differs(module, parameter_of(module))
            return found[key]

        names = (name for name, target in base.targets.items() if differs(target.module))
        return cls(frozenset(names), differs(base.lm_head))


def twice(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A product of a single row, (…, 1, in_features), as it is among others."""
    return product(x.expand(*x.shape[:-2], 2, x.shape[-1]))[..., :1, :]


def _differs(module: torch.nn.Module, weight: Tensor) -> bool:
    """Tried with sums of pairs that cancel: what is left tells the order in which they were added."""
    is_turned = isinstance(module, Conv1D)
    width = weight.shape[0 if is_turned else 1]
    outputs = weight.numel() // width
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(width // 2 * 2, generator=generator)
    half, rows = torch.randn(width // 2, generator=generator), torch.randn(_ROWS, width // 2, generator=generator)
    output, x = torch.zeros(width), torch.zeros(_ROWS, width)
    output[order], x[:, order] = torch.cat([half, -half]), torch.cat([rows, rows], 1)
    output, x = output.to(weight.device, weight.dtype), x.to(weight.device, weight.dtype)[None]
    # All outputs are the same: a large head is copied but once.
    weights = (output[:, None].expand(width, outputs) if is_turned else output.expand(outputs, width)).contiguous()

    def product(x: Tensor) -> Tensor:
        if isinstance(module, HeldLinear):
            return torch.nn.functional.linear(x, weights, module.bias)
        found: Tensor = functional_call(module, {"weight": weights}, (x,))
        return found

    with torch.no_grad():
        among = product(x)
        each = x.split(1, 1)
        return not torch.equal(torch.cat([product(row) for row in each], 1), among) and torch.equal(
            torch.cat([twice(product, row) for row in each], 1), among
        )
