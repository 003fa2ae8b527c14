"""Hostile clients against the real server, and an honest device beside each: it must end with the same bits.

What is tried, and what stops it, is in ``abuses``; README.md is its table.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import conversations
import numpy as np
import pytest
from abuses import ABUSES, IDLE_ATTACKS, IDLE_ATTACKS_IN_A_SESSION, Target, idle_connections
from families import FAMILIES, VOCABULARY
from hostile import BINARY, TIMEOUT_S
from serving import RunningServer, config, final_weights, greeted_device, random_dataset, serving, training
from tiny import TinyFactory
from waiting import StandingClock, eventually

from dlora.cloud.admission import guard
from dlora.cloud.admission.guard import ConnectionLimits
from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving import handler
from dlora.cloud.serving.handler import opening_limit
from dlora.cloud.serving.session_loop import SessionLoop
from dlora.cloud.serving.ticket import ticket_of
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol import messages as m
from dlora.protocol import session as protocol_session
from dlora.protocol.connections import raise_file_limit
from dlora.protocol.controller import Controller
from dlora.protocol.frames import Decoder, encode
from dlora.protocol.groups import GroupSpec
from dlora.protocol.kill_revive import KillReviveConfig

README = Path(__file__).with_name("README.md")
ELSEWHERE = "127.0.0.66"
STEPS = 4
MAX_SESSIONS = 12

Bits = dict[str, bytes]


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(head_dtype="fp32").bundle


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


@pytest.fixture(scope="module")
def groups(base: BaseModel) -> tuple[GroupSpec, ...]:
    return base.groups(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])


@pytest.fixture(scope="module")
def server(base: BaseModel) -> Iterator[RunningServer]:
    raise_file_limit()
    with serving(base, max_sessions=MAX_SESSIONS, max_tokens=64) as running:
        yield running


@pytest.fixture(scope="module")
def target(server: RunningServer, groups: tuple[GroupSpec, ...]) -> Target:
    return Target(server.url, groups, source=ELSEWHERE)


@pytest.fixture(scope="module")
def undisturbed(base: BaseModel, bundle: Path, server: RunningServer) -> Bits:
    return train(bundle, server.url)


def train(bundle: Path, url: str, connecting: ConnectSettings | None = None) -> Bits:
    """An honest device's whole run."""
    with training(bundle, url, config(total_steps=STEPS), random_dataset(VOCABULARY), connecting) as trainer:
        for _ in range(STEPS):
            trainer.run_step()
        return {name: np.asarray(value).tobytes() for name, value in final_weights(trainer).items()}


@contextmanager
def again_and_again(run: Callable[[], object]) -> Iterator[list[object]]:
    """Run it in another thread until the context ends, at least once; gives what it returned."""
    done = threading.Event()
    found: list[object] = []

    def loop() -> None:
        while not (done.is_set() and found):
            try:
                found.append(run())
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()


# -- abuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABUSES)
def test_abusive_device_is_stopped_and_others_are_undisturbed(
    name: str, target: Target, bundle: Path, undisturbed: Bits
) -> None:
    run, expected = ABUSES[name]
    with again_and_again(lambda: run(target)) as outcomes:
        bits = train(bundle, target.url)
    assert set(outcomes) <= set(expected), outcomes
    assert bits == undisturbed


@pytest.mark.parametrize("name", IDLE_ATTACKS)
def test_many_idle_connections_do_not_disturb_a_device(
    name: str, target: Target, bundle: Path, undisturbed: Bits
) -> None:
    with idle_connections(target, IDLE_ATTACKS[name], 40):
        assert train(bundle, target.url) == undisturbed


@pytest.mark.parametrize("name", IDLE_ATTACKS_IN_A_SESSION)
def test_many_idle_sessions_do_not_disturb_a_device(name: str, target: Target, bundle: Path, undisturbed: Bits) -> None:
    with idle_connections(target, IDLE_ATTACKS_IN_A_SESSION[name], MAX_SESSIONS // 2) as sitting:
        assert len(sitting) == MAX_SESSIONS // 2
        assert train(bundle, target.url) == undisturbed


@pytest.mark.parametrize("name", ["repeats_itself_in_a_session", "repeats_itself_in_a_step"])
def test_device_that_only_repeats_frames_loses_its_session(
    base: BaseModel,
    groups: tuple[GroupSpec, ...],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A frame that came before is no sign of life: it keeps no session past its deadlines, however often it comes."""
    monkeypatch.setattr(protocol_session, "MAX_REPEATS", 10**9)
    caplog.set_level(logging.INFO, "dlora.cloud")
    timeouts = SessionTimeouts(exchange_s=2.0, step_s=TIMEOUT_S * 10, idle_s=2.0, park_s=0.0)
    with (
        serving(base, timeouts=timeouts) as running,
        # A byte each 0.1 ms: a whole frame again within each deadline.
        idle_connections(Target(running.url, groups), IDLE_ATTACKS_IN_A_SESSION[name], 1, every_s=1e-4) as sitting,
    ):
        assert len(sitting) == 1
        eventually(lambda: len(running.server.service.sessions) == 0)
    assert any("deadline" in line for line in caplog.messages), caplog.messages


@pytest.mark.parametrize("family", FAMILIES)
def test_frame_limit_before_a_session_fits_the_model(tiny: TinyFactory, family: str) -> None:
    base = tiny(family).base
    every = base.groups(base.targets)
    units = tuple(range(len(every)))
    config = KillReviveConfig(
        unit="group", score="grad", pinned=units, static=units, kill_every=10**9, revive_every=10**9
    )
    controller = Controller(config, every, seed=0, total_steps=9)
    largest = conversations.open_session(
        base_fingerprint=base.fingerprint, groups=every, wire_dtype="fp16", kill_revive=config, seed=2**32 - 1,
        total_steps=2**32 - 1, next_step=2**32 - 1, ticket=ticket_of(controller, bytes(32)),
    )  # fmt: skip
    assert len(encode(largest)) <= opening_limit(base) <= len(encode(largest)) + (8 << 10)


def test_frames_before_a_session_are_decoded_in_a_thread(
    base: BaseModel, bundle: Path, undisturbed: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {"decoded": set(), "checked": set()}
    decode, check = Decoder.decode, handler.check_opening

    def decoding(decoder: Decoder, frame: bytes) -> m.AnyMessage:
        message = decode(decoder, frame)
        if isinstance(message, m.Hello | m.OpenSession):
            threads["decoded"].add(threading.current_thread().name)
        return message

    def checking(*given: Any) -> Controller:
        threads["checked"].add(threading.current_thread().name)
        return check(*given)

    monkeypatch.setattr(Decoder, "decode", decoding)
    monkeypatch.setattr(handler, "check_opening", checking)
    with serving(base) as running:
        assert train(bundle, running.url) == undisturbed
    assert threads == {"decoded": {"opening_0"}, "checked": {"opening_0"}}


def test_unread_frames_of_a_session_count_in_its_quota(
    base: BaseModel, groups: tuple[GroupSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that waits, for its turn or for memory, reads nothing; what comes meanwhile is held."""
    reading = threading.Event()
    wait = SessionLoop.wait

    async def wait_later(loop: SessionLoop) -> None:
        await asyncio.to_thread(reading.wait, TIMEOUT_S)
        await wait(loop)

    monkeypatch.setattr(SessionLoop, "wait", wait_later)
    with serving(base, quotas=QuotaLimits(live_bytes=300_000)) as running:
        quotas = running.server.service.quotas
        with Target(running.url, groups).opened() as device:
            for size in (150_000, 90_000, 50_000):  # as many as a device that trains may send unread
                device.client.frame(BINARY, bytes(size))
            eventually(lambda: quotas.live_bytes == 290_000)
            device.client.frame(BINARY, bytes(20_000))
            assert device.outcome() == "close 1008 flood"
        eventually(lambda: quotas.live_bytes == 0)
        reading.set()


def test_thousand_idle_connections_do_not_disturb_a_device(
    server: RunningServer, groups: tuple[GroupSpec, ...], bundle: Path, undisturbed: Bits
) -> None:
    """From the honest device's own address, which is the worst case."""
    guard = server.server.guard
    with idle_connections(Target(server.url, groups), IDLE_ATTACKS["idle_websocket"], 1000) as sitting:
        assert len(sitting) == 1000
        eventually(lambda: guard.unfinished <= guard.limits.unfinished)
        assert train(bundle, server.url) == undisturbed
        assert guard.unfinished + guard.opened <= MAX_SESSIONS + guard.limits.unfinished
    eventually(lambda: guard.unfinished == 0)


def test_devices_that_connect_during_a_flood_train(
    server: RunningServer, groups: tuple[GroupSpec, ...], bundle: Path, undisturbed: Bits
) -> None:
    """From the honest device's own address: it may be the oldest of 256 itself, and tries again as the command does."""
    patient = ConnectSettings(retry=Retry(max_s=TIMEOUT_S, at_start=True, first_s=0.01, ceiling_s=0.1))

    def flood() -> None:
        with idle_connections(Target(server.url, groups), IDLE_ATTACKS["idle_socket"], 500):
            pass

    with again_and_again(flood):
        for _ in range(3):
            assert train(bundle, server.url, patient) == undisturbed


def test_small_server_serves_among_many_hostile_connections(
    base: BaseModel, groups: tuple[GroupSpec, ...], bundle: Path, undisturbed: Bits
) -> None:
    """With room for four strangers, and all kinds of them at once."""
    limits = ConnectionLimits(sessions=4, unfinished=4, unfinished_bytes=16 << 20)
    with serving(base, max_sessions=4, max_tokens=64, limits=limits) as running, ExitStack() as held:
        target = Target(running.url, groups, source=ELSEWHERE)
        for sitting in IDLE_ATTACKS.values():
            held.enter_context(idle_connections(target, sitting, 9))
        assert train(bundle, running.url) == undisturbed
        assert running.server.guard.unfinished <= 4


# -- what is left ----------------------------------------------------------------------------------------


def test_hostile_connections_leave_reasons_in_the_log_and_nothing_else(
    target: Target, server: RunningServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "dlora"):  # a record of websockets 16.0 holds its connection
        for run, _ in ABUSES.values():
            run(target)
        eventually(lambda: server.server.guard.unfinished == server.server.guard.opened == 0)
    ours = [record for record in caplog.records if record.name.startswith("dlora")]
    said = "\n".join(record.getMessage() for record in ours)
    for reason in ("non_finite", "ticket", "unknown_target", "base_model_mismatch", "version", "limit", "damaged"):
        assert reason in said
    for content in ("evil", "hostile", "garbage"):
        assert content not in said, content
    assert all(record.getMessage().isprintable() for record in ours), "a line that a peer has written"
    assert not any(record.exc_info for record in ours)
    # A session that waits for its device may keep its last connection; nobody else's may be left.
    eventually(lambda: gc.collect() >= 0 and len(server.server._callers) <= server.server.service.sessions.parked)


def test_a_flood_of_handshakes_does_not_fill_the_log(
    base: BaseModel, groups: tuple[GroupSpec, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOG_EVERY_S", 1e9)
    with serving(base) as running, caplog.at_level(logging.INFO, "dlora.cloud"):
        for _ in range(5):
            for name in ("no_version_of_ours", "forged_line_in_the_log"):
                ABUSES[name][0](Target(running.url, groups))
    refusals = [text for text in caplog.messages if text.startswith("refused")]
    assert [text.split(";")[0] for text in refusals] == ["refused 1 × version", "refused 1 × unknown_target"]
    assert all(text.isprintable() for text in refusals)


def test_readme_lists_each_abuse() -> None:
    rows = {
        cells[0].strip(" `"): cells[2]
        for line in README.read_text().splitlines()
        if line.startswith("| `") and len(cells := line.strip("|").split("|")) > 2
    }
    assert set(rows) == {*ABUSES, *IDLE_ATTACKS, *IDLE_ATTACKS_IN_A_SESSION}
    for name, (_, expected) in ABUSES.items():
        assert all(f"`{outcome}`" in rows[name] for outcome in expected), name


def test_who_is_silent_is_pinged_and_then_dropped(base: BaseModel, groups: tuple[GroupSpec, ...]) -> None:
    """A device answers pings by itself; a peer that does not loses its connection, and its session is parked."""
    clock = StandingClock()
    with serving(base) as running:
        server = running.server
        server.guard.clock = clock
        loop = server._housekeeping[0].get_loop()
        with greeted_device(running.url) as device, Target(running.url, groups).opened():
            device.say(conversations.open_session(base_fingerprint=base.fingerprint, groups=groups))
            assert isinstance(device.hear(), m.SessionOpened)
            for waited_s in (20.0, 79.0, 100.0):
                clock.now = 1e7 + waited_s
                loop.call_soon_threadsafe(server.guard.ping_silent)
                # Whoever answers was heard at this very time.
                eventually(lambda: sum(each.heard_at == clock.now for each in server.guard._opened) == 1)
            eventually(lambda: server.service.sessions.parked == 1)
            assert len(server.service.sessions) == 2
