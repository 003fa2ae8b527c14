"""Killed units whose parameters the server is given: their effect stays, and nothing of them crosses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from drawn import one_in
from serving import config
from tiny import TinyFactory
from training_runs import DATA, Runs
from waiting import eventually

from dlora.cloud.serving.session_loop import SessionLoop
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.model.evaluation import evaluate
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import parameter_bytes, state_bytes
from dlora.protocol.kill_revive import UnitState

STEPS: Final = 9
# From step 0 on two of four, and others every second step: drawn, so that rounding decides nothing.
RANDOM: Final = {
    "active_fraction": 0.5, "score": "random", "warmup_steps": 0, "warmup_fraction": 0.0, "ramp_fraction": 0.0,
    "kill_every": 1, "revive_every": 2, "probation": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny: TinyFactory) -> Iterator[Runs]:
    with Runs.of(tiny) as made:
        yield made


def run_of(kind: str, on_kill: str, **changes: Any) -> Resolved:
    settings = {
        "optimizer": {"lr": 3e-2}, "target_modules": ("all-linear",), "lora_alpha": 6.0, "basis_steps": 2,
        "total_steps": STEPS, "kill_revive": {**RANDOM, "on_kill": on_kill}, **changes,
    }  # fmt: skip
    return config(kind=kind, **settings)


@pytest.mark.parametrize(("kind", "invocation"), one_in(2, [
    ("lora", ()), ("lora", (5,)), ("ffa", (5,)), ("ffa", ()), ("bottleneck", ()), ("bottleneck", (5,)),
]), ids=str)  # fmt: skip
def test_server_computes_what_the_device_would(
    runs: Runs, kind: str, invocation: tuple[int, ...], tmp_path: Path
) -> None:
    """Step for step the losses of a run whose killed units are held, which computes them on the device."""
    runs.save_random(run_of(kind, "fade", kill_revive={}, invocation=invocation), tmp_path / "init")
    init = load_adapter(tmp_path / "init")
    found, units = {}, {}
    for on_kill in ("hold_forward", "give_to_server", "bypass"):
        run = run_of(kind, on_kill, invocation=invocation)
        with runs.train(run, init=init) as trainer:
            rows = [trainer.run_step() for _ in range(STEPS)]
            found[on_kill] = np.array([*(row.loss for row in rows), trainer.evaluate(DATA).loss])
            units[on_kill] = [row.units for row in rows]
            trainer.save_adapter(tmp_path / on_kill)
    # AdamW doubles what rounding begins with.
    np.testing.assert_allclose(found["give_to_server"][:6], found["hold_forward"][:6], rtol=1e-5)
    np.testing.assert_allclose(found["give_to_server"], found["hold_forward"], rtol=1e-2)
    assert np.abs(found["bypass"] - found["hold_forward"]).max() > 1e-3
    assert {"4", "1"} <= {state for row in units["give_to_server"][1:] for state in row}
    as_held = [row.replace("4", "3") for row in units["give_to_server"]]
    assert as_held == units["hold_forward"]
    # What is saved has the units that the server applied.
    saved = load_adapter(tmp_path / "give_to_server")
    assert set(saved.modules) == set(load_adapter(tmp_path / "hold_forward").modules)
    with runs.open(tmp_path / "give_to_server", threads=1) as model:
        used = evaluate(model, DATA, run.training.batch_size).loss
    assert used == pytest.approx(found["give_to_server"][-1], rel=2e-5)


@pytest.mark.parametrize("score", ["static", "sensitivity", "grad"])
def test_units_of_an_adapter_to_start_from_keep_their_effect(runs: Runs, score: str, tmp_path: Path) -> None:
    """Also those that are never active: the first step has all of it."""
    wanted = runs.save_random(run_of("bottleneck", "fade", kill_revive={}), tmp_path)
    static = {"static": (1, 3)} if score == "static" else {}
    for on_kill, keeps in (("give_to_server", True), ("bypass", False)):
        kill_revive = {**RANDOM, "score": score, "on_kill": on_kill, **static}
        run = run_of("bottleneck", on_kill, kill_revive=kill_revive, optimizer={"lr": 1e-6})
        with runs.train(run, init=load_adapter(tmp_path)) as trainer:
            assert (trainer.evaluate(DATA).loss == pytest.approx(wanted, abs=1e-5)) is keeps
            trainer.run_step()
            trainer.wait_for_signal()
            states = trainer.adapters.states()
            assert (states == UnitState.GIVEN).any() is np.bool_(keeps)
            assert (trainer.evaluate(DATA).loss == pytest.approx(wanted, abs=2e-3)) is keeps


@pytest.mark.parametrize("kind", ["lora", "ffa", "bottleneck"])
def test_lost_server_and_resumed_run_change_no_bit(runs: Runs, kind: str, tmp_path: Path) -> None:
    run = run_of(kind, "give_to_server", wire_dtype="fp16")
    whole = runs.steps(run, STEPS)
    other = ["lora", "ffa", "bottleneck"].index(kind)
    for lost_after in one_in(3, (0, 1, 3, 4, 7, 8), other):
        assert runs.steps(run, STEPS, lost_after) == whole, lost_after
    for saved_after in one_in(2, (1, 3), other):
        assert runs.resumed_steps(run, STEPS, saved_after, tmp_path / str(saved_after)) == whole, saved_after


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_all_that_a_server_may_be_given_counts_from_the_beginning(runs: Runs, kind: str) -> None:
    """So that a run that begins is not refused in the middle."""
    for on_kill, is_given in (("give_to_server", True), ("bypass", False)):
        run = run_of(kind, on_kill)
        with runs.train(run) as trainer:
            wanted = sum(state_bytes(run.spec, group, run.codecs.adapter_state) for group in trainer.groups)
            wanted += is_given * sum(parameter_bytes(run.spec, group) for group in trainer.groups)
            (live,) = [each for each in runs.server.server.service.sessions if each.transport.parked_at is None]
            eventually(lambda: live.quota.held_bytes == wanted)  # noqa: B023  # once the sketches are gone
            trainer.run_step()
            assert live.quota.held_bytes == wanted


def test_a_server_forgets_what_a_revived_unit_gave_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[SessionLoop] = []
    make_loop = SessionLoop.__init__

    def watched(loop: SessionLoop, *given: Any) -> None:
        loops.append(loop)
        make_loop(loop, *given)

    monkeypatch.setattr(SessionLoop, "__init__", watched)
    counts = set()
    with runs.train(run_of("bottleneck", "give_to_server")) as trainer:
        for _ in range(STEPS):
            trainer.run_step()
            trainer.wait_for_signal()
            states = trainer.adapters.states()
            units = list(zip(trainer.adapters.units, states, strict=True))
            given = {group for unit, state in units if state == UnitState.GIVEN for group in unit.groups}
            held = {group for unit, state in units if state == UnitState.HELD for group in unit.groups}
            eventually(lambda: given <= loops[-1]._model.parameters.keys() <= given | held)  # noqa: B023
            counts.add(len(given))
    assert len(counts) > 1


@pytest.mark.parametrize("score", ["grad", "random"])
def test_a_longer_run_begins_with_what_was_active_at_the_end(runs: Runs, score: str, tmp_path: Path) -> None:
    """With all that it had learnt: nothing is lost between two parts, and no old basis pass chooses again."""
    run = run_of("bottleneck", "bypass", kill_revive={**RANDOM, "score": score}, optimizer={"lr": 0.1})
    with runs.train(run) as trainer:
        for _ in range(STEPS):
            trainer.run_step()
        trainer.wait_for_signal()
        wanted, states = trainer.evaluate(DATA).loss, trainer.adapters.states()
        trainer.save_checkpoint(tmp_path)
    longer = msgspec.structs.replace(run, total_steps=2 * STEPS, part_begins=STEPS)
    with runs.train(longer, checkpoint=load_latest(tmp_path)) as trainer:
        assert (trainer.adapters.states() == states).all()
        assert trainer.evaluate(DATA).loss == pytest.approx(wanted, abs=1e-5)
        trainer.run_step()
        reported = trainer.session.unanswered
        assert reported is not None
        assert ((reported > 0) <= (states == UnitState.ACTIVE)).all()
