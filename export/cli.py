"""``dlora-export``: the command line of the exporter.

It had no commands before it had a second thing to do, and what was typed then means the same now: ``dlora-export MODEL
…`` exports, ``dlora-export merge MODEL …`` merges.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from dlora.protocol.choices import WeightFormat
from dlora.protocol.sizes import parse_size
from dlora.protocol.version import SOFTWARE_VERSION

app = typer.Typer(pretty_exceptions_enable=False)
merge_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
HELP = {"help_option_names": ["-h", "--help"]}


StoredDtype = Literal["fp16", "fp32", "int8", "int4"]
"""How weights are stored on the device."""
Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a merged model's weights."""
Engine = Literal["onnx", "executorch", "both"]
"""What runs the graphs on the device."""


class _ExportCommand(TyperCommand):
    """Runs ``merge`` where that is its first argument."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments, as those of the command that they name."""
        if args and args[0] == "merge":
            other = typer.main.get_command(merge_app)
            return other.make_context(f"{info_name} merge", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was parsed."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-export {SOFTWARE_VERSION}")
        raise typer.Exit


MODEL_HELP = "Model directory, .gguf file, hub id, or smollm2-135m."


def _complete(begun: str) -> list[str]:
    """What the shell offers for MODEL."""
    return [word for word in ("merge", "smollm2-135m") if word.startswith(begun)]


@contextmanager
def _shown(doing: str) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """On stderr what is being done; yields what says the part of it, and what tells a line that stays to be read."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    with console.status(doing) as status:
        yield (
            lambda part: status.update(f"{doing}: {part}"),
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        )


@app.command(cls=_ExportCommand, context_settings=HELP)
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
        StoredDtype,
        typer.Option(
            metavar="DTYPE",
            help="How the LM head is stored: fp16, fp32, int8 or int4. It is what training takes most memory for.",
        ),
    ] = "fp16",
    embedding_dtype: Annotated[
        StoredDtype | None,
        typer.Option(
            metavar="DTYPE",
            help="How the token embedding is stored, likewise. By default fp16, or fp32 with a head of fp32. A tied "
            "head of the same dtype shares its file.",
        ),
    ] = None,
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
        StoredDtype,
        typer.Option(
            metavar="DTYPE",
            help="How their weights are stored: fp16, fp32, int8 or int4. Adapters are trained for the weights as they "
            "are stored: int8 only where memory forbids fp16, and int4 only where it forbids int8.",
        ),
    ] = "fp16",
    weights: Annotated[
        WeightFormat,
        typer.Option(
            metavar="WEIGHTS",
            help="For a server that runs with the same option: full, int8 or nf4. The bundle and its adapters are for "
            "the weights as such a server holds them.",
        ),
    ] = "full",
    engine: Annotated[
        Engine, typer.Option(metavar="ENGINE", help="What the device runs graphs with: onnx, executorch or both.")
    ] = "onnx",
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
    blocks = parse_device_blocks(device_blocks)
    memory = None if device_memory is None else parse_size(device_memory, "--device-memory")
    settings = ExportSettings(
        model,
        out,
        rank,
        alpha,
        names,
        head_dtype,
        force,
        engine,
        base_model_name,
        blocks,
        block_dtype,
        memory,
        embedding_dtype=embedding_dtype,
        weight_format=weights,
    )
    settings.check()
    # Not before: torch takes seconds, which --help, the shell's completion and mistakes need not wait for.
    from .bundle import export_bundle
    from .report import print_json, print_table

    started = time.monotonic()
    notes: list[str] = []
    with _shown(f"exporting {model}") as (say, tell):

        def note(line: str) -> None:
            notes.append(line)
            tell(f"note: {line}")

        manifest = export_bundle(settings, say, note, tell)
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
    ] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a merged model that is there already.")] = False,
) -> None:
    """Put an adapter into the weights of its base model: a model of transformers' own, with the tokenizer.

    Example:  dlora-export merge smollm2-135m --adapter my-adapter --out build/merged
    """
    from .settings import MergeSettings

    settings = MergeSettings(model, adapter, out, dtype, force)
    settings.check()
    # Not before, as above.
    from .merge import merge_adapter
    from .report import print_merged

    started = time.monotonic()
    with _shown(f"merging into {model}") as (say, tell):
        merged = merge_adapter(settings, say, tell)
    print_merged(asdict(merged), settings.dtype, out, time.monotonic() - started, json_output=json)
