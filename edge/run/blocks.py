"""Where a run's blocks are: what it is trained against, opened; and its caches on the disk, filled before the first
step and deleted with the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path

from dlora.edge.data.batches import Batches
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.files import remove_quietly
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.cached_source import CachedSource, texts_of
from dlora.edge.model.embedding_source import EmbeddingSource
from dlora.edge.model.encoding_server import EncodingServer
from dlora.edge.model.kept_outputs_cache import KeptOutputsCache
from dlora.edge.model.kept_reads import open_kept_reads
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide, MakeSide, ServerSide
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import CheckpointError, StoppedError

from .directory import CACHE, KEPT_OUTPUTS, KEPT_READS
from .display import Display
from .run_file import DataDigest, load_run_file


@dataclass(frozen=True)
class RunBlocks:
    """What a run is trained against.

    Attributes:
        cached: where hidden states come from that are kept, in a run that has such.
    """

    make_side: MakeSide
    cached: CachedSource | None = None


@contextmanager
def open_blocks(
    bundle: Bundle,
    engine: Engine,
    config: Resolved,
    out: Path,
    *,
    key: CacheKey | None,
    is_new: bool,
    connecting: ConnectSettings,
    warn: Callable[[str], None],
) -> Iterator[RunBlocks]:
    """Reach the blocks that are not here, or what goes into the first that is. What is kept of hidden states stays in
    ``out``, the run's directory.

    Args:
        key: what hidden states that are kept are encrypted with.
        is_new: whether the run begins, so that what another one left may go.

    Raises what ``Connection`` raises, ``BundleError``, ``CheckpointError`` and ``StorageError``.
    """
    server, limit = config.server.server, round((config.placement.cache_mb or 0.0) * 1e6)
    if not config.device_blocks:
        assert server is not None
        with ExitStack() as opened:
            connection = opened.enter_context(Connection(server, connecting))
            kept_reads = None
            if config.keeps_reads:
                groups, send = config.groups(bundle.manifest), config.server.send
                kept_reads = open_kept_reads(
                    out / KEPT_READS, bundle.manifest, config.spec, groups, config.codecs, send,
                    limit=limit, key=key, warn=warn,
                )  # fmt: skip
                opened.enter_context(closing(kept_reads))
            yield RunBlocks(partial(ServerSide, connection=connection, kept_reads=kept_reads))
        return
    manifest, codecs, send = bundle.manifest, config.codecs, config.server.send
    width, blocks = encoded_width(manifest), manifest.base_model.blocks - config.device_blocks
    if server is None:
        dtype = f"{manifest.embedding.dtype} on the device"
        owner = CacheOwner(
            base_model=manifest.base_model.fingerprint, blocks=0, width=width, embeddings=dtype, codec="fp32"
        )
        kept = KeptOutputsCache(out / KEPT_OUTPUTS, owner, bundle, engine, room=lambda: limit, key=key)
        with closing(EmbeddingSource(bundle, engine, kept)) as embeddings:
            yield RunBlocks(partial(DeviceSide, source=embeddings))
        return
    open_cache = partial(
        TrunkCache, out / CACHE, CacheOwner.of(manifest, blocks, width, codecs, send), limit=limit, key=key, warn=warn
    )
    try:
        cache = open_cache()
    except CheckpointError:
        if not is_new:
            raise
        remove_quietly(out / CACHE)
        cache = open_cache()
    connect = _connect_later(server, connecting)
    encoding = EncodingServer(bundle, engine, connect, blocks=blocks, codecs=codecs, send=send)
    source = CachedSource(bundle, engine, cache, encoding, codecs=codecs, send=send)
    try:
        yield RunBlocks(partial(DeviceSide, source=source), source)
    finally:
        is_empty = not len(cache)
        source.close()
        if is_empty:
            remove_quietly(out / CACHE)


def _connect_later(server: str, connecting: ConnectSettings) -> Callable[[], Connection]:
    """Once the run has begun, a server that is away is waited for."""
    retry = replace(connecting.retry, at_start=connecting.retry.at_start or connecting.retry.max_s != 0)
    tries = chain([connecting], repeat(replace(connecting, retry=retry)))
    return lambda: Connection(server, next(tries))


def fill_cache(
    source: CachedSource,
    batches: Batches,
    steps: range,
    datasets: Sequence[Dataset],
    display: Display,
    should_stop: Callable[[], bool],
) -> None:
    """Ask for all that the run needs from here on: of the first of ``datasets`` what its ``steps`` train on, all of the
    others.

    In the order of the data, not of the steps: what the server sees then says nothing of the run's seed, where all of
    the data are trained on. Raises what ``CachedSource.fill`` raises, and ``StoppedError``.
    """
    trained, *others = datasets
    indices: Sequence[int] = range(batches.examples)
    if len(steps) < batches.steps_per_epoch:
        indices = sorted({int(index) for step in steps for index in batches.step_indices(step)})
    texts = chain(texts_of(trained, indices), *(texts_of(each) for each in others))
    with display.asking_server(len(indices) + sum(map(len, others))) as advance:

        def on_progress(count: int) -> None:
            advance(count)
            if should_stop():
                raise StoppedError("stopped before the first step; go on with dlora-edge resume: what came is kept")

        if not source.fill(texts, on_progress):
            display.warn("--cache-mb is too little for all texts; the rest is asked for at each step that needs it")


def forget_other_texts(config: Resolved, dataset: Dataset, eval_dataset: Dataset | None = None) -> None:
    """Remove what was kept for a run that came to nothing, where this one would not make it again bit for bit: of other
    data, or of a part of them."""
    assert config.saving.out is not None
    remove_quietly(config.saving.out / KEPT_OUTPUTS)
    remove_quietly(config.saving.out / KEPT_READS)
    with suppress(CheckpointError):
        begun = load_run_file(config.saving.out)
        evaluated = None if eval_dataset is None else DataDigest.of(eval_dataset)
        is_whole = config.total_steps * config.examples_a_step >= len(dataset)
        if is_whole and (begun.data, begun.eval_data) == (DataDigest.of(dataset), evaluated):
            return
    remove_quietly(config.saving.out / CACHE)


def remove_caches(config: Resolved) -> None:
    """Of a run that is done."""
    assert config.saving.out is not None
    remove_quietly(config.saving.out / KEPT_OUTPUTS)
    remove_quietly(config.saving.out / KEPT_READS)
    if not config.placement.keep_cache:
        remove_quietly(config.saving.out / CACHE)
