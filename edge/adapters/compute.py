"""Runs the adapters of exchange groups, one group at a time, and counts the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from dlora.edge.engine.engine import Engine
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import decode_floats

from .units import AdapterSet


@dataclass
class Saved:
    """What backward needs of a group's forward pass: its input, where it can be as it came (half the memory on an fp16
    wire), and what its adapters kept."""

    x: WireTensor | FloatArray
    for_backward: Any


class AdapterCompute:
    """Forward and backward of exchange groups, one group at a time.

    ``took``: called with what was computed, and when that began and ended.

    ``seconds``: spent computing so far.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterSet,
        took: Callable[[str, float, float], None] = lambda what, started, ended: None,
    ) -> None:
        self._adapters = adapters
        self._took = took
        self.seconds = 0.0
        load = cache(engine.load)
        for group in adapters.groups:
            group.load_graphs(load)

    def forward(self, group: int, x: WireTensor | FloatArray) -> tuple[Sequence[FloatArray], Saved]:
        """What a group's adapters answer to x (rows, input_width): (rows, output_width) each."""
        adapters, scale = self._adapters.groups[group], self._adapters.scale(group)
        with self._timed(f"forward {group}"):
            outputs, for_backward = adapters.forward(_values(x), scale)
            return outputs, Saved(x, for_backward)

    def input_grad(self, group: int, grads: Sequence[FloatArray]) -> tuple[FloatArray, Any]:
        """dx (rows, input_width), and what ``weight_grads`` needs of it."""
        with self._timed(f"input gradient {group}"):
            return self._adapters.groups[group].input_grad(grads, self._adapters.scale(group))

    def weight_grads(
        self, group: int, saved: Saved, grads: Sequence[FloatArray], backward: Any
    ) -> dict[str, FloatArray]:
        """The gradients of a group's parameters, by name; none where its unit is not trained."""
        if not self._adapters.is_trained(group):
            return {}
        adapters, scale = self._adapters.groups[group], self._adapters.scale(group)
        with self._timed(f"weight gradients {group}"):
            return adapters.weight_grads(_values(saved.x), saved.for_backward, grads, backward, scale)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.seconds += ended - started
        self._took(what, started, ended)


def _values(x: WireTensor | FloatArray) -> FloatArray:
    return decode_floats(x) if isinstance(x, WireTensor) else x
