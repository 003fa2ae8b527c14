"""Learning-rate schedules, as Hugging Face's trainer has them."""

from __future__ import annotations

import math

from dlora.edge.choices import ScheduleName


def learning_rate(step: int, *, base: float, schedule: ScheduleName, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of ``step``, counted from 0: linear warm-up, then ``schedule`` down to 0 at the end."""
    if step < warmup_steps:
        return base * step / max(1, warmup_steps)
    if schedule == "constant":
        return base
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return base * max(0.0, 1.0 - progress)
    return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
