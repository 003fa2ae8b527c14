"""How long a training step takes: PEFT in one process, and the split: all active, 1/8 active, and the default
recipe, live, with adapters that act at all rows and not at answers alone, and in passes.

All take turns in one run on the same batches; medians are printed. The device runs in this process, the server in
another, over loopback; each has --threads threads, and they take turns, as PEFT's one process does. What has to be
reached is written into docs/log/benchmarks/economy.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
from bars import FILE, Entry, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser, worker
from economy_recipes import BASELINE, DEFAULT, RECIPES, in_passes, train_config, with_settings

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.memory import peak_rss_mb
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.manifest import Manifest

COMMAND: Final = "python benchmarks/step.py"
INVOCATION: Final = (98, 99)
"""What each sequence has before its labels: where the default recipe's adapters begin to act."""
PASSES: Final = {"1,1": 0.66, "2,1": 0.73, "2,2": 0.86}
"""What each may take of PEFT's step."""
FIRST_RANDOM: Final = 100
"""Other tokens begin here, so that none of them is of the invocation."""


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    defaults = bundle.manifest.defaults
    vocabulary = bundle.manifest.base_model.vocabulary_size
    ids, first = random_tokens(vocabulary, 8 * options.batch_size, options.length, options.labelled)
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, options.length - 1))) for row in ids])
    log(f"starting PEFT and the server, {options.threads} threads each")
    lora = (",".join(defaults.target_modules), defaults.r, defaults.lora_alpha, 1e-3)
    peft_s: list[float] = []
    with (
        worker("peft_process.py", options.model, options.threads, *lora) as peft,
        cloud_server(options.model, options.threads) as url,
        ExitStack() as connections,
    ):
        devices = {
            name: Device(bundle, connections.enter_context(Connection(url)), config, dataset, options.threads)
            for name, config in _configs(bundle.manifest, options).items()
        }
        for step in range(options.warmup + options.steps + 1):
            measured = step > options.warmup
            chosen = ids[devices["split_all"].trainer.batches.step_indices(step)]
            labels = np.where(np.arange(options.length) >= first, chosen, -100)
            found = peft({"ids": chosen.tolist(), "labels": labels.tolist()})
            if measured:
                peft_s.append(found["step_s"])
            seconds = {name: device.run_step(keep=measured) for name, device in devices.items()}
            log(
                f"step {step}{'' if measured else ' (warm-up)'}: PEFT {found['step_s']:.2f} s, "
                + ", ".join(f"{name} {each:.2f} s" for name, each in seconds.items())
            )
    result = _result(bundle.manifest, peft_s, devices, options)
    write_bars(options.docs / FILE, _bars(result))
    print(json.dumps(result, indent=1))


def random_tokens(vocabulary: int, sequences: int, length: int, labelled: float) -> tuple[Any, int]:
    """Random sequences, (sequences, length), and where the labels of each begin, of which they have that share."""
    rng = np.random.default_rng(0)
    ids = rng.integers(FIRST_RANDOM, vocabulary, (sequences, length))
    first = max(len(INVOCATION), round(length * (1 - labelled)))
    ids[:, first - len(INVOCATION) : first] = INVOCATION
    return ids, first


def _configs(manifest: Manifest, options: argparse.Namespace) -> dict[str, Resolved]:
    """What is compared with PEFT."""
    lora = replace(RECIPES[BASELINE], adapter={"wire_dtype": options.wire_dtype})
    recipes = {
        "split_all": lora,
        "split_kr": replace(lora, kill_revive={"active_fraction": 0.125}),
        "split_default": RECIPES[DEFAULT],
        "split_default_at_all_rows": with_settings(RECIPES[DEFAULT], adapt="all"),
        **{_named(passes): in_passes(RECIPES[DEFAULT], passes) for passes in PASSES},
    }
    steps = 10 * (options.warmup + options.steps + 1)
    found = {}
    for name, recipe in recipes.items():
        optimizer = {"lr": recipe.default_lr, "weight_decay": recipe.weight_decay}
        found[name] = train_config(
            recipe, manifest, steps=steps, batch_size=options.batch_size, seed=0,
            optimizer={**optimizer, "schedule": "constant", "warmup": 0.0},
            invocation=INVOCATION if recipe.acts_on_answers else (),
        )  # fmt: skip
    return found


def _named(passes: str) -> str:
    return f"split_default_{passes.replace(',', '_')}"


class Device:
    """A run of the split, and what its steps took.

    Attributes:
        set_up_s: from nothing to the first step: where the server makes A and B, its passes over some data as well.
        step_s: by the clock; cpu_s: the process's. One a step that is kept.
    """

    def __init__(
        self, bundle: Bundle, connection: Connection, config: Resolved, dataset: Dataset, threads: int
    ) -> None:
        started, engine = time.perf_counter(), OnnxEngine(bundle, threads)
        self.trainer = Trainer(bundle, engine, partial(ServerSide, connection=connection), config, dataset)
        self.set_up_s = time.perf_counter() - started
        self.step_s: list[float] = []
        self.cpu_s: list[float] = []
        self.rows: list[StepMetrics] = []

    def run_step(self, *, keep: bool) -> float:
        """Seconds of one step."""
        started, used = time.perf_counter(), time.process_time()
        row = self.trainer.run_step()
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        if keep:
            self.step_s.append(seconds)
            self.cpu_s.append(cpu)
            self.rows.append(row)
        return seconds

    def result(self) -> dict[str, Any]:
        """As JSON has it."""
        step_s, last = statistics.median(self.step_s), self.rows[-1]
        (batch,) = self.trainer.batches.step_batches(last.step)
        acting = len(batch.ids) if batch.crossing_positions is None else len(batch.crossing_positions)
        return {
            "kind": self.trainer.config.adapter.kind,
            "wire_dtype": self.trainer.config.server.wire_dtype,
            "step_s": round(step_s, 4),
            "tokens_per_s": round(last.tokens / step_s, 1),
            "bytes_per_token": round((last.bytes_up + last.bytes_down) / last.tokens, 1),
            "round_trips": last.round_trips,
            "rows_with_adapters": acting,
            "active_units": last.active_units,
            "units": last.units,
            "edge_compute_s": round(statistics.median(row.edge_compute_s for row in self.rows), 4),
            "edge_cpu_s": round(statistics.median(self.cpu_s), 4),
            "set_up_s": round(self.set_up_s, 1),
        }


# -- what it comes to --------------------------------------------------------------------------------------


def _result(
    manifest: Manifest, peft_s: Sequence[float], devices: dict[str, Device], options: argparse.Namespace
) -> dict[str, Any]:
    every, eighth, default = (devices[name] for name in ("split_all", "split_kr", "split_default"))
    median = statistics.median(peft_s)
    tokens = options.batch_size * options.length
    return {
        "model": options.model,
        "tokens_per_step": tokens,
        "labelled_per_step": every.rows[0].labelled,
        "wire_dtype": options.wire_dtype,
        "threads": options.threads,
        "steps": options.steps,
        "target_modules": list(manifest.defaults.target_modules),
        "peft": {"step_s": round(median, 4), "tokens_per_s": round(tokens / median, 1)},
        **{name: device.result() for name, device in devices.items()},
        # Of each round, then the median: all of a round saw the same machine.
        "ratio_all": _ratio(every.step_s, peft_s),
        "ratio_kr": _ratio(eighth.step_s, peft_s),
        "ratio_default": _ratio(default.step_s, peft_s),
        "ratio_default_at_all_rows": _ratio(devices["split_default_at_all_rows"].step_s, peft_s),
        **{f"ratio_{passes}": _ratio(devices[_named(passes)].step_s, peft_s) for passes in PASSES},
        "edge_peak_rss_mb": round(peak_rss_mb(), 1),
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def _bars(result: dict[str, Any]) -> dict[str, Entry]:
    """What has to be reached."""
    return {
        "step_default": at_most(0.62, result["ratio_default"], COMMAND),
        **{
            f"step_passes_{passes.replace(',', '_')}": at_most(most, result[f"ratio_{passes}"], COMMAND)
            for passes, most in PASSES.items()
        },
        "step_all": at_most(1.1, result["ratio_all"], COMMAND),
        "round_trips": at_most(65, result["split_default"]["round_trips"], COMMAND),
    }


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of tokens that are labels")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--wire-dtype", choices=("fp16", "fp32"), default="fp16", help="of LoRA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
