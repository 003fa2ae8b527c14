"""ATen's operators, as traced graphs have them."""

from __future__ import annotations

from typing import Any, Final

import torch

aten: Final[Any] = torch.ops.aten
COPIES: Final = (aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default)
"""What gives its operand again."""


def is_transposed(operand: Any) -> bool:
    """Whether an operand of a product is a transpose."""
    return operand.target is aten.permute.default and list(operand.args[1]) == [1, 0]
