"""What models of real sizes take of a device, a server and an export: memory, processor, disk and wire.

Weights are random (``shape_models.py``): what is measured does not depend on their values, and losses are not shown.
Each size: an export, the server at rest and in a step, the device's process tree at its cold start, in training and
while it saves, with the default and with two fifths of the blocks on the device (``trunk``), and an answer. Beside them
is what ``dlora-edge plan`` reckons. Prints one JSON object and puts bars into ``docs/log/benchmarks/shapes.json``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from bars import Entry, at_least, at_most, write_bars
from children import cloud_process, log, new_parser, write_texts
from process_tree import Ran, run_measured, sample_tree
from shape_models import SHAPES, Shape, make_model, weight_bytes

TOKENS: Final = 128  # of a sequence; two are a step
STEPS: Final = 4
ANSWER_TOKENS: Final = 32
CGROUPS: Final = Path("/sys/fs/cgroup/memory")
DEVICE_MB: Final = {("llama-3.1-8b", "int8"): 850, ("llama-3.1-8b", "int4"): 600,
                    ("llama-3.2-1b", "int8"): 480, ("llama-3.2-1b", "int4"): 350}  # fmt: skip
ADAPTER_MB: Final = 130
READ_A_STEP_MB: Final = 1.0  # rows of the table that no step before had: nothing is read twice
LOW, HIGH = 1.0, 1.45  # plan's estimate over what is measured: it is meant to be a little high
ENDS: Final = {"int8": ("--head-dtype", "int8"), "int4": ("--head-dtype", "int4", "--embedding-dtype", "int4")}
TRAINING: Final = (
    "--steps", STEPS, "--batch-size", 2, "--max-length", TOKENS, "--too-long", "truncate", "--seed", 0, "--lr", 1e-3,
    "--json",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A size that is measured: its model, and where what is made of it lies."""

    name: str
    shape: Shape
    work: Path
    data: Path
    threads: int

    @property
    def model(self) -> Path:
        return self.work / self.name


def main() -> None:
    """Print one JSON object."""
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, help="where models are made; by default a folder that is removed")
    parser.add_argument("--only", help=f"sizes, separated by commas: {', '.join(SHAPES)}")
    parser.add_argument("--keep", action="store_true", help="models stay in --work")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(SHAPES)
    command = "python benchmarks/shapes.py" + (f" --only {options.only}" if options.only else "")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.jsonl"
        write_texts(data)
        for name in names:
            place = Place(name, SHAPES[name], options.work or Path(folder), data, options.threads)
            log(f"{place.shape.title}: {weight_bytes(place.shape) / 1e9:.2f} GB")
            problem = _no_room(place)
            found[name] = {"not_run": problem} if problem else _measure(place, keep=options.keep)
            write_bars(options.docs / "benchmarks" / "shapes.json", _bars(name, found[name], command))
    print(json.dumps(found, indent=1))


def _no_room(place: Place) -> str:
    """Why a size cannot be measured here; empty where it can."""
    needed = 1.3 * weight_bytes(place.shape)
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(place.work.parent).free
    if memory < needed:
        return f"{needed / 1e9:.1f} GB of memory are needed, {memory / 1e9:.1f} are free"
    if disk < 1.5 * needed:
        return f"{1.5 * needed / 1e9:.1f} GB of disk are needed, {disk / 1e9:.1f} are free"
    return ""


def _measure(place: Place, *, keep: bool) -> dict[str, Any]:
    make_model(place.shape, place.model)
    found: dict[str, Any] = {"files_mb": round(weight_bytes(place.shape) / 1e6, 1)}
    blocks = math.ceil(0.4 * place.shape.config["num_hidden_layers"])
    bundles = {ends: place.work / f"{place.name}-{ends}" for ends in ENDS}
    trunk = place.work / f"{place.name}-trunk"
    kept = place.work / f"{place.name}.json"  # so that an hour's work is not done again
    found |= json.loads(kept.read_text()) if kept.exists() else {}

    def once(name: str, measure: Callable[..., Any], *arguments: Any) -> None:
        if name not in found:
            found[name] = measure(*arguments)
            kept.write_text(json.dumps(found))

    try:
        for ends, bundle in bundles.items():
            once(f"export_{ends}", _export, place, bundle, *ENDS[ends])
        of_trunk = "--device-blocks", blocks, "--block-dtype", "int4"
        once("export_trunk", _export, place, trunk, *ENDS["int4"], *of_trunk)
        with _server(place) as (url, server):
            once("server_rest_mb", _settled, server)
            for ends, bundle in bundles.items():
                once(f"device_{ends}", _train, place, bundle, url, server)
            once("device_executorch", _on_executorch, place, url, server)
            once("answer", _answer, place, bundles["int4"], url)
            once("trunk", _train, place, trunk, url, server, *of_trunk[:2])
            for ends in ENDS:
                if place.name == "llama-3.2-1b":
                    limit = DEVICE_MB[place.name, ends] * 1.1
                    once(f"in_cgroup_{ends}", _train_in_cgroup, place, bundles[ends], url, limit)
    except BaseException:
        log(f"  what is measured so far is kept in {kept}, and {place.name} goes on from there with the same --work")
        raise
    for path in (*bundles.values(), trunk, *([] if keep else [place.model])):
        shutil.rmtree(path, ignore_errors=True)
    kept.unlink()
    return {**found, "trunk_blocks": blocks}


def _export(place: Place, bundle: Path, *options: object) -> dict[str, float]:
    log(f"  exporting {' '.join(map(str, options))}")
    command = [sys.executable, "-m", "dlora.export", place.model, "--out", bundle, "--force", "--json", *options]
    ran = run_measured(command)
    peak = ran.peak()
    return {
        "peak_mb": round(peak.pss_mb, 1),
        "peak_anonymous_mb": round(max(each.anonymous_mb for each in ran.samples), 1),
        "seconds": round(ran.ended - ran.began, 1),
        "bundle_mb": round(_size_mb(bundle), 1),
    }


@contextmanager
def _server(place: Place) -> Iterator[tuple[str, int]]:
    log("  starting the server")
    # A session sketches its data while it is set up: of an 8B model 2 GB of the server's memory.
    most = round((psutil.virtual_memory().total - weight_bytes(place.shape)) / 2e6)
    limits = "--live-mb", str(most), "--quota-live-mb", str(most)
    with cloud_process(str(place.model), place.threads, "--dtype", "bfloat16", *limits) as server:
        yield server


def _settled(server: int) -> float:
    time.sleep(2)
    sample = sample_tree(server)
    assert sample is not None
    return round(sample.pss_mb, 1)


def _train(place: Place, bundle: Path, url: str, server: int, *options: object, engine: str = "onnx") -> dict[str, Any]:
    log(f"  training with {bundle.name}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = _train_command(place, bundle, url, out, *options, "--engine", engine)
        highest, ran = _with_server(server, command)
        set_up, training, saving = (
            ran.time_of("adapters: "), ran.time_of("held-out loss before"), ran.time_of("step ", last=True)
        )  # fmt: skip
        summary = json.loads(ran.output)
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokens, labelled = (sum(step[name] for step in steps) for name in ("tokens", "labelled"))
        return {
            "cold_start_s": round(set_up - ran.began, 1),
            "cold_start_mb": round(ran.peak(end=set_up).pss_mb, 1),
            "training_mb": round(ran.peak(set_up, saving).pss_mb, 1),
            "training_anonymous_mb": round(_most_anonymous(ran, set_up, saving), 1),
            "saving_mb": round(ran.peak(saving).pss_mb, 1),
            "before_step_0_s": round(training - set_up, 1),
            "step_s": round(sum(step["step_s"] for step in steps) / len(steps), 2),
            "device_cpu_ms_a_labelled_row": round(1e3 * sum(step["edge_compute_s"] for step in steps) / labelled, 2),
            "server_mb": round(highest, 1),
            "bytes_a_token": round(sum(step["bytes_up"] + step["bytes_down"] for step in steps) / tokens, 1),
            "set_up_mb": round((summary["set_up_bytes_up"] + summary["set_up_bytes_down"]) / 1e6, 1),
            "round_trips_a_step": round(sum(step["round_trips"] for step in steps) / len(steps), 1),
            "bundle_mb": round(_size_mb(bundle), 1),
            "adapter_mb": round((out / "adapter_model.safetensors").stat().st_size / 1e6, 1),
            "parts_mb": round(_file_mb(out / "adapter_parts.safetensors"), 1),
            "plan_mb": _planned(place, bundle, *options),
        }


def _on_executorch(place: Place, url: str, server: int) -> dict[str, Any]:
    """The same as with the int8 head on ONNX Runtime, or why not."""
    bundle = place.work / f"{place.name}-executorch"
    try:
        command = [sys.executable, "-m", "dlora.export", place.model, "--out", bundle, "--force", *ENDS["int8"]]
        log("  exporting for ExecuTorch")
        ran = run_measured([*command, "--engine", "executorch"], may_fail=True)
        if not ran.code:
            return _train(place, bundle, url, server, engine="executorch")
        return {"not_run": ran.lines[-1][1] if ran.lines else "the export failed"}
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


def _train_command(place: Place, bundle: Path, url: str, out: Path, *options: object) -> list[object]:
    return [
        sys.executable, "-m", "dlora.edge", "train", "--bundle", bundle, "--server", url, "--data", place.data,
        "--out", out, "--threads", place.threads, *TRAINING, *options,
    ]  # fmt: skip


def _with_server(server: int, command: list[object]) -> tuple[float, Ran]:
    """The most that the server takes while a command runs, and the command."""
    with suppress(OSError):
        Path(f"/proc/{server}/clear_refs").write_text("5")
    ran = run_measured(command)
    text = Path(f"/proc/{server}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6, ran


def _most_anonymous(ran: Ran, begin: float, end: float) -> float:
    return max((each.anonymous_mb for each in ran.samples if begin <= each.at <= end), default=0.0)


def _planned(place: Place, bundle: Path, *options: object) -> float:
    """What ``plan`` says of the device's memory in such a run."""
    command = [
        sys.executable, "-m", "dlora.edge", "plan", "--bundle", bundle, "--data", place.data, "--batch-size", 2,
        "--max-length", TOKENS, "--too-long", "truncate", "--steps", STEPS, "--json",
    ]  # fmt: skip
    rows = json.loads(run_measured(command, may_fail=True).output)["rows"]
    blocks = options[1] if options else 0
    return float(next(row["peak_mb"] for row in rows if row["device_blocks"] == blocks))


def _answer(place: Place, bundle: Path, url: str) -> dict[str, float]:
    log("  answering")
    command = [
        sys.executable, "-m", "dlora.edge", "generate", "--bundle", bundle, "--server", url, "--prompt", "Hello",
        "--no-chat-template", "--max-new-tokens", ANSWER_TOKENS, "--threads", place.threads, "--json",
    ]  # fmt: skip
    ran = run_measured(command)
    result = json.loads(ran.output)
    return {
        "device_mb": round(ran.peak().pss_mb, 1),
        "tokens_a_second": round((result["tokens"] - 1) / (result["seconds"] - result["first_token_s"]), 2),
        "bytes_a_token": round((result["bytes_sent"] + result["bytes_received"]) / result["tokens"], 1),
        "round_trips_a_token": round(result["round_trips"] / result["tokens"], 2),
    }


def _train_in_cgroup(place: Place, bundle: Path, url: str, limit_mb: float) -> dict[str, Any]:
    """A run whose memory, with the file cache that it fills, is limited; how much of the bundle it reads from disk."""
    group = CGROUPS / f"dlora-shapes-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(limit_mb * 1e6)))
    except OSError as error:
        return {"not_run": f"there is no memory cgroup (v1) to use: {error.strerror}"}
    log(f"  training within {limit_mb:.0f} MB, the file cache among them")
    try:
        for path in bundle.rglob("*.npy"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        with tempfile.TemporaryDirectory() as folder:
            ran = run_measured(_train_command(place, bundle, url, Path(folder) / "run"), cgroup=group)
            steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        most = int((group / "memory.max_usage_in_bytes").read_text()) / 1e6
        first, last = ran.time_of("step "), ran.time_of("step ", last=True)
        return {
            "limit_mb": round(limit_mb, 1),
            "most_mb": round(most, 1),
            "read_mb": round(ran.read_mb(), 1),
            "read_a_step_mb": round(ran.read_mb(first, last) / (STEPS - 1), 2),
            "bundle_mb": round(_size_mb(bundle), 1),
            "step_s": round(sum(step["step_s"] for step in steps) / len(steps), 2),
        }
    finally:
        group.rmdir()


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _file_mb(path: Path) -> float:
    return path.stat().st_size / 1e6 if path.exists() else 0.0


def _bars(name: str, found: dict[str, Any], command: str) -> dict[str, Entry]:
    if "not_run" in found:
        return {f"{name}_not_run": {"reason": found["not_run"], "command": command}}
    export = 1.2 * found["files_mb"] + 1000
    bars: dict[str, Entry] = {f"{name}_measured": {**found, "command": command}}
    bars[f"{name}_export_mb"] = at_most(export, found["export_int8"]["peak_mb"], command)
    for ends in ENDS:
        if (name, ends) in DEVICE_MB:
            value = found[f"device_{ends}"]["training_mb"]
            bars[f"{name}_device_{ends}_mb"] = at_most(DEVICE_MB[name, ends], value, command)
        within = found.get(f"in_cgroup_{ends}")
        if within is not None and "not_run" not in within:
            bars[f"{name}_read_a_step_{ends}_mb"] = at_most(READ_A_STEP_MB, within["read_a_step_mb"], command)
    ratios = [
        found[run]["plan_mb"] / found[run]["training_mb"] for run in (*(f"device_{ends}" for ends in ENDS), "trunk")
    ]
    bars[f"{name}_plan_lowest"] = at_least(LOW, min(ratios), command)
    bars[f"{name}_plan_highest"] = at_most(HIGH, max(ratios), command)
    if name == "llama-3.1-8b":
        bars["llama-3.1-8b_adapter_mb"] = at_most(ADAPTER_MB, found["device_int8"]["adapter_mb"], command)
    return bars


if __name__ == "__main__":
    main()
