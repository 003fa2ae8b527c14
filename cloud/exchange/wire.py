"""Torch tensors to wire tensors and back, with the bits that ``WireTensor.from_floats`` gives."""

from __future__ import annotations

import math
import warnings

import torch

from dlora.protocol.errors import NonFiniteError
from dlora.protocol.tensors import WireDtype, WireTensor, fp16_exponent

# Decoded frames are read-only views, and nobody here writes into them; torch warns all the same.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def to_wire(tensor: torch.Tensor, dtype: WireDtype) -> WireTensor:
    """Put a floating-point tensor of any device on the wire. Raises ``NonFiniteError`` on NaN or infinity."""
    values = tensor.detach().to(torch.float32)
    peak = float(values.abs().max()) if values.numel() else 0.0
    if not math.isfinite(peak):
        raise NonFiniteError("NaN or infinity in the base model's results")
    if dtype == "fp32":
        return WireTensor("fp32", values.cpu().contiguous().numpy())
    exponent = fp16_exponent(peak)
    if exponent:
        values = values * 2.0**-exponent
    return WireTensor("fp16", values.to(torch.float16).cpu().contiguous().numpy(), exponent)


def from_wire(tensor: WireTensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's values in the base model's dtype, on its device."""
    values = torch.from_numpy(tensor.data).to(device)
    if tensor.exponent:
        values = values.to(torch.float32) * 2.0**tensor.exponent
    return values.to(dtype)
