"""The proxy does the fault that was planned, where it was planned, and no other; and none goes unseen."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Boundary, Fault, FaultProxy, Plan
from fault_run import Outcome, compare
from serving import config
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from dlora.edge.adapters.parts import PARTS_NAME
from dlora.edge.adapters.peft import WEIGHTS_NAME
from dlora.edge.training.checkpoint import save_checkpoint
from dlora.edge.training.resolved import RunIdentity
from dlora.edge.training.trainer_state import TrainerState
from dlora.protocol import messages as m
from dlora.protocol.frames import encode
from dlora.protocol.tensors import WireTensor


@pytest.fixture(scope="module")
def echo_url() -> Iterator[str]:
    def echo(connection: ServerConnection) -> None:
        for frame in connection:
            connection.send(frame)

    with serve(echo, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def device(proxy: FaultProxy) -> Iterator[ClientConnection]:
    with connect(proxy.url, compression=None, max_size=None, close_timeout=0.1) as connection:
        yield connection


def report(step: int, units: int = 4) -> bytes:
    scores = np.arange(units, dtype=np.float32)
    return bytes(encode(m.StepReport(step=step, scores=WireTensor("fp32", scores)), seq=step + 1))


def test_frames_of_megabytes_pass_unchanged(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, device(proxy) as connection:
        for step, frame in enumerate(report(step, units) for step, units in enumerate((1, 40, 20_000, 1_000_000))):
            connection.send(frame)
            assert connection.recv() == frame
            assert {(each.name, each.step, each.direction) for each in proxy.messages[-2:]} == {
                ("step_report", step, "up"), ("step_report", step, "down"),
            }  # fmt: skip
        connection.send(b"no message of ours")
        assert connection.recv() == b"no message of ours"
    assert proxy.counts == {"step_report": 8}
    assert proxy.done == []


def test_proxy_changes_one_bit_of_one_message(echo_url: str) -> None:
    steps = (0, 1, 1, 1)
    with FaultProxy(echo_url) as proxy, device(proxy) as connection:
        proxy.plan(Plan(Fault.CORRUPT, Boundary("step_report", step=1, direction="up", nth=1)))
        answers = []
        for step in steps:
            connection.send(report(step))
            answers.append(connection.recv())
    flipped = [np.frombuffer(answer, np.uint8) ^ np.frombuffer(report(step), np.uint8)
               for answer, step in zip(answers, steps, strict=True)]  # fmt: skip
    assert [int(np.unpackbits(each).sum()) for each in flipped] == [0, 0, 1, 0]


def test_proxy_sends_a_message_twice(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, device(proxy) as connection:
        proxy.plan(Plan(Fault.DUPLICATE, Boundary(direction="up")))
        for step in (0, 1):
            connection.send(report(step))
        assert [connection.recv() for _ in range(3)] == [report(0), report(0), report(1)]


@pytest.mark.parametrize("fault", [Fault.CUT_LINK, Fault.TRUNCATE], ids=lambda fault: fault.name.lower())
def test_proxy_ends_the_connection(echo_url: str, fault: Fault) -> None:
    with FaultProxy(echo_url) as proxy:
        proxy.plan(Plan(fault, Boundary(step=1, direction="down")))
        with device(proxy) as connection:
            connection.send(report(0))
            assert connection.recv() == report(0)
            connection.send(report(1))
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=10)
        with device(proxy) as connection:
            connection.send(report(1))
            assert connection.recv() == report(1)


def test_half_open_connection_passes_nothing(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, device(proxy) as connection:
        proxy.do_fault(Fault.HALF_OPEN)
        connection.send(report(0))
        with pytest.raises(TimeoutError):
            connection.recv(timeout=0.1)
        with device(proxy) as other:
            other.send(report(0))
            assert other.recv() == report(0)


def test_fault_happens_before_the_frame_is_sent(echo_url: str) -> None:
    order: list[str] = []
    with FaultProxy(echo_url, lambda fault: order.append(fault.name)) as proxy, device(proxy) as connection:
        proxy.plan(Plan(Fault.CLOCK_JUMP, Boundary(direction="up")))
        connection.send(report(0))
        connection.recv()
        order.append("frame")
    assert order == ["CLOCK_JUMP", "frame"]


def test_compare_finds_each_difference(tmp_path: Path) -> None:
    wanted = run_of(tmp_path / "wanted", steps=[0, 1], weight=1.0, adam_steps=2)
    same, other = Outcome(), Outcome()
    compare(same, run_of(tmp_path / "same", steps=[0, 1], weight=1.0, adam_steps=2), wanted, {0: {b"a"}})
    assert same == Outcome()
    compare(other, run_of(tmp_path / "other", steps=[1, 1], weight=2.0, adam_steps=3), wanted, {0: {b"a", b"b"}})
    assert (other.steps_lost, other.steps_doubled) == (1, 2)
    text = "; ".join(other.wrong)
    for part in ("AdamW's steps differ by 1", "metrics", WEIGHTS_NAME, PARTS_NAME, "AdamW's state", "other scores"):
        assert part in text


def run_of(out: Path, *, steps: list[int], weight: float, adam_steps: int) -> Path:
    chosen = config()
    run = RunIdentity(
        settings={}, units=chosen.units, device_blocks=0, total_steps=2, part_begins=0, seed=(0,), invocation=(),
        keeps_outputs=False, base_model="", head="", embedding="", block_dtype="", groups="", data="",
    )  # fmt: skip
    state = TrainerState(next_step=2, run=run, ticket=b"", states=[1], fade_ages=[0], adam_steps=[adam_steps], gains={})
    save_checkpoint(out / "checkpoints", 2, {"a": np.full(3, weight, np.float32)}, state)
    for name in (WEIGHTS_NAME, PARTS_NAME):
        (out / name).write_bytes(np.float32(weight).tobytes())
    row = {"loss": weight, "learning_rate": 1, "grad_norm": 1, "tokens": 1, "labelled": 1, "active_units": 1}
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "units": "1", **row}) + "\n" for n in steps))
    return out
