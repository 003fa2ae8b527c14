"""What a run will put on the wire, and keep: formulas, on the means of its data."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.model.block_weights import encoded_width, keys_width
from dlora.edge.model.ends import LongArray
from dlora.edge.model.kept_outputs_cache import KEYS_CODEC
from dlora.edge.model.kept_reads import reads_width
from dlora.edge.model.text_packs import TextPacks
from dlora.edge.model.trunk_cache import most_bytes, record_bytes, text_digest
from dlora.protocol.adapters import crossings, kind_of
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import group_units
from dlora.protocol.kill_revive import Timetable
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import may_send_early
from dlora.protocol.traffic import (
    Traffic,
    adapter_state_traffic,
    encode_traffic,
    micro_batch_traffic,
    text_bytes,
)
from dlora.protocol.wire_codecs import TensorRole

from .first_rate import USUAL_TRIES, probed_steps
from .resolved import Resolved

_SAMPLES: Final = 1000


@dataclass(frozen=True)
class EvaluationPlan:
    """How often a run will evaluate on which data: every so many steps (0: never), before it begins, and after."""

    dataset: Dataset
    every: int

    def count_left(self, next_step: int, total_steps: int) -> int:
        """How many are still to come at ``next_step``; one that belongs there counts, the one after the run too."""
        return sum(map(len, self.evaluation_steps(next_step, total_steps)))

    def evaluation_steps(self, next_step: int, total_steps: int) -> tuple[range, range, range]:
        """How many steps are done at each of them: before the run, on the way, and after it."""
        between = range(0)
        if self.every:
            between = range((next_step // self.every + 1) * self.every, total_steps, self.every)
        return range(next_step == 0), between, range(total_steps, total_steps + 1)


def total_steps(dataset: Dataset, *, epochs: float, steps: int | None, examples_a_step: int) -> int:
    """How many optimizer steps a run has, at least 1. Raises ``UsageError`` for more than a run may have."""
    if steps is not None:
        return steps
    if not epochs > 0:
        raise UsageError("--epochs must be above 0")
    wanted = epochs * steps_an_epoch(len(dataset), examples_a_step)
    if not wanted <= MAX_STEPS:
        raise UsageError(f"--epochs {epochs:g} makes more than {MAX_STEPS:,} steps; lower it")
    return max(1, math.ceil(wanted))


def encoding_bytes(config: Resolved, manifest: Manifest, dataset: Dataset) -> int:
    """What asking the server for every text of ``dataset`` puts on the wire, once for each: an upper bound, for
    what comes after an example's last label is not sent, nor the same text twice."""
    codecs, width = config.codecs, encoded_width(manifest)
    up = text_bytes(dataset.tokens, manifest.base_model.embedding_size, codecs, config.server.send)
    return up + codecs.of(TensorRole.LAST_HIDDEN_STATES).nbytes(dataset.tokens, width)


def cache_bytes(manifest: Manifest, dataset: Dataset, codec: str) -> int:
    """The most that keeping hidden states of every text of ``dataset`` takes."""
    return most_bytes(len(dataset), int(dataset.lengths.sum()), encoded_width(manifest), codec)


def begins_with_two_epochs(config: Resolved, dataset: Dataset) -> bool:
    """Whether a run takes all its examples twice: what is computed alike each time is worth keeping then."""
    return config.total_steps * config.examples_a_step >= 2 * len(dataset)


def first_rows_bytes(config: Resolved, manifest: Manifest, dataset: Dataset) -> int:
    """The most that keeping keys and values of the rows before answers takes, in the device's blocks.

    Raises ``BundleError`` for blocks that give none.
    """
    rows = sum(example.acts_from or 0 for example in dataset.acting_on_answers(config.invocation))
    return most_bytes(len(dataset), rows, keys_width(manifest, config.device_blocks), KEYS_CODEC)


def may_keep_reads(config: Resolved, manifest: Manifest, dataset: Dataset) -> bool:
    """Whether keeping what groups read in the base pass is of use: in passes, over two epochs or more; where each row
    crosses by itself; and where no signal changes units, for which the device would have to wait."""
    groups = config.groups(manifest)
    units = len(group_units(groups, config.units.unit))
    rows = config.training.batch_size * dataset.acting_on_answers(config.invocation).mean_crossing_rows
    return (
        config.passes is not None
        and not config.device_blocks
        and config.codecs.group_input != "fp16"
        and config.units.budget_floor(units) == units
        and config.steps * config.examples_a_step >= 2 * len(dataset)  # of this part of the run
        and may_send_early(crossings(config.spec, groups), round(rows))
    )


def reads_bytes(config: Resolved, manifest: Manifest, dataset: Dataset) -> int:
    """The most that keeping what groups read in the base pass takes."""
    rows = sum(len(example.crossing_rows) for example in dataset.acting_on_answers(config.invocation))
    dtype = config.codecs.group_input
    width = reads_width(dtype, crossings(config.spec, config.groups(manifest)))
    return most_bytes(len(dataset), rows, width, dtype)


def filling(config: Resolved, manifest: Manifest, texts: Iterable[LongArray]) -> tuple[Traffic, int]:
    """What asking the server once for each of ``texts`` puts on the wire, and the bytes of the
    cache that keeps the answers; without the greeting, and of a server that takes micro-batches of the usual size."""
    codecs, width = config.codecs, encoded_width(manifest)
    packs = TextPacks(texts, text_digest)
    codec = codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
    embedding_size, send = manifest.base_model.embedding_size, config.server.send
    total, kept = Traffic(0, 0, 0), 0
    for lengths in map(packs.lengths, range(len(packs))):
        total += encode_traffic(lengths, width=width, embedding_size=embedding_size, codecs=codecs, send=send)
        kept += sum(record_bytes(codec, tokens, width) for tokens in lengths)
    return total, kept


def units_within(config: Resolved, manifest: Manifest, dataset: Dataset, bytes_per_token: int) -> int:
    """How many units may be active for a mean step to cost at most so many bytes a token, both ways; without the
    report, which is some hundred bytes a step. Where units differ, the costliest count.

    Raises ``UsageError`` where one is too many.
    """
    groups = config.groups(manifest)
    widths = [crossing.total_width for crossing in crossings(config.spec, groups)]
    units = sorted(group_units(groups, config.units.unit), key=lambda unit: -sum(widths[group] for group in unit))

    def cost(count: int) -> int:
        live = sorted(group for unit in units[:count] for group in unit)
        steps = steps_an_epoch(len(dataset), config.examples_a_step)
        return math.ceil(_mean_bytes(config, manifest, dataset, live) * steps / dataset.tokens)

    count = bisect.bisect_right(range(1, len(units) + 1), bytes_per_token, key=cost)
    if not count:
        raise UsageError(
            f"--bytes-per-token {bytes_per_token:,} is too little: one {config.units.unit} of the "
            f"{len(units)} costs {cost(1):,} on these data"
        )
    return count


def expected_mb(config: Resolved, manifest: Manifest, dataset: Dataset, next_step: int) -> float:
    """What training from ``next_step`` on will put on the wire, in MB of 10**6 bytes: mean micro-batches, and as many
    units as the timetable lets be active. Units that fade, and evaluations, come on top."""
    return _expected(config, manifest, dataset, next_step, _total_bytes) / 1e6


def expected_round_trips(config: Resolved, manifest: Manifest, dataset: Dataset) -> float:
    """How often training from its beginning on will wait for the server, likewise."""
    return _expected(config, manifest, dataset, 0, lambda traffic: traffic.round_trips)


def mean_step_traffic(config: Resolved, manifest: Manifest, dataset: Dataset) -> Traffic:
    """Of a mean step in which all units are active, a report left out; round trips as if one micro-batch were under way
    at a time."""
    return _mean_traffic(config, manifest, dataset, range(len(config.groups(manifest))))


def _expected(
    config: Resolved, manifest: Manifest, dataset: Dataset, next_step: int, count: Callable[[Traffic], int]
) -> float:
    def of(steps: range, *, reads_kept: bool) -> float:
        def cost(live: Sequence[int]) -> int:
            return count(_mean_traffic(config, manifest, dataset, live, reads_kept=reads_kept))

        return len(steps) * _by_share(config, manifest, cost)(_active_share(config, manifest, steps))

    steps = range(next_step, config.total_steps)
    if not config.keeps_reads:
        return of(steps, reads_kept=False)
    second_epoch = max(next_step, config.part_begins + steps_an_epoch(len(dataset), config.examples_a_step))
    first, later = range(next_step, min(second_epoch, steps.stop)), range(second_epoch, steps.stop)
    return of(first, reads_kept=False) + of(later, reads_kept=True)


def _total_bytes(traffic: Traffic) -> int:
    return traffic.bytes_up + traffic.bytes_down


def set_up_mb(config: Resolved, manifest: Manifest, dataset: Dataset, *, has_state: bool) -> float:
    """What setting up what the server keeps will put on the wire, in MB of 10**6 bytes: nothing for ``lora``."""
    codecs, groups, kind = config.codecs, config.groups(manifest), kind_of(config.spec)
    codec = codecs.of(TensorRole.ADAPTER_STATE)
    sizes = [[codec.nbytes(*shape) for shape in kind.state_shapes(config.spec, group)] for group in groups]
    if not any(sizes):
        return 0.0
    traffic = adapter_state_traffic(sizes, made=kind.server_makes_state and not has_state)
    total = float(traffic.bytes_up + traffic.bytes_down)
    if kind.server_makes_state and config.adapter.basis == "data" and not has_state:
        steps = config.basis_pass_steps(len(dataset))
        total += steps * _mean_bytes(config, manifest, dataset, (), is_basis=True)
    return total / 1e6


def first_rate_mb(config: Resolved, manifest: Manifest, dataset: Dataset, tries: int = USUAL_TRIES) -> float:
    """What finding the learning rate will put on the wire, in MB of 10**6 bytes, likewise, with so many tries, which
    nobody knows before: nothing where it is given."""
    if config.optimizer.lr is not None:
        return 0.0
    step, evaluation = (
        _by_share(config, manifest, partial(_mean_bytes, config, manifest, dataset, trains=trains))
        for trains in (True, False)
    )
    share = _active_share(config, manifest, range(1))
    evaluations = tries * len(probed_steps(config.examples_a_step, config.total_steps))
    return (step(share) + evaluations * evaluation(share)) / 1e6


def evaluations_mb(config: Resolved, manifest: Manifest, evaluations: EvaluationPlan, next_step: int) -> float:
    """What all evaluations from ``next_step`` on will put on the wire, in MB of 10**6 bytes, likewise."""
    cost = partial(_mean_bytes, config, manifest, evaluations.dataset, grad_accum=1, trains=False)
    mean_bytes = _by_share(config, manifest, cost)
    micro_batches = -(-len(evaluations.dataset) // config.training.batch_size)
    return sum(
        len(steps) * micro_batches * mean_bytes(_active_share(config, manifest, steps)) / 1e6
        for steps in evaluations.evaluation_steps(next_step, config.total_steps)
    )


def _by_share(config: Resolved, manifest: Manifest, cost: Callable[[Sequence[int]], float]) -> Callable[[float], float]:
    """What something costs by the share of the units that are active, of what it costs with these live groups."""
    none, everything = (cost(live) for live in ((), range(len(config.groups(manifest)))))
    return lambda share: none + share * (everything - none)


def _active_share(config: Resolved, manifest: Manifest, steps: range) -> float:
    """Mean share of the units that are active in these steps."""
    units = len(group_units(config.groups(manifest), config.units.unit))
    timetable = Timetable(config.units, units, config.steps)
    if timetable.is_fixed:
        return timetable.floor / units
    # A sample: a run may have a billion steps.
    looked_at = steps[:: max(1, len(steps) // _SAMPLES)]
    return sum(timetable.budget(step - config.part_begins) for step in looked_at) / (units * max(1, len(looked_at)))


def _mean_bytes(config: Resolved, manifest: Manifest, dataset: Dataset, live: Sequence[int], **how: Any) -> int:
    """Bytes of a mean step, both ways; ``how`` as ``_mean_traffic`` has it."""
    return _total_bytes(_mean_traffic(config, manifest, dataset, live, **how))


def _mean_traffic(
    config: Resolved,
    manifest: Manifest,
    dataset: Dataset,
    live: Sequence[int],
    *,
    grad_accum: int | None = None,
    trains: bool = True,
    is_basis: bool = False,
    reads_kept: bool = False,
) -> Traffic:
    """Of a mean step in which the groups ``live`` take part, or that a basis is made of."""
    per_step = config.training.batch_size * (grad_accum or config.training.grad_accum)
    # Of a step: the last one of an epoch may be smaller.
    sequences = len(dataset) / steps_an_epoch(len(dataset), per_step)
    micro_batches = -(-sequences // config.training.batch_size)
    share = sequences / micro_batches
    mean_micro_batch: dict[str, Any] = {
        "tokens": round(share * dataset.tokens / len(dataset)),
        "sequences": round(share),
        "labelled": max(1, round(share * dataset.labelled / len(dataset))),
        "embedding_size": manifest.base_model.embedding_size,
        "hidden_size": manifest.base_model.hidden_size,
        "codecs": config.codecs if trains else config.codecs.for_evaluation(),
        "send": config.server.send,
    }
    rows = None
    if config.invocation:
        rows = round(share * dataset.acting_on_answers(config.invocation).mean_crossing_rows)
    if is_basis:
        traffic = micro_batch_traffic(is_basis=True, rows=rows, **mean_micro_batch)
    else:
        traffic = micro_batch_traffic(
            crossings(config.spec, config.groups(manifest)),
            live=live,
            with_grads=live if trains else (),
            answered=live[1:] if trains else (),
            rows=rows,
            passes=config.passes,
            reads_kept=reads_kept,
            **mean_micro_batch,
        )
    count = int(micro_batches)
    return Traffic(count * traffic.bytes_up, count * traffic.bytes_down, count * traffic.round_trips)
