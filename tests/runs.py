"""Runs' directories without a run: written as ``dlora-edge train`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dlora.edge.data.examples import Dataset
from dlora.edge.run.file_names import EVALUATIONS, METRICS, SUMMARY
from dlora.edge.run.run_file import DataDigest, RunFile, load_run_file, save_run_file, versions
from dlora.edge.settings import Settings, fields_of
from dlora.edge.training.metrics import MetricsLog, StepMetrics


def made_step(step: int, total: int, **changes: Any) -> StepMetrics:
    """A step of a run with six units, whose loss falls; times add up."""
    rng = np.random.default_rng(step)
    up = {"embeddings": 120_000, "delta": 500_000 - 300 * (step % 7), "input_grad": 500_000, "report": 288}
    down = {"group_input": 500_000, "delta_grad": 500_000, "last_hidden_states": 37_000, "signal": 541}
    values: dict[str, Any] = {
        "step": step,
        "total_steps": total,
        "loss": 2 + 2 * float(np.exp(-4 * step / total)) + 0.3 * rng.standard_normal(),
        "learning_rate": 1e-3 * (1 - step / total),
        "grad_norm": 1 + float(rng.random()),
        "tokens": 300,
        "labelled": 100,
        "bytes_up": sum(up.values()),
        "bytes_down": sum(down.values()),
        "round_trips": 12,
        "active_units": 4,
        "live_units": 5,
        "edge_compute_s": 0.1,
        "step_s": 0.5 + 0.1 * float(rng.random()),
        "units": "011120" if step % 50 < 25 else "111110",
        "up": up,
        "down": down,
        "waiting_s": 0.35,
        "server_compute_s": 0.3,
        "server_queued_s": 0.01,
        "peak_rss_mb": 150.0 + step / total,
    }
    return StepMetrics(**{**values, **changes})


def settings(**changes: Any) -> Settings:
    """The settings of a run, as ``train`` has them by default."""
    given = {"bundle": Path("/b/bundle"), "data": Path("/d/chat.jsonl"), "out": Path("/o/run"), "kind": "lora"}
    return Settings.of(**{**given, **changes})


def settings_in(out: Path) -> SimpleNamespace:
    """The settings in a run's directory, by the names of their options."""
    settings = load_run_file(out).settings
    return SimpleNamespace(**{field.parameter: field.value_in(settings) for field in fields_of()})


def write_run(
    out: Path, steps: int = 40, *, done: bool = True, total: int | None = None, name: str = "tiny", **changes: Any
) -> Path:
    """A run of so many steps with three evaluations; ``changes`` are settings."""
    out.mkdir(parents=True, exist_ok=True)
    data = DataDigest.of(Dataset.of([([5, 6, 7, 8], [1, 2]), ([5, 6], [0])]))
    file = RunFile(
        settings=settings(**changes),
        data=data,
        eval_data=data,
        base_model={"name": name, "fingerprint": "ab" * 32},
        invocation=(),
        versions=versions(),
        server={"software": "dlora-cloud 0.1.0", "wire": 11},
        blocks=(10, 12, 14, 16, 18, 20),
    )
    save_run_file(out, file)
    (out / METRICS).unlink(missing_ok=True)
    with MetricsLog(out / METRICS) as log:
        for step in range(steps):
            log.write(made_step(step, total or steps))
    rows = [
        {
            "step": step, "loss": loss, "token_accuracy": 0.5, "exact_match": 0.1, "tokens": 90, "examples": 9,
            "data": data.fingerprint,
        }
        for step, loss in ((0, 3.5), (steps // 2, 2.25), (steps, 2.5))
    ]  # fmt: skip
    (out / EVALUATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (out / SUMMARY).write_text(json.dumps({"steps": steps, "first_step": 0, "wall_s": 12.5}))
    return out
