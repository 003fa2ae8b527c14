"""A saved adapter as blocks on the device take it: plain LoRA, whatever it was trained as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlora.edge.adapters.compatibility import check_fit
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.memory import release_freed_memory
from dlora.protocol.adapter_record import TrainingRecord, load_record
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import without_gains
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import groups_of
from dlora.protocol.tensors import FloatArray
from dlora.protocol.text import one_line


@dataclass(frozen=True)
class DeviceLora:
    """The LoRA of an adapter, or none.

    Attributes:
        values: by the names of ``BlockWeights.zeros``; what they are multiplied by is in ``lora_B``.
        rank: the largest of any module; those of a smaller one are filled with zeros.
        invocation: the tokens from which on it acts; none: everywhere.
        lowest: the number of the lowest block that has any; None where none has.
    """

    values: dict[str, FloatArray] = field(default_factory=dict)
    rank: int = 1
    invocation: tuple[int, ...] = ()
    lowest: int | None = None

    @classmethod
    def load(cls, manifest: Manifest, adapter: Path | None) -> DeviceLora:
        """That of a directory; None: none. Raises ``CheckpointError`` and ``ModelMismatchError``."""
        if adapter is None:
            return cls()
        loaded = load_adapter(adapter)
        check_fit(manifest, loaded)
        block_of = {target.name: group.block for group in manifest.groups for target in group.targets}
        rank = max(module.lora_A.shape[0] for module in loaded.modules.values())
        values = {}
        for name, module in loaded.modules.items():
            more = rank - module.lora_A.shape[0]
            values[f"{name}.lora_A"] = np.pad(module.lora_A, ((0, more), (0, 0)))
            values[f"{name}.lora_B"] = np.pad(module.lora_B * np.float32(loaded.scaling[name]), ((0, 0), (0, more)))
        made = cls(values, rank, loaded.invocation, min(block_of[name] for name in loaded.modules))
        del loaded, module
        release_freed_memory()  # its files were read whole
        return made

    def adapters(self, manifest: Manifest) -> AdapterSet:
        """The same, as what is trained and evaluated takes it."""
        groups = without_gains(groups_of(manifest, {name.rpartition(".")[0] for name in self.values}))
        spec = AdapterSpec(r=self.rank)
        made = AdapterSet.create(spec, groups, scaling=1.0, seed=(0,), unit="group", kill_every=1)
        for name, parameter in made.parameters().items():
            parameter.value[...] = self.values[name]
        return made


def trained_device_blocks(adapter: Path | None) -> int:
    """How many blocks were on the device when an adapter was trained, as its record says; 0 where that says nothing.

    Raises ``CheckpointError`` for a record that is damaged.
    """
    training = _training(adapter)
    count = None if training is None else training.recipe.get("device_blocks")
    return count if isinstance(count, int) and count > 0 else 0


def other_storage_line(manifest: Manifest, adapter: Path | None) -> str | None:
    """What to say where an adapter was trained with blocks that are stored otherwise than the bundle's.

    Raises ``CheckpointError`` for a record that is damaged.
    """
    training, spec = _training(adapter), manifest.device_blocks
    trained = None if training is None else training.block_dtype
    if trained is None or spec is None or trained == spec.dtype:
        return None
    return (
        f"the adapter was trained with blocks stored as {one_line(trained)}, and the bundle's are {spec.dtype}: what "
        "it gives differs a little"
    )


def _training(adapter: Path | None) -> TrainingRecord | None:
    record = None if adapter is None else load_record(adapter)
    return None if record is None else record.training
