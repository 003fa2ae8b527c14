"""Tokens that the server guesses, and answers in passes: the same letters as without, however often it was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from answers import INVOCATION, random_answers
from families import VOCABULARY
from generating import answer_of, generated, generated_while_sessions_are_lost
from serving import RunningServer, config, open_model, random_dataset, randomize_all, serving, training
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.choices import Drafts

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
