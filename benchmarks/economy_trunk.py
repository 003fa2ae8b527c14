"""Hidden states from the server, for blocks on the device in benchmarks: what it gives for a text is asked for once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from economy_data import Data
from economy_measure import Cost

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.files import write_atomically
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cached_source import CachedSource, texts_of
from dlora.edge.model.encoding_server import EncodingServer
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connection import Connection

_LIMIT: Final = 1 << 33  # bytes of a file


def new_source(bundle: Bundle, engine: Engine, url: str, config: Resolved, file: Path) -> CachedSource:
    """For a device with the blocks that ``config`` has there; what ``file`` has is not asked for again."""
    blocks, width = bundle.manifest.base_model.blocks - config.device_blocks, encoded_width(bundle.manifest)
    owner = CacheOwner.of(bundle.manifest, blocks, width, config.codecs, config.server.send)
    server = EncodingServer(bundle, engine, lambda: Connection(url), blocks=blocks, codecs=config.codecs)
    return CachedSource(bundle, engine, TrunkCache(file, owner, limit=_LIMIT), server, codecs=config.codecs)


@contextmanager
def open_source(
    bundle: Bundle, engine: Engine, url: str, config: Resolved, data: Data, file: Path
) -> Iterator[tuple[CachedSource, Cost]]:
    """Hidden states of all texts of ``data``, and what those cost that are trained on.

    ``file``: where they are kept, with that cost beside it; what another run has left there is used.
    """
    beside = file.with_suffix(".json")
    if not beside.exists():
        file.unlink(missing_ok=True)  # one that was not finished: what it cost is not known
    file.parent.mkdir(parents=True, exist_ok=True)
    source = new_source(bundle, engine, url, config, file)
    try:
        before = Cost.now(None)
        if not beside.exists():
            source.fill(texts_of(data.train))
            cost = Cost(*source.crossed.counters, *Cost.now(None)[3:]).plus(before, -1)
            source.fill(texts_of(data.validation))
            source.fill(texts_of(data.test))
            write_atomically(beside, json.dumps(cost).encode())
        yield source, Cost(*json.loads(beside.read_text()))
    finally:
        source.close()
