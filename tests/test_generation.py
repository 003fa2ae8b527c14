"""Generation through the split gives the tokens of PEFT's ``generate``: of every kind, with drafts and without."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import INVOCATION
from drawn import one_in
from families import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_model
from generating import PROMPTS, answer_of, generated, generated_while_sessions_are_lost, train_adapter
from peft import PeftModel
from serving import RunningServer, config, open_model, random_dataset, serving, training
from test_parts import WITHOUT_CACHE
from tiny import TinyFactory
from waiting import PassingClock, eventually

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.serving.sessions import IDLE_S
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.split import SplitModel
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.errors import DataError, DloraError, RefusedError

TOKENS = 16
LONG = {"max_position_embeddings": 256}


def generated_by_peft(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        found = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return found[0, len(prompt) :].tolist()


def opening(
    bundle: Path, server: RunningServer, adapter: Path | None, context_length: int = 128, **settings: Any
) -> AbstractContextManager[SplitModel]:
    """A model, whose tensors cross in float32 where ``settings`` do not say otherwise."""
    settings = {"wire_dtype": "fp32", "context_length": context_length, **settings}
    return open_model(Bundle.open(bundle), settings.pop("url", server.url), adapter, **settings)


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", blocks=3, **LONG).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", blocks=3, **LONG).base, max_sessions=16) as running:
        yield running


@pytest.fixture(scope="module")
def adapter(bundle: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    train_adapter(bundle, server, out, "lora", "all")
    return out


# -- the same tokens as PEFT --------------------------------------------------------------------------------


ADAPTED = [(kind, adapt) for kind in ("lora", "ffa", "bottleneck") for adapt in ("all", "answer")]
OTHERS = [(family, *each) for each in ADAPTED for family in ("gpt2", "gemma2", "gemma3_text", "qwen3", "bloom", "phi3")]


@pytest.mark.parametrize(("family", "kind", "adapt"), [*(("llama", *each) for each in ADAPTED), *one_in(9, OTHERS)])
def test_greedy_tokens_are_those_of_peft(family: str, kind: str, adapt: str, tiny: TinyFactory, tmp_path: Path) -> None:
    """Without drafts, with the length that pays, and with long ones that mostly miss."""
    untied = {"tie_word_embeddings": False}  # else some repeat one token for ever
    bundle = tiny(family, head_dtype="fp32", **untied).bundle
    with serving(tiny(family, **untied).base) as server:
        train_adapter(bundle, server, tmp_path, kind, adapt)
        model = PeftModel.from_pretrained(tiny_model(family, **untied), tmp_path).eval()
        with opening(bundle, server, tmp_path, 64) as opened:
            context = Context(opened)
            for prompt, draft_lengths in zip(PROMPTS, ((0, None), (5,), (None, 5)), strict=True):
                wanted = generated_by_peft(model, prompt, TOKENS)
                for draft_length in draft_lengths:
                    assert generated(context, prompt, TOKENS, draft_length=draft_length) == wanted
            bare = tiny_model(family, **untied)
            assert wanted != generated_by_peft(bare, prompt, TOKENS)  # the adapter does something


@pytest.mark.parametrize("active_fraction", [0.3, 1.0])
def test_an_adapter_of_a_run_with_kill_and_revive_gives_pefts_tokens(
    active_fraction: float, bundle: Path, server: RunningServer, tmp_path: Path
) -> None:
    """Killed units are no part of it, and cost no round trip."""
    kill_revive = {"active_fraction": active_fraction, "on_kill": "bypass", "warmup_steps": 1, "warmup_fraction": 0.0,
                   "ramp_fraction": 0.3, "kill_every": 1}  # fmt: skip
    train_adapter(bundle, server, tmp_path, "lora", "all", kill_revive=kill_revive)
    model = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=3, **LONG), tmp_path).eval()
    with opening(bundle, server, tmp_path, 64) as opened:
        groups = len(opened.adapters.groups)
        assert groups == (3 if active_fraction == 1.0 else 1)
        answer = answer_of(opened, PROMPTS[0], 8)
        assert [choice.token for choice in answer] == generated_by_peft(model, PROMPTS[0], 8)
        assert answer.counters.round_trips == 8 * (1 + groups)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE_FAMILIES)]
)
def test_every_family_gives_the_tokens_of_its_own_generate(family: str, tiny: TinyFactory) -> None:
    """Those without keys and values get the whole text each time."""
    model = tiny_model(family)
    bundle = tiny(family, head_dtype="fp32").bundle
    with serving(tiny(family).base) as server, opening(bundle, server, None, 64) as opened:
        context = Context(opened)
        for prompt in PROMPTS:
            wanted = generated_by_peft(model, prompt, 9)
            for draft_length in (0, 3):
                assert generated(context, prompt, 9, draft_length=draft_length) == wanted
            if family not in WITHOUT_CACHE:
                assert opened.connection.session.cached_tokens >= len(prompt) + 8


# -- the context that the server keeps -----------------------------------------------------------------


def test_a_second_turn_sends_only_what_is_new(bundle: Path, server: RunningServer, adapter: Path) -> None:
    with opening(bundle, server, adapter) as opened:
        context = Context(opened)
        first = generated(context, PROMPTS[0], 6)
        second = [*PROMPTS[0], *first, 30, 31, 32]
        sent = opened.connection.session.bytes_sent
        answer = answer_of(context, second, 6)
        found = [choice.token for choice in answer]
        # The last token of the first answer was chosen, and not yet sent.
        assert answer.counters.reused_tokens == len(PROMPTS[0]) + 5
        assert answer.counters.bytes_sent == opened.connection.session.bytes_sent - sent
        assert found == generated(opened, second, 6)  # in a context that knows nothing


def test_what_adapters_no_longer_act_on_is_sent_again(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    """An adapter acts from the last invocation on: the answer before it is the base model's in the next turn."""
    train_adapter(bundle, server, tmp_path, "lora", "answer")
    model = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=3, **LONG), tmp_path).eval()
    with opening(bundle, server, tmp_path) as opened:
        context = Context(opened)
        first = generated(context, PROMPTS[0], 6)
        second = [*PROMPTS[0], *first, 30, 31, *INVOCATION]
        answer = answer_of(context, second, 6, draft_length=None)
        assert [choice.token for choice in answer] == generated_by_peft(model, second, 6)
        assert answer.counters.reused_tokens == PROMPTS[0].index(INVOCATION[0])


def test_a_prompt_before_the_invocation_exchanges_nothing(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    """But for the invocation's few tokens; and where the prompt does not invoke, not even those."""
    train_adapter(bundle, server, tmp_path, "lora", "answer")
    invoked, uninvoked = [*range(20, 60), *INVOCATION], [*range(20, 60), 9, 9]
    with opening(bundle, server, tmp_path, 64) as opened:
        counted = {}
        for name, prompt in (("invoked", invoked), ("uninvoked", uninvoked)):
            answer = answer_of(opened, prompt, 1)
            assert len(list(answer)) == 1
            counted[name] = answer.counters
        groups = opened.adapters.group_specs
    assert counted["uninvoked"].round_trips == 1
    assert counted["invoked"].round_trips == 1 + len(groups)
    down = counted["invoked"].bytes_received - counted["uninvoked"].bytes_received
    assert down <= len(groups) * 256 + sum(len(INVOCATION) * group.in_features * 4 + 64 for group in groups)


def test_a_context_ends_where_its_room_does(bundle: Path, server: RunningServer) -> None:
    with opening(bundle, server, None, 16) as opened:
        answer = answer_of(opened, PROMPTS[0], 50, draft_length=3)
        assert len(list(answer)) == 16 - len(PROMPTS[0])
        assert answer.finish_reason == "length"
        with pytest.raises(DataError, match="the prompt has 16 tokens, the server takes 16; say less"):
            generated(opened, [5] * 16, 1)
        with pytest.raises(DataError, match="the prompt is empty"):
            generated(opened, [], 1)


# -- lost servers -------------------------------------------------------------------------------------------

SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=40, seed=11)


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_lost_session_is_prefilled_again_with_the_same_tokens(
    draft_length: int, bundle: Path, server: RunningServer, adapter: Path
) -> None:
    retry = ConnectSettings(retry=Retry(max_s=30))
    with opening(bundle, server, adapter, connecting=retry) as opened:
        wanted = generated(opened, PROMPTS[1], TOKENS, sampling=SAMPLING)
        found, _ = generated_while_sessions_are_lost(opened, server, PROMPTS[1], TOKENS, SAMPLING, draft_length)
        assert found == wanted
        assert opened.connection.reconnects == 2


# -- the server's memory ------------------------------------------------------------------------------------


def test_a_context_is_counted_by_the_formula(tiny: TinyFactory, bundle: Path) -> None:
    """Keys and values of 2 heads of 4 numbers, in each of three blocks; freed when the session closes."""
    with serving(tiny("llama", blocks=3, **LONG).base) as server:
        quotas = server.server.service.quotas
        with opening(bundle, server, None, 100) as opened:
            assert quotas.live_bytes == 100 * 3 * 2 * (2 * 4) * 4
            generated(opened, PROMPTS[0], 8)
            (live,) = server.server.service.sessions
            assert live.cache_bytes == 100 * 3 * 2 * (2 * 4) * 4
        eventually(lambda: quotas.live_bytes == 0)


def test_more_than_the_quota_is_refused_in_one_line(tiny: TinyFactory, bundle: Path) -> None:
    base = tiny("llama", blocks=3, **LONG).base
    with serving(base, quotas=QuotaLimits(live_bytes=60_000)) as server:
        # Half of the quota, with what a block's keys and values take while a token is computed: the server says how
        # long a context may be, and it is no longer.
        room = 30_000 // (3 * 2 * 8 * 4 + 4 * 16 * 4)
        with opening(bundle, server, None, 1000) as opened:
            assert Context(opened).limit == room == opened.connection.welcome.max_context_length
            with ExitStack() as others:
                for _ in range(60_000 // (room * 3 * 2 * 8 * 4) - 1):
                    others.enter_context(opening(bundle, server, None, 1000))
                with pytest.raises(RefusedError, match="quota of live bytes is taken") as refused:
                    others.enter_context(opening(bundle, server, None, 1000))
        assert refused.value.retryable


def test_a_context_can_be_filled_whose_length_the_server_names(tiny: TinyFactory) -> None:
    """With an MLP far wider than keys and values are."""
    shape = {"max_position_embeddings": 4096, "intermediate_size": 256}
    bundle = tiny("llama", head_dtype="fp32", **shape).bundle
    with (
        serving(tiny("llama", **shape).base, quotas=QuotaLimits(live_bytes=400_000), max_tokens=64) as server,
        opening(bundle, server, None, 4096) as opened,
    ):
        context = Context(opened)
        most = opened.connection.welcome.max_context_length
        assert 300 < most == context.limit < 4096
        assert len(generated(context, [5] * 8, most - 8)) == most - 8


def test_two_contexts_that_fill_a_quota_take_turns(tiny: TinyFactory, bundle: Path) -> None:
    """Neither can compute beside the other: one gives way, and comes back."""
    token_bytes, retry = 3 * 2 * (2 * 4) * 4, ConnectSettings(retry=Retry(max_s=60))
    quota = 2 * 240 * token_bytes + 100
    clock = PassingClock()
    with serving(tiny("llama", blocks=3, **LONG).base, clock=clock, quotas=QuotaLimits(live_bytes=10**6)) as server:
        server.server.service.quotas.limits = QuotaLimits(live_bytes=quota)
        found: list[list[int]] = []

        def answer() -> None:
            with opening(bundle, server, None, 240, connecting=retry) as opened:
                both_open.wait(120)
                found.append(generated(opened, PROMPTS[0], 6))

        both_open = threading.Barrier(2)
        threads = [threading.Thread(target=answer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                clock.sleep(2.0)  # what takes an hour on the server's clock takes no minute here
        assert len(found) == 2
        assert found[0] == found[1]


@pytest.mark.parametrize("for_another", [True, False], ids=["for another", "to compute"])
def test_an_idle_context_gives_way_and_comes_back(
    for_another: bool, tiny: TinyFactory, bundle: Path, adapter: Path
) -> None:
    """Where the quota has room for two contexts and a little, or for two alone."""
    clock, base = PassingClock(), tiny("llama", blocks=3, **LONG).base
    tokens, token_bytes = 240, 3 * 2 * (2 * 4) * 4
    quota = 2 * tokens * token_bytes + (token_bytes * tokens - 1 if for_another else 100)
    retry = ConnectSettings(retry=Retry(max_s=30))

    def another() -> AbstractContextManager[SplitModel]:
        return opening(bundle, server, adapter, tokens, connecting=retry)

    with serving(base, clock=clock, quotas=QuotaLimits(live_bytes=10**6)) as server:
        server.server.service.quotas.limits = QuotaLimits(live_bytes=quota)
        sessions = server.server.service.sessions
        with another() as first:
            wanted = generated(first, PROMPTS[0], 12)
            found = []
            for choice in answer_of(first, PROMPTS[0], 12):
                found.append(choice.token)
                if len(found) == 5:
                    with ExitStack() as others:
                        second = others.enter_context(another())
                        assert len(sessions) == 2
                        clock.sleep(IDLE_S + 1)
                        if for_another:
                            generated(second, PROMPTS[0], 1)  # it is not idle
                            others.enter_context(another())
                        else:
                            assert generated(second, PROMPTS[0], 12) == wanted
                        assert len(sessions) == (2 if for_another else 1)
                    eventually(lambda: not len(sessions))
            assert found == wanted
            assert first.connection.reconnects == 1


# -- beside others ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_contexts_and_a_run_each_get_what_they_get_alone(tiny: TinyFactory, bundle: Path, adapter: Path) -> None:
    """And none waits for the end of another: when the first is done, all have come some way."""
    run, dataset = config(total_steps=8), random_dataset(VOCABULARY)
    sampled = [Sampling(temperature=0.8, seed=seed) for seed in range(8)]
    made = [0] * 9  # tokens of each context, and steps of the run
    made_when_one_ended: list[list[int]] = []

    def train(url: str, begin: Callable[[], object]) -> list[float]:
        losses = []
        with training(bundle, url, run, dataset) as trainer:
            begin()
            for _ in range(run.total_steps):
                losses.append(trainer.run_step().loss)
                made[8] += 1
            made_when_one_ended.append(list(made))
        return losses

    def answer(number: int, begin: Callable[[], object]) -> list[int]:
        tokens = []
        with opening(bundle, server, adapter, threads=1) as opened:
            begin()
            for choice in answer_of(opened, PROMPTS[0], 24, sampling=sampled[number], draft_length=2):
                tokens.append(choice.token)
                made[number] += 1
            made_when_one_ended.append(list(made))
        return tokens

    with serving(tiny("llama", blocks=3, **LONG).base, max_sessions=16) as server:
        losses = train(server.url, lambda: None)
        alone = [answer(number, lambda: None) for number in range(8)]
        made[:] = [0] * 9
        made_when_one_ended.clear()
        together = threading.Barrier(9)
        with ThreadPoolExecutor(9) as pool:
            trained = pool.submit(train, server.url, lambda: together.wait(120))
            answers = [pool.submit(answer, number, lambda: together.wait(120)) for number in range(8)]
            assert trained.result(120) == losses
            assert [each.result(120) for each in answers] == alone
    assert len({tuple(each) for each in alone}) > 1
    assert min(made_when_one_ended[0]) > 0, made_when_one_ended[0]


def test_a_text_that_outgrows_its_server_is_refused_in_one_line(bundle: Path, server: RunningServer) -> None:
    """A server that took over and has less room."""
    with (
        opening(bundle, server, None, 16) as opened,
        pytest.raises(DloraError, match="the text has 17 tokens, there is room for 16; begin anew"),
    ):
        Context(opened).logits(np.full(17, 5))
