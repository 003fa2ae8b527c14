"""What ``dlora-edge train`` and ``dlora-edge resume`` do with a run's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dlora.edge.data.loading import Reading, load_datasets, resolve_max_length
from dlora.edge.data.records import parse_columns
from dlora.edge.engine.bundle import Bundle
from dlora.edge.run.display import Display
from dlora.edge.run.pause import PauseRules
from dlora.edge.run.plan import data_line, units_within
from dlora.edge.run.run_file import RunFile, RunSettings, load_run_file
from dlora.edge.training.config import TrainConfig, check_units
from dlora.edge.training.defaults import DEFAULTS
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.wire.connecting import Liveness, check_url
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.identity import load_device_id
from dlora.protocol.choices import UnitKind
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups, number_ranges, spread_units
from dlora.protocol.wire_codecs import Codecs

from .adapter_settings import (
    choose_adapters,
    choose_rate,
    choose_where_adapters_act,
    parse_blocks,
    parse_numbers,
    target_modules_of,
)
from .placement_settings import choose_placement

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset

# Of a run that is to keep its best evaluation and was not told how often to evaluate.
EVALUATIONS_OF_A_RUN = 10


def run_train(settings: RunSettings, *, resume: bool, display: Display) -> dict[str, Any]:
    """Check, read, train, save; the summary. Raises any ``DloraError``, for what is wrong before anything is made."""
    _check(settings)
    rules = PauseRules.parse(settings.pause_when or [])
    credentials = Credentials.load(
        settings.path("token_file"),
        ca=settings.path("ca"),
        client_cert=settings.path("client_cert"),
        client_key=settings.path("client_key"),
        insecure=settings.insecure,
        warn=display.warn,
    )
    if settings.server is not None:
        check_url(settings.server)
    bundle = Bundle.open(Path(settings.bundle))
    init = _init_adapter(settings, bundle.manifest)
    begun = _begun(Path(settings.out)) if resume else None
    if begun is not None and settings.lr is None:
        settings = msgspec.structs.replace(settings, lr=begun.settings.lr)
    manifest = bundle.manifest
    settings = choose_placement(settings, manifest, init)
    completed = choose_adapters(settings, manifest, init)
    _kill_revive(completed, manifest)  # before data are read, so that what cannot be is said at once
    loaded = _load(settings, bundle, display)
    known = begun.invocation if begun is not None else ()
    adapt, invocation, (dataset, *evaluated) = choose_where_adapters_act(
        completed, manifest, init, loaded, known, display.say
    )
    settings = choose_adapters(msgspec.structs.replace(settings, adapt=adapt), manifest, init)
    kill_revive = _kill_revive(settings, manifest)
    # Not before: data sets are read while this process is small and has no threads.
    from dlora.edge.run.run import TrainRun, total_steps, train

    steps = total_steps(
        dataset,
        epochs=settings.epochs,
        steps=settings.steps,
        batch_size=settings.batch_size,
        grad_accum=settings.grad_accum,
    )
    settings = choose_rate(settings, dataset, steps, display.say)
    if settings.bytes_per_token is not None:
        of_one_step = _config(settings, manifest, kill_revive, 1, invocation)
        settings = _within_budget(settings, of_one_step, manifest, dataset)
        kill_revive = _kill_revive(settings, manifest)
    keeps_best = settings.keep == "best" or settings.patience is not None
    run = TrainRun(
        bundle=bundle,
        server=settings.server,
        dataset=dataset,
        config=_config(settings, manifest, kill_revive, steps, invocation),
        out=Path(settings.out),
        settings=settings,
        eval_dataset=evaluated[0] if evaluated else None,
        eval_every=settings.eval_every or (-(-steps // EVALUATIONS_OF_A_RUN) if keeps_best else 0),
        keep=settings.keep,
        patience=settings.patience,
        save_every=settings.save_every,
        init=init,
        resume=resume,
        threads=settings.threads,
        engine=settings.engine,
        credentials=credentials,
        device_id=load_device_id(warn=display.warn),
        max_retry_s=settings.max_retry_s,
        cache_mb=settings.cache_mb or 0.0,
        keep_cache=settings.keep_cache,
        liveness=Liveness(exchange_s=settings.exchange_timeout_s),
        pause=rules,
    )
    return train(run, display)


def settings_of_run(out: Path, changes: dict[str, Any]) -> RunSettings:
    """The settings of the run in ``out``, with those of ``changes`` that are not None. Raises ``CheckpointError``."""
    settings = load_run_file(out).settings
    given = {name: value for name, value in changes.items() if value is not None}
    if "epochs" in given and "steps" not in given:
        given["steps"] = None  # else the run's --steps would still count
    return RunSettings.of({**msgspec.structs.asdict(settings), "out": out, **given})


def _begun(out: Path) -> RunFile | None:
    """The run to go on with, whose rate and invocation were chosen once, whatever its steps and held-out data are now;
    None where there is none."""
    try:
        return load_run_file(out)
    except CheckpointError:
        return None


def _check(settings: RunSettings) -> None:
    """Raise ``UsageError`` for options that cannot be, or cannot go together."""
    if settings.wire_dtype is not None:
        Codecs.parse(settings.wire_dtype)
    if settings.alpha is not None and not 0 < settings.alpha < math.inf:
        raise UsageError("--alpha must be above 0")
    if settings.eval_data is None:
        for option, is_given in (
            ("--eval-every", settings.eval_every),
            ("--keep best", settings.keep == "best"),
            ("--patience", settings.patience),
        ):
            if is_given:
                raise UsageError(f"{option} needs --eval, the data to evaluate on")
    if settings.bytes_per_token is not None and (settings.active_fraction != 1 or settings.static_units):
        raise UsageError("--bytes-per-token chooses how many units are active; leave the options out that do so too")
    if settings.bytes_per_token is not None and settings.kr_on_kill == "hold_forward":
        raise UsageError("--bytes-per-token cannot be kept with --kr-on-kill hold_forward: every unit exchanges")
    if settings.static_units and settings.kr_score != "static":
        raise UsageError("--static-units needs --kr-score static")
    if settings.active_fraction == 0 and settings.kr_score != "static":
        raise UsageError("--active-fraction 0 would train nothing; choose a share above 0, or 1 for all")


def _init_adapter(settings: RunSettings, manifest: Manifest) -> LoadedAdapter | None:
    """The adapter to start from. Raises ``ModelMismatchError`` where it is of another base model."""
    from dlora.edge.adapters.compatibility import check_adapter
    from dlora.edge.adapters.peft import load_adapter

    path = settings.path("init_adapter")
    if path is None:
        return None
    loaded = load_adapter(path)
    check_adapter(manifest, loaded)
    return loaded


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
    assert settings.lr is not None
    assert settings.weight_decay is not None
    assert settings.wire_dtype is not None
    return TrainConfig(
        mode=settings.mode,
        device_blocks=settings.device_blocks or 0,
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


def _load(settings: RunSettings, bundle: Bundle, display: Display) -> list[Dataset]:
    """The data to train on, and those to evaluate on where there are some."""
    max_length = resolve_max_length(settings.max_length, bundle.manifest)
    fields = parse_columns(settings.columns) if settings.columns else None
    paths = [Path(path) for path in (settings.data, settings.eval_data) if path is not None]
    with display.reading() as on_tick:
        datasets = load_datasets(Reading(bundle, paths, fields, max_length, settings.too_long), on_tick)
    for name, path, dataset in zip(("data", "held out"), paths, datasets, strict=False):
        display.say(data_line(name, path, dataset))
    return datasets


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
