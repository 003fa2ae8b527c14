"""Using an adapter with all blocks on the device: an open model, to evaluate with, and no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlora.edge.choices import EngineChoice
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.protocol import interrupts

from .decode_blocks import DecodeBlocks
from .device_lora import DeviceLora, lora_to_evaluate
from .local_generator import LocalGenerator
from .local_source import LocalSource
from .trunk import TrunkModel


@contextmanager
def open_local(
    bundle: Bundle, adapter: Path | None, *, longest: int, threads: int = 0, engine: EngineChoice = "auto"
) -> Iterator[TrunkModel]:
    """A model with a saved adapter, or none, all of whose blocks run here.

    ``longest``: tokens of the longest text that it will be given.

    Raises ``BundleError`` where the bundle has not all of them, ``UsageError`` for an adapter that blocks on a device
    cannot have, ``DataError`` for texts that are too long, and what loading an adapter raises.
    """
    adapters = lora_to_evaluate(bundle.manifest, adapter).adapters(bundle.manifest)
    loaded = make_engine(bundle, engine, threads)
    with interrupts.raise_on_signal():
        source = LocalSource(bundle, loaded)
        model = TrunkModel(bundle, loaded, adapters, bundle.manifest.base_model.blocks, source)
        model.check_fits(longest)
        yield model


@contextmanager
def open_local_generator(
    bundle: Bundle, adapter: Path | None, *, context_length: int, threads: int = 0, engine: EngineChoice = "auto"
) -> Iterator[LocalGenerator]:
    """A model to generate with, with a saved adapter of any kind or none, all of whose blocks run here.

    ``context_length``: the most tokens of a text, or fewer where the bundle has no tables for as many.

    Raises ``BundleError`` where the bundle has not all of them, or none that go on from earlier tokens, and what
    loading an adapter raises.
    """
    lora = DeviceLora.load(bundle.manifest, adapter)
    loaded = make_engine(bundle, engine, threads)
    with interrupts.raise_on_signal():
        blocks = DecodeBlocks(bundle, loaded, bundle.manifest.base_model.blocks, lora)
        yield LocalGenerator(bundle, loaded, blocks, context_length=context_length, invocation=lora.invocation)
