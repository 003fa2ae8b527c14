"""What a server keeps of an exchange group, as it crossed, and products with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dlora.cloud.model.frozen_product import MadeWeight, multiply_frozen
from dlora.protocol.tensors import WireTensor

from .torch_codecs import TORCH_CODECS, from_wire


@dataclass(frozen=True)
class KeptTensor:
    """A frozen matrix, in as little memory as it crossed in: of int8 a quarter of float32's.

    Attributes:
        dtype: of the codec; stored: as it stores, on the device of the group's modules.
        exponent, width: as ``WireTensor`` has them.
    """

    dtype: str
    stored: Tensor
    exponent: int
    width: int | None

    @classmethod
    def of(cls, tensor: WireTensor, torch_device: torch.device, *, decoded: bool) -> Self:
        """A copy of what came, which is a view of its frame. ``decoded``: in float32, for who multiplies for each token
        of an answer, where decoding would take a tenth of the time."""
        if decoded:
            return cls("fp32", from_wire(tensor, torch_device, torch.float32).clone(), 0, None)
        return cls(tensor.dtype, torch.from_numpy(tensor.data.copy()).to(torch_device), tensor.exponent, tensor.width)

    def values(self) -> Tensor:
        """In float32, (rows, width)."""
        return TORCH_CODECS[self.dtype].values(self.stored, self.exponent, self.width).to(torch.float32)

    def split(self, rows: Sequence[int]) -> list[KeptTensor]:
        """Into so many rows each."""
        return [replace(self, stored=part) for part in self.stored.split(list(rows))]


def multiply(x: Tensor, kept: KeptTensor) -> Tensor:
    """``x``, (rows, width) in float32, times the transposed values. Their decoded form is not kept for the way back."""
    return multiply_frozen(x, MadeWeight(kept.values))
