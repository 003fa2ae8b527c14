"""What groups read in the base pass is kept, and used while the server reads the same: no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import INVOCATION, random_answers
from families import VOCABULARY
from serving import config, final_weights, random_dataset, training
from test_traffic import BLOCKS, Bench, bench, micro_batches_traffic

from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.model.kept_reads import KeptReads, open_kept_reads, reads_width
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.trainer import Trainer
from dlora.protocol import passes as passes_module
from dlora.protocol.adapters import Crossing, crossings
from dlora.protocol.frames import frame_bytes
from dlora.protocol.manifest import load_manifest
from dlora.protocol.tensors import SCALE_BYTES
from dlora.protocol.traffic import Traffic, report_traffic
from dlora.protocol.wire_codecs import TensorRole, encode_floats

__all__ = ["bench"]

WIDTHS = (Crossing(4, (4,)), Crossing(6, (4, 4)), Crossing(6, (4, 4)))
BATCH = MicroBatch(
    ids=np.array([3, 4, 5, 6, 7]), sequence_lengths=np.array([2, 3], np.int32),
    label_positions=np.array([1], np.int32), labels=np.array([4]), crossing_positions=np.array([1, 3, 4], np.int32),
)  # fmt: skip
EPOCHS = 3


def open_reads(
    path: Path, dtype: str, widths: Sequence[Crossing] = WIDTHS, limit: int = 1 << 20, lora: str = "groups"
) -> KeptReads:
    owner = CacheOwner(
        base_model="ab", blocks=0, width=reads_width(dtype, widths), embeddings="fp32", codec=dtype, lora=lora
    )
    return KeptReads(TrunkCache(path, owner, limit=limit), widths)


def read_by(rows: int, dtype: Any, seed: int = 0) -> dict[int, np.ndarray]:
    """What groups of ``WIDTHS`` have read, as it is stored."""
    rng = np.random.default_rng(seed)
    values = {group: rng.normal(size=(rows, each.input_width)).astype(np.float32) for group, each in enumerate(WIDTHS)}
    return {group: encode_floats(each, dtype).data for group, each in values.items()}


def found_in(kept: KeptReads, batch: MicroBatch = BATCH) -> dict[int, np.ndarray]:
    parts = [(groups, np.split(tensor.data, len(groups))) for groups, tensor in kept.find(batch)]
    return {group: rows for groups, of_groups in parts for group, rows in zip(groups, of_groups, strict=True)}


def assert_found(kept: KeptReads, read: dict[int, np.ndarray], batch: MicroBatch = BATCH) -> None:
    found = found_in(kept, batch)
    assert found.keys() == read.keys()
    for group, rows in read.items():
        assert np.array_equal(found[group], rows)


@pytest.mark.parametrize("dtype", ["int8", "fp32"])
@pytest.mark.parametrize("batch", [BATCH, replace(BATCH, crossing_positions=None)], ids=["answers", "all"])
def test_what_is_kept_is_found_again_by_another_process(batch: MicroBatch, dtype: str, tmp_path: Path) -> None:
    rows = 5 if batch.crossing_positions is None else 3
    read = read_by(rows, dtype)
    with closing(open_reads(tmp_path / "kept", dtype)) as kept:
        assert kept.find(batch) == []
        kept.keep(batch, read)
        assert_found(kept, read, batch)
    with closing(open_reads(tmp_path / "kept", dtype)) as kept:
        assert [groups for groups, _ in kept.find(batch)] == [(0,), (1, 2)]  # of the same widths
        assert_found(kept, read, batch)


def test_texts_are_found_in_other_company_and_not_without_one_that_is_missing(tmp_path: Path) -> None:
    read = read_by(3, "int8")
    second = MicroBatch(
        ids=BATCH.ids[2:], sequence_lengths=np.array([3], np.int32), label_positions=np.array([0], np.int32),
        labels=np.array([4]), crossing_positions=np.array([1, 2], np.int32),
    )  # fmt: skip
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(second, {group: rows[1:] for group, rows in read.items()})
        assert kept.find(BATCH) == []
        kept.keep(BATCH, read)
        assert_found(kept, {group: rows[1:] for group, rows in read.items()}, second)


def test_what_was_read_otherwise_takes_its_place(tmp_path: Path) -> None:
    first, other = read_by(3, "int8"), read_by(3, "int8", seed=1)
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(BATCH, first)
        size = (tmp_path / "kept").stat().st_size
        kept.keep(BATCH, first)
        assert (tmp_path / "kept").stat().st_size == size
        kept.keep(BATCH, other)
        assert_found(kept, other)
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        assert_found(kept, other)


@pytest.mark.parametrize("group", range(len(WIDTHS)))
def test_what_no_server_may_send_is_not_used(group: int, tmp_path: Path) -> None:
    """Whoever can write the file can make its checks: a scale that is no number, of any group."""
    read = read_by(3, "int8")
    read[group][1, -SCALE_BYTES:] = 0xFF, 0x7F
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(BATCH, read)
        assert kept.find(BATCH) == []


def test_a_server_that_often_reads_something_else_is_not_sent_more(tmp_path: Path) -> None:
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(BATCH, read_by(3, "int8"))
        for is_refused in [False] * 20 + [True] * 8:
            kept.count(is_refused=is_refused)
        assert kept.find(BATCH)
        kept.count(is_refused=True)
        assert kept.find(BATCH) == []
        size = (tmp_path / "kept").stat().st_size
        kept.keep(BATCH, read_by(3, "int8", seed=1))  # nor is more kept, which nobody would use
        assert (tmp_path / "kept").stat().st_size == size


def test_the_file_has_at_most_three_times_what_is_kept(tmp_path: Path) -> None:
    """A server that reads something else each time does not fill the disk."""
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        empty = (tmp_path / "kept").stat().st_size
        kept.keep(BATCH, read_by(3, "int8"))
        of_texts = (tmp_path / "kept").stat().st_size - empty
        for seed in range(1, 20):
            kept.keep(BATCH, read_by(3, "int8", seed))
        assert (tmp_path / "kept").stat().st_size <= empty + 3 * of_texts
        assert kept.find(BATCH)


def test_a_text_that_comes_twice_and_one_of_which_nothing_crosses(tmp_path: Path) -> None:
    twice = replace(
        BATCH, ids=np.array([3, 4, 5, 3, 4, 5, 6]), sequence_lengths=np.array([3, 3, 1], np.int32),
        crossing_positions=np.array([1, 2, 4, 5], np.int32),
    )  # fmt: skip
    read = {group: np.concatenate([rows, rows]) for group, rows in read_by(2, "int8").items()}
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(twice, read)
        assert_found(kept, read, twice)


def test_the_same_tokens_with_other_rows_are_another_text(tmp_path: Path) -> None:
    fewer = replace(BATCH, crossing_positions=np.array([1, 3], np.int32))
    first, second = read_by(3, "int8"), read_by(2, "int8", seed=1)
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(BATCH, first)
        kept.keep(fewer, second)
        found = found_in(kept, BATCH)
        assert all(np.array_equal(found[group][1:], rows[1:]) for group, rows in first.items())
        assert_found(kept, second, fewer)


def test_a_file_in_which_nothing_is_kept_goes(tmp_path: Path) -> None:
    open_reads(tmp_path / "kept", "int8").close()
    assert not (tmp_path / "kept").exists()


def test_nothing_is_sent_early_that_would_take_more_pieces_than_a_server_takes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_reads(tmp_path / "kept", "int8")) as kept:
        kept.keep(BATCH, read_by(3, "int8"))
        monkeypatch.setattr(passes_module, "PIECE_BYTES", 1)
        assert len(kept.find(BATCH)) == passes_module.MOST_PIECES == len(WIDTHS)
        monkeypatch.setattr(passes_module, "MOST_PIECES", 2)
        assert kept.find(BATCH) == []


# -- runs ----------------------------------------------------------------------------------------------


ANSWERS = random_answers(6)


def run_of(passes: str, *, batch_size: int = 1, wire_dtype: str = "int8", dataset: Dataset = ANSWERS) -> Resolved:
    steps = EPOCHS * -(-len(dataset) // batch_size)
    return config(
        kind="bottleneck", invocation=INVOCATION, basis_steps=2, passes=passes, batch_size=batch_size,
        wire_dtype=wire_dtype, total_steps=steps,
    )  # fmt: skip


@contextmanager
def keeping(
    bench: Bench, run: Resolved, path: Path, dataset: Dataset = ANSWERS, limit: int = 1 << 20
) -> Iterator[Trainer]:
    manifest = load_manifest(bench.bundle)
    kept = open_kept_reads(path, manifest, run.spec, run.groups(manifest), run.codecs, run.server.send, limit=limit)
    with closing(kept), training(bench.bundle, bench.server.url, run, dataset, kept_reads=kept) as trainer:
        yield trainer


def steps_of(trainer: Trainer, before: Callable[[int], None] = lambda step: None) -> list[Traffic]:
    """What each step's micro-batches cost; reports and signals are left out."""
    units, ticket = len(trainer.adapters.units), len(trainer.session.ticket or b"")
    found = []
    for step in range(trainer.config.total_steps):
        before(step)
        metrics = trainer.run_step()
        report = report_traffic(units, ticket)
        down = metrics.bytes_down - (report.bytes_down if step else 0)
        found.append(Traffic(metrics.bytes_up - report.bytes_up, down, metrics.round_trips))
    trainer.wait_for_signal()
    return found


def formula(trainer: Trainer, step: int, *, reads_kept: bool) -> Traffic:
    (batch,), live = trainer.batches.step_batches(step), range(len(trainer.groups))
    rows = None if batch.crossing_positions is None else len(batch.crossing_positions)
    return micro_batches_traffic(
        trainer.bundle, [batch], trainer.config.server.wire_dtype, crossings(trainer.config.spec, trainer.groups),
        live=live, with_grads=live, answered=live[1:], rows=rows, passes=trainer.config.passes, reads_kept=reads_kept,
    )  # fmt: skip


def trained_without(bench: Bench, run: Resolved, dataset: Dataset = ANSWERS) -> dict[str, np.ndarray]:
    with training(bench.bundle, bench.server.url, run, dataset) as trainer:
        steps_of(trainer)
        return final_weights(trainer)


def assert_same_weights(trainer: Trainer, wanted: dict[str, np.ndarray]) -> None:
    found = final_weights(trainer)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("wire_dtype", ["int8", "fp32"])
@pytest.mark.parametrize("passes", ["1,1", "2,2", "3,2"])
def test_three_epochs_have_the_same_bits_and_cost_what_the_formula_says(
    bench: Bench, passes: str, wire_dtype: str, tmp_path: Path
) -> None:
    """One text at a time: the server has no other company to round its sums with."""
    run = run_of(passes, wire_dtype=wire_dtype)
    wanted = trained_without(bench, run)
    with keeping(bench, run, tmp_path / "kept") as trainer:
        counted = steps_of(trainer)
        assert_same_weights(trainer, wanted)
        formulas = [formula(trainer, step, reads_kept=step >= len(ANSWERS)) for step in range(len(counted))]
    assert counted == formulas
    assert formulas[-1].round_trips == formulas[0].round_trips - 1


def test_a_server_that_reads_something_else_asks_as_ever(bench: Bench, tmp_path: Path) -> None:
    """Before the second epoch all that is kept is made another; from the third on it is the server's again."""
    run, path = run_of("2,2"), tmp_path / "kept"
    wanted, epoch = trained_without(bench, run), len(ANSWERS)
    with keeping(bench, run, path) as trainer:
        kept = trainer.model._parts.kept_reads  # type: ignore[union-attr]
        assert kept is not None
        codec, each = trainer.config.codecs.of(TensorRole.DELTA), crossings(run.spec, trainer.groups)

        def make_other(step: int) -> None:
            if step == epoch:
                for index in range(epoch):
                    (batch,) = trainer.batches.step_batches(index)
                    found = found_in(kept, batch)
                    assert found
                    kept.keep(batch, {group: rows[:, ::-1] * 0 + 1 for group, rows in found.items()})

        counted = steps_of(trainer, make_other)
        assert_same_weights(trainer, wanted)
        for step, cost in enumerate(counted):
            as_ever, (batch,) = formula(trainer, step, reads_kept=False), trainer.batches.step_batches(step)
            if step // epoch == 1:
                assert batch.crossing_positions is not None
                rows = len(batch.crossing_positions)
                early = frame_bytes(1, [len(each) * codec.nbytes(rows, each[0].output_widths[0])])
                assert cost == as_ever + Traffic(early, 0, 0)
            else:
                assert cost == (as_ever if step < epoch else formula(trainer, step, reads_kept=True))


@pytest.mark.parametrize("limit", [0, 2500])
def test_a_file_without_room_for_all_changes_no_bit(bench: Bench, limit: int, tmp_path: Path) -> None:
    run = run_of("2,2", batch_size=2)
    wanted = trained_without(bench, run)
    with keeping(bench, run, tmp_path / "kept", limit=limit) as trainer:
        counted = steps_of(trainer)
        assert_same_weights(trainer, wanted)
    assert (min(cost.round_trips for cost in counted) == 4) is bool(limit)


def test_groups_of_other_widths_with_several_outputs(bench: Bench, tmp_path: Path) -> None:
    """LoRA of all modules of the last block: no widths alike, so that what is written takes three messages."""
    dataset = random_dataset(VOCABULARY, examples=4)
    run = config(
        target_modules=("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), blocks=(BLOCKS - 1,), passes="2,2",
        batch_size=1, total_steps=8,
    )  # fmt: skip
    wanted = trained_without(bench, run, dataset)
    with keeping(bench, run, tmp_path / "kept", dataset) as trainer:
        counted = steps_of(trainer)
        assert_same_weights(trainer, wanted)
        assert counted == [formula(trainer, step, reads_kept=step >= 4) for step in range(8)]


def test_texts_in_changing_company_change_no_bit(bench: Bench, tmp_path: Path) -> None:
    dataset = random_answers(20)
    run = run_of("2,2", batch_size=3, dataset=dataset)
    wanted = trained_without(bench, run, dataset)
    with keeping(bench, run, tmp_path / "kept", dataset) as trainer:
        counted = steps_of(trainer)
        assert_same_weights(trainer, wanted)
    assert min(cost.round_trips for cost in counted) == 4


def test_evaluations_and_live_runs_keep_nothing(bench: Bench, tmp_path: Path) -> None:
    dataset = random_dataset(VOCABULARY)
    run = config(kind="bottleneck", basis_steps=1, passes="live", wire_dtype="int8", total_steps=2)
    with keeping(bench, run, tmp_path / "kept", dataset) as trainer:
        size = (tmp_path / "kept").stat().st_size
        steps_of(trainer)
        assert (tmp_path / "kept").stat().st_size == size
    with keeping(bench, replace_passes(run), tmp_path / "other", dataset) as trainer:
        trainer.evaluate(dataset)
        assert (tmp_path / "other").stat().st_size == size


def replace_passes(run: Resolved) -> Resolved:
    return config(
        kind="bottleneck", basis_steps=1, passes="2,2", wire_dtype=run.server.wire_dtype, total_steps=run.total_steps
    )
