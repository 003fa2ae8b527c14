"""The main job, end to end, on a real model and real text: export, serve, train, compare, load in PEFT.

Everything runs as a user would run it, in processes of its own; this file only starts them and reads what they
write. It leaves build/demo/summary.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from dialogue import write_dialogue
from rich.console import Console
from rich.table import Table

from dlora.edge.engine.bundle import Bundle
from dlora.edge.run.kr_map import render_map
from dlora.edge.run.run_file import load_run_file
from dlora.edge.training.metrics import StepMetrics, history, read_metrics
from dlora.protocol.adapters import AdapterSpec, crossings
from dlora.protocol.targets import choose_groups
from dlora.protocol.traffic import micro_batch_traffic
from dlora.protocol.wire_codecs import Codecs

OUT = Path("build/demo")
BUNDLE = OUT / "bundle"
ADAPTER = OUT / "adapter"
MODEL = "smollm2-135m"
QUESTION = "What is your favourite food?"
STEPS, BATCH_SIZE, HELD_OUT = 120, 8, 96
WIRE_DTYPE = "int8"
BENCHMARKED = Path("docs/log/benchmarks/economy-results.json")
# Names there. The savings are against the first: LoRA of the bundle's rank and modules, all active, fp16 on the wire,
# at the best rate of a grid; ours finds its rate, as the demo does.
COMPARED = {
    ("lora-qv-all", "chosen"): "all-active LoRA at its best rate",
    ("default", "default"): "this recipe with all its blocks active",
}
BIN = Path(sys.executable).parent
# Server and device share these cores; idle OpenMP threads would spin on them.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONWARNINGS": "ignore"}

console = Console(highlight=False)


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    _title("1", "Export", f"{MODEL} becomes a bundle: weights and graphs that a device trains with, each checked")
    _run("dlora-export", MODEL, "--out", str(BUNDLE), "--force")
    _title("2", "Data", "real English dialogue, which installs with a package; it never leaves the device")
    train, held_out = write_dialogue(OUT, HELD_OUT, seed=0)
    console.print(f"{train} and {held_out}: one question and its answer a line, loss on the answer")
    _title("3", "Serve", "the 30 frozen blocks, in a process of their own")
    with _server() as url:
        console.print(f"listening on {url}")
        ask = ["dlora-edge", "generate", "--bundle", str(BUNDLE), "--server", url, "--prompt", QUESTION]
        ask += ["--max-new-tokens", "24"]
        before = _output(*ask).strip()
        _title("4", "Train", "a device without torch: embedding, head, AdamW, small cores; half of them active")
        _forget(ADAPTER)
        _run(
            "dlora-edge", "train", "--bundle", str(BUNDLE), "--server", url, "--data", str(train),
            "--eval", str(held_out), "--out", str(ADAPTER), "--steps", str(STEPS), "--batch-size", str(BATCH_SIZE),
            "--kind", "bottleneck", "--rank", "96", "--blocks", "spread:8", "--active-from", "answer",
            "--wire-dtype", WIRE_DTYPE, "--active-fraction", "0.5", "--kr-score", "grad",
            "--set", "kill_revive.kill_every=10", "--set", "kill_revive.revive_every=20",
            "--set", "kill_revive.probation=10", "--kr-on-kill", "bypass", "--seed", "0",
            "--json", stdout=subprocess.DEVNULL,
        )  # fmt: skip
        after = _output(*ask, "--adapter", str(ADAPTER)).strip()
    _title("5", "Compare", "the same adapter, loaded by PEFT into the whole model in one process")
    trained = json.loads((ADAPTER / "summary.json").read_text())
    check = json.loads(_output("python", str(Path(__file__).with_name("peft_check.py")), *map(str, (
        MODEL, ADAPTER, BUNDLE, held_out
    ))))  # fmt: skip
    summary = _summary(trained, check, before, after, time.perf_counter() - started)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _show(summary)


def _summary(trained: dict[str, Any], check: dict[str, Any], before: str, after: str, wall_s: float) -> dict[str, Any]:
    rows = read_metrics(ADAPTER / "metrics.jsonl")
    fewest = min(row.active_units for row in rows)
    steady = [row for row in rows if row.active_units == fewest]  # the budget; killed units that go forward vary
    set_up = trained["set_up_bytes_up"] + trained["set_up_bytes_down"]

    def per_token(some: Sequence[StepMetrics], others: int = 0) -> float:
        return round((others + sum(row.bytes_up + row.bytes_down for row in some)) / _tokens(some), 1)

    return {
        "eval_loss_before": trained["eval_loss_before"],
        "eval_loss_after": trained["eval_loss_after"],
        "steps": trained["steps"],
        "wall_s": round(wall_s, 1),
        "train_wall_s": trained["wall_s"],
        "wire": {
            "dtype": WIRE_DTYPE,
            "bytes_per_token_steady": per_token(steady),
            "bytes_per_token_all_active": round(_all_active_lora_bytes(rows) / _tokens(rows), 1),
            "bytes_per_token_whole_run": per_token(rows, set_up),
            "round_trips_per_step": int(np.median([row.round_trips for row in steady])),
        },
        "edge": {"peak_rss_mb": trained["peak_rss_mb"], "torch_loaded": trained["torch_loaded"]},
        "peft": {"loss": check["loss"], "loss_difference": abs(check["loss"] - trained["eval_loss_after"])},
        "answer": {"question": QUESTION, "before": before, "after": after},
        "adapter_dir": str(ADAPTER),
    }


def _all_active_lora_bytes(rows: Sequence[StepMetrics]) -> int:
    """What all-active LoRA would have put on the wire for the same batches: the formula of docs/reference/protocol.md,
    which the counters of a run equal exactly, without reports."""
    manifest = Bundle.open(BUNDLE).manifest
    defaults = manifest.defaults
    groups = choose_groups(manifest, defaults.target_modules, ())
    widths, everyone = crossings(AdapterSpec("lora", defaults.r), groups), range(len(groups))
    total = 0
    for row in rows:
        traffic = micro_batch_traffic(
            widths,
            live=everyone,
            with_grads=everyone,
            answered=everyone[1:],
            tokens=row.tokens,
            sequences=BATCH_SIZE,
            labelled=row.labelled,
            embedding_size=manifest.base_model.embedding_size,
            hidden_size=manifest.base_model.hidden_size,
            codecs=Codecs.parse("fp16"),
        )
        total += traffic.bytes_up + traffic.bytes_down
    return total


def _tokens(rows: Sequence[StepMetrics]) -> int:
    return sum(row.tokens for row in rows)


def _show(summary: dict[str, Any]) -> None:
    rows = history(read_metrics(ADAPTER / "metrics.jsonl"))
    console.print("\n[bold]Which blocks were trained, step by step[/] (rows: blocks, the last on top)")
    print(render_map(rows, colour=console.is_terminal, numbers=load_run_file(ADAPTER).blocks))
    wire, edge, peft, answer = (summary[key] for key in ("wire", "edge", "peft", "answer"))
    gain = 1 - summary["eval_loss_after"] / summary["eval_loss_before"]
    saved = 1 - wire["bytes_per_token_steady"] / wire["bytes_per_token_all_active"]
    whole = 1 - wire["bytes_per_token_whole_run"] / wire["bytes_per_token_all_active"]
    console.print("\n[bold]Measured in this run[/]")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value, note in (
        ("held-out loss", f"{summary['eval_loss_before']:.3f} → {summary['eval_loss_after']:.3f}", f"{gain:.0%} lower"),
        ("the same in PEFT", f"{peft['loss']:.4f}", f"differs by {peft['loss_difference']:.1e} "),
        ("traffic, steady state", f"{wire['bytes_per_token_steady']:,.0f} bytes a token", f"{saved:.1%} less"),
        ("traffic, whole run", f"{wire['bytes_per_token_whole_run']:,.0f} bytes a token", f"{whole:.1%} less"),
        ("than all-active LoRA", f"{wire['bytes_per_token_all_active']:,.0f} bytes a token", "by formula: q, v, fp16"),
        ("round trips", f"{wire['round_trips_per_step']} a step", "steady state"),
        ("device's peak RSS", f"{edge['peak_rss_mb']:.0f} MB", f"torch loaded: {edge['torch_loaded']}"),
        ("time", f"{summary['train_wall_s']:.0f} s for {summary['steps']} steps", f"{summary['wall_s']:.0f} s in all"),
    ):
        table.add_row(f"[bold]{name}[/]", value, f"[dim]{note}[/]")
    console.print(table)
    heading = "[bold]What half of the blocks cost, and what it is compared with[/]"
    about = "docs/log/benchmarks.md; as many steps, the same answers, 100 rows less to train on"
    console.print(f"\n{heading} ({about})", soft_wrap=True)
    benchmarked = json.loads(BENCHMARKED.read_text()).get("dialogue", {})
    for (recipe, rate), what in COMPARED.items():
        if found := benchmarked.get(recipe, {}).get(rate):
            seeds = f"mean of {len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else "one seed"
            above = f"this run's is {summary['eval_loss_after'] / found['loss'] - 1:+.1%}"
            line = f"held-out loss {found['loss']:.3f}, {what}, {seeds}; {above}: [dim]{found['command']}[/]"
            console.print(line, soft_wrap=True)
    console.print(f"\n[bold]{answer['question']}[/]\n  before: {answer['before']}\n  after:  {answer['after']}")
    console.print(
        f"\nThe adapter is in {summary['adapter_dir']}, in PEFT's format; all numbers in {OUT / 'summary.json'}."
        "\nText, labels, adapter and optimiser state were never transmitted or stored by the server; that is data "
        "minimisation, not secrecy from whoever runs it."
    )
    console.print("\nTalk to it, in two terminals:", highlight=False)
    for command in (
        f"dlora-cloud serve {MODEL} --port 8765",
        f"dlora-edge chat --bundle {BUNDLE} --adapter {ADAPTER} --server ws://127.0.0.1:8765",
    ):
        console.print(f"  {BIN}/{command}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _server() -> Iterator[str]:
    """A server on a free port; its log goes to build/demo/server.log."""
    log = OUT / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [BIN / "dlora-cloud", "serve", MODEL, "--port", "0", "--json", "--state-dir", str(OUT / "server-state")],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            with console.status("loading the base model (about 15 s)"):
                line = process.stdout.readline()
            if not line:
                raise SystemExit(f"error: the server did not start; {log} says why")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(30)


def _run(program: str, *arguments: str, stdout: int | None = None) -> None:
    console.print(f"[dim]$ {program} {' '.join(arguments)}[/]", soft_wrap=True)
    found = subprocess.run([BIN / program, *arguments], env=ENVIRONMENT, stdout=stdout, check=False)
    if found.returncode:
        raise SystemExit(found.returncode)


def _output(program: str, *arguments: str) -> str:
    found = subprocess.run([BIN / program, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.returncode)
    return found.stdout


def _forget(directory: Path) -> None:
    """Delete an earlier demo's adapter: the demo starts anew each time."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _title(number: str, name: str, text: str) -> None:
    console.print(f"\n[bold cyan]{number}  {name}[/]  {text}")


if __name__ == "__main__":
    main()
