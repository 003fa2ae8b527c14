"""Saves a run's adapter with what is known of it by then: what it was trained with, what it learnt, what that took."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dlora.edge.data.examples import Dataset
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.trainer import Trainer
from dlora.protocol.adapter_record import TrainingRecord

from .run_file import LIBRARIES, versions

_SUMMED: Final = (
    "tokens",
    "labelled",
    "bytes_up",
    "bytes_down",
    "set_up_bytes_up",
    "set_up_bytes_down",
    "round_trips",
    "edge_compute_s",
)


class AdapterSaver:
    """Saves the adapter of a run.

    Args:
        evaluations: the run's held-out evaluations so far, as ``HeldOut`` has them; it appends to this very list.
        kept_bytes: what crossed before the first step, maybe in another process; None: what each start of the run says.

    Attributes:
        totals: sums over all steps, by the names that ``StepMetrics`` has; set-up's bytes are not in ``bytes_*``.
    """

    def __init__(
        self, trainer: Trainer, dataset: Dataset, evaluations: Sequence[dict[str, Any]], kept_bytes: int | None
    ) -> None:
        self._trainer = trainer
        self._dataset = dataset
        self._evaluations = evaluations
        self._kept_bytes = kept_bytes
        self.totals: dict[str, Any] = dict.fromkeys(_SUMMED, 0)

    def add(self, metrics: StepMetrics) -> None:
        """Count a step, of this start of the run or an earlier one."""
        for name in _SUMMED:
            self.totals[name] += getattr(metrics, name)

    def save(self, directory: Path, evaluation: dict[str, Any] | None = None) -> None:
        """Save the adapter as it is now; ``evaluation``: of it, where the list has it not yet. Raises as the trainer's
        does."""
        self._trainer.save_adapter(directory, self._record([*self._evaluations, *([evaluation] if evaluation else [])]))

    def _record(self, evaluations: list[dict[str, Any]]) -> TrainingRecord:
        steps, config, totals = self._trainer.next_step, self._trainer.config, self.totals
        set_up = totals["set_up_bytes_up"] + totals["set_up_bytes_down"]
        crossed = totals["bytes_up"] + totals["bytes_down"] + (set_up if self._kept_bytes is None else self._kept_bytes)
        of_step = {row["step"]: row for row in evaluations}
        here = of_step.get(steps, {})
        found = versions()
        libraries = {name: str(found[name]) for name in LIBRARIES if found[name] and name in sys.modules}
        spec = self._trainer.bundle.manifest.device_blocks
        return TrainingRecord(
            steps=steps,
            examples=len(self._dataset),
            tokens=totals["tokens"],
            labelled=totals["labelled"],
            eval_loss_before=of_step.get(0, {}).get("loss"),
            eval_loss_after=here.get("loss"),
            eval_tokens=here.get("tokens"),
            bytes_per_token=round(crossed / max(1, totals["tokens"]), 1),
            round_trips_per_step=round(totals["round_trips"] / max(1, steps), 2),
            block_dtype=spec.dtype if config.device_blocks and spec is not None else None,
            recipe=config.recipe(self._trainer.bundle.manifest),
            versions={"python": str(found["python"]), **libraries},
        )
