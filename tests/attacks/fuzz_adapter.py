"""Fuzz target: an adapter from the internet. A LoRA, or ``CheckpointError``. Its input is both files, joined."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from attacks.fuzz_checkpoint import mutate_safetensors
from attacks.fuzz_target import Target, decode_json, encode_json, join, mutate_bytes, mutate_value, split

from dlora.edge.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, SavedModule, load_adapter, save_adapter
from dlora.protocol.errors import CheckpointError


def target(directory: Path) -> Target:
    """The target; ``directory`` is its own."""
    names = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
    modules = [SavedModule(name, np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)) for name in names]
    save_adapter(directory, modules, r=2, lora_alpha=8, base_model_name="tiny")
    config, weights = ((directory / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    patterns = {
        "rank_pattern": {"q_proj": 2, r".*\.down_proj": 2},
        "alpha_pattern": {r"layers\.[0-9]\..*down_proj|^q_proj$": 32.5},
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    }
    richer = msgspec.json.encode({**decode_json(config), **patterns})

    def run(data: bytes) -> None:
        for name, content in zip((CONFIG_NAME, WEIGHTS_NAME), split(data), strict=True):
            (directory / name).write_bytes(content)
        try:
            found = load_adapter(directory)
        except CheckpointError:
            return
        assert found.modules
        for module in found.modules.values():
            assert module.lora_A.shape[0] == module.lora_B.shape[1] > 0
            assert math.isfinite(found.scaling[module.name])

    return Target("adapter", (join(config, weights), join(richer, weights)), mutate, run)


def mutate(data: bytes, rng: Random) -> bytes:
    """Change a setting, a tensor's description, or the tensors' bytes."""
    config, weights = split(data)
    try:
        if rng.random() < 0.5:
            return join(encode_json(mutate_value(decode_json(config), rng)), weights)
    except ValueError:
        return mutate_bytes(data, rng)
    return join(config, mutate_safetensors(weights, rng, 0.3))
