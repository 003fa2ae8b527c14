"""How long a training step takes: PEFT in one process, the split with all adapters active, and at 1/8.

All three take turns in one run on the same batches; medians are printed. The device runs in this process, the
server in another, over loopback; each has --threads threads, and they take turns, as PEFT's one process does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from children import QUIET_THREADS, Worker, cloud_server, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.memory import peak_rss_mb
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.kill_revive import KillReviveConfig


def main() -> None:
    """Print one JSON object."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    defaults = bundle.manifest.defaults
    rng = np.random.default_rng(0)
    vocabulary = bundle.manifest.base_model.vocabulary_size
    ids = rng.integers(100, vocabulary, (8 * options.batch_size, options.length))
    first = round(options.length * (1 - options.labelled))
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, options.length - 1))) for row in ids])
    log(f"starting PEFT and the server, {options.threads} threads each")
    peft = Worker(
        str(Path(__file__).with_name("peft_process.py")), options.model, str(options.threads),
        ",".join(defaults.target_modules), str(defaults.r), str(defaults.lora_alpha), "1e-3",
    )  # fmt: skip
    everything = KillReviveConfig(active_fraction=1.0)
    eighth = KillReviveConfig(
        active_fraction=0.125, warmup_steps=options.warmup, warmup_fraction=0.0, ramp_fraction=0.0
    )
    with cloud_server(options.model, options.threads) as (url, _):
        times: dict[str, list[float]] = {"peft": [], "split_all": [], "split_kr": []}
        rows: dict[str, list[Any]] = {"split_all": [], "split_kr": []}
        cpu: dict[str, list[float]] = {"split_all": [], "split_kr": []}
        with Connection(url) as first_connection, Connection(url) as second_connection:
            trainers = {
                "split_all": _trainer(bundle, first_connection, dataset, everything, options),
                "split_kr": _trainer(bundle, second_connection, dataset, eighth, options),
            }
            for step in range(options.warmup + options.steps + 1):
                measured = step > options.warmup
                batch = trainers["split_all"].batches.step_indices(step)
                chosen = ids[np.concatenate(batch)] if isinstance(batch, list) else ids[np.ravel(batch)]
                labels = np.where(np.arange(options.length) >= first, chosen, -100)
                found = peft.ask({"ids": chosen.tolist(), "labels": labels.tolist()})
                if measured:
                    times["peft"].append(found["step_s"])
                for name, trainer in trainers.items():
                    started, used = time.perf_counter(), time.process_time()
                    row = trainer.run_step()
                    if measured:
                        times[name].append(time.perf_counter() - started)
                        cpu[name].append(time.process_time() - used)
                        rows[name].append(row)
                log(
                    f"step {step}{'' if measured else ' (warm-up)'}: PEFT {found['step_s']:.2f} s, "
                    + ", ".join(f"{name} {(times[name] or [float('nan')])[-1]:.2f} s" for name in rows)
                )
    peft.close()
    peft_s = statistics.median(times["peft"])
    tokens = options.batch_size * options.length
    result: dict[str, Any] = {
        "model": options.model,
        "tokens_per_step": tokens,
        "labelled_per_step": rows["split_all"][0].labelled,
        "wire_dtype": options.wire_dtype,
        "threads": options.threads,
        "steps": options.steps,
        "target_modules": list(defaults.target_modules),
        "peft": {"step_s": round(peft_s, 4), "tokens_per_s": round(tokens / peft_s, 1)},
    }
    for name, measured_rows in rows.items():
        step_s = statistics.median(times[name])
        last = measured_rows[-1]
        result[name] = {
            "step_s": round(step_s, 4),
            "tokens_per_s": round(tokens / step_s, 1),
            "bytes_per_token": round((last.bytes_up + last.bytes_down) / tokens, 1),
            "round_trips": last.round_trips,
            "active_units": last.active_units,
            "units": last.units,
            "edge_compute_s": round(statistics.median(row.edge_compute_s for row in measured_rows), 4),
            "edge_cpu_s": round(statistics.median(cpu[name]), 4),
        }
    # Of each round, then the median: the three of a round saw the same machine.
    result["ratio_all"] = _ratio(times["split_all"], times["peft"])
    result["ratio_kr"] = _ratio(times["split_kr"], times["peft"])
    result["edge_peak_rss_mb"] = round(peak_rss_mb(), 1)
    print(json.dumps(result, indent=1))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def _trainer(
    bundle: Bundle, connection: Connection, dataset: Dataset, kill_revive: KillReviveConfig, options: argparse.Namespace
) -> Trainer:
    config = TrainConfig(
        total_steps=10 * (options.warmup + options.steps + 1),
        batch_size=options.batch_size,
        grad_accum=1,
        seed=(0,),
        rank=bundle.manifest.defaults.r,
        lora_alpha=bundle.manifest.defaults.lora_alpha,
        wire_dtype=options.wire_dtype,
        optimizer=OptimizerConfig(lr=1e-3),
        kill_revive=kill_revive,
    )
    return Trainer(bundle, OnnxEngine(bundle, options.threads), connection, config, dataset)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of tokens that are labels")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wire-dtype", choices=("fp16", "fp32"), default="fp16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
