"""``dlora-edge plan``: what fits here, what it costs, and what to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlora.protocol.choices import KindChoice
from dlora.protocol.limits import MAX_RANK

from .options import (
    BatchSizeOption,
    BundleOption,
    ColumnsOption,
    CredentialOptions,
    EngineOption,
    EpochsOption,
    EvalDataOption,
    GradAccumOption,
    JsonOption,
    MaxLengthOption,
    MemoryOption,
    SendOption,
    SplitOption,
    StepsOption,
    ThreadsOption,
    TooLongOption,
    TrainOnOption,
    with_groups,
)
from .output import escaped, print_result


@with_groups
def plan(
    bundle: BundleOption,
    data: Annotated[Path, typer.Option(help="Training data, as for train.")],
    server: Annotated[
        str | None,
        typer.Option(help="Server address, ws://HOST:PORT or wss://HOST:PORT; without it, no time of what asks it."),
    ] = None,
    memory: MemoryOption = None,
    eval_data: EvalDataOption = None,
    epochs: EpochsOption = 1.0,
    steps: StepsOption = None,
    batch_size: BatchSizeOption = 4,
    grad_accum: GradAccumOption = 1,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = "error",
    columns: ColumnsOption = None,
    train_on: TrainOnOption = "answers",
    split: SplitOption = "auto",
    kind: Annotated[
        KindChoice | None, typer.Option(help="Adapters of this kind only: bottleneck, lora or ffa.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="By default that of each kind.", min=1, max=MAX_RANK)] = None,
    wire_dtype: Annotated[
        str | None, typer.Option(help="Precision on the wire, as for train: by default that of each kind.")
    ] = None,
    send: SendOption = "embeddings",
    threads: ThreadsOption = 0,
    engine: EngineOption = "auto",
    credential_options: CredentialOptions = CredentialOptions(),
    json_output: JsonOption = False,
) -> None:
    """What fits on this device: each mode with its memory, traffic and minutes for your data, and what to take.

    Takes a second or two of this device, and of the server where you name one, which is asked for a few random tokens.
    Nothing of your data is sent. dlora-edge train --mode auto takes what this recommends.

    Example:  dlora-edge plan --bundle build/smollm2 --server ws://127.0.0.1:8765 --data chat.jsonl
    """
    options = locals()  # settings of a run have the names of their options
    from dlora.edge.run.display import Display

    from .plan_result import make_plan

    options["credentials"] = credential_options.load()
    result = make_plan(options, Display(json_output=json_output))
    print_result(result, show, json_output=json_output)
    if result["recommended"] is None:
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """Print a plan for people."""
    from rich.console import Console
    from rich.table import Column, Table

    from .recommendation import mb, minutes

    table = Table(
        "mode",
        Column("blocks\nhere", justify="right"),
        Column("adapters", min_width=14),
        *(Column(name, justify="right", no_wrap=True) for name in ("memory", "crosses", "trips", "time", "cache")),
        "fits",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for row in result["rows"]:
        blocks, what = f"{row['device_blocks']}/{row['of']}", f"{row['kind']} {row['adapters']}"
        if row["problem"]:
            table.add_row(row["mode"], blocks, row["kind"], "", "", "", "", "", "[red]no[/]")
            continue
        time = "" if row["minutes"] is None else minutes(row["minutes"])
        cache = mb(row["cache_mb"]) if row["cache_mb"] else ""
        fits = "[green]yes[/]" if row["fits"] else "[red]no[/]"
        table.add_row(
            row["mode"], blocks, escaped(what), mb(row["peak_mb"]), mb(row["wire_mb"]), f"{row['round_trips']:,}", time,
            cache, fits,
        )  # fmt: skip
    console = Console()
    console.print(table)
    for line in result["notes"]:
        console.print(escaped(line), highlight=False)
    if result["recommended"] is not None:
        recommended = escaped(result["recommended"])
        console.print(f"[bold]recommended: {recommended}[/]: {escaped(result['reason'])}", highlight=False)
    else:
        console.print(f"[red]{escaped(result['reason'])}[/]", highlight=False)
    for line in result["others"]:
        console.print(escaped(line), highlight=False)
