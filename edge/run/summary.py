"""What a run comes to, as ``summary.json`` has it; and a run that was summed up before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dlora.edge.memory import peak_rss_mb
from dlora.edge.training.resolved import Resolved
from dlora.protocol.files import read_regular

from .file_names import SUMMARY
from .held_out import HeldOut, is_out_of_patience


def summary_of(config: Resolved, steps: int, held_out: HeldOut, totals: Mapping[str, Any]) -> dict[str, Any]:
    """The whole run, what came before a resumption included. ``totals``: as ``AdapterSaver`` has them."""
    summed = dict(totals)
    compute_s = summed.pop("edge_compute_s")
    for way in ("up", "down"):
        summed[f"bytes_{way}"] += summed[f"set_up_bytes_{way}"]
    losses = {row["step"]: row["loss"] for row in held_out.evaluations}
    best = held_out.best
    return {
        "steps": steps,
        "eval_loss_before": losses.get(0),
        "eval_loss_after": losses.get(steps),
        "eval_loss_best": best and best["loss"],
        "best_step": best and best["step"],
        "keep": config.saving.keep,
        "evaluations": held_out.evaluations,
        **summed,
        "edge_compute_s": round(compute_s, 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "torch_loaded": "torch" in sys.modules,
        "adapter_dir": str(config.saving.out),
    }


def finished_summary(config: Resolved, steps: int, evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The summary of a run that was summed up before: one that is resumed again would lose its times."""
    assert config.saving.out is not None
    try:
        summary: dict[str, Any] = json.loads(read_regular(config.saving.out / SUMMARY))
        # All that is asked of it later.
        summed_up, is_worse, _ = summary["steps"], summary["is_worse"], summary["saved_step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if summed_up != steps:  # another's, where the run was made longer since
        return None
    has_ended = is_out_of_patience(evaluations, config) or (is_worse and config.saving.on_worse == "stop")
    return summary if steps == config.total_steps or has_ended else None


def finished_line(config: Resolved, steps: int, *, is_worse: bool) -> str:
    """Why a run that is finished does not go on, and what would make it."""
    if steps == config.total_steps:
        reason = f"all of its {steps:,} steps are done, and a larger --steps goes on"
    elif is_worse and config.saving.on_worse == "stop":
        reason = f"--on-worse stop ended it at step {steps:,} of {config.total_steps:,}, and --on-worse warn goes on"
    else:
        reason = f"--patience ended it at step {steps:,} of {config.total_steps:,}, and a larger one goes on"
    return f"this run is finished: {reason}; nothing was changed"
