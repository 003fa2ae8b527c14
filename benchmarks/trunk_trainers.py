"""What the parts of ``trunk.py`` train with: random texts, where their hidden states come from, and settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.model.trunk_source import TrunkSource, encoded_width
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.wire.connection import Connection
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import Codecs

LR: Final = 2e-3


def random_tokens(manifest: Manifest, options: argparse.Namespace, count: int) -> tuple[Any, int]:
    """Sequences of one length, (count, length), and where the labels of each begin."""
    length = options.tokens // options.batch_size
    ids = np.random.default_rng(0).integers(0, manifest.base_model.vocabulary_size, (count, length))
    return ids, round(length * (1 - options.labelled))


def trunk_source(bundle: Bundle, engine: Engine, url: str, cache: Path, count: int) -> TrunkSource:
    """For a device with the last ``count`` blocks; nothing is kept yet."""
    manifest, codecs = bundle.manifest, Codecs.all("fp16")
    blocks = manifest.base_model.blocks - count
    owner = CacheOwner.of(manifest, blocks, encoded_width(manifest), codecs, "embeddings")
    kept = TrunkCache(cache, owner, limit=1 << 32)
    return TrunkSource(bundle, engine, kept, blocks=blocks, codecs=codecs, connect=lambda: Connection(url))


def trunk_config(manifest: Manifest, options: argparse.Namespace, count: int) -> TrainConfig:
    """LoRA of rank 8 on all linear modules of the last ``count`` blocks."""
    last = manifest.base_model.blocks
    return TrainConfig(
        **common_settings(options),
        mode="trunk",
        device_blocks=count,
        rank=8,
        target_modules=("all-linear",),
        blocks=tuple(range(last - count, last)),
    )


def split_config(options: argparse.Namespace) -> TrainConfig:
    """LoRA of rank 8 on q and v of all blocks, which run on the server."""
    return TrainConfig(**common_settings(options), rank=8, target_modules=("q_proj", "v_proj"))


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What both have."""
    return {
        "total_steps": 1000,
        "batch_size": options.batch_size,
        "grad_accum": 1,
        "seed": (0,),
        "kind": "lora",
        "lora_alpha": 16.0,
        "wire_dtype": "fp16",
        "optimizer": OptimizerConfig(lr=LR),
        "kill_revive": KillReviveConfig(active_fraction=1.0),
    }
