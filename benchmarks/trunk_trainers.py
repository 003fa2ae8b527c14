"""What the parts of ``trunk.py`` train with: random texts, where their hidden states come from, and settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cached_source import CachedSource
from dlora.edge.model.encoding_server import EncodingServer
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.settings import Settings
from dlora.edge.training.resolve import resolve_without_data
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connection import Connection
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import Codecs

LR: Final = 2e-3


def random_tokens(manifest: Manifest, options: argparse.Namespace, count: int) -> tuple[Any, int]:
    """Sequences of one length, (count, length), and where the labels of each begin."""
    length = options.tokens // options.batch_size
    ids = np.random.default_rng(0).integers(0, manifest.base_model.vocabulary_size, (count, length))
    return ids, round(length * (1 - options.labelled))


def trunk_source(bundle: Bundle, engine: Engine, url: str, cache: Path, count: int) -> CachedSource:
    """For a device with the last ``count`` blocks; nothing is kept yet."""
    manifest, codecs = bundle.manifest, Codecs.all("fp16")
    blocks = manifest.base_model.blocks - count
    owner = CacheOwner.of(manifest, blocks, encoded_width(manifest), codecs, "embeddings")
    kept = TrunkCache(cache, owner, limit=1 << 32)
    server = EncodingServer(bundle, engine, lambda: Connection(url), blocks=blocks, codecs=codecs)
    return CachedSource(bundle, engine, kept, server, codecs=codecs)


def trunk_config(manifest: Manifest, options: argparse.Namespace, count: int) -> Resolved:
    """LoRA of rank 8 on all linear modules of the last ``count`` blocks."""
    return _config(manifest, options, device_blocks=str(count), target_modules="all-linear")


def split_config(manifest: Manifest, options: argparse.Namespace) -> Resolved:
    """LoRA of rank 8 on q and v of all blocks, which run on the server."""
    return _config(manifest, options, target_modules="q_proj,v_proj")


def _config(manifest: Manifest, options: argparse.Namespace, **more: Any) -> Resolved:
    settings = Settings.of(
        kind="lora", rank=8, alpha=16.0, lr=LR, schedule="constant", warmup=0.0, seed=0, steps=1000,
        batch_size=options.batch_size, server="ws://a-server", **more,
    )  # fmt: skip
    return resolve_without_data(settings, manifest, None)
