"""Linear modules whose weights are held in eight or four bits, and are made anew wherever they are used.

What is held stands for bfloat16 weights, exactly: a code times a bfloat16 scale, rounded to bfloat16. So a server that
holds int8 is a server of an ordinary bfloat16 model, bit for bit, whose bundle, fingerprint and gradients are of those
weights; an export, a merge and PEFT take them as they are.

The weights are not kept for the backward pass, as autograd would keep them: it makes them once more.

int8: round(127 w / max|w|) of each row. nf4: the sixteen levels of NormalFloat4, in groups of 64 weights, and
smaller ones where a row cannot be divided so (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, appendix E).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, nn

from dlora.protocol.choices import LowBits, WeightFormat
from dlora.protocol.errors import ExportError

from .held_linear import HeldLinear, ordinary_linears

if TYPE_CHECKING:  # a worker of a tensor-parallel server has no model, and is not to load what loads them
    from transformers import PreTrainedModel

_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SLAB_VALUES: Final = 1 << 22  # of a weight that are encoded at a time: float32 copies of it are made
_GROUP: Final = 64
_LARGEST: Final = 127
_SMALLEST_SCALE: Final = 1e-30  # of a row of zeros


class LowBitWeight(NamedTuple):
    """A weight (out_features, in_features) in few bits.

    Attributes:
        codes: int8 (out_features, in_features); or uint8 (out_features, in_features / 2), two levels of NF4 each, the
            first in the lower half.
        scales: bfloat16 (out_features, groups): int8 has one for each row.
    """

    codes: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """What is held, bfloat16."""
        if self.codes.dtype == torch.int8:
            return self.codes.to(torch.bfloat16).mul_(self.scales)
        pairs = _pairs(self.codes.device).index_select(0, self.codes.flatten().int()).view(torch.bfloat16)
        return pairs.view(*self.scales.shape, -1).mul_(self.scales[..., None]).view(len(self.codes), -1)


class LowBitLinear(HeldLinear):
    """A frozen linear module that holds a ``LowBitWeight``."""

    held_codes: Tensor
    held_scales: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features), in the dtype that the model computes in."""
        return self.held.weight().to(self.computes_in)

    @property
    def held(self) -> LowBitWeight:
        """Codes and scales."""
        return LowBitWeight(self.held_codes, self.held_scales)


def hold_in_low_bits(model: PreTrainedModel, weight_format: WeightFormat) -> None:
    """Hold the weights of the linear modules, all but the LM head's, so; ``full``: as they are. The model is frozen for
    good.

    Raises ``ExportError`` where it has no such module.
    """
    if weight_format == "full":
        return
    all_held: dict[int, LowBitWeight] = {}
    for module in _linears(model):
        weight = module.weight
        if id(weight) not in all_held:
            all_held[id(weight)] = _encode(weight.detach(), weight_format)
        held = all_held[id(weight)]
        del module._parameters["weight"]
        module.__class__ = LowBitLinear
        assert isinstance(module, LowBitLinear)
        # In no state_dict: they are no weights, but what weights are made of.
        module.register_buffer("held_codes", held.codes, persistent=False)
        module.register_buffer("held_scales", held.scales, persistent=False)
        module.computes_in = weight.dtype


def round_to_low_bits(model: PreTrainedModel, weight_format: WeightFormat) -> None:
    """Give the same modules the weights that ``hold_in_low_bits`` would, as ordinary ones: in float32 where they were,
    else in bfloat16, whose range float16 has not. Raises likewise."""
    if weight_format == "full":
        return
    for weight in {id(module.weight): module.weight for module in _linears(model)}.values():
        dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
        weight.data = _encode(weight.detach(), weight_format).weight().to(dtype)


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The modules that can be held in few bits. Raises ``ExportError`` where there are none."""
    found = ordinary_linears(model)
    if not found:
        raise ExportError(
            f"no weights of this model ({model.config.model_type}) can be held in fewer bits: it has no linear modules "
            "of the ordinary kind; give --weights full"
        )
    return found


def _encode(weight: Tensor, bits: LowBits) -> LowBitWeight:
    """Of a weight (out_features, in_features); what it is in bfloat16 counts, whatever it is loaded as."""
    slabs = [_encode_rows(rows, bits) for rows in weight.split(max(1, _SLAB_VALUES // weight.shape[1]))]
    return LowBitWeight(*map(torch.cat, zip(*slabs, strict=True)))


def _encode_rows(weight: Tensor, bits: LowBits) -> LowBitWeight:
    wide = weight.to(torch.bfloat16).float()
    size = wide.shape[1] if bits == "int8" else _group_size(wide.shape[1])
    groups = wide.reshape(len(wide), -1, size)
    largest = groups.abs().amax(2)
    steps = _LARGEST if bits == "int8" else 1
    scales = (largest / steps).clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    groups = groups / scales.float()[..., None]
    if bits == "int8":
        return LowBitWeight(groups.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).view_as(wide), scales)
    levels = torch.tensor(_NF4, device=wide.device)
    codes = torch.bucketize(groups, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view_as(wide)
    return LowBitWeight(codes[:, ::2] | codes[:, 1::2] << 4, scales)


def _group_size(width: int) -> int:
    """64, or the largest power of two below it that divides a row; an odd row has none."""
    size = math.gcd(width, _GROUP)
    if size < 2:
        raise ExportError(f"nf4 holds two weights in a byte, and this model has rows of {width}; give --weights int8")
    return size


@cache
def _pairs(device: torch.device) -> Tensor:
    """int32 (256,): the two bfloat16 levels of each code."""
    levels, codes = torch.tensor(_NF4, device=device).to(torch.bfloat16), torch.arange(256, device=device)
    return torch.stack([levels[codes & 15], levels[codes >> 4]], 1).view(torch.int32).flatten()
