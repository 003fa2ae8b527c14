"""A digest of a base model's weights that does not depend on the precision that a server holds them in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over name, shape and bfloat16 value of every parameter and persistent floating-point buffer.

    Sorted by name; a tied parameter counts once, under its first name. A model that was loaded in float32 and
    one that was loaded in bfloat16 give the same.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            yield name, buffer
