"""AdamW on the device: a step count a unit, Hugging Face's schedules, and no step on gradients that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TinyFactory
from transformers import get_scheduler

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.training.optimizer import AdamW, learning_rate
from dlora.edge.training.resolved import ChosenOptimizer
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.kill_revive import UnitState


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Bundle:
    return Bundle.open(tiny().bundle)


def adapters(bundle: Bundle) -> AdapterSet:
    spec = AdapterSpec(r=4)
    return AdapterSet.create(spec, bundle.manifest.groups, scaling=2.0, seed=(1,), unit="block", kill_every=5)


def values(some: AdapterSet) -> list[bytes]:
    return [parameter.value.tobytes() for parameter in some.parameters().values()]


def set_grads(some: AdapterSet, step: int) -> None:
    rng = np.random.default_rng(step)
    for parameter in some.parameters().values():
        parameter.grad = rng.normal(0, 1e-3, parameter.value.shape).astype(np.float32)


def test_a_revived_unit_goes_on_with_its_own_step_count(bundle: Bundle) -> None:
    """A unit that sat out five steps ends where it ends without them: bias correction counts its own steps."""
    finals = []
    for absent in (range(0), range(3, 8)):
        some = adapters(bundle)
        settings = ChosenOptimizer(lr=1e-2, weight_decay=0.1, schedule="constant", warmup=0.0)
        optimizer = AdamW(OnnxEngine(bundle, 1), settings, 100)
        done = 0
        for step in range(10 + len(absent)):
            some.units[0].state = UnitState.KILLED if step in absent else UnitState.ACTIVE
            set_grads(some, done)
            optimizer.step(some, lr=optimizer.lr(0))
            done += step not in absent
        assert some.units[0].adam_steps == 10
        assert some.units[1].adam_steps == 10 + len(absent)
        first = [group.parameters().values() for group in some.of_unit(some.units[0])]
        finals.append([parameter.value.tobytes() for parameters in first for parameter in parameters])
    assert finals[0] == finals[1]


def test_gradients_that_are_not_finite_change_nothing(bundle: Bundle) -> None:
    some = adapters(bundle)
    before = values(some)
    set_grads(some, 0)
    *_, last = some.parameters().values()
    assert last.grad is not None
    last.grad[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity in the gradients"):
        AdamW(OnnxEngine(bundle, 1), ChosenOptimizer(schedule="constant", warmup=0.0), 100).step(some, lr=1e-2)
    assert values(some) == before
    assert [unit.adam_steps for unit in some.units] == [0, 0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_match_those_of_hugging_face(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        wanted = optimizer.param_groups[0]["lr"]
        found = learning_rate(step, base=0.3, schedule=schedule, warmup_steps=warmup, total_steps=20)  # type: ignore[arg-type]
        assert found == pytest.approx(wanted, rel=1e-12)
        optimizer.step()
        scheduler.step()
