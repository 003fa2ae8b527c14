"""The same passes in one process, by torch's hooks: what a server and a device must compute together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_reference import loss_of
from torch import Tensor

from dlora.edge.data.batches import MicroBatch
from dlora.protocol.passes import Passes


class PassOracle:
    """A model with LoRAs that PEFT made, used in passes, of one micro-batch.

    Each module's delta is what its adapter makes of what the module was given in the pass before, where adapters act.

    ``at_server``: modules whose adapters act in every pass, on what they are given in it.
    """

    def __init__(self, model: PeftModel, batch: MicroBatch, passes: Passes, at_server: Collection[str] = ()) -> None:
        self._model = model
        self._batch = batch
        self._passes = passes
        layers = {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
        self._given = {name: each for name, each in layers.items() if name.endswith(tuple(at_server))}
        self._layers = {name: each for name, each in layers.items() if name not in self._given}
        lengths = batch.sequence_lengths.tolist()
        rows = range(len(batch.ids)) if batch.crossing_positions is None else batch.crossing_positions.tolist()
        acting, start = torch.zeros(len(lengths), max(lengths)), 0
        for text, length in enumerate(lengths):
            for row in range(length):
                acting[text, row] = start + row in set(rows)
            start += length
        self._acting = acting

    def run(self) -> Tensor:
        """The loss; gradients of the adapters are added to their parameters."""
        layers, passes = self._layers, self._passes
        with torch.no_grad():
            _, reads = self._forward({})
        for number in range(passes.forward):
            last = number == passes.forward - 1
            read = {name: each.detach() for name, each in reads.items()}
            deltas = {name: self._delta(layers[name], read[name]).detach().requires_grad_(last) for name in layers}
            with torch.set_grad_enabled(last):
                loss, reads = self._forward(deltas)
        leaves = list(deltas.values())
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=False)
        for _ in range(passes.backward - 1):
            total = loss
            for name, grad in zip(deltas, grads, strict=True):
                if reads[name].requires_grad:
                    acting = self._acting.view(*reads[name].shape[:-1], 1)
                    total = total + (self._input_grad(layers[name], grad).detach() * acting * reads[name]).sum()
            grads = torch.autograd.grad(total, leaves, retain_graph=True)
        with torch.enable_grad():
            for name, grad in zip(deltas, grads, strict=True):
                self._delta(layers[name], read[name]).backward(grad)
        return loss.detach()

    def _forward(self, deltas: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what each module is given."""
        reads: dict[str, Tensor] = {}
        with ExitStack() as hooks, self._model.disable_adapter():
            for layer in self._given.values():

                def add_delta(_: object, given: Sequence[Tensor], output: Tensor, layer: LoraLayer = layer) -> Tensor:
                    acting = self._acting.view(*given[0].shape[:-1], 1)
                    return output + (self._delta(layer, given[0]) * acting).view(output.shape)

                hooks.enter_context(layer.register_forward_hook(add_delta))
            for name, layer in self._layers.items():

                def add(_: object, given: Sequence[Tensor], output: Tensor, name: str = name) -> Tensor:
                    reads[name] = given[0]
                    if name not in deltas:
                        return output
                    return output + (deltas[name] * self._acting.view(*given[0].shape[:-1], 1)).view(output.shape)

                hooks.enter_context(layer.register_forward_hook(add))
            loss = loss_of(self._model, [self._batch])
        return loss, reads

    def _delta(self, layer: LoraLayer, x: Tensor) -> Tensor:
        return layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]

    def _input_grad(self, layer: LoraLayer, grad: Tensor) -> Tensor:
        grad = grad * layer.scaling["default"]
        return grad @ layer.lora_B["default"].weight @ layer.lora_A["default"].weight
