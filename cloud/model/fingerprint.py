"""A digest of a base model's weights that does not depend on the precision that a server holds them in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from .held_linear import NamedWeight, weights_of


def fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over name, shape and bfloat16 value of every parameter and persistent floating-point buffer.

    Sorted by name; a tied parameter counts once, under its first name. A model that was loaded in float32 and
    one that was loaded in bfloat16 give the same, and one whose weights are held in few bits gives that of the weights
    that these stand for.
    """
    digest = hashlib.sha256()
    for name, shape, value in sorted(_weights(model), key=lambda weight: weight.name):
        digest.update(f"{name} {shape}\n".encode())
        values = value().to(torch.bfloat16).cpu().contiguous()
        digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[NamedWeight]:
    yield from weights_of(model)
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            yield NamedWeight(name, tuple(buffer.shape), buffer.detach)
