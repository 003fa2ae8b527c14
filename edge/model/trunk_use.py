"""Opens a model to generate with in the mode ``trunk``: with an adapter that lies wholly in the device's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlora.edge.adapters.compatibility import check_base_model, check_fit
from dlora.edge.adapters.peft import LoadedAdapter, load_adapter
from dlora.edge.choices import EngineChoice, UseMode
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.memory import release_freed_memory
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import interrupts
from dlora.protocol.adapter_record import load_record
from dlora.protocol.choices import Send
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import Codecs

from .decode_blocks import DecodeBlocks
from .encoder import EncodeSession
from .trunk_generator import TrunkGenerator
from .trunk_source import encoded_width


@contextmanager
def open_trunk(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    wire_dtype: str,
    context_length: int,
    send: Send = "embeddings",
    threads: int = 0,
    engine: EngineChoice = "auto",
    connecting: ConnectSettings | None = None,
) -> Iterator[TrunkGenerator]:
    """A model whose last blocks run here: as few as hold the adapter, and one for the plain base model.

    ``context_length``: for how many tokens the server is to keep keys and values of its blocks.

    Raises ``UsageError`` for an adapter that reaches further down than the blocks that can run here, and for a server
    that keeps no context, and ``BundleError`` for a bundle without blocks that can go on from earlier tokens.
    """
    manifest = bundle.manifest
    loaded = load_adapter(adapter) if adapter else None
    if loaded is not None:
        check_fit(manifest, loaded)
    count = blocks_needed(manifest, loaded)
    lora, rank = ({}, 1) if loaded is None else _lora_of(loaded)
    invocation = () if loaded is None else loaded.invocation
    del loaded
    release_freed_memory()  # its files were read whole
    runs, codecs = make_engine(bundle, engine, threads), Codecs.parse(wire_dtype)
    blocks = DecodeBlocks(bundle, runs, count, rank=rank, lora=lora, scaling=1.0)
    with interrupts.raise_on_signal(), Connection(server, connecting) as connection:
        check_base_model(bundle, connection.welcome)
        if not connection.welcome.max_context_length:
            raise UsageError("the server keeps no context of this model, which the mode trunk needs; use --mode split")
        session = EncodeSession(
            connection,
            codecs,
            blocks=blocks.first,
            width=encoded_width(manifest),
            base_fingerprint=manifest.base_model.fingerprint,
            context_length=min(context_length, blocks.limit),
        )
        session.open()
        yield TrunkGenerator(bundle, runs, session, blocks, codecs, invocation=invocation, send=send)


def trained_mode(adapter: Path | None) -> UseMode:
    """The mode in which an adapter was trained, as its record says; ``split`` where that says nothing.

    Raises ``CheckpointError`` for a record that is damaged.
    """
    record = None if adapter is None else load_record(adapter)
    if record is None or record.training is None:
        return "split"
    return "trunk" if record.training.recipe.get("mode") == "trunk" else "split"


def blocks_needed(manifest: Manifest, loaded: LoadedAdapter | None) -> int:
    """How many of the last blocks hold all of an adapter. Raises ``UsageError`` and ``BundleError``."""
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    block_of = {target.name: group.block for group in manifest.groups for target in group.targets}
    lowest = last - 1 if loaded is None else min(block_of[name] for name in loaded.modules)
    if lowest < 1:
        raise UsageError("the adapter reaches down to block 0, which the server runs; use --mode split")
    has, count = 0 if spec is None else len(spec.blocks), last - lowest
    if count > has:
        what = f"has {has} blocks for a device, and the adapter reaches down to block {lowest}"
        advice = f"export it again with --device-blocks {count}, or use --mode split"
        raise BundleError(f"the bundle {what if loaded else 'has no blocks for a device'}; {advice}")
    return count


def _lora_of(loaded: LoadedAdapter) -> tuple[dict[str, FloatArray], int]:
    """An adapter's LoRA, by the names of ``BlockWeights.zeros``, and its rank, the largest of any module: those of a
    smaller one get zeros. What they are multiplied by is in ``lora_B``."""
    rank = max(module.lora_A.shape[0] for module in loaded.modules.values())
    lora = {}
    for name, module in loaded.modules.items():
        more = rank - module.lora_A.shape[0]
        lora[f"{name}.lora_A"] = np.pad(module.lora_A, ((0, more), (0, 0)))
        lora[f"{name}.lora_B"] = np.pad(module.lora_B * np.float32(loaded.scaling[name]), ((0, 0), (0, more)))
    return lora, rank
