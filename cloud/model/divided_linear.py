"""Linear modules whose weights are divided among the processes of a tensor-parallel server, by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlora.protocol.errors import ExportError

from .held_linear import HeldLinear, ordinary_linears
from .low_bits import LowBitLinear
from .worker import Rows
from .workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DividedLinear(HeldLinear):
    """A frozen linear module with the first rows of its weight here, and the others in workers."""

    held_values: Tensor
    held_scales: Tensor | None
    _workers: Workers
    _number: int
    _widths: Sequence[int]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features): all of it crosses."""
        return self._workers.show(self._number, self._widths, self._rows)

    @property
    def held(self) -> Sequence[Tensor]:
        """The rows, or codes and scales of them."""
        return [self.held_values] if self.held_scales is None else [self.held_values, self.held_scales]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``FrozenWeight.multiply``."""
        if not x.numel():  # an expert that gets no token
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._workers.multiply(self._number, x, self._widths, self._rows)

    def multiply_back(self, grad: Tensor) -> Tensor:
        """``FrozenWeight.multiply_back``."""
        if not grad.numel():
            return grad.new_empty(*grad.shape[:-1], self.in_features)
        return self._workers.multiply_back(self._number, grad, self._widths, self.in_features, self._rows)

    @property
    def _rows(self) -> Rows:
        """Those that are here."""
        bias = None if self.bias is None else self.bias[: len(self.held_values)]
        return Rows(self.held, bias, self.computes_in)


def divide(model: PreTrainedModel, workers: Workers) -> None:
    """Divide the weights of the linear modules, all but the LM head's, on the processor as loaded; the model is frozen
    for good.

    Raises ``ExportError`` where it has no such module, ``WorkerLostError``.
    """
    modules = [*ordinary_linears(model), *(each for each in model.modules() if isinstance(each, LowBitLinear))]
    if not modules:
        raise ExportError(
            f"this model ({model.config.model_type}) cannot be divided: it has no linear modules of the ordinary kind; "
            "serve it without --tensor-parallel"
        )
    numbers: dict[tuple[int, int], tuple[int, list[Tensor], list[int]]] = {}
    for module in modules:
        if isinstance(module, LowBitLinear):
            whole, dtype = list(module.held), module.computes_in
        else:
            whole, dtype = [module.weight], module.weight.dtype
        key = id(whole[0]), id(module.bias)
        if key not in numbers:
            numbers[key] = _divide([each.detach() for each in whole], module.bias, dtype, workers)
        number, own, widths = numbers[key]
        for name in ("weight", "held_codes", "held_scales"):
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        module.__class__ = DividedLinear
        assert isinstance(module, DividedLinear)
        module.register_buffer("held_values", own[0], persistent=False)
        module.register_buffer("held_scales", own[1] if len(own) > 1 else None, persistent=False)
        module.computes_in = dtype
        module._workers, module._number, module._widths = workers, number, widths


def _divide(
    whole: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype, workers: Workers
) -> tuple[int, list[Tensor], list[int]]:
    """The number of a weight, what stays here of it, and how many rows each worker has."""
    parts = [each.tensor_split(workers.processes) for each in whole]
    own, *others = zip(*parts, strict=True)
    biases = [None] * len(others) if bias is None else bias.detach().tensor_split(workers.processes)[1:]
    number = workers.hold(others, list(biases), dtype)
    # Copies: a part keeps all of what it is a part of.
    return number, [each.clone() for each in own], [len(each[0]) for each in others]
