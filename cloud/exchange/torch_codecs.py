"""Torch tensors to wire tensors and back: a twin of each codec of ``protocol/wire_codecs.py``, with the same bits."""

from __future__ import annotations

import math
import warnings
from typing import Final

import torch

from dlora.protocol.errors import NonFiniteError
from dlora.protocol.tensors import SCALE_BYTES, WireTensor, fp16_exponent
from dlora.protocol.wire_codecs import LARGEST, SCALE_LIMIT, Codecs, TensorRole

# Decoded frames are read-only views, and nobody here writes into them; torch warns all the same.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class _Fp32:
    def encode(self, values: torch.Tensor) -> WireTensor:
        finite_peak(values)
        return WireTensor("fp32", values.cpu().contiguous().numpy())

    def values(self, stored: torch.Tensor, exponent: int, width: int | None) -> torch.Tensor:
        return stored


class _Fp16:
    def encode(self, values: torch.Tensor) -> WireTensor:
        exponent = fp16_exponent(finite_peak(values))
        if exponent:
            values = values * 2.0**-exponent
        return WireTensor("fp16", values.to(torch.float16).cpu().contiguous().numpy(), exponent)

    def values(self, stored: torch.Tensor, exponent: int, width: int | None) -> torch.Tensor:
        return stored.to(torch.float32) * 2.0**exponent if exponent else stored


class _Integers:
    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._largest = LARGEST[dtype]

    def encode(self, values: torch.Tensor) -> WireTensor:
        finite_peak(values)
        rows, width = values.shape
        peaks = values.abs().amax(1, keepdim=True) if width else values.new_zeros(rows, 1)
        # By a tensor: kernels multiply by the reciprocal of a Python number, which rounds otherwise.
        scales = (peaks / torch.full_like(peaks, self._largest)).clamp_min(1e-30)
        if scales.numel() and float(scales.max()) >= SCALE_LIMIT:
            raise NonFiniteError(f"values that are too large for {self._dtype} in the base model's results")
        upper = (scales.view(torch.int32) + 0xFFFF) >> 16
        integers = torch.round(values / (upper << 16).view(torch.float32)).to(torch.int8).view(torch.uint8)
        if self._dtype == "int4":
            even, odd = integers[:, ::2] & 0xF, integers[:, 1::2] << 4
            integers = even | torch.nn.functional.pad(odd, (0, width % 2))
        stored = torch.cat([integers, upper.to(torch.int16).view(torch.uint8)], 1).cpu().contiguous().numpy()
        return WireTensor(self._dtype, stored, width=width if self._dtype == "int4" else None)

    def values(self, stored: torch.Tensor, exponent: int, width: int | None) -> torch.Tensor:
        integers = stored[:, :-SCALE_BYTES]
        if self._dtype == "int4":
            both = torch.stack([integers << 4, integers & 0xF0], 2).view(torch.int8) >> 4
            integers = both.flatten(1)[:, :width]
        # By arithmetic: a row may begin at any byte, and torch views no pair of bytes at an odd one.
        low, high = (stored[:, place].to(torch.int32) for place in (-2, -1))
        scales = ((high << 24) | (low << 16)).view(torch.float32).unsqueeze(1)
        # In place: of a matrix the system would have to give a second one, which takes ten times as long.
        return integers.view(torch.int8).to(torch.float32).mul_(scales)


TORCH_CODECS: Final[dict[str, _Integers | _Fp16 | _Fp32]] = {
    "int4": _Integers("int4"), "int8": _Integers("int8"), "fp16": _Fp16(), "fp32": _Fp32(),
}  # fmt: skip
"""By the names of ``dlora.protocol.wire_codecs.CODECS``, the dtypes of what they store; they encode float32.

``values``: what is stored, of whatever shape and torch device, in a floating-point dtype that has them all.
"""


def finite_peak(values: torch.Tensor) -> float:
    """The largest magnitude; 0 for none. Raises ``NonFiniteError`` on NaN or infinity."""
    peak = float(values.abs().max()) if values.numel() else 0.0
    if not math.isfinite(peak):
        raise NonFiniteError("NaN or infinity in the base model's results")
    return peak


def to_wire(tensor: torch.Tensor, codecs: Codecs, role: TensorRole) -> WireTensor:
    """Put a floating-point tensor of any device and dtype on the wire. Raises ``NonFiniteError`` on NaN or infinity."""
    return TORCH_CODECS[getattr(codecs, role.value)].encode(tensor.detach().to(torch.float32))


def from_wire(tensor: WireTensor, torch_device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's values in ``dtype`` on ``torch_device``, whatever codec stored it."""
    stored = torch.from_numpy(tensor.data).to(torch_device)
    return TORCH_CODECS[tensor.dtype].values(stored, tensor.exponent, tensor.width).to(dtype)
