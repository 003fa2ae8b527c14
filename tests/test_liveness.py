"""Heartbeats come from threads that do not compute: a side that is busy for long is not taken for dead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from families import VOCABULARY
from serving import RunningServer, config, random_dataset, serving, training
from tiny import TinyFactory

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.training.trainer import Trainer

WAIT_S = 20


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny().bundle


@pytest.fixture
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny().base) as running:
        yield running


class Busy:
    """A function that computes until it is let go."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self._function = function

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.begun.set()
        assert self.may_end.wait(WAIT_S)
        return self._function(*arguments, **more)


@contextmanager
def busy_step(trainer: Trainer, busy: Busy) -> Iterator[None]:
    """Within, a step of the run is under way, and computes until the end."""
    step = threading.Thread(target=trainer.run_step)
    step.start()
    assert busy.begun.wait(WAIT_S)
    yield
    assert step.is_alive()
    busy.may_end.set()
    step.join(WAIT_S)
    assert trainer.next_step == 1


def test_a_server_that_computes_answers_pings(
    server: RunningServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(BaseModel.last_hidden_state)
    with training(bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer:
        monkeypatch.setattr(BaseModel, "last_hidden_state", lambda *given: busy(*given))
        with busy_step(trainer, busy):
            assert trainer.side.crossed._socket is not None
            assert trainer.side.crossed._socket.ping().wait(WAIT_S)


def test_a_device_that_computes_answers_pings(
    server: RunningServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer:
        busy = Busy(trainer.model._compute.forward)
        monkeypatch.setattr(trainer.model._compute, "forward", busy)
        with busy_step(trainer, busy):
            (live,) = server.server.service.sessions
            connection = live.transport._connection
            assert connection is not None

            async def ping_and_wait() -> float:
                return await (await connection.ping())

            assert asyncio.run_coroutine_threadsafe(ping_and_wait(), connection.loop).result(WAIT_S) >= 0
