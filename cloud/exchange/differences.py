"""Tensors that cross once in each pass: at first themselves, then what is different from the pass before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .torch_codecs import from_wire, to_wire


class Differences:
    """Of one direction, one role and one of each group's tensors. Both sides add up what crossed, so that they know the
    same bits: in float32.

    Args:
        codecs: how it crosses at first, by ``role``, and how differences do.
    """

    def __init__(self, codecs: Codecs, role: TensorRole) -> None:
        self._codecs = codecs
        self._role = role
        self._known: dict[int, Tensor] = {}

    def to_wire(self, groups: Sequence[int], values: Sequence[Tensor]) -> WireTensor:
        """What is to be sent of these groups' ``values``, (rows, width) each: one under the other."""
        stacked = torch.cat([each.detach() for each in values])
        if groups[0] not in self._known:
            sent = to_wire(stacked, self._codecs, self._role)
        else:
            known = torch.cat([self._known[group] for group in groups])
            sent = to_wire(stacked.to(torch.float32) - known, self._codecs, TensorRole.DIFFERENCE)
        self.take(groups, sent, stacked.device)
        return sent

    def take(self, groups: Sequence[int], received: WireTensor, torch_device: torch.device) -> list[Tensor]:
        """The values of each group, of which this came, float32."""
        stacked = from_wire(received, torch_device, torch.float32)
        for group, values in zip(groups, stacked.tensor_split(len(groups)), strict=True):
            known = self._known.get(group)
            self._known[group] = values if known is None else known + values
        return [self._known[group] for group in groups]
