"""Weights held in eight or four bits: what they stand for, and that everyone computes with that."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import peft_reference as reference
import pytest
import torch
from families import VOCABULARY, tiny_model
from peft import PeftModel
from processes import cloud_process, run_edge, run_export
from serving import config, random_dataset, randomize, randomize_all, serving, training
from test_cli import assert_fails
from test_split_equals_peft import GRADIENT_TOLERANCE, LOSS_TOLERANCE, run_first_step
from tiny import TinyFactory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dlora.cloud.commands.torch_start import computes_bfloat16
from dlora.cloud.exchange.target_modules import GroupRunner, running_targets, wrap_target_modules
from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.cloud.model.held_linear import bytes_of_weights
from dlora.cloud.model.low_bits import (
    LowBitLinear,
    _encode,
    hold_in_low_bits,
    round_to_low_bits,
)
from dlora.cloud.model.widening import compute_in_float32
from dlora.edge.adapters.compatibility import check_adapter
from dlora.edge.adapters.peft import load_adapter
from dlora.export.bundle import export_bundle
from dlora.export.merge import merge_adapter
from dlora.export.settings import ExportSettings, MergeSettings
from dlora.protocol.adapter_record import load_record
from dlora.protocol.choices import LowBits
from dlora.protocol.errors import ExportError, ModelMismatchError
from dlora.protocol.manifest import load_manifest

BITS: tuple[LowBits, ...] = ("int8", "nf4")
both_bits = pytest.mark.parametrize("bits", BITS)
IDS = torch.arange(3, 15).reshape(2, 6)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    found: PreTrainedModel = model.to(dtype)  # type: ignore[arg-type]  # its decorator loses self
    return found.eval().requires_grad_(False)


def model_of(
    family: str, dtype: torch.dtype, change: Callable[[PreTrainedModel, LowBits], None], bits: LowBits
) -> PreTrainedModel:
    model = in_dtype(tiny_model(family), dtype)
    change(model, bits)
    return model


def outputs_and_gradient(model: PreTrainedModel) -> list[Tensor]:
    embeds = model.get_input_embeddings()(IDS.to(model.device)).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    (grad,) = torch.autograd.grad(hidden.float().square().sum(), embeds)
    with torch.no_grad():
        return [hidden.detach(), grad, model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state]


class FrozenTargets(GroupRunner):
    """Nothing is trained."""

    def run_group(self, group: int, x: Tensor) -> Sequence[Tensor]:
        raise AssertionError


# --- what is held ---------------------------------------------------------------------------------------------------


def test_int8_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[2], weight[3] = 0, weight[3] * 1e4
    held = _encode(weight, "int8")
    assert held.codes.dtype == torch.int8
    assert held.codes.float().abs().amax(1).tolist() == pytest.approx([127, 127, 0, 127, 127, 127], abs=1)
    # A scale in bfloat16 may be 1/256 too small, and then the largest values are cut by as much.
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((held.weight().float() - weight.float()).abs() <= 1.1 * step + weight.float().abs() / 256).all())
    assert torch.equal(held.weight()[2], torch.zeros(40, dtype=torch.bfloat16))


@pytest.mark.parametrize(("width", "groups"), [(128, 2), (96, 3), (40, 5), (6, 3)])
def test_nf4_takes_the_nearest_of_sixteen_levels_in_each_group(width: int, groups: int) -> None:
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    held = _encode(weight, "nf4")
    assert (held.codes.shape, held.scales.shape) == ((5, width // 2), (5, groups))
    found = (held.weight().view(5, groups, -1) / held.scales[..., None]).float()
    levels = found.unique()
    assert len(levels) <= 2 * 16  # two roundings of each
    distances = (weight.to(torch.bfloat16).float().view(5, groups, -1) / held.scales[..., None].float())[..., None]
    nearest = (distances - levels).abs().amin(-1)
    assert bool(((distances[..., 0] - found).abs() <= nearest + 0.01).all())


def test_nf4_needs_an_even_number_of_weights_in_a_row() -> None:
    with pytest.raises(ExportError, match="rows of 7; give --weights int8"):
        _encode(torch.zeros(2, 7), "nf4")


@both_bits
def test_a_row_or_group_of_one_size_comes_back_as_it_is(bits: LowBits) -> None:
    weight = torch.full((3, 64), 0.0078125)  # a power of two
    weight[1] *= -1
    assert torch.allclose(_encode(weight, bits).weight().float(), weight, rtol=0.01)


# --- everyone computes with the same weights ------------------------------------------------------------------------


@both_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "stablelm", "qwen3_moe"])
def test_held_weights_compute_what_ordinary_ones_do_bit_for_bit(family: str, dtype: torch.dtype, bits: LowBits) -> None:
    held = model_of(family, dtype, hold_in_low_bits, bits)
    rounded = model_of(family, dtype, round_to_low_bits, bits)
    for found, wanted in zip(outputs_and_gradient(held), outputs_and_gradient(rounded), strict=True):
        assert torch.equal(found, wanted)
    assert any(isinstance(module, LowBitLinear) for module in held.modules())
    full = outputs_and_gradient(in_dtype(tiny_model(family), dtype))
    assert not torch.equal(outputs_and_gradient(held)[0], full[0])


@both_bits
def test_fingerprint_is_of_the_weights_that_are_stood_for(bits: LowBits) -> None:
    names = ("held", torch.float32), ("held", torch.bfloat16), ("rounded", torch.float32), ("rounded", torch.bfloat16)
    found = {}
    for name, dtype in names:
        model = model_of("llama", dtype, hold_in_low_bits if name == "held" else round_to_low_bits, bits)
        if name == "rounded":
            compute_in_float32(model)
        base = BaseModel.from_model(model, "tiny", bits)
        found[name, dtype] = base.fingerprint, base.parameters, sorted(base.targets)
    assert len({str(each) for each in found.values()}) == 1
    plain = BaseModel.from_model(tiny_model("llama"), "tiny")
    fingerprint, parameters, targets = found["held", torch.float32]
    assert (parameters, targets) == (plain.parameters, sorted(plain.targets))
    assert fingerprint != plain.fingerprint


@both_bits
@pytest.mark.parametrize("has_graded_rows", [False, True])
def test_weights_are_not_kept_for_the_backward_pass(
    has_graded_rows: bool, bits: LowBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseModel.from_model(model_of("llama", torch.float32, hold_in_low_bits, bits), "tiny", bits)
    made: list[weakref.ref[Tensor]] = []
    original = LowBitLinear.weight.fget
    assert original is not None

    def made_weight(module: LowBitLinear) -> Tensor:
        weight = original(module)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(LowBitLinear, "weight", property(made_weight))
    wrap_target_modules(base)
    graded = torch.arange(3) if has_graded_rows else None
    embeds = base.token_embedding(IDS).detach().requires_grad_()
    with running_targets(FrozenTargets(base, (), (), graded=graded)):
        hidden = base.last_hidden_state(embeds)
        assert len(made) == len(base.targets)
        assert not any(weight() is not None for weight in made)
        hidden.sum().backward()
    assert len(made) > len(base.targets)


def test_bytes_of_weights_are_those_that_are_held() -> None:
    changes = {"hidden_size": 128, "intermediate_size": 256}
    full = bytes_of_weights(in_dtype(tiny_model("llama", **changes), torch.bfloat16))
    found = {}
    for bits in BITS:
        model = in_dtype(tiny_model("llama", **changes), torch.bfloat16)
        linear = sum(2 * module.weight.numel() for module in model.base_model.modules() if type(module) is nn.Linear)
        rows = sum(module.out_features for module in model.base_model.modules() if type(module) is nn.Linear)
        hold_in_low_bits(model, bits)
        found[bits] = bytes_of_weights(model)
        scales = {"int8": 2 * rows, "nf4": linear // 64}[bits]
        assert found[bits] == full - linear + linear // {"int8": 2, "nf4": 4}[bits] + scales
    assert found["nf4"] < found["int8"] < full


@both_bits
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_split_equals_peft_on_the_same_weights(family: str, bits: LowBits, tiny: TinyFactory) -> None:
    bundle = tiny(family, head_dtype="fp32", weight_format=bits).bundle
    dataset, run = random_dataset(VOCABULARY), config(grad_accum=2, target_modules=("all-linear",))
    base = tiny(family, weight_format=bits).base
    with serving(base) as server, training(bundle, server.url, run, dataset) as trainer:
        randomize(trainer)
        batches, split_loss = run_first_step(trainer)
    rounded = tiny_model(family)
    round_to_low_bits(rounded, bits)
    model = reference.with_adapters(rounded, trainer.adapters, run.adapter.rank, run.adapter.alpha)
    loss = reference.loss_of(model, batches)
    loss.backward()
    assert split_loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(model, name).grad
        error = torch.linalg.norm(torch.from_numpy(parameter.grad) - wanted) / torch.linalg.norm(wanted)
        assert float(error) < GRADIENT_TOLERANCE, name
    full = reference.with_adapters(tiny_model(family), trainer.adapters, run.adapter.rank, run.adapter.alpha)
    assert abs(reference.loss_of(full, batches).item() / split_loss - 1) > 3 * LOSS_TOLERANCE


def test_device_blocks_are_of_the_same_weights(tiny: TinyFactory, tmp_path: Path) -> None:
    settings = ExportSettings(
        str(tiny().model), tmp_path / "bundle", head_dtype="fp32", device_blocks="all", block_dtype="fp32",
        weight_format="int8",
    )  # fmt: skip
    manifest = export_bundle(settings)
    assert manifest.base_model.weight_format == "int8"
    assert manifest.base_model.fingerprint == tiny(weight_format="int8").base.fingerprint
    rounded = model_of("llama", torch.float32, round_to_low_bits, "int8")
    for name, weight in rounded.base_model.layers.named_parameters():
        file = tmp_path / "bundle" / "blocks" / f"{name.replace('.', '/', 1)}.npy"
        assert np.array_equal(np.load(file), weight.numpy()), name


def test_merge_takes_the_weights_that_the_adapter_was_trained_for(tiny: TinyFactory, tmp_path: Path) -> None:
    held = tiny(weight_format="int8")
    with (
        serving(held.base) as server,
        training(held.bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer,
    ):
        randomize_all(trainer)
        trainer.save_adapter(tmp_path / "adapter")
    record = load_record(tmp_path / "adapter")
    assert record is not None
    assert record.base_weight_format == "int8"
    assert "| its linear weights | int8 |" in (tmp_path / "adapter" / "README.md").read_text()
    result = merge_adapter(MergeSettings(str(tiny().model), tmp_path / "adapter", tmp_path / "merged"))
    assert result.fingerprint == held.base.fingerprint
    rounded = tiny_model("llama")
    round_to_low_bits(rounded, "int8")
    theirs = PeftModel.from_pretrained(rounded, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelMismatchError, match="dlora-export MODEL --weights int8, and serve it with"):
        check_adapter(load_manifest(tiny().bundle), load_adapter(tmp_path / "adapter"))


# --- the commands ---------------------------------------------------------------------------------------------------


def test_commands_train_on_int8_and_name_both_commands_where_it_differs(tiny: TinyFactory, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{n} w7 w{n + 1} w8"}) + "\n" for n in range(5, 29)))
    bundle = tmp_path / "bundle"
    done = run_export(tiny().model, "--out", bundle, "--weights", "int8", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["weight_format"] == "int8"
    words = ("train", "--data", data, "--steps", 3, "--bundle")
    with cloud_process(tiny().model, tmp_path / "int8", "--weights", "int8") as cloud:
        done = run_edge(*words, bundle, "--out", tmp_path / "run", "--server", cloud.url)
        assert done.code == 0, done.stderr
        done = run_edge(*words, tiny().bundle, "--out", tmp_path / "other", "--server", cloud.url)
        commands = "dlora-cloud serve MODEL --weights full", "dlora-export MODEL --weights int8"
        assert_fails(done, ModelMismatchError.exit_code, *commands)
        assert (cloud.hello["weight_format"], cloud.hello["base_fingerprint"]) == (
            "int8",
            load_manifest(bundle).base_model.fingerprint,
        )
    assert "int8 weights take" in (tmp_path / "int8" / "log").read_text()
    record = load_record(tmp_path / "run")
    assert record is not None
    assert record.base_weight_format == "int8"


def test_bfloat16_is_taken_where_the_processor_has_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for flags, expected in (("fma avx2", False), ("avx512_bf16 avx2", True), ("amx_bf16", True), ("asimd bf16", True)):
        cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags} x\n")
        assert computes_bfloat16("cpu", cpuinfo) is expected
    assert not computes_bfloat16("cpu", tmp_path / "none")


# --- what cannot be -------------------------------------------------------------------------------------------------


@both_bits
def test_a_model_without_ordinary_linear_modules_is_refused(bits: LowBits, tiny: TinyFactory) -> None:
    with pytest.raises(ExportError, match="no linear modules of the ordinary kind; give --weights full"):
        load_base_model(str(tiny("gpt2").model), weight_format=bits)


class DynamicLinear(nn.Linear):
    """int8 *dynamic*, as torchao and others compute it: what it is given is rounded to int8, too."""

    def forward(self, x: Tensor) -> Tensor:
        codes = cast("Tensor", self._buffers["codes"])
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        rounded = (x / step).round().to(torch.int8)
        product = torch._int_mm(rounded.reshape(-1, rounded.shape[-1]), codes.T.contiguous())
        return product.view(*x.shape[:-1], -1) * step * cast("Tensor", self._buffers["scales"]).T


class StraightDynamicLinear(DynamicLinear):
    """The same; the gradient is there, and is that of what is rounded: zero."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / step).round() * step, self.weight.float())


@pytest.mark.parametrize("kind", [DynamicLinear, StraightDynamicLinear])
def test_weights_that_pass_no_gradients_are_refused(kind: type[DynamicLinear]) -> None:
    model = tiny_model("llama", hidden_size=32, intermediate_size=64)
    for module in model.base_model.layers[1].mlp.modules():
        if type(module) is nn.Linear:
            held = _encode(module.weight.detach(), "int8")
            module.__class__ = kind
            module.register_buffer("codes", held.codes, persistent=False)
            module.register_buffer("scales", held.scales.float(), persistent=False)
            module.weight = nn.Parameter(held.codes, requires_grad=False)
    with pytest.raises(ExportError, match=r"gradients do not pass its module model\.layers\.1\.mlp.* \(int8 dynamic\)"):
        BaseModel.from_model(model, "tiny")
