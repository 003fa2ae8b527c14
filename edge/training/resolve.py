"""From settings to a run: all that they leave open, chosen once for a model and its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.data.read_settings import resolve_max_length
from dlora.edge.data.split import parse_split
from dlora.edge.settings import Settings
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import DEFAULT_RAMP_FRACTION, DEFAULT_WARMUP_STEPS, KillReviveConfig
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import spread_units
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .choose_adapter import choose_adapter, choose_where_adapters_act
from .defaults import DEFAULTS
from .expected import (
    begins_with_two_epochs,
    cache_bytes,
    first_rows_bytes,
    may_keep_reads,
    reads_bytes,
    total_steps,
    units_within,
)
from .resolved import ChosenOptimizer, ChosenServer, Resolved, check_units
from .selection import parse_units

DEFAULT_CACHE_MB: Final = 4000.0
# Of a run that was not told how often to evaluate: where it is to keep its best evaluation; and where they are cheap,
# the ones before and after it among them.
EVALUATIONS_FOR_THE_BEST: Final = 10
EVALUATIONS_WHERE_CHEAP: Final = 5
_CHEAP: Final = 0.1  # of the run


def resolve(
    settings: Settings,
    manifest: Manifest,
    init: LoadedAdapter | None,
    loaded: Sequence[Dataset],
    *,
    known: tuple[int, ...] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Resolved, list[Dataset]]:
    """A run, and its data as they are trained and evaluated on.

    Args:
        settings: whose ``device_blocks`` is not ``auto``.
        loaded: the data to train on, and those to evaluate on where there are some; none: a loop of one's own.
        known: the invocation of the run that goes on; else none.
        say: called with lines about what was chosen.

    Raises ``UsageError`` for what cannot be, or cannot go together, and ``BundleError`` for a bundle without enough
    blocks.
    """
    run = resolve_without_data(settings, manifest, init)
    if not loaded:
        return run, []
    active_from, invocation, (dataset, *evaluated) = choose_where_adapters_act(
        settings.adapter, run.adapter, manifest, init, loaded, known, say, on_device=bool(run.device_blocks)
    )
    open_adapter = msgspec.structs.replace(settings.adapter, active_from=active_from)
    adapter = choose_adapter(open_adapter, manifest, init, run.device_blocks)
    steps = total_steps(
        dataset, epochs=settings.training.epochs, steps=settings.training.steps, examples_a_step=run.examples_a_step
    )
    run = msgspec.structs.replace(run, adapter=adapter, invocation=invocation, total_steps=steps)
    run = _with_units(run, manifest)
    if settings.kill_revive.bytes_per_token is not None:
        run = _within_budget(run, settings.kill_revive.bytes_per_token, manifest, dataset)
    run = msgspec.structs.replace(run, keeps_outputs=_has_room_to_keep(run, manifest, dataset, evaluated))
    run = with_kept_reads(run, manifest, dataset)
    every = _evaluate_every(run, dataset, evaluated[0] if evaluated else None)
    return msgspec.structs.replace(run, evaluate_every=every), [dataset, *evaluated]


def resolve_without_data(settings: Settings, manifest: Manifest, init: LoadedAdapter | None) -> Resolved:
    """A run as far as it can be told before its data are read; its steps are those that were given, or no end.

    Raises as ``resolve``, so that what is wrong without data is said at once.
    """
    check_together(settings)
    device_blocks = choose_device_blocks(settings, manifest)
    adapter = choose_adapter(settings.adapter, manifest, init, device_blocks)
    resolve_max_length(settings.data.max_length, manifest)
    defaults = DEFAULTS[adapter.kind]
    kill_revive = settings.kill_revive
    decay = _first(settings.optimizer.weight_decay, defaults.weight_decay if init is None else 0.0)
    wire_dtype = settings.server.wire_dtype or defaults.wire_dtype
    passes = settings.server.passes or "live"
    passes = "live" if passes == "auto" else passes  # until network and server are measured
    usual = (DEFAULT_WARMUP_STEPS, DEFAULT_RAMP_FRACTION) if defaults.warms_up else (0, 0.0)
    kill_revive = msgspec.structs.replace(
        kill_revive,
        warmup_steps=_first(kill_revive.warmup_steps, usual[0]),
        ramp_fraction=_first(kill_revive.ramp_fraction, usual[1]),
        on_kill="hold_forward" if device_blocks else kill_revive.on_kill,
    )
    placement, blocks = settings.placement, manifest.base_model.blocks
    if device_blocks:
        word = "all" if device_blocks == blocks else str(device_blocks)
        cache_mb = _first(placement.cache_mb, DEFAULT_CACHE_MB)
        placement = msgspec.structs.replace(placement, cache_mb=cache_mb, device_blocks=word)
    run = Resolved(
        **{name: getattr(settings, name) for name in ("device", "data", "training", "saving")},
        adapter=adapter,
        optimizer=ChosenOptimizer(**{**msgspec.structs.asdict(settings.optimizer), "weight_decay": decay}),
        server=ChosenServer(**{**msgspec.structs.asdict(settings.server), "wire_dtype": wire_dtype, "passes": passes}),
        placement=placement,
        kill_revive=kill_revive,
        blocks=blocks,
        device_blocks=device_blocks,
        total_steps=settings.training.steps or MAX_STEPS,
        seed=() if settings.training.seed is None else (settings.training.seed,),
    )
    return _with_units(run, manifest)


def with_kept_reads(run: Resolved, manifest: Manifest, dataset: Dataset) -> Resolved:
    """``run`` with whether it keeps what groups read in the base pass, once it is known how they are asked: where that
    is of use, and ``--cache-mb`` has room for all of it."""
    if run.passes is None:
        return run
    cache_mb = _first(run.placement.cache_mb, DEFAULT_CACHE_MB)
    has_room = may_keep_reads(run, manifest, dataset) and reads_bytes(run, manifest, dataset) <= cache_mb * 1e6
    placement = msgspec.structs.replace(run.placement, cache_mb=cache_mb)
    return msgspec.structs.replace(run, placement=placement, keeps_reads=has_room)


def check_together(settings: Settings) -> None:
    """Raise ``UsageError`` for settings that cannot go together, whatever the model is."""
    if settings.server.wire_dtype is not None:
        Codecs.parse(settings.server.wire_dtype)
    has_none = parse_split(settings.data.hold_out) == 0 and settings.data.eval is None
    if has_none and (option := option_that_evaluates(settings)) is not None:
        raise UsageError(f"{option} needs --eval, the data to evaluate on, or a --hold-out above 0")
    chosen = settings.kill_revive
    if chosen.bytes_per_token is not None and (chosen.active_fraction != 1 or chosen.static_units):
        raise UsageError("--bytes-per-token chooses how many units are active; leave the options out that do so too")
    if chosen.bytes_per_token is not None and chosen.on_kill == "hold_forward":
        raise UsageError("--bytes-per-token cannot be kept with --kr-on-kill hold_forward: every unit exchanges")
    if chosen.bytes_per_token is not None and settings.server.passes == "auto":
        raise UsageError("--bytes-per-token is for one way to ask the adapters: give --passes live, or 2,2, not auto")
    if chosen.static_units and chosen.score != "static":
        raise UsageError("--static-units needs --kr-score static")
    if chosen.active_fraction == 0 and chosen.score != "static":
        raise UsageError("--active-fraction 0 would train nothing; choose a share above 0, or 1 for all")


def option_that_evaluates(settings: Settings) -> str | None:
    """One that needs held-out data."""
    saving = settings.saving
    return _given(
        {
            "--eval-every": bool(saving.eval_every),
            "--keep best": saving.keep == "best",
            "--patience": saving.patience is not None,
        }
    )


def _given(options: Mapping[str, bool]) -> str | None:
    """The first that was given."""
    return next((option for option, is_given in options.items() if is_given), None)


def choose_device_blocks(settings: Settings, manifest: Manifest) -> int:
    """How many of the last blocks run on the device.

    Raises ``UsageError`` for options that cannot go with that, and ``BundleError`` for a bundle without enough blocks.
    """
    placement, last = settings.placement, manifest.base_model.blocks
    wanted = last if placement.device_blocks == "all" else int(placement.device_blocks)
    word = f"--device-blocks {placement.device_blocks}"
    if wanted > last:
        raise UsageError(f"{word}: the model has {last} blocks; lower it, or take all")
    if wanted == last and settings.server.server is not None:
        raise UsageError(f"{word} asks no server: all blocks run here; leave --server out")
    if wanted < last and settings.server.server is None:
        raise UsageError(f"{word} needs --server, which runs the other blocks; --device-blocks all needs none")
    if not wanted:
        is_live = settings.server.passes in (None, "live")
        option = _given(
            {
                "--cache-mb": is_live and placement.cache_mb is not None,
                "--cache-key-file": is_live and placement.cache_key_file is not None,
                "--keep-cache": placement.keep_cache,
            }
        )
        if option is not None:
            or_passes = "" if option == "--keep-cache" else ", or --passes 2,2"
            raise UsageError(f"{option} needs --device-blocks{or_passes}, with which something is kept here")
        return 0
    if placement.keep_cache and wanted == last:
        raise UsageError("--keep-cache is for what a server gave, and no server is asked: leave that out")
    on_kill, passes = settings.kill_revive.on_kill, settings.server.passes
    for option, is_given, what_to_do in (
        ("--bytes-per-token", settings.kill_revive.bytes_per_token is not None, "its steps send nothing"),
        (f"--passes {passes}", passes not in (None, "live", "auto"), "its steps send nothing"),
        (f"--kr-on-kill {on_kill}", on_kill in ("give_to_server", "bypass"), "a killed unit keeps its effect"),
    ):
        if is_given:
            raise UsageError(f"{option} cannot be with {word}: {what_to_do}: leave that out")
    spec = manifest.device_blocks
    has = 0 if spec is None else len(spec.blocks)
    if wanted > has:
        text = f"the bundle has {has} of the model's {last} blocks for a device; export it again with --device-blocks "
        text += "all" if wanted == last else str(wanted)
        raise BundleError(f"{text}, or lower --device-blocks" if has else text)
    return wanted


def _with_units(run: Resolved, manifest: Manifest) -> Resolved:
    """``run`` with ``units``, of its adapter's groups. Raises ``UsageError`` for what these cannot do."""
    groups = run.groups(manifest)
    config = kill_revive_of(run, manifest, groups)
    check_units(config, len(group_units(groups, config.unit)))  # before data is read and a server is asked
    return msgspec.structs.replace(run, units=config)


def kill_revive_of(run: Resolved, manifest: Manifest, groups: Sequence[GroupSpec]) -> KillReviveConfig:
    """What of the section ``kill_revive`` crosses, its units counted among those that are trained."""
    chosen = run.kill_revive
    pinned = parse_units(chosen.pin, "--pin", chosen.unit, groups)
    static = parse_units(chosen.static_units, "--static-units", chosen.unit, groups)
    if chosen.score == "static" and not static and chosen.active_fraction:
        units = len(group_units(groups, chosen.unit))
        count = max(1, math.ceil(chosen.active_fraction * units - 1e-9)) - len(pinned)
        spread = spread_units(manifest, groups, chosen.unit, max(0, count), beside=pinned)
        static = tuple(sorted({*pinned, *spread}))
    crossing = {name: getattr(chosen, name) for name in KillReviveConfig.__struct_fields__ if hasattr(chosen, name)}
    if not DEFAULTS[run.adapter.kind].warms_up:
        crossing["warmup_fraction"] = 0.0
    return KillReviveConfig(**crossing, pinned=pinned, static=static)


def _within_budget(run: Resolved, bytes_per_token: int, manifest: Manifest, dataset: Dataset) -> Resolved:
    """``run`` with ``active_fraction`` in place of ``bytes_per_token``. Raises ``UsageError``."""
    units = len(group_units(run.groups(manifest), run.units.unit))
    count = units_within(run, manifest, dataset, bytes_per_token)
    if count < len(run.units.pinned):
        raise UsageError(f"--bytes-per-token {bytes_per_token:,} is too little for all that --pin names")
    chosen = msgspec.structs.replace(run.kill_revive, active_fraction=count / units, bytes_per_token=None)
    return _with_units(msgspec.structs.replace(run, kill_revive=chosen), manifest)


def _has_room_to_keep(run: Resolved, manifest: Manifest, dataset: Dataset, evaluated: Sequence[Dataset]) -> bool:
    """Whether what the device's blocks compute alike again and again is kept, for all data that are trained on: where
    ``--cache-mb`` allows it, beside what a server gives of these and of those that are ``evaluated``.

    That is what comes out of killed blocks; or, where adapters act on answers, keys and values of the rows before
    these, where the run has two epochs or more.
    """
    if not run.device_blocks or run.placement.cache_mb is None:
        return False
    wire = run.codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
    from_server = (dataset, *evaluated) if run.asks_once else ()
    size = sum(cache_bytes(manifest, each, wire) for each in from_server)
    if run.invocation:
        if not begins_with_two_epochs(run, dataset):
            return False
        size += first_rows_bytes(run, manifest, dataset)
    else:
        size += cache_bytes(manifest, dataset, "fp32")
    return size <= run.placement.cache_mb * 1e6


def _evaluate_every(run: Resolved, dataset: Dataset, evaluated: Dataset | None) -> int:
    every, steps = run.saving.eval_every, run.total_steps
    if every:
        return every
    if run.saving.keep == "best" or run.saving.patience is not None:
        return -(-steps // EVALUATIONS_FOR_THE_BEST)
    is_cheap = EVALUATIONS_WHERE_CHEAP * _cost_of_an_evaluation(run, dataset, evaluated) < _CHEAP
    return -(-steps // (EVALUATIONS_WHERE_CHEAP - 1)) if every is None and is_cheap else 0


def _cost_of_an_evaluation(run: Resolved, dataset: Dataset, evaluated: Dataset | None) -> float:
    """About how much it takes, as a share of what training takes: share * held-out tokens / trained tokens.

    ``share``, of a token, is a half: forward without backward, in time as in bytes. It is 1 where the run crosses
    narrower than its evaluations do, in int8.
    """
    if evaluated is None:
        return 0.0
    crosses_wider = not run.device_blocks and "int8" in msgspec.structs.astuple(run.codecs)
    epochs = run.total_steps / steps_an_epoch(len(dataset), run.examples_a_step)
    return (1.0 if crosses_wider else 0.5) * evaluated.tokens / (epochs * dataset.tokens)


def _first(given: float | None, usual: float) -> float:
    return usual if given is None else given
