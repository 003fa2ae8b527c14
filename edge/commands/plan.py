"""``dlora-edge plan``: what fits here, what it costs, and what to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from dlora.edge.settings import Settings
from dlora.protocol.manifest import Manifest

from .options import JsonOption
from .output import escaped, print_result
from .settings_options import takes_settings

if TYPE_CHECKING:
    from rich.console import Console

    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.planning import Row


@takes_settings(required=("bundle", "data"), has_file=True, changes={"device_blocks": {"default": "auto"}})
def plan(settings: Settings, json_output: JsonOption = False) -> None:
    """What fits on this device: each way to run with its memory and traffic for your data, and what to take.

    Settings are those of train: rank, blocks, modules and so on count. dlora-edge train --device-blocks auto takes what
    this recommends. With --server, network and server are measured with a few random tokens, and each way to ask the
    adapters has the seconds that a step will take; --passes auto of train takes the fastest that is as good.

    Example:  dlora-edge plan --bundle build/smollm2 --data chat.jsonl
    """
    from dlora.edge.run.display import Display

    result = make_plan(settings, Display(json_output=json_output))
    print_result(result, show, json_output=json_output)
    if result["recommended"] is None:
        raise typer.Exit(1)


def make_plan(settings: Settings, display: Any) -> dict[str, Any]:
    """Read the data, and look at every way to run. Raises any ``DloraError``."""
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.planning import Question, available_memory, rows_of
    from dlora.edge.run.reading import read_data
    from dlora.edge.run.recommendation import recommend, why_none

    memory = available_memory(settings.placement.memory)
    assert settings.device.bundle is not None
    bundle = Bundle.open(settings.device.bundle, verify=settings.device.verify)
    init = None
    if settings.adapter.init_adapter is not None:
        from dlora.edge.adapters.peft import load_adapter

        init = load_adapter(settings.adapter.init_adapter)
    loaded = read_data(settings.data, bundle, display)
    rows = rows_of(Question(settings, bundle.manifest, init, loaded, memory))
    found = recommend(rows)
    return _ways(settings, bundle, init, loaded, rows, display) | {
        "memory_mb": round(memory / 1e6, 1),
        "rows": [msgspec.to_builtins(row) for row in rows],
        "recommended": None if found is None else found.row.options,
        "reason": why_none(rows, memory) if found is None else found.reason,
        "other": "" if found is None else found.other,
        "notes": notes_of(bundle.manifest, rows, memory, asked=settings.placement.memory is not None),
    }


def _ways(
    settings: Settings, bundle: Bundle, init: LoadedAdapter | None, loaded: Sequence[Dataset], rows: Sequence[Row],
    display: Any,
) -> dict[str, Any]:  # fmt: skip
    """How the adapters of the first row without blocks here can be asked at the server that is named."""
    row = next((row for row in rows if not row.device_blocks and not row.problem), None)
    if row is None or settings.server.server is None:
        return {}
    from dlora.edge.run.network import measure_network
    from dlora.edge.run.planning import settings_for
    from dlora.edge.run.ways import advice, ways_of
    from dlora.edge.training.resolve import resolve
    from dlora.edge.wire.connecting import ConnectSettings
    from dlora.edge.wire.credentials import Credentials
    from dlora.protocol.errors import DloraError

    config, (dataset, *_) = resolve(settings_for(settings, row), bundle.manifest, init, loaded)
    connecting = ConnectSettings(Credentials.of(settings.server, display.warn))
    try:
        measured = measure_network(bundle, config, connecting)
    except DloraError as error:
        display.warn(f"network and server are not measured: {error}")
        return {}
    ways = ways_of(config, bundle.manifest, dataset, measured)
    own = next((way for way in ways if way.passes == config.server.passes), None)
    return {
        "advice": own and advice(own, ways, measured),
        "network": measured._asdict(),
        "network_words": measured.words,
        "ways": [msgspec.to_builtins(way) | {"step_s": round(way.seconds, 3)} for way in ways],
    }


def notes_of(manifest: Manifest, rows: list[Any], memory: float, *, asked: bool) -> list[str]:
    """What people are told beside the rows. ``asked``: whether they said how much ``memory`` there is."""
    spec, base = manifest.device_blocks, manifest.base_model
    has = 0 if spec is None else len(spec.blocks)
    what = "as you say (--memory)" if asked else "available now (--memory says another)"
    notes = [f"memory: {memory / 1e6:,.0f} MB, {what}; each row's is an estimate of its peak"]
    if has < base.blocks:
        notes.append(
            f"the bundle has {has} of the model's {base.blocks} blocks for a device: dlora-export --device-blocks puts "
            "more into it, and all of them for --device-blocks all"
        )
    if smaller := [row for row in rows if row.would_fit_as is not None]:
        row = max(smaller, key=lambda row: row.device_blocks)
        notes.append(
            f"{row.options} would fit with its blocks in {row.would_fit_as}, about "
            f"{row.peak_mb_as[row.would_fit_as]:,.0f} MB: export the bundle again with --device-blocks "
            f"{row.device_blocks} --block-dtype {row.would_fit_as}"
        )
    return notes + [f"{row.options}: {row.problem}" for row in rows if row.problem]


def show(result: dict[str, Any]) -> None:
    """Print a plan for people."""
    from rich.console import Console
    from rich.table import Column, Table

    from dlora.edge.run.recommendation import mb

    table = Table(
        Column("blocks\nhere", justify="right"),
        "kind",
        Column("adapters", min_width=14),
        *(Column(name, justify="right", no_wrap=True) for name in ("memory", "crosses", "trips", "cache")),
        "fits",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for row in result["rows"]:
        blocks = f"{row['device_blocks']}/{row['of']}"
        if row["problem"]:
            table.add_row(blocks, row["kind"], "", "", "", "", "", "[red]no[/]")
            continue
        cache = mb(row["cache_mb"]) if row["cache_mb"] else ""
        fits = "[green]yes[/]" if row["fits"] else "[red]no[/]"
        table.add_row(
            blocks, row["kind"], escaped(row["adapters"]), mb(row["peak_mb"]), mb(row["wire_mb"]),
            f"{row['round_trips']:,}", cache, fits,
        )  # fmt: skip
    console = Console()
    console.print(table)
    if "ways" in result:
        _show_ways(console, result)
    for line in result["notes"]:
        console.print(escaped(line), highlight=False)
    if result["recommended"] is not None:
        recommended = escaped(result["recommended"])
        console.print(f"[bold]recommended: {recommended}[/]: {escaped(result['reason'])}", highlight=False)
    else:
        console.print(f"[red]{escaped(result['reason'])}[/]", highlight=False)
    if result["other"]:
        console.print(escaped(result["other"]), highlight=False)


def _show_ways(console: Console, result: dict[str, Any]) -> None:
    """Each way to ask the adapters without blocks here, and what a step takes."""
    from rich.table import Column, Table

    names = ("waits", "MB", "network, s", "server, s", "head, s", "all, s")
    numbers = [Column(name, justify="right") for name in names]
    table = Table("--passes", *numbers, "as good", box=None, padding=(0, 1, 0, 0))
    for way in result["ways"]:
        seconds = (way["network_s"], way["server_s"], way["device_s"], way["step_s"])
        as_good = "[green]yes[/]" if way["as_good"] else "not known"
        table.add_row(
            way["passes"], f"{way['round_trips']}", f"{way['mb']:.2f}", *(f"{each:.2f}" for each in seconds), as_good
        )
    console.print(f"a step with no blocks here, over this network ({result['network_words']}):", highlight=False)
    console.print(table)
    if result["advice"]:
        console.print(escaped(result["advice"]), highlight=False)
