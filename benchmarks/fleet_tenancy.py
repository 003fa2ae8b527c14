"""Eight devices that share one base model, and eight PEFT processes that hold one each: a part of fleet.py.

Both train on the same rows of real dialogue, all of one length, so that PEFT pads none, and every process computes with
one thread: a second one waits for the first more than it helps, at matrices of this size. Memory is the sum of the
proportional set sizes (PSS) of the server and all devices, and of all PEFT processes; processor time is theirs as well.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from bars import Entry, at_least, at_most
from children import cloud_process, cpu_seconds, log, pss_mb, worker
from economy_data import write_dialogue
from fleet_replicas import LONG_S, Command, check_devices, end_device, spawn_command, steps_done

from dlora.edge.adapters.peft import WEIGHTS_NAME
from dlora.edge.data.batches import Batches
from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle

DEVICES: Final = 8
STEPS: Final = 10
BATCH_SIZE: Final = 4
TOKENS: Final = (48, 64)
"""Between these the rows' length is chosen: the one that most rows have."""
MEMORY: Final = {"float32": 0.27, "bfloat16": 0.25}
"""What all devices and their server may take of the memory of PEFT's processes."""
SAMPLE_S: Final = 0.5
FREED_S: Final = 30.0


@dataclass(frozen=True)
class Rows:
    """What is trained on, as the file that devices read and as tokens."""

    path: Path
    dataset: Dataset

    @property
    def tokens_a_step(self) -> int:
        return BATCH_SIZE * int(self.dataset.lengths[0])


def choose_rows(bundle: Bundle, directory: Path) -> Rows:
    """The rows of the demo's dialogue that have one length in tokens, as many as fill whole steps."""
    everything, _ = write_dialogue(directory, 64, 0)
    tokenizer = EdgeTokenizer.open(bundle)
    lengths = load_examples(everything, tokenizer, max_length=512).lengths
    length = Counter(lengths[(lengths >= TOKENS[0]) & (lengths <= TOKENS[1])].tolist()).most_common(1)[0][0]
    lines = [line for line, each in zip(everything.read_text().splitlines(), lengths, strict=True) if each == length]
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines[: len(lines) // BATCH_SIZE * BATCH_SIZE]))
    return Rows(path, load_examples(path, tokenizer, max_length=512))


def measure(directory: Path, model: str, bundle: Path, dtype: str) -> dict[str, Any]:
    """One after the other: each device alone, all at once, and PEFT."""
    directory.mkdir()
    opened = Bundle.open(bundle)
    rows = choose_rows(opened, directory)
    log(f"{dtype}: {len(rows.dataset)} rows of {rows.tokens_a_step // BATCH_SIZE} tokens")
    with cloud_process(model, 1, "--dtype", dtype) as (url, server):

        def start(name: str, number: int) -> Command:
            return _start_device(directory / name, bundle, url, rows.path, number)

        pss = [pss_mb(server)]
        for number in range(DEVICES):
            end_device(start(f"alone-{number}", number))
            if not number:
                time.sleep(FREED_S)
                pss.append(pss_mb(server))
        devices = [start(f"device-{number}", number) for number in range(DEVICES)]
        outs = [directory / f"device-{number}" for number in range(DEVICES)]
        ours = _watch(lambda: [steps_done(out) for out in outs], rows, lambda: check_devices(devices))
        for device in devices:
            end_device(device)
        time.sleep(FREED_S)
        pss.append(pss_mb(server))
    equal = sum(_weights(out) == _weights(directory / f"alone-{n}") for n, out in enumerate(outs))
    theirs = _measure_peft(model, opened, rows, dtype)
    return {
        "tokens_a_step": rows.tokens_a_step, "dlora": ours, "peft": theirs, "as_alone": equal,
        "memory": ours["pss_mb"] / theirs["pss_mb"], "speed": ours["tokens_a_cpu_s"] / theirs["tokens_a_cpu_s"],
        "server_mb": dict(zip(("before", "after_one", "after_all"), pss, strict=True)),
        "server_after": pss[2] / pss[1],
    }  # fmt: skip


def bars(dtype: str, found: dict[str, Any], command: str) -> dict[str, Entry]:
    """The fifth of the issue's."""
    name = f"tenancy, {dtype}"
    return {
        f"{name}: memory of 8 devices and their server, of 8 PEFT processes": at_most(
            MEMORY[dtype], found["memory"], command
        ),
        f"{name}: tokens a CPU second, to PEFT": at_least(1, found["speed"], command),
        f"{name}: the server's memory when all have gone, to after the first": at_most(
            1.05, found["server_after"], command
        ),
        f"{name}: adapters that are those of a device alone, of 8": at_least(DEVICES, found["as_alone"], command),
    }


def _start_device(out: Path, bundle: Path, url: str, data: Path, number: int) -> Command:
    """The default, but for a data set that is too small to hold rows out."""
    options = [
        "train", "--bundle", bundle, "--server", url, "--data", data, "--out", out, "--steps", STEPS,
        "--batch-size", BATCH_SIZE, "--seed", number, "--hold-out", 0, "--threads", 1,
    ]  # fmt: skip
    return spawn_command("edge", options, out.with_suffix(".log"))


def _measure_peft(model: str, bundle: Bundle, rows: Rows, dtype: str) -> dict[str, float]:
    defaults = bundle.manifest.defaults
    lora = (",".join(defaults.target_modules), defaults.r, defaults.lora_alpha, 1e-3, dtype)
    done = [0] * DEVICES

    def train(number: int, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        batches = Batches(rows.dataset, BATCH_SIZE, 1, (number,))
        for step in range(STEPS):
            (batch,) = batches.step_batches(step)
            ids = batch.ids.reshape(BATCH_SIZE, -1)
            labels = np.full(batch.ids.size, -100)
            labels[batch.label_positions + 1] = batch.labels
            ask({"ids": ids.tolist(), "labels": labels.reshape(ids.shape).tolist()})
            done[number] += 1

    with ExitStack() as stack, ThreadPoolExecutor(DEVICES) as pool:
        asks = [stack.enter_context(worker("peft_process.py", model, 1, *lora)) for _ in range(DEVICES)]
        training = [pool.submit(train, number, ask) for number, ask in enumerate(asks)]

        def check() -> None:
            for each in training:
                if each.done():
                    each.result()

        return _watch(lambda: list(done), rows, check)


def _watch(done: Callable[[], list[int]], rows: Rows, check: Callable[[], None]) -> dict[str, float]:
    """Of all child processes, from when each has done a step until the first has one to do: the highest and the median
    sum of their memory, and tokens a second of processor time."""
    until = time.monotonic() + LONG_S
    while min(done()) < 1:
        check()
        if time.monotonic() > until:
            raise SystemExit("error: nobody trains")
        time.sleep(0.1)
    processes, steps = psutil.Process().children(recursive=True), sum(done())
    began, sums = sum(cpu_seconds(each.pid) for each in processes), []
    while max(done()) < STEPS - 1:
        check()
        sums.append(sum(pss_mb(each.pid) for each in processes))
        time.sleep(SAMPLE_S)
    steps, used = sum(done()) - steps, sum(cpu_seconds(each.pid) for each in processes) - began
    found = {
        "pss_mb": max(sums), "median_pss_mb": float(np.median(sums)), "steps": steps, "cpu_s": used,
        "tokens_a_cpu_s": steps * rows.tokens_a_step / used, "processes": len(processes),
    }  # fmt: skip
    log(json.dumps(found))
    return found


def _weights(out: Path) -> bytes:
    return (out / WEIGHTS_NAME).read_bytes()
