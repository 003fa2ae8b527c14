"""A base model whose parts are in several places computes what it computes in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import INVOCATION, random_answers
from families import VOCABULARY
from generating import generated
from processes import cloud_process, run_cloud
from serving import config, open_model, random_dataset, serving, training
from test_cli import assert_fails
from tiny import TinyFactory
from training_runs import bits

from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.cloud.model.held_linear import bytes_of_weights
from dlora.cloud.model.placement import device_of, parameter_of, placed_on
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.protocol.choices import WeightFormat
from dlora.protocol.errors import UsageError

BLOCKS = 4
ON_DISK = (1, 2)
Run = tuple[dict[str, Any], Dataset]
RUNS: dict[str, Run] = {
    "lora": ({"target_modules": ("all-linear",)}, random_dataset(VOCABULARY)),
    "kill_revive": (
        {"kill_revive": {"active_fraction": 0.5, "warmup_steps": 1, "kill_every": 1}},
        random_dataset(VOCABULARY),
    ),
    "bottleneck on answers": ({"kind": "bottleneck", "basis_steps": 2, "invocation": INVOCATION}, random_answers()),
    "basis of weights": ({"kind": "bottleneck", "basis": "weights"}, random_dataset(VOCABULARY)),
    "passes": ({"kind": "bottleneck", "basis_steps": 2, "passes": "2,2"}, random_dataset(VOCABULARY)),
}


def placed(tiny: TinyFactory, family: str = "llama", weight_format: WeightFormat = "full") -> BaseModel:
    ends = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    blocks = {f"model.layers.{block}": "disk" if block in ON_DISK else "cpu" for block in range(BLOCKS)}
    model = str(tiny(family, blocks=BLOCKS).model)
    return load_base_model(model, weight_format=weight_format, device_map={**ends, **blocks})


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "stablelm"])
def test_weights_on_disk_are_the_same_model(family: str, tiny: TinyFactory) -> None:
    base, plain = placed(tiny, family), tiny(family, blocks=BLOCKS).base
    assert placed_on(base.model) == {"cpu": 6, "disk": 2}
    assert base.fingerprint == plain.fingerprint
    assert list(base.targets) == list(plain.targets)
    assert base.device == torch.device("cpu")
    for name, target in base.targets.items():
        assert target.module.weight.is_meta == (target.block in ON_DISK)
        assert torch.equal(target.weight, plain.targets[name].weight)
        assert target.device == device_of(target.module) == torch.device("cpu")
    assert not parameter_of(base.lm_head).is_meta
    assert bytes_of_weights(base.model) < bytes_of_weights(plain.model)


@pytest.mark.parametrize("run", RUNS)
def test_training_gives_the_same_bits(run: str, tiny: TinyFactory) -> None:
    changes, dataset = RUNS[run]
    bundle = tiny(blocks=BLOCKS, head_dtype="fp32").bundle
    found = []
    for base in (tiny(blocks=BLOCKS).base, placed(tiny)):
        run_config = config(total_steps=4, **changes)
        with serving(base) as server, training(bundle, server.url, run_config, dataset) as trainer:
            losses = [trainer.run_step().loss for _ in range(4)]
            evaluated = trainer.evaluate(dataset).loss
            found.append((losses, evaluated, bits(trainer)))
    assert found[0] == found[1]


def answers(base: BaseModel, bundle: Path) -> Sequence[int]:
    with serving(base) as server, open_model(Bundle.open(bundle), server.url, None, wire_dtype="fp32") as model:
        return generated(model, [5, 9, 7], 12)


def test_answers_are_the_same(tiny: TinyFactory) -> None:
    bundle = tiny(blocks=BLOCKS, head_dtype="fp32").bundle
    assert answers(placed(tiny), bundle) == answers(tiny(blocks=BLOCKS).base, bundle)


def test_few_bits_are_placed_too(tiny: TinyFactory) -> None:
    bundle = tiny(blocks=BLOCKS, head_dtype="fp32", weight_format="int8").bundle
    base, plain = placed(tiny, weight_format="int8"), tiny(blocks=BLOCKS, weight_format="int8").base
    assert base.fingerprint == plain.fingerprint
    assert answers(base, bundle) == answers(plain, bundle)


def test_command_places_a_small_model_where_there_is_room(tiny: TinyFactory, tmp_path: Path) -> None:
    """Without a GPU and with memory enough all of it is on the processor."""
    with cloud_process(tiny().model, tmp_path, "--device-map", "auto") as cloud:
        assert cloud.hello["base_fingerprint"] == tiny().base.fingerprint
    assert "parts of the model on each device: " in (tmp_path / "log").read_text()
    done = run_cloud("serve", tiny().model, "--device-map", "auto", "--device", "cuda")
    assert_fails(done, UsageError.exit_code, "--device and --device-map both say where the model is to be; give one")
