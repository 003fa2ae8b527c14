"""Attention among the rows of each text, where the rows of several texts lie end to end.

A mask over the rows of all texts says the same, and costs what all of them together cost. Families whose attention is
not ``scaled_dot_product_attention`` have only the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class TextAttention(TorchFunctionMode):
    """While it is entered, in this thread, attention runs text by text.

    Args:
        rows: of each text how many rows ask; keys: how many it may look at.

    Attributes:
        has_run: whether the family's attention went through here.
    """

    def __init__(self, rows: Sequence[int], keys: Sequence[int]) -> None:
        super().__init__()
        self._rows, self._keys = list(rows), list(keys)
        self._shape = sum(rows), sum(keys)
        self.has_run = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's own, but for attention among the rows of several texts."""
        given = kwargs or {}
        if func is not scaled_dot_product_attention or len(self._rows) == 1:
            return func(*args, **given)
        return self._attend(*args, **given)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if attn_mask is None or attn_mask.shape[-2:] != self._shape:
            return scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
        self.has_run = True
        masks = [mask.split(self._keys, -1)[text] for text, mask in enumerate(attn_mask.split(self._rows, -2))]
        keys_and_values = (each.split(self._keys, -2) for each in (key, value))
        texts = zip(query.split(self._rows, -2), *keys_and_values, masks, strict=True)
        return torch.cat([scaled_dot_product_attention(*text, *args, **kwargs) for text in texts], -2)
