"""Part of ``trunk.py``: what blocks on the device take by how their weights are stored, and what that costs."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from children import need_bundle

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.files import write_atomically
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.blocks import DeviceBlocks

FILE: Final = Path("benchmarks") / "trunk-storage.json"  # in docs
ROUNDS: Final = 15
RANK: Final = 8


def measure_storage(_url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward and a backward pass, medians; the ways to store take turns. No head, and no optimizer."""
    lengths = np.full(options.batch_size, options.tokens // options.batch_size, np.int32)
    blocks, seconds = {}, dict[str, list[float]]()
    for dtype, path in options.bundles.items():
        bundle = Bundle.open(need_bundle(path))
        blocks[dtype] = DeviceBlocks(bundle, OnnxEngine(bundle, options.threads), options.blocks, RANK)
    for turn in range(ROUNDS + 1):
        for dtype, each in blocks.items():
            random = np.random.default_rng(0)
            shapes = each.parameter_shapes
            lora = {name: random.standard_normal(shape, np.float32) * 0.01 for name, shape in shapes.items()}
            x = random.standard_normal((int(lengths.sum()), encoded_width(bundle.manifest)), np.float32)
            started = time.perf_counter()
            y, kept = each.forward(x, lengths, np.arange(len(x)), lora, 2.0)
            each.backward(y, kept, lora, 2.0)
            if turn:
                seconds.setdefault(dtype, []).append(time.perf_counter() - started)
    return {dtype: round(statistics.median(each), 4) for dtype, each in seconds.items()}


def write_storage(docs: Path, result: dict[str, Any]) -> None:
    """Keep what was found of each way: seconds of a pass, memory, and losses on the device and in PEFT."""
    path = docs / FILE
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for dtype in ("fp32", "fp16", "int8", "int4"):
        entry = kept.setdefault(dtype, {})
        for part, name in (("storage", "pass_s"), ("memory", "peak_rss_mb"), ("losses", "losses")):
            if dtype in result.get(part, {}):
                entry[name] = result[part][dtype]
    write_atomically(path, (json.dumps(kept, indent=1) + "\n").encode())
