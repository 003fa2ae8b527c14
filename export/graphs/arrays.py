"""Graph inputs and outputs as numpy arrays, by name, and as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[Any]]
Inputs = Mapping[str, npt.NDArray[Any]]


def to_tensors(inputs: Inputs, dtype: torch.dtype, *names: str) -> list[Tensor]:
    """Copies of the inputs of these names, in ``dtype``."""
    return [torch.from_numpy(np.array(inputs[name])).to(dtype) for name in names]


def to_floats(**tensors: Tensor) -> Arrays:
    """Tensors as float32 arrays."""
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    """Normally distributed float32."""
    return random.standard_normal(shape, np.float32)
