"""What a run will do, said before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.training.expected import (
    EvaluationPlan,
    begins_with_two_epochs,
    cache_bytes,
    encoding_bytes,
    evaluations_mb,
    expected_mb,
    first_rate_mb,
    first_rows_bytes,
    may_keep_reads,
    reads_bytes,
    set_up_mb,
)
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import kind_of, parameter_count
from dlora.protocol.groups import group_units
from dlora.protocol.kill_revive import Timetable, steps_needed
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import module_names, number_ranges
from dlora.protocol.wire_codecs import TensorRole


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


def plan_lines(
    config: Resolved, manifest: Manifest, datasets: Sequence[Dataset], next_step: int, *, has_state: bool
) -> list[str]:
    """What a run is told to do from ``next_step`` on, a line for each thing.

    Args:
        datasets: what it trains on, and what is held out where something is.
        has_state: whether the device has what the server keeps, of an earlier part of the run or of another run.
    """
    steps, total = steps_an_epoch(len(datasets[0]), config.examples_a_step), config.total_steps
    done = f" ({next_step:,} of them done)" if next_step else ""
    units = len(group_units(config.groups(manifest), config.units.unit))
    active = config.units.budget_floor(units)
    what = f"all {units} {config.units.unit}s active" if active == units else f"{active} of {units} active"
    traffic = _traffic(config, manifest, datasets, next_step, has_state=has_state)
    lines = [
        f"run: {_count(total, 'step')}{done}, {steps:,} an epoch, {_count(total / steps, 'epoch', '.1f')}; "
        f"{what}; {traffic} will cross the wire",
        _adapters_line(config, manifest),
    ]
    if not has_state and config.adapter.basis == "data" and kind_of(config.spec).server_makes_state:
        pass_steps = _count(config.basis_pass_steps(len(datasets[0])), "step")
        lines.append(f"first, the server makes A and B from what the base model computes on the data of {pass_steps}")
    if config.device_blocks and config.invocation and begins_with_two_epochs(config, datasets[0]):
        needed = _mb(first_rows_bytes(config, manifest, datasets[0]) / 1e6)
        if config.keeps_outputs:
            how = f"once: its keys and values take {needed} on the disk"
        else:
            how = f"in each epoch: --cache-mb has no room for {needed} of keys and values"
        lines.append(f"what comes before answers is run {how}")
    if may_keep_reads(config, manifest, datasets[0]):
        lines += _reads_lines(config, reads_bytes(config, manifest, datasets[0]))
    return lines if active == units else lines + _kill_revive_lines(config, units, active)


def _reads_lines(config: Resolved, nbytes: int) -> list[str]:
    """What becomes of what adapters read in the base pass, of so many bytes."""
    what = "what adapters read in the base pass is"
    if config.keeps_reads:
        return [f"{what} kept, {_mb(nbytes / 1e6)} on the disk: from the second epoch on a step waits once less"]
    has_room = nbytes <= (config.placement.cache_mb or 0.0) * 1e6  # with --record nothing is kept all the same
    return [] if has_room else [f"{what} not kept: --cache-mb has no room for {_mb(nbytes / 1e6)}"]


def _traffic(
    config: Resolved, manifest: Manifest, datasets: Sequence[Dataset], next_step: int, *, has_state: bool
) -> str:
    """About how much will cross the wire."""
    if not config.needs_server:
        return "nothing"
    if config.asks_once:
        mb = _mb(sum(encoding_bytes(config, manifest, each) for each in datasets) / 1e6)
        cache_mb = config.placement.cache_mb or 0.0
        codec = config.codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
        if sum(cache_bytes(manifest, each, codec) for each in datasets) > cache_mb * 1e6:
            return f"at most {mb}, and again, each time it is needed, what has no room in --cache-mb {cache_mb:g},"
        return f"at most {mb}, once, before the first step,"
    dataset, *held_out = datasets
    training_mb = expected_mb(config, manifest, dataset, next_step)
    training_mb += set_up_mb(config, manifest, dataset, has_state=has_state) + first_rate_mb(config, manifest, dataset)
    traffic = f"about {_mb(training_mb)} for training"
    for each in held_out:
        evaluations = EvaluationPlan(each, config.evaluate_every)
        count = _count(evaluations.count_left(next_step, config.total_steps), "evaluation")
        traffic += f" and {_mb(evaluations_mb(config, manifest, evaluations, next_step))} for {count}"
    return traffic


def _adapters_line(config: Resolved, manifest: Manifest) -> str:
    """What is trained, and how fast: the kind, its size, where it stands and the learning rate."""
    groups = config.groups(manifest)
    blocks = {group.block for group in groups}
    every = manifest.base_model.blocks
    where = "" if len(blocks) == every else f" of {every} ({number_ranges(blocks)})"
    decay = f", weight decay {config.optimizer.weight_decay:g}" if config.optimizer.weight_decay else ""
    rate = "to be found" if config.optimizer.lr is None else f"{config.optimizer.lr:g}"
    return (
        f"adapters: {config.adapter.kind}, rank {config.adapter.rank}, {', '.join(module_names(groups))} in "
        f"{_count(len(blocks), 'block')}{where}; {_count(parameter_count(config.spec, groups), 'number')} to train, "
        f"learning rate {rate}{decay}"
    )


def _mb(mb: float) -> str:
    return f"{mb:,.{1 if mb < 10 else 0}f} MB"


def _count(number: float, what: str, form: str = "") -> str:
    return f"{number:,{form}} {what}" + ("" if number == 1 else "s")


def _kill_revive_lines(config: Resolved, units: int, active: int) -> list[str]:
    """What it costs that not all units are active, and whether the run is long enough."""
    kr = config.units
    if config.device_blocks:
        lines = [f"{active} of {units} {kr.unit}s are trained at a time; the others keep what they have learnt"]
    else:
        lines = [f"{active} of {units} {kr.unit}s active: that saves traffic and costs quality"]
    if kr.gives_to_server:
        lines.append(f"the server is given what killed {kr.unit}s have learnt, and applies it (SECURITY.md)")
    timetable = Timetable(kr, units, config.steps)
    if not timetable.is_fixed and not timetable.is_long_enough:
        needed = steps_needed(kr, units)
        more = f"{needed:,} steps or more, or " if needed < MAX_STEPS else ""
        what = "trials" if timetable.begins_at_floor else "warm-up, ramp and trials"
        lines.append(f"warning: {config.steps:,} steps are too few for {what}; use {more}--active-fraction 1")
    return lines
