"""Weights of four bits: what is stored is what was meant, and as near to the weight as four bits come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_bundles import stored_as
from torch import nn

from dlora.export.tracing.int4 import group_size, quantise_groups, widen_int4, widened
from dlora.export.tracing.modules import stored_weights, weight_shape


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("columns", "size"), [(64, 32), (48, 16)])
def test_widened_is_what_the_bytes_say(columns: int, size: int) -> None:
    assert group_size(columns) == size
    weight = random_weight(7, columns)
    weight[3] = 0.0
    packed, scales = quantise_groups(weight, size)
    assert packed.shape == (7, columns // size, size // 2)
    assert (packed.dtype, scales.dtype) == (torch.int8, torch.float16)
    read = stored_as({"a.weight": packed.numpy(), "a.weight.group_scales": scales.numpy()}, "a")
    assert torch.equal(read, widened(packed, scales))
    assert torch.equal(read, widen_int4(packed, scales))
    assert not read[3].any()


def test_every_byte_is_two_values() -> None:
    packed = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(8, 1, 32)
    found = widened(packed, torch.ones(8, 1, 1).half()).reshape(8, 2, 32).transpose(1, 2).reshape(-1, 2)
    assert found.tolist() == [[first - 8.0, second] for second in range(-8, 8) for first in range(16)]


def test_error_is_less_than_with_the_scale_of_the_largest_value() -> None:
    """Which is what a range of -7 to 7 wants at least."""
    weight = random_weight(64, 256)
    groups = weight.reshape(64, 8, 32)
    scales = groups.abs().amax(2, keepdim=True) / 7
    usual = (torch.round(groups / scales) * scales - groups).square().mean()
    found = (widened(*quantise_groups(weight, 32)) - weight).square().mean()
    assert found < 0.85 * usual
    assert found.sqrt() < 0.1


def test_weight_with_rows_of_no_groups_is_stored_as_int8() -> None:
    block = nn.ModuleDict({"even": nn.Linear(32, 5), "odd": nn.Linear(24, 5)})
    weights = stored_weights(block, "int4")
    assert {name for name in weights if name.endswith("scales")} == {
        "even.weight.group_scales", "odd.weight.row_scales"
    }  # fmt: skip
    assert weight_shape(weights, "even") == (5, 32)
    assert weight_shape(weights, "odd") == (5, 24)
    stored = {name: tensor.numpy() for name, tensor in weights.items()}
    for name, module in block.items():
        assert np.abs(stored_as(stored, name).numpy() - module.weight.detach().numpy()).max() < 0.04
