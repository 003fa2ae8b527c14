"""What the exporter tells about a bundle that it made: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from dlora.protocol.manifest import Manifest


def print_json(manifest: Manifest, out: Path, notes: Sequence[str], wall_s: float) -> None:
    """One JSON object on stdout; sizes in bytes, times in seconds. ``notes`` is what was decided unasked."""
    base, lora = manifest.base_model, manifest.lora
    print(
        json.dumps(
            {
                "bundle": str(out),
                "base_model": base.name,
                "architecture": base.architecture,
                "fingerprint": base.fingerprint,
                "parameters": base.parameters,
                "blocks": base.blocks,
                "rank": lora.r,
                "alpha": lora.lora_alpha,
                "target_modules": list(lora.target_modules),
                "notes": list(notes),
                "groups": len(manifest.groups),
                "adapters": sum(len(group.targets) for group in manifest.groups),
                "adapter_parameters": adapter_parameters(manifest),
                "head_dtype": manifest.head.dtype,
                "graphs": [
                    {
                        "kind": graph.kind,
                        "key": graph.key,
                        "error": graph.error,
                        "errors": graph.errors,
                        "tolerance": graph.tolerance,
                    }
                    for graph in manifest.graphs
                ],
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
    base, lora = manifest.base_model, manifest.lora
    console.print(
        f"[bold]{base.name}[/bold] ({base.architecture}): {base.parameters:,} parameters, {base.blocks} blocks, "
        f"fingerprint {base.fingerprint[:12]}\n"
        f"LoRA rank {lora.r}, alpha {lora.lora_alpha:g} on {', '.join(lora.target_modules)}: "
        f"{sum(len(group.targets) for group in manifest.groups)} adapters in {len(manifest.groups)} exchange groups, "
        f"{adapter_parameters(manifest):,} parameters",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(
        Column("file", no_wrap=True, overflow="fold"),
        "size",
        "error against torch",
        "allowed",
        box=None,
        header_style="bold",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    errors = {
        file: (f"{graph.errors[engine]:.1e}", f"{graph.tolerance:.0e}")
        for graph in manifest.graphs
        for engine, file in graph.files.items()
    }
    for name, spec in manifest.files.items():
        table.add_row(name, _size(spec.bytes), *errors.get(name, ("", "")))
    console.print(table, highlight=False)
    if manifest.executorch is not None:
        bounds = ", ".join(f"{most} {name}" for name, most in manifest.executorch.bounds.items())
        console.print(
            f"ExecuTorch {manifest.executorch.version}; a program takes up to {bounds}", highlight=False, soft_wrap=True
        )
    total = sum(spec.bytes for spec in manifest.files.values())
    console.print(f"{out}: {_size(total)}, every graph verified, {wall_s:.1f} s", highlight=False, soft_wrap=True)


def adapter_parameters(manifest: Manifest) -> int:
    """Number of trainable parameters, ``r * (in + out)`` for each target module."""
    return sum(
        manifest.lora.r * (group.in_features + target.out_features)
        for group in manifest.groups
        for target in group.targets
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
