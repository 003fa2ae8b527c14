"""What a step says of itself: bytes by role, and where its time went, wherever blocks run."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn import one_in
from serving import config, random_dataset, serving, training
from test_local import local_training
from tiny import Tiny, TinyFactory
from trunk_runs import trunk_config, trunk_training

from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.usage import OTHER, with_other
from dlora.protocol import messages as m
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.frames import Decoder, encode, frame_bytes


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=3, device_blocks=3, head_dtype="fp32")


def steps_of(trainer: Trainer, count: int = 3) -> list[StepMetrics]:
    return [trainer.run_step() for _ in range(count)]


def check_sums(step: StepMetrics) -> None:
    assert sum(step.up.values()) == step.bytes_up
    assert sum(step.down.values()) == step.bytes_down
    assert 0 < step.edge_compute_s + step.waiting_s < step.step_s
    assert step.paused_s == 0


@pytest.mark.parametrize(("kind", "window"), [
    ("lora", 1), ("lora", 2), *one_in(2, [("bottleneck", 1), ("ffa", 2), ("ffa", 1), ("bottleneck", 2)]),
])  # fmt: skip
def test_a_step_has_its_bytes_by_role_and_its_time_by_side(model: Tiny, kind: str, window: int) -> None:
    run = config(kind=kind, grad_accum=2, basis="weights")
    data = random_dataset(model.base.vocabulary_size)
    with (
        serving(model.base, window=window) as server,
        training(model.bundle, server.url, run, data, window=window) as trainer,
    ):
        first, second, _ = steps_of(trainer)
        groups = len(trainer.adapters.groups)
    for step in (first, second):
        check_sums(step)
        assert set(step.up) == {"embeddings", "delta", "last_hidden_states_grad", "input_grad", "report"}
        # Of a signal the next step tells: it costs no round trip.
        signal = {"signal"} if step is second else set()
        assert set(step.down) == {"group_input", "last_hidden_states", "delta_grad"} | signal
        assert step.up["report"] == frame_bytes(1, [4 * len(step.units)])
        assert groups * 256 * 2 < step.up["delta"]
        assert 0 < step.server_compute_s < step.step_s * window
        assert step.server_queued_s >= 0


def test_what_crosses_again_is_other() -> None:
    assert with_other({"delta": 5}, 5) == {"delta": 5}
    assert with_other({"delta": 5}, 8) == {"delta": 5, OTHER: 3}


def test_a_server_cannot_tell_of_a_time_that_is_none() -> None:
    for seconds in (-1.0, float("nan"), float("inf"), m.MAX_SECONDS * 2):
        message = m.GroupGrad(step=0, micro_batch=0, groups=(0,), grads=(), answer=False, computed_s=seconds)
        with pytest.raises(RemoteProtocolError, match="computed_s"):
            Decoder().decode(encode(message))


def test_steps_without_a_server_wait_for_none(model: Tiny, tmp_path: Path) -> None:
    data = random_dataset(model.base.vocabulary_size)
    with serving(model.base) as server:
        with trunk_training(model.bundle, server.url, trunk_config((1, 2)), data, tmp_path / "cache") as trainer:
            filled = steps_of(trainer)
            assert trainer.side.crossed.welcome is not None
        asked_each_time = trunk_training(
            model.bundle, server.url, trunk_config((1, 2)), data, tmp_path / "none", limit=0, fill=False
        )
        with asked_each_time as trainer:
            asked = steps_of(trainer)
    for step in filled:
        check_sums(step)
        assert (step.up, step.down, step.waiting_s, step.server_compute_s) == ({}, {}, 0.0, 0.0)
    for step in asked:
        check_sums(step)
        assert set(step.up) - {OTHER} == {"embeddings"}
        assert set(step.down) - {OTHER} == {"last_hidden_states"}
        assert step.waiting_s > 0


def test_steps_on_the_device_alone_have_no_wire(tiny: TinyFactory) -> None:
    model = tiny("gpt2", device_blocks=2, head_dtype="fp32", tie_word_embeddings=False)
    trainer = local_training(model.bundle, 2)
    for step in steps_of(trainer):
        check_sums(step)
        assert (step.bytes_up, step.bytes_down, step.waiting_s, step.server_compute_s) == (0, 0, 0.0, 0.0)
    assert trainer.side.crossed.welcome is None
