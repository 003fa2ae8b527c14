"""What the device needs of an adapter kind: the adapters of one exchange group behind one interface.

A new kind is a file of its own beside ``lora.py``, and a line in ``DEVICE_KINDS`` of ``units.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from dlora.edge.engine.engine import Graph
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec
from dlora.protocol.tensors import FloatArray

LoadGraph = Callable[[str, str], Graph]
"""A graph by kind and key, loaded once."""


@dataclass
class Parameter:
    """A trainable matrix, its gradient of the step under way, and its AdamW moments; float32, one shape."""

    value: FloatArray
    exp_avg: FloatArray
    exp_avg_sq: FloatArray
    grad: FloatArray | None = None

    @classmethod
    def of(cls, value: FloatArray) -> Parameter:
        return cls(value, np.zeros_like(value), np.zeros_like(value))

    def add_grad(self, grad: FloatArray) -> None:
        self.grad = grad if self.grad is None else self.grad + grad


class Factors(NamedTuple):
    """What the adapters change of one target module's weight: ``dW = scaling · lora_B · lora_A``.

    Attributes:
        name: full name of the module.
        lora_A: float32 (r, in_features); lora_B: float32 (out_features, r).
    """

    name: str
    lora_A: FloatArray
    lora_B: FloatArray
    scaling: float


class Change(NamedTuple):
    """As much of what adapters change as its norm depends on: that of ``scaling · lora_B · lora_A``.

    Attributes:
        lora_A: None where its rows are orthonormal and never change, so that it is no part of any norm.
    """

    lora_A: FloatArray | None
    lora_B: FloatArray
    scaling: float


class GroupAdapters(ABC):
    """The adapters of one exchange group.

    Attributes:
        name: of its first target module.
        adapter_state: a copy of what the server keeps of the group, float32; empty for kinds without, and until the
            first session has made it.
        first_gradient_norm: of its parameters' gradient in the basis pass, a mean over micro-batches; 0.0 where there
            was none. A float32.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.adapter_state: tuple[FloatArray, ...] = ()
        self.first_gradient_norm = 0.0

    @abstractmethod
    def parameters(self) -> dict[str, Parameter]:
        """What is trained, by full name, in the order of the kind's ``parameter_shapes``."""

    @abstractmethod
    def load_graphs(self, load: LoadGraph) -> None:
        """Load what the three methods below run. Raises ``BundleError`` where the bundle has no such graph."""

    @abstractmethod
    def forward(self, x: FloatArray, scale: float) -> tuple[Sequence[FloatArray], Any]:
        """What goes to the server, (rows, output_width) each, and what backward needs beside ``x``.

        ``x`` is (rows, input_width); ``scale`` is what Kill and Revive multiplies the adapters' effect with.
        """

    @abstractmethod
    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, Any]:
        """The gradient of ``x`` (rows, input_width), and what ``weight_grads`` needs of it."""

    @abstractmethod
    def weight_grads(
        self, x: FloatArray, forward: Any, grads: Sequence[FloatArray], backward: Any, scale: float
    ) -> dict[str, FloatArray]:
        """The gradient of each parameter, by its name; ``forward`` and ``backward`` as those two gave them."""

    @abstractmethod
    def factors(self) -> list[Factors]:
        """The change of each target module, for PEFT's files."""

    def changes(self) -> list[Change]:
        """What scores are computed from."""
        return [Change(each.lora_A, each.lora_B, each.scaling) for each in self.factors()]

    @abstractmethod
    def given_to_server(self) -> list[FloatArray]:
        """What a server needs to apply this group by itself: of the kind's ``parameter_shapes``, the scaling in what is
        nearest to the output."""

    @abstractmethod
    def load_factors(self, factors: Mapping[str, Factors]) -> None:
        """Start from a saved adapter; modules that it lacks keep their start. Raises ``CheckpointError``."""

    def check_made_state(self, state: Sequence[FloatArray]) -> None:  # noqa: B027  # most have nothing to check
        """Raise ``RemoteProtocolError`` for what a server cannot have made as the kind says."""

    def parts(self, scale: float) -> dict[str, FloatArray]:
        """What was trained, times ``scale``, and what the server keeps, by name: see ``parts.py``."""
        parts = {name: parameter.value * np.float32(scale) for name, parameter in self.parameters().items()}
        return parts | self._named_adapter_state()

    def load_parts(
        self, tensors: Mapping[str, FloatArray], *, ratio: float, kept: Sequence[tuple[int, ...]]
    ) -> set[str]:
        """Start from ``parts``, what was trained times ``ratio``; gives the names of its own. A group that has none
        there keeps its start.

        ``kept``: the shapes of what the server keeps. Raises ``ValueError`` where a tensor is missing, or of another
        shape.
        """
        names = [*self.parameters(), *self._state_names(len(kept))]
        found = [tensors[name] for name in names if name in tensors]
        if not found:
            return set()
        wanted = [parameter.value.shape for parameter in self.parameters().values()] + list(kept)
        if [tensor.shape for tensor in found] != wanted:
            raise ValueError(f"{self.name} has other parts")
        for parameter, tensor in zip(self.parameters().values(), found, strict=False):
            parameter.value = tensor if ratio == 1.0 else tensor * np.float32(ratio)
        self.adapter_state = tuple(found[len(self.parameters()) :])
        return set(names)

    def _named_adapter_state(self) -> dict[str, FloatArray]:
        return dict(zip(self._state_names(len(self.adapter_state)), self.adapter_state, strict=True))

    def _state_names(self, count: int) -> list[str]:
        return [f"{self.name}.adapter_state.{index}" for index in range(count)]

    def scored_by_gradient(self) -> list[str]:
        """Names of the parameters whose gradient the score ``grad`` measures."""
        return list(self.parameters())

    def state(self) -> dict[str, FloatArray]:
        """Everything that the next step depends on, by name."""
        state = {}
        for name, parameter in self.parameters().items():
            state[name] = parameter.value
            state[f"{name}.exp_avg"] = parameter.exp_avg
            state[f"{name}.exp_avg_sq"] = parameter.exp_avg_sq
        if self.first_gradient_norm:
            state[f"{self.name}.first_gradient_norm"] = np.array([self.first_gradient_norm], np.float32)
        return state | self._named_adapter_state()

    def load_state(self, tensors: Mapping[str, FloatArray], *, kept_by_server: Sequence[tuple[int, ...]]) -> None:
        """Go on from a ``state``. Raises ``KeyError`` or ``ValueError`` where a tensor is missing or of another shape.

        ``kept_by_server``: the shapes of what the server keeps of the group.
        """
        for name, parameter in self.parameters().items():
            found = [tensors[key] for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq")]
            if any(tensor.shape != parameter.value.shape for tensor in found):
                raise ValueError(f"{name} has another shape")
            parameter.value, parameter.exp_avg, parameter.exp_avg_sq = found
        kept = [tensors[name] for name in self._state_names(len(kept_by_server))]
        if [(each.shape, each.dtype) for each in kept] != [(shape, np.dtype(np.float32)) for shape in kept_by_server]:
            raise ValueError(f"what the server keeps of {self.name} has another shape, or is not float32")
        self.adapter_state = tuple(kept)
        self.first_gradient_norm = float(tensors.get(f"{self.name}.first_gradient_norm", np.zeros(1, np.float32))[0])


class DeviceKind(Protocol):
    """How the device makes the adapters of a kind."""

    def create(
        self, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator
    ) -> GroupAdapters:
        """Fresh adapters of a group; groups are made in their order, from the same ``random``."""

    def draw_state(self, spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        """What the server is to keep of a group, drawn here: of the kind's ``state_shapes``."""
