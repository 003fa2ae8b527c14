"""How much memory the autograd graph of a micro-batch will take, known before it runs.

What a block saves for its backward pass depends on the family, the attention kernel and the dtype, so the base
model is asked once: it runs a few tokens, and every tensor that autograd saves is weighed. Two lengths tell the part
that grows with the tokens from the part that grows with their square (attention scores, masks).

The graph begins at the lowest trained group, so bytes are kept by the target module after which they are saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Final, Self

import torch
from torch import Tensor

from dlora.protocol.kill_revive import GroupSpec

from .base_model import BaseModel
from .layout import Layout

# Two: a single sequence hides what is kept once for a batch, and what is copied for each sequence of one.
_SEQUENCES: Final = 2
# Of the shorter run; the other is twice as long. Attention kernels on GPUs pad to multiples of 16, which must not look
# like growth; CPUs do not, and are slow.
_LENGTH_ON_CPU: Final = 4
_LENGTH: Final = 16


@dataclass(frozen=True)
class _Growth:
    """Bytes of a graph: ``constant + tokens * (linear + quadratic * length)``, padding counted among the tokens."""

    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def __add__(self, other: _Growth) -> _Growth:
        return _Growth(self.constant + other.constant, self.linear + other.linear, self.quadratic + other.quadratic)


@dataclass(frozen=True)
class LiveBytes:
    """What the graph above each target module takes.

    Attributes:
        plain: a growth for each target module, by name, where attention needs no mask.
        masked: the same where sequences are padded or packed.
    """

    plain: dict[str, _Growth]
    masked: dict[str, _Growth]

    @classmethod
    def measure(cls, base: BaseModel) -> Self:
        """Run a few tokens through ``base`` and weigh what autograd saves. Changes nothing, and keeps nothing."""
        return cls(plain=_growths(base, masked=False), masked=_growths(base, masked=True))

    def estimate(self, layout: Layout, lowest: GroupSpec | None) -> int:
        """Bytes that the graph of a micro-batch holds between its forward and its backward pass.

        Args:
            layout: the micro-batch's input.
            lowest: the lowest group whose adapters are trained; None when evaluating, which has no graph.
        """
        if lowest is None:
            return 0
        sequences, length, _ = layout.inputs_embeds.shape
        masked = layout.attention_mask is not None or layout.position_ids is not None
        growth = (self.masked if masked else self.plain)[lowest.targets[0].name]
        return round(growth.constant + sequences * length * (growth.linear + growth.quadratic * length))


def _growths(base: BaseModel, *, masked: bool) -> dict[str, _Growth]:
    """For each target module: what is saved after it was called, to the very end."""
    length = _LENGTH_ON_CPU if base.device.type == "cpu" else _LENGTH
    short, long = (_saved(base, many, masked=masked) for many in (length, 2 * length))
    after_each = [
        sum((_growth(length, *pair) for pair in zip_longest(*sizes, fillvalue=0)), _Growth())
        for sizes in zip(short, long, strict=True)
    ]
    return dict(zip(reversed(base.targets), accumulate(reversed(after_each)), strict=True))


def _growth(length: int, short_bytes: int, long_bytes: int) -> _Growth:
    """Of one tensor that was saved in both runs."""
    if short_bytes == long_bytes:
        return _Growth(constant=short_bytes)
    a_token, a_token_of_long = short_bytes / (_SEQUENCES * length), long_bytes / (_SEQUENCES * 2 * length)
    quadratic = max(0.0, (a_token_of_long - a_token) / length)
    return _Growth(linear=a_token - quadratic * length, quadratic=quadratic)


def _saved(base: BaseModel, length: int, *, masked: bool) -> list[list[int]]:
    """For each target module: the sizes in bytes of what autograd saves from its call to the next one's."""
    width = base.embedding_size
    embeds = torch.ones(_SEQUENCES, length, width, dtype=base.dtype, device=base.device, requires_grad=True)
    mask = None
    if masked:
        mask = torch.ones(_SEQUENCES, length, dtype=torch.long, device=base.device)
        mask[-1, -1] = 0  # a mask without padding may be dropped
    with torch.enable_grad(), _weighing(base) as saved:
        base.last_hidden_state(embeds, mask)
    sizes: list[list[int]] = [[] for _ in base.targets]
    for order, storage in saved.values():
        if order is not None:
            sizes[order].append(storage.nbytes())
    return sizes


@contextmanager
def _weighing(base: BaseModel) -> Iterator[dict[int, tuple[int | None, torch.UntypedStorage]]]:
    """Collect what autograd saves: by address, the target module that was called last, and the storage.

    A storage that is saved several times counts where it is saved last: a graph that begins lower holds it, too.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*base.model.parameters(), *base.model.buffers())}
    saved: dict[int, tuple[int | None, torch.UntypedStorage]] = {}
    called: int | None = None

    def save(tensor: Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = called, storage  # held, so that its address is not given out again
        return storage

    def load(_: torch.UntypedStorage) -> Tensor:
        raise AssertionError("this graph is weighed, not run")

    def call(order: int) -> None:
        nonlocal called
        called = order

    handles = [
        target.module.register_forward_pre_hook(lambda *_, order=target.order: call(order))
        for target in base.targets.values()
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, load):
            yield saved
    finally:
        for handle in handles:
            handle.remove()
