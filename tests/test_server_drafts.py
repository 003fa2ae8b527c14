"""Tokens that the server guesses, and answers in passes: the same letters as without, however often it was wrong."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import INVOCATION, random_answers
from families import VOCABULARY
from generating import answer_of, generated, generated_while_sessions_are_lost
from serving import RunningServer, config, open_model, random_dataset, randomize_all, serving, training
from tiny import TinyFactory
from waiting import eventually

from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol import messages as m
from dlora.protocol.choices import Drafts
from dlora.protocol.errors import LocalProtocolError, RemoteProtocolError
from dlora.protocol.frames import encode

PROMPTS = [[9, 10, 11, 7, 8], [5, 6, 5, 6, 5, 6, 7, 8], [7, 8, 20, 21, 22, 7, 8, 12]]  # each invokes at 7, 8
TOKENS = 24
LONG = {"max_position_embeddings": 256, "tie_word_embeddings": False}
DRAWN = Sampling(temperature=0.8, seed=3)
PASSES = ("live", "1,1", "2,2", "3,1")


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", blocks=3, **LONG).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", blocks=3, **LONG).base, max_sessions=16) as running:
        yield running


def train(
    bundle: Path, server: RunningServer, out: Path, *, kind: str, answers: bool, size: float, **changes: Any
) -> Path:
    """An adapter; the smaller, the more often the base model says the same."""
    run = config(kind=kind, invocation=INVOCATION if answers else (), basis_steps=2 if answers else 0, **changes)
    dataset = random_answers() if answers else random_dataset(VOCABULARY)
    with training(bundle, server.url, run, dataset) as trainer:
        trainer.run_step()
        randomize_all(trainer)
        for parameter in trainer.adapters.parameters().values():
            parameter.value *= size
        trainer.save_adapter(out)
    return out


@pytest.fixture(
    scope="module", params=[(kind, answers) for kind in ("bottleneck", "lora") for answers in (True, False)]
)
def adapter(
    request: pytest.FixtureRequest, bundle: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    kind, answers = request.param
    return train(bundle, server, tmp_path_factory.mktemp("adapter"), kind=kind, answers=answers, size=0.25)


def opening(bundle: Path, server: RunningServer, adapter: Path | None, **settings: Any) -> AbstractContextManager[Any]:
    settings = {"wire_dtype": "fp32", "context_length": 128, "drafts": True, **settings}
    return open_model(Bundle.open(bundle), server.url, adapter, **settings)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_guesses_change_no_letter(
    passes: str, sampling: Sampling, bundle: Path, server: RunningServer, adapter: Path
) -> None:
    with opening(bundle, server, adapter, passes=passes, drafts=False) as plain:
        context = Context(plain)
        wanted = [generated(context, prompt, TOKENS, sampling=sampling) for prompt in PROMPTS]
    with opening(bundle, server, adapter, passes=passes) as opened:
        context = Context(opened)
        right = 0
        for by, length in (("server", 4), ("server", 1), ("auto", None), ("server", 16)):
            for prompt, tokens in zip(PROMPTS, wanted, strict=True):
                answer = answer_of(context, prompt, TOKENS, sampling=sampling, drafts=by, draft_length=length)
                assert [choice.token for choice in answer] == tokens
                right += answer.counters.accepted
        assert right or sampling is DRAWN


def test_the_base_model_guesses_what_it_says_itself(bundle: Path, server: RunningServer) -> None:
    with opening(bundle, server, None) as opened:
        answer = answer_of(opened, PROMPTS[0], 18, drafts="server", draft_length=16)
        tokens = [choice.token for choice in answer]
        assert (answer.counters.drafted, answer.counters.accepted) == (16, 16)
        assert answer.counters.round_trips == 2
        assert tokens == generated(opened, PROMPTS[0], 18)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_guesses_go_on_after_lost_sessions(
    passes: str, sampling: Sampling, bundle: Path, server: RunningServer, adapter: Path
) -> None:
    with opening(bundle, server, adapter, passes=passes, drafts=False) as plain:
        wanted = generated(plain, PROMPTS[1], TOKENS, sampling=sampling)
    retry = ConnectSettings(retry=Retry(max_s=30))
    with opening(bundle, server, adapter, passes=passes, connecting=retry) as opened:
        found, _ = generated_while_sessions_are_lost(opened, server, PROMPTS[1], TOKENS, sampling, 3, "server")
        assert found == wanted


@pytest.mark.parametrize("drafts", ["server", "off"])
def test_in_passes_a_token_takes_as_many_round_trips_as_passes(
    drafts: Drafts, bundle: Path, server: RunningServer, adapter: Path
) -> None:
    """With what comes ahead one less than without."""
    with opening(bundle, server, adapter, passes="2,2") as opened:
        answer = answer_of(opened, PROMPTS[0], 9, drafts=drafts, draft_length=0)
        list(answer)
        each = 3 if drafts == "off" else 2
        assert answer.counters.round_trips == 3 + 8 * each


# -- an adapter that is lent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_a_lent_adapter_says_the_same_and_asks_for_nothing(
    sampling: Sampling, bundle: Path, server: RunningServer, adapter: Path
) -> None:
    """The device is asked for nothing, and guesses are those of the adapted model."""
    with opening(bundle, server, adapter, drafts=False) as live, opening(bundle, server, adapter, lends=True) as lent:
        for prompt in PROMPTS:
            wanted = generated(live, prompt, TOKENS, sampling=sampling)
            assert generated(lent, prompt, TOKENS, sampling=sampling) == wanted
            answer = answer_of(Context(lent), prompt, TOKENS, sampling=sampling, drafts="server", draft_length=8)
            assert [choice.token for choice in answer] == wanted
            if sampling is not DRAWN:
                assert answer.counters.accepted == answer.counters.drafted > 16
                assert answer.counters.round_trips == 4


def test_a_lent_adapter_is_given_again_after_a_lost_session(bundle: Path, server: RunningServer, adapter: Path) -> None:
    retry = ConnectSettings(retry=Retry(max_s=30))
    with opening(bundle, server, adapter, lends=True, connecting=retry) as lent:
        wanted = generated(lent, PROMPTS[1], TOKENS)
        found, _ = generated_while_sessions_are_lost(lent, server, PROMPTS[1], TOKENS, Sampling(), 3, "server")
        assert found == wanted


@pytest.mark.parametrize("ends", ["closed", "parked and evicted"])
def test_a_lent_adapter_is_gone_when_the_session_is(ends: str, tiny: TinyFactory, bundle: Path, adapter: Path) -> None:
    """From the server's memory. On its disk it never was: such a session has no ticket, and nothing else is written."""
    with serving(tiny("llama", blocks=3, **LONG).base) as alone:
        quotas, sessions = alone.server.service.quotas, alone.server.service.sessions
        opened = open_model(Bundle.open(bundle), alone.url, adapter, context_length=64, wire_dtype="fp32", lends=True)
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


def test_a_device_that_lends_nothing_gives_nothing(bundle: Path, server: RunningServer, adapter: Path) -> None:
    """Whatever a server says: only the device begins, and its own rules refuse to send."""
    with opening(bundle, server, adapter) as opened:
        connection = opened.connection
        given = m.GroupParameters(group=0, tensors=())
        with pytest.raises(LocalProtocolError, match="not due"):
            connection.send(given)
        with pytest.raises(RemoteProtocolError, match="not now"):
            connection.session.receive(encode(given, seq=connection.session.link.received + 1))
