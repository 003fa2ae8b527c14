"""``dlora-edge adapters``: the adapters of a directory, by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlora.protocol.errors import DloraError
from dlora.protocol.text import one_line

from .help_panels import PanelledCommand
from .options import AdaptersOption, JsonOption
from .output import print_result

if TYPE_CHECKING:
    from dlora.edge.adapters.about import AdapterAbout
    from dlora.edge.adapters.store import AdapterStore
    from dlora.protocol.adapter_record import TrainingRecord
    from dlora.protocol.manifest import Manifest

app = typer.Typer(
    help="List and show the adapters in a directory, which are subdirectories: copy one there to add it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command("list", cls=PanelledCommand)
def list_adapters(
    adapters: AdaptersOption = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle that adapters must fit.")] = None,
    json_output: JsonOption = False,
) -> None:
    """List the adapters; with --bundle, say which of them fit it. All of their files are read and checked."""
    from dlora.protocol.manifest import load_manifest

    store, manifest = _store(adapters), None if bundle is None else load_manifest(bundle)
    found = [_entry(store, name, manifest) for name in store.entries()]
    result = {"directory": str(store.directory), "adapters": found}
    print_result(result, lambda _: _print_list(store, found), json_output=json_output)


@app.command(cls=PanelledCommand)
def show(
    adapter: Annotated[str, typer.Argument(metavar="NAME|PATH", help="An adapter's name, or a directory.")],
    adapters: AdaptersOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say all that is known of an adapter: what it is of, what it learnt, its digests."""
    from dlora.edge.adapters.about import about_adapter
    from dlora.edge.adapters.store import is_name

    from .info import show as print_fields

    store = _store(adapters)
    is_path = not is_name(adapter) or (adapter not in store.entries() and Path(adapter).is_dir())
    about = about_adapter(Path(adapter) if is_path else store.path(adapter))
    print_result(_result(about), lambda _: print_fields(_fields(about)), json_output=json_output)


def _store(directory: Path | None) -> AdapterStore:
    from dlora.edge.adapters.store import AdapterStore, default_directory

    return AdapterStore(directory or default_directory())


def _entry(store: AdapterStore, name: str, manifest: Manifest | None) -> dict[str, Any]:
    """An adapter as ``list`` has it; of one that cannot be used, why."""
    from dlora.edge.adapters.about import about_loaded
    from dlora.edge.adapters.compatibility import check_fit
    from dlora.edge.adapters.peft import load_adapter

    try:
        loaded = load_adapter(store.path(name))
        entry: dict[str, Any] = _result(about_loaded(loaded, store.path(name)))
    except DloraError as error:
        return {"name": name, "error": str(error)}
    if manifest is not None:
        try:
            check_fit(manifest, loaded)
            entry |= {"fits": True}
        except DloraError as error:
            entry |= {"fits": False, "reason": str(error)}
    return entry


def _result(about: AdapterAbout) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(asdict(about))
    return found


def _fields(about: AdapterAbout) -> dict[str, Any]:
    """What ``show`` tells people, by name."""
    from dlora.edge.adapters.model_card import recipe_line

    fields = {name: "unknown" if value is None else value for name, value in asdict(about).items()}
    del fields["training"], fields["bytes"]
    fields["size"] = _size(about.bytes)
    training = about.training
    if training is None:
        return {**fields, "training": "unknown"}
    losses = (training.eval_loss_before, training.eval_loss_after)
    before, after = ("unknown" if loss is None else f"{loss:.4f}" for loss in losses)
    return {
        **fields,
        "held-out loss": f"{before} before, {after} after",
        **_used_live(training),
        "trained": f"{training.steps:,} steps, {training.examples:,} examples, {training.tokens:,} tokens",
        "traffic": f"{training.bytes_per_token:,.0f} bytes a token, {training.round_trips_per_step:,.1f} round trips a "
        "step",
        "recipe": recipe_line(training),
        "versions": ", ".join(f"{name} {version}" for name, version in training.versions.items()),
    }


def _used_live(training: TrainingRecord) -> dict[str, str]:
    if training.eval_loss_live is None:
        return {}
    return {"used live": f"{training.eval_loss_live:.4f}{', which is worse' if training.is_worse_live else ''}"}


def _print_list(store: AdapterStore, found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    usable = [entry for entry in found if "error" not in entry]
    if not found:
        print(f"there are no adapters in {store.directory}; to add one, copy its directory there")
    if usable:
        columns = ["kind", "rank", "modules", "acts on", "base model", "size", "weights"]
        columns += ["fits"] if any("fits" in entry for entry in usable) else []
        name_column = Column("name", overflow="fold", min_width=min(16, max(len(entry["name"]) for entry in usable)))
        others = (Column(name, overflow="fold", no_wrap=name != "base model") for name in columns)
        table = Table(name_column, *others, box=None)
        for entry in usable:
            cells = [
                entry["name"], entry["kind"], entry["rank"], entry["modules"], entry["acts_on"],
                entry["base_model"] or "unknown", _size(entry["bytes"]), entry["weights_sha256"][:8],
            ]  # fmt: skip
            if "fits" in entry:  # without a fingerprint, only names and widths of modules tell
                fits = "yes" if entry["base_fingerprint"] is not None else "likely"
                cells.append(fits if entry["fits"] else "no")
            table.add_row(*(escape(one_line(str(cell))) for cell in cells))
        console.print(table, highlight=False)
    for entry in found:
        for key, said in (("error", "cannot be used"), ("reason", "does not fit")):
            if key in entry:
                print(f"{one_line(entry['name'])} {said}: {one_line(entry[key])}")


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
