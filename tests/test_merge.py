"""``dlora-export merge``: a base model with an adapter in its weights is what PEFT computes with both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from answers import INVOCATION, random_answers
from families import VOCABULARY, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_export
from serving import config, random_dataset, randomize_all, serving, training
from test_adapter_store import damage
from test_cli import assert_fails
from tiny import TinyFactory
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.fingerprint import fingerprint
from dlora.export.merge import _forget_quantisation, merge_adapter
from dlora.export.settings import MERGED_NAME, MergeSettings
from dlora.protocol.adapter_record import RECORD_NAME, WEIGHTS_NAME
from dlora.protocol.errors import CheckpointError, ExportError, ModelMismatchError, UsageError

IDS = torch.arange(3, 15).reshape(2, 6)

Train = Callable[..., Path]


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(IDS).logits
    return found


def saved_adapter(tiny: TinyFactory, family: str, directory: Path, **changes: Any) -> Path:
    """An adapter that a trainer has saved, of weights that are not zero."""
    dataset = random_answers() if "invocation" in changes else random_dataset(VOCABULARY)
    with (
        serving(tiny(family).base) as server,
        training(tiny(family).bundle, server.url, config(basis_steps=2, **changes), dataset) as trainer,
    ):
        randomize_all(trainer)
        trainer.save_adapter(directory)
    return directory


@pytest.fixture(scope="module")
def lora(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny llama."""
    return saved_adapter(tiny, "llama", tmp_path_factory.mktemp("merge") / "lora")


@pytest.mark.parametrize("kind", ["lora", "ffa", "bottleneck"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_computes_what_peft_does(tiny: TinyFactory, family: str, kind: str, tmp_path: Path) -> None:
    """Of every kind; GPT-2 has ``Conv1D``, whose weights are turned over, and a head that is tied."""
    adapter = saved_adapter(tiny, family, tmp_path / "adapter", kind=kind)
    result = merge_adapter(MergeSettings(str(tiny(family).model), adapter, tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = logits(PeftModel.from_pretrained(tiny_model(family), adapter))
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, logits(tiny_model(family)), atol=1e-2)
    assert result.is_checked
    assert result.fingerprint == tiny(family).base.fingerprint != fingerprint(merged)
    assert not hasattr(merged, "peft_config")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny(family).model).chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_files(tiny: TinyFactory, lora: Path, dtype: str, tmp_path: Path) -> None:
    merge_adapter(MergeSettings(str(tiny().model), lora, tmp_path / "merged", dtype))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = logits(PeftModel.from_pretrained(tiny_model("llama"), lora))
    assert merged.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(merged), theirs, rtol=0.1, atol=0.1)


def test_command_merges_says_what_and_replaces_only_its_own(tiny: TinyFactory, lora: Path, tmp_path: Path) -> None:
    words = ("merge", tiny().model, "--adapter", lora, "--out", tmp_path / "merged")
    done = run_export(*words, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["modules"], result["dtype"]) == (str(tmp_path / "merged"), 4, "float32")
    assert (result["fingerprint"], result["is_checked"]) == (tiny().base.fingerprint, True)
    about = json.loads((tmp_path / "merged" / MERGED_NAME).read_text())
    assert about["base_fingerprint"] == tiny().base.fingerprint
    assert set(result["bytes"]) == {path.name for path in (tmp_path / "merged").iterdir()}
    (tmp_path / "usual").write_text("")  # as the umask lets
    assert {path.stat().st_mode for path in (tmp_path / "merged").iterdir()} == {(tmp_path / "usual").stat().st_mode}
    assert_fails(run_export(*words), UsageError.exit_code, "is already a merged model", "--force")
    again = run_export(*words, "--force")
    assert (again.code, "4 modules merged" in again.stdout) == (0, True), again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    done = run_export(*words[:-1], tmp_path / "mine", "--force")
    assert_fails(done, UsageError.exit_code, "is not empty and not a merged model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "mine", "usual"]


def test_quantised_models_are_refused_but_for_floats_of_a_gguf_file(tiny: TinyFactory) -> None:
    base = BaseModel.from_model(tiny_model("llama"), "tiny")
    forgotten = []
    base.model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method="gguf"), remove_quantization_config=forgotten.append
    )
    _forget_quantisation(base)
    assert forgotten == [base.model]
    base.model.hf_quantizer.quantization_config.quant_method = "bitsandbytes"
    with pytest.raises(ExportError, match="is quantised"):
        _forget_quantisation(base)


def test_export_is_as_it_was_beside_merge(tmp_path: Path) -> None:
    """A model may even be called merge; it is then named with its place."""
    done = run_export("--out", tmp_path / "out", tmp_path / "merge")
    assert_fails(done, UsageError.exit_code, "merge does not exist")
    done = run_export("./merge", "--out", tmp_path / "out")
    assert_fails(done, UsageError.exit_code, "merge does not exist")
    assert "dlora-export merge" in run_export("merge").stderr
    assert_fails(run_export(), UsageError.exit_code, "MODEL is missing", "dlora-export --help")


def test_activated_adapters_are_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny, "llama", tmp_path / "adapter", kind="bottleneck", invocation=INVOCATION)
    done = run_export("merge", tiny().model, "--adapter", adapter, "--out", tmp_path / "out")
    assert_fails(done, CheckpointError.exit_code, "activated LoRA", "--active-from start")
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base_model_is_refused(tiny: TinyFactory, lora: Path, tmp_path: Path) -> None:
    """The same shapes and other weights: nothing but the fingerprint tells."""
    settings = MergeSettings(str(tiny(seed=1).model), lora, tmp_path / "out")
    with pytest.raises(ModelMismatchError, match="has other weights"):
        merge_adapter(settings)
    assert list(tmp_path.iterdir()) == []


def edited(source: Path, target: Path, **changes: object) -> Path:
    """A copy of an adapter with other settings of PEFT's."""
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_damaged_or_strange_adapters_are_one_line(tiny: TinyFactory, lora: Path, tmp_path: Path) -> None:
    def fails(adapter: Path, text: str, family: str = "llama") -> None:
        with pytest.raises(CheckpointError, match=text) as caught:
            merge_adapter(MergeSettings(str(tiny(family).model), adapter, tmp_path / "out"))
        assert "\n" not in str(caught.value)

    changed = edited(lora, tmp_path / "changed")
    damage(changed / WEIGHTS_NAME)
    fails(changed, "has not the SHA-256")
    fails(tmp_path / "nowhere", "no such directory")
    nameless = edited(lora, tmp_path / "nameless")
    (nameless / RECORD_NAME).unlink()
    fails(nameless, "give the model that it was trained on", family="gpt2")
    config_file = nameless / "adapter_config.json"
    names = json.loads(config_file.read_text())["target_modules"]
    cut = edited(nameless, tmp_path / "cut", target_modules=names[:1])
    fails(cut, "only the adapter has")
    (cut / WEIGHTS_NAME).rename(cut / "adapter_model.bin")
    fails(cut, "never loaded")
    (cut / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    fails(cut, "only LORA is merged")


def test_values_beyond_half_precision_are_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(1000.0)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ExportError, match=r"float16 cannot hold.*--dtype bfloat16"):
        merge_adapter(MergeSettings(str(tiny().model), tmp_path / "adapter", tmp_path / "out", "float16"))
    result = merge_adapter(MergeSettings(str(tiny().model), tmp_path / "adapter", tmp_path / "out", "bfloat16"))
    assert not result.is_checked


def test_adapter_with_patterns_merges_to_the_same_bits(tiny: TinyFactory, tmp_path: Path) -> None:
    """Where PEFT's configuration has patterns of modules, PEFT is given their names; what comes out is what its own
    loading gives, however the modules are named."""
    torch.manual_seed(1)
    options = {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 2}, "alpha_pattern": {r".*\.0\..*v_proj": 5}}
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    get_peft_model(tiny_model("llama"), settings).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").merge_and_unload().state_dict()
    for at, changes in enumerate(
        (
            {},
            {"target_modules": r".*\.(q|v)_proj"},
            {"target_modules": r"(([a-z0-9_.])+)+!|.*(q|v)_proj"},  # ages for ``re``
            {"exclude_modules": "(([a-z0-9_.])+)+!"},
            {"layers_to_transform": [0, 1], "layers_pattern": "(([a-z0-9_.])+)+!|layers"},
        )
    ):
        adapter = edited(tmp_path / "adapter", tmp_path / f"{at}", **changes)
        result = merge_adapter(MergeSettings(str(tiny().model), adapter, tmp_path / f"merged{at}"))
        assert result.modules == 4
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{at}").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"(?x:(a|aa) +b)": 2}}, {"alpha_pattern": {"(([a-z0-9_.])+)+!": 2}},
        {"modules_to_save": ["(([a-z0-9_.])+)+!"]}, {"modules_to_save": "(([a-z0-9_.])+)+!"},
    ],
)  # fmt: skip
def test_adapter_that_is_a_program_for_re_is_not_merged(
    tiny: TinyFactory, lora: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    adapter = edited(lora, tmp_path / "adapter", **changes)
    with pytest.raises(CheckpointError, match="name the modules instead"):
        merge_adapter(MergeSettings(str(tiny().model), adapter, tmp_path / "merged"))
