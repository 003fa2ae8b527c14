"""Time of every graph of a bundle on every engine that is here, at the sizes of a training step; JSON on stdout.

    python benchmarks/engines.py --bundle build/smollm2 --threads 1

Engines take turns, so that what else the machine does hits all of them; a time is the median of their repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from dlora.edge.bundle import Bundle
from dlora.edge.engine import Array
from dlora.edge.engines import make_engine, usable_engines
from dlora.protocol.manifest import GraphSpec, Manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    engines = [make_engine(bundle, name, options.threads) for name in usable_engines(bundle)]
    sizes = {"tokens": options.tokens, "rank": options.rank, "rows": options.rows}
    results = []
    for spec in bundle.manifest.graphs:
        inputs = make_inputs(bundle, spec, sizes)
        graphs = [engine.load(spec.kind, spec.key) for engine in engines]
        times: list[list[float]] = [[] for _ in graphs]
        for turn in range(options.repeat + 1):
            for graph, kept in zip(graphs, times, strict=True):
                started = time.perf_counter()
                graph(inputs)
                if turn:  # the first call pays for what is set up once
                    kept.append(time.perf_counter() - started)
        ms = {engine.name: round(statistics.median(kept) * 1e3, 3) for engine, kept in zip(engines, times, strict=True)}
        row: dict[str, Any] = {"graph": spec.kind, "key": spec.key, "ms": ms}
        if len(ms) == 2:
            row["ratio"] = round(ms["executorch"] / ms["onnx"], 2)
        results.append(row)
    print(json.dumps({"bundle": str(bundle.path), **vars(options) | {"bundle": str(bundle.path)}, "graphs": results}))


def make_inputs(bundle: Bundle, spec: GraphSpec, sizes: dict[str, int]) -> dict[str, Array]:
    """Random inputs of a step's sizes; weights are the bundle's. AdamW's are of one adapter half."""
    random = np.random.default_rng(0)
    manifest: Manifest = bundle.manifest
    weights = {
        "weight": manifest.embedding.weight if spec.kind == "embedding" else manifest.head.weight,
        "row_scales": manifest.head.row_scales,
        "bias": manifest.head.bias,
    }
    sizes = {**sizes, "n": sizes["rank"] * manifest.base_model.hidden_size}
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if file := weights.get(tensor.name):
            inputs[tensor.name] = bundle.weight(file)
        elif tensor.dtype == "int64":
            inputs[tensor.name] = random.integers(0, manifest.base_model.vocabulary_size, shape)
        else:
            inputs[tensor.name] = np.array(random.random(shape), np.float32)
    return inputs


if __name__ == "__main__":
    main()
