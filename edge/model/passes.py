"""The device's part of a micro-batch in passes: what some groups write, and what they answer to gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlora.edge.adapters.compute import AdapterCompute, Saved
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .differences import Differences


class DevicePasses:
    """What one micro-batch's groups have read and written so far.

    Args:
        codecs: how its tensors cross.
        trains: whether gradients come.
    """

    def __init__(self, compute: AdapterCompute, codecs: Codecs, *, trains: bool) -> None:
        self._compute = compute
        self._codecs = codecs
        self._trains = trains
        self._inputs = Differences(codecs, TensorRole.GROUP_INPUT)
        self._input_grads = Differences(codecs, TensorRole.INPUT_GRAD)
        self._deltas: list[Differences] = []  # one for each of the tensors that a group gives
        self._grads: list[Differences] = []
        self._saved: dict[int, Saved] = {}
        self._last: dict[int, tuple[Sequence[FloatArray], Any]] = {}

    def write(self, groups: Sequence[int], read: WireTensor) -> tuple[WireTensor, ...]:
        """What these groups give for what they read."""
        given: list[Sequence[FloatArray]] = []
        for group, x in zip(groups, self._inputs.take(groups, read), strict=True):
            outputs, saved = self._compute.forward(group, x)
            given.append([np.asarray(output) for output in outputs])
            if self._trains:
                self._saved[group] = saved
        _fill(self._deltas, len(given[0]), self._codecs, TensorRole.DELTA)
        columns = zip(*given, strict=True)
        return tuple(known.to_wire(groups, column) for known, column in zip(self._deltas, columns, strict=False))

    def input_grads(self, groups: Sequence[int], grads: Sequence[WireTensor], *, answer: bool) -> WireTensor | None:
        """The gradients of these groups' inputs, where an ``answer`` is wanted to those of what they gave."""
        _fill(self._grads, len(grads), self._codecs, TensorRole.DELTA_GRAD)
        columns = [known.take(groups, grad) for known, grad in zip(self._grads, grads, strict=False)]
        given = []
        for group, of_group in zip(groups, zip(*columns, strict=True), strict=True):
            dx, backward = self._compute.input_grad(group, of_group)
            self._last[group] = of_group, backward
            given.append(np.asarray(dx))
        return self._input_grads.to_wire(groups, given) if answer else None

    def weight_grads(self) -> dict[str, FloatArray]:
        """Of all groups that are trained, by name: of what they read last, and of the last gradients."""
        found: dict[str, FloatArray] = {}
        for group, (grads, backward) in self._last.items():
            found |= self._compute.weight_grads(group, self._saved[group], grads, backward)
        return found


def _fill(differences: list[Differences], count: int, codecs: Codecs, role: TensorRole) -> None:
    """Make them as many."""
    differences += [Differences(codecs, role) for _ in range(count - len(differences))]
