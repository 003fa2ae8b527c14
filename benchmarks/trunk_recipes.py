"""What ``trunk_quality.py`` trains: LoRA beside all linear modules of the last blocks, which run on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from economy_recipes import BASELINE, DEFAULT, RECIPES, Recipe

SETS: Final = ("b10", "dialogue", "b20", "arc_easy")
CHANCE: Final = {"arc_easy": 0.25}
"""Of a set whose answers are one of a few: the share of rows that a guess gets right."""

BLOCKS: Final = (4, 8, 12)
RANKS: Final = (8, 16)
MODEL_BLOCKS: Final = 30
DEFAULT_LR: Final = 4e-3
MEMORY_FILE: Final = Path("benchmarks") / "trunk-memory.json"
"""In docs: the peak of a device's process that trains each recipe, which ``trunk.py`` measures."""


def recipe_name(count: int, rank: int) -> str:
    """Of the last ``count`` blocks with LoRA of ``rank``."""
    return f"trunk-{count}-r{rank}"


TRUNK_RECIPES: Final[dict[str, Recipe]] = {
    recipe_name(count, rank): Recipe(
        f"the last {count} blocks on the device, r {rank} on all linears",
        {
            "rank": rank,
            "lora_alpha": 2.0 * rank,
            "target_modules": ("all-linear",),
            "blocks": tuple(range(MODEL_BLOCKS - count, MODEL_BLOCKS)),
        },
        default_lr=DEFAULT_LR,
        bars=SETS,
        sets=SETS,
        device_blocks=count,
        gains=False,
    )
    for rank in RANKS
    for count in BLOCKS
}

COMPARED: Final = {**{name: replace(RECIPES[name], bars=SETS) for name in (BASELINE, DEFAULT)}, **TRUNK_RECIPES}
"""Runs of the first two are those of ``economy.py``, as far as it has them."""

OPTIONS_OF: Final[dict[str, tuple[str, ...]]] = {
    BASELINE: ("--kind", "lora", "--active-fraction", "1"),
    DEFAULT: ("--kind", "bottleneck"),
    **{
        recipe_name(count, rank): (
            "--device-blocks", str(count), "--rank", str(rank), "--alpha", str(2 * rank),
        )
        for rank in RANKS
        for count in BLOCKS
    },
}  # fmt: skip
"""Of ``dlora-edge train``, by recipe."""


def order() -> list[tuple[str, str]]:
    """(set, recipe) of what is to be run, a set after the other."""
    return [(set_name, name) for set_name in SETS for name in COMPARED]
