"""Where the parts of a model are: its blocks on several GPUs, and what they have no room for in memory or on disk.

accelerate moves a module's inputs to where it is, and brings weights that are on disk for as long as the module runs.
Whoever reads a weight itself reads it here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a worker of a tensor-parallel server has no model, and is not to load what loads them
    from transformers import PreTrainedModel

DeviceMap = Mapping[str, str | int]
"""By the path of a module: a GPU's number, ``cpu`` or ``disk``, as accelerate has it."""


def place(model: PreTrainedModel, device_map: DeviceMap | None = None) -> None:
    """Put the parts of a model where ``device_map`` says, a map of all of it; None: as accelerate balances them.

    What goes to disk is written into a folder that is gone when the process ends.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(model, "_no_split_modules", None) or [])
    if device_map is None:
        most = get_balanced_memory(model, no_split_module_classes=whole)
        device_map = infer_auto_device_map(model, most, no_split_module_classes=whole)
    folder = None
    if "disk" in device_map.values():
        folder = tempfile.TemporaryDirectory(prefix="dlora-offloaded-")
        model._dlora_offloaded = folder  # type: ignore[assignment]  # it is removed with the model
    dispatch_model(model, dict(device_map), offload_dir=None if folder is None else folder.name)


def placed_on(model: PreTrainedModel) -> dict[str, int]:
    """How many modules of the map of ``place`` are on each device; none where a model is on one."""
    found: dict[str, int] = {}
    for device in getattr(model, "hf_device_map", {}).values():
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        found[name] = found.get(name, 0) + 1
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(tensor.device for tensor in (*module.parameters(), *module.buffers()))


def parameter_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter's value, detached, also where it is on disk."""
    value = getattr(module, name)
    if not value.is_meta:
        return value.detach()  # type: ignore[no-any-return]
    from accelerate.utils import align_module_device  # who needs it has it loaded

    with align_module_device(module):
        found: Tensor = getattr(module, name).detach()
    return found
