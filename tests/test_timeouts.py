"""How long a server waits for a device: for what the device does, and as long as that device was found to need."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import pytest
from families import VOCABULARY
from serving import config, random_dataset, serving, training
from tiny import TinyFactory
from waiting import PassingClock, eventually
from websockets.asyncio.server import ServerConnection

from dlora.cloud.admission.access import Caller
from dlora.cloud.admission.ledger import MemoryLedger, QuotaLimits
from dlora.cloud.exchange.gate import ComputeGate
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving.counts import Counts
from dlora.cloud.serving.session_device import SessionDevice
from dlora.cloud.serving.tasks import Tasks
from dlora.cloud.serving.timeouts import MAX_DEVICES, MAX_WAIT_S, DeviceDeadlines, SessionTimeouts
from dlora.cloud.serving.transport import SessionTransport
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError, UsageError
from dlora.protocol.session import Session


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny().bundle


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


TURN_S = 1000.0  # more than a step's least deadline


def test_wait_for_other_devices_counts_in_no_deadline_or_quota(
    base: BaseModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_s = 0.0
    waiting = ComputeGate.waiting

    @contextmanager
    def wait_for_a_long_turn(gate: ComputeGate, **given: bool) -> Iterator[None]:
        nonlocal late_s
        with waiting(gate, **given):
            yield
        late_s += TURN_S

    computed: list[float] = []

    def correct(*_: object, tokens: int = 0, compute_s: float = 0.0) -> None:
        computed.append(compute_s)

    monkeypatch.setattr(ComputeGate, "waiting", wait_for_a_long_turn)
    monkeypatch.setattr(MemoryLedger, "correct", correct)
    quotas = QuotaLimits(compute_s_per_hour=1e6)
    with (
        serving(base, quotas=quotas, clock=lambda: time.monotonic() + late_s) as server,
        training(bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer,
    ):
        trainer.run_step()
        trainer.wait_for_signal()
        assert late_s > 2 * TURN_S
        assert 0.0 < sum(computed) < TURN_S


@pytest.mark.parametrize(
    ("timeouts", "answer_s"),
    [
        # Each answer is in time and all of them together are not, again in every session: one must be the last.
        (SessionTimeouts(exchange_s=60.0, step_s=0.05), 0.1),
        # One answer outlasts the deadline and the parking.
        (SessionTimeouts(exchange_s=0.05, park_s=0.05), 0.3),
    ],
    ids=["all answers", "one answer"],
)
def test_deadlines_that_a_device_missed_are_longer_in_its_next_session(
    base: BaseModel, bundle: Path, timeouts: SessionTimeouts, answer_s: float
) -> None:
    connecting = ConnectSettings(device_id="slow", retry=Retry(max_s=30, first_s=0.01, ceiling_s=0.1))
    with (
        serving(base, timeouts=timeouts) as server,
        training(bundle, server.url, config(), random_dataset(VOCABULARY), connecting) as trainer,
    ):
        forward = trainer.model._compute.forward

        def slow(*given: Any, **more: Any) -> Any:
            threading.Event().wait(answer_s)
            return forward(*given, **more)

        trainer.model._compute.forward = slow  # type: ignore[method-assign]
        trainer.run_step()
        assert trainer.next_step == 1
        assert trainer.steps_rerun > 0


PHONE = Caller("phone", "token", "1234abcd")


def test_deadlines_are_kept_per_device_and_bounded() -> None:
    devices = DeviceDeadlines(SessionTimeouts())
    devices.of(PHONE, "a").all_answers.missed()
    assert devices.of(PHONE, "a").all_answers.seconds == 2 * SessionTimeouts.step_s
    assert devices.of(PHONE, "b").all_answers.seconds == SessionTimeouts.step_s
    assert devices.of(Caller("phone", "address"), "a").all_answers.seconds == SessionTimeouts.step_s
    for number in range(MAX_DEVICES - 1):
        devices.of(PHONE, f"{number}")
    assert devices.of(PHONE, "a").all_answers.seconds == SessionTimeouts.step_s  # forgotten
    devices.of(PHONE, "a").all_answers.missed()
    for number in range(MAX_DEVICES - 1):
        devices.of(PHONE, f"other {number}")
    assert devices.of(PHONE, "a").all_answers.seconds == 2 * SessionTimeouts.step_s


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e9, 0.0])
@pytest.mark.parametrize("name", ["exchange_s", "step_s", "idle_s", "park_s"])
def test_invalid_timeouts_are_refused(name: str, value: float) -> None:
    if (name, value) == ("park_s", 0.0):
        SessionTimeouts(park_s=0.0)
        return
    with pytest.raises(UsageError, match=name):
        SessionTimeouts(**{name: value})
    assert threading.TIMEOUT_MAX > 2 * MAX_WAIT_S


class Answering:
    """A connection whose device answers as soon as it is asked."""

    async def recv(self, decode: bool | None = None) -> bytes:
        await asyncio.sleep(0.05)
        return b"answer"


def parked_transport(clock: PassingClock, park_s: float, kind: type[SessionTransport]) -> SessionTransport:
    """Of a session that runs in the present loop."""
    connection = cast(ServerConnection, Answering())
    loop = asyncio.get_running_loop()
    return kind(loop, connection, name="one", device="phone", park_s=park_s, closing_tasks=Tasks(), clock=clock)


def test_answer_deadline_stops_while_the_device_is_away() -> None:
    """As after a damaged frame: the session asks for the next one when it is parked already."""
    clock = PassingClock()
    waits = threading.Event()

    class Watched(SessionTransport):
        def wait_for_device(self, seconds: float = math.inf) -> ServerConnection:
            waits.set()
            return super().wait_for_device(seconds)

    async def come_back() -> bytes:
        parked = parked_transport(clock, 60.0, Watched)
        assert parked._connection is not None
        parked._lose(parked._connection)
        received = asyncio.get_running_loop().run_in_executor(None, parked.receive, 30.0)
        await asyncio.to_thread(waits.wait, 20)
        clock.sleep(59.0)
        parked.attach(cast(ServerConnection, Answering()), list)
        return await received

    assert asyncio.run(come_back()) == b"answer"


def test_nobody_waits_in_a_thread_for_a_device_that_is_away_where_nothing_is_under_way() -> None:
    """Whoever wants a message that begins something is told after its own time, long before the session is given up."""

    async def receive() -> None:
        parked = parked_transport(PassingClock(), 1000.0, SessionTransport)
        assert parked._connection is not None
        parked._lose(parked._connection)
        device = SessionDevice(cast(Session, None), parked, time.monotonic, Counts())
        assert await asyncio.to_thread(device.receive, None, 0.05) is None

    asyncio.run(receive())


def test_a_device_that_was_sent_away_is_waited_for_in_every_thread() -> None:
    """Parked from the time on at which it was told to come, also for the thread that waits for its next message."""
    clock = PassingClock()

    async def come_back() -> bytes:
        parked = parked_transport(clock, 1.0, SessionTransport)
        parked.disconnect(RefusedError("come later", "quota_tokens", retryable=True, retry_after_s=100.0))
        received = asyncio.get_running_loop().run_in_executor(None, parked.receive, 300.0)
        for _ in range(9):
            await asyncio.sleep(0.01)
            clock.sleep(10.0)
            with parked._changed:
                parked._changed.notify_all()
        assert not received.done()
        parked.attach(cast(ServerConnection, Answering()), list)
        return await received

    assert asyncio.run(come_back()) == b"answer"


def test_who_leaves_reading_to_another_waits_anew_once_the_device_is_back() -> None:
    """Of two micro-batches one reads; the deadline of both stops while the device is away."""
    away = SimpleNamespace(times_lost=0, parked_at=None)
    came: Queue[m.AnyMessage] = Queue()

    class Watched(SessionDevice):
        def _read(self, seconds: float, give_up_at: float, away_s: float) -> m.AnyMessage:
            return came.get(timeout=20)

    device = Watched(cast(Session, None), cast(SessionTransport, away), time.monotonic, Counts())
    with ThreadPoolExecutor(2) as pool:
        reads = pool.submit(device.receive, (0, 1), 20.0)
        eventually(lambda: device._is_reading)
        away.parked_at = 0.0
        waits = pool.submit(device.receive, (0, 2), 0.1)
        time.sleep(0.3)
        assert not waits.done()
        away.times_lost, away.parked_at = 1, None
        for micro_batch in (2, 1):
            came.put(m.GroupDelta(step=0, micro_batch=micro_batch, groups=(0,), deltas=()))
        assert [each.result(20).micro_batch for each in (reads, waits)] == [1, 2]  # type: ignore[union-attr]
        again = pool.submit(device.receive, (0, 1), 20.0)
        eventually(lambda: device._is_reading)
        assert device.receive((0, 2), 0.1) is None
        came.put(m.GroupDelta(step=0, micro_batch=1, groups=(0,), deltas=()))
        again.result(20)


class ReadByOne:
    """A connection that is read by one at a time, as websockets has it, answers in a while and is left in a while."""

    def __init__(self) -> None:
        self._is_read = False

    async def recv(self, decode: bool | None = None) -> bytes:
        assert not self._is_read
        self._is_read = True
        try:
            await asyncio.sleep(0.2)
        finally:
            await asyncio.sleep(0.05)
            self._is_read = False
        return b"answer"


def test_a_reader_that_gave_up_has_left_before_the_next_one_reads() -> None:
    async def read_twice() -> bytes:
        loop = asyncio.get_running_loop()
        connection = cast(ServerConnection, ReadByOne())
        transport = SessionTransport(loop, connection, name="one", device="phone", park_s=60.0, closing_tasks=Tasks())

        def read() -> bytes:
            with pytest.raises(TimeoutError):
                transport.receive(0.01)
            return transport.receive(20.0)

        return await loop.run_in_executor(None, read)

    assert asyncio.run(read_twice()) == b"answer"
