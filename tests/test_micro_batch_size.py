"""How much a server runs at once: padding and evaluation count, devices cut their micro-batches, memory is shared."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conversations
import msgspec
import numpy as np
import pytest
from families import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from serving import config, final_weights, greeted_device, random_dataset, randomize, served_training, serving, training
from tiny import TinyFactory
from waiting import eventually
from websockets.sync.client import ClientConnection

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.admission.quotas import Charge, Quotas, SessionQuota
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving.server import MOST_TOKENS
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol import messages as m
from dlora.protocol.counting import counted_tokens, cut_to_fit
from dlora.protocol.errors import RefusedError
from dlora.protocol.frames import Decoder, encode
from dlora.protocol.kill_revive import KillReviveConfig

LONGEST = 16
MAX_TOKENS = 20
# fp32, and only the order of sums differs.
TOLERANCE = 1e-5
NO_QUOTA_OF_MEMORY = QuotaLimits(live_bytes=10**12)


@dataclass
class Model:
    """A base model and its bundle."""

    base: BaseModel
    bundle: Path
    packs: bool


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tiny: TinyFactory) -> Model:
    """One that packs and one that cannot."""
    made = tiny(request.param, head_dtype="fp32")
    return Model(made.base, made.bundle, packs=request.param == "llama")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sequences and their length, padding among them, of all that the base model is run on."""
    seen: list[tuple[int, ...]] = []
    run = BaseModel.last_hidden_state

    def watched(base: BaseModel, embeds: Any, *more: Any) -> Any:
        seen.append(tuple(embeds.shape[:2]))
        return run(base, embeds, *more)

    monkeypatch.setattr(BaseModel, "last_hidden_state", watched)
    return seen


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(lengths_strategy, st.booleans(), st.integers(1, 100))
def test_cut_micro_batch_keeps_order_and_fits(lengths: list[int], packs: bool, most: int) -> None:
    runs = cut_to_fit(lengths, max_tokens=most, packs=packs)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    for run in runs:
        counted = counted_tokens(np.array(lengths[run.start : run.stop], np.int32), packs=packs)
        assert counted <= most or len(run) == 1


def test_counted_tokens_include_padding_if_not_packed() -> None:
    lengths = np.array([256] + [1] * 7936, np.int32)
    assert counted_tokens(lengths, packs=True) == 8192
    assert counted_tokens(lengths, packs=False) == 7937 * 256
    assert cut_to_fit([], max_tokens=5, packs=True) == []


# -- what devices do -------------------------------------------------------------------------------------


def gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    randomize(trainer)
    batches = trainer.batches.step_batches(0)
    trainer.forward_backward(batches, grad_scale=1.0 / sum(len(batch.labels) for batch in batches))
    return {name: parameter.grad for name, parameter in trainer.adapters.parameters().items()}


def test_a_step_that_is_cut_has_the_gradients_of_one_that_is_not(model: Model, shapes: list[tuple[int, ...]]) -> None:
    run, dataset = config(batch_size=6, grad_accum=2), random_dataset(VOCABULARY, longest=LONGEST)
    found = []
    for max_tokens in (4096, MAX_TOKENS):
        with served_training(model.base, model.bundle, run, dataset, max_tokens=max_tokens) as trainer:
            assert trainer.side.crossed.welcome.packs == model.packs
            shapes.clear()
            found.append(gradients(trainer))
    assert len(shapes) > 4
    assert max(sequences * length for sequences, length in shapes) <= MAX_TOKENS
    whole, cut = found
    for name, wanted in whole.items():
        assert np.linalg.norm(cut[name] - wanted) <= TOLERANCE * np.linalg.norm(wanted), name


def test_evaluation_is_cut_as_well(model: Model, shapes: list[tuple[int, ...]]) -> None:
    run, dataset = config(batch_size=6), random_dataset(VOCABULARY, longest=LONGEST)
    found = []
    for max_tokens in (4096, MAX_TOKENS):
        with served_training(model.base, model.bundle, run, dataset, max_tokens=max_tokens) as trainer:
            randomize(trainer)
            shapes.clear()
            found.append(trainer.evaluate(dataset))
    assert max(sequences * length for sequences, length in shapes) <= MAX_TOKENS
    whole, cut = found
    assert cut.loss == pytest.approx(whole.loss, rel=TOLERANCE)
    assert (cut.token_accuracy, cut.exact_match, cut.tokens) == (whole.token_accuracy, whole.exact_match, whole.tokens)


def test_a_run_that_goes_on_at_a_smaller_server_is_cut_for_it(model: Model, shapes: list[tuple[int, ...]]) -> None:
    run, dataset = config(batch_size=6, total_steps=2), random_dataset(VOCABULARY, longest=LONGEST)
    with served_training(model.base, model.bundle, run, dataset) as trainer:
        trainer.run_step()
        smaller = msgspec.structs.replace(trainer.side.crossed.welcome, max_tokens=MAX_TOKENS)
        trainer.side.crossed.session.welcome = smaller
        shapes.clear()
        trainer.run_step()
        trainer.wait_for_signal()
    assert max(sequences * length for sequences, length in shapes) <= MAX_TOKENS


# -- what strangers try ----------------------------------------------------------------------------------

BOMB = [LONGEST] + [1] * (MAX_TOKENS - LONGEST)  # MAX_TOKENS tokens; with padding four times as many


@contextmanager
def opened(url: str, base: BaseModel) -> Iterator[ClientConnection]:
    """The websocket of a session without adapters, which knows no rules of ours."""
    kill_revive = KillReviveConfig(score="static", active_fraction=0.0)
    targets = [name for name in base.targets if name.endswith(("q_proj", "v_proj"))]
    opening = conversations.open_session(
        base_fingerprint=base.fingerprint, groups=base.groups(targets), kill_revive=kill_revive, total_steps=1
    )
    with greeted_device(url) as device:
        device.say(opening)
        device.hear()
        yield device.socket


def evaluation(base: BaseModel, lengths: list[int], mode: Any = "evaluate") -> m.Embeddings:
    return conversations.embeddings_of(lengths, base.embedding_size, mode=mode)


def send_to_server(url: str, base: BaseModel, lengths: list[int], mode: Any) -> m.AnyMessage:
    """Open a session, send one micro-batch of ``lengths`` whatever the rules say, and give the answer."""
    with opened(url, base) as websocket:
        websocket.send(encode(evaluation(base, lengths, mode), seq=1))
        return Decoder().decode(bytes(websocket.recv(timeout=120, decode=False)))


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_padding_counts_in_max_tokens(model: Model, shapes: list[tuple[int, ...]], mode: str) -> None:
    with serving(model.base, max_tokens=MAX_TOKENS) as server:
        shapes.clear()
        answer = send_to_server(server.url, model.base, BOMB, mode)
    if model.packs:
        assert isinstance(answer, m.LabelledHiddenStates)
        assert shapes == [(1, MAX_TOKENS)]
    else:
        assert isinstance(answer, m.Error)
        assert (answer.code, answer.retryable) == ("limit", False)
        assert f"{MAX_TOKENS} tokens count as {len(BOMB) * LONGEST}" in answer.message
        assert shapes == []


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("limits", [QuotaLimits(tokens_per_minute=64), QuotaLimits(live_bytes=20_000)], ids=str)
def test_quotas_count_evaluation_and_padding(
    model: Model, shapes: list[tuple[int, ...]], limits: QuotaLimits, mode: str
) -> None:
    """With room for the micro-batch's tokens, but not for its padding, and not for what evaluation has in hand."""
    lengths = [LONGEST, *[1] * 15] if limits.tokens_per_minute else [LONGEST] * 16
    with serving(model.base, quotas=limits) as server:
        shapes.clear()
        answer = send_to_server(server.url, model.base, lengths, mode)
    if limits.tokens_per_minute and model.packs:
        assert isinstance(answer, m.LabelledHiddenStates)
        return
    assert isinstance(answer, m.Error)
    assert answer.code == ("quota_tokens" if limits.tokens_per_minute else "quota_live_bytes")
    assert "lower --batch-size" in answer.message
    assert shapes == []


def test_micro_batch_beyond_memory_is_refused_for_good(model: Model, shapes: list[tuple[int, ...]]) -> None:
    run, dataset = config(), random_dataset(VOCABULARY)
    little = {"live_limit": 1000, "quotas": NO_QUOTA_OF_MEMORY}
    with served_training(model.base, model.bundle, run, dataset, **little) as trainer:
        shapes.clear()
        with pytest.raises(RefusedError, match=r"which has 0.0 MB for all of them; lower --batch-size") as told:
            trainer.run_step()
    assert (told.value.code, told.value.retryable) == ("limit", False)
    assert shapes == []


# -- the memory of the machine ---------------------------------------------------------------------------


@contextmanager
def watched_memory(quotas: Quotas) -> Iterator[list[int]]:
    """What all micro-batches together take, each time that one begins."""
    seen: list[int] = []
    charge = SessionQuota.charge

    def watched(session: SessionQuota, tokens: int, live_bytes: int) -> Charge:
        charged = charge(session, tokens, live_bytes)
        seen.append(quotas._running_bytes)
        return charged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionQuota, "charge", watched)
        yield seen


def test_devices_share_memory_and_get_the_same_bits_as_alone(model: Model) -> None:
    run, dataset = config(batch_size=4, total_steps=4), random_dataset(VOCABULARY)

    def train(url: str, ready: threading.Barrier | None = None) -> dict[str, bytes]:
        with training(model.bundle, url, run, dataset) as trainer:
            if ready is not None:
                ready.wait(120)
            for _ in range(run.total_steps):
                trainer.run_step()
            trainer.wait_for_signal()
        return {name: value.tobytes() for name, value in final_weights(trainer).items()}

    with serving(model.base) as server, watched_memory(server.server.service.quotas) as seen:
        alone = train(server.url)
        largest = max(seen)
    with (
        serving(model.base, live_limit=largest + largest // 2, quotas=NO_QUOTA_OF_MEMORY) as server,
        watched_memory(server.server.service.quotas) as seen,
        ThreadPoolExecutor(4) as threads,
    ):
        ready = threading.Barrier(4)
        together = [threads.submit(train, server.url, ready) for _ in range(4)]
        assert [each.result(120) for each in together] == [alone] * 4
        quotas = server.server.service.quotas
        assert max(seen) <= largest + largest // 2
        assert not quotas.has_waiting
    assert quotas.live_bytes == 0


def test_a_device_has_half_of_the_memory_by_default(model: Model) -> None:
    for asked, wanted in ((None, 10**9), (12345, 12345)):
        with serving(model.base, live_limit=2 * 10**9, quotas=QuotaLimits(live_bytes=asked)) as server:
            assert server.server.service.quotas.limits.live_bytes == wanted
    with serving(model.base) as server:
        assert server.server.service.quotas.limits.live_bytes is None
    with serving(model.base, live_limit=1000) as server:  # less than the largest micro-batch takes
        assert server.server.service.quotas.limits.live_bytes == 1000


@pytest.mark.parametrize("live_limit", [10**6, 10**7])
def test_default_max_tokens_fit_in_memory(model: Model, live_limit: int) -> None:
    """In whatever form: of equal sequences, and of one long and many short ones."""
    with serving(model.base, max_tokens=None, live_limit=live_limit) as server:
        health = server.server.health()
        most, longest = int(str(health["max_tokens"])), min(64, int(str(health["max_tokens"])))
        assert most < MOST_TOKENS
        whole = [longest] * (most // longest)
        for lengths in (whole, [longest] + [1] * (most - longest) if model.packs else whole):
            answer = send_to_server(server.url, model.base, lengths, "evaluate")
            assert isinstance(answer, m.LabelledHiddenStates), answer


def test_parked_session_in_a_step_frees_its_memory_for_others(model: Model) -> None:
    """Its session would be kept for an hour; it goes as soon as another device needs what it holds."""
    run, dataset = config(batch_size=4), random_dataset(VOCABULARY)
    away = ConnectSettings(retry=Retry(max_s=None, at_start=True, first_s=0.01, ceiling_s=0.1))

    with serving(model.base) as server, watched_memory(server.server.service.quotas) as seen:
        with training(model.bundle, server.url, run, dataset) as trainer:
            trainer.run_step()
        largest = max(seen)
    with (
        serving(
            model.base,
            live_limit=largest + largest // 2,
            quotas=NO_QUOTA_OF_MEMORY,
            timeouts=SessionTimeouts(park_s=3600.0),
        ) as server,
        training(model.bundle, server.url, run, dataset, away) as stalls,
        training(model.bundle, server.url, run, dataset) as waits,
    ):
        forward = stalls.model._compute.forward
        hung_up, may_go_on = threading.Event(), threading.Event()

        def hang_up_and_wait(*given: Any, **more: Any) -> Any:
            if not hung_up.is_set():
                stalls.side.crossed._disconnect()
                hung_up.set()
                assert may_go_on.wait(120)
            return forward(*given, **more)

        stalls.model._compute.forward = hang_up_and_wait  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as thread:
            step = thread.submit(stalls.run_step)
            assert hung_up.wait(120)
            waits.run_step()
            may_go_on.set()
            step.result(120)
        assert stalls.steps_rerun == 1
        assert waits.steps_rerun == 0
        ones, others = final_weights(stalls), final_weights(waits)
    assert all(value.tobytes() == others[name].tobytes() for name, value in ones.items())


def test_device_that_leaves_while_waiting_for_memory_frees_its_place(model: Model) -> None:
    """Its session counts as parked at once, and makes room for another."""
    limits = {"live_limit": 10**8, "quotas": NO_QUOTA_OF_MEMORY, "max_sessions": 1}
    with serving(model.base, **limits, timeouts=SessionTimeouts(park_s=3600.0)) as server:
        service = server.server.service
        holds = service.quotas.open_session("somebody")
        charge = holds.charge(1, 10**8)
        with opened(server.url, model.base) as websocket:
            websocket.send(encode(evaluation(model.base, [LONGEST]), seq=1))
            eventually(lambda: service.quotas.has_waiting)
            assert service.sessions.parked == 0
        eventually(lambda: service.sessions.parked == 1)
        with opened(server.url, model.base):
            eventually(lambda: not service.quotas.has_waiting)
        charge.end(0.0)


def test_device_over_quota_for_too_long_loses_its_session(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its quota stays taken for longer than a session may be idle; afterwards it runs the step again."""
    monkeypatch.setattr("dlora.cloud.admission.quotas._RETRY_AFTER_S", 0.02)
    caplog.set_level(logging.INFO, "dlora.cloud")
    come_again = ConnectSettings(retry=Retry(max_s=None, at_start=True, first_s=0.01, ceiling_s=0.02))
    limits = {"quotas": QuotaLimits(live_bytes=10**8), "timeouts": SessionTimeouts(idle_s=0.5)}
    with (
        serving(model.base, **limits) as server,
        training(model.bundle, server.url, config(), random_dataset(VOCABULARY), come_again) as trainer,
        ThreadPoolExecutor(1) as thread,
    ):
        (live,) = server.server.service.sessions
        holds = server.server.service.quotas.open_session(live.caller.name)
        charge = holds.charge(1, 10**8)
        step = thread.submit(trainer.run_step)
        eventually(lambda: any("ended at step 0: quota_live_bytes" in line for line in caplog.messages))
        charge.end(0.0)
        step.result(120)
        assert trainer.steps_rerun > 0
