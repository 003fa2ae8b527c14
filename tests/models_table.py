"""The tables of docs/reference/models.md, of the tiny models that the tests run: ``python tests/models_table.py``
writes them again, but for the types that the tests do not run (``model_types.py``)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Final

from block_bundles import REFUSED, WITHOUT_DECODE
from families import FAMILIES, MORE_FAMILIES, REFUSED_FAMILIES, tiny_model

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.parts import ModelParts
from dlora.export.selection import can_be_activated, select_targets
from dlora.export.tracing.entry import CannotBeginOnDevice, find_entry
from dlora.protocol.errors import ExportError
from dlora.protocol.targets import module_names

ON_EXECUTORCH: Final = "llama"  # tests/test_executorch.py
TYPES_HEADING: Final = "## Every other model type"
PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "models.md"


def rows_below(header: str) -> list[str]:
    """The rows of the page's table whose header begins so."""
    below = PAGE.read_text().partition(f"\n{header}")[2].splitlines()[2:]
    return list(takewhile(lambda line: line.startswith("|"), below))


def write_rows(header: str, rows: Iterable[str]) -> None:
    """Put others in their place."""
    lines, old = PAGE.read_text().splitlines(), rows_below(header)
    begin = next(index for index, line in enumerate(lines) if line.startswith(header)) + 2
    lines[begin : begin + len(old)] = rows
    PAGE.write_text("\n".join([*lines, ""]))


def accepted(family: str) -> str:
    """The line of a family that works; errors are those of ``BaseModel`` and ``select_targets``."""
    base = BaseModel.from_model(tiny_model(family), family)
    default = select_targets(base, None)
    whose = "dlora's" if default.notes else "PEFT's"
    skipped = "; ".join(
        f"`{name.rpartition('.')[2]}`: {reason}"
        for note in select_targets(base, ["all-linear"]).notes
        for name, _, reason in (part.partition(" ") for part in note.partition(": ")[2].split("; "))
    )
    run = "always" if family in FAMILIES else "slow"
    names = ", ".join(f"`{name}`" for name in default.target_modules)
    engines = "onnx, executorch" if family == ON_EXECUTORCH else "onnx"
    without = [name for name in default.trainable if not can_be_activated(base, name)]
    inactive = ", ".join(f"`{name}`" for name in (module_names(base.groups(without)) if without else ()))
    parts = ModelParts.of(base)
    generates = "whole text" if parts is None or not parts.most_context() else "cached"
    blocks = f"no: {REFUSED[family]}" if family in REFUSED else _begins(base)
    if family in WITHOUT_DECODE:
        blocks = f"{blocks}, not to generate with"
    return f"| {family} | {names} | {whose} | {skipped} | {inactive} | {blocks} | {engines} | {generates} | {run} |"


def _begins(base: BaseModel) -> str:
    """Whether a device can run all blocks of it, or all but the first."""
    try:
        find_entry(base)
    except CannotBeginOnDevice:
        return "all but the first"
    return "all"


def refused(family: str) -> str:
    """The line of a family that does not work, with the error but for its numbers."""
    try:
        BaseModel.from_model(tiny_model(family), family)
    except ExportError as error:
        before, _, after = str(error).partition(" (its logits differ by")
        return f"| {family} | {before}{after.partition(')')[2]} |"
    raise AssertionError(f"{family} is not refused")


if __name__ == "__main__":
    write_rows("| family | LoRA's default", map(accepted, sorted([*FAMILIES, *MORE_FAMILIES])))
    write_rows("| family | error", map(refused, sorted(REFUSED_FAMILIES)))
