"""docs/reference/models.md, made from the tiny models that the tests run: ``python tests/models_table.py`` writes it
again, but for the types that the tests do not run (``model_types.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from block_bundles import REFUSED, TRIED_ALWAYS, WITHOUT_DECODE
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
_TOP: Final = """\
# Models

Made by `python tests/models_table.py` from `tests/families.py`, and by `python tests/model_types.py`;
`tests/test_models.py` fails where it is stale.

dlora takes any decoder-only model of Hugging Face transformers in which no token sees a later one, and that gives the
same logits when it is cut at `inputs_embeds` and `last_hidden_state`. {tested} families are tested, [most of the other
model types](#every-other-model-type) were tried once and work, and of those that do not, the error is listed.

dlora knows no family by name. Export checks both conditions, and so does `dlora-cloud serve` when it starts, also of a
model type that is not on this page.

## Tried

Of each family here, a tiny model with random weights is exported and trained through a server, and its gradients are
those of PEFT in one process (`tests/test_split_equals_peft.py`): of `lora` with its default target modules and with
`all-linear`, of `bottleneck` and `ffa` with `all-linear`. That is on ONNX Runtime, with fp32 on the wire. ExecuTorch
has the same graphs, which depend on widths and kind of head and not on the family; whole runs with it are tested with
`llama` (`tests/test_executorch.py`). Of real weights the tests have those of SmolLM2-135M (`llama`) only.

- **LoRA's default**: what gets an adapter with `--kind lora` or `ffa` and without `--target-modules`. It is PEFT's own
  where it has one for the family, else dlora's: attention's query and value projections by their names, fused or not;
  in a model without attention, the `in_proj` of its blocks. A bottleneck takes `all-linear`, without gates that give
  fewer than eight numbers (`shared_expert_gate` of qwen3_next).
- **`all-linear` leaves out**: modules of the blocks that cannot be targets, one name for each reason. Export says so,
  too.
- **`--active-from answer` leaves out**: modules to which PEFT gives no activated LoRA, mostly because what they are
  given is not (batch, length, width) in memory. Who names them gets `--active-from start`, and so does a model that has
  no others.
- **blocks**: whether a bundle may have the last blocks of the model, for a device that runs them itself
  (`dlora-export --device-blocks`), or why not; *all but the first*, where a device cannot make of embeddings what goes
  into block 0, so that there is `--device-blocks N` and no `--device-blocks all` (OPT: only where it projects). Where
  a bundle may have blocks, they compute what PEFT and autograd do in one process,
  forward and backward, with LoRA beside every linear module: on ONNX Runtime in fp32 (`tests/test_blocks.py`), and of
  some families on both engines and in fp16 and int8 (`tests/test_blocks_training.py`). They go on from keys and
  values, so that the device can generate with them, but where it says otherwise. `make test` tries those of
  {always}; `make test-slow` each day a sixth of the others.
- **engines**: on which of them whole runs are tested.
- **generates**: *cached*, where each token crosses once, for the server keeps keys and values; else the whole text
  crosses for each token (`tests/test_generation.py` compares both with the family's own `generate`).
- **run**: *always* by `make test`, or *slow* by `make test-slow`.

"""
_COLUMNS: Final = (
    "family", "LoRA's default", "whose", "`all-linear` leaves out", "`--active-from answer` leaves out", "blocks",
    "engines", "generates", "run",
)  # fmt: skip
_REFUSED: Final = """
## Refused

With this line and exit code 11, by `dlora-export` and by `dlora-cloud serve` when it starts:

| family | error |
|---|---|
"""


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


def page() -> str:
    """The page down to ``TYPES_HEADING``."""
    lines = [accepted(family) for family in sorted([*FAMILIES, *MORE_FAMILIES])]
    top = _TOP.replace("{always}", ", ".join(TRIED_ALWAYS)).replace("{tested}", str(len(lines)))
    table = "\n".join([f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|", *lines])
    return f"{top}{table}\n{_REFUSED}" + "\n".join(map(refused, sorted(REFUSED_FAMILIES))) + "\n"


if __name__ == "__main__":
    PAGE.write_text(f"{page()}\n{''.join(PAGE.read_text().partition(TYPES_HEADING)[1:])}")
