"""AdamW on the bundle's own graph, with a step count for each kill-and-revive unit."""

from __future__ import annotations

import math

import numpy as np

from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.choices import ScheduleName
from dlora.edge.engine.engine import Engine, scalar
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.kill_revive import UnitState

from .resolved import ChosenOptimizer


class AdamW:
    """Steps the active units' adapters.

    Scalars are computed here in double precision and given to the graph in single: within one unit in the last
    place of ``torch.optim.AdamW`` (Loshchilov & Hutter, arXiv 1711.05101).
    """

    def __init__(self, engine: Engine, config: ChosenOptimizer, total_steps: int) -> None:
        self._graph = engine.load("adamw")
        self.config = config
        self._total_steps = total_steps

    def lr(self, step: int) -> float:
        """Of a step, as the schedule has it."""
        config = self.config
        assert config.lr is not None, "Trainer.find_rate comes before the first step"
        return learning_rate(
            step,
            base=config.lr,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps(self._total_steps),
            total_steps=self._total_steps,
        )

    def step(self, adapters: AdapterSet, *, lr: float) -> float:
        """Clip, then step every active unit with this learning rate; returns the gradients' norm before clipping.

        Raises ``NonFiniteError`` if the gradients are not finite; nothing has changed then.
        """
        active = [unit for unit in adapters.units if unit.state is UnitState.ACTIVE]
        groups = [(unit, group) for unit in active for group in adapters.of_unit(unit)]
        trained = [(unit, parameter) for unit, group in groups for parameter in group.parameters().values()]
        norm = math.sqrt(sum(float(np.vdot(each.grad, each.grad)) for _, each in trained if each.grad is not None))
        if not math.isfinite(norm):
            raise NonFiniteError("NaN or infinity in the gradients")
        limit = self.config.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        for unit in active:
            unit.adam_steps += 1
        for unit, parameter in trained:
            self._update(parameter, lr, clip, unit.adam_steps)
        return norm

    def _update(self, parameter: Parameter, lr: float, clip: float, count: int) -> None:
        if parameter.grad is None:
            return
        config, shape = self.config, parameter.value.shape
        grad = parameter.grad if clip == 1.0 else parameter.grad * np.float32(clip)
        scalars = {
            "decay": 1.0 - lr * config.weight_decay,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "step_size": lr / (1.0 - config.beta1**count),
            "sqrt_bias_correction2": math.sqrt(1.0 - config.beta2**count),
            "eps": config.eps,
        }
        tensors = {
            "param": parameter.value,
            "grad": grad,
            "exp_avg": parameter.exp_avg,
            "exp_avg_sq": parameter.exp_avg_sq,
        }
        flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        outputs = self._graph({**flat, **{name: scalar(value) for name, value in scalars.items()}})
        parameter.value, parameter.exp_avg, parameter.exp_avg_sq = (output.reshape(shape) for output in outputs)


def learning_rate(step: int, *, base: float, schedule: ScheduleName, warmup_steps: int, total_steps: int) -> float:
    """The rate of ``step``, counted from 0, as Hugging Face's trainer has it: linear warm-up, then ``schedule`` down to
    0 at the end."""
    if step < warmup_steps:
        return base * step / max(1, warmup_steps)
    if schedule == "constant":
        return base
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return base * max(0.0, 1.0 - progress)
    return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
