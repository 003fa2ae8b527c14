"""Starts a run: looks first at what it needs, reads its data, chooses what its settings leave open, and trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlora.edge.adapters.compatibility import check_adapter, check_base_model
from dlora.edge.adapters.peft import LoadedAdapter, load_adapter
from dlora.edge.data.examples import Dataset
from dlora.edge.data.split import AUTO_SHARE
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.device_lora import other_storage_line
from dlora.edge.settings import Settings
from dlora.edge.training.resolve import check_together, option_that_evaluates, resolve, resolve_without_data
from dlora.edge.wire.connecting import ConnectSettings, Liveness, Retry, websocket_url
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.identity import load_device_id
from dlora.edge.wire.recorder import check_record, recording
from dlora.edge.wire.spans import Spans
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.manifest import Manifest

from .display import Display
from .file_names import REPORT
from .first_look import asks_server_first, check_place, check_room, run_bytes
from .pause import PauseRules
from .planning import available_memory
from .reading import read_data
from .recommendation import choose_automatically
from .run_file import RunFile, load_run_file
from .watcher import RunWatcher
from .ways import choose_passes


@dataclass(frozen=True)
class Start:
    """What is of one start of a run, and no setting of it.

    Attributes:
        resume: whether it goes on from the last checkpoint.
        record: a directory for what crosses, and the truth beside it.
        profile: a file for what happens when, in ``profile_steps`` steps.
    """

    resume: bool = False
    record: Path | None = None
    profile: Path | None = None
    profile_steps: int = 10


MakeWatchers = Callable[[Settings, Start, Display, Spans], list[RunWatcher]]
"""Makes those who follow a run: they stand above this room."""


def start_run(settings: Settings, start: Start, display: Display, make_watchers: MakeWatchers) -> None:
    """Check, read, train, save, show the summary. Raises any ``DloraError``: of most, before it begins."""
    out = settings.saving.out
    bundle_path = settings.device.bundle
    assert out is not None  # the command asks for it
    assert bundle_path is not None  # likewise
    check_together(settings)
    is_auto = settings.placement.device_blocks == "auto"
    check_record(start.record, is_local=settings.placement.device_blocks == "all")
    if start.profile is not None and not start.profile.absolute().parent.is_dir():
        raise UsageError(f"--profile {start.profile}: there is no directory {start.profile.parent}; make it first")
    if settings.placement.memory is not None and not is_auto:
        raise UsageError("--memory is for --device-blocks auto, which chooses by it: leave it out, or take that")
    available = available_memory(settings.placement.memory)
    PauseRules.parse(settings.device.pause_when)
    credentials = Credentials.of(settings.server, display.warn)
    if settings.server.server is not None:
        settings = settings.replaced(server=websocket_url(settings.server.server))
    key_file = settings.placement.cache_key_file
    cache_key = None if key_file is None else CacheKey.load(key_file, display.warn)
    check_place(out, resume=start.resume)
    bundle = Bundle.open(bundle_path, verify=settings.device.verify)
    manifest = bundle.manifest
    init = _init_adapter(settings, manifest)
    begun, loaded = None, None
    if start.resume:  # the rate and the invocation were chosen once, whatever steps and held-out data are now
        with suppress(CheckpointError):
            begun = load_run_file(out)
    if begun is not None and settings.server.passes == "auto":
        settings = settings.replaced(passes=begun.settings.server.passes)
    if is_auto and begun is not None:
        settings = _as_begun(settings, begun.settings)
    elif is_auto:
        settings, loaded = _load(settings, bundle, display, begun)
        settings = choose_automatically(settings, manifest, init, loaded, available, display.say)
    known = resolve_without_data(settings, manifest, init)  # so that what cannot be is said at once
    if known.device_blocks and (line := other_storage_line(manifest, settings.adapter.init_adapter)):
        display.warn(line)
    check_room(out, run_bytes(known, manifest, resume=start.resume))
    retry = Retry(settings.server.max_retry_s, at_start=bool(settings.server.max_retry_s))
    liveness = Liveness(exchange_s=settings.server.exchange_timeout_s)
    connecting = ConnectSettings(credentials, load_device_id(warn=display.warn), retry, liveness, display.warn)
    round_trip_s = 0.0
    if asks_server_first(known, resume=start.resume):
        assert settings.server.server is not None
        with Connection(settings.server.server, connecting) as connection:
            check_base_model(bundle, connection.welcome)
            round_trip_s = 0.0 if known.device_blocks else connection.ping_s()
        # It was there: if it is away from now on, it is waited for.
        connecting = replace(connecting, retry=replace(retry, at_start=retry.max_s != 0))
    if loaded is None:
        settings, loaded = _load(settings, bundle, display, begun)
    # Not before: data sets are read while this process is small and has no threads.
    from .guard import check_outcome
    from .run import train
    from .train_run import TrainRun

    invocation = begun.invocation if begun is not None else ()
    config, (dataset, *evaluated) = resolve(settings, manifest, init, loaded, known=invocation, say=display.say)
    is_asked = settings.server.passes == "auto"
    config = choose_passes(config, bundle, dataset, connecting, init, round_trip_s, is_asked=is_asked, say=display.say)
    spans = Spans(asks_server=start.profile is not None)
    run = TrainRun(
        bundle=bundle,
        config=config,
        dataset=dataset,
        eval_dataset=evaluated[0] if evaluated else None,
        init=init,
        resume=start.resume,
        connecting=connecting,
        cache_key=cache_key,
        watchers=make_watchers(config, start, display, spans),
        spans=spans,
    )
    with recording(start.record, bundle.tokenizer_file(), display.warn) as recorder:
        summary = train(replace(run, recorder=recorder), display)
    display.say(f"how it went: {run.out / REPORT}")
    display.finish(summary)
    check_outcome(summary, config.saving.on_worse)


def settings_of_run(out: Path, changes: dict[str, Any]) -> Settings:
    """The settings of the run in ``out``, with ``changes``, by the names of options. Raises ``CheckpointError``."""
    settings = load_run_file(out).settings
    if "epochs" in changes and "steps" not in changes:
        changes = {**changes, "steps": None}  # else the run's --steps would still count
    return settings.replaced(**{"out": out, **changes})


def _as_begun(settings: Settings, begun: Settings) -> Settings:
    """``settings`` with where blocks run as it was chosen when the run began, whatever this machine is now."""
    given: dict[str, Any] = {"device_blocks": begun.placement.device_blocks, "memory": None}
    if settings.adapter.kind is None:
        given["kind"] = begun.adapter.kind
    if begun.placement.device_blocks == "all":
        given["server"] = None
    return settings.replaced(**given)


def _init_adapter(settings: Settings, manifest: Manifest) -> LoadedAdapter | None:
    """The adapter to start from. Raises ``ModelMismatchError`` where it is of another base model."""
    if settings.adapter.init_adapter is None:
        return None
    loaded = load_adapter(settings.adapter.init_adapter)
    check_adapter(manifest, loaded)
    return loaded


def _load(
    settings: Settings, bundle: Bundle, display: Display, begun: RunFile | None
) -> tuple[Settings, list[Dataset]]:
    """The data to train on, and those to evaluate on where there are some; and the settings with how these came about.

    ``--hold-out auto`` holds none of a few rows out; where an option needs some, it is a tenth, and at least one. A run
    that has begun has been trained on all of them.
    """
    datasets = read_data(settings.data, bundle, display)
    option = option_that_evaluates(settings)
    if len(datasets) == 1 and option is not None:
        if begun is not None:
            raise UsageError(f"{option} needs held-out data, and this run began without; leave it out, or begin anew")
        settings = settings.replaced(hold_out=f"{AUTO_SHARE:g}")
        share = settings.data.hold_out
        display.say(f"{option} needs held-out data, and these are few: --hold-out {share} in place of auto")
        datasets = read_data(settings.data, bundle, display)
    return settings, datasets
