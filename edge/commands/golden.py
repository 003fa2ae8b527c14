"""Golden vectors: do this device's engines compute what torch computed at export, and how fast?"""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

from dlora.edge.choices import EngineName
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine, usable_engines
from dlora.edge.engine.engine import OF_BLOCKS, Array, Graph
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphSpec

REPEATS = 5


def run_selftest(bundle: Bundle, threads: int = 0, engine: EngineName | Literal["all"] = "all") -> dict[str, Any]:
    """Run every graph on its golden inputs, on one engine or on every one that bundle and device have.

    Errors are relative to the largest magnitude of the golden output, as at export. A graph passes within twice
    its export tolerance: another processor rounds otherwise.
    """
    names = [engine] if engine != "all" else usable_engines(bundle)
    engines = [make_engine(bundle, name, threads) for name in names] or [make_engine(bundle, "auto", threads)]
    golden = load_file(bundle.golden_file())
    results = []
    for spec in bundle.manifest.graphs:
        inputs = {tensor.name: _input(bundle, golden, spec, tensor.name) for tensor in spec.inputs}
        keys = [_key(spec, "out", tensor.name) for tensor in spec.outputs]
        if missing := [key for key in keys if key not in golden]:
            raise BundleError(f"the bundle has no golden vector {missing[0]}; export it again")
        wanted = [golden[key] for key in keys]
        found = {each.name: _try(each.load(spec.kind, spec.key), inputs, wanted, spec.tolerance) for each in engines}
        results.append(
            {
                "graph": spec.kind,
                "key": spec.key,
                "error": max(result["error"] for result in found.values()),
                "tolerance": spec.tolerance,
                "ms": found[engines[0].name]["ms"],
                "passed": all(result["passed"] for result in found.values()),
                "engines": found,
            }
        )
    return {
        "bundle": str(bundle.path),
        "engine": ", ".join(each.description for each in engines),
        "engines": {each.name: each.description for each in engines},
        "passed": all(result["passed"] for result in results),
        "graphs": results,
    }


def _try(run: Graph, inputs: dict[str, Array], wanted: list[Array], tolerance: float) -> dict[str, Any]:
    """One graph on one engine: its error, its median time, and whether that will do."""
    error = max(_relative_error(output, value) for output, value in zip(run(inputs), wanted, strict=True))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - started)
    return {"error": error, "ms": round(statistics.median(times) * 1e3, 3), "passed": bool(error <= 2 * tolerance)}


def _input(bundle: Bundle, golden: dict[str, Array], spec: GraphSpec, name: str) -> Array:
    key = _key(spec, "in", name)
    if key in golden:
        return golden[key]
    # The base model's weights are too large to stand in the golden file again.
    head, blocks, files = bundle.manifest.head, bundle.manifest.device_blocks, dict[str, str | None]()
    if spec.kind == "embedding":
        files = {**bundle.manifest.embedding.weight_files}
    elif spec.kind.startswith("head_"):
        files = {**head.weight_files}
    elif blocks is not None and spec.kind.startswith("final_norm_"):
        files = {**blocks.final_norm}
    elif blocks is not None and spec.kind.startswith(OF_BLOCKS):  # the last of the shape
        files = next(({**block.weights} for block in reversed(blocks.blocks) if block.graph == spec.key), {})
    file = files.get(name)
    if file is None:
        raise BundleError(f"{bundle.path} has no golden vector {key}; export it again")
    return bundle.weight(file)


def _key(spec: GraphSpec, side: str, name: str) -> str:
    return ".".join(part for part in (spec.kind, spec.key, side, name) if part)


def _relative_error(found: Array, wanted: Array) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0)) / scale
