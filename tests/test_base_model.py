"""The base model: frozen, cut where every family has a cut, its exchange groups traced and not guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED_FAMILIES, random_model, save_tiny, tiny_model
from processes import run_cloud
from tiny import TinyFactory
from transformers import PreTrainedModel
from type_configs import tiny_config

from dlora.cloud.model.base_model import BaseModel, find_embedding, find_head, load_base_model
from dlora.cloud.model.ends import check_cut
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.cloud.model.source import public_name
from dlora.export.verify import real_hidden_states
from dlora.protocol.errors import ExportError, UsageError

# family: the last names of the target modules of block 1, group by group, in the order of execution
LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
FUSED = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
GROUPS = {
    **dict.fromkeys(FAMILIES, LLAMA),
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    **dict.fromkeys(("bloom", "gpt_neox"), FUSED),
    # These run attention and MLP side by side, on one and the same input.
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    "cohere": [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
}


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tiny: TinyFactory) -> BaseModel:
    return tiny(request.param).base


def test_groups_are_the_modules_that_share_a_tensor(base: BaseModel) -> None:
    groups = base.groups(base.targets)
    assert [group.block for group in groups] == sorted(group.block for group in groups)
    assert {group.block for group in groups} == {0, 1}
    second = [[target.name.rpartition(".")[2] for target in group.targets] for group in groups if group.block == 1]
    assert second == GROUPS[base.architecture]
    modules = dict(base.model.named_modules())
    for target in base.targets.values():
        assert modules[target.name] is target.module
        assert target.module(torch.zeros(1, target.in_features)).shape == (1, target.out_features)


def test_groups_can_be_restricted(base: BaseModel) -> None:
    last = list(base.targets)[-1]
    (group,) = base.groups([last])
    assert (group.block, [target.name for target in group.targets]) == (1, [last])
    first = next(iter(base.targets))
    assert [group.targets[0].name for group in base.groups([last, first])] == [first, last]


def test_the_cut_model_gives_the_whole_models_logits(base: BaseModel) -> None:
    assert check_cut(base, find_embedding(base), find_head(base)) <= 1e-6


def test_base_model_is_frozen_and_in_eval_mode(base: BaseModel) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())


def test_sizes_match_the_model(base: BaseModel) -> None:
    assert base.blocks == 2
    assert base.embedding_size == base.model.get_input_embeddings().weight.shape[1]
    hidden = base.last_hidden_state(torch.zeros(1, 3, base.embedding_size))
    assert hidden.shape == (1, 3, base.hidden_size)
    assert base.parameters == sum({p.data_ptr(): p.numel() for p in base.model.parameters()}.values())


def test_padding_changes_nothing(base: BaseModel) -> None:
    embeds = torch.randn(2, 5, base.embedding_size, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    together = base.last_hidden_state(embeds, mask)
    torch.testing.assert_close(together[1:, :3], base.last_hidden_state(embeds[1:, :3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_fingerprint_is_that_of_the_weights_not_of_their_dtype(family: str, tmp_path) -> None:
    save_tiny(tmp_path, family)
    full, half = (load_base_model(str(tmp_path), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert full.fingerprint == half.fingerprint
    other = BaseModel.from_model(tiny_model(family, seed=1), family)
    assert other.fingerprint != full.fingerprint


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = tiny_model("llama")
    before = BaseModel.from_model(model, "a").fingerprint
    model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    assert BaseModel.from_model(model, "a").fingerprint != before


def test_family_with_another_head_is_refused() -> None:
    model = tiny_model("granite")
    base = BaseModel.from_model(model, "granite")
    embedding, head = find_embedding(base), find_head(base)
    model.config.logits_scaling = 3.0
    with pytest.raises(ExportError, match="granite does more between token ids and logits"):
        check_cut(base, embedding, head)


def test_an_encoder_decoder_is_refused_by_name(tmp_path) -> None:
    save_tiny(tmp_path, "t5")
    with pytest.raises(ExportError, match=r"encoder-decoder model \(t5\)"):
        load_base_model(str(tmp_path))


def test_a_module_that_runs_twice_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate_proj = model.model.layers[0].mlp.up_proj
    base = BaseModel.from_model(model, "shared")
    (name,) = base.refused
    with pytest.raises(ExportError, match=f"{name} cannot be a target module of shared: it runs 2 times"):
        base.groups([name])


def test_experts_of_a_mixture_are_refused_by_name() -> None:
    base = BaseModel.from_model(tiny_model("mixtral"), "mixtral")
    assert not any("expert" in name for name in base.targets)
    assert len(base.groups([name for name in base.targets if name.endswith("q_proj")])) == 2
    with pytest.raises(ExportError, match=r"model\.layers\.0\.mlp\.experts cannot be a target .* many experts"):
        base.groups(["model.layers.0.mlp.experts"])


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_that_cannot_be_cut_is_refused_before_anything_is_served(family: str) -> None:
    """``dlora-cloud serve`` loads through the same door as ``dlora-export``."""
    with pytest.raises(ExportError, match=r"not supported|only decoder-only models are supported"):
        BaseModel.from_model(tiny_model(family), family)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("axk2", {"num_key_value_heads": 2}, r"its own code fails: RuntimeError: The size of tensor a"),
        ("reformer", {}, r"cannot be trained, its own code fails: AssertionError: If you want to train"),
        ("reformer", {"is_decoder": False}, r"cannot be loaded .*: If you want to use `ReformerModelWithLMHead`"),
        ("reformer", {"num_buckets": 3}, r"its own code fails: AssertionError: There should be an even number"),
        ("reformer", {"max_position_embeddings": 4, "axial_pos_embds": False}, r"its own code fails: ValueError: Seq"),
    ],
)
def test_an_unusual_family_is_one_line_with_its_own_reason(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ExportError, match=reason):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize("model_type", ["cpmant", "gemma4_text"])
def test_a_model_that_runs_on_token_ids_only_is_told_so(model_type: str) -> None:
    """Its own code does not fail: CPM-Ant takes no embeddings, and Gemma 4 looks up more of a token in every block."""
    with pytest.raises(ExportError, match=r"mine \(.*\) runs on token ids but not on their embeddings alone"):
        BaseModel.from_model(random_model(tiny_config(model_type)), "mine")


def test_a_family_that_changes_its_input_in_place_is_weighed() -> None:
    """CTRL scales the embeddings that it is given, which autograd forbids of a leaf."""
    base = BaseModel.from_model(random_model(tiny_config("ctrl")), "ctrl")
    assert LiveBytes.measure(base).largest(16, 16) > 0


@pytest.mark.parametrize(
    ("model_type", "block"),
    [
        ("llama4_text", "model.layers.1"),
        ("git", "git.encoder.layer.1"),
        ("moss_transcribe_diarize", "model.language_model.layers.1"),
    ],
)
def test_the_text_models_own_blocks_are_found(model_type: str, block: str) -> None:
    """Where transformers names no decoder (Llama 4), and beside a tower for images or sound of as many blocks."""
    base = BaseModel.from_model(random_model(tiny_config(model_type)), model_type)
    assert list(base.targets)[-1].startswith(block)


@pytest.mark.parametrize("name", ["get_input_embeddings", "get_output_embeddings"])
def test_ends_that_raise_are_one_line(name: str) -> None:
    model = tiny_model("llama")

    def fail() -> None:
        raise NotImplementedError("of another kind")

    setattr(model, name, fail)
    with pytest.raises(ExportError, match="its own code fails: NotImplementedError: of another kind"):
        BaseModel.from_model(model, "mine")


def test_server_refuses_the_same_models_as_export(tmp_path) -> None:
    save_tiny(tmp_path, "recurrent_gemma")
    done = run_cloud("serve", tmp_path)
    assert done.code == 11
    assert "recurrent_gemma does more between token ids and logits" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_model_is_accepted(family: str) -> None:
    base = BaseModel.from_model(tiny_model(family).to(torch.bfloat16), family)
    assert base.dtype == torch.bfloat16


def failing(model: PreTrainedModel, error: Exception) -> PreTrainedModel:
    """The model, whose second block raises from now on."""

    def fail(*_: object, **__: object) -> None:
        raise error

    model.model.layers[1].forward = fail
    return model


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("sizes differ\nat line 3"), "RuntimeError: sizes differ"),
        (AttributeError("no attribute 'rope'"), "AttributeError: no attribute 'rope'"),
        (ImportError(), "ImportError: ImportError"),
    ],
)
def test_a_forward_that_raises_is_one_line(error: Exception, text: str) -> None:
    with pytest.raises(ExportError) as refused:
        BaseModel.from_model(failing(tiny_model("llama"), error), "mine")
    assert str(refused.value) == f"mine (llama) cannot be run, its own code fails: {text}"


def test_a_forward_that_raises_later_is_one_line() -> None:
    """Where the server weighs micro-batches, and where the exporter takes hidden states."""
    base = BaseModel.from_model(tiny_model("llama"), "mine")
    failing(base.model, RuntimeError("too long"))
    with pytest.raises(ExportError, match=r"mine .* its own code fails: RuntimeError: too long"):
        LiveBytes.measure(base)
    with pytest.raises(ExportError, match=r"mine .* its own code fails: RuntimeError: too long"):
        real_hidden_states(base, find_embedding(base))


def test_a_model_without_targets_is_refused() -> None:
    """As one whose blocks all run twice."""
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ExportError, match=r"mine \(llama\) has no module that can be a target: .* runs 2 times"):
        BaseModel.from_model(model, "mine")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "missing.gguf"])
def test_missing_path_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_base_model(name)


def test_directory_without_model_is_an_error(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="cannot be loaded"):
        load_base_model(str(tmp_path))


def test_a_config_that_transformers_fails_on_is_one_line(tmp_path) -> None:
    """With an exception that no loader is meant to raise."""
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(ExportError, match="cannot be loaded as a causal language model with transformers"):
        load_base_model(str(tmp_path))


def test_loading_is_quiet(tmp_path, capfd) -> None:
    save_tiny(tmp_path)
    capfd.readouterr()
    load_base_model(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_public_name_has_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {
        "/srv/secret/model": "model", "/srv/secret/model/": "model", "secret/model": "model", "./model": "model",
        "secret/x.gguf": "x.gguf", "/srv/x.Q4_1.gguf": "x.Q4_1.gguf", ".": tmp_path.name,
        "org/name": "org/name", "smollm2-135m": "smollm2-135m",
    }  # fmt: skip
    assert {name: public_name(name) for name in names} == names
