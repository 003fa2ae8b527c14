"""LoRA on the device: A and B of every target module, on the bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from dlora.edge.engine.engine import Array, Graph, scalar
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import adapter_key
from dlora.protocol.tensors import FloatArray

from .kind import GroupAdapters, LoadGraph, Parameter, SavedModule


@dataclass
class LoraModule:
    """The LoRA of one target module: ``delta = scaling * x A^T B^T``, which is added times the module's gain.

    ``lora_A``: (rank, in_features); ``lora_B``: (out_features, rank), as PEFT has them.
    """

    name: str
    lora_A: Parameter
    lora_B: Parameter

    @property
    def graph_key(self) -> str:
        return adapter_key(self.lora_A.value.shape[1], self.lora_B.value.shape[0])


class LoraGroup(GroupAdapters):
    """The LoRAs of an exchange group, which share their input, as PEFT starts them: A uniform in ±1/sqrt(in_features)
    (Kaiming, a = sqrt 5), B zero."""

    def __init__(self, modules: Sequence[LoraModule], scaling: float) -> None:
        super().__init__(modules[0].name)
        self.modules = tuple(modules)
        self.scaling = scaling
        self._graphs: list[tuple[Graph, ...]] = []

    @classmethod
    def create(cls, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator) -> Self:
        bound = group.in_features**-0.5
        modules = []
        for target in group.targets:
            lora_a = Parameter.of(random.uniform(-bound, bound, (spec.r, group.in_features)).astype(np.float32))
            lora_b = Parameter.of(np.zeros((target.out_features, spec.r), np.float32), target.gain)
            modules.append(LoraModule(target.name, lora_a, lora_b))
        return cls(modules, scaling)

    def parameters(self) -> dict[str, Parameter]:
        named: dict[str, Parameter] = {}
        for module in self.modules:
            named[f"{module.name}.lora_A"] = module.lora_A
            named[f"{module.name}.lora_B"] = module.lora_B
        return named

    def load_graphs(self, load: LoadGraph) -> None:
        kinds = ("adapter_forward", "adapter_input_grad", "adapter_weight_grad")
        self._graphs = [tuple(load(kind, module.graph_key) for kind in kinds) for module in self.modules]

    def forward(self, x: FloatArray, scale: float) -> tuple[list[FloatArray], list[FloatArray]]:
        """The deltas, (rows, out_features) each, and each module's ``z = x A^T``."""
        deltas, all_z = [], []
        for module, (graph, _, _) in zip(self.modules, self._graphs, strict=True):
            weights = {"lora_A": module.lora_A.value, "lora_B": module.lora_B.value}
            z, delta = graph({"x": x, **weights, "scale": scalar(self.scaling * scale)})
            all_z.append(z)
            deltas.append(delta)
        return deltas, all_z

    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, list[Array]]:
        """dx (rows, in_features), summed over target modules, and each module's dz."""
        all_dz: list[Array] = []
        total: FloatArray | None = None  # so that no more than one dx is held beside it
        for module, (_, graph, _), grad in zip(self.modules, self._graphs, grads, strict=True):
            weights = {"lora_A": module.lora_A.value, "lora_B": module.lora_B.value}
            dz, dx = graph({"grad": grad, **weights, "scale": scalar(self.scaling * scale)})
            all_dz.append(dz)
            total = dx if total is None else total + dx
        assert total is not None
        return total, all_dz

    def weight_grads(
        self,
        x: FloatArray,
        forward: Sequence[FloatArray],
        grads: Sequence[FloatArray],
        backward: Sequence[Array],
        scale: float,
    ) -> dict[str, FloatArray]:
        found = {}
        for index, (module, (_, _, graph)) in enumerate(zip(self.modules, self._graphs, strict=True)):
            given = {"x": x, "z": forward[index], "grad": grads[index], "dz": backward[index]}
            found[f"{module.name}.lora_A"], found[f"{module.name}.lora_B"] = graph(
                {**given, "scale": scalar(self.scaling * scale)}
            )
        return found

    def given_to_server(self) -> list[FloatArray]:
        pairs = ((module.lora_A.value, module.lora_B.value * np.float32(self.scaling)) for module in self.modules)
        return [matrix for pair in pairs for matrix in pair]

    def factors(self) -> list[SavedModule]:
        return [SavedModule(m.name, m.lora_A.value, m.lora_B.with_gain) for m in self.modules]

    def scored_by_gradient(self) -> list[str]:
        return [f"{module.name}.lora_B" for module in self.modules]

    def load_factors(self, modules: Mapping[str, SavedModule], scaling: Mapping[str, float]) -> None:
        for module in self.modules:
            saved = modules.get(module.name)
            if saved is None:
                continue
            rank = saved.lora_A.shape[0]
            if rank != module.lora_A.value.shape[0]:
                raise CheckpointError(f"the adapter's {module.name} has rank {rank}; train with --rank {rank}")
            # A saved scaling other than this run's is folded into B, and the module's gain taken out of it.
            ratio = scaling[module.name] / (self.scaling * module.lora_B.gain)
            module.lora_A.value = saved.lora_A
            module.lora_B.value = saved.lora_B if ratio == 1.0 else saved.lora_B * np.float32(ratio)
