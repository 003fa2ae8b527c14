"""Float32 arithmetic with weights that stay in the precision of their files: widened where they are used, then let go.

An export computes in float32. A model that was loaded in float32 takes twice the memory of its bfloat16 files, and none
of it can go back to disk; one that stays as it is in its files is mapped, and costs a module's weights at a time. The
numbers are the same: bfloat16 and float16 widen exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_SLAB_VALUES: Final = 1 << 24  # of an LM head's weight, which alone may be as large as ten blocks: 67 MB when wide
_HALVES: Final = (torch.bfloat16, torch.float16)


def compute_in_float32(model: PreTrainedModel) -> None:
    """Let ``model`` compute as if it had been loaded in float32; its parameters keep their dtype. It is not undone, and
    such a model is not to be copied: what was changed looks at this one's weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in model.modules():
        _widen_buffers(model, module)
        narrow = tuple(name for name, each in module.named_parameters(recurse=False) if each.dtype in _HALVES)
        if not narrow:
            continue
        if module is embedding and isinstance(module, nn.Embedding):
            module.__dict__["forward"] = _of_rows(module, module.forward)
            continue
        module.__class__ = _widening(type(module), narrow)
        if module is head and class_of(module).forward is nn.Linear.forward:
            module.__dict__["forward"] = _by_slabs(module)
    model._dlora_computes_in = torch.float32  # type: ignore[assignment]


def dtype_of_computing(model: PreTrainedModel) -> torch.dtype:
    """What a model computes in: float32 after ``compute_in_float32``, else the dtype of its parameters."""
    dtype: torch.dtype = getattr(model, "_dlora_computes_in", model.dtype)
    return dtype


def weight_as_loaded(module: nn.Module) -> nn.Parameter:
    """A module's weight in the dtype of its file."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, as it was before ``compute_in_float32``."""
    found: type[nn.Module] = getattr(type(module), "_dlora_class", type(module))
    return found


@contextmanager
def widened_again() -> Iterator[None]:
    """While what a backward pass keeps of a widened weight is the weight itself, which it then widens again."""

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        whole = tensor if tensor._base is None else tensor._base
        stored = getattr(whole, "_dlora_stored", None)
        if stored is None or not stored.is_contiguous() or tensor.dtype != torch.float32:
            return partial(_unchanged, tensor, tensor._version)
        # The same part of the stored weight, an expert's say: the wide one lies as this does.
        offset = stored.storage_offset() + tensor.storage_offset()
        part: Tensor = stored.detach().as_strided(tensor.shape, tensor.stride(), offset)
        return part.float

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda unpack: unpack()):
        yield


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """As autograd looks at it where there are no hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation"
        )
    return tensor


def multiply_by_slabs(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` (…, out) in the dtype of x (…, in), of a weight (out, in) that is widened slab by slab if at all."""
    if x.dtype == weight.dtype:
        return x @ weight.T
    size = max(1, _SLAB_VALUES // weight.shape[1])
    return torch.cat([x @ slab.to(x.dtype).T for slab in weight.split(size)], dim=-1)


def _widening(kind: type[nn.Module], narrow: tuple[str, ...]) -> type[nn.Module]:
    """``kind``, whose parameters of these names are wide to everyone who reads them as attributes. As
    ``nn.utils.parametrize`` does it, but parameters keep their names."""

    def read(name: str) -> property:
        return property(lambda module: _wide(module._parameters[name]))

    members: dict[str, Any] = {name: read(name) for name in narrow}
    members |= {"_dlora_class": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), members)


def _wide(stored: Tensor) -> Tensor:
    if stored.dtype not in _HALVES:  # others stand in its place while a block is traced
        return stored
    wide = stored.detach().float().contiguous()
    wide._dlora_stored = stored  # type: ignore[attr-defined]
    return wide


def _widen_buffers(model: PreTrainedModel, module: nn.Module) -> None:
    """Those that are in no file were computed in half precision: compute them again."""
    halves = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.dtype in _HALVES}
    for name, buffer in halves.items():
        wide = buffer.float()
        wide._is_hf_initialized = name not in module._non_persistent_buffers_set  # type: ignore[attr-defined]
        module._buffers[name] = wide
    if halves.keys() & module._non_persistent_buffers_set:
        for parameter in module.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves alone what says so
        with torch.no_grad():
            model._init_weights(module)


def _of_rows(module: nn.Embedding, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``forward`` of a table, of which only the rows are widened that are asked for."""

    def look_up(ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        stored, padding = module.weight, module.padding_idx
        module.weight = nn.Parameter(stored.detach()[rows].float(), requires_grad=False)
        module.padding_idx = None  # it only says which row gets no gradient
        try:
            return forward(places.view_as(ids))
        finally:
            module.weight, module.padding_idx = stored, padding

    return look_up


def _by_slabs(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """``x W^T + bias`` in float32, of a weight that is widened slab by slab."""

    def multiply(x: Tensor) -> Tensor:
        products = multiply_by_slabs(x, weight_as_loaded(module).detach())
        return products if module.bias is None else products + module.bias.float()

    return multiply
