"""Part of ``trunk.py``: what Kill and Revive saves of a step of blocks on the device."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
from children import log
from trunk_trainers import random_tokens, trunk_config, trunk_source

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.cached_source import texts_of
from dlora.edge.training.trainer import Trainer
from dlora.protocol.kill_revive import KillReviveConfig

BLOCKS: Final = 8
EXAMPLES: Final = 16
STEPS: Final = 20  # of four examples each


def measure_kills(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of a step in seconds, taking turns: all blocks trained, the upper half of them, and the same with what
    comes out of the lower half kept; the first epoch, which fills that, is left out."""
    bundle = Bundle.open(options.bundle)
    ids, first = random_tokens(bundle.manifest, options, EXAMPLES)
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, len(row) - 1))) for row in ids])
    upper = KillReviveConfig(score="static", static=tuple(range(BLOCKS // 2, BLOCKS)), on_kill="hold_forward")
    config = trunk_config(bundle.manifest, options, BLOCKS)
    cases = {
        "all": config,
        "upper_half": msgspec.structs.replace(config, kill_revive=upper),
        "upper_half_kept": msgspec.structs.replace(config, kill_revive=upper, holds_outputs=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        trainers = {}
        for name, settings in cases.items():
            engine = OnnxEngine(bundle, options.threads)
            source = trunk_source(bundle, engine, url, Path(directory) / name, BLOCKS)
            stack.callback(source.close)
            trainers[name] = Trainer(bundle, engine, source, settings, dataset)
            source.fill(texts_of(dataset))
        for step in range(STEPS):
            taken = {name: trainer.run_step().step_s for name, trainer in trainers.items()}
            if step >= EXAMPLES // options.batch_size:
                for name, each in taken.items():
                    seconds[name].append(each)
            log(f"step {step}: " + ", ".join(f"{name} {each:.3f} s" for name, each in taken.items()))
    return {"blocks": BLOCKS, "step_s": {name: statistics.median(each) for name, each in seconds.items()}}
