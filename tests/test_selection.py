"""Which modules get an adapter: as PEFT reads names, by default, and never one that would be refused later."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, save_tiny, tiny_model
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from processes import run_export

from dlora.cloud.model.base_model import BaseModel
from dlora.export import selection
from dlora.export.selection import select_targets
from dlora.protocol.errors import ExportError

EVERY = [*FAMILIES, *MORE_FAMILIES]


@cache
def base_model(family: str) -> BaseModel:
    """Read only."""
    return BaseModel.from_model(tiny_model(family), family)


def adapted_by_peft(family: str, target_modules: tuple[str, ...]) -> set[str]:
    """The modules that PEFT puts LoRA beside."""
    wrapped = get_peft_model(
        tiny_model(family), LoraConfig(r=2, target_modules=list(target_modules), task_type="CAUSAL_LM")
    )
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A.default")
    }


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("llama", ("q_proj", "layers.0.mlp.up_proj")), ("gpt2", ("c_proj",)), ("falcon", ("dense",))],
)
def test_names_are_read_as_peft_reads_them(family: str, wanted: tuple[str, ...]) -> None:
    selected = select_targets(base_model(family), wanted)
    assert set(selected.names) == adapted_by_peft(family, wanted)
    assert selected.target_modules == wanted
    assert selected.notes == ()


@pytest.mark.parametrize("wanted", [None, ("all-linear",)], ids=["default", "all-linear"])
@pytest.mark.parametrize("family", EVERY)
def test_peft_selects_the_same_modules_by_the_saved_names(family: str, wanted: tuple[str, ...] | None) -> None:
    selected = select_targets(base_model(family), wanted)
    assert set(selected.names) == adapted_by_peft(family, selected.target_modules)


@pytest.mark.parametrize("family", EVERY)
def test_default_is_pefts_or_else_queries_and_values(family: str) -> None:
    selected = select_targets(base_model(family), None)
    if isinstance(PEFT_DEFAULTS.get(family), list):
        assert selected.target_modules == tuple(PEFT_DEFAULTS[family])
        assert selected.notes == ()
        return
    dloras = {
        "phi3": ("qkv_proj",), "openai-gpt": ("c_attn",), "persimmon": ("query_key_value",),
        "qwen3_next": ("in_proj_qkvz", "q_proj", "v_proj"),
        **dict.fromkeys(("mamba", "falcon_mamba"), ("in_proj",)),
    }  # fmt: skip
    assert selected.target_modules == dloras.get(family, ("q_proj", "v_proj"))
    (note,) = selected.notes
    assert note == (
        f"target modules are {', '.join(selected.target_modules)}, the default of dlora: PEFT has none for {family}"
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attn.q_proj", "q"), ("attn.k_proj", "k"), ("attn.Wv", "v"), ("attn.wqkv", "qkv"), ("attn.kv_proj", "kv"),
        ("attn.query", "q"), ("attn.v_lin", "v"), ("attn.query_key_value", "qkv"), ("attn.in_proj_qkvz", "qkv"),
        ("attn.kv_a_proj_with_mqa", "kv"), ("attn.q_proj.linear", "q"), ("attn.in_proj_z", ""), ("attn.o_proj", ""),
        ("mlp.w1", ""), ("mlp.up_proj", ""), ("attention.dense", ""),
    ],
)  # fmt: skip
def test_attention_part_is_read_from_the_module_name(name: str, part: str) -> None:
    assert selection._attention_part(f"model.layers.0.{name}") == set(part)


def test_a_default_of_pefts_that_cannot_be_trained_whole_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_DEFAULTS, "mamba", ["in_proj", "out_proj"])
    selected = select_targets(base_model("mamba"), None)
    assert selected.target_modules == ("in_proj",)
    assert selected.notes == (
        "target modules are in_proj, the default of dlora: not all of PEFT's for mamba can be trained here",
    )


def test_module_outside_the_blocks_is_not_selected() -> None:
    """As of a vision tower: what the adapter says then tells the two apart."""
    model = tiny_model("phi3")
    model.qkv_proj = torch.nn.Linear(2, 2)
    base = BaseModel.from_model(model, "phi3")
    selected = select_targets(base, None)
    assert selected.names == ("model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj")
    assert selected.target_modules == ("self_attn.qkv_proj",)


def test_no_default_is_a_one_line_error_with_the_choices() -> None:
    base = base_model("mamba")
    others = replace(base, targets={name: target for name, target in base.targets.items() if "in_proj" not in name})
    text = "PEFT has none for mamba, and dlora finds no attention; give --target-modules: target modules can be: x_proj"
    with pytest.raises(ExportError, match=text):
        select_targets(others, None)


def test_all_linear_means_all_linear_modules_of_the_blocks() -> None:
    selected = select_targets(base_model("opt"), ["all-linear"])
    assert len(selected.names) == 12
    assert not any("project" in name for name in selected.names)
    assert selected.target_modules == ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj")
    assert selected.notes == ()


def test_all_linear_leaves_out_experts_and_says_so() -> None:
    selected = select_targets(base_model("mixtral"), ["all-linear"])
    assert selected.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert selected.notes == (
        "all-linear leaves out 2 modules: model.layers.0.mlp.experts holds the weights of many experts in one tensor",
    )


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_all_linear_leaves_out_what_peft_refuses(family: str) -> None:
    selected = select_targets(base_model(family), ["all-linear"])
    assert selected.target_modules == ("in_proj", "x_proj")
    (note,) = selected.notes
    assert f"backbone.layers.0.mixer.out_proj gets no LoRA from PEFT in {family} models" in note


@pytest.mark.parametrize(
    ("family", "wanted", "text"),
    [
        ("llama", "w_proj", r"llama has no module 'w_proj'; target modules can be: down_proj, .*v_proj, all-linear"),
        ("llama", "lm_head", "is not a linear module of a block; target modules can be: "),
        ("mamba", "out_proj", "out_proj cannot be a target module of mamba: it gets no LoRA from PEFT in mamba models"),
        ("mamba", "conv1d", "conv1d cannot be a target module of mamba: it is not a linear module of a block"),
        ("falcon_h1", "out_proj", "it gets no LoRA from PEFT in falcon_h1 models"),
        ("glm4_moe", "down_proj", "it gets no LoRA from PEFT in glm4_moe models"),
        ("phimoe", "router", "it gives more than its product"),
        ("mixtral", "experts", "it holds the weights of many experts in one tensor"),
    ],
)
def test_invalid_target_modules_are_refused(family: str, wanted: str, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        select_targets(base_model(family), [wanted])


@pytest.mark.parametrize("family", EVERY)
def test_choices_in_an_error_are_accepted(family: str) -> None:
    base = base_model(family)
    with pytest.raises(ExportError) as refused:
        select_targets(base, ["nothing"])
    offered = re.search(r"target modules can be: (.*)$", str(refused.value))[1].split(", ")
    assert offered[-1] == "all-linear"
    for word in offered:
        assert select_targets(base, [word]).names


def test_export_prints_chosen_and_left_out_modules(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "granitemoe")
    done = run_export(tmp_path / "model", "--out", tmp_path / "bundle", "--json", "--base-model-name", "org/tiny")
    assert done.code == 0, done.stderr
    line = "target modules are q_proj, v_proj, the default of dlora: PEFT has none for granitemoe"
    assert done.stderr.splitlines() == [f"note: {line}"]
    assert json.loads(done.stdout)["notes"] == [line]
