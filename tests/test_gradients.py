"""Models that are no causal ones are refused; what gradients say of the others is right."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, random_model, tiny_model
from tiny import TinyFactory
from torch import Tensor
from type_configs import tiny_config

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.gradients import LARGEST_SHARE, trace_gradients
from dlora.cloud.model.layout import can_pack
from dlora.protocol.errors import ExportError


@pytest.mark.parametrize(
    ("model_type", "setting", "advice"),
    [
        ("bert-generation", "is_decoder", "its config.json must say is_decoder: true"),
        ("xlm", "causal", "its config.json must say causal: true"),
        ("xlnet", None, "its architecture is not supported"),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(model_type: str, setting: str | None, advice: str) -> None:
    with pytest.raises(ExportError, match=f"mine .* is no causal language model: .* later tokens; .*{advice}"):
        BaseModel.from_model(random_model(tiny_config(model_type)), "mine")
    if setting is not None:
        base = BaseModel.from_model(random_model(tiny_config(model_type, **{setting: True})), "mine")
        assert trace_gradients(base).later_share == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_model_has_no_gradient_on_later_tokens(family: str, tiny: TinyFactory) -> None:
    """Exactly: that is why the bound can be so low."""
    gradients = trace_gradients(tiny(family).base)
    assert gradients.later_share == 0
    assert gradients.without == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_leak_is_found(dtype: torch.dtype) -> None:
    """Hidden states with a hundredth of the mean over all tokens, as a mask that was forgotten in one head may do."""
    model = tiny_model("llama").to(dtype)

    def leak(_module: object, _args: object, output: Tensor) -> Tensor:
        return output + output.mean(1, keepdim=True) / 100

    model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(ExportError, match="no causal language model"):
        BaseModel.from_model(model, "mine")


def test_gradients_that_are_no_numbers_refuse_nothing() -> None:
    """In half precision they may overflow, and that says nothing of later tokens."""
    model = tiny_model("llama")

    def overflow(_module: object, _args: object, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))
        return output

    model.model.layers[0].mlp.register_forward_hook(overflow)
    share = trace_gradients(BaseModel.from_model(model, "mine")).later_share
    assert not share <= LARGEST_SHARE


def test_modules_that_only_choose_cannot_be_targets() -> None:
    """DeepSeek's indexers choose what attention looks at; a server that waited for their gradients would fail."""
    base = BaseModel.from_model(tiny_model("axk2"), "mine")
    name = "model.layers.1.self_attn.indexer.wk"
    assert not any("indexer" in target for target in base.targets)
    assert [target.order for target in base.targets.values()] == list(range(len(base.targets)))
    with pytest.raises(ExportError, match=rf"{name} cannot be a target module of mine: it gets no gradient"):
        base.groups([name])


def test_sequences_are_not_packed_where_attention_chooses_its_tokens() -> None:
    """It would choose among those of other sequences: gradients were off by a third, in rows longer than ten tokens."""
    assert not can_pack(BaseModel.from_model(random_model(tiny_config("glm_moe_dsa")), "mine"))
