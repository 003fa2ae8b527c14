"""Runs in ``trunk``: a trainer, its cache, and a server that it asks when something is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from serving import config

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cached_source import CachedSource, texts_of
from dlora.edge.model.encoding_server import EncodingServer
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection

ROOM = 1 << 30


def trunk_config(blocks: tuple[int, ...], **changes: Any) -> Resolved:
    """A short run of LoRA on all linear modules of these blocks, the device's."""
    settings = {"device_blocks": len(blocks), "blocks": blocks, "target_modules": ("all-linear",)}
    return config(**{**settings, **changes})


@contextmanager
def trunk_training(
    bundle: Path,
    url: str,
    run: Resolved,
    dataset: Dataset,
    cache: Path,
    *,
    limit: int = ROOM,
    engine: Any = "onnx",
    fill: bool = True,
    connecting: ConnectSettings | None = None,
    warnings: list[str] | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """A device's trainer, its cache filled with all that the data have."""
    opened = Bundle.open(bundle)
    runs = make_engine(opened, engine, 1)
    manifest = opened.manifest
    blocks = manifest.base_model.blocks - run.device_blocks
    owner = CacheOwner.of(manifest, blocks, encoded_width(manifest), run.codecs, run.server.send)
    kept = TrunkCache(cache, owner, limit=limit, warn=[].append if warnings is None else warnings.append)
    server = EncodingServer(
        opened, runs, lambda: Connection(url, connecting), blocks=blocks, codecs=run.codecs, send=run.server.send
    )
    source = CachedSource(opened, runs, kept, server, codecs=run.codecs, send=run.server.send)
    try:
        trainer = Trainer(opened, runs, partial(DeviceSide, source=source), run, dataset, **settings)
        if fill:
            source.fill(texts_of(dataset))
        yield trainer
    finally:
        source.close()
