"""What ``dlora-edge train`` and ``dlora-edge resume`` do with a run's settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dlora.edge.data.split import AUTO_SHARE, parse_split
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.device_lora import other_storage_line
from dlora.edge.run.display import Display
from dlora.edge.run.file_names import REPORT
from dlora.edge.run.pause import PauseRules
from dlora.edge.run.run_file import RunFile, RunSettings, load_run_file
from dlora.edge.wire.connecting import ConnectSettings, Liveness, Retry, websocket_url
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.identity import load_device_id
from dlora.edge.wire.spans import Spans
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import Codecs

from .adapter_settings import choose_adapters
from .first_look import asks_server_first, check_place, check_room, check_server, run_bytes
from .memory import available_memory
from .reading import DataOptions, read_data
from .recommendation import choose_mode
from .recording import check_record, recording
from .run_config import check_before_data, configure

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset
    from dlora.edge.run.watcher import RunWatcher


def run_train(
    settings: RunSettings,
    *,
    resume: bool,
    display: Display,
    memory: str | None = None,
    record: Path | None = None,
    profile: tuple[Path, int] | None = None,
) -> None:
    """Check, read, train, save, show the summary. Raises any ``DloraError``, for what is wrong before anything is made.

    ``memory``: what ``--mode auto`` may count on, as ``--memory`` says it. ``record``: a directory for what crosses,
    and the truth beside it. ``profile``: a file for what happens when, and in how many steps.
    """
    _check(settings)
    check_record(record, settings.mode)
    if profile is not None and not profile[0].absolute().parent.is_dir():
        raise UsageError(f"--profile {profile[0]}: there is no directory {profile[0].parent}; make it first")
    if memory is not None and settings.mode != "auto":
        raise UsageError("--memory is for --mode auto, which chooses by it: leave it out, or take that mode")
    available = available_memory(memory)
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
        settings = msgspec.structs.replace(settings, server=websocket_url(settings.server))
    key_file = settings.path("cache_key_file")
    cache_key = None if key_file is None else CacheKey.load(key_file, display.warn)
    out = Path(settings.out)
    check_place(out, resume=resume)
    bundle = Bundle.open(Path(settings.bundle))
    init = _init_adapter(settings, bundle.manifest)
    begun = _begun(out) if resume else None
    manifest = bundle.manifest
    loaded = None
    if settings.mode == "auto" and begun is not None:
        settings = _as_begun(settings, begun.settings)
    elif settings.mode == "auto":
        settings, loaded = _load(settings, bundle, display, begun)
        settings = choose_mode(settings, manifest, init, loaded, available, display.say)
    settings = check_before_data(settings, manifest, init)  # so that what cannot be is said at once
    if settings.mode != "split" and (line := other_storage_line(manifest, settings.path("init_adapter"))):
        display.warn(line)
    check_room(out, run_bytes(choose_adapters(settings, manifest, init), manifest, resume=resume))
    device_id, liveness = load_device_id(warn=display.warn), Liveness(exchange_s=settings.exchange_timeout_s)
    if settings.server is not None and asks_server_first(settings, resume=resume):
        retry = Retry(settings.max_retry_s, at_start=bool(settings.max_retry_s))
        connecting = ConnectSettings(credentials, device_id, retry, liveness, display.warn)
        check_server(settings.server, connecting, bundle)
    if loaded is None:
        settings, loaded = _load(settings, bundle, display, begun)
    # Not before: data sets are read while this process is small and has no threads.
    from dlora.edge.run.guard import check_outcome
    from dlora.edge.run.run import TrainRun, train

    spans = Spans(asks_server=profile is not None)
    known = begun.invocation if begun is not None else ()
    run_of = configure(settings, manifest, init, loaded, display.say, known)
    settings = run_of.settings
    run = TrainRun(
        bundle=bundle,
        server=settings.server,
        dataset=run_of.dataset,
        config=run_of.config,
        out=out,
        settings=settings,
        eval_dataset=run_of.evaluated,
        eval_every=run_of.evaluate_every,
        keep=settings.keep,
        patience=settings.patience,
        on_worse=settings.on_worse,
        save_every=settings.save_every,
        init=init,
        resume=resume,
        threads=settings.threads,
        engine=settings.engine,
        credentials=credentials,
        device_id=device_id,
        max_retry_s=settings.max_retry_s,
        cache_mb=settings.cache_mb or 0.0,
        keep_cache=settings.keep_cache,
        cache_key=cache_key,
        liveness=liveness,
        pause=rules,
        watchers=_watchers(settings, display, profile, spans),
        spans=spans,
    )
    check_record(record, settings.mode)
    with recording(record, bundle, display.warn) as recorder:
        summary = train(replace(run, recorder=recorder), display)
    display.say(f"how it went: {run.out / REPORT}")
    display.finish(summary)
    check_outcome(summary, settings.on_worse)


def settings_of_run(out: Path, changes: dict[str, Any]) -> RunSettings:
    """The settings of the run in ``out``, with those of ``changes`` that are not None. Raises ``CheckpointError``."""
    settings = load_run_file(out).settings
    given = {name: value for name, value in changes.items() if value is not None}
    if "epochs" in given and "steps" not in given:
        given["steps"] = None  # else the run's --steps would still count
    return RunSettings.of({**msgspec.structs.asdict(settings), "out": out, **given})


def _watchers(
    settings: RunSettings, display: Display, profile: tuple[Path, int] | None, spans: Spans
) -> list[RunWatcher]:
    from dlora.edge.report.profiler import Profiler
    from dlora.edge.report.tensorboard import TensorboardWriter
    from dlora.edge.report.writer import ReportWriter

    out = Path(settings.out)
    watchers: list[RunWatcher] = [ReportWriter(out, display.warn)]
    if settings.tensorboard:
        watchers.append(TensorboardWriter(out))
    if profile is not None:
        path, steps = profile
        watchers.append(Profiler(path, spans, steps))
    return watchers


def _as_begun(settings: RunSettings, begun: RunSettings) -> RunSettings:
    """``settings`` with where blocks run as it was chosen when the run began, whatever this machine is now."""
    return msgspec.structs.replace(
        settings,
        mode=begun.mode,
        kind=settings.kind or begun.kind,
        device_blocks=settings.device_blocks or begun.device_blocks,
        server=None if begun.mode == "local" else settings.server,
    )


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
    has_none = parse_split(settings.split) == 0 and settings.eval_data is None
    if has_none and (option := _option_that_evaluates(settings)) is not None:
        raise UsageError(f"{option} needs --eval, the data to evaluate on, or a --split above 0")
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


def _load(
    settings: RunSettings, bundle: Bundle, display: Display, begun: RunFile | None
) -> tuple[RunSettings, list[Dataset]]:
    """The data to train on, and those to evaluate on where there are some; and the settings with how these came about.

    ``--split auto`` holds none of a few rows out; where an option needs some, it is a tenth, and at least one. A run
    that has begun has been trained on all of them.
    """
    datasets = read_data(DataOptions.of(settings), bundle, display)
    option = _option_that_evaluates(settings)
    if len(datasets) == 1 and option is not None:
        if begun is not None:
            raise UsageError(f"{option} needs held-out data, and this run began without; leave it out, or begin anew")
        settings = msgspec.structs.replace(settings, split=f"{AUTO_SHARE:g}")
        display.say(f"{option} needs held-out data, and these are few: --split {settings.split} in place of auto")
        datasets = read_data(DataOptions.of(settings), bundle, display)
    return settings, datasets


def _option_that_evaluates(settings: RunSettings) -> str | None:
    """One that needs held-out data."""
    given = {
        "--eval-every": settings.eval_every,
        "--keep best": settings.keep == "best",
        "--patience": settings.patience,
    }
    return next((option for option, is_given in given.items() if is_given), None)
