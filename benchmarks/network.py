"""How long a training step takes over networks: live, in passes, with several micro-batches under way, and with blocks
on the device, each beside what it would take if nothing but computing, round trips and bytes took time.

Every way's steps over all networks and over loopback take turns in one run. A proxy of our own delays and limits the
bytes (delaying_proxy.py). What has to be reached is written into docs/log/benchmarks/network.json, and all that was
measured beside it, with a plot. --ways names some of: live, 1,1, 2,1, 2,2, window-1, window-4, trunk.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import psutil
from bars import Entry, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser
from delaying_proxy import delaying_proxy
from economy_plot import Series, plot
from economy_recipes import DEFAULT, RECIPES, Recipe, in_passes, train_config, with_settings
from economy_trunk import new_source
from step import INVOCATION, random_tokens

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.cached_source import texts_of
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.side import DeviceSide, ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection

COMMAND: Final = "python benchmarks/network.py"
FILE: Final = Path("benchmarks") / "network.json"
CELLS: Final = Path("benchmarks") / "network-cells.json"
"""Of each way what was measured last, beside its bound."""
PICTURE: Final = Path("benchmarks") / "network.svg"
PASSES: Final = ("1,1", "2,1", "2,2")
WINDOWS: Final = (1, 4)
MICRO_BATCHES: Final = 4
TRUNK_BLOCKS: Final = 12
MOST: Final = 1.15
"""Of its bound that a step may take."""


class Network(NamedTuple):
    """Between device and server; 0, 0: loopback."""

    round_trip_ms: int
    mbit_s: int

    @property
    def name(self) -> str:
        return f"{self.round_trip_ms} ms, {self.mbit_s} Mbit/s" if self.mbit_s else "loopback"

    def seconds(self, round_trips: float, nbytes: float) -> float:
        """That so many round trips and bytes take, if nothing overlaps."""
        return round_trips * self.round_trip_ms / 1e3 + (nbytes * 8e-6 / self.mbit_s if self.mbit_s else 0.0)

    @contextmanager
    def to(self, url: str) -> Iterator[str]:
        with delaying_proxy(url, self.round_trip_ms / 1e3, self.mbit_s * 1e6) as address:
            yield address


LOOPBACK: Final = Network(0, 0)
NETWORKS: Final = tuple(Network(ms, rate) for rate in (100, 10) for ms in (0, 20, 80, 200))


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    result: dict[str, Any] = {"model": options.model, "threads": options.threads, "steps": options.steps}
    with cloud_server(options.model, options.threads) as url:
        for name in options.ways:
            if name == "trunk":
                result[name] = _measure_trunk(Bundle.open(need_bundle(options.blocks_bundle)), url, options)
            else:
                result[name] = _measure(bundle, url, name, options)
    write_bars(options.docs / FILE, _bars(result))
    known = write_bars(options.docs / CELLS, {name: result[name] for name in options.ways})
    if drawn := _plot(known):
        (options.docs / PICTURE).write_text(drawn, encoding="utf-8")
    print(json.dumps(result, indent=1))


# -- steps with a server -----------------------------------------------------------------------------------


def _measure(bundle: Bundle, url: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of one way over all networks, which take turns."""
    recipe, sequences = _way(name, options)
    dataset = _dataset(bundle, sequences, options)
    networks = (LOOPBACK, *NETWORKS)
    if name.startswith("window"):
        networks = tuple(each for each in networks if each.mbit_s in (0, 100))
    rows: dict[Network, list[StepMetrics]] = {network: [] for network in networks}
    _forget_peak()
    with ExitStack() as stack:
        trainers = {}
        for network in networks:
            connection = stack.enter_context(Connection(stack.enter_context(network.to(url))))
            trainers[network] = _trainer(bundle, connection, recipe, dataset, sequences, options.threads)
        for step in range(1 + options.steps):
            for network, trainer in trainers.items():
                row = trainer.run_step()
                if step:
                    rows[network].append(row)
            last = (f"{each.name} {of_it[-1].step_s:.2f} s" for each, of_it in rows.items() if of_it)
            log(f"{name}, step {step}: {'; '.join(last)}")
    together = 1 if recipe.adapter.get("window", "1") == "1" else MICRO_BATCHES
    found = {network.name: _cell(network, rows[network], rows[LOOPBACK], together) for network in networks}
    return {"server_peak_mb": _server_peak_mb(), "cells": found}


def _way(name: str, options: argparse.Namespace) -> tuple[Recipe, int]:
    """What is trained, and the sequences of a micro-batch."""
    default = RECIPES[DEFAULT]
    if not name.startswith("window"):
        return (default if name == "live" else in_passes(default, name)), options.batch_size
    recipe = in_passes(default, "2,2")
    more = {"grad_accum": MICRO_BATCHES, "window": name.removeprefix("window-")}
    return with_settings(recipe, **more), options.window_tokens // options.length


def _dataset(bundle: Bundle, sequences: int, options: argparse.Namespace) -> Dataset:
    """Random sequences whose last tokens are labels."""
    vocabulary, length = bundle.manifest.base_model.vocabulary_size, options.length
    ids, first = random_tokens(vocabulary, 8 * MICRO_BATCHES * sequences, length, options.labelled)
    return Dataset.of([(row.tolist(), list(range(first - 1, length - 1))) for row in ids])


def _trainer(
    bundle: Bundle, connection: Connection, recipe: Recipe, dataset: Dataset, sequences: int, threads: int
) -> Trainer:
    optimizer = {"lr": recipe.default_lr, "weight_decay": recipe.weight_decay, "schedule": "constant", "warmup": 0.0}
    config = train_config(
        recipe, bundle.manifest, steps=1000, batch_size=sequences, seed=0, optimizer=optimizer, invocation=INVOCATION,
    )  # fmt: skip
    adapter = msgspec.structs.replace(config.adapter, basis_steps=1)  # what A and B are made from is no part of a step
    config = msgspec.structs.replace(config, adapter=adapter)
    side = partial(ServerSide, connection=connection)
    return Trainer(bundle, OnnxEngine(bundle, threads), side, config, dataset)


def _cell(
    network: Network, rows: Sequence[StepMetrics], loopback: Sequence[StepMetrics], together: int
) -> dict[str, Any]:
    """What steps over a network took. ``together``: how many micro-batches wait for the same round trips."""
    best = min(rows, key=lambda row: row.step_s)
    nbytes, round_trips = best.bytes_up + best.bytes_down, best.round_trips / together
    crossing_s = network.seconds(round_trips, nbytes)
    bound_s = best.server_compute_s + best.edge_compute_s + crossing_s
    above = statistics.median(row.step_s - other.step_s for row, other in zip(rows, loopback, strict=True))
    return {
        "best_step_s": round(best.step_s, 3),
        "bound_s": round(bound_s, 3),
        "of_bound": round(best.step_s / bound_s, 3),
        "median_step_s": round(statistics.median(row.step_s for row in rows), 3),
        "above_loopback_s": round(above, 3),
        "crossing_s": round(crossing_s, 3),
        "of_loopback": round(statistics.median(r.step_s / o.step_s for r, o in zip(rows, loopback, strict=True)), 3),
        "server_compute_s": round(best.server_compute_s, 3),
        "edge_compute_s": round(best.edge_compute_s, 3),
        "round_trips": best.round_trips,
        "bytes": nbytes,
        "bytes_per_token": round(nbytes / best.tokens, 1),
        "tokens": best.tokens,
    }


# -- blocks on the device ----------------------------------------------------------------------------------


def _measure_trunk(bundle: Bundle, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Asking for every text once, over each network; and a step after that, which asks for nothing."""
    dataset = _dataset(bundle, options.batch_size, options)
    adapter = {"rank": 16, "lora_alpha": 32.0, "target_modules": ("all-linear",)}
    recipe = Recipe("on the device", adapter, default_lr=2e-3, device_blocks=TRUNK_BLOCKS)
    optimizer = {"lr": recipe.default_lr, "schedule": "constant", "warmup": 0.0}
    config = train_config(
        recipe, bundle.manifest, steps=1000, batch_size=options.batch_size, seed=0, optimizer=optimizer
    )
    engine, found = OnnxEngine(bundle, options.threads), dict[str, Any]()
    with tempfile.TemporaryDirectory() as directory:
        for number, network in enumerate((LOOPBACK, *NETWORKS)):
            file = Path(directory) / f"cache-{number}"
            with network.to(url) as address, closing(new_source(bundle, engine, address, config, file)) as source:
                started = time.perf_counter()
                source.fill(texts_of(dataset))
                seconds = time.perf_counter() - started
                up, down, round_trips = source.crossed.counters
                found[network.name] = {
                    "filling_s": round(seconds, 3), "bytes": up + down, "round_trips": round_trips,
                    "texts": len(dataset), "tokens": dataset.tokens,
                }  # fmt: skip
                log(f"trunk: {network.name}: {seconds:.2f} s for {len(dataset)} texts")
                if network == LOOPBACK:
                    trainer = Trainer(bundle, engine, partial(DeviceSide, source=source), config, dataset)
                    steps = [trainer.run_step().step_s for _ in range(1 + options.steps)][1:]
    return {"blocks": TRUNK_BLOCKS, "step_s": round(statistics.median(steps), 3), "cells": found}


# -- what it comes to --------------------------------------------------------------------------------------


def _bars(result: dict[str, Any]) -> dict[str, Entry]:
    """What has to be reached, of what was measured."""
    bars: dict[str, Entry] = {}
    for name in ("live", *PASSES):
        if name in result:
            worst = max(cell["of_bound"] for cell in result[name]["cells"].values())
            bars[f"of_bound_{_key(name)}"] = at_most(MOST, worst, f"{COMMAND} --ways {name}")
    if "2,2" in result:
        for ms in (20, 80):
            cell = result["2,2"]["cells"][Network(ms, 100).name]
            most = MOST * cell["crossing_s"] + 0.03
            bars[f"above_loopback_{ms}_ms"] = at_most(most, cell["above_loopback_s"], f"{COMMAND} --ways 2,2")
        trips = max(cell["round_trips"] for cell in result["2,2"]["cells"].values())
        bars["round_trips_2_2"] = at_most(5, trips, f"{COMMAND} --ways 2,2")
    if "window-4" in result:
        cell = result["window-4"]["cells"][Network(80, 100).name]
        bars["window_80_ms_of_loopback"] = at_most(1.2, cell["of_loopback"], f"{COMMAND} --ways window-4")
    return bars


def _key(name: str) -> str:
    return name.replace(",", "_")


def _plot(result: dict[str, Any]) -> str:
    """Best steps by round-trip time at 100 Mbit/s."""
    series = []
    for name in ("live", *PASSES):
        if name in result:
            points = [(float(ms), result[name]["cells"][Network(ms, 100).name]["best_step_s"]) for ms in (20, 80, 200)]
            series.append(Series(name if name == "live" else f"in passes {name}", tuple(points)))
    return plot("A training step over 100 Mbit/s", series, "seconds", x_title="round-trip time, ms") if series else ""


def _server() -> psutil.Process:
    return next(each for each in psutil.Process().children() if "dlora.cloud" in each.cmdline())


def _forget_peak() -> None:
    Path(f"/proc/{_server().pid}/clear_refs").write_text("5")


def _server_peak_mb() -> float:
    """Most memory that the server's process had since ``_forget_peak``."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{_server().pid}/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1e3, 1)


def _options() -> argparse.Namespace:
    ways = ("live", *PASSES, *(f"window-{count}" for count in WINDOWS), "trunk")
    parser = new_parser(__doc__)
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--blocks-bundle", type=Path, default=Path("build/smollm2-blocks"), help="for trunk")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--window-tokens", type=int, default=128, help="tokens of each of four micro-batches")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of tokens that are labels")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
