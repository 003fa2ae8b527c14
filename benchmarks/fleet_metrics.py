"""What counting costs a step: how many numbers a step adds to, times what one addition takes. A part of fleet.py."""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_most

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS)]

from families import VOCABULARY, save_tiny  # noqa: E402
from serving import config, random_dataset, serving, training  # noqa: E402

from dlora.cloud.model.base_model import load_base_model  # noqa: E402
from dlora.cloud.serving.counts import Count  # noqa: E402
from dlora.export.bundle import export_bundle  # noqa: E402
from dlora.export.settings import ExportSettings  # noqa: E402

STEPS: Final = 30


def measure(directory: Path) -> dict[str, Any]:
    """Steps of a tiny model, in which counting weighs most."""
    save_tiny(directory / "model")
    export_bundle(ExportSettings(str(directory / "model"), directory / "bundle", rank=4, alpha=8.0))
    base, run = load_base_model(str(directory / "model")), config(total_steps=STEPS)
    with (
        serving(base) as server,
        training(directory / "bundle", server.url, run, random_dataset(VOCABULARY)) as trainer,
    ):
        counts, added, took_s = server.server.service.counts, [], []
        for _ in range(STEPS):
            before, started = counts.operations, time.perf_counter()
            trainer.run_step()
            took_s.append(time.perf_counter() - started)
            added.append(counts.operations - before)
    count, times = Count("a", "b"), 100_000
    addition_s = timeit.timeit(lambda: count.add(3, "b"), number=times) / times
    step_s = statistics.median(took_s)
    return {
        "additions_a_step": statistics.median(added), "addition_us": addition_s * 1e6, "step_ms": step_s * 1e3,
        "percent_of_a_step": 100 * statistics.median(added) * addition_s / step_s,
    }  # fmt: skip


def bars(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """Of the issue's seventh."""
    return {"metrics: % of a step of a tiny model": at_most(1, found["percent_of_a_step"], command)}
