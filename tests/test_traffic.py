"""Counted bytes and round trips of real steps are the formula's, exactly; and the sockets', with the framing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import VOCABULARY
from proxy import CLOSE, payloads, read_frames, recording_proxy
from serving import RunningServer, config, open_model, random_dataset, serving, training
from tiny import TinyFactory

from dlora.edge.data.batches import MicroBatch, evaluation_batches
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.evaluation import evaluate
from dlora.edge.training.trainer import Trainer
from dlora.protocol import passes as passes_module
from dlora.protocol.adapters import crossings, kind_of
from dlora.protocol.choices import WireDtype
from dlora.protocol.kill_revive import LIVE, UnitState
from dlora.protocol.traffic import Traffic, adapter_state_traffic, micro_batch_traffic, report_traffic
from dlora.protocol.wire_codecs import Codecs, TensorRole

BLOCKS = 4
NOTHING = Traffic(0, 0, 0)
TARGETS = {
    "q,v": ("q_proj", "v_proj"),  # one group a block
    "two-groups": ("q_proj", "gate_proj"),
    "all-linear": ("all-linear",),  # four: qkv, o, gate and up, down
}


@dataclass(frozen=True)
class Bench:
    server: RunningServer
    bundle: Path


@pytest.fixture(scope="module")
def bench(tiny: TinyFactory) -> Iterator[Bench]:
    model = tiny(blocks=BLOCKS, head_dtype="fp32")
    with serving(model.base) as server:
        yield Bench(server, model.bundle)


def micro_batches_traffic(
    bundle: Bundle, batches: Iterable[MicroBatch], wire_dtype: WireDtype, crossing: Sequence[Any] = (), **groups: Any
) -> Traffic:
    """The formula; ``groups``: which of them are live, and which have gradients."""
    base, groups = bundle.manifest.base_model, {"live": (), "with_grads": (), "answered": (), **groups}
    found = NOTHING
    for batch in batches:
        counts = {"tokens": len(batch.ids), "sequences": len(batch.sequence_lengths), "labelled": len(batch.labels)}
        sizes = {"embedding_size": base.embedding_size, "hidden_size": base.hidden_size}
        found += micro_batch_traffic(crossing, **groups, **counts, **sizes, codecs=Codecs.parse(wire_dtype))
    return found


def expected(trainer: Trainer, batches: Sequence[MicroBatch], units: Sequence[int], *, train: bool = True) -> Traffic:
    """The formula, for a model whose groups follow one another."""
    groups = trainer.groups
    states = {group: units[index] for index, unit in enumerate(trainer.adapters.units) for group in unit.groups}
    live = [group for group in range(len(groups)) if states[group] in LIVE]
    active = [group for group in live if states[group] == UnitState.ACTIVE]
    with_grads = [group for group in live if group >= min(active)] if train else []
    passes = trainer.config.passes
    return micro_batches_traffic(
        trainer.bundle, batches, trainer.config.server.wire_dtype, crossings(trainer.config.spec, groups), live=live,
        with_grads=active if passes and train else with_grads, answered=with_grads[1:], passes=passes,
    )  # fmt: skip


def given_traffic(trainer: Trainer, units: Sequence[int]) -> Traffic:
    """Of the step in which killed units are held, where the server is then given what they have learnt."""
    if not trainer.config.units.gives_to_server:
        return NOTHING
    spec, codec = trainer.config.spec, trainer.config.codecs.of(TensorRole.ADAPTER_STATE)
    held = [unit.groups for unit, state in zip(trainer.adapters.units, units, strict=True) if state == UnitState.HELD]
    sizes = [
        [codec.nbytes(*shape) for shape in kind_of(spec).parameter_shapes(spec, trainer.groups[group]).values()]
        for groups in held
        for group in groups
    ]
    return adapter_state_traffic(sizes, made=False)


def even_dataset() -> Dataset:
    """Sequences of one length: the server has no padding to leave out."""
    return Dataset.of([([3 + index] * 6, [2, 3, 4]) for index in range(12)])


def check_steps(trainer: Trainer, steps: int) -> None:
    """Each step's counted traffic is the formula's; the signal of a step comes with the next one."""
    session = trainer.side.crossed.session
    ticket_bytes = len(trainer.session.ticket)
    unit_count = len(trainer.adapters.units)
    waiting = 0
    for step in range(steps):
        batches = trainer.batches.step_batches(step)
        metrics = trainer.run_step()
        report = report_traffic(unit_count, ticket_bytes)
        units = [int(digit) for digit in metrics.units]
        wanted = expected(trainer, batches, units) + given_traffic(trainer, units)
        wanted += Traffic(report.bytes_up, waiting, 0)
        counted = Traffic(metrics.bytes_up, metrics.bytes_down, metrics.round_trips)
        assert counted == wanted, f"step {step}, units {metrics.units}"
        waiting = report.bytes_down
    before = session.bytes_received
    trainer.wait_for_signal()
    assert session.bytes_received - before == waiting


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("active", [1, 2, BLOCKS])
@pytest.mark.parametrize("padded", [True, False], ids=["uneven", "even"])
def test_steps_cost_what_the_formula_says(bench: Bench, wire_dtype: WireDtype, active: int, padded: bool) -> None:
    some = {"active_fraction": 0.0, "score": "static", "static": tuple(range(1, 1 + active))}
    run = config(total_steps=2, grad_accum=2, wire_dtype=wire_dtype, kill_revive=some if active < BLOCKS else {})
    dataset = random_dataset(VOCABULARY) if padded else even_dataset()
    with training(bench.bundle, bench.server.url, run, dataset) as trainer:
        check_steps(trainer, 2)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("passes", ["1,1", "2,1", "2,2", "3,3"])
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_passes_cost_what_the_formula_says(
    kind: str, passes: str, wire_dtype: WireDtype, piece_bytes: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes_module, "PIECE_BYTES", piece_bytes)
    kill_revive = {"active_fraction": 0.0, "score": "static", "static": (1, 3)}
    run = config(
        kind=kind, total_steps=2, wire_dtype=wire_dtype, passes=passes, kill_revive=kill_revive,
        target_modules=TARGETS["all-linear"],
    )  # fmt: skip
    with training(bench.bundle, bench.server.url, run, random_dataset(VOCABULARY)) as trainer:
        check_steps(trainer, 2)


@pytest.mark.parametrize("unit", ["block", "group"])
@pytest.mark.parametrize("targets", ["two-groups", "all-linear"])
def test_traffic_of_blocks_with_several_groups_matches_the_formula(bench: Bench, targets: str, unit: str) -> None:
    kill_revive = {"active_fraction": 0.0, "score": "static", "static": (1, 3), "unit": unit}
    run = config(total_steps=2, kill_revive=kill_revive, target_modules=TARGETS[targets])
    with training(bench.bundle, bench.server.url, run, random_dataset(VOCABULARY)) as trainer:
        check_steps(trainer, 2)
    run = config(total_steps=1, wire_dtype="fp16", target_modules=TARGETS[targets])
    with training(bench.bundle, bench.server.url, run, random_dataset(VOCABULARY)) as trainer:
        check_steps(trainer, 1)


@pytest.mark.parametrize("on_kill", ["fade", "hold_forward", "bypass", "give_to_server"])
def test_traffic_of_killed_and_revived_units_matches_the_formula(bench: Bench, on_kill: str) -> None:
    kill_revive = {
        "active_fraction": 0.25, "on_kill": on_kill, "warmup_steps": 2, "warmup_fraction": 0.0, "ramp_fraction": 0.5,
        "kill_every": 2, "revive_every": 2, "probation": 1,
    }  # fmt: skip
    run = config(total_steps=14, kill_revive=kill_revive)
    with training(bench.bundle, bench.server.url, run, random_dataset(VOCABULARY)) as trainer:
        check_steps(trainer, run.total_steps)


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
def test_without_an_adapter_no_group_exchanges(bench: Bench, wire_dtype: WireDtype) -> None:
    bundle = Bundle.open(bench.bundle)
    dataset = random_dataset(VOCABULARY)
    with open_model(bundle, bench.server.url, None, wire_dtype=wire_dtype, threads=1) as model:
        session = model.connection.session
        before = session.counters
        evaluate(model, dataset, 3)
        counted = Traffic(*(now - then for now, then in zip(session.counters, before, strict=True)))
    wanted = micro_batches_traffic(bundle, evaluation_batches(dataset, 3), wire_dtype)
    assert counted == wanted
    assert wanted.round_trips == 4  # one a micro-batch


def test_an_evaluation_costs_its_forward_pass(bench: Bench) -> None:
    dataset = random_dataset(VOCABULARY)
    with training(bench.bundle, bench.server.url, config(), dataset) as trainer:
        session = trainer.side.crossed.session
        before = Traffic(*session.counters)
        trainer.evaluate(dataset)
        wanted = expected(trainer, list(evaluation_batches(dataset, 3)), [1] * BLOCKS, train=False)
        assert Traffic(*session.counters) == before + wanted


def framing(payload: int, *, masked: bool) -> int:
    """What RFC 6455 adds to a payload of so many bytes."""
    return (2 if payload < 126 else 4 if payload < 65536 else 10) + 4 * masked


def test_the_sockets_carry_the_counted_bytes_and_their_framing(bench: Bench) -> None:
    # Long enough for frames on both sides of 64 KiB.
    dataset = Dataset.of([([3 + index % 90 for index in range(60)], [1, 2, 3])] * 30)
    run = config(total_steps=2, batch_size=30)
    with recording_proxy(bench.server.url) as proxy:
        with training(bench.bundle, proxy.url, run, dataset) as trainer:
            trainer.run_step()
            trainer.run_step()
            trainer.wait_for_signal()
            session = trainer.side.crossed.session
        (recording,) = proxy.recordings
    for raw, counted, masked in (
        (recording.up, session.bytes_sent, True),
        (recording.down, session.bytes_received, False),
    ):
        messages = [len(payload) for payload in payloads(raw)]
        assert sum(messages) == counted
        assert {size < 65536 for size in messages} == {True, False}
        headers = raw.index(b"\r\n\r\n") + 4
        goodbye = [frame for frame in read_frames(raw) if frame.opcode == CLOSE]
        assert len(goodbye) == 1
        framed = sum(framing(size, masked=masked) for size in messages)
        assert len(raw) == headers + counted + framed + goodbye[0].raw_bytes
    assert b"permessage-deflate" not in recording.down
