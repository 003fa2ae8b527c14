"""What a run will do, said before it does it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.model.ends import LongArray
from dlora.edge.model.text_packs import TextPacks
from dlora.edge.model.trunk_cache import most_bytes, record_bytes, text_digest
from dlora.edge.model.trunk_source import encoded_width
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.first_rate import USUAL_TRIES, probed_steps
from dlora.protocol.adapters import crossings, kind_of, parameter_count
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import Timetable, steps_needed
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import module_names, number_ranges
from dlora.protocol.traffic import (
    Traffic,
    adapter_state_traffic,
    basis_traffic,
    encode_traffic,
    micro_batch_traffic,
    text_bytes,
)
from dlora.protocol.wire_codecs import TensorRole

_SAMPLES: Final = 1000
# benchmarks/economy.py, b10, seed 0, lora on q and v, each at its best rate: docs/benchmarks.md has the table.
QUALITY_AT_ONE_EIGHTH: Final = "on ten intents of Banking77 1/8 had 91% of test messages right, all active 98%"


def data_line(name: str, path: Path, dataset: Dataset) -> str:
    """What was made of a data file."""
    facts = dataset.facts
    examples, tokens = _count(len(dataset), "example"), _count(dataset.tokens, "token")
    if facts.form == "documents":
        examples = f"{_count(facts.rows, 'text')} in {examples}"
    form = f" ({facts.form})" if facts.form else ""
    line = f"{name}: {path.name}{form}, {examples}, {tokens}, {dataset.labelled:,} labelled"
    for places, what in (
        (facts.truncated, "truncated"), (facts.skipped, "skipped"), (facts.empty_answers, "with an empty answer"),
        (facts.calls_left_out, "with calls of tools that the chat template leaves out"),
    ):  # fmt: skip
        if places.count:
            line += f"; {places.count:,} {what} ({places})"
    return line


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


def total_steps(dataset: Dataset, *, epochs: float, steps: int | None, batch_size: int, grad_accum: int) -> int:
    """How many optimizer steps a run has, at least 1. Raises ``UsageError`` for more than a run may have."""
    if steps is not None:
        return steps
    if not epochs > 0:
        raise UsageError("--epochs must be above 0")
    wanted = epochs * steps_an_epoch(len(dataset), batch_size * grad_accum)
    if not wanted <= MAX_STEPS:
        raise UsageError(f"--epochs {epochs:g} makes more than {MAX_STEPS:,} steps; lower it")
    return max(1, math.ceil(wanted))


def run_line(
    config: TrainConfig,
    manifest: Manifest,
    dataset: Dataset,
    evaluations: EvaluationPlan | None,
    next_step: int,
    *,
    has_state: bool,
    cache_mb: float = 0.0,
) -> str:
    """Steps, epochs, what is trained, and about how many MB will cross the wire.

    Args:
        has_state: whether the device has what the server keeps, of an earlier part of the run or of another run.
        cache_mb: disk for what the server gives in the mode ``trunk``.
    """
    units = len(group_units(config.groups(manifest), config.kill_revive.unit))
    per_epoch = steps_an_epoch(len(dataset), config.batch_size * config.grad_accum)
    active = config.kill_revive.budget_floor(units)
    what = f"all {units} {config.kill_revive.unit}s active" if active == units else f"{active} of {units} active"
    total = config.total_steps
    done = f" ({next_step:,} of them done)" if next_step else ""
    if config.mode == "trunk":
        datasets = [dataset, *([] if evaluations is None else [evaluations.dataset])]
        mb = sum(encoding_bytes(config, manifest, each) for each in datasets) / 1e6
        traffic = f"at most {_mb(mb)}, once, before the first step,"
        codec = config.codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
        if sum(cache_bytes(manifest, each, codec) for each in datasets) > cache_mb * 1e6:
            traffic = (
                f"at most {_mb(mb)}, and again, each time it is needed, what has no room in --cache-mb {cache_mb:g},"
            )
    elif config.mode == "local":
        traffic = "nothing"
    else:
        mb = expected_mb(config, manifest, dataset, next_step)
        mb += set_up_mb(config, manifest, dataset, has_state=has_state) + first_rate_mb(config, manifest, dataset)
        traffic = f"about {_mb(mb)} for training"
        if evaluations is not None:
            mb = evaluations_mb(config, manifest, evaluations, next_step)
            traffic += f" and {_mb(mb)} for {_count(evaluations.count_left(next_step, total), 'evaluation')}"
    return (
        f"run: {_count(total, 'step')}{done}, {per_epoch:,} an epoch, {_count(total / per_epoch, 'epoch', '.1f')}; "
        f"{what}; {traffic} will cross the wire"
    )


def encoding_bytes(config: TrainConfig, manifest: Manifest, dataset: Dataset) -> int:
    """What asking the server for every text of ``dataset`` puts on the wire, in the mode ``trunk``: an upper bound, for
    what comes after an example's last label is not sent, nor the same text twice."""
    codecs, width = config.codecs, encoded_width(manifest)
    up = text_bytes(dataset.tokens, manifest.base_model.embedding_size, codecs, config.send)
    return up + codecs.of(TensorRole.LAST_HIDDEN_STATES).nbytes(dataset.tokens, width)


def cache_bytes(manifest: Manifest, dataset: Dataset, codec: str) -> int:
    """The most that keeping hidden states of every text of ``dataset`` takes, in the mode ``trunk``."""
    return most_bytes(len(dataset), int(dataset.lengths.sum()), encoded_width(manifest), codec)


def filling(config: TrainConfig, manifest: Manifest, texts: Iterable[LongArray]) -> tuple[Traffic, int]:
    """What asking the server once for each of ``texts`` puts on the wire, in the mode ``trunk``, and the bytes of the
    cache that keeps the answers; without the greeting, and of a server that takes micro-batches of the usual size."""
    codecs, width = config.codecs, encoded_width(manifest)
    packs = TextPacks(texts, text_digest)
    codec = codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
    kept = sum(record_bytes(codec, tokens, width) for index in range(len(packs)) for tokens in packs.lengths(index))
    total = Traffic(0, 0, 0)
    for index in range(len(packs)):
        total += encode_traffic(
            packs.lengths(index),
            width=width,
            embedding_size=manifest.base_model.embedding_size,
            codecs=codecs,
            send=config.send,
        )
    return total, kept


def adapters_line(config: TrainConfig, manifest: Manifest) -> str:
    """What is trained, and how fast: the kind, its size, where it stands and the learning rate."""
    groups = config.groups(manifest)
    blocks = {group.block for group in groups}
    every = manifest.base_model.blocks
    where = "" if len(blocks) == every else f" of {every} ({number_ranges(blocks)})"
    decay = f", weight decay {config.optimizer.weight_decay:g}" if config.optimizer.weight_decay else ""
    rate = "to be found" if config.optimizer.lr is None else f"{config.optimizer.lr:g}"
    return (
        f"adapters: {config.kind}, rank {config.rank}, {', '.join(module_names(groups))} in "
        f"{_count(len(blocks), 'block')}{where}; {_count(parameter_count(config.adapter, groups), 'number')} to train, "
        f"learning rate {rate}{decay}"
    )


def basis_lines(config: TrainConfig, dataset: Dataset) -> list[str]:
    """What comes before the first step, where the server makes a part of the adapters from the data."""
    if config.basis != "data" or not kind_of(config.adapter).server_makes_state:
        return []
    steps = config.basis_pass_steps(len(dataset))
    return [f"first, the server makes A and B from what the base model computes on the data of {_count(steps, 'step')}"]


def _mb(mb: float) -> str:
    return f"{mb:,.{1 if mb < 10 else 0}f} MB"


def _count(number: float, what: str, form: str = "") -> str:
    return f"{number:,{form}} {what}" + ("" if number == 1 else "s")


def kill_revive_lines(config: TrainConfig, groups: Sequence[GroupSpec]) -> list[str]:
    """What it costs that not all units are active, and whether the run is long enough; nothing where all are."""
    kr = config.kill_revive
    units = len(group_units(groups, kr.unit))
    active = kr.budget_floor(units)
    if active == units:
        return []
    if config.mode != "split":
        lines = [f"{active} of {units} {kr.unit}s are trained at a time; the others keep what they have learnt"]
    else:
        lines = [f"{active} of {units} {kr.unit}s active: that saves traffic and costs quality"]
    if (config.mode, config.kind, kr.score) == ("split", "lora", "change"):
        lines[0] += f"; {QUALITY_AT_ONE_EIGHTH}"
    if kr.gives_to_server:
        lines.append(f"the server is given what killed {kr.unit}s have learnt, and applies it (SECURITY.md)")
    timetable = Timetable(kr, units, config.steps)
    if not timetable.is_fixed and not timetable.is_long_enough:
        needed = steps_needed(kr, units)
        more = f"{needed:,} steps or more, or " if needed < MAX_STEPS else ""
        what = "trials" if timetable.begins_at_floor else "warm-up, ramp and trials"
        lines.append(
            f"warning: {config.steps:,} steps are too few for {what}; use {more}--active-fraction 1"
        )
    return lines


def units_within(config: TrainConfig, manifest: Manifest, dataset: Dataset, bytes_per_token: int) -> int:
    """How many units may be active for a mean step to cost at most so many bytes a token, both ways; without the
    report, which is some hundred bytes a step. Where units differ, the costliest count.

    Raises ``UsageError`` where one is too many.
    """
    groups = config.groups(manifest)
    widths = [crossing.total_width for crossing in crossings(config.adapter, groups)]
    units = sorted(
        group_units(groups, config.kill_revive.unit), key=lambda unit: -sum(widths[group] for group in unit)
    )

    def cost(count: int) -> int:
        live = sorted(group for unit in units[:count] for group in unit)
        per_step = config.batch_size * config.grad_accum
        steps = steps_an_epoch(len(dataset), per_step)
        return math.ceil(_mean_bytes(config, manifest, dataset, live) * steps / dataset.tokens)

    count = bisect.bisect_right(range(1, len(units) + 1), bytes_per_token, key=cost)
    if not count:
        raise UsageError(
            f"--bytes-per-token {bytes_per_token:,} is too little: one {config.kill_revive.unit} of the "
            f"{len(units)} costs {cost(1):,} on these data"
        )
    return count


def expected_mb(config: TrainConfig, manifest: Manifest, dataset: Dataset, next_step: int) -> float:
    """What training from ``next_step`` on will put on the wire, in MB of 10**6 bytes: mean micro-batches, and as many
    units as the timetable lets be active. Units that fade, and evaluations, come on top."""
    return _expected(config, manifest, dataset, next_step, _total_bytes) / 1e6


def expected_round_trips(config: TrainConfig, manifest: Manifest, dataset: Dataset) -> float:
    """How often training from its beginning on will wait for the server, likewise."""
    return _expected(config, manifest, dataset, 0, lambda traffic: traffic.round_trips)


def _expected(
    config: TrainConfig, manifest: Manifest, dataset: Dataset, next_step: int, count: Callable[[Traffic], int]
) -> float:
    steps = range(next_step, config.total_steps)
    mean = _by_share(config, manifest, lambda live: count(_mean_traffic(config, manifest, dataset, live)))
    return len(steps) * mean(_active_share(config, manifest, steps))


def _total_bytes(traffic: Traffic) -> int:
    return traffic.bytes_up + traffic.bytes_down


def set_up_mb(config: TrainConfig, manifest: Manifest, dataset: Dataset, *, has_state: bool) -> float:
    """What setting up what the server keeps will put on the wire, in MB of 10**6 bytes: nothing for ``lora``."""
    codecs, groups, kind = config.codecs, config.groups(manifest), kind_of(config.adapter)
    codec = codecs.of(TensorRole.ADAPTER_STATE)
    sizes = [
        [codec.nbytes(*shape) for shape in kind.state_shapes(config.adapter, group)]
        for group in groups
    ]
    if not any(sizes):
        return 0.0
    traffic = adapter_state_traffic(sizes, made=kind.server_makes_state and not has_state)
    total = float(traffic.bytes_up + traffic.bytes_down)
    if kind.server_makes_state and config.basis == "data" and not has_state:
        steps = config.basis_pass_steps(len(dataset))
        total += steps * _mean_bytes(config, manifest, dataset, (), is_basis=True)
    return total / 1e6


def first_rate_mb(config: TrainConfig, manifest: Manifest, dataset: Dataset, tries: int = USUAL_TRIES) -> float:
    """What finding the learning rate will put on the wire, in MB of 10**6 bytes, likewise, with so many tries, which
    nobody knows before: nothing where it is given."""
    if config.optimizer.lr is not None:
        return 0.0
    step, evaluation = (
        _by_share(config, manifest, partial(_mean_bytes, config, manifest, dataset, trains=trains))
        for trains in (True, False)
    )
    share = _active_share(config, manifest, range(1))
    evaluations = tries * len(probed_steps(config.batch_size * config.grad_accum, config.total_steps))
    return (step(share) + evaluations * evaluation(share)) / 1e6


def evaluations_mb(config: TrainConfig, manifest: Manifest, evaluations: EvaluationPlan, next_step: int) -> float:
    """What all evaluations from ``next_step`` on will put on the wire, in MB of 10**6 bytes, likewise."""
    cost = partial(_mean_bytes, config, manifest, evaluations.dataset, grad_accum=1, trains=False)
    mean_bytes = _by_share(config, manifest, cost)
    micro_batches = -(-len(evaluations.dataset) // config.batch_size)
    return sum(
        len(steps) * micro_batches * mean_bytes(_active_share(config, manifest, steps)) / 1e6
        for steps in evaluations.evaluation_steps(next_step, config.total_steps)
    )


def _by_share(
    config: TrainConfig, manifest: Manifest, cost: Callable[[Sequence[int]], float]
) -> Callable[[float], float]:
    """What something costs by the share of the units that are active, of what it costs with these live groups."""
    none, everything = (cost(live) for live in ((), range(len(config.groups(manifest)))))
    return lambda share: none + share * (everything - none)


def _active_share(config: TrainConfig, manifest: Manifest, steps: range) -> float:
    """Mean share of the units that are active in these steps."""
    units = len(group_units(config.groups(manifest), config.kill_revive.unit))
    timetable = Timetable(config.kill_revive, units, config.steps)
    if timetable.is_fixed:
        return timetable.floor / units
    # A sample: a run may have a billion steps.
    looked_at = steps[:: max(1, len(steps) // _SAMPLES)]
    return sum(timetable.budget(step - config.part_begins) for step in looked_at) / (units * max(1, len(looked_at)))


def _mean_bytes(config: TrainConfig, manifest: Manifest, dataset: Dataset, live: Sequence[int], **how: Any) -> int:
    """Bytes of a mean step, both ways; ``how`` as ``_mean_traffic`` has it."""
    return _total_bytes(_mean_traffic(config, manifest, dataset, live, **how))


def _mean_traffic(
    config: TrainConfig,
    manifest: Manifest,
    dataset: Dataset,
    live: Sequence[int],
    *,
    grad_accum: int | None = None,
    trains: bool = True,
    is_basis: bool = False,
) -> Traffic:
    """Of a mean step in which the groups ``live`` take part, or that a basis is made of."""
    per_step = config.batch_size * (grad_accum or config.grad_accum)
    # Of a step: the last one of an epoch may be smaller.
    sequences = len(dataset) / steps_an_epoch(len(dataset), per_step)
    micro_batches = -(-sequences // config.batch_size)
    share = sequences / micro_batches
    mean_micro_batch: dict[str, Any] = {
        "tokens": round(share * dataset.tokens / len(dataset)),
        "sequences": round(share),
        "labelled": max(1, round(share * dataset.labelled / len(dataset))),
        "embedding_size": manifest.base_model.embedding_size,
        "hidden_size": manifest.base_model.hidden_size,
        "codecs": config.codecs if trains else config.codecs.for_evaluation(),
        "send": config.send,
    }
    rows = None
    if config.invocation:
        rows = round(share * dataset.acting_on_answers(config.invocation).mean_crossing_rows)
    if is_basis:
        traffic = basis_traffic(rows=rows, **mean_micro_batch)
    else:
        traffic = micro_batch_traffic(
            crossings(config.adapter, config.groups(manifest)),
            live=live,
            with_grads=live if trains else (),
            answered=live[1:] if trains else (),
            rows=rows,
            **mean_micro_batch,
        )
    count = int(micro_batches)
    return Traffic(count * traffic.bytes_up, count * traffic.bytes_down, count * traffic.round_trips)
