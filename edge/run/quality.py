"""What is known of the quality that each mode reaches: a table of what was measured, with where that stands.

``dlora-edge plan`` reads it. A recipe that is not here was not measured; one of blocks on the device is one more line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dlora.edge.choices import RunMode
from dlora.protocol.choices import KindChoice


@dataclass(frozen=True)
class Measured:
    """What was found of one recipe.

    Attributes:
        mode, kind: the recipe's; least_share: of the base model's blocks that are on the device, at the least.
        holds: whether it is as good as LoRA in all blocks wherever that was tried.
        finding: in some words, for people; source: where that stands.
    """

    mode: RunMode
    kind: KindChoice
    holds: bool
    finding: str
    source: str
    least_share: float = 0.0


_TRUNK: Final = "docs/benchmarks.md, Blocks on the device"
TABLE: Final = (
    Measured("split", "bottleneck", True, "as good as LoRA on q and v in all blocks", "docs/benchmarks.md"),
    Measured("split", "lora", True, "LoRA as PEFT trains it in one process", "docs/benchmarks.md"),
    # Of 30 blocks; ten and twenty intents, and dialogue.
    Measured(
        "trunk", "lora", False, "as good as LoRA in all blocks on ten intents, not on twenty, nor on open text", _TRUNK,
        least_share=4 / 30,
    ),
    Measured(
        "trunk", "lora", False, "as good as LoRA in all blocks on intents, not on open text", _TRUNK, least_share=8 / 30
    ),
    Measured("trunk", "lora", True, "as good as LoRA on q and v in all blocks", _TRUNK, least_share=12 / 30),
    Measured("local", "lora", True, "LoRA as PEFT trains it in one process", "tests/test_local.py", least_share=1.0),
)


def quality_of(mode: RunMode, kind: KindChoice, share: float) -> Measured | None:
    """What is known of a recipe with ``share`` of the blocks on the device; None where it was not measured."""
    known = [each for each in TABLE if (each.mode, each.kind) == (mode, kind) and share >= each.least_share]
    return max(known, key=lambda each: each.least_share, default=None)
