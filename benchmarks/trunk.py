"""Blocks on the device: how long a step takes, what the device's process needs, and what crosses in a whole run.

``step``: the device's step and a split step with all of q, v active take turns in one run on the same batches; medians.
``answers``: processor time of a device's steps on first texts of three sets, where adapters act on answers only: in the
first epoch, and in the second, with keys and values of what comes before kept; against steps over all rows.
``memory``: the peak of a real ``dlora-edge train``. ``traffic``: of a real run of three epochs, against the formula of
all-active q, v. What has to be reached is written into docs/log/benchmarks/trunk.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from bars import Entry, at_least, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser, run_json
from economy_data import load
from economy_recipes import BASELINE, DEFAULT, RECIPES, Recipe, train_config
from economy_trunk import new_source

from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.files import write_atomically
from dlora.edge.model.cached_source import texts_of
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide, ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapters import AdapterSpec, crossings
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups
from dlora.protocol.traffic import micro_batch_traffic
from dlora.protocol.wire_codecs import Codecs

COMMAND: Final = "python benchmarks/trunk.py"
FILE: Final = Path("benchmarks") / "trunk.json"
MEMORY_FILE: Final = Path("benchmarks") / "trunk-memory.json"
"""In docs: the peak of a device's process that trains each of ``OPTIONS_OF``."""
LR: Final = 2e-3
TRUNK_BLOCKS: Final = 12  # two fifths of the model's
OPTIONS_OF: Final[dict[str, tuple[str, ...]]] = {
    BASELINE: ("--kind", "lora", "--active-fraction", "1"),
    DEFAULT: ("--kind", "bottleneck"),
    **{
        f"trunk-{blocks}-r{rank}": ("--device-blocks", str(blocks), "--rank", str(rank), "--alpha", str(2 * rank))
        for rank in (8, 16)
        for blocks in (4, 8, 12)
    },
}
"""Of ``dlora-edge train``, by recipe."""


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    result: dict[str, Any] = {"threads": options.threads, "blocks": options.blocks, "tokens": options.tokens}
    with cloud_server(options.model, options.threads) as url:
        for part in options.only:
            log(f"{part} …")
            result[part] = MEASURES[part](url, options)
            write_bars(options.docs / FILE, _bars(result))
    print(json.dumps(result, indent=1))


# -- a step ----------------------------------------------------------------------------------------------


def _step(url: str, options: argparse.Namespace) -> dict[str, Any]:
    bundle = Bundle.open(need_bundle(options.bundle))
    manifest, length = bundle.manifest, options.tokens // options.batch_size
    ids = np.random.default_rng(0).integers(0, manifest.base_model.vocabulary_size, (8 * options.batch_size, length))
    first = round(length * (1 - options.labelled))
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, length - 1))) for row in ids])
    engine, seconds = OnnxEngine(bundle, options.threads), dict[str, list[float]]()
    all_linear = {"rank": 8, "lora_alpha": 16.0, "target_modules": ("all-linear",)}
    on_device = _config(manifest, options, Recipe("on the device", all_linear, device_blocks=options.blocks))
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(new_source(bundle, engine, url, on_device, Path(directory) / "cache")) as source,
        Connection(url) as connection,
    ):
        source.fill(texts_of(dataset))
        device = Trainer(bundle, engine, partial(DeviceSide, source=source), on_device, dataset)
        side, of_all = partial(ServerSide, connection=connection), _config(manifest, options, RECIPES[BASELINE])
        split = Trainer(bundle, OnnxEngine(bundle, options.threads), side, of_all, dataset)
        for step in range(options.warmup + options.steps):
            for name, trainer in (("device", device), ("split_all", split)):
                step_s = trainer.run_step().step_s
                log(f"step {step}: {name} {step_s:.3f} s")
                if step >= options.warmup:
                    seconds.setdefault(name, []).append(step_s)
    return {"step_s": {name: statistics.median(each) for name, each in seconds.items()}, "tokens": options.tokens}


def _config(
    manifest: Manifest, options: argparse.Namespace, recipe: Recipe, invocation: tuple[int, ...] = ()
) -> Resolved:
    optimizer = {"lr": LR, "schedule": "constant", "warmup": 0.0}
    return train_config(
        recipe, manifest, steps=1000, batch_size=options.batch_size, seed=0, optimizer=optimizer, invocation=invocation
    )


def _answers(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """By set: seconds of the processor a step of all rows, of answers' rows, and of these with what is before kept."""
    bundle, found = Bundle.open(need_bundle(options.bundle)), dict[str, Any]()
    tokenizer = EdgeTokenizer.open(bundle)
    batches = argparse.Namespace(**vars(options) | {"batch_size": 8})
    for name in ("b10", "b20", "dialogue"):
        data = load(name, options.data, options.work, tokenizer)
        dataset = data.train.subset(range(options.texts))
        invocation = find_invocation(data.train)
        rows = [len(example.crossing_rows) for example in dataset.acting_on_answers(invocation)]
        seconds: dict[str, list[float]] = {}
        all_linear = {"rank": 8, "lora_alpha": 16.0, "target_modules": ("all-linear",)}
        engine = OnnxEngine(bundle, options.threads)
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            trainers = {}
            for where in ("start", "answer"):
                recipe = Recipe(where, all_linear | {"adapt": where}, device_blocks=TRUNK_BLOCKS)
                acts = invocation if where == "answer" else ()
                config = _config(bundle.manifest, batches, recipe, acts)
                if acts:
                    config = msgspec.structs.replace(config, keeps_outputs=True)
                source = stack.enter_context(closing(new_source(bundle, engine, url, config, Path(directory) / where)))
                source.fill(texts_of(dataset))
                side = partial(DeviceSide, source=source)
                trainers[where] = Trainer(bundle, engine, side, config, dataset)
            an_epoch = trainers["start"].batches.steps_per_epoch
            for step in range(2 * an_epoch):
                for where, trainer in trainers.items():
                    before = time.process_time()
                    trainer.run_step()
                    spent = time.process_time() - before
                    is_kept = where == "answer" and step >= an_epoch
                    seconds.setdefault("kept" if is_kept else where, []).append(spent)
        means = {each: statistics.mean(values) for each, values in seconds.items()}
        log(f"{name}: " + ", ".join(f"{each} {value:.3f} s" for each, value in means.items()))
        found[name] = {"cpu_s": means, "acting": sum(rows) / dataset.tokens, "tokens": dataset.tokens}
    return found


# -- whole runs --------------------------------------------------------------------------------------------


def _memory(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of the device's process in MB, by how its blocks are stored, and by recipe."""
    texts = [" ".join(["word"] * (options.tokens // options.batch_size - 1))] * 40

    def peak_mb(bundle: Path, *how: str) -> float:
        return float(_train(url, bundle, texts, options, *how, "--steps", "12")["peak_rss_mb"])

    bundles = {"fp16": options.bundle, "int8": options.int8_bundle, "int4": options.int4_bundle}
    found: dict[str, Any] = {
        dtype: peak_mb(bundle, "--device-blocks", str(options.blocks)) for dtype, bundle in bundles.items()
    }
    found["recipes"] = {name: peak_mb(options.bundle, *how) for name, how in OPTIONS_OF.items()}
    write_atomically(options.docs / MEMORY_FILE, (json.dumps(found["recipes"], indent=1) + "\n").encode())
    return found


def _traffic(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a whole run of three epochs, and those of all-active LoRA on q, v by the formula."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "me"]
    texts = [" ".join(rng.choice(words, int(rng.integers(20, 60)))) for _ in range(40)]
    found: dict[str, Any] = {}
    for dtype in ("fp16", "int8"):
        how = ("--device-blocks", str(options.blocks), "--epochs", "3", "--wire-dtype", dtype)
        summary = _train(url, options.bundle, texts, options, *how)
        total = summary["set_up_bytes_up"] + summary["set_up_bytes_down"]
        found[dtype] = {
            "bytes": total,
            "bytes_after_the_cache_is_full": summary["bytes_up"] + summary["bytes_down"] - total,
            "bytes_per_token": total / summary["tokens"],
            "round_trips_per_step": summary["round_trips"] / summary["steps"],
            "tokens": summary["tokens"],
        }
    found["all_active_bytes_per_token"] = _all_active(Bundle.open(options.bundle).manifest, 160, 4)
    return found


def _all_active(manifest: Manifest, tokens: int, sequences: int) -> float:
    """Bytes a token of LoRA on q, v in all blocks, fp16, by docs/reference/protocol.md's formula."""
    groups, base = choose_groups(manifest, ("q_proj", "v_proj")), manifest.base_model
    everything = range(len(groups))
    traffic = micro_batch_traffic(
        crossings(AdapterSpec(r=8), groups), live=everything, with_grads=everything, answered=everything[1:],
        tokens=tokens, sequences=sequences, labelled=tokens - sequences, embedding_size=base.embedding_size,
        hidden_size=base.hidden_size, codecs=Codecs.all("fp16"),
    )  # fmt: skip
    return (traffic.bytes_up + traffic.bytes_down) / tokens


def _train(url: str, bundle: Path, texts: list[str], options: argparse.Namespace, *how: str) -> dict[str, Any]:
    """A real run's summary. ``how``: what is trained where."""
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        # No two alike: a text is asked for once.
        data.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n, text in enumerate(texts)))
        started = time.perf_counter()
        summary = run_json(
            "-m", "dlora.edge", "train", *how, "--bundle", need_bundle(bundle), "--server", url, "--data", data,
            "--hold-out", 0, "--out", f"{directory}/out", "--batch-size", options.batch_size, "--lr", LR,
            "--threads", options.threads, "--seed", 0, "--json",
        )  # fmt: skip
        log(f"{' '.join(how)}: {time.perf_counter() - started:.0f} s")
        return summary


def _bars(result: dict[str, Any]) -> dict[str, Entry]:
    bars: dict[str, Entry] = {}
    threads = f" --threads {result['threads']}" if result["threads"] != 1 else ""

    def command(part: str) -> str:
        return f"{COMMAND} --only {part}{threads}"

    if step := result.get("step"):
        seconds = step["step_s"]
        bars["split_step"] = at_least(5, seconds["split_all"] / seconds["device"], command("step"))
    if answers := result.get("answers"):
        of_sets = [each["cpu_s"] for each in answers.values()]
        all_rows = sum(each["start"] for each in of_sets)
        for name, what, bar in (("cpu_answers", "answer", 0.65), ("cpu_answers_kept", "kept", 0.40)):
            bars[name] = at_most(bar, sum(each[what] for each in of_sets) / all_rows, command("answers"))
    if memory := result.get("memory"):
        for dtype, bar in (("fp16", 300), ("int8", 250)):
            bars[f"peak_rss_{dtype}"] = at_most(bar, memory[dtype], command("memory"))
    if traffic := result.get("traffic"):
        for dtype, bar in (("fp16", 0.99), ("int8", 0.995)):
            saved = 1 - traffic[dtype]["bytes_per_token"] / traffic["all_active_bytes_per_token"]
            bars[f"traffic_{dtype}"] = at_least(bar, saved, command("traffic"))
            after = traffic[dtype]["bytes_after_the_cache_is_full"]
            bars[f"bytes_after_{dtype}"] = at_most(0, after, command("traffic"))
    return bars


MEASURES: Final = {"step": _step, "answers": _answers, "memory": _memory, "traffic": _traffic}


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__, bundle="build/smollm2-blocks", threads=1)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--int8-bundle", type=Path, default=Path("build/smollm2-blocks-int8"))
    parser.add_argument("--int4-bundle", type=Path, default=Path("build/smollm2-blocks-int4"))
    parser.add_argument("--blocks", type=int, default=4, help="on the device")
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of tokens that are labels, in step")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--texts", type=int, default=64, help="of each set, in answers")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DLORA_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/trunk"), help="for what several runs use")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
