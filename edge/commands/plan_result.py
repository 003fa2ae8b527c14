"""What ``dlora-edge plan`` finds, as one JSON object."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dlora.edge.engine.bundle import Bundle
from dlora.edge.run.display import Display
from dlora.edge.run.run_file import RunSettings
from dlora.edge.wire.connecting import websocket_url
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import Codecs

from .memory import available_memory
from .planning import Question, Row, rows_of
from .reading import DataOptions, read_data
from .recommendation import recommend, why_none
from .train import train

if TYPE_CHECKING:
    from dlora.edge.run.calibration import DeviceSpeed, ServerSpeed
    from dlora.edge.wire.credentials import Credentials


def make_plan(options: dict[str, Any], display: Display) -> dict[str, Any]:
    """Read the data, time device and server, and look at every way to run.

    Args:
        options: of the command, under the names of its parameters, and ``credentials``.

    Raises any ``DloraError``.
    """
    memory = available_memory(options["memory"])
    if options["wire_dtype"] is not None:
        Codecs.parse(options["wire_dtype"])
    if options["server"] is not None:
        options = {**options, "server": websocket_url(options["server"])}
    settings = _settings(options)
    bundle = Bundle.open(Path(settings.bundle))
    loaded = read_data(DataOptions.of(settings), bundle, display)  # while this process is small and has no threads
    device, server = _speeds(bundle, settings, options["credentials"])
    rows = rows_of(Question(settings, bundle.manifest, None, loaded, memory, device, server))
    found = recommend(rows)
    return {
        "memory_mb": round(memory / 1e6, 1),
        "rows": [msgspec.to_builtins(row) for row in rows],
        "recommended": None if found is None else found.row.options,
        "reason": why_none(rows, memory) if found is None else found.reason,
        "others": [] if found is None else list(found.others),
        "notes": notes_of(bundle.manifest, rows, memory, asked=options["memory"] is not None),
        "device": msgspec.to_builtins(device),
        "server": None if server is None else msgspec.to_builtins(server),
    }


def _settings(options: dict[str, Any]) -> RunSettings:
    """Those of a run that says nothing else."""
    defaults = {name: each.default for name, each in inspect.signature(train).parameters.items()}
    return RunSettings.of({**defaults, **options, "mode": "auto", "out": Path("plan")})


def _speeds(
    bundle: Bundle, settings: RunSettings, credentials: Credentials
) -> tuple[DeviceSpeed, ServerSpeed | None]:
    from dlora.edge.engine.choose import make_engine
    from dlora.edge.run.calibration import measure_device, measure_server
    from dlora.edge.wire.connecting import ConnectSettings

    engine = make_engine(bundle, settings.engine, settings.threads)
    server = None
    if settings.server is not None:  # first: an address that is wrong is said at once
        server = measure_server(bundle, engine, settings.server, ConnectSettings(credentials))
    return measure_device(bundle, engine), server


def notes_of(manifest: Manifest, rows: list[Row], memory: float, *, asked: bool) -> list[str]:
    """What people are told beside the rows. ``asked``: whether they said how much ``memory`` there is."""
    spec, base = manifest.device_blocks, manifest.base_model
    has = 0 if spec is None else len(spec.blocks)
    what = "as you say (--memory)" if asked else "available now (--memory says another)"
    notes = [f"memory: {memory / 1e6:,.0f} MB, {what}; each row's is an estimate of its peak, and so are times"]
    if has < base.blocks:
        notes.append(
            f"the bundle has {has} of the model's {base.blocks} blocks for a device: dlora-export --device-blocks puts "
            "more into it, and all for --mode local"
        )
    if smaller := [row for row in rows if row.would_fit_as is not None]:
        notes.append(_stored_smaller(max(smaller, key=lambda row: row.device_blocks)))
    return notes + [f"{row.options}: {row.problem}" for row in rows if row.problem]


def _stored_smaller(row: Row) -> str:
    dtype = row.would_fit_as
    assert dtype is not None
    return (
        f"{row.options} would fit with its blocks in {dtype}, about {row.peak_mb_as[dtype]:,.0f} MB: export the bundle "
        f"again with --device-blocks {row.device_blocks} --block-dtype {dtype}"
    )
