"""Whether PEFT finds the loss that dlora does: adapters of each kind, on the real model and real dialogue.

Each case trains a few steps over a real websocket, evaluates on held-out rows, saves the adapter, and has PEFT load it
into the whole model in one process of its own. JSON goes to stdout; what has to be reached is written into
docs/log/benchmarks/economy.json. Evaluations of a run cross as fp16 where the run's wire is int8; the loss of the saved
adapter with int8 evaluations stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from bars import FILE, Entry, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser, run_json
from economy_recipes import DEFAULT, RECIPES, Recipe, train_config

from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.evaluation import evaluate
from dlora.edge.model.opening import Opening, open_to_evaluate
from dlora.edge.training.side import ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from dialogue import write_dialogue

PEFT_CHECK: Final = Path(__file__).parents[1] / "examples" / "peft_check.py"
MAX_LENGTH: Final = 512  # of peft_check.py as well
COMMAND: Final = "python benchmarks/peft_losses.py"
BARS: Final = {"fp16": 2e-3, "fp32": 1e-4}
"""By the bundle's head: how far the two losses may be apart."""
WIRES: Final = {"fp16": ("fp16", "int8"), "fp32": ("fp32",)}


# High rates: so few steps should move the losses far away from the base model's.
OF_DEFAULT: Final = RECIPES[DEFAULT].adapter
CASES: Final = {
    "bottleneck": Recipe("bottleneck r 96, all positions", {**OF_DEFAULT, "adapt": "all"}, default_lr=1e-2),
    "bottleneck-answer": Recipe("bottleneck r 96, answer", OF_DEFAULT, default_lr=1e-2),
    "ffa": Recipe("ffa r 8 on q, v", {"kind": "ffa"}, default_lr=1e-2),
    "activated": Recipe("lora r 8 on q, v, answer", {"adapt": "answer"}, default_lr=5e-3),
}


@dataclass(frozen=True)
class Data:
    """Dialogue, as tokens and as the file that PEFT reads."""

    train: Dataset
    held_out: Dataset
    held_out_file: Path


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    heads = {"fp16": options.bundle, "fp32": options.bundle_fp32}
    bundles = {head: Bundle.open(need_bundle(path)) for head, path in heads.items() if path is not None}
    for head, bundle in bundles.items():
        if bundle.manifest.head.dtype != head:
            raise SystemExit(f"error: {bundle.path} has a head of {bundle.manifest.head.dtype}, and not {head}")
    result: dict[str, Any] = {"model": options.model, "steps": options.steps, "batch_size": options.batch_size}
    bars: dict[str, Entry] = {}
    with (
        tempfile.TemporaryDirectory() as work,
        cloud_server(options.model, options.threads, "--dtype", "float32") as url,
    ):
        data = _load(bundles["fp16"], Path(work), options.rows)
        result |= {"rows": len(data.held_out), "labels": data.held_out.labelled}
        for head, bundle in bundles.items():
            found = _measure(bundle, url, data, Path(work) / head, options)
            result[f"{head}_head"] = found
            bars |= bars_of(found["cases"], head)
    result["bars"] = bars
    write_bars(options.docs / FILE, bars)
    print(json.dumps(result, indent=1))


def bars_of(cases: Mapping[str, Sequence[Mapping[str, Any]]], head: str) -> dict[str, Entry]:
    """The largest difference of all cases that count for a bar; those of an fp32 head are bars of their own."""
    largest: dict[str, float] = {}
    for name, runs in cases.items():
        bar = f"peft_{name.partition('-')[0]}" + ("_fp32" if head == "fp32" else "")
        largest[bar] = max(largest.get(bar, 0.0), *(run["difference"] for run in runs))
    command = COMMAND if head == "fp16" else f"{COMMAND} --bundle-fp32 build/smollm2-fp32"
    return {bar: at_most(BARS[head], value, command) for bar, value in largest.items()}


def _load(bundle: Bundle, work: Path, rows: int) -> Data:
    tokenizer, (train, held_out) = EdgeTokenizer.open(bundle), write_dialogue(work, rows, seed=0)
    examples, tests = (load_examples(path, tokenizer, max_length=MAX_LENGTH) for path in (train, held_out))
    return Data(examples, tests, held_out)


def _measure(bundle: Bundle, url: str, data: Data, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All cases with one bundle, and the loss without an adapter, which those with one should be far below."""
    wires = WIRES[bundle.manifest.head.dtype]
    with open_to_evaluate(Opening(bundle, url, wire_dtype=wires[0], threads=options.threads), longest=0) as model:
        base = evaluate(model, data.held_out, options.batch_size).loss
    log(f"{bundle.manifest.head.dtype} head, no adapter: {base:.5f}")
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, recipe in CASES.items():
        cases[name] = []
        for wire in wires:
            found = _run(bundle, url, data, recipe, wire, work / f"{name}-{wire}", options)
            losses = f"{found['loss']:.5f}, in PEFT {found['peft_loss']:.5f}"
            log(f"{name}, wire {wire}: {losses}, {found['difference']:.1e} apart")
            cases[name].append(found)
    return {"base_loss": round(base, 6), "cases": cases}


def _run(
    bundle: Bundle, url: str, data: Data, recipe: Recipe, wire: str, adapter: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train, evaluate, save, and evaluate again what was saved."""
    config = train_config(
        replace(recipe, adapter={**recipe.adapter, "wire_dtype": wire}), bundle.manifest, steps=options.steps,
        batch_size=options.batch_size, seed=0,
        optimizer={"lr": recipe.default_lr, "schedule": "constant", "warmup": 0.0},
        invocation=find_invocation(data.train) if recipe.acts_on_answers else (),
    )  # fmt: skip
    with Connection(url) as connection:
        side = partial(ServerSide, connection=connection)
        trainer = Trainer(bundle, OnnxEngine(bundle, options.threads), side, config, data.train)
        for _ in range(options.steps):
            trainer.run_step()
        loss = trainer.evaluate(data.held_out).loss
        trainer.save_adapter(adapter)
    opening = Opening(bundle, url, adapter, wire_dtype="int8", threads=options.threads)
    with open_to_evaluate(opening, longest=0) as model:
        over_int8 = evaluate(model, data.held_out, options.batch_size).loss
    in_peft = run_json(PEFT_CHECK, options.model, adapter, bundle.path, data.held_out_file)
    if in_peft["tokens"] != data.held_out.labelled:
        raise SystemExit(f"error: PEFT has {in_peft['tokens']} labels, and not {data.held_out.labelled}")
    return {
        "kind": config.adapter.kind,
        "title": recipe.title,
        "wire_dtype": wire,
        "evaluated_over": config.codecs.for_evaluation().group_input,
        "invocation": list(config.invocation),
        "loss": round(loss, 6),
        "peft_loss": round(in_peft["loss"], 6),
        "difference": abs(loss - in_peft["loss"]),
        "loss_evaluated_over_int8": round(over_int8, 6),
    }


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--bundle-fp32", type=Path, help="with a head of fp32: all cases with wire fp32, too")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=48, help="held-out ones")
    return parser.parse_args()


if __name__ == "__main__":
    main()
