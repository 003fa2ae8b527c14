"""A run's settings, completed from its options and its data: what ``train`` runs and ``plan`` reckons with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.loading import resolve_max_length
from dlora.edge.run.plan import total_steps, units_within
from dlora.edge.run.run_file import RunSettings
from dlora.edge.training.config import TrainConfig, check_units
from dlora.edge.training.defaults import DEFAULTS
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.protocol.choices import UnitKind
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups, number_ranges, spread_units

from .adapter_settings import (
    choose_adapters,
    choose_where_adapters_act,
    parse_blocks,
    parse_numbers,
    target_modules_of,
)
from .placement_settings import choose_placement, has_room_to_hold

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset

# Of a run that was not told how often to evaluate: where it is to keep its best evaluation; and where they are cheap,
# the ones before and after it among them.
EVALUATIONS_FOR_THE_BEST: Final = 10
EVALUATIONS_WHERE_CHEAP: Final = 5
_CHEAP: Final = 0.1  # of the run


@dataclass(frozen=True)
class Configured:
    """A run whose settings are all chosen.

    Attributes:
        settings: as ``run.json`` keeps them.
        dataset, evaluated: as they are trained and evaluated on.
    """

    settings: RunSettings
    config: TrainConfig
    dataset: Dataset
    evaluated: Dataset | None

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations; 0: before and after only."""
        settings, steps = self.settings, self.config.total_steps
        if settings.eval_every:
            return settings.eval_every
        if settings.keep == "best" or settings.patience is not None:
            return -(-steps // EVALUATIONS_FOR_THE_BEST)
        is_cheap = EVALUATIONS_WHERE_CHEAP * self._cost_of_an_evaluation < _CHEAP
        return -(-steps // (EVALUATIONS_WHERE_CHEAP - 1)) if settings.eval_every is None and is_cheap else 0

    @property
    def _cost_of_an_evaluation(self) -> float:
        """About how much it takes, as a share of what training takes: share * held-out tokens / trained tokens.

        ``share``, of a token, is a half: forward without backward, in time as in bytes. It is 1 where the run crosses
        narrower than its evaluations do, in int8.
        """
        if self.evaluated is None:
            return 0.0
        config = self.config
        crosses_wider = config.mode == "split" and "int8" in msgspec.structs.astuple(config.codecs)
        epochs = config.total_steps / steps_an_epoch(len(self.dataset), config.batch_size * config.grad_accum)
        return (1.0 if crosses_wider else 0.5) * self.evaluated.tokens / (epochs * self.dataset.tokens)


def check_before_data(settings: RunSettings, manifest: Manifest, init: LoadedAdapter | None) -> RunSettings:
    """``settings`` with where blocks run, once all that can be wrong without data was looked at. Raises ``UsageError``
    and ``BundleError``."""
    settings = choose_placement(settings, manifest, init)
    resolve_max_length(settings.max_length, manifest)
    _kill_revive(choose_adapters(settings, manifest, init), manifest)
    return settings


def configure(
    settings: RunSettings,
    manifest: Manifest,
    init: LoadedAdapter | None,
    loaded: Sequence[Dataset],
    say: Callable[[str], None],
    known: tuple[int, ...] = (),
) -> Configured:
    """All that a run leaves open, chosen.

    Args:
        settings: as ``check_before_data`` gives them.
        loaded: the data to train on, and those to evaluate on where there are some.
        say: called with lines about what was chosen.
        known: the invocation of the run that goes on; else none.

    Raises ``UsageError``.
    """
    completed = choose_adapters(settings, manifest, init)
    adapt, invocation, (dataset, *evaluated) = choose_where_adapters_act(completed, manifest, init, loaded, known, say)
    settings = choose_adapters(msgspec.structs.replace(settings, adapt=adapt), manifest, init)
    kill_revive = _kill_revive(settings, manifest)
    steps = total_steps(
        dataset,
        epochs=settings.epochs,
        steps=settings.steps,
        batch_size=settings.batch_size,
        grad_accum=settings.grad_accum,
    )
    if settings.bytes_per_token is not None:
        of_one_step = _config(settings, manifest, kill_revive, 1, invocation)
        settings = _within_budget(settings, of_one_step, manifest, dataset)
        kill_revive = _kill_revive(settings, manifest)
    config = _config(settings, manifest, kill_revive, steps, invocation)
    holds_outputs = has_room_to_hold(settings, manifest, config.codecs, dataset, evaluated)
    config = msgspec.structs.replace(config, holds_outputs=holds_outputs)
    return Configured(settings, config, dataset, evaluated[0] if evaluated else None)


def _kill_revive(settings: RunSettings, manifest: Manifest) -> KillReviveConfig:
    """Of settings that ``choose_adapters`` has completed. Raises ``UsageError`` for what their groups cannot do."""
    assert settings.kind is not None
    assert settings.kr_warmup_steps is not None
    assert settings.kr_ramp_fraction is not None
    groups = choose_groups(manifest, target_modules_of(settings), parse_blocks(settings.blocks, manifest))
    units = len(group_units(groups, settings.kr_unit))
    pinned = _units(settings.pin, "--pin", settings.kr_unit, groups)
    static = _units(settings.static_units, "--static-units", settings.kr_unit, groups)
    if settings.kr_score == "static" and not static and settings.active_fraction:
        count = max(1, math.ceil(settings.active_fraction * units - 1e-9)) - len(pinned)
        spread = spread_units(manifest, groups, settings.kr_unit, max(0, count), beside=pinned)
        static = tuple(sorted({*pinned, *spread}))
    config = KillReviveConfig(
        active_fraction=settings.active_fraction,
        score=settings.kr_score,
        unit=settings.kr_unit,
        warmup_steps=settings.kr_warmup_steps,
        **({} if DEFAULTS[settings.kind].warms_up else {"warmup_fraction": 0.0}),
        ramp_fraction=settings.kr_ramp_fraction,
        kill_every=settings.kr_kill_every,
        revive_every=settings.kr_revive_every,
        revive_share=settings.kr_revive_share,
        probation=settings.kr_probation,
        hysteresis=settings.kr_hysteresis,
        on_kill=settings.kr_on_kill,
        cost_aware=settings.kr_cost_aware,
        spread=settings.kr_spread,
        pinned=pinned,
        static=static,
    )
    check_units(config, units)  # before data is read and a server is asked
    return config


def _within_budget(
    settings: RunSettings, config: TrainConfig, manifest: Manifest, dataset: Dataset
) -> RunSettings:
    """``settings`` with ``active_fraction`` in place of ``bytes_per_token``. Raises ``UsageError``."""
    assert settings.bytes_per_token is not None
    units = len(group_units(config.groups(manifest), config.kill_revive.unit))
    count = units_within(config, manifest, dataset, settings.bytes_per_token)
    if count < len(config.kill_revive.pinned):
        raise UsageError(f"--bytes-per-token {settings.bytes_per_token:,} is too little for all that --pin names")
    return msgspec.structs.replace(settings, active_fraction=count / units, bytes_per_token=None)


def _config(
    settings: RunSettings,
    manifest: Manifest,
    kill_revive: KillReviveConfig,
    steps: int,
    invocation: tuple[int, ...],
) -> TrainConfig:
    """Of settings that ``choose_adapters`` has completed."""
    assert settings.mode != "auto"
    assert settings.kind is not None
    assert settings.rank is not None
    assert settings.alpha is not None
    assert settings.weight_decay is not None
    assert settings.wire_dtype is not None
    return TrainConfig(
        mode=settings.mode,
        device_blocks=settings.device_blocks or 0,
        exact=settings.exact,
        total_steps=steps,
        batch_size=settings.batch_size,
        grad_accum=settings.grad_accum,
        seed=() if settings.seed is None else (settings.seed,),
        kind=settings.kind,
        basis=settings.basis or "data",  # which nothing asks for where none is made
        basis_steps=settings.basis_steps or DEFAULTS[settings.kind].basis_steps,
        invocation=invocation,
        rank=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=target_modules_of(settings),
        blocks=parse_blocks(settings.blocks, manifest),
        wire_dtype=settings.wire_dtype,
        send=settings.send,
        optimizer=OptimizerConfig(
            lr=settings.lr,
            schedule=settings.schedule,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        ),
        kill_revive=kill_revive,
    )


def _units(text: str, option: str, kind: UnitKind, groups: Sequence[GroupSpec]) -> tuple[int, ...]:
    """The units that the user names: a block by its number in the base model, a group by its place among the trained.

    Raises ``UsageError`` for a block that is not trained.
    """
    numbers = parse_numbers(text, option, "units")
    if kind == "group":
        return numbers
    blocks = sorted({group.block for group in groups})
    for number in numbers:
        if number not in blocks:
            raise UsageError(f"{option}: block {number} is not trained; blocks {number_ranges(blocks)} are")
    return tuple(blocks.index(number) for number in numbers)
