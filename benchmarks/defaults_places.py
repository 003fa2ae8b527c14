"""What ``defaults.py`` trains where: models, the same model written otherwise, and recipes as the command has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from economy_recipes import BASELINE, DEFAULT, FORMER, PASSES, RECIPES, Recipe, in_passes
from small_models import FAMILIES, need_small_model
from transformers import AutoTokenizer

from dlora.cloud.model.loading import load_model
from dlora.cloud.model.source import find_source
from dlora.edge.training.defaults import DEFAULTS, default_rank, default_target_modules
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups, last_blocks, spread_blocks, target_names

SMOLLM2: Final = "smollm2-135m"
LORA: Final = "lora"
TRUNK: Final = "trunk"
BASE: Final = "base"
ADAPTED: Final = (DEFAULT, LORA, TRUNK)
"""What a user can choose who names no rate."""

SETS: Final = ("chat60", "b10", "messages", "documents", "dialogue", "b20", "arc_easy", "boolq")
SMALL_SETS: Final = ("chat60", "b10", "messages")
REWRITTEN_SETS: Final = ("b10", "dialogue")
SEEDED_SETS: Final = ("chat60", "b10", "dialogue", "b20")
"""With three seeds, on SmolLM2."""

FACTORS: Final = (1 / 16, 1 / 4, 4, 16)
GRID: Final = tuple(5e-4 * 2.0**place for place in range(-2, 9))


@dataclass(frozen=True)
class Place:
    """A base model, and what is trained on it.

    Attributes:
        model: its name in runs.
        blocks: of the model.
        way, factor: how the original is written otherwise; none: it is an original itself.
    """

    model: str
    blocks: int
    sets: tuple[str, ...]
    way: str = ""
    factor: float = 1.0

    @property
    def is_original(self) -> bool:
        return not self.way

    @property
    def device_blocks(self) -> int:
        """Two fifths of the blocks run on the device in ``trunk``."""
        return round(2 / 5 * self.blocks)

    def need_model(self, work: Path) -> str:
        """What the server is to be given; what is not there is made in ``work``."""
        if self.model in FAMILIES:
            return str(need_small_model(self.model, work))
        return _rewritten(work / self.model / "model", WAYS[self.way], self.factor) if self.way else self.model


def all_places() -> list[Place]:
    """SmolLM2, small models, and SmolLM2 written otherwise."""
    found = [Place(SMOLLM2, 30, SETS), *(Place(name, 8, SMALL_SETS) for name in FAMILIES)]
    found += [
        Place(f"{SMOLLM2}-{way}-{factor:g}", 30, REWRITTEN_SETS, way, factor) for way in WAYS for factor in FACTORS
    ]
    return found


def recipes_of(place: Place, manifest: Manifest) -> dict[str, Recipe]:
    """What is run on it, by name, as the command chooses it for that bundle."""
    blocks = last_blocks(manifest, place.device_blocks)
    last = {"rank": 8, "lora_alpha": 16.0, "target_modules": ("all-linear",), "blocks": blocks}
    seeded = SEEDED_SETS if place.model == SMOLLM2 else ()
    default = replace(_default_recipe(manifest), bars=seeded)
    found = {
        DEFAULT: default,
        PASSES: replace(in_passes(default, "2,2"), bars=(), has_grid=False),
        LORA: Recipe("lora", {"rank": 8}, default_lr=DEFAULTS["lora"].lr),
        TRUNK: Recipe("trunk", last, default_lr=4e-3, device_blocks=place.device_blocks),
    }
    if place.is_original:
        found[BASE] = Recipe("the base model", {"rank": 8}, gains=False, has_grid=False, trains=False)
        found[BASELINE] = replace(RECIPES[BASELINE], bars=seeded)
    else:
        found = {name: replace(recipe, has_grid=False) for name, recipe in found.items()}
        found[FORMER] = replace(default, gains=False, has_grid=False)
    return {name: replace(recipe, sets=place.sets) for name, recipe in found.items()}


def _default_recipe(manifest: Manifest) -> Recipe:
    """The command's, as ``economy_recipes.py`` has it for SmolLM2."""
    defaults, blocks = DEFAULTS["bottleneck"], spread_blocks(manifest, 8)
    names = default_target_modules("bottleneck", manifest, "answer")
    groups = choose_groups(manifest, names, blocks)
    acts_everywhere = set(target_names(groups)) & set(manifest.without_activation)
    rank = default_rank("bottleneck", manifest, groups)
    adapter = {
        "kind": "bottleneck", "basis": defaults.basis, "rank": rank, "lora_alpha": float(rank),
        "target_modules": names, "blocks": blocks,
        "adapt": "all" if acts_everywhere or defaults.active_from == "start" else "answer",
        "wire_dtype": defaults.wire_dtype,
    }  # fmt: skip
    default = replace(RECIPES[DEFAULT], has_grid=True, adapter=adapter)
    return replace(default, default_lr=defaults.lr, weight_decay=defaults.weight_decay)


# -- models that are made ----------------------------------------------------------------------------------


def _rewritten(folder: Path, write: Callable[[torch.nn.Module, float], None], factor: float) -> str:
    if not folder.exists():
        source = find_source(SMOLLM2)
        model = load_model(source, torch.float32)
        with torch.no_grad():
            for block in model.model.layers:
                write(block, factor)
        made = folder.with_name("half-made")  # until all of it is there
        AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file).save_pretrained(made)
        model.hf_quantizer.remove_quantization_config(model)  # the weights of a GGUF file are floats once they are here
        model.save_pretrained(made)
        made.rename(folder)
    return str(folder)


def _with_larger_norms(block: torch.nn.Module, factor: float) -> None:
    """What norms give is ``factor`` times as large, and what reads it divides by that."""
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        norm.weight *= factor
        for reader in readers:
            reader.weight /= factor


def _with_larger_values(block: torch.nn.Module, factor: float) -> None:
    """Likewise of v, which o reads, and of up, which down reads."""
    attention, mlp = block.self_attn, block.mlp
    for module, reader in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
        module.weight *= factor
        reader.weight /= factor


WAYS: Final[dict[str, Callable[[torch.nn.Module, float], None]]] = {
    "norms": _with_larger_norms,
    "values": _with_larger_values,
}
