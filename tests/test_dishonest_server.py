"""What a device does about a server that breaks the rules, or keeps them and never gets anywhere."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from dishonest_server import DishonestServer, Script, dishonest, ones
from families import VOCABULARY
from processes import finish, run_edge, start_edge
from serving import config, random_dataset, training
from tiny import TinyFactory
from waiting import PassingClock
from websockets.sync.server import ServerConnection

from dlora.edge.wire.connecting import ConnectSettings, Liveness, Retry
from dlora.protocol import messages as m
from dlora.protocol.errors import ConnectionFailedError, ProtocolError, RemoteProtocolError, StoppedError
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.manifest import Manifest, load_manifest
from dlora.protocol.tensors import WireTensor

BLOCKS = 4
PATIENT = Retry(max_s=None, at_start=True, first_s=0.01, ceiling_s=0.01)
LONG_S = 60.0  # by then a device that waits for ever has not come back


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(blocks=BLOCKS).bundle


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


def run_step(bundle: Path, url: str, connecting: ConnectSettings | None = None) -> None:
    with training(bundle, url, config(), random_dataset(VOCABULARY), connecting) as trainer:
        trainer.run_step()


def test_active_unit_without_adapter_is_refused(bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    """``generate`` and ``evaluate`` ask for none where they have no adapter."""
    (tmp_path / "data.jsonl").write_text('{"text": "w1 w2"}\n')
    with dishonest(manifest, lambda server, connection: None) as server:
        for command in (["generate", "--prompt", "w1"], ["evaluate", "--data", tmp_path / "data.jsonl"]):
            done = run_edge(*command, "--bundle", bundle, "--server", server.url)
            assert done.code == ProtocolError.exit_code
            assert done.stderr.splitlines()[-1:] == done.errors
            assert "units or a ticket where nothing is trained" in done.errors[0]


# -- rules that it breaks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "gradients", "text"),
    [
        *((asked, asked, f"only {asked} of {BLOCKS} groups have written") for asked in (0, 1, BLOCKS - 1)),
        (BLOCKS, BLOCKS - 1, f"{BLOCKS - 1} gradients for {BLOCKS} active groups"),
    ],
)
def test_group_that_was_not_asked_or_has_no_gradients_is_an_error(
    bundle: Path, manifest: Manifest, asked: int, gradients: int, text: str
) -> None:
    """What is trained then is nothing."""

    def script(server: DishonestServer, connection: ServerConnection) -> None:
        begun = server.hear(connection)
        assert isinstance(begun, m.Embeddings)
        for _ in range(asked):
            server.say(connection, server.next_message())
            server.hear(connection)
        states = ones(begun.label_positions.shape[0], manifest.base_model.hidden_size)
        place = {"step": begun.step, "micro_batch": begun.micro_batch}
        server.say_anyway(connection, m.LabelledHiddenStates(**place, hidden_states=states, gradients=gradients))
        server.hear(connection)

    with dishonest(manifest, script) as server, pytest.raises(RemoteProtocolError, match=text):
        run_step(bundle, server.url)


def signal_to(report: m.StepReport) -> m.Signal:
    """All units stay active."""
    units = WireTensor.from_bytes(bytes([UnitState.ACTIVE]) * BLOCKS)
    return m.Signal(step=report.step, units=units, ticket=WireTensor.from_bytes(b"ticket"))


def withholds_signals(server: DishonestServer, connection: ServerConnection) -> None:
    """Honest but for the signals: the second step would be one with the units of the first."""
    while True:
        message = server.hear(connection)
        if isinstance(message, m.StepReport):
            server.session._unanswered_reports.clear()  # its own session would not let it
        server.answer(connection)


def answers_everything(server: DishonestServer, connection: ServerConnection) -> None:
    """What an honest one says, with numbers that are made up."""
    while True:
        message = server.hear(connection)
        if isinstance(message, m.StepReport):
            server.say(connection, signal_to(message))
        server.answer(connection)


def test_missing_signal_is_an_error_at_the_next_micro_batch(bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    """And the checkpoint that is left can be resumed: nothing of what was done is lost."""
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"text": "w1 w2 w3"}) + "\n") * 4)
    options: list[object] = [
        "--bundle", bundle, "--data", data, "--out", tmp_path / "out", "--seed", 0, "--steps", 5, "--threads", 1,
        "--active-fraction", 1, "--wire-dtype", "fp32", "--kind", "lora", "--lr", 0.01,
    ]  # fmt: skip
    with dishonest(manifest, withholds_signals) as server:
        done = finish(start_edge("train", "--server", server.url, *options))
    assert done.code == ProtocolError.exit_code, done.stderr
    assert len(done.errors) == 1
    assert "the report of step 0 has no signal yet" in done.errors[0]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    with dishonest(manifest, answers_everything) as server:
        resumed = finish(start_edge("train", "--resume", "--server", server.url, *options))
    assert resumed.code == 0, resumed.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").open()] == [0, 1, 2, 3, 4]


# -- rules that it keeps, and never gets anywhere --------------------------------------------------------


def repeats_for_ever(server: DishonestServer, connection: ServerConnection) -> None:
    """Sends its first question again, seldom enough to be no flood, and more often than any deadline."""
    if not server.session.link.sent:
        server.hear(connection)
        server.say(connection, server.next_message())
    (question,) = server.session.link.missing(0)
    while True:
        connection.send(question)
        time.sleep(0.4)


def give_up(bundle: Path, manifest: Manifest, script: Script, connecting: ConnectSettings, text: str) -> int:
    """That a device's step ends with ``text``, and not after very long; gives the connections that it made."""
    began = time.monotonic()
    with dishonest(manifest, script) as server, pytest.raises(ConnectionFailedError, match=text):
        run_step(bundle, server.url, connecting)
    assert time.monotonic() - began < LONG_S
    return server.connections


def test_repeated_frame_does_not_count_as_an_answer(bundle: Path, manifest: Manifest) -> None:
    connecting = ConnectSettings(retry=Retry(max_s=3.0, first_s=0.1, ceiling_s=0.1), liveness=Liveness(exchange_s=0.6))
    assert give_up(bundle, manifest, repeats_for_ever, connecting, r"said nothing new for .* gave up after") > 1


def floods(server: DishonestServer, connection: ServerConnection) -> None:
    server.hear(connection)
    question = server.say(connection, server.next_message())
    while True:
        connection.send(question)


def test_flood_of_repeated_frames_is_an_error(bundle: Path, manifest: Manifest) -> None:
    with dishonest(manifest, floods) as server, pytest.raises(RemoteProtocolError, match="that came before, and anoth"):
        run_step(bundle, server.url)


def test_stop_works_while_the_server_repeats_frames(bundle: Path, manifest: Manifest) -> None:
    asked = threading.Event()
    connecting = ConnectSettings(retry=PATIENT, liveness=Liveness(exchange_s=1e4, open_s=1.0), should_stop=asked.is_set)
    began = time.monotonic()
    with dishonest(manifest, repeats_for_ever) as server:
        threading.Timer(0.5, asked.set).start()
        with pytest.raises(StoppedError):
            run_step(bundle, server.url, connecting)
    assert time.monotonic() - began < LONG_S


def says_nothing(server: DishonestServer, connection: ServerConnection) -> None:
    server.hear(connection)
    connection.recv()


def test_silence_counts_in_max_retry_s(bundle: Path, manifest: Manifest) -> None:
    connecting = ConnectSettings(retry=Retry(max_s=1.0), liveness=Liveness(exchange_s=10 * LONG_S))
    assert give_up(bundle, manifest, says_nothing, connecting, r"gave up after \d+ s \(--max-retry-s\)") == 1


def answers_once_and_hangs_up(server: DishonestServer, connection: ServerConnection) -> None:
    server.hear(connection)
    server.say(connection, server.next_message())
    connection.close()


class Pauses:
    """How long a device means to wait, as it tells it: one line when a server is lost, another when it is back."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def say(self, line: str) -> None:
        if not line.startswith("connected to "):
            pause = re.search(r"; trying again in (\S+) s$", line)
            self.told.append(float(pause[1]) if pause else 0.0)


def test_pauses_grow_for_a_server_that_answers_once_and_closes(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, clock = Pauses(), PassingClock()
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    retry = Retry(max_s=None, first_s=1.0, ceiling_s=1000.0)
    connecting = ConnectSettings(
        retry=retry, say=pauses.say, should_stop=lambda: len(pauses.told) == BLOCKS, clock=clock, sleep=clock.sleep
    )
    with dishonest(manifest, answers_once_and_hangs_up) as server, pytest.raises(StoppedError, match="away"):
        run_step(bundle, server.url, connecting)
    assert pauses.told == [0.0, *(2.0**power for power in range(BLOCKS - 1))]


def test_pauses_start_short_again_after_a_finished_micro_batch(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that breaks now and then is no server that hammers; but the pause is never none again."""
    pauses, clock = Pauses(), PassingClock()
    connecting = ConnectSettings(retry=Retry(max_s=None), say=pauses.say, clock=clock, sleep=clock.sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)

    def breaks_at_each_report(server: DishonestServer, connection: ServerConnection) -> None:
        while True:
            message = server.hear(connection)
            if isinstance(message, m.StepReport):
                server.say(connection, signal_to(message))
                connection.close()
                return
            server.answer(connection)

    with (
        dishonest(manifest, breaks_at_each_report) as server,
        training(bundle, server.url, config(), random_dataset(VOCABULARY), connecting) as trainer,
    ):
        for _ in range(3):
            trainer.run_step()
            trainer.wait_for_signal()
    assert pauses.told[:2] == [0.0, 0.5]
    assert set(pauses.told[1:]) == {0.5}


@contextmanager
def takes_no_more_than(server_url: str, nbytes: int) -> Iterator[str]:
    """A way to a server that stops taking what a device sends after so many bytes, and stays open."""
    host, port = server_url.removeprefix("ws://").split(":")
    ended = threading.Event()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def forward() -> None:
            device, _ = listener.accept()
            with device, socket.create_connection((host, int(port))) as server:
                threading.Thread(target=pump, args=(server, device, 1 << 30), daemon=True).start()
                pump(device, server, nbytes)
                ended.wait(LONG_S)

        threading.Thread(target=forward, daemon=True).start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()


def pump(source: socket.socket, sink: socket.socket, nbytes: int) -> None:
    with suppress(OSError):
        while nbytes > 0 and (data := source.recv(min(nbytes, 4096))):
            sink.sendall(data)
            nbytes -= len(data)


def test_stop_works_while_the_server_reads_nothing(bundle: Path, manifest: Manifest) -> None:
    asked = threading.Event()
    connecting = ConnectSettings(retry=PATIENT, liveness=Liveness(exchange_s=1e4, open_s=1.0), should_stop=asked.is_set)
    began = time.monotonic()
    large = random_dataset(VOCABULARY, 99, longest=60)
    with (
        dishonest(manifest, says_nothing) as server,
        takes_no_more_than(server.url, 20_000) as url,
        training(bundle, url, config(batch_size=99), large, connecting) as trainer,
    ):
        assert trainer.side.crossed._socket is not None
        trainer.side.crossed._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        threading.Timer(0.5, asked.set).start()
        with pytest.raises(StoppedError):
            trainer.run_step()
    assert time.monotonic() - began < LONG_S
