"""What ``economy.py`` compares: recipes, the one grid of learning rates, and which of it all is run in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from dlora.edge.settings import Settings
from dlora.edge.training.resolve import resolve_without_data
from dlora.edge.training.resolved import Resolved
from dlora.protocol.manifest import Manifest

GRID: Final = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""The learning rates that recipes choose among."""

BASELINE: Final = "lora-qv-all"
DEFAULT: Final = "default"
ON_DEVICE: Final = "blocks-12-answer"
PASSES: Final = "default-2,2"
FORMER: Final = "bottleneck-96-answer-int8"
"""The default before it had gains."""
SECOND: Final = "bottleneck-192-answer-int8"
FP16_ALL: Final = "bottleneck-64-all-fp16"

INTENTS: Final = ("b10", "b20")
BARRED_SETS: Final = ("chat60", "b10", "dialogue", "b20")  # the cheapest first
OTHER_SETS: Final = ("arc_easy", "boolq")

PASSED_AGAIN: Final = {"chat60": 4, "dialogue": 2}
"""What the command divided a bottleneck's rate by on the sets that a run passes over more than once, before it found
rates (decision 0038)."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how it crosses.

    Attributes:
        title: for tables and plots.
        adapter: settings, ``lora_alpha``, and ``adapt``. What is not there: the bundle's rank and alpha, fp16 on the
            wire, adapters that act at all tokens.
        kill_revive: fields of ``KillReviveConfig``.
        default_lr, weight_decay: the optimizer's of a user who gives none; of recipes without gains, of one who gave
            none before there were any, on data that are passed over once (of LoRA: on all data). With gains the rate is
            found, and the grid begins at ``default_lr``.
        bars: the sets on which a bar rests on this recipe; there it has three seeds, elsewhere one.
        sets: where it is run.
        device_blocks: how many of the last blocks run on the device, in ``trunk``; 0: ``split``.
        gains: whether it has the bundle's; LoRA as others train it has none, nor has what was run before there were
            any (decision 0063).
        has_grid: whether its rate is chosen from the grid; else it has the one of a user who gives none.
        trains: whether it makes a step at all; else it is the base model.
    """

    title: str
    adapter: dict[str, Any] = field(default_factory=dict)
    kill_revive: dict[str, Any] = field(default_factory=lambda: {"active_fraction": 1.0})
    default_lr: float = 1e-3
    weight_decay: float = 0.0
    bars: tuple[str, ...] = ()
    sets: tuple[str, ...] = BARRED_SETS + OTHER_SETS
    device_blocks: int = 0
    gains: bool = True
    has_grid: bool = True
    trains: bool = True

    def seeds(self, set_name: str) -> tuple[int, ...]:
        """The seeds of its runs on a set."""
        return (0, 1, 2) if set_name in self.bars else (0,)

    def usual_lr(self, set_name: str) -> float | None:
        """The rate of a user who gives none, on this set; None: it is found."""
        if self.gains:
            return None
        return self.default_lr / PASSED_AGAIN.get(set_name, 1) if self.kind != "lora" else self.default_lr

    @property
    def kind(self) -> str:
        return str(self.adapter.get("kind", "lora"))

    @property
    def acts_on_answers(self) -> bool:
        return self.adapter.get("adapt") == "answer"


def _bottleneck(rank: int, adapt: str, wire: str) -> dict[str, Any]:
    """One core a group, in eight blocks spread evenly over the upper half, the last one included."""
    return {
        "kind": "bottleneck", "basis": "data", "rank": rank, "lora_alpha": float(rank),
        "target_modules": ("all-linear",), "blocks": (15, 17, 19, 21, 23, 25, 27, 29), "adapt": adapt,
        "wire_dtype": wire,
    }  # fmt: skip


def _former(title: str, adapter: dict[str, Any], *bars: str, sets: tuple[str, ...] = ()) -> Recipe:
    """With the command's optimizer, run before there were gains; what it is compared for is not the rate."""
    title = f"{title}, without gains"
    return Recipe(title, adapter, default_lr=8e-3, weight_decay=1.0, bars=bars, sets=sets or bars, gains=False)


def _some(title: str, kill_revive: dict[str, Any]) -> Recipe:
    """LoRA as the baseline's, in some blocks at a time."""
    return Recipe(title, {"rank": 8}, kill_revive, gains=False)


RECIPES: Final[dict[str, Recipe]] = {
    BASELINE: Recipe("all active, lora r 8 on q, v", {"rank": 8}, bars=BARRED_SETS, gains=False),
    DEFAULT: Recipe(
        "bottleneck r 96, answer, int8 (the default)", _bottleneck(96, "answer", "int8"), default_lr=8e-3,
        weight_decay=1.0, bars=BARRED_SETS, has_grid=False,  # of some sets and models, ``defaults.py`` has one
    ),
    # With fewer passes: what a round trip or two less costs.
    **{
        f"default-{passes}": Recipe(
            f"the default in passes {passes}", _bottleneck(96, "answer", "int8") | {"passes": passes}, default_lr=8e-3,
            weight_decay=1.0, sets=BARRED_SETS + OTHER_SETS if passes == "2,2" else BARRED_SETS,
            bars=BARRED_SETS if passes == "2,2" else (), has_grid=False,
        )
        for passes in ("2,2", "2,1", "1,1")
    },
    ON_DEVICE: Recipe(
        "the last 12 blocks on the device, r 8 on all linears, answer",
        {
            "rank": 8, "lora_alpha": 16.0, "target_modules": ("all-linear",), "blocks": tuple(range(18, 30)),
            "adapt": "answer",
        },
        sets=(*INTENTS, "dialogue"), device_blocks=12, has_grid=False,
    ),
    SECOND: _former("bottleneck r 192, answer, int8 (the second)", _bottleneck(192, "answer", "int8"), "dialogue"),
    FP16_ALL: _former("bottleneck r 64, all positions, fp16", _bottleneck(64, "all", "fp16"), *INTENTS, "dialogue"),
    FORMER: _former(
        "bottleneck r 96, answer, int8", _bottleneck(96, "answer", "int8"), *BARRED_SETS, sets=BARRED_SETS + OTHER_SETS
    ),
    # Kill and Revive at 1/8, its baselines with as much traffic, and as little as can be trained.
    "random-1/8": _some("random, 1/8 active", {"active_fraction": 0.125, "score": "random"}),
    "static-1/8": _some("static: blocks 17, 21, 25, 29", {"score": "static", "static": (17, 21, 25, 29)}),
    "one-block": _some("one block: 22", {"score": "static", "static": (22,)}),
}  # fmt: skip


def order() -> Iterator[tuple[str, str]]:
    """(set, recipe) of all that is to be run: what the bars rest on first, and of that the cheapest first."""
    first = [(name, recipe) for recipe in RECIPES for name in BARRED_SETS if name in RECIPES[recipe].bars]
    rest = [(name, recipe) for name in (*BARRED_SETS, *OTHER_SETS) for recipe in RECIPES]
    for name, recipe in dict.fromkeys(first + rest):
        if name in RECIPES[recipe].sets:
            yield name, recipe


def in_passes(recipe: Recipe, passes: str) -> Recipe:
    """The same, with its groups asked so."""
    return with_settings(recipe, passes=passes)


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """The same, with these."""
    return replace(recipe, adapter={**recipe.adapter, **settings})


def train_config(
    recipe: Recipe,
    manifest: Manifest,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    optimizer: Mapping[str, Any],
    invocation: tuple[int, ...] = (),
) -> Resolved:
    """The run of a recipe.

    ``optimizer``: fields of that section; ``invocation``: of the data, where the recipe acts on answers.
    """
    kill_revive = dict(recipe.kill_revive)
    given = {"kind": "lora", "wire_dtype": "fp16", **recipe.adapter, "kr_score": kill_revive.pop("score", "static")}
    given.pop("adapt", None)
    for name, named in (("lora_alpha", "alpha"), ("static", "static_units")):
        value = given.pop(name, kill_revive.pop(name, None))
        given |= {named: value} if value is not None else {}
    settings = Settings.of(
        **{name: _as_text(value) for name, value in (given | kill_revive).items()},
        **optimizer,
        server="ws://a-server",
        device_blocks=str(recipe.device_blocks),
        active_from="answer" if invocation else "start",
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    run = resolve_without_data(settings, manifest, None)
    return msgspec.structs.replace(run, invocation=invocation)


def _as_text(value: Any) -> Any:
    """Names and numbers as the command has them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
