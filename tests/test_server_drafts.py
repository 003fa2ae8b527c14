"""Tokens that the server guesses, and answers in passes: the same letters as without, however often it was wrong."""

from __future__ import annotations

import functools
import gc
import itertools
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY
from generating import LONG, PROMPTS, answer_of, generated, generated_while_sessions_are_lost, train_adapter
from processes import cloud_process
from serving import RunningServer, open_model, serving
from test_cli import free_port
from tiny import TinyFactory
from waiting import eventually

from dlora.cloud.serving.micro_batch_device import MicroBatchDevice
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.choices import Drafts
from dlora.protocol.errors import LocalProtocolError, RemoteProtocolError
from dlora.protocol.frames import encode

TOKENS = 14
DRAWN = Sampling(temperature=0.8, seed=3)
CASES = [
    ("bottleneck, answers", "2,2"), ("bottleneck, answers", "live"), ("lora", "3,1"), ("lora", "live"),
    ("bottleneck", "1,1"), ("lora, answers", "2,2"),
]  # fmt: skip
ANSWERS = "bottleneck, answers"


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", blocks=3, **LONG).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", blocks=3, **LONG).base, max_sessions=16) as running:
        yield running


Adapters = Callable[[str], Path]


@pytest.fixture(scope="module")
def adapters(bundle: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """By how they are trained: ``bottleneck``, and ``bottleneck, answers``, say."""

    @functools.cache
    def make(name: str) -> Path:
        kind, _, answers = name.partition(", ")
        out = tmp_path_factory.mktemp("adapter")
        train_adapter(bundle, server, out, kind, "answer" if answers else "all", size=0.25)
        return out

    return make


def opening(bundle: Path, server: RunningServer, adapter: Path | None, **settings: Any) -> AbstractContextManager[Any]:
    settings = {"wire_dtype": "fp32", "context_length": 128, "drafts": True, **settings}
    return open_model(Bundle.open(bundle), server.url, adapter, **settings)


@pytest.mark.parametrize(("name", "passes"), CASES)
def test_guesses_change_no_letter(
    name: str, passes: str, bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    """Greedy, and drawn with a seed; of the length that pays, and of others."""
    with (
        opening(bundle, server, adapters(name), passes=passes, drafts=False) as plain,
        opening(bundle, server, adapters(name), passes=passes) as opened,
    ):
        contexts = Context(plain), Context(opened)
        right = 0
        for sampling in (Sampling(), DRAWN):
            for prompt in PROMPTS[1:]:
                wanted = generated(contexts[0], prompt, TOKENS, sampling=sampling)
                for by, length in (("server", 4), ("auto", None), ("server", 16)):
                    answer = answer_of(contexts[1], prompt, TOKENS, sampling=sampling, drafts=by, draft_length=length)
                    assert [choice.token for choice in answer] == wanted
                    right += answer.counters.accepted
        assert right


def test_the_base_model_guesses_what_it_says_itself(bundle: Path, server: RunningServer) -> None:
    with opening(bundle, server, None) as opened:
        answer = answer_of(opened, PROMPTS[0], 18, drafts="server", draft_length=16)
        tokens = [choice.token for choice in answer]
        assert (answer.counters.drafted, answer.counters.accepted) == (16, 16)
        assert answer.counters.round_trips == 2
        assert tokens == generated(opened, PROMPTS[0], 18)


@pytest.mark.parametrize(("name", "passes"), CASES[:2])
def test_a_server_knows_how_many_guesses_were_right(
    name: str, passes: str, bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    """As many as the device says, once it has gone on from all of them; from another text it tells nothing."""
    counts = server.server.service.counts

    def counted() -> np.ndarray:
        return np.array([counts.guessed.values[""], counts.right.values[""]])

    before = counted()
    with opening(bundle, server, adapters(name), passes=passes) as opened:
        context, text, answers = Context(opened), list(PROMPTS[1]), []
        for _ in range(2):  # the second goes on from the first
            answers.append(answer_of(context, text, TOKENS, drafts="server", draft_length=3))
            text += [choice.token for choice in answers[-1]] + [5]
        generated(context, text, 1)
        told = [[answer.counters.drafted, answer.counters.accepted] for answer in answers]
        assert (counted() - before).tolist() == np.sum(told, 0).tolist()
        assert counted()[1] > before[1]
        generated(context, PROMPTS[2], TOKENS, drafts="server", draft_length=3)
        before = counted()
        generated(context, PROMPTS[0], 1)
        assert (counted() == before).all()


@pytest.mark.parametrize(("name", "passes"), CASES[:3])
def test_guesses_go_on_after_lost_sessions(
    name: str, passes: str, bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    retry = ConnectSettings(retry=Retry(max_s=30))
    with opening(bundle, server, adapters(name), passes=passes, connecting=retry) as opened:
        for sampling in (Sampling(), DRAWN):
            wanted = generated(opened, PROMPTS[1], TOKENS, sampling=sampling)
            found, _ = generated_while_sessions_are_lost(opened, server, PROMPTS[1], TOKENS, sampling, 3, "server")
            assert found == wanted


@pytest.mark.parametrize("way", [{"passes": "live"}, {"passes": "2,2"}, {"lends": True}], ids=["live", "2,2", "lent"])
def test_guesses_survive_lost_links(
    way: dict[str, Any], bundle: Path, server: RunningServer, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link breaks before every 7th message that the device waits for, also of those that come ahead."""
    retry = ConnectSettings(retry=Retry(max_s=30, first_s=0.01, ceiling_s=0.05))
    with opening(bundle, server, adapters(ANSWERS), **way, connecting=retry) as opened:
        wanted = generated(opened, PROMPTS[2], 12, sampling=DRAWN)
        read, count = Connection._read, itertools.count(1)

        def read_or_break(connection: Connection, *arguments: Any) -> Any:
            if next(count) % 7 == 0 and connection._socket is not None:
                with suppress(OSError):
                    connection._socket.socket.shutdown(socket.SHUT_RDWR)
            return read(connection, *arguments)

        monkeypatch.setattr(Connection, "_read", read_or_break)
        found = generated(opened, PROMPTS[2], 12, sampling=DRAWN, drafts="server", draft_length=3)
        monkeypatch.undo()
        assert found == wanted
        assert opened.connection.resumed > 0


@pytest.mark.parametrize("drafts", ["server", "off"])
def test_in_passes_a_token_takes_as_many_round_trips_as_passes(
    drafts: Drafts, bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    """With what comes ahead one less than without."""
    with opening(bundle, server, adapters(ANSWERS), passes="2,2") as opened:
        answer = answer_of(opened, PROMPTS[0], 9, drafts=drafts, draft_length=0)
        list(answer)
        each = 3 if drafts == "off" else 2
        assert answer.counters.round_trips == 3 + 8 * each


# -- an adapter that is lent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_a_lent_adapter_says_the_same_and_asks_for_nothing(
    sampling: Sampling, bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    """The device is asked for nothing, and guesses are those of the adapted model."""
    with (
        opening(bundle, server, adapters(ANSWERS), drafts=False) as live,
        opening(bundle, server, adapters(ANSWERS), lends=True) as lent,
    ):
        for prompt in PROMPTS:
            wanted = generated(live, prompt, TOKENS, sampling=sampling)
            assert generated(lent, prompt, TOKENS, sampling=sampling) == wanted
            answer = answer_of(Context(lent), prompt, TOKENS, sampling=sampling, drafts="server", draft_length=8)
            assert [choice.token for choice in answer] == wanted
            if sampling is not DRAWN:
                assert answer.counters.accepted == answer.counters.drafted > 8
                assert answer.counters.round_trips == 3


def test_a_lent_adapter_is_given_again_after_a_lost_session(
    bundle: Path, server: RunningServer, adapters: Adapters
) -> None:
    retry = ConnectSettings(retry=Retry(max_s=30))
    with opening(bundle, server, adapters(ANSWERS), lends=True, connecting=retry) as lent:
        wanted = generated(lent, PROMPTS[1], TOKENS)
        found, _ = generated_while_sessions_are_lost(lent, server, PROMPTS[1], TOKENS, Sampling(), 3, "server")
        assert found == wanted


@pytest.mark.parametrize("ends", ["closed", "parked and evicted"])
def test_a_lent_adapter_is_gone_when_the_session_is(
    ends: str, tiny: TinyFactory, bundle: Path, adapters: Adapters
) -> None:
    """From the server's memory. On its disk it never was: such a session has no ticket, and nothing else is written."""
    with serving(tiny("llama", blocks=3, **LONG).base) as alone:
        quotas, sessions = alone.server.service.quotas, alone.server.service.sessions
        opened = open_model(
            Bundle.open(bundle), alone.url, adapters(ANSWERS), context_length=64, wire_dtype="fp32", lends=True
        )
        with opened as lent:
            generated(lent, PROMPTS[0], 4)
            given = [array for group in lent.adapters.groups for array in group.given_to_server()]
            assert len(copies_in_memory(given)) == len(given)
            if ends != "closed":
                lent.connection._disconnect()
                eventually(lambda: sessions.parked == 1)
                assert copies_in_memory(given)
                sessions.make_memory_free()
        eventually(lambda: not len(sessions) and not copies_in_memory(given))
        assert quotas.live_bytes == 0


def copies_in_memory(values: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Of these arrays, among all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [
        tensor
        for tensor in tensors
        if any(tuple(tensor.shape) == value.shape and np.array_equal(tensor.float().numpy(), value) for value in values)
    ]


def test_a_device_that_lends_nothing_gives_nothing(bundle: Path, server: RunningServer, adapters: Adapters) -> None:
    """Whatever a server says: only the device begins, and its own rules refuse to send."""
    with opening(bundle, server, adapters(ANSWERS)) as opened:
        connection = opened.connection
        given = m.GroupParameters(group=0, tensors=())
        with pytest.raises(LocalProtocolError, match="not due"):
            connection.send(given)
        with pytest.raises(RemoteProtocolError, match="not now"):
            connection.session.receive(encode(given, seq=connection.session.link.received + 1))


@pytest.mark.parametrize("way", [{"passes": "live"}, {"passes": "2,2"}, {"device_blocks": 0, "lends": True}], ids=str)
def test_a_token_that_there_is_not_is_refused(
    way: dict[str, Any], bundle: Path, server: RunningServer, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessed by a server that makes trouble, in a micro-batch or ahead: no graph of the device is given it."""
    send = MicroBatchDevice.send_drafts

    def send_others(device: MicroBatchDevice, ids: Sequence[int], computed_s: float) -> None:
        send(device, [VOCABULARY] * len(ids), computed_s)

    monkeypatch.setattr(MicroBatchDevice, "send_drafts", send_others)
    with (
        opening(bundle, server, adapters(ANSWERS), **way) as opened,
        pytest.raises(RemoteProtocolError, match="a guessed token that the model's"),
    ):
        generated(opened, PROMPTS[0], 9, drafts="server", draft_length=3)


@pytest.mark.parametrize("way", [{"passes": "2,2"}, {"lends": True}], ids=["2,2", "lent"])
def test_an_answer_goes_on_after_kill_9_and_leaves_nothing_on_the_servers_disk(
    way: dict[str, Any], tiny: TinyFactory, bundle: Path, server: RunningServer, adapters: Adapters, tmp_path: Path
) -> None:
    model = tiny("llama", blocks=3, **LONG).model
    settings = {**way, "wire_dtype": "fp32", "context_length": 128, "drafts": True}
    port = free_port()
    retry = ConnectSettings(retry=Retry(max_s=60, first_s=0.01, ceiling_s=0.1))
    with ExitStack() as stack:
        first = stack.enter_context(cloud_process(model, tmp_path, "--port", port))
        opened = stack.enter_context(
            open_model(Bundle.open(bundle), first.url, adapters(ANSWERS), connecting=retry, **settings)
        )
        wanted = generated(opened, PROMPTS[0], TOKENS, sampling=DRAWN, drafts="server", draft_length=2)
        found = []
        for choice in answer_of(opened, PROMPTS[0], TOKENS, sampling=DRAWN, drafts="server", draft_length=2):
            found.append(choice.token)
            if len(found) == 5:
                first.end(signal.SIGKILL)
                stack.enter_context(cloud_process(model, tmp_path, "--port", port))
        given = [array.tobytes() for group in opened.adapters.groups for array in group.given_to_server()]
    assert found == wanted
    assert opened.connection.reconnects >= 1
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written
    assert not any(each in written for each in given)


OTHERS = ("gemma2", "gemma3_text", "qwen3", "bloom", "phi3", "gpt_neox")


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
@pytest.mark.parametrize("way", [{"passes": "2,2"}, {"passes": "live"}, {"lends": True}], ids=["2,2", "live", "lent"])
def test_guesses_change_no_letter_of_other_families(
    way: dict[str, Any], family: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    untied = {"tie_word_embeddings": False}
    bundle = tiny(family, head_dtype="fp32", **untied).bundle
    with serving(tiny(family, **untied).base) as server:
        train_adapter(bundle, server, tmp_path, "bottleneck", "answer", size=0.25)
        settings = {**way, "context_length": 60}
        with (
            opening(bundle, server, tmp_path, **settings, drafts=False) as plain,
            opening(bundle, server, tmp_path, **settings) as opened,
        ):
            for sampling in (Sampling(), DRAWN):
                wanted = generated(plain, PROMPTS[1], 10, sampling=sampling)
                found = generated(opened, PROMPTS[1], 10, sampling=sampling, drafts="server", draft_length=3)
                assert found == wanted
