"""Adapters on disk: what we write PEFT reads, what PEFT writes we read."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_disk import small_disk
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dlora.edge.adapters import peft as peft_adapter
from dlora.edge.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, LoadedAdapter, SavedModule, load_adapter, save_adapter
from dlora.protocol.errors import CheckpointError, StorageError

torch.set_num_threads(2)
R, ALPHA = 3, 8
IDS = torch.arange(10).reshape(2, 5)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


LLAMA_TARGETS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.2.self_attn.v_proj": (16, 8)}
GPT2_TARGETS = {"transformer.h.1.attn.c_attn": (16, 48), "transformer.h.0.mlp.c_proj": (64, 16)}


def random_modules(targets: dict[str, tuple[int, int]], r: int = R, seed: int = 0) -> list[SavedModule]:
    rng = np.random.default_rng(seed)
    return [
        SavedModule(
            name, rng.normal(size=(r, inputs)).astype(np.float32), rng.normal(size=(outputs, r)).astype(np.float32)
        )
        for name, (inputs, outputs) in targets.items()
    ]


def save(directory: Path, modules: list[SavedModule], **options: Any) -> None:
    save_adapter(directory, modules, **{"r": R, "lora_alpha": ALPHA, "base_model_name": "tiny", **options})


def logits_by_formula(model: PreTrainedModel, modules: list[SavedModule], scaling: dict[str, float]) -> torch.Tensor:
    """Logits with ``W + scaling * B A`` in place of each weight."""
    for module in modules:
        delta = torch.from_numpy(scaling[module.name] * module.lora_B @ module.lora_A)
        weight = model.get_submodule(module.name).weight
        weight.data += delta if weight.shape == delta.shape and "h." not in module.name else delta.T
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("make", "targets", "conv1d"), [(llama, LLAMA_TARGETS, False), (gpt2, GPT2_TARGETS, True)], ids=["llama", "gpt2"]
)
def test_peft_loads_what_we_save(tmp_path: Path, make: Any, targets: dict[str, tuple[int, int]], conv1d: bool) -> None:
    modules = random_modules(targets)
    save(tmp_path, modules, fan_in_fan_out=conv1d, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own
        loaded = PeftModel.from_pretrained(make(), tmp_path)
    live = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in loaded.named_modules()
        if name.endswith("lora_A.default")
    }
    assert live == set(targets)
    with torch.no_grad():
        theirs = loaded(IDS).logits
    expected = logits_by_formula(make(), modules, dict.fromkeys(targets, ALPHA / R))
    assert not torch.allclose(theirs, make()(IDS).logits)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    again = load_adapter(tmp_path)
    assert (again.r, again.lora_alpha, again.base_model_name) == (R, ALPHA, "tiny")
    for module in modules:
        assert (again.modules[module.name].lora_A == module.lora_A).all()
        assert (again.modules[module.name].lora_B == module.lora_B).all()
    assert "2 modules of the target modules q_proj, v_proj" in (tmp_path / "README.md").read_text()


def test_config_is_a_subset_of_what_peft_writes(tmp_path: Path) -> None:
    save(tmp_path / "ours", random_modules(LLAMA_TARGETS))
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=sorted(LLAMA_TARGETS), task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / CONFIG_NAME).read_text()) for who in ("ours", "theirs"))
    theirs["target_modules"].sort()
    theirs["base_model_name_or_path"] = "tiny"
    assert ours == {key: theirs[key] for key in ours}
    tensors = [safetensors.numpy.load_file(tmp_path / who / WEIGHTS_NAME) for who in ("ours", "theirs")]
    assert {key: value.shape for key, value in tensors[0].items()} == {
        key: value.shape for key, value in tensors[1].items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 2}, "alpha_pattern": {r".*\.2\..*v_proj": 32}},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "gaussian"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_we_load_what_peft_saves(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = llama()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype).float()
    with torch.no_grad():
        expected = peft(IDS).logits
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path)
    assert len(loaded.modules) == 6
    found = logits_by_formula(llama(), list(loaded.modules.values()), loaded.scaling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_refused(directory: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_adapter(directory)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trains biases"),
        ({"lora_bias": True}, "biases in lora_B"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"peft_type": None}, "only LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changed base model"),
        ({"r": 5}, "has rank 3"),
        ({"r": "x"}, "positive number"),
        ({"rank_pattern": {"q_proj": 2}}, "the configuration says 2"),
        ({"rank_pattern": {"(": 2}}, "name the modules instead"),
        ({"alpha_pattern": {"(?x:(a|aa) +b)": 2}}, "name the modules instead"),
        ({"r": 10**9}, "ranks up to 4096"),
        ({"rank_pattern": {"q_proj": 4097}}, "ranks up to 4096"),
        ({"rank_pattern": {f"x{at}": 2 for at in range(100_000)}}, "has 100000 patterns; 4096 can be used"),
        ({"alpha_pattern": {f"x{at}": 2 for at in range(4097)}}, "has 4097 patterns"),
        ({"alpha_pattern": {"x" * 10**6: 2}}, "name the modules instead"),
        ({"alpha_pattern": {"q_proj": -2}}, "positive number"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    save(tmp_path, random_modules(LLAMA_TARGETS))
    edit_config(tmp_path, **changes)
    assert_refused(tmp_path, text)


def test_each_pattern_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, random_modules({f"layers.{at}.q_proj": (4, 4) for at in range(50)}))
    edit_config(tmp_path, alpha_pattern={f"x{at}": 2 for at in range(1000)})
    compiled = []
    compile_one = re.compile
    monkeypatch.setattr(re, "compile", lambda *arguments: compiled.append(arguments) or compile_one(*arguments))
    monkeypatch.setattr(re, "match", None)
    assert len(load_adapter(tmp_path).modules) == 50
    assert len(compiled) == 1000
    monkeypatch.undo()
    # 150 names of 250 letters and one pattern with which ``re`` tries them all, over and over: 95 seconds, once.
    (tmp_path / "slow").mkdir()
    save(tmp_path / "slow", random_modules({f"{'z.' * 122}layer{at:03}": (4, 4) for at in range(150)}))
    edit_config(tmp_path / "slow", rank_pattern={".*.*.*zz": 4})
    assert len(load_adapter(tmp_path / "slow").modules) == 150
    edit_config(tmp_path / "slow", rank_pattern={f".*{at}.*zz": 4 for at in range(100)})
    assert_refused(tmp_path / "slow", "too many patterns for 150 modules")


def test_huge_or_piped_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path, random_modules(LLAMA_TARGETS))
    (tmp_path / CONFIG_NAME).write_bytes(b" " * (17 << 20))
    assert_refused(tmp_path, "too large")
    (tmp_path / CONFIG_NAME).unlink()
    os.mkfifo(tmp_path / CONFIG_NAME)
    assert_refused(tmp_path, "no regular file")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"base_model.model.a.lora_A.weight": np.ones((3, 2), np.float32)}, "a has no lora_B"),
        ({"base_model.model.a.lora_magnitude_vector": np.ones(2, np.float32)}, "no part of a plain LoRA"),
        ({"base_model.model.a.lora_A.weight": np.ones((3, 2), np.int64)}, "only floats"),
        ({"base_model.model.a.lora_A.weight": np.full((3, 2), np.nan, np.float32)}, "not finite"),
        ({}, "no modules"),
    ],
)
def test_invalid_weights_are_refused(tmp_path: Path, tensors: dict[str, Any], text: str) -> None:
    save(tmp_path, random_modules(LLAMA_TARGETS))
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS_NAME)
    assert_refused(tmp_path, text)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no", "no such directory")
    assert_refused(tmp_path, r"has no adapter_config\.json")
    save(tmp_path, random_modules(LLAMA_TARGETS))
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(whole[:-1])
    assert_refused(tmp_path, "is damaged")
    (tmp_path / WEIGHTS_NAME).unlink()
    assert_refused(tmp_path, "has no adapter_model")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert_refused(tmp_path, "pickle")
    (tmp_path / CONFIG_NAME).write_text("{")
    assert_refused(tmp_path, "cannot be read")


def states_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: list[SavedModule], **options: Any
) -> list[tuple[dict[str, Any], LoadedAdapter | None]]:
    """Configuration and weights after each rename of a save over the adapter that is there."""
    seen: list[tuple[dict[str, Any], LoadedAdapter | None]] = []
    write = peft_adapter.write_atomically

    def look(path: Path, content: bytes) -> None:
        write(path, content)
        loaded = load_adapter(tmp_path) if (tmp_path / WEIGHTS_NAME).exists() else None
        seen.append((json.loads((tmp_path / CONFIG_NAME).read_text()), loaded))

    monkeypatch.setattr(peft_adapter, "write_atomically", look)
    save(tmp_path, new, **options)
    return seen


@pytest.mark.parametrize(("before", "after"), [((0,), (0, 1)), ((0, 1), (1,)), ((0,), (1,)), ((0, 1), (0, 1))])
def test_interrupted_save_leaves_the_old_or_the_new_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    old = [random_modules(LLAMA_TARGETS)[index] for index in before]
    new = [random_modules(LLAMA_TARGETS, seed=1)[index] for index in after]
    save(tmp_path, old)
    for config, loaded in states_of_a_save(tmp_path, monkeypatch, new):
        assert loaded is not None
        # PEFT drops weights that the configuration does not name, silently: never may that happen.
        assert set(loaded.modules) <= set(config["target_modules"])
        one = next(iter(loaded.modules.values()))
        source = old if any((one.lora_A == m.lora_A).all() for m in old if m.name == one.name) else new
        assert set(loaded.modules) == {module.name for module in source}
        for module in source:
            assert (loaded.modules[module.name].lora_B == module.lora_B).all()
    assert set(load_adapter(tmp_path).modules) == {module.name for module in new}
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"] == sorted(m.name for m in new)


def test_save_over_another_adapter_never_mixes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, random_modules(LLAMA_TARGETS))
    new = random_modules(LLAMA_TARGETS, r=5, seed=1)
    for config, loaded in states_of_a_save(tmp_path, monkeypatch, new, r=5):
        assert config["r"] == 5
        assert loaded is None or loaded.r == 5
    assert load_adapter(tmp_path).r == 5


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        save(disk, random_modules(LLAMA_TARGETS))
        old = load_adapter(disk)
        big = random_modules(dict.fromkeys(LLAMA_TARGETS, (80_000, 8)))
        with pytest.raises(StorageError, match="No space left on device; free space"):
            save(disk, big)
        again = load_adapter(disk)
        for name, module in old.modules.items():
            assert (again.modules[name].lora_A == module.lora_A).all()
        assert sorted(path.name for path in disk.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
