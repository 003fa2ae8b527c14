"""What ``defaults.py`` trains where: models, the same model written otherwise, and recipes as the command has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from economy_recipes import BASELINE, DEFAULT, FORMER, RECIPES, Recipe
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
FP16_FACTORS: Final = "default-fp16-factors"
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
        folder: makes it where it is not there, and says what the server is to be given.
        blocks: of the model.
        is_original: whether it is not another's function.
    """

    model: str
    folder: Callable[[], str]
    blocks: int
    sets: tuple[str, ...]
    is_original: bool = True

    @property
    def device_blocks(self) -> int:
        """Two fifths of the blocks run on the device in ``trunk``."""
        return round(2 / 5 * self.blocks)


def places(work: Path) -> dict[str, Place]:
    """All of them, by model; models that are made are made in ``work``."""
    found = [Place(SMOLLM2, lambda: SMOLLM2, 30, SETS)]
    found += [Place(name, partial(_small_model, name, work), 8, SMALL_SETS) for name in FAMILIES]
    for way, write in WAYS.items():
        for factor in FACTORS:
            name = f"{SMOLLM2}-{way}-{factor:g}"
            folder = partial(_rewritten, work / name / "model", write, factor)
            found.append(Place(name, folder, 30, REWRITTEN_SETS, is_original=False))
    return {place.model: place for place in found}


def recipes_of(place: Place, manifest: Manifest) -> dict[str, Recipe]:
    """What is run on it, by name, as the command chooses it for that bundle."""
    on_device = place.device_blocks
    last = {
        "rank": 8,
        "lora_alpha": 16.0,
        "target_modules": ("all-linear",),
        "blocks": last_blocks(manifest, on_device),
    }
    seeded = SEEDED_SETS if place.model == SMOLLM2 else ()
    default = replace(_default_recipe(manifest), bars=seeded)
    found = {
        DEFAULT: default,
        LORA: Recipe("lora", {"rank": 8}, default_lr=DEFAULTS["lora"].lr),
        TRUNK: Recipe("trunk", last, default_lr=4e-3, device_blocks=on_device),
    }
    if place.is_original:
        found[BASE] = Recipe("the base model", {"rank": 8}, gains=False, has_grid=False, trains=False)
        found[BASELINE] = replace(RECIPES[BASELINE], bars=seeded)
    else:
        found = {name: replace(recipe, has_grid=False) for name, recipe in found.items()}
        found[FORMER] = replace(default, gains=False, has_grid=False)
    if place.model == SMOLLM2:
        fp16 = {**default.adapter, "wire_dtype": "int8,adapter_state=fp16"}
        found[FP16_FACTORS] = replace(default, adapter=fp16, has_grid=False, bars=REWRITTEN_SETS)
    return {name: replace(recipe, sets=_sets_of(name, place)) for name, recipe in found.items()}


def _sets_of(recipe: str, place: Place) -> tuple[str, ...]:
    return REWRITTEN_SETS if recipe == FP16_FACTORS else place.sets


def _default_recipe(manifest: Manifest) -> Recipe:
    """The command's, as ``economy_recipes.py`` has it for SmolLM2."""
    defaults, blocks = DEFAULTS["bottleneck"], spread_blocks(manifest, 8)
    names = default_target_modules("bottleneck", manifest, "answer")
    groups = choose_groups(manifest, names, blocks)
    acts_everywhere = set(target_names(groups)) & set(manifest.without_activation)
    rank = default_rank("bottleneck", manifest, groups)
    return replace(
        RECIPES[DEFAULT],
        has_grid=True,
        adapter={
            "kind": "bottleneck",
            "basis": defaults.basis,
            "rank": rank,
            "lora_alpha": float(rank),
            "target_modules": names,
            "blocks": blocks,
            "adapt": "all" if acts_everywhere or defaults.active_from == "start" else "answer",
            "wire_dtype": defaults.wire_dtype,
        },
        default_lr=defaults.lr,
        weight_decay=defaults.weight_decay,
    )


# -- models that are made ----------------------------------------------------------------------------------


def _small_model(name: str, work: Path) -> str:
    return str(need_small_model(name, work))


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
