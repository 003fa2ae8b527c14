"""Answers of several sessions that are computed at once: each is what it is alone."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from generating import LONG, PROMPTS, generated, generated_while_sessions_are_lost, train_adapter
from serving import RunningServer, open_model, serving
from test_parts import deeper
from tiny import TinyFactory
from waiting import StandingClock, eventually

from dlora.cloud.exchange import forward as forward_module
from dlora.cloud.exchange import shared_gate
from dlora.cloud.exchange.forward import Forward, Forwards
from dlora.cloud.exchange.gate import ComputeGate
from dlora.cloud.exchange.shared_gate import SharedGate
from dlora.cloud.exchange.single_rows import SingleRows, twice
from dlora.cloud.exchange.target_modules import original_forward, wrap_target_modules
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import is_near, random_embeds
from dlora.cloud.model.part_forward import PartForward
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.side_by_side import SideBySide
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.errors import ExportError

OTHERWISE = {"mistral", "gemma2", "gemma3_text", "bloom", "falcon"}
"""Families whose attention is not torch's, or has more than causal order: the tiny Mistral's looks back four tokens."""
COUNTS = [(7, 1), (0, 5), (3, 1), (9, 4)]


def begun(parts: ModelParts, begin: int, room: int = 0) -> list[PartForward]:
    """Contexts that hold some tokens, and go on with others."""
    found = []
    for index, (past, count) in enumerate(COUNTS):
        embeds = random_embeds(parts.base, past + count).roll(index, 1)
        if begin:
            embeds = parts.run(embeds, end=begin)
        cache = parts.new_cache(begin=begin, room=room)
        if past:
            parts.run(embeds[:, :past], begin=begin, cache=cache)
        found.append(PartForward(parts, embeds[:, past:], begin, None, cache))
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_side_by_side_are_what_they_are_alone(family: str) -> None:
    parts = ModelParts(BaseModel.from_model(tiny_model(family), family))
    side_by_side = SideBySide.of(parts)
    assert (side_by_side is None) == (family in OTHERWISE)
    if side_by_side is not None:
        for begin in (0, 1):
            alone, beside = begun(parts, begin, 32), begun(parts, begin, 32)
            for _ in range(2):  # the second time all go on from what both ways have kept
                wanted = [forward.run() for forward in alone]
                assert all(map(is_near, side_by_side.run(beside), wanted))
            assert [each.cache.length for each in beside] == [each.cache.length for each in alone]


@torch.no_grad()
def test_in_half_precision_bits_are_the_same() -> None:
    """Also of a single token, whose products may be computed in another order."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=1536, num_attention_heads=4, num_key_value_heads=2)
    base = BaseModel.from_model(model.to(torch.bfloat16), "llama")
    wrap_target_modules(base)
    parts = ModelParts(base)
    gate = new_gate(parts)
    alone = [Forward(part, likeliest_from=0) for part in begun(parts, 0)]
    for forward in alone:
        gate.run(iter([forward]), lambda _: None)
    beside = [Forward(part, likeliest_from=0) for part in begun(parts, 0)]
    run_at_once(gate, [iter([forward]) for forward in beside])
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.hidden_states, other.hidden_states)
        assert one.likeliest == other.likeliest


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_single_row_is_multiplied_twice_where_that_puts_it_right(family: str) -> None:
    sizes = {"n_embd": 1536, "n_head": 4} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 1536}
    base = BaseModel.from_model(tiny_model(family, **sizes).to(torch.bfloat16), family)
    found = SingleRows.of(base)
    for name in found.modules:
        product = original_forward(base, name)
        rows = torch.randn(1, 8, base.targets[name].in_features).to(torch.bfloat16)
        each = torch.cat([twice(product, row) for row in rows.split(1, 1)], 1)
        assert torch.equal(each, product(rows)), name
    assert SingleRows.of(BaseModel.from_model(tiny_model(family), family)) == SingleRows()


@torch.no_grad()
def test_a_forward_that_fails_leaves_all_caches_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ModelParts(deeper("llama"))
    side_by_side = SideBySide(parts)
    wanted, beside = [forward.run() for forward in begun(parts, 0)], begun(parts, 0)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(parts.base.block_modules[1].mlp, "forward", fail)
        with pytest.raises(MemoryError):
            side_by_side.run(beside)
    assert [forward.cache.length for forward in beside] == [past for past, _ in COUNTS]
    assert all(map(is_near, side_by_side.run(beside), wanted))


@torch.no_grad()
def test_numbers_that_are_not_finite_reach_nobody_else() -> None:
    parts = ModelParts(deeper("llama"))
    wanted, beside = [forward.run() for forward in begun(parts, 0)], begun(parts, 0)
    beside[1].hidden_states.fill_(float("nan"))
    found = SideBySide(parts).run(beside)
    assert found[1].isnan().all()
    assert all(is_near(found[index], wanted[index]) for index in (0, 2, 3))


# -- who computes ----------------------------------------------------------------------------------------------


def run_at_once(gate: SharedGate, programs: Sequence[Forwards]) -> list[BaseException | None]:
    """Run them in a thread each, once all of them wait; gives what each ended with."""

    def run(forwards: Forwards) -> BaseException | None:
        try:
            with torch.no_grad():
                gate.run(forwards, lambda _: None)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(programs)) as pool:
        with gate._gate.computing():  # nobody begins before all have asked
            running = [pool.submit(run, forwards) for forwards in programs]
            eventually(lambda: len(gate._waiting) == len(programs))
        return [each.result(60) for each in running]


def new_gate(parts: ModelParts, most_rows: int = 64) -> SharedGate:
    gate = SharedGate.of(ComputeGate(), parts, most_rows, time.monotonic)
    assert gate is not None
    return gate


def record_rounds(monkeypatch: pytest.MonkeyPatch, gate: SharedGate) -> list[tuple[int, int]]:
    """How many passes run at once from now on, and from which block on."""
    rounds, run = list[tuple[int, int]](), gate._run

    def record(forwards: Sequence[Forward]) -> None:
        rounds.append((len(forwards), forwards[0].part.begin))
        run(forwards)

    monkeypatch.setattr(gate, "_run", record)
    return rounds


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    base = deeper("llama")
    wrap_target_modules(base)
    return ModelParts(base)


def program(parts: ModelParts, *ends: int | None, tokens: int = 1) -> Forwards:
    """Passes of the blocks up to each of these, from none or from the end before on."""
    begin = 0
    for end in ends:
        width = parts.width_after(begin)
        states = torch.ones(1, tokens, width)
        yield Forward(PartForward(parts, states, begin, end, parts.new_cache(begin=begin, end=end)))
        begin = end or 0


def test_passes_of_the_same_blocks_run_at_once(monkeypatch: pytest.MonkeyPatch, parts: ModelParts) -> None:
    gate = new_gate(parts)
    rounds = record_rounds(monkeypatch, gate)
    assert run_at_once(gate, [program(parts, 2, None) for _ in range(3)]) == [None] * 3
    assert rounds == [(3, 0), (3, 2)]


def test_who_is_behind_catches_up(monkeypatch: pytest.MonkeyPatch, parts: ModelParts) -> None:
    """One that is ahead waits for the others, but not for ever."""
    gate = new_gate(parts)
    rounds = record_rounds(monkeypatch, gate)
    ahead = program(parts, 2, None)
    next(ahead)  # the others have their first blocks before them still
    run_at_once(gate, [ahead, program(parts, 2, None), program(parts, 2, None)])
    assert rounds == [(2, 0), (3, 2)]
    rounds.clear()
    ahead = program(parts, 2, None)
    next(ahead)
    run_at_once(gate, [ahead, *(program(parts, None, None, None, None) for _ in range(2))])
    assert rounds == [(2, 0)] * 2 + [(1, 2)] + [(2, 0)] * 2


def test_no_more_rows_than_allowed_run_at_once(monkeypatch: pytest.MonkeyPatch, parts: ModelParts) -> None:
    gate = new_gate(parts, most_rows=8)
    rounds = record_rounds(monkeypatch, gate)
    run_at_once(gate, [program(parts, None, tokens=tokens) for tokens in (3, 9, 3, 3)])
    assert sorted(rounds) == [(1, 0), (1, 0), (2, 0)]


def test_what_fails_fails_alone(parts: ModelParts) -> None:
    """A pass that cannot run, and what is made of one that has: the others get theirs."""

    def of_a_wrong_width() -> Forwards:
        yield Forward(PartForward(parts, torch.ones(1, 1, 3), 0, None, parts.new_cache()))

    def failing_after() -> Forwards:
        yield from program(parts, None)
        raise KeyError("mine")

    gate = new_gate(parts)
    good = program(parts, None)
    found = run_at_once(gate, [good, of_a_wrong_width(), failing_after()])
    assert [type(error) for error in found] == [type(None), ValueError, KeyError]


def test_who_asks_for_more_than_there_is_takes_no_token_in_twice(
    monkeypatch: pytest.MonkeyPatch, parts: ModelParts
) -> None:
    """Where the head fails for all at once, each runs again alone."""
    gate = new_gate(parts)
    wanted = [Forward(part, likeliest_from=0) for part in begun(parts, 0)]
    run_at_once(gate, [iter([forward]) for forward in wanted])
    find, calls = forward_module._find_likeliest, list[int]()

    def fail_at_first(forwards: Sequence[Forward], single_rows: SingleRows) -> None:
        calls.append(len(forwards))
        if len(calls) == 1:
            raise MemoryError
        find(forwards, single_rows)

    monkeypatch.setattr(forward_module, "_find_likeliest", fail_at_first)
    found = [Forward(part, likeliest_from=0) for part in begun(parts, 0)]
    assert run_at_once(gate, [iter([forward]) for forward in found]) == [None] * len(found)
    assert calls == [4, 1, 1, 1, 1]
    assert [each.likeliest for each in found] == [each.likeliest for each in wanted]
    assert [each.part.cache.length for each in found] == [sum(each) for each in COUNTS]


def test_a_model_that_does_not_run_so_after_all_runs_one_by_one(
    monkeypatch: pytest.MonkeyPatch, parts: ModelParts, caplog: pytest.LogCaptureFixture
) -> None:
    gate = new_gate(parts)
    rounds = record_rounds(monkeypatch, gate)

    def refuse(*_: object) -> None:
        raise ExportError("it needs a mask")

    monkeypatch.setattr(gate._side_by_side, "run", refuse)
    assert run_at_once(gate, [program(parts, 2, None) for _ in range(3)]) == [None] * 3
    assert [count for count, _ in rounds] == [3] + [1] * 6
    assert [record.message for record in caplog.records].count(
        "answers are computed one by one from now on: it needs a mask"
    ) == 1


def test_an_error_holds_no_context(parts: ModelParts) -> None:
    """Until Python looks for cycles, which a busy server does seldom."""
    gate = new_gate(parts)
    kept: list[weakref.ref[PartForward]] = []

    def failing() -> Forwards:
        (forward,) = program(parts, None)
        kept.append(weakref.ref(forward.part))
        yield forward
        raise KeyError("mine")

    gc.disable()
    try:
        with torch.no_grad(), suppress(KeyError):
            gate.run(failing(), lambda _: None)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_what_was_computed_for_others_is_not_charged(monkeypatch: pytest.MonkeyPatch, parts: ModelParts) -> None:
    """Of a pass of three tokens beside one of one token each has its part."""
    clock, idle = StandingClock(), {3: 0.0, 1: 0.0}
    gate = SharedGate.of(ComputeGate(), parts, 64, clock)
    assert gate is not None

    def compute(_: Sequence[Forward]) -> None:
        clock.now += 8.0

    monkeypatch.setattr(gate, "_run", compute)

    def run(tokens: int) -> None:
        def count(seconds: float) -> None:
            idle[tokens] += seconds

        with torch.no_grad():
            gate.run(program(parts, None, tokens=tokens), count)

    with ThreadPoolExecutor(2) as pool:
        with gate._gate.computing():
            running = [pool.submit(run, tokens) for tokens in idle]
            eventually(lambda: len(gate._waiting) == 2)
        for each in running:
            each.result(60)
    assert idle == {3: 2.0, 1: 6.0}


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    gate, order = ComputeGate(), list[int]()

    def take(number: int) -> None:
        with gate.computing():
            order.append(number)

    with gate.computing():
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            eventually(lambda: len(gate._turns) == len(threads))
    for thread in threads:
        thread.join(60)
    assert order == list(range(5))


def test_who_trains_comes_in_between_two_tokens_of_a_long_answer(
    monkeypatch: pytest.MonkeyPatch, parts: ModelParts
) -> None:
    """Where a round takes longer than the gate is held, after each."""
    monkeypatch.setattr(shared_gate, "_MOST_HELD_S", 0.0)
    gate = new_gate(parts)
    rounds = record_rounds(monkeypatch, gate)
    turn, was_in = threading.Event(), list[int]()

    def train() -> None:
        with gate._gate.computing():
            was_in.append(len(rounds))

    trainer = threading.Thread(target=train)

    def answer() -> Forwards:
        yield from program(parts, None)
        trainer.start()
        eventually(lambda: len(gate._gate._turns) == 1)
        yield from program(parts, None)
        turn.set()

    with torch.no_grad():
        gate.run(answer(), lambda _: None)
    trainer.join(60)
    assert turn.is_set()
    assert was_in == [1]


# -- with devices --------------------------------------------------------------------------------------------


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
    train_adapter(bundle, server, out, "bottleneck", "answer", size=0.25)
    return out


WAYS: list[dict[str, Any]] = [{"passes": "2,2"}, {"lends": True}, {"adapter": None}, {"passes": "1,1"}]


def opened(bundle: Path, server: RunningServer, adapter: Path, way: dict[str, Any]) -> AbstractContextManager[Any]:
    settings = {"wire_dtype": "fp32", "context_length": 128, "drafts": True, "adapter": adapter, **way}
    retry = ConnectSettings(retry=Retry(max_s=30))
    return open_model(Bundle.open(bundle), server.url, settings.pop("adapter"), connecting=retry, **settings)


def wait_until_idle(gate: SharedGate) -> None:
    """After an answer's last token the server still goes on ahead."""
    eventually(lambda: not gate._computing)


def record_rounds_of(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    gate = server.server.service.shared_gate
    assert gate is not None
    wait_until_idle(gate)
    return record_rounds(monkeypatch, gate)


Answer = Callable[[Any, Sequence[int]], list[int]]


def answer_at_once(
    bundle: Path, server: RunningServer, adapter: Path, answer: Answer, rounds: list[tuple[int, int]]
) -> list[tuple[list[int], list[int]]]:
    """Of each way an answer alone, and one while all others are answered."""
    with ExitStack() as stack, ThreadPoolExecutor(len(WAYS)) as pool:
        models = [stack.enter_context(opened(bundle, server, adapter, way)) for way in WAYS]
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(WAYS))]
        service = server.server.service
        gate = service.shared_gate
        assert gate is not None
        alone = []
        for each in zip(models, prompts, strict=True):
            wait_until_idle(gate)
            alone.append(answer(*each))
        assert {count for count, _ in rounds} <= {1}
        with service.gate.computing():
            running = [pool.submit(answer, *each) for each in zip(models, prompts, strict=True)]
            eventually(lambda: len(gate._waiting) == len(WAYS))
        return list(zip(alone, [each.result(120) for each in running], strict=True))


@pytest.mark.parametrize("draft_length", [0, 3])
def test_answers_at_once_are_those_alone(
    draft_length: int, bundle: Path, server: RunningServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes, with an adapter that was lent, and without any: they share what they ask for at the same time."""
    rounds = record_rounds_of(server, monkeypatch)

    def answer(model: Any, prompt: Sequence[int]) -> list[int]:
        drafts = "server" if draft_length else "off"
        return generated(Context(model), prompt, 12, draft_length=draft_length, drafts=drafts)

    for alone, together in answer_at_once(bundle, server, adapter, answer, rounds):
        assert together == alone
    assert max(rounds)[0] == len(WAYS)


def test_sessions_that_are_lost_lose_nobody_elses_answer(
    bundle: Path, server: RunningServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = record_rounds_of(server, monkeypatch)

    def answer(model: Any, prompt: Sequence[int]) -> list[int]:
        return generated_while_sessions_are_lost(model, server, prompt, 12, Sampling(), 3, "server")[0]

    for alone, together in answer_at_once(bundle, server, adapter, answer, rounds):
        assert together == alone
    assert max(rounds)[0] > 1


def test_live_adapters_and_texts_do_not_share(
    bundle: Path, server: RunningServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live adapter waits for its device in the middle of a pass; training's and evaluations' bits are promised."""
    rounds = record_rounds_of(server, monkeypatch)
    with opened(bundle, server, adapter, {"passes": "live"}) as live:
        assert generated(live, PROMPTS[0], 4, drafts="server", draft_length=2)
    assert not rounds


def test_it_can_be_switched_off(tiny: TinyFactory, bundle: Path, adapter: Path) -> None:
    base = tiny("llama", blocks=3, **LONG).base
    with serving(base, batch_rows=0) as off, opened(bundle, off, adapter, WAYS[0]) as model:
        assert off.server.service.shared_gate is None
        assert len(generated(model, PROMPTS[0], 4)) == 4


def test_contexts_longer_than_attention_reaches_do_not_share(tiny: TinyFactory, parts: ModelParts) -> None:
    """A window hides older tokens, and positions may turn otherwise past some length."""
    config = parts.base.model.config
    config.sliding_window = 100
    try:
        assert SideBySide(parts).most_tokens == min(100, parts.base.max_sequence_length)
        config.sliding_window = 8
        assert SideBySide(parts).most_tokens == 8
    finally:
        del config.sliding_window


@torch.no_grad()
def test_the_likeliest_token_is_the_heads(parts: ModelParts) -> None:
    gate = new_gate(parts)
    pairs = zip(begun(parts, 0), (0, 2, None, 3), strict=True)
    forwards = [Forward(part, likeliest_from=first) for part, first in pairs]
    run_at_once(gate, [iter([forward]) for forward in forwards])
    for forward in forwards:
        first = forward.likeliest_from
        wanted = [] if first is None else parts.base.lm_head(forward.hidden_states[0, first:]).argmax(-1).tolist()
        assert forward.likeliest == wanted
