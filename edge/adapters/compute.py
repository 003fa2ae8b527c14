"""Runs the adapters of exchange groups on the bundle's graphs, and keeps what backward needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dlora.edge.engine.engine import Array, Engine, Graph, scalar
from dlora.protocol.manifest import GraphKind, adapter_key
from dlora.protocol.tensors import FloatArray, WireTensor

from .units import Adapter, AdapterSet

T = TypeVar("T")


@dataclass
class _Saved:
    """A group's forward pass: its input as it came (half the memory on an fp16 wire), and ``z = x A^T`` each."""

    x: WireTensor
    z: list[FloatArray]


class AdapterCompute:
    """Forward and backward of exchange groups, one group at a time.

    Attributes:
        seconds: spent computing so far.
    """

    def __init__(self, engine: Engine, adapters: AdapterSet) -> None:
        self._adapters = adapters
        self._saved: dict[int, _Saved] = {}
        self.seconds = 0.0
        self._graphs: dict[tuple[GraphKind, str], Graph] = {}
        kinds: tuple[GraphKind, ...] = ("adapter_forward", "adapter_input_grad", "adapter_weight_grad")
        for key in sorted({_key(adapter) for adapter in adapters}):
            for kind in kinds:
                self._graphs[kind, key] = engine.load(kind, key)

    def forward(self, group: int, x: WireTensor, *, keep: bool) -> list[FloatArray]:
        """The deltas of a group: x (tokens, in_features) to (tokens, out_features) a target module."""
        return self._timed(partial(self._forward, group, x, keep=keep))

    def input_grad(self, group: int, grads: Sequence[FloatArray]) -> tuple[FloatArray, list[Array]]:
        """dx (tokens, in_features), summed over target modules, and each module's dz for ``add_weight_grads``."""
        return self._timed(partial(self._input_grad, group, grads))

    def add_weight_grads(self, group: int, grads: Sequence[FloatArray], dz: Sequence[Array]) -> None:
        """Add a group's dA and dB of this micro-batch to its adapters' gradients, and forget its input."""
        self._timed(partial(self._add_weight_grads, group, grads, dz))

    def forget(self) -> None:
        """Drop what backward would need; called at the start of a micro-batch."""
        self._saved.clear()

    def _forward(self, group: int, x: WireTensor, *, keep: bool) -> list[FloatArray]:
        values = x.to_floats()
        saved = _Saved(x, [])
        deltas = []
        for adapter in self._adapters.groups[group]:
            z, delta = self._graphs["adapter_forward", _key(adapter)](
                {
                    "x": values,
                    "lora_A": adapter.lora_A.value,
                    "lora_B": adapter.lora_B.value,
                    "scale": self._scale(group, adapter),
                }
            )
            saved.z.append(z)
            deltas.append(delta)
        if keep:
            self._saved[group] = saved
        return deltas

    def _input_grad(self, group: int, grads: Sequence[FloatArray]) -> tuple[FloatArray, list[Array]]:
        total: FloatArray | None = None
        all_dz = []
        for adapter, grad in zip(self._adapters.groups[group], grads, strict=True):
            dz, grad_x = self._graphs["adapter_input_grad", _key(adapter)](
                {
                    "grad": grad,
                    "lora_A": adapter.lora_A.value,
                    "lora_B": adapter.lora_B.value,
                    "scale": self._scale(group, adapter),
                }
            )
            all_dz.append(dz)
            total = grad_x if total is None else total + grad_x
        assert total is not None
        return total, all_dz

    def _add_weight_grads(self, group: int, grads: Sequence[FloatArray], dz: Sequence[Array]) -> None:
        saved = self._saved.pop(group)
        if not self._adapters.is_trained(group):
            return
        values = saved.x.to_floats()
        for index, adapter in enumerate(self._adapters.groups[group]):
            grad_a, grad_b = self._graphs["adapter_weight_grad", _key(adapter)](
                {
                    "x": values,
                    "z": saved.z[index],
                    "grad": grads[index],
                    "dz": dz[index],
                    "scale": self._scale(group, adapter),
                }
            )
            adapter.lora_A.add_grad(grad_a)
            adapter.lora_B.add_grad(grad_b)

    def _scale(self, group: int, adapter: Adapter) -> FloatArray:
        return scalar(adapter.scaling * self._adapters.scale(group))

    def _timed(self, compute: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = compute()
        self.seconds += time.perf_counter() - started
        return result


def _key(adapter: Adapter) -> str:
    return adapter_key(adapter.in_features, adapter.out_features)
