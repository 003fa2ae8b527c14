"""What the exporter tells about a bundle that it made: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Column, Table

from dlora.export.block_weights import BLOCKS_FOLDER
from dlora.protocol.adapters import AdapterSpec, parameter_count
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups, module_names
from dlora.protocol.text import one_line

_OF_GRAPHS: Final = ("kind", "key", "error", "errors", "tolerance")


def print_json(manifest: Manifest, out: Path, notes: Sequence[str], wall_s: float) -> None:
    """One JSON object on stdout; sizes in bytes, times in seconds. ``notes`` is what was decided unasked.

    Groups and adapters are those of LoRA by default; ``trainable`` has all.
    """
    base, defaults, groups = manifest.base_model, manifest.defaults, choose_groups(manifest)
    print(
        json.dumps(
            {
                "bundle": str(out),
                "base_model": base.name,
                **{
                    name: getattr(base, name)
                    for name in ("architecture", "fingerprint", "weight_format", "parameters", "blocks")
                },
                "rank": defaults.r,
                "alpha": defaults.lora_alpha,
                "target_modules": list(defaults.target_modules),
                "notes": list(notes),
                "groups": len(groups),
                "adapters": _modules(groups),
                "adapter_parameters": parameter_count(AdapterSpec(r=defaults.r), groups),
                "trainable": {
                    "target_modules": module_names(manifest.groups),
                    "groups": len(manifest.groups),
                    "adapters": _modules(manifest.groups),
                },
                "head_dtype": manifest.head.dtype,
                "embedding_dtype": manifest.embedding.dtype,
                "graphs": [{name: getattr(graph, name) for name in _OF_GRAPHS} for graph in manifest.graphs],
                "engines": list(manifest.engines),
                "executorch": msgspec.to_builtins(manifest.executorch),
                "files": {name: spec.bytes for name, spec in manifest.files.items()},
                "bytes": sum(spec.bytes for spec in manifest.files.values()),
                "wall_s": round(wall_s, 3),
            }
        )
    )


def print_table(manifest: Manifest, out: Path, wall_s: float) -> None:
    """The bundle's files and graphs on stdout."""
    console = Console()
    base, defaults, groups = manifest.base_model, manifest.defaults, choose_groups(manifest)
    console.print(
        f"[bold]{base.name}[/bold] ({base.architecture}): {base.parameters:,} parameters, {base.blocks} blocks, "
        f"{base.weight_format} weights, fingerprint {base.fingerprint[:12]}\n"
        f"--kind lora: rank {defaults.r}, alpha {defaults.lora_alpha:g} on {', '.join(defaults.target_modules)}: "
        f"{_modules(groups)} adapters in {len(groups)} exchange groups, "
        f"{parameter_count(AdapterSpec(r=defaults.r), groups):,} parameters\n"
        f"{_modules(manifest.groups)} modules can be trained: {', '.join(module_names(manifest.groups))}",
        highlight=False,
        soft_wrap=True,
    )
    numbers = (Column(name, justify="right") for name in ("size", "error against torch", "allowed"))
    table = Table(Column("file", no_wrap=True, overflow="fold"), *numbers, box=None, header_style="bold")
    errors = {
        file: (f"{graph.errors[engine]:.1e}", f"{graph.tolerance:.0e}")
        for graph in manifest.graphs
        for engine, file in graph.files.items()
    }
    for name, size in _shown(manifest).items():
        table.add_row(name, _size(size), *errors.get(name, ("", "")))
    console.print(table, highlight=False)
    if manifest.executorch is not None:
        bounds = ", ".join(f"{most} {name}" for name, most in manifest.executorch.bounds.items())
        console.print(
            f"ExecuTorch {manifest.executorch.version}; a program takes up to {bounds}", highlight=False, soft_wrap=True
        )
    total = sum(spec.bytes for spec in manifest.files.values())
    console.print(f"{out}: {_size(total)}, every graph verified, {wall_s:.1f} s", highlight=False, soft_wrap=True)


def print_merged(merged: Mapping[str, Any], dtype: str, out: Path, wall_s: float, *, json_output: bool) -> None:
    """What was merged, the fields of ``Merged``: sizes in bytes, times in seconds."""
    if json_output:
        print(json.dumps({"model": str(out), **merged, "dtype": dtype, "wall_s": round(wall_s, 3)}))
        return
    checked = "the adapter's own" if merged["is_checked"] else "which the adapter says nothing of"
    print(
        f"{one_line(merged['base_model'])}, fingerprint {merged['fingerprint'][:12]}, {checked}: "
        f"{merged['modules']} modules merged\n"
        f"{out}: {_size(sum(merged['bytes'].values()))} in {dtype}, {wall_s:.1f} s"
    )


def _shown(manifest: Manifest) -> dict[str, int]:
    """Bytes of each file; of all weights of a block together."""
    found: dict[str, int] = {}
    for name, spec in manifest.files.items():
        folder, _, inside = name.partition("/")
        block, _, _ = inside.partition("/")
        shown = f"{folder}/{block}/" if folder == BLOCKS_FOLDER and block.isdecimal() else name
        found[shown] = found.get(shown, 0) + spec.bytes
    return found


def _modules(groups: Sequence[GroupSpec]) -> int:
    return sum(len(group.targets) for group in groups)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
