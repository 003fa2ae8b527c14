"""Tensors that cross once in each pass: at first themselves, then what is different from the pass before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole, decode_floats


class Differences:
    """Of one direction, one role and one of each group's tensors. Both sides add up what crossed, so that they know the
    same bits.

    Args:
        codecs: how it crosses at first, by ``role``, and how differences do.
    """

    def __init__(self, codecs: Codecs, role: TensorRole) -> None:
        self._first, self._later = codecs.of(role), codecs.of(TensorRole.DIFFERENCE)
        self._known: dict[int, FloatArray] = {}

    def to_wire(self, groups: Sequence[int], values: Sequence[FloatArray]) -> WireTensor:
        """What is to be sent of these groups' ``values``, (rows, width) each: one under the other."""
        stacked = np.concatenate(values)
        if groups[0] not in self._known:
            sent = self._first.encode(stacked)
        else:
            sent = self._later.encode(stacked - np.concatenate([self._known[group] for group in groups]))
        self.take(groups, sent)
        return sent

    def take(self, groups: Sequence[int], received: WireTensor) -> list[FloatArray]:
        """The values of each group, of which this came."""
        for group, values in zip(groups, np.split(decode_floats(received), len(groups)), strict=True):
            known = self._known.get(group)
            self._known[group] = values if known is None else known + values
        return [self._known[group] for group in groups]
