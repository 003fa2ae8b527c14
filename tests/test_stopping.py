"""Whoever asks a run to stop need not wait for what may never end, and loses nothing by it."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from families import VOCABULARY
from serving import RunningServer, config, random_dataset, serving, training
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.run.display import Display
from dlora.edge.run.file_names import EVALUATIONS, SUMMARY
from dlora.edge.run.run import train
from dlora.edge.run.train_run import TrainRun
from dlora.edge.settings import Device, Saving
from dlora.edge.training.checkpoint import list_checkpoints
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.errors import StoppedError

STEPS = 6


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny().bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny().base) as running:
        yield running


def test_stop_works_while_each_step_loses_its_session(
    server: RunningServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is there each time, so that no pause is ever due; and each time it knows nothing of the session."""
    lost = 0
    connecting = ConnectSettings(retry=Retry(max_s=None), should_stop=lambda: lost == 3)
    with training(bundle, server.url, config(), random_dataset(VOCABULARY), connecting) as trainer:
        forward = trainer.model._compute.forward

        def lose_the_session(*given: Any, **more: Any) -> Any:
            nonlocal lost
            lost += 1
            assert lost < 10, "it was asked to stop"
            trainer.side.crossed._resume_token = bytes(32)
            trainer.side.crossed._disconnect()
            return forward(*given, **more)

        monkeypatch.setattr(trainer.model._compute, "forward", lose_the_session)
        with pytest.raises(StoppedError, match="dlora-edge resume"):
            trainer.run_step()
        assert (trainer.next_step, trainer.steps_rerun) == (0, 2)


class Stopping(Display):
    """Asks the run to stop, as a user does, in the first batch of one evaluation."""

    def __init__(self, when: str = "") -> None:
        self._text = io.StringIO()
        super().__init__(stream=self._text)
        self.batches_after = 0
        self._when = when

    @property
    def said(self) -> str:
        return self._text.getvalue()

    @contextmanager
    def evaluating(self, when: str, examples: int) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            if when == self._when:
                self.batches_after += 1
                if self.batches_after == 1:
                    signal.raise_signal(signal.SIGTERM)

        yield advance


def run(server: RunningServer, bundle: Path, out: Path, *, resume: bool = False, **changes: Any) -> TrainRun:
    chosen = config(**{"total_steps": STEPS, "evaluate_every": 2, **changes})
    server_settings = msgspec.structs.replace(chosen.server, server=server.url)
    saving = Saving(out=out, eval_every=2, save_every=4)
    chosen = msgspec.structs.replace(chosen, server=server_settings, saving=saving, device=Device(threads=1))
    return TrainRun(
        bundle=Bundle.open(bundle), config=chosen, dataset=random_dataset(VOCABULARY),
        eval_dataset=random_dataset(VOCABULARY, seed=1), resume=resume,
    )  # fmt: skip


@pytest.mark.parametrize("asked_at", [0, 1, 3])
def test_a_run_stops_between_the_pieces_of_its_set_up(
    server: RunningServer, bundle: Path, tmp_path: Path, asked_at: int
) -> None:
    class StoppingAtBasis(Stopping):
        @contextmanager
        def setting_up(self) -> Iterator[Callable[[str, int, int], None]]:
            def show(piece: str, done: int, total: int) -> None:
                assert (piece, total) == ("data", 3) or (asked_at == 3 and piece == "groups")
                seen = done if piece == "data" else 3 + done
                assert seen <= asked_at, "it was asked to stop"
                if seen == asked_at:
                    signal.raise_signal(signal.SIGINT)

            yield show

    settings = run(server, bundle, tmp_path / "out", kind="bottleneck", basis_steps=3)
    with pytest.raises(StoppedError, match="before the first step"):
        train(settings, StoppingAtBasis())
    assert not (tmp_path / "out").exists()


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / EVALUATIONS).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(server: RunningServer, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(run(server, bundle, out), Stopping())
    assert [row["step"] for row in evaluations(out)] == [0, 2, 4, 6]
    return out


@pytest.mark.parametrize(("when", "saved"), [("before", []), ("at step 2", [2]), ("at step 4", [4]), ("after", [6, 4])])
def test_stopped_evaluation_is_made_again_at_resume(
    server: RunningServer, bundle: Path, whole: Path, when: str, saved: list[int], tmp_path: Path
) -> None:
    display = Stopping(when)
    with pytest.raises(StoppedError, match="dlora-edge resume"):
        train(run(server, bundle, tmp_path), display)
    assert display.batches_after == 1
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == saved
    assert (tmp_path / "adapter_model.safetensors").exists() == bool(saved)
    summary = train(run(server, bundle, tmp_path, resume=True), Stopping())
    assert summary["first_step"] == (saved[0] if saved else 0)
    assert evaluations(tmp_path) == evaluations(whole) == summary["evaluations"]
    adapter = "adapter_model.safetensors"
    assert (tmp_path / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_a_finished_run_keeps_its_summary(server: RunningServer, bundle: Path, whole: Path) -> None:
    before, summary = evaluations(whole), (whole / SUMMARY).read_bytes()
    display = Stopping()
    assert train(run(server, bundle, whole, resume=True), display) == json.loads(summary)
    assert "this run is finished" in display.said
    assert (evaluations(whole), (whole / SUMMARY).read_bytes()) == (before, summary)


def test_a_run_that_was_killed_before_its_summary_keeps_its_evaluations(
    server: RunningServer, bundle: Path, whole: Path
) -> None:
    before = evaluations(whole)
    (whole / SUMMARY).unlink()
    summary = train(run(server, bundle, whole, resume=True), Stopping())
    assert evaluations(whole) == before
    assert summary["eval_loss_before"] == before[0]["loss"]


@pytest.mark.parametrize("damage", [
    b"\0\0\0", b"{}", b"[1]", b"\xff", b'{"step": "0", "loss": 1}', b'{"step": 0}', b"[" * 9999,
], ids=lambda damage: repr(damage[:20]))  # fmt: skip
def test_a_damaged_evaluation_is_left_out(server: RunningServer, bundle: Path, tmp_path: Path, damage: bytes) -> None:
    first = Stopping("at step 4")
    with pytest.raises(StoppedError):
        train(run(server, bundle, tmp_path), first)
    path = tmp_path / EVALUATIONS
    _, at_2 = path.read_bytes().splitlines()
    path.write_bytes(damage + b"\n" + at_2 + b"\n")
    display = Stopping()
    train(run(server, bundle, tmp_path, resume=True), display)
    assert display.said.count("has a damaged line") == 1
    assert [row["step"] for row in evaluations(tmp_path)] == [2, 4, 6]
