"""LoRA on the device: A and B of every target module, on the bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlora.edge.engine.engine import Array, Graph, scalar
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import adapter_key
from dlora.protocol.tensors import FloatArray

from .kind import Factors, GroupAdapters, LoadGraph, Parameter


@dataclass
class LoraModule:
    """The LoRA of one target module: ``delta = scaling * x A^T B^T``, which is added times the module's gain.

    Attributes:
        lora_A: (rank, in_features); lora_B: (out_features, rank), as PEFT has them.
    """

    name: str
    lora_A: Parameter
    lora_B: Parameter

    @property
    def graph_key(self) -> str:
        return adapter_key(self.lora_A.value.shape[1], self.lora_B.value.shape[0])


class LoraGroup(GroupAdapters):
    """The LoRAs of an exchange group, which share their input."""

    def __init__(self, modules: Sequence[LoraModule], scaling: float) -> None:
        super().__init__(modules[0].name)
        self.modules = tuple(modules)
        self.scaling = scaling
        self._graphs: list[tuple[Graph, Graph, Graph]] = []

    def parameters(self) -> dict[str, Parameter]:
        named: dict[str, Parameter] = {}
        for module in self.modules:
            named[f"{module.name}.lora_A"] = module.lora_A
            named[f"{module.name}.lora_B"] = module.lora_B
        return named

    def load_graphs(self, load: LoadGraph) -> None:
        self._graphs = [
            (
                load("adapter_forward", module.graph_key),
                load("adapter_input_grad", module.graph_key),
                load("adapter_weight_grad", module.graph_key),
            )
            for module in self.modules
        ]

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
        total: FloatArray | None = None
        all_dz = []
        for module, (_, graph, _), grad in zip(self.modules, self._graphs, grads, strict=True):
            weights = {"lora_A": module.lora_A.value, "lora_B": module.lora_B.value}
            dz, grad_x = graph({"grad": grad, **weights, "scale": scalar(self.scaling * scale)})
            all_dz.append(dz)
            total = grad_x if total is None else total + grad_x
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
            found[f"{module.name}.lora_A"], found[f"{module.name}.lora_B"] = graph(
                {
                    "x": x,
                    "z": forward[index],
                    "grad": grads[index],
                    "dz": backward[index],
                    "scale": scalar(self.scaling * scale),
                }
            )
        return found

    def given_to_server(self) -> list[FloatArray]:
        pairs = ((module.lora_A.value, module.lora_B.value * np.float32(self.scaling)) for module in self.modules)
        return [matrix for pair in pairs for matrix in pair]

    def factors(self) -> list[Factors]:
        return [Factors(m.name, m.lora_A.value, m.lora_B.with_gain, self.scaling) for m in self.modules]

    def scored_by_gradient(self) -> list[str]:
        return [f"{module.name}.lora_B" for module in self.modules]

    def load_factors(self, factors: Mapping[str, Factors]) -> None:
        for module in self.modules:
            saved = factors.get(module.name)
            if saved is None:
                continue
            rank = saved.lora_A.shape[0]
            if rank != module.lora_A.value.shape[0]:
                raise CheckpointError(f"the adapter's {module.name} has rank {rank}; train with --rank {rank}")
            # A saved scaling other than this run's is folded into B, and the module's gain taken out of it.
            ratio = saved.scaling / (self.scaling * module.lora_B.gain)
            module.lora_A.value = saved.lora_A
            module.lora_B.value = saved.lora_B if ratio == 1.0 else saved.lora_B * np.float32(ratio)


class Lora:
    """Makes LoRAs as PEFT starts them: A uniform in ±1/sqrt(in_features) (Kaiming, a = sqrt 5), B zero."""

    def create(
        self, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator
    ) -> GroupAdapters:
        bound = group.in_features**-0.5
        return LoraGroup(
            [
                LoraModule(
                    target.name,
                    Parameter.of(random.uniform(-bound, bound, (spec.r, group.in_features)).astype(np.float32)),
                    Parameter.of(np.zeros((target.out_features, spec.r), np.float32), target.gain),
                )
                for target in group.targets
            ],
            scaling,
        )

    def draw_state(self, spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        return ()
