"""Kill and Revive against its baselines: held-out loss and accuracy against bytes, device compute and time.

Banking77 (--data, never in the repository): ten intents, named by the model itself after a message. Every recipe
trains a fresh adapter with the same data, order, seed and learning rate, over a real websocket against one server.
Accuracy is the share of held-out messages whose every answer token is the likeliest, which is what greedy decoding
would write. A JSON object goes to stdout; what is finished is kept in --keep, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from children import QUIET_THREADS, cloud_server, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.kill_revive import KillReviveConfig

INTENTS = 10
CROWDED = {"spread": False}  # ranked without regard to depth
RECIPES: dict[str, dict[str, Any]] = {
    "all active": {"active_fraction": 1.0},
    "last 4": {"score": "last"},
    "static, 4 spread": {"score": "static", "static": (3, 11, 19, 27)},
    # As many bytes in the whole run as kill-and-revive's 4 after its warm-up.
    "static, 9 spread": {"score": "static", "static": (1, 4, 8, 11, 14, 18, 21, 24, 28)},
    "change, no revival": {"score": "change", "revive_every": 0},
    "sensitivity, no revival": {"score": "sensitivity", "revive_every": 0},
    "change": {},
    "norm, no revival": {"score": "norm", "revive_every": 0},
    "grad, no revival": {"score": "grad", "revive_every": 0},
    "random": {"score": "random"},
    "random, crowded": {"score": "random", **CROWDED},
    "change, crowded": {"score": "change", "revive_every": 25, "revive_share": 0.5, **CROWDED},
    "change, crowded, no revival": {"score": "change", "revive_every": 0, **CROWDED},
    "change, crowded, by score alone": {
        **{"score": "change", "revive_every": 25, "revive_share": 0.5},
        "cost_aware": False,
        **CROWDED,
    },
}


def main() -> None:
    """Run every recipe with every seed, print JSON."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    tokenizer = EdgeTokenizer.open(bundle)
    kept: dict[str, Any] = json.loads(options.keep.read_text()) if options.keep.exists() else {}
    chosen = options.only or list(RECIPES)
    with cloud_server(options.model, options.threads) as (url, _):
        for seed in options.seeds:
            train, test = _data(options, tokenizer, seed)
            for name in chosen:
                key = _key(name, seed, options)
                if key in kept:
                    continue
                kept[key] = _run(bundle, url, train, test, seed, _kill_revive(name), options)
                options.keep.parent.mkdir(parents=True, exist_ok=True)
                options.keep.write_text(json.dumps(kept, indent=1) + "\n")
                result = kept[key]
                log(
                    f"{name}, seed {seed}: loss {result['loss']:.3f}, accuracy {result['accuracy']:.1%}, "
                    f"{result['bytes_per_token_steady']:,.0f} B/token, {result['wall_s']:.0f} s"
                )
    table = [_row(name, [kept[_key(name, seed, options)] for seed in options.seeds]) for name in chosen]
    settings = {"model": options.model, "steps": options.steps, "batch_size": options.batch_size, "lr": options.lr}
    print(json.dumps({**settings, "test_messages": options.test, "seeds": options.seeds, "recipes": table}, indent=1))


def _kill_revive(name: str) -> KillReviveConfig:
    """The settings of a recipe: 1/8 active where it says nothing else."""
    return KillReviveConfig(**{"active_fraction": 0.125, **RECIPES[name]})


def _key(name: str, seed: int, options: argparse.Namespace) -> str:
    """What a kept result is of: it holds only while the recipe, the defaults and the run's length are the same."""
    settings = msgspec.json.encode(_kill_revive(name))
    run = f"{options.steps} steps of {options.batch_size}, lr {options.lr}, {options.test} test"
    return f"{name} / seed {seed} / {run} / {hashlib.sha256(settings).hexdigest()[:8]}"


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    means = {key: round(statistics.mean(run[key] for run in runs), 4) for key in runs[0] if key != "units"}
    return {"recipe": name, **means, "losses": [run["loss"] for run in runs], "units": [run["units"] for run in runs]}


def _run(
    bundle: Bundle,
    url: str,
    train: Dataset,
    test: Dataset,
    seed: int,
    kill_revive: KillReviveConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    config = TrainConfig(
        kind="lora",
        total_steps=options.steps,
        batch_size=options.batch_size,
        grad_accum=1,
        seed=(seed,),
        rank=bundle.manifest.defaults.r,
        lora_alpha=bundle.manifest.defaults.lora_alpha,
        wire_dtype="fp16",
        optimizer=OptimizerConfig(lr=options.lr, schedule="linear", warmup=5),
        kill_revive=kill_revive,
    )
    started = time.perf_counter()
    with Connection(url) as connection:
        trainer = Trainer(bundle, OnnxEngine(bundle, options.threads), connection, config, train)
        rows = [trainer.run_step() for _ in range(options.steps)]
        trainer.wait_for_signal()
        wall_s = time.perf_counter() - started
        result = trainer.evaluate(test)
    steady = [row for row in rows if row.live_units == min(row.live_units for row in rows)]

    def per_token(some: list[Any]) -> float:
        return sum(row.bytes_up + row.bytes_down for row in some) / sum(row.tokens for row in some)

    return {
        "loss": round(result.loss, 4),
        "accuracy": round(result.exact_match, 4),
        "bytes_per_token_steady": round(per_token(steady), 1),
        "bytes_per_token_whole_run": round(per_token(rows), 1),
        "round_trips_per_step": statistics.median(row.round_trips for row in steady),
        "edge_compute_s": round(sum(row.edge_compute_s for row in rows), 2),
        "wall_s": round(wall_s, 1),
        "units": rows[-1].units,
    }


def _data(options: argparse.Namespace, tokenizer: EdgeTokenizer, seed: int) -> tuple[Dataset, Dataset]:
    rng = np.random.default_rng([seed, 77])
    tables = {name: _rows(options.data / "banking77" / f"{name}.csv") for name in ("train", "test")}
    intents = sorted({intent for _, intent in tables["train"]})
    chosen = set(np.random.default_rng(77).choice(intents, INTENTS, replace=False).tolist())
    counts = {"train": options.steps * options.batch_size, "test": options.test}
    found = {}
    for name, rows in tables.items():
        wanted = [row for row in rows if row[1] in chosen]
        order = rng.permutation(len(wanted))[: counts[name]]
        path = options.keep.parent / f"banking77-{name}-{seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for index in order:
                text, intent = wanted[index]
                answer = " " + intent.replace("_", " ")
                file.write(json.dumps({"prompt": f"Message: {text}\nIntent:", "completion": answer}) + "\n")
        found[name] = load_examples(path, tokenizer, max_length=128, too_long="truncate")
    return found["train"], found["test"]


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="") as file:
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise SystemExit(f"error: {path} is not there; give the folder that holds banking77/ as --data") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_data = Path(os.environ.get("DLORA_DATA", "../shared/data"))
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=default_data)
    parser.add_argument("--keep", type=Path, default=Path("build/benchmarks/kill_revive.json"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--test", type=int, default=150, help="held-out messages")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
