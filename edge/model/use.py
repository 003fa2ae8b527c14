"""An adapter as it was saved, for a server that runs all blocks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dlora.edge.adapters.compatibility import check_adapter, load_weights, passes_to_use, with_saved_gains
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import without_gains
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import Passes
from dlora.protocol.targets import groups_of


class UsedAdapters(NamedTuple):
    """Adapters, the tokens from which on they act, none: everywhere, and how they are asked; None: live."""

    adapters: AdapterSet
    invocation: tuple[int, ...] = ()
    passes: Passes | None = None


def load_adapters(manifest: Manifest, adapter: Path | None, passes: str) -> UsedAdapters:
    """The adapters of a directory, or none. Keeps nothing else of what it read.

    ``passes``: as ``passes_to_use`` takes it. Raises ``CheckpointError`` and ``ModelMismatchError``.
    """
    loaded = load_adapter(adapter) if adapter else None
    if loaded is not None:
        check_adapter(manifest, loaded)
    groups = without_gains(groups_of(manifest, loaded.modules)) if loaded else ()
    if loaded and loaded.parts:
        spec, scaling = AdapterSpec(loaded.parts.kind, loaded.parts.r), loaded.parts.scaling
        groups = with_saved_gains(groups, spec.kind, loaded)
    else:
        rank = next(iter(loaded.modules.values())).lora_A.shape[0] if loaded else manifest.defaults.r
        spec, scaling = AdapterSpec(r=rank), manifest.defaults.lora_alpha / rank
    adapters = AdapterSet.create(spec, groups, scaling=scaling, seed=(0,), unit="group", kill_every=1)
    if loaded is None:
        return UsedAdapters(adapters)
    load_weights(adapters, loaded, loaded.invocation)
    return UsedAdapters(adapters, loaded.invocation, passes_to_use(loaded, passes))
