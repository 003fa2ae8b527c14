"""A child of device.py: how long each graph of a bundle takes, against plain BLAS products of the same FLOPs.

numpy's OpenBLAS and the engine are given the same number of threads, OpenBLAS by its environment. They take turns: some
calls of the graph, a pause, some of BLAS, a pause. Without the pauses OpenBLAS's threads, which spin for a while after
each product, would be in the way of the graph. Prints one JSON list.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from children import log

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine, usable_engines
from dlora.edge.engine.engine import Engine, scalar
from dlora.protocol.manifest import GraphSpec, TensorSpec

Array = npt.NDArray[Any]

PAUSE_S = 0.05
BLOCK_S = 0.03


def main() -> None:
    """Time every graph on every engine that the bundle has graphs for and that loads here."""
    options = _options()
    bundle = Bundle.open(options.bundle)
    found = []
    for name in usable_engines(bundle):
        engine = make_engine(bundle, name, options.threads)
        for spec in bundle.manifest.graphs:
            sizes = {
                "tokens": options.tokens,
                "rank": options.rank,
                "n": options.rank * bundle.manifest.base_model.hidden_size,
            }
            sizes["rows"] = 1 if spec.kind == "head_logits" else bundle.manifest.head.rows
            row = _measure(engine, bundle, spec, sizes, options.rounds)
            found.append({"engine": name, "threads": options.threads, **row})
            log(f"{name}, {options.threads} threads: {row}")
    print(json.dumps(found))


def _measure(engine: Engine, bundle: Bundle, spec: GraphSpec, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    graph = engine.load(spec.kind, spec.key)
    random = np.random.default_rng(0)
    inputs = {tensor.name: _input(bundle, spec, tensor, sizes, random) for tensor in spec.inputs}
    products = _products(spec, sizes)
    factors = [(_floats(random, m, k), _floats(random, k, n)) for m, k, n in products]

    def blas() -> None:
        for a, b in factors:
            a @ b

    graph_s, blas_s = [], []
    for _ in range(rounds):
        graph_s.append(_block(lambda: graph(inputs)))
        if factors:
            blas_s.append(_block(blas))
    row: dict[str, Any] = {"graph": spec.kind, "key": spec.key, "ms": round(statistics.median(graph_s) * 1e3, 4)}
    if factors:
        row["mflop"] = round(sum(2 * m * k * n for m, k, n in products) / 1e6, 3)
        row["blas_ms"] = round(statistics.median(blas_s) * 1e3, 4)
        # Of each round, then the median: both halves of a round saw the same machine.
        row["ratio"] = round(statistics.median(a / b for a, b in zip(graph_s, blas_s, strict=True)), 3)
    return row


def _block(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, the median of a few."""
    time.sleep(PAUSE_S)
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < BLOCK_S:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _products(spec: GraphSpec, sizes: dict[str, int]) -> list[tuple[int, int, int]]:
    """The matrix products that the graph's formula has in docs/reference/bundle.md, (m, k) by (k, n); none for the
    others."""
    shapes = {tensor.name: _shape(tensor, sizes) for tensor in (*spec.inputs, *spec.outputs)}
    if spec.kind.startswith("adapter_"):
        tokens, rank = sizes["tokens"], sizes["rank"]
        in_features, out_features = (int(width) for width in spec.key.split("x"))
        if spec.kind == "adapter_forward":
            return [(tokens, in_features, rank), (tokens, rank, out_features)]
        if spec.kind == "adapter_input_grad":
            return [(tokens, out_features, rank), (tokens, rank, in_features)]
        return [(rank, tokens, in_features), (out_features, tokens, rank)]
    if spec.kind.startswith("head_"):
        (rows, hidden), (vocabulary, _) = shapes["hidden_states"], shapes["weight"]
        forward, backward = (rows, hidden, vocabulary), (rows, vocabulary, hidden)
        return [forward, backward] if spec.kind == "head_train" else [forward]
    return []


def _input(
    bundle: Bundle, spec: GraphSpec, tensor: TensorSpec, sizes: dict[str, int], random: np.random.Generator
) -> Array:
    head, shape = bundle.manifest.head, _shape(tensor, sizes)
    files = {"weight": head.weight, "row_scales": head.row_scales, "bias": head.bias}
    if spec.kind == "embedding" and tensor.name == "weight":
        return bundle.weight(bundle.manifest.embedding.weight)
    if spec.kind.startswith("head_") and (file := files.get(tensor.name)) is not None:
        return bundle.weight(file)
    if tensor.dtype == "int64":
        return random.integers(0, bundle.manifest.base_model.vocabulary_size, shape)
    return _floats(random, *shape) if shape else scalar(0.5)


def _shape(tensor: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _floats(random: np.random.Generator, *shape: int) -> Array:
    # Positive: AdamW takes a root of one of them.
    return random.random(shape, np.float32) + np.float32(0.1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
