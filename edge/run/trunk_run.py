"""A run with blocks on the device: its caches on the disk, filled before the first step and deleted with the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

from dlora.edge.data.batches import Batches
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.files import remove_quietly
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.held_cache import HeldCache
from dlora.edge.model.local_source import LocalSource
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.model.trunk_source import TrunkSource, encoded_width, texts_of
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import CheckpointError, StoppedError

from .directory import CACHE, HELD_CACHE
from .display import Display


@contextmanager
def open_local_source(
    bundle: Bundle, engine: Engine, out: Path, *, cache_mb: float, key: CacheKey | None
) -> Iterator[LocalSource]:
    """What goes into block 0, in the mode ``local``; what is kept of killed blocks stays in the run's directory.

    Raises what ``LocalSource`` raises.
    """
    manifest = bundle.manifest
    owner = CacheOwner(
        base_model=manifest.base_model.fingerprint,
        blocks=0,
        width=encoded_width(manifest),
        embeddings=f"{manifest.embedding.dtype} on the device",
        codec="fp32",
    )
    limit = round(cache_mb * 1e6)
    held = HeldCache(out / HELD_CACHE, owner, bundle, engine, room=lambda: limit, key=key)
    with closing(LocalSource(bundle, engine, held)) as source:
        yield source


@contextmanager
def open_source(
    bundle: Bundle,
    engine: Engine,
    config: Resolved,
    out: Path,
    *,
    cache_mb: float,
    key: CacheKey | None,
    is_new: bool,
    connect: Callable[[], Connection],
    warn: Callable[[str], None],
) -> Iterator[TrunkSource]:
    """What the run's hidden states come from; its cache stays in the run's directory.

    Args:
        key: what the cache is encrypted with.
        is_new: whether the run begins, so that what another one left may go.

    Raises ``CheckpointError`` and ``StorageError``.
    """
    blocks = bundle.manifest.base_model.blocks - config.device_blocks
    width = encoded_width(bundle.manifest)
    owner = CacheOwner.of(bundle.manifest, blocks, width, config.codecs, config.server.send)
    limit = round(cache_mb * 1e6)
    try:
        cache = TrunkCache(out / CACHE, owner, limit=limit, key=key, warn=warn)
    except CheckpointError:
        if not is_new:
            raise
        remove_quietly(out / CACHE)
        cache = TrunkCache(out / CACHE, owner, limit=limit, key=key, warn=warn)
    source = TrunkSource(
        bundle, engine, cache, blocks=blocks, codecs=config.codecs, connect=connect, send=config.server.send
    )  # fmt: skip
    try:
        yield source
    finally:
        is_empty = not len(cache)
        source.close()
        if is_empty:
            remove_quietly(out / CACHE)


def fill_cache(
    source: TrunkSource,
    batches: Batches,
    steps: range,
    datasets: Sequence[Dataset],
    display: Display,
    should_stop: Callable[[], bool],
) -> None:
    """Ask for all that the run needs from here on: of the first of ``datasets`` what its ``steps`` train on, all of the
    others.

    In the order of the data, not of the steps: what the server sees then says nothing of the run's seed, where all of
    the data are trained on. Raises what ``TrunkSource.fill`` raises, and ``StoppedError``.
    """
    trained, *others = datasets
    indices = _needed(batches, steps)
    texts = chain(texts_of(trained, indices), *(texts_of(each) for each in others))
    with display.asking_server(len(indices) + sum(map(len, others))) as advance:

        def on_progress(count: int) -> None:
            advance(count)
            if should_stop():
                raise StoppedError("stopped before the first step; go on with dlora-edge resume: what came is kept")

        if not source.fill(texts, on_progress):
            display.warn("--cache-mb is too little for all texts; the rest is asked for at each step that needs it")


def _needed(batches: Batches, steps: range) -> Sequence[int]:
    """The examples that ``steps`` train on, in the order of the data."""
    if len(steps) >= batches.steps_per_epoch:
        return range(batches.examples)
    return sorted({int(index) for step in steps for index in batches.step_indices(step)})
