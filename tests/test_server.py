"""The server in front of devices that it does not trust: it refuses, stays up, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conversations
import numpy as np
import pytest
import torch
from families import VOCABULARY, save_tiny, tiny_model
from processes import cloud_process
from proxy import recording_proxy
from serving import (
    KEY,
    RawDevice,
    RunningServer,
    config,
    final_weights,
    greeted_device,
    random_dataset,
    raw_device,
    served_training,
    serving,
    training,
)  # fmt: skip
from tiny import TinyFactory
from waiting import PassingClock, eventually
from websockets.exceptions import InvalidStatus

from dlora.cloud.admission.access import Access
from dlora.cloud.exchange.exchange import MicroBatchExchange
from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.cloud.serving import server as server_module
from dlora.cloud.serving.server import CloudServer, ServerSettings
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.engine.bundle import Bundle
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.controller import Controller
from dlora.protocol.errors import DloraError, LocalProtocolError, ModelMismatchError, ProtocolError, RefusedError
from dlora.protocol.frames import encode
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import encode_floats

MAX_SESSIONS = 2
UNTRACED = conversations.GROUPS


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(head_dtype="fp32").bundle


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


@pytest.fixture(scope="module")
def server(base: BaseModel) -> Iterator[RunningServer]:
    # A device that leaves is forgotten at once: these tests count what is left behind.
    with serving(base, max_sessions=MAX_SESSIONS, max_tokens=64, timeouts=SessionTimeouts(park_s=0)) as running:
        yield running


@pytest.fixture(autouse=True)
def _still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the server is healthy, has no session left, and serves the next device."""
    yield
    if "server" in request.fixturenames:
        running: RunningServer = request.getfixturevalue("server")
        eventually(lambda: health(running.url)["sessions"] == 0)
        with raw_device(running.url) as device:
            assert list(life_of_a_device(device, request.getfixturevalue("base")))[-1] == "gradient"
            assert isinstance(device.hear(), m.GroupGrad)
        eventually(lambda: health(running.url)["sessions"] == 0)


def health(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/healthz", timeout=120) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        return dict(json.load(answer))


def open_session(base: BaseModel, **changes: object) -> m.OpenSession:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    settings = {
        "base_fingerprint": base.fingerprint,
        "groups": base.groups(names),
        "kill_revive": KillReviveConfig(active_fraction=1.0),
    }
    return conversations.open_session(**{**settings, **changes})


def embeddings(tokens: int = 3, **changes: object) -> m.Embeddings:
    return conversations.embeddings_of([tokens], 16, **changes)


@contextmanager
def opened_device(url: str, base: BaseModel) -> Iterator[RawDevice]:
    with greeted_device(url) as device:
        device.say(open_session(base))
        assert isinstance(device.hear(), m.SessionOpened)
        yield device


# -- health ----------------------------------------------------------------------------------------------


def test_healthz_describes_the_server(server: RunningServer, base: BaseModel, bundle: Path) -> None:
    with opened_device(server.url, base):
        found = health(server.url)
    assert found["status"] == "ok"
    assert (found["sessions"], found["max_sessions"]) == (1, MAX_SESSIONS)
    assert found["base_fingerprint"] == base.fingerprint == Bundle.open(bundle).manifest.base_model.fingerprint
    assert found["protocol_versions"] == list(PROTOCOL_VERSIONS)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a directory that no device should learn of."""
    directory = tmp_path_factory.mktemp("home") / "CanaryZebra4711" / "model"
    save_tiny(directory, num_hidden_layers=3)
    return directory


@pytest.mark.parametrize(
    ("in_parts", "opening", "code", "said"),
    [
        (True, {"base_fingerprint": "0" * 64}, m.ErrorCode.BASE_MODEL_MISMATCH, "this server serves model ("),
        (True, {"groups": UNTRACED}, m.ErrorCode.UNKNOWN_TARGET, "no such exchange groups in model: layers.0.q"),
        (True, {"groups": (), "purpose": m.Encode(blocks=9, width=16)}, m.ErrorCode.LIMIT, "no 9 first blocks of mode"),
        (False, {"groups": (), "purpose": m.Encode(blocks=1, width=16)}, m.ErrorCode.LIMIT, "model cannot be run in "),
    ],
    ids=["another base model", "unknown target", "more blocks than there are", "no parts"],
)
def test_no_refusal_says_where_the_model_lies(
    model_elsewhere: Path, in_parts: bool, opening: dict[str, Any], code: str, said: str
) -> None:
    base = load_base_model(str(model_elsewhere))
    if not in_parts:  # some of its blocks are one module
        base.model.model.layers[2] = base.model.model.layers[1]
        base = BaseModel.from_model(base.model, base.name)
    with serving(base) as running, recording_proxy(running.url) as proxy:
        with greeted_device(proxy.url) as device:
            device.say(conversations.open_session(**{"base_fingerprint": base.fingerprint, **opening}))
            refusal = device.hear_error()
        health(proxy.url)
    assert refusal.code == code
    assert refusal.message.startswith(said)
    assert not [each for each in proxy.recordings if b"Canary" in each.down or b"home" in each.down]


def test_the_device_refuses_another_base_model(bundle: Path) -> None:
    other = BaseModel.from_model(tiny_model("llama", seed=9), "other")
    data = random_dataset(VOCABULARY)
    with serving(other) as running:
        with (
            pytest.raises(ModelMismatchError, match="the server serves other"),
            training(bundle, running.url, config(), data),
        ):
            pass
        # And where the device did not look, the server does.
        with Connection(running.url) as connection:
            with pytest.raises(ModelMismatchError):
                check_base_model(Bundle.open(bundle), connection.welcome)
            connection.send(open_session(other, base_fingerprint=Bundle.open(bundle).manifest.base_model.fingerprint))
            with pytest.raises(ModelMismatchError, match="refused"):
                connection.receive(m.SessionOpened)


UNKNOWN = TargetSpec("model.layers.0.self_attn.x_proj", 16)
Q = TargetSpec("model.layers.0.self_attn.q_proj", 16)
UP = TargetSpec("model.layers.0.mlp.up_proj", 24)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"groups": (GroupSpec(0, 16, (UNKNOWN,)),)}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(0, 16, (Q, UP)),)}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(0, 17, (Q,)),)}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(1, 16, (Q,)),)}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(0, 16, (Q,)), GroupSpec(0, 16, (Q,)))}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(0, 16, (UP,)), GroupSpec(0, 16, (Q,)))}, m.ErrorCode.UNKNOWN_TARGET),
        ({"groups": (GroupSpec(0, 16, (TargetSpec(Q.name, 8),)),)}, m.ErrorCode.UNKNOWN_TARGET),
        ({"kill_revive": KillReviveConfig(pinned=(7,))}, m.ErrorCode.LIMIT),
        ({"kill_revive": KillReviveConfig(score="static", active_fraction=0.5)}, m.ErrorCode.LIMIT),
        ({"groups": ()}, m.ErrorCode.LIMIT),
        ({"groups": (), "kill_revive": KillReviveConfig(on_kill="give_to_server")}, m.ErrorCode.LIMIT),
        ({"next_step": 2}, m.ErrorCode.TICKET),
        ({"next_step": 2, "ticket": b"forged"}, m.ErrorCode.TICKET),
    ],
    ids=[
        "unknown",
        "two inputs in one",
        "width",
        "block",
        "twice",
        "order",
        "output width",
        "pinned",
        "static",
        "no groups",
        "no groups to give",
        "no ticket",
        "forged ticket",
    ],
)
def test_invalid_session_settings_are_refused(
    server: RunningServer, base: BaseModel, changes: dict[str, object], code: m.ErrorCode
) -> None:
    with greeted_device(server.url) as device:
        device.say(open_session(base, **changes))
        assert device.hear_error().code == code
    eventually(lambda: health(server.url)["sessions"] == 0)


def test_full_server_refuses_with_a_retry_time(server: RunningServer, base: BaseModel, bundle: Path) -> None:
    with opened_device(server.url, base), opened_device(server.url, base) as second:
        with pytest.raises(RefusedError) as refused, training(bundle, server.url, config(), random_dataset(VOCABULARY)):
            pass
        assert (refused.value.code, refused.value.retryable) == (m.ErrorCode.BUSY, True)
        assert refused.value.retry_after_s
        second.say(m.CloseSession())
        eventually(lambda: health(server.url)["sessions"] == 1)
        with opened_device(server.url, base):
            pass


def test_overflow_in_the_base_model_is_refused(server: RunningServer, base: BaseModel) -> None:
    with opened_device(server.url, base) as device:
        device.say(embeddings())
        asked = device.hear()
        assert isinstance(asked, m.GroupInput)
        huge = encode_floats(np.full((3, 16), 3e38, np.float32), "fp32")
        device.say(m.GroupDelta(step=0, micro_batch=0, groups=asked.groups, deltas=(huge,)))
        while isinstance(answer := device.hear(), m.GroupInput):
            device.say(m.GroupDelta(step=0, micro_batch=0, groups=answer.groups, deltas=(huge,)))
        assert isinstance(answer, m.Error)
        assert answer.code == m.ErrorCode.NON_FINITE


# -- nonsense --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [b"", b"\0", b"\xff" * 300, b"\0" * 4096], ids=["empty", "short", "ones", "zeros"])
@pytest.mark.parametrize("opened", [False, True], ids=["first", "in a session"])
def test_invalid_frame_is_refused(server: RunningServer, base: BaseModel, frame: bytes, opened: bool) -> None:
    with opened_device(server.url, base) if opened else raw_device(server.url) as device:
        device.socket.send(frame)
        assert device.hear_error().code == m.ErrorCode.DAMAGED


@pytest.mark.parametrize("after", ["hello", "opened", "embeddings", "delta", "loss", "gradient"])
@pytest.mark.parametrize("politely", [True, False], ids=["closing", "vanishing"])
def test_session_ends_when_the_device_leaves(
    server: RunningServer, base: BaseModel, after: str, politely: bool
) -> None:
    with raw_device(server.url) as device:
        for message in life_of_a_device(device, base):
            if message == after:
                break
        if not politely:
            device.socket.socket.close()
    eventually(lambda: health(server.url)["sessions"] == 0)


def life_of_a_device(device: RawDevice, base: BaseModel) -> Iterator[str]:
    device.say(conversations.hello())
    device.hear()
    yield "hello"
    device.say(open_session(base))
    device.hear()
    yield "opened"
    device.say(embeddings())
    yield "embeddings"
    delta = encode_floats(np.ones((3, 16), np.float32), "fp32")
    for _ in range(2):
        asked = device.hear()
        assert isinstance(asked, m.GroupInput)
        device.say(m.GroupDelta(step=0, micro_batch=0, groups=asked.groups, deltas=(delta,)))
        yield "delta"
    device.hear()
    yield "loss"
    grad = encode_floats(np.ones((1, 16), np.float32), "fp32")
    device.say(m.GradHiddenStates(step=0, micro_batch=0, grad_hidden_states=grad))
    yield "gradient"


def test_no_thread_outlives_the_server(base: BaseModel, bundle: Path) -> None:
    before = set(threading.enumerate())
    with serving(base) as running:
        for _ in range(3):
            with opened_device(running.url, base) as device:
                device.say(embeddings())
        with training(bundle, running.url, config(), random_dataset(VOCABULARY)) as trainer:
            trainer.run_step()
    # torch may keep a pool of its own.
    eventually(lambda: not {t.name for t in set(threading.enumerate()) - before if t.name.startswith("session")})


def no_memory_for_torch() -> object:
    return torch.empty(2**50, dtype=torch.float64)


def no_memory_for_python() -> object:
    raise MemoryError


@pytest.mark.parametrize("fail", [no_memory_for_torch, no_memory_for_python])
def test_step_without_memory_is_retried(
    base: BaseModel, bundle: Path, fail: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, failures = BaseModel.last_hidden_state, 0

    def fails_once(*given: object) -> object:
        nonlocal failures
        failures += 1
        return fail() if failures == 1 else forward(*given)  # type: ignore[arg-type]

    clock = PassingClock()
    connecting = ConnectSettings(retry=Retry(max_s=600), clock=clock, sleep=clock.sleep)
    bits = []
    with serving(base) as running:
        for last_hidden_state in (forward, fails_once):
            monkeypatch.setattr(BaseModel, "last_hidden_state", last_hidden_state)
            with training(bundle, running.url, config(), random_dataset(VOCABULARY), connecting) as trainer:
                trainer.run_step()
                bits.append({name: value.tobytes() for name, value in final_weights(trainer).items()})
    assert trainer.steps_rerun == 1
    assert clock.slept_s >= 30
    assert bits[0] == bits[1]


# -- bugs of ours ----------------------------------------------------------------------------------------


INTERNAL = ("internal", "internal error; the server's log has it", False, None)


def one_unit_too_many(*_: object) -> np.ndarray:
    return np.ones(3, np.uint8)  # of two


@pytest.mark.parametrize("where", ["in the handshake", "in a session"])
def test_internal_error_is_logged_with_its_traceback(
    base: BaseModel, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rules forbid us to say is not the device's fault, and not a line in a log."""
    with serving(base) as running, caplog.at_level(logging.INFO, "dlora.cloud"), greeted_device(running.url) as device:
        if where == "in the handshake":
            monkeypatch.setattr(Controller, "states", property(one_unit_too_many))
        else:
            monkeypatch.setattr(Controller, "report", one_unit_too_many)
        device.say(open_session(base))
        if where == "in a session":
            assert isinstance(device.hear(), m.SessionOpened)
            device.say(m.StepReport(step=0, scores=encode_floats(np.ones(2, np.float32), "fp32")))
        told = device.hear_error()
        assert (told.code, told.message, told.retryable, told.retry_after_s) == INTERNAL
        eventually(lambda: health(running.url)["sessions"] == 0)
    bugs = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(bugs) == 1
    assert "internal error" in bugs[0].getMessage()
    assert bugs[0].exc_info is not None
    assert isinstance(bugs[0].exc_info[1], LocalProtocolError)
    assert bugs[0].exc_info[2] is not None, "its traceback"


def test_internal_error_before_a_session_is_logged_with_its_traceback(
    base: BaseModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And seldom, however many knock."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Access, "admit", fail)
    with serving(base) as running, caplog.at_level(logging.INFO, "dlora.cloud"):
        for _ in range(3):
            with pytest.raises(InvalidStatus, match="500"), raw_device(running.url):
                pass
    ours = [record for record in caplog.records if record.name == "dlora.cloud"]
    assert [record.getMessage() for record in ours] == ["internal error × 1, before a session; the last with 127.0.0.1"]
    assert ours[0].exc_info is not None
    assert isinstance(ours[0].exc_info[1], ZeroDivisionError)


# -- the base model --------------------------------------------------------------------------------------


def test_freed_memory_goes_back_once_nothing_computes_and_again_once_its_threads_have_ended(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = []
    monkeypatch.setattr(server_module, "collect_garbage", lambda: released.append(True))
    server = CloudServer(base, ServerSettings(max_sessions=1, max_tokens=64, threads=1), ticket_key=bytes(32))
    gate, threads = server.service.gate, server.service.threads
    threads._idle_s = 0.0

    def look(times: int) -> int:
        for _ in range(times):
            asyncio.run(server._release_memory())
        return len(released)

    assert look(2) == 0
    with gate.computing():
        ended = threading.Event()
        threads.submit(ended.wait, 60)
    assert look(1) == 0  # it may go on at once
    assert look(5) == 1
    ended.set()
    eventually(lambda: not len(threads))
    assert look(5) == 2


def test_nothing_in_the_base_requires_grad_after_training(base: BaseModel, bundle: Path) -> None:
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    with served_training(base, bundle, config(), random_dataset(VOCABULARY)) as trainer:
        for _ in range(3):
            trainer.run_step()
    for name, parameter in base.model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    assert all(value.equal(weights[name]) for name, value in base.model.state_dict().items())


def test_a_base_parameter_that_requires_grad_is_refused() -> None:
    trainable = BaseModel.from_model(tiny_model("llama"), "tiny")
    next(trainable.model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="requires grad"):
        CloudServer(trainable, ServerSettings(max_sessions=1, max_tokens=8, threads=1), ticket_key=KEY)


# -- the process -----------------------------------------------------------------------------------------


def test_stopping_server_finishes_steps_and_refuses_devices(
    tiny: TinyFactory, base: BaseModel, bundle: Path, tmp_path: Path
) -> None:
    with cloud_process(tiny().model, tmp_path, "--drain-s", 1) as cloud:
        assert cloud.hello["base_fingerprint"] == base.fingerprint
        assert health(cloud.url)["status"] == "ok"
        with (
            opened_device(cloud.url, base) as silent,
            training(bundle, cloud.url, config(), random_dataset(VOCABULARY)) as trainer,
        ):
            trainer.run_step()
            silent.say(embeddings())  # in the midst of a step
            started = time.monotonic()
            assert cloud.end(signal.SIGTERM) == 0
            assert time.monotonic() - started < 5
            with pytest.raises(DloraError) as told:
                trainer.run_step()
            assert isinstance(told.value, RefusedError)
            assert (told.value.code, told.value.retryable) == (m.ErrorCode.SHUTTING_DOWN, True)
            assert "ticket" in str(told.value)
        log = cloud.log.read_text()
        assert "Traceback" not in log
        assert "stopping: 2 sessions" in log


def test_protocol_error_of_the_server_raises_protocol_error(server: RunningServer) -> None:
    """What a device raises when the server says that it broke the rules."""
    with Connection(server.url) as connection:
        connection._socket.send(encode(conversations.hello()))
        with pytest.raises(ProtocolError, match="Hello in GREETED"):
            connection.receive(m.SessionOpened)


@pytest.mark.parametrize("reason", ["it went away", "its token was revoked"])
def test_a_session_that_ends_in_a_micro_batch_leaves_no_graph_behind(
    server: RunningServer, base: BaseModel, reason: str
) -> None:
    """The error that ends it holds the frames that it came through, they the graph, and that the exchange."""

    def exchanges() -> list[MicroBatchExchange]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is MicroBatchExchange]

    earlier = weakref.WeakSet(exchanges())  # of other tests' sessions, which may go meanwhile
    for _ in range(3):
        with raw_device(server.url) as device:
            assert list(life_of_a_device(device, base))[-1] == "gradient"
            assert isinstance(device.hear(), m.GroupGrad)
            if reason == "its token was revoked":
                (live,) = server.server.service.sessions
                live.transport.end(RefusedError(reason, m.ErrorCode.TOKEN_REVOKED))
        eventually(lambda: health(server.url)["sessions"] == 0)
    eventually(lambda: not [each for each in exchanges() if each not in earlier])
