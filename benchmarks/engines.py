"""Time of every graph of a bundle on every engine that is here, at the sizes of a training step; JSON on stdout.

    python benchmarks/engines.py --bundle build/smollm2 --threads 1

Engines take turns, so that what else the machine does hits all of them. A time is the median of the repetitions:
``ms`` by the clock, ``cpu_ms`` of the processor, all threads together, which other programs do not stretch as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine, usable_engines
from dlora.edge.engine.engine import Array
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
        times: list[list[tuple[float, float]]] = [[] for _ in graphs]
        for turn in range(options.repeat + 1):
            for graph, kept in zip(graphs, times, strict=True):
                started = time.perf_counter(), time.process_time()
                graph(inputs)
                if turn:  # the first call pays for what is set up once
                    kept.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        row: dict[str, Any] = {"graph": spec.kind, "key": spec.key}
        for place, name in enumerate(("ms", "cpu_ms")):
            found = [round(statistics.median(each[place] for each in kept) * 1e3, 3) for kept in times]
            row[name] = dict(zip([engine.name for engine in engines], found, strict=True))
            if len(found) == 2:
                row[name]["ratio"] = round(row[name]["executorch"] / row[name]["onnx"], 2)
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
