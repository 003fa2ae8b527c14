"""The device alone: speed of its graphs, memory of a training run, start-up and size.

Graphs are compared with plain BLAS products of the same FLOPs (device_graphs.py), memory is taken stage by stage of a
real run against a real server (device_stages.py) and from the command itself. Prints one JSON object; times are
medians, memory is in MB of 10**6 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from children import QUIET_THREADS, cloud_server, log, need_bundle

from dlora.edge.run.footprint import training_mb
from dlora.protocol.choices import KindChoice
from dlora.protocol.manifest import load_manifest

ROOT, HERE, BIN = Path(__file__).parents[1], Path(__file__).parent, Path(sys.executable).parent
KINDS: tuple[KindChoice, ...] = ("lora", "bottleneck")
PARTS = ("graphs", "memory", "start_up", "binaries")


def main() -> None:
    """Print one JSON object."""
    options = _options()
    bundles = [need_bundle(path) for path in options.bundle]
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "tokens": options.tokens,
        "rank": options.rank,
    }
    measure = {
        "graphs": lambda: {str(path): _graphs(path, options) for path in bundles},
        "memory": lambda: _memory(bundles, options),
        "start_up": lambda: {"dlora-edge --version": _start_up([str(BIN / "dlora-edge")], options.rounds)},
        "binaries": lambda: _binaries(options.rounds),
    }
    for part in options.only or PARTS:
        log(f"measuring {part}")
        result[part] = measure[part]()
    print(json.dumps(result, indent=1))


def _graphs(bundle: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """With one thread, and with all that were asked for: OpenBLAS takes its number when it is loaded."""
    found: list[dict[str, Any]] = []
    for threads in sorted({1, options.threads}):
        found += _child(
            "device_graphs.py", "--bundle", bundle, "--threads", threads, "--tokens", options.tokens,
            "--rank", options.rank, "--rounds", options.rounds, OPENBLAS_NUM_THREADS=str(threads),
        )  # fmt: skip
    return found


def _memory(bundles: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Two sequences a step, every token of them a label."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, cloud_server(options.model, options.threads) as (url, _):
        data = Path(folder) / "text.jsonl"
        words = (ROOT / "LICENSE").read_text().split()
        rows = [" ".join(words[start : start + 140]) for start in range(0, 1400, 70)]
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        for number, bundle in enumerate(bundles):
            log(f"training with {bundle}")
            out = Path(folder) / str(number)
            stages = _child(
                "device_stages.py", "--bundle", bundle, "--server", url, "--data", data, "--out", out / "stages",
                "--tokens", options.tokens, "--steps", options.steps, "--threads", options.threads,
            )  # fmt: skip
            peaks, estimates = {}, {}
            for kind in KINDS:
                command = [BIN / "dlora-edge", "train", "--kind", kind, "--bundle", bundle, "--server", url]
                command += ["--data", data, "--out", out / kind, "--steps", options.steps, "--batch-size", 2]
                command += ["--max-length", options.tokens // 2, "--too-long", "truncate", "--threads", options.threads]
                command += ["--active-fraction", 0.125, "--kr-score", "grad", "--seed", 0, "--json"]
                peaks[kind] = _json_of(command, {})["peak_rss_mb"]
                estimates[kind] = round(training_mb(load_manifest(bundle), kind=kind), 1)
            found[str(bundle)] = {"command_peak_rss_mb": peaks, "estimated_mb": estimates, **stages}
    return found


def _binaries(rounds: int) -> dict[str, Any]:
    """Size and start-up of the frozen programs that have been built; start-up only of those for this machine."""
    found: dict[str, Any] = {}
    for program in sorted(
        [*ROOT.glob("build/edge/*/dlora-edge"), *ROOT.glob("build/edge/*/dlora-edge-dir/dlora-edge")]
    ):
        is_folder = program.parent.name == "dlora-edge-dir"
        files = program.parent.rglob("*") if is_folder else [program]
        size = sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
        row: dict[str, Any] = {"mb": round(size / 1e6, 1)}
        architecture = program.parents[1 if is_folder else 0].name
        if architecture == platform.machine():
            row |= _start_up([str(program)], rounds)
        found[str(program.relative_to(ROOT))] = row
    return found


def _start_up(command: list[str], rounds: int) -> dict[str, float]:
    """Seconds from nothing to the end of ``--version``; the first, which may have to read the disk, does not count."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        subprocess.run([*command, "--version"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return {"median_s": round(statistics.median(times[1:]), 3), "best_s": round(min(times[1:]), 3)}


def _child(script: str, *arguments: object, **environment: str) -> Any:
    return _json_of([sys.executable, HERE / script, *arguments], environment)


def _json_of(command: list[Any], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, env={**os.environ, **QUIET_THREADS, **environment}
    )
    return json.loads(done.stdout)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[Path("build/smollm2"), Path("build/smollm2-int8")])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="measure these; by default everything")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step, in two sequences")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
