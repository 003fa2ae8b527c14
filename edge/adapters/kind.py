"""What the device needs of an adapter kind: the adapters of one exchange group behind one interface.

A new kind is a file of its own beside ``lora.py``, and a line in ``DEVICE_KINDS`` of ``units.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from dlora.edge.engine.engine import Array, Graph
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec
from dlora.protocol.tensors import DTYPES, FloatArray, WireTensor, is_exponent
from dlora.protocol.wire_codecs import FOR_ALL, decode_floats, is_finite

LoadGraph = Callable[[str, str], Graph]
"""A graph by kind and key, loaded once."""


@dataclass
class Parameter:
    """A trainable matrix, its gradient of the step under way, and its AdamW moments; float32, one shape.

    ``gain``: its target module's, of the matrix that is nearest to the output, B; of others 1.
    """

    value: FloatArray
    exp_avg: FloatArray
    exp_avg_sq: FloatArray
    grad: FloatArray | None = None
    gain: float = 1.0

    @classmethod
    def of(cls, value: FloatArray, gain: float = 1.0) -> Parameter:
        return cls(value, np.zeros_like(value), np.zeros_like(value), gain=gain)

    @property
    def with_gain(self) -> FloatArray:
        """The value times ``gain``: the matrix as PEFT has it."""
        return self.value if self.gain == 1.0 else self.value * np.float32(self.gain)

    def add_grad(self, grad: FloatArray) -> None:
        self.grad = grad if self.grad is None else self.grad + grad

    def add_grad_with_gain(self, grad: FloatArray) -> None:
        """Add a gradient of ``with_gain``."""
        self.add_grad(grad if self.gain == 1.0 else grad * np.float32(self.gain))


@dataclass(frozen=True)
class SavedModule:
    """The LoRA of one target module: ``dW = scaling · lora_B · lora_A``, the module's gain in ``lora_B``.

    Attributes:
        name: full name in the base model.
        lora_A: float32 (r, in_features); lora_B: float32 (out_features, r).
    """

    name: str
    lora_A: FloatArray
    lora_B: FloatArray


class GroupAdapters(ABC):
    """The adapters of one exchange group.

    Attributes:
        name: of its first target module.
        state_shapes: of what the server keeps of the group.
        adapter_state: a copy of what the server keeps of the group, as it crosses, so that every server has the same
            bits; in int8 a quarter of the memory. Empty for kinds without, and until the first session has made it.
        first_gradient_norm: of its parameters' gradient in the basis pass, a mean over micro-batches; 0.0 where there
            was none. A float32.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state_shapes: tuple[tuple[int, ...], ...] = ()
        self.adapter_state: tuple[WireTensor, ...] = ()
        self.first_gradient_norm = 0.0

    @classmethod
    @abstractmethod
    def create(cls, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator) -> Self:
        """Fresh adapters of a group; groups are made in their order, from the same ``random``."""

    @staticmethod
    def draw_state(spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        """What the server is to keep of a group, drawn here: of the kind's ``state_shapes``."""
        return ()

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
    def factors(self) -> list[SavedModule]:
        """The change of each target module, for PEFT's files; the scaling is that of all adapters."""

    @abstractmethod
    def given_to_server(self) -> list[FloatArray]:
        """What a server needs to apply this group by itself: of the kind's ``parameter_shapes``, the scaling in what is
        nearest to the output, but not the modules' gains, which the server multiplies by itself."""

    @abstractmethod
    def load_factors(self, modules: Mapping[str, SavedModule], scaling: Mapping[str, float]) -> None:
        """Start from a saved adapter, each module with its scaling; what it lacks keeps its start. Raises
        ``CheckpointError``."""

    def check_made_state(self, state: Sequence[FloatArray]) -> None:  # noqa: B027  # most have nothing to check
        """Raise ``RemoteProtocolError`` for what a server cannot have made as the kind says."""

    def adapter_state_values(self) -> list[FloatArray]:
        """``adapter_state`` as float32, to compute with."""
        return [decode_floats(tensor) for tensor in self.adapter_state]

    def parts(self, scale: float) -> dict[str, Array]:
        """What was trained, times ``scale``, and what the server keeps, by name: see ``parts.py``."""
        trained = {name: parameter.value * np.float32(scale) for name, parameter in self.parameters().items()}
        return trained | self._named_adapter_state()

    def load_parts(self, tensors: Mapping[str, Array], ratio: float) -> set[str]:
        """Start from ``parts``, what was trained times ``ratio``; gives the names of its own. A group that has none
        there keeps its start. Raises ``ValueError`` where a tensor is missing, or of another shape or dtype."""
        names = {*self.parameters(), *self._state_names()}
        found = names & set(tensors)
        if not found:
            return set()
        if found != names:
            raise ValueError(f"{self.name} has other parts")
        for name, parameter in self.parameters().items():
            value = tensors[name]
            if (value.shape, value.dtype) != (parameter.value.shape, np.dtype(np.float32)):
                raise ValueError(f"{name} has another shape or dtype")
            parameter.value = value if ratio == 1.0 else value * np.float32(ratio)
        self._load_adapter_state(tensors)
        return names

    def _named_adapter_state(self) -> dict[str, Array]:
        if not self.adapter_state:
            return {}
        exponents = np.array([tensor.exponent for tensor in self.adapter_state], np.int8)
        arrays = [*(tensor.data for tensor in self.adapter_state), exponents]
        return dict(zip(self._state_names(), arrays, strict=True))

    def _load_adapter_state(self, tensors: Mapping[str, Array]) -> None:
        """Raises ``KeyError`` or ``ValueError`` where it is not what ``_named_adapter_state`` gives."""
        if not self.state_shapes:
            return
        *arrays, exponents = (tensors[name] for name in self._state_names())
        if (exponents.shape, exponents.dtype) != ((len(arrays),), np.dtype(np.int8)):
            raise ValueError(f"what the server keeps of {self.name} has other exponents")
        state = []
        for array, exponent, shape in zip(arrays, exponents.tolist(), self.state_shapes, strict=True):
            dtype = next((name for name in FOR_ALL if DTYPES[name] == array.dtype), None)
            if dtype is None or array.ndim != len(shape) or not is_exponent(exponent, dtype):
                raise ValueError(f"what the server keeps of {self.name} has another shape or dtype")
            tensor = WireTensor(dtype, array, exponent)
            if tensor.shape != shape:
                raise ValueError(f"what the server keeps of {self.name} has another shape")
            state.append(tensor)
        if not all(map(is_finite, state)):
            raise ValueError(f"what the server keeps of {self.name} is not finite")
        self.adapter_state = tuple(state)

    def _state_names(self) -> list[str]:
        """Of the tensors that the server keeps, and of their exponents."""
        count = len(self.state_shapes)
        return [f"{self.name}.adapter_state.{each}" for each in (*range(count), "exponents")] if count else []

    def scored_by_gradient(self) -> list[str]:
        """Names of the parameters whose gradient the score ``grad`` measures."""
        return list(self.parameters())

    def state(self) -> dict[str, Array]:
        """Everything that the next step depends on, by name."""
        state: dict[str, Array] = {}
        for name, parameter in self.parameters().items():
            state[name] = parameter.value
            state[f"{name}.exp_avg"] = parameter.exp_avg
            state[f"{name}.exp_avg_sq"] = parameter.exp_avg_sq
        if self.first_gradient_norm:
            state[f"{self.name}.first_gradient_norm"] = np.array([self.first_gradient_norm], np.float32)
        return state | self._named_adapter_state()

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """Go on from a ``state``. Raises ``KeyError`` or ``ValueError`` where a tensor is missing or misshapen."""
        for name, parameter in self.parameters().items():
            found = [tensors[key] for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq")]
            if any(tensor.shape != parameter.value.shape for tensor in found):
                raise ValueError(f"{name} has another shape")
            parameter.value, parameter.exp_avg, parameter.exp_avg_sq = found
        self._load_adapter_state(tensors)
        self.first_gradient_norm = float(tensors.get(f"{self.name}.first_gradient_norm", np.zeros(1, np.float32))[0])
