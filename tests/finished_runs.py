"""Finished runs of benchmarks/economy.py and defaults.py that nobody has made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from economy_runs import Point, Rows, Run, Score, Settings

ROWS: Final = 200


def finished_run(
    settings: Settings,
    loss: float,
    *,
    validation: float | None = None,
    accuracy: float = 0.9,
    bytes_per_token: float = 1000.0,
    train_loss: float = 1.0,
) -> Run:
    """A run of two labels a row, with the same loss for each, and each tenth row wrong for an accuracy of 0.9."""
    wrong = round(1 / (1 - accuracy)) if accuracy < 1 else ROWS + 1
    right = "".join("0" if index % wrong == 0 else "1" for index in range(ROWS))
    rows = Rows(losses=[round(2000 * loss)] * ROWS, labels=[2] * ROWS, right=right)
    total = round(100 * bytes_per_token)
    return Run(
        digest=settings.digest, settings=settings, data="data", commit="", date="2026-11-26", steps=10, tokens=100,
        labelled=20, bytes_up=total // 2, bytes_down=total - total // 2, set_up_bytes=10, report_bytes=10,
        evaluation_bytes=0, bytes_per_token=bytes_per_token, round_trips_per_step=9, edge_compute_s=1.0,
        device_cpu_s=2.0, wall_s=3.0, train_loss_last=train_loss, reconnects=0, steps_rerun=0,
        found_lr=0.02 if settings.lr is None else None,
        curve=[Point(5, total // 2, 2 * loss, 45, 1.0, 1.5), Point(10, total, loss, 90, 2.0, 3.0)],
        validation=Score(loss=loss if validation is None else validation, accuracy=accuracy),
        test=Score(loss=loss, accuracy=right.count("1") / ROWS, rows=rows),
    )  # fmt: skip
