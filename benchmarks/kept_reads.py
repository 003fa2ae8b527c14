"""Reads that are kept: three epochs in passes 2,2 with them and without, at servers in float32 and bfloat16.

Of two sets their first texts: whether the bits are the same, what crosses in each epoch, how often the server has read
something else, and whether each step costs what the formula says. What has to be reached is written into
docs/log/benchmarks/kept-reads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_least, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser
from economy_data import load
from economy_recipes import DEFAULT, RECIPES, in_passes, train_config

from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.kept_reads import open_kept_reads
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.side import ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapters import crossings
from dlora.protocol.traffic import Traffic, micro_batch_traffic, report_traffic

COMMAND: Final = "python benchmarks/kept_reads.py"
FILE: Final = Path("benchmarks") / "kept-reads.json"
EPOCHS: Final = 3
BATCH: Final = 8
LR: Final = 4e-3
BYTES: Final = {"float32": 0.95, "bfloat16": 0.9}
TRIPS: Final = {"float32": 0.9, "bfloat16": 0.85}


def main() -> None:
    """Measure, print JSON, and write the bars."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    tokenizer = EdgeTokenizer.open(bundle)
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        with cloud_server(options.model, options.threads, "--dtype", dtype) as url:
            for name in ("b10", "dialogue"):
                data = load(name, options.data, options.work, tokenizer).train
                invocation = find_invocation(data)
                dataset = data.subset(range(options.texts))
                found[f"{name}, {dtype}"] = _measure(bundle, url, dataset, invocation, options)
                log(f"{name}, {dtype}: {found[f'{name}, {dtype}']}")
    result = {"threads": options.threads, "runs": found}
    write_bars(options.docs / FILE, _bars(found))
    print(json.dumps(result, indent=1))


def _measure(
    bundle: Bundle, url: str, dataset: Dataset, invocation: tuple[int, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Both runs, which take turns."""
    steps = EPOCHS * -(-len(dataset) // BATCH)
    optimizer = {"lr": LR, "schedule": "constant", "warmup": 0.0}
    recipe = in_passes(RECIPES[DEFAULT], "2,2")
    config = train_config(
        recipe, bundle.manifest, steps=steps, batch_size=BATCH, seed=0, optimizer=optimizer, invocation=invocation
    )
    rows: dict[bool, list[StepMetrics]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        file = Path(directory) / "kept"
        reads = open_kept_reads(
            file, bundle.manifest, config.spec, config.groups(bundle.manifest), config.codecs, config.server.send,
            limit=1 << 33,
        )  # fmt: skip
        stack.enter_context(closing(reads))
        trainers = {}
        for is_kept in rows:
            side = partial(
                ServerSide, connection=stack.enter_context(Connection(url)), kept_reads=reads if is_kept else None
            )
            trainers[is_kept] = Trainer(bundle, OnnxEngine(bundle, options.threads), side, config, dataset)
        for _ in range(steps):
            for is_kept, trainer in trainers.items():
                rows[is_kept].append(trainer.run_step())
        weights = [{n: p.value.tobytes() for n, p in each.adapters.parameters().items()} for each in trainers.values()]
        costs = _costs(trainers[True], rows[True])
        formulas = {
            kept: [_formula(trainers[True], step, reads_kept=kept) for step in range(steps)] for kept in (False, True)
        }
        nbytes = file.stat().st_size
    an_epoch = steps // EPOCHS
    early = [cost == kept for cost, kept in zip(costs, formulas[True], strict=True)]
    as_ever = [cost == plain for cost, plain in zip(costs, formulas[False], strict=True)]
    refused = [not one and not other for one, other in zip(early, as_ever, strict=True)]
    return {
        "has_same_bits": weights[0] == weights[1],
        "kept_bytes": nbytes,
        "steps_an_epoch": an_epoch,
        "early": sum(early),
        "refused": sum(refused),
        # A step whose early tensors were refused costs these on top, up, and nothing else.
        "is_by_formula": all(
            one or other or (cost.bytes_down, cost.round_trips) == (plain.bytes_down, plain.round_trips)
            for one, other, cost, plain in zip(early, as_ever, costs, formulas[False], strict=True)
        ),
        "epochs": [
            {
                name: {
                    "round_trips_per_step": sum(row.round_trips for row in of_epoch) / an_epoch,
                    "bytes_per_token": sum(row.bytes_up + row.bytes_down for row in of_epoch)
                    / sum(row.tokens for row in of_epoch),
                }
                for name, is_kept in (("kept", True), ("without", False))
                for of_epoch in (rows[is_kept][epoch * an_epoch : (epoch + 1) * an_epoch],)
            }
            for epoch in range(EPOCHS)
        ],
    }


def _costs(trainer: Trainer, rows: Sequence[StepMetrics]) -> list[Traffic]:
    """Of each step's micro-batch: without its report, and the signal to the one before."""
    report = report_traffic(len(trainer.adapters.units), len(trainer.session.ticket or b""))
    return [
        Traffic(row.bytes_up - report.bytes_up, row.bytes_down - bool(row.step) * report.bytes_down, row.round_trips)
        for row in rows
    ]


def _formula(trainer: Trainer, step: int, *, reads_kept: bool) -> Traffic:
    (batch,), live = trainer.batches.step_batches(step), range(len(trainer.groups))
    base = trainer.bundle.manifest.base_model
    return micro_batch_traffic(
        crossings(trainer.config.spec, trainer.groups), live=live, with_grads=live, answered=live[1:],
        tokens=len(batch.ids), sequences=len(batch.sequence_lengths), labelled=len(batch.labels),
        rows=None if batch.crossing_positions is None else len(batch.crossing_positions),
        embedding_size=base.embedding_size, hidden_size=base.hidden_size, codecs=trainer.config.codecs,
        passes=trainer.config.passes, reads_kept=reads_kept,
    )  # fmt: skip


def _bars(found: dict[str, dict[str, Any]]) -> dict[str, Entry]:
    def share(name: str, dtype: str) -> float:
        """Of what crosses without, in the last epoch; the most of both sets."""
        last = [each["epochs"][-1] for run, each in found.items() if run.endswith(dtype)]
        return max(float(each["kept"][name] / each["without"][name]) for each in last)

    return {
        "same_bits": at_least(len(found), sum(each["has_same_bits"] for each in found.values()), COMMAND),
        "by_formula": at_least(len(found), sum(each["is_by_formula"] for each in found.values()), COMMAND),
        # What a server's float32 rounds otherwise in other company is sent twice; it must still be worth it.
        **{f"bytes_{dtype}": at_most(bar, share("bytes_per_token", dtype), COMMAND) for dtype, bar in BYTES.items()},
        **{
            f"round_trips_{dtype}": at_most(bar, share("round_trips_per_step", dtype), COMMAND)
            for dtype, bar in TRIPS.items()
        },
    }


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=64, help="of each set")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DLORA_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/kept-reads"), help="for the sets as files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
