"""Blocks on the device: how long a step takes, what the device's process needs, and what crosses in a whole run.

``step``: the device's step, torch's with the same blocks in one process, and a split step with all of q, v active
take turns in one run on the same batches; medians. ``memory``: the peak of a real ``dlora-edge train``. ``traffic``:
of a real run of three epochs, against the formula of all-active q, v. What has to be reached is written into
docs/log/benchmarks/trunk.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from bars import Entry, at_least, at_most, write_bars
from children import QUIET_THREADS, Worker, cloud_server, log, need_bundle, run_json

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from trunk_recipes import MEMORY_FILE, OPTIONS_OF
from trunk_trainers import LR, random_tokens, split_config, trunk_config, trunk_source

from dlora.edge.data.batches import pack
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.files import write_atomically
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.cached_source import texts_of
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
PARTS: Final = ("step", "memory", "traffic")


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    result: dict[str, Any] = {"threads": options.threads, "blocks": options.blocks, "tokens": options.tokens}
    with cloud_server(options.model, options.threads) as (url, _):
        for part in options.only:
            log(f"{part} …")
            result[part] = MEASURES[part](url, options)
            write_bars(options.docs / FILE, _bars(result))
    print(json.dumps(result, indent=1))


# -- a step ----------------------------------------------------------------------------------------------


def _step(url: str, options: argparse.Namespace) -> dict[str, Any]:
    bundle = Bundle.open(need_bundle(options.bundle))
    ids, first = random_tokens(bundle.manifest, options, 8 * options.batch_size)
    length = ids.shape[1]
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, length - 1))) for row in ids])
    torch = Worker(
        str(Path(__file__).with_name("torch_blocks.py")), options.model, str(options.threads), str(options.blocks), "8",
        "16.0", str(LR),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"device": [], "torch": [], "split_all": []}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        engine = OnnxEngine(bundle, options.threads)
        source = trunk_source(bundle, engine, url, Path(directory) / "cache", options.blocks)
        stack.callback(source.close)
        config = trunk_config(bundle.manifest, options, options.blocks)
        device = Trainer(bundle, engine, partial(DeviceSide, source=source), config, dataset)
        source.fill(texts_of(dataset))
        connection = stack.enter_context(Connection(url))
        side, config = partial(ServerSide, connection=connection), split_config(bundle.manifest, options)
        split = Trainer(bundle, OnnxEngine(bundle, options.threads), side, config, dataset)
        for step in range(options.warmup + options.steps):
            chosen = device.batches.step_indices(step)
            # As many tokens for torch, which runs the last one, too.
            batch = pack([dataset[int(index)] for index in chosen]).until_last_label()
            hidden = source.hidden_states(batch).reshape(len(chosen), -1, encoded_width(bundle.manifest))
            hidden = np.concatenate([hidden, hidden[:, -1:]], axis=1)
            np.save(file := Path(directory) / "hidden.npy", hidden)
            labels = np.where(np.arange(length) >= first, ids[chosen], -100)
            found = torch.ask({"hidden_states": str(file), "labels": labels.tolist()})
            taken = {"device": device.run_step(), "split_all": split.run_step()}
            if step == 0:
                losses = {"device": taken["device"].loss, "torch": found["loss"]}
            if step >= options.warmup:
                seconds["torch"].append(found["step_s"])
                for name, metrics in taken.items():
                    seconds[name].append(metrics.step_s)
            log(f"step {step}: torch {found['step_s']:.3f} s, " + ", ".join(
                f"{name} {metrics.step_s:.3f} s" for name, metrics in taken.items()
            ))
    torch.close()
    return {
        "step_s": {name: statistics.median(each) for name, each in seconds.items()},
        "loss_of_step_0": losses,
        "tokens": options.tokens,
    }


# -- whole runs --------------------------------------------------------------------------------------------


def _memory(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of the device's process in MB, by how its blocks are stored, and by recipe."""
    texts = [" ".join(["word"] * (options.tokens // options.batch_size - 1))] * 40
    steps = ("--steps", "12")
    found: dict[str, Any] = {
        dtype: _train(url, options.bundles[dtype], texts, options, *steps)["peak_rss_mb"]
        for dtype in ("fp16", "int8", "int4")
    }
    found["recipes"] = {
        name: _train(url, options.bundle, texts, options, *steps, how=how)["peak_rss_mb"]
        for name, how in OPTIONS_OF.items()
    }
    write_atomically(options.docs / MEMORY_FILE, (json.dumps(found["recipes"], indent=1) + "\n").encode())
    return found


def _traffic(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a whole run of three epochs, and those of all-active LoRA on q, v by the formula."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "me"]
    texts = [" ".join(rng.choice(words, int(rng.integers(20, 60)))) for _ in range(40)]
    found: dict[str, Any] = {}
    for dtype in ("fp16", "int8"):
        summary = _train(url, options.bundle, texts, options, "--epochs", "3", "--wire-dtype", dtype)
        total = summary["set_up_bytes_up"] + summary["set_up_bytes_down"]
        found[dtype] = {
            "bytes": total,
            "bytes_after_the_cache_is_full": summary["bytes_up"] + summary["bytes_down"],
            "bytes_per_token": total / summary["tokens"],
            "round_trips_per_step": summary["round_trips"] / summary["steps"],
            "tokens": summary["tokens"],
        }
    found["all_active_bytes_per_token"] = _all_active(Bundle.open(options.bundle).manifest, 160, 4)
    return found


def _all_active(manifest: Manifest, tokens: int, sequences: int) -> float:
    """Bytes a token of LoRA on q, v in all blocks, fp16, by docs/reference/protocol.md's formula."""
    groups = choose_groups(manifest, ("q_proj", "v_proj"))
    everything = range(len(groups))
    base = manifest.base_model
    traffic = micro_batch_traffic(
        crossings(AdapterSpec(r=8), groups),
        live=everything,
        with_grads=everything,
        answered=everything[1:],
        tokens=tokens,
        sequences=sequences,
        labelled=tokens - sequences,
        embedding_size=base.embedding_size,
        hidden_size=base.hidden_size,
        codecs=Codecs.all("fp16"),
    )
    return (traffic.bytes_up + traffic.bytes_down) / tokens


def _train(
    url: str,
    bundle: Path,
    texts: list[str],
    options: argparse.Namespace,
    *more: str,
    how: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A real run's summary. ``how``: what is trained where; else blocks on the device as ``options`` say."""
    where = how or ("--device-blocks", options.blocks)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        # No two alike: a text is asked for once.
        data.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n, text in enumerate(texts)))
        started = time.perf_counter()
        summary = run_json(
            "-m", "dlora.edge", "train", *where, "--bundle", need_bundle(bundle), "--server", url, "--data", data,
            "--hold-out", 0, "--out", f"{directory}/out", "--batch-size", options.batch_size, "--lr", LR,
            "--threads", options.threads, "--seed", 0, "--json", *more,
        )  # fmt: skip
        log(f"{' '.join(how + more)}: {time.perf_counter() - started:.0f} s")
        return summary


def _bars(result: dict[str, Any]) -> dict[str, Entry]:
    bars: dict[str, Entry] = {}
    threads = f" --threads {result['threads']}" if result["threads"] != 1 else ""

    def command(part: str) -> str:
        return f"{COMMAND} --only {part}{threads}"

    if step := result.get("step"):
        seconds = step["step_s"]
        bars["step_of_torch"] = at_most(1.3, seconds["device"] / seconds["torch"], command("step"))
        bars["split_step"] = at_least(5, seconds["split_all"] / seconds["device"], command("step"))
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


MEASURES: Final = {"step": _step, "memory": _memory, "traffic": _traffic}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2-blocks"))
    parser.add_argument("--int8-bundle", type=Path, default=Path("build/smollm2-blocks-int8"))
    parser.add_argument("--int4-bundle", type=Path, default=Path("build/smollm2-blocks-int4"))
    parser.add_argument("--blocks", type=int, default=4, help="on the device")
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--labelled", type=float, default=1 / 3, help="share of tokens that are labels, in step")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, default=Path("docs/log"))
    options = parser.parse_args()
    options.bundles = {"fp16": options.bundle, "int8": options.int8_bundle, "int4": options.int4_bundle}
    return options


if __name__ == "__main__":
    main()
