"""``dlora-export``: the command line of the exporter."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dlora.protocol.sizes import parse_size
from dlora.protocol.version import SOFTWARE_VERSION

from .subcommand import CommandWithSubcommands

app = typer.Typer(pretty_exceptions_enable=False)
merge_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
HELP = {"help_option_names": ["-h", "--help"]}


class StoredDtype(StrEnum):
    """How weights are stored on the device."""

    FP16 = "fp16"
    FP32 = "fp32"
    INT8 = "int8"


class BlockDtype(StrEnum):
    """How weights of blocks are stored on the device."""

    FP16 = "fp16"
    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


class Dtype(StrEnum):
    """Of a merged model's weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Engine(StrEnum):
    """What runs the graphs on the device."""

    ONNX = "onnx"
    EXECUTORCH = "executorch"
    BOTH = "both"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-export {SOFTWARE_VERSION}")
        raise typer.Exit


MODEL_HELP = "Model directory, .gguf file, hub id, or smollm2-135m."


def _complete(begun: str) -> list[str]:
    """What the shell offers for MODEL."""
    return [word for word in ("merge", "smollm2-135m") if word.startswith(begun)]


@app.command(cls=CommandWithSubcommands, context_settings=HELP)
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=_complete)],
    out: Annotated[Path, typer.Option(help="The bundle: a directory that will be made.")],
    rank: Annotated[int, typer.Option(help="Rank of training with --kind lora or ffa, by default.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha, likewise; adapters are scaled by alpha / rank.")] = 16.0,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="What dlora-edge train --kind lora or ffa trains by default: names, separated by commas, or "
            "all-linear. By default PEFT's choice for the architecture, or, where it has none, attention's query and "
            "value projections. The bundle lists all modules that can be trained."
        ),
    ] = None,
    head_dtype: Annotated[
        StoredDtype, typer.Option(metavar="DTYPE", help="How the LM head is stored: fp16, fp32 or int8.")
    ] = StoredDtype.FP16,
    device_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="How many of the model's last blocks to put into the bundle, so that a device can run them itself: a "
            "number, all, or none, which is the default. A block takes seconds to export, and its weights' size on "
            "disk.",
        ),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="As many of them as a device of so much memory can train with, 2GB or 500MB; none of a model whose "
            "blocks no device can run.",
        ),
    ] = None,
    block_dtype: Annotated[
        BlockDtype,
        typer.Option(
            metavar="DTYPE",
            help="How their weights are stored: fp16, fp32, int8 or int4. Adapters are trained for the weights as they "
            "are stored: int8 only where memory forbids fp16, and int4 only where it forbids int8.",
        ),
    ] = BlockDtype.FP16,
    engine: Annotated[
        Engine, typer.Option(metavar="ENGINE", help="What the device runs graphs with: onnx, executorch or both.")
    ] = Engine.ONNX,
    base_model_name: Annotated[
        str | None,
        typer.Option(help="What adapters call their base model; its hub id by default, or MODEL where it has none."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a Hugging Face causal language model into a bundle that a device can train with.

    Example:  dlora-export smollm2-135m --out build/smollm2

    The other way, an adapter into a model's weights:  dlora-export merge --help
    """
    from .settings import ExportSettings, parse_device_blocks

    names = None
    if target_modules is not None:
        names = tuple(dict.fromkeys(name.strip() for name in target_modules.split(",") if name.strip()))
    settings = ExportSettings(
        model,
        out,
        rank,
        alpha,
        names,
        head_dtype.value,
        force,
        engine.value,
        base_model_name,
        parse_device_blocks(device_blocks),
        block_dtype.value,
        None if device_memory is None else parse_size(device_memory, "--device-memory"),
    )
    settings.check()
    # Not before: torch takes seconds, which --help, the shell's completion and mistakes need not wait for.
    from rich.console import Console

    from .bundle import export_bundle
    from .report import print_json, print_table

    started = time.monotonic()
    console = Console(file=sys.stderr)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with console.status(f"exporting {model}") as status:
        manifest = export_bundle(settings, lambda doing: status.update(f"exporting {model}: {doing}"), note, tell)
    wall_s = time.monotonic() - started
    if json:
        print_json(manifest, out, notes, wall_s)
    else:
        print_table(manifest, out, wall_s)


@merge_app.command(context_settings=HELP)
def merge(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    adapter: Annotated[Path, typer.Option(help="PEFT LoRA, as dlora-edge train saves it.")],
    out: Annotated[Path, typer.Option(help="The merged model: a directory that will be made.")],
    dtype: Annotated[
        Dtype, typer.Option(metavar="DTYPE", help="Of its weights: float32, bfloat16 or float16.")
    ] = Dtype.FLOAT32,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a merged model that is there already.")] = False,
) -> None:
    """Put an adapter into the weights of its base model: a model of transformers' own, with the tokenizer.

    Example:  dlora-export merge smollm2-135m --adapter my-adapter --out build/merged
    """
    from .merge_settings import MergeSettings

    settings = MergeSettings(model, adapter, out, dtype.value, force)
    settings.check()
    # Not before, as above.
    from rich.console import Console

    from .merge import merge_adapter
    from .report import print_merged

    started = time.monotonic()
    console = Console(file=sys.stderr)
    with console.status(f"merging into {model}") as status:
        merged = merge_adapter(
            settings,
            lambda doing: status.update(f"merging into {model}: {doing}"),
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )
    print_merged(asdict(merged), settings.dtype, out, time.monotonic() - started, json_output=json)


CommandWithSubcommands.commands["merge"] = typer.main.get_command(merge_app)
