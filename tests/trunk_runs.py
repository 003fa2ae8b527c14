"""Runs in ``trunk``: a trainer, its cache, and a server that it asks when something is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from serving import config, randomize

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cached_source import CachedSource, texts_of
from dlora.edge.model.encoding_server import EncodingServer
from dlora.edge.model.kept_outputs_cache import kept_outputs_path
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection

ROOM = 1 << 30
Harm = Callable[[Path, Path], object]
HARMS: dict[str, Harm] = {
    "none is left": lambda kept, cache: kept.unlink(),
    "cut off": lambda kept, cache: kept.write_bytes(kept.read_bytes()[:-200]),
    "of other blocks": lambda kept, cache: kept.write_bytes(cache.read_bytes()),
}
"""What may have become of a file of what was kept, beside the cache of what a server gave."""


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


def losses_in_two_parts(
    bundle: Path, url: str, run: Resolved, dataset: Dataset, cache: Path, harm: Harm = lambda kept, cache: None
) -> bytes:
    """Of a run's steps, no parameter ever changed; ``harm`` is done to what was kept in the middle of it."""
    losses, half = [], run.total_steps // 2
    for steps in (range(half), range(half, run.total_steps)):
        with trunk_training(bundle, url, run, dataset, cache) as trainer:
            randomize(trainer)
            for step in steps:
                batches = trainer.batches.step_batches(step)
                losses += trainer.model.forward_backward(batches, step=step, grad_scale=1.0)
        if not steps.start:
            harm(kept_outputs_path(cache), cache)
    return b"".join(found.tobytes() for found in losses)
