"""Linear modules whose weights are held otherwise than as parameters, and what a model's weights are in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .frozen_product import multiply_frozen
from .placement import parameter_of

if TYPE_CHECKING:  # a worker of a tensor-parallel server has no model, and is not to load what loads them
    from transformers import PreTrainedModel


class HeldLinear(nn.Linear):
    """A frozen linear module that holds something in place of its weight, which is made for each who reads it."""

    computes_in: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features), in the dtype that the model computes in."""
        raise NotImplementedError

    @property
    def held(self) -> Sequence[Tensor]:
        """What is held in this process; modules with one weight hold the same tensors."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``."""
        return multiply_frozen(x, self, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``FrozenWeight.multiply``."""
        return linear(x, self.weight, bias)

    def multiply_back(self, grad: Tensor) -> Tensor:
        """``FrozenWeight.multiply_back``."""
        return grad @ self.weight


class NamedWeight(NamedTuple):
    """A parameter of a model, or what would be one; ``value`` makes it."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def weights_of(model: nn.Module) -> Iterator[NamedWeight]:
    """All parameters of a model, those that are held otherwise included; a tied one once."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        yield NamedWeight(name, tuple(parameter.shape), partial(parameter_of, model.get_submodule(owner), leaf))
    seen = set[int]()
    for name, module in model.named_modules():
        if isinstance(module, HeldLinear) and id(module.held[0]) not in seen:
            seen.add(id(module.held[0]))
            shape = module.out_features, module.in_features
            yield NamedWeight(f"{name}.weight", shape, partial(getattr, module, "weight"))


def bytes_of_weights(model: nn.Module, device: torch.device | None = None) -> int:
    """What the weights take in this process as they are held, on ``device`` or on all; those on disk take nothing."""
    in_memory = (tensor for tensor in model.parameters() if not tensor.is_meta and device in (None, tensor.device))
    return sum(tensor.nbytes for tensor in in_memory) + bytes_held(model, device)


def bytes_held(model: nn.Module, device: torch.device | None = None) -> int:
    """The part of it that is held otherwise than as parameters."""
    held = {id(tensor): tensor for module in held_linears(model) for tensor in module.held}
    return sum(tensor.nbytes for tensor in held.values() if device in (None, tensor.device))


def weights_come_and_go(model: nn.Module) -> bool:
    """Whether some weights are in memory only while their module runs: those that are made, or on disk."""
    return any(True for _ in held_linears(model)) or any(parameter.is_meta for parameter in model.parameters())


def held_linears(model: nn.Module) -> Iterator[HeldLinear]:
    """The modules of a model that hold their weights otherwise."""
    return (module for module in model.modules() if isinstance(module, HeldLinear))


def ordinary_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The modules that can be made to hold their weights otherwise: of the same class, for others may do more than
    multiply; not the LM head, nor what shares its weight with something else."""
    head = model.get_output_embeddings()
    all_linear = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    others = set(model.modules()).difference(all_linear)
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return [module for module in all_linear if type(module.weight) is nn.Parameter and id(module.weight) not in shared]
