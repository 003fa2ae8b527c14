"""What a run will do, said before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.training.expected import (
    EvaluationPlan,
    cache_bytes,
    encoding_bytes,
    evaluations_mb,
    expected_mb,
    first_rate_mb,
    set_up_mb,
)
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import kind_of, parameter_count
from dlora.protocol.groups import GroupSpec, group_units
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


def run_line(
    config: Resolved,
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
        cache_mb: disk for what a server gives once.
    """
    units = len(group_units(config.groups(manifest), config.units.unit))
    per_epoch = steps_an_epoch(len(dataset), config.examples_a_step)
    active = config.units.budget_floor(units)
    what = f"all {units} {config.units.unit}s active" if active == units else f"{active} of {units} active"
    total = config.total_steps
    done = f" ({next_step:,} of them done)" if next_step else ""
    if config.asks_once:
        datasets = [dataset, *([] if evaluations is None else [evaluations.dataset])]
        mb = sum(encoding_bytes(config, manifest, each) for each in datasets) / 1e6
        traffic = f"at most {_mb(mb)}, once, before the first step,"
        codec = config.codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
        if sum(cache_bytes(manifest, each, codec) for each in datasets) > cache_mb * 1e6:
            traffic = (
                f"at most {_mb(mb)}, and again, each time it is needed, what has no room in --cache-mb {cache_mb:g},"
            )
    elif not config.needs_server:
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


def adapters_line(config: Resolved, manifest: Manifest) -> str:
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


def basis_lines(config: Resolved, dataset: Dataset) -> list[str]:
    """What comes before the first step, where the server makes a part of the adapters from the data."""
    if config.adapter.basis != "data" or not kind_of(config.spec).server_makes_state:
        return []
    steps = config.basis_pass_steps(len(dataset))
    return [f"first, the server makes A and B from what the base model computes on the data of {_count(steps, 'step')}"]


def _mb(mb: float) -> str:
    return f"{mb:,.{1 if mb < 10 else 0}f} MB"


def _count(number: float, what: str, form: str = "") -> str:
    return f"{number:,{form}} {what}" + ("" if number == 1 else "s")


def kill_revive_lines(config: Resolved, groups: Sequence[GroupSpec]) -> list[str]:
    """What it costs that not all units are active, and whether the run is long enough; nothing where all are."""
    kr = config.units
    units = len(group_units(groups, kr.unit))
    active = kr.budget_floor(units)
    if active == units:
        return []
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
        lines.append(
            f"warning: {config.steps:,} steps are too few for {what}; use {more}--active-fraction 1"
        )
    return lines


