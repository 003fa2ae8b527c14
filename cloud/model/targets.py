"""Which linear modules of the blocks can be targets: the decoder is run once, and what each is given is watched."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .held_linear import HeldLinear
from .placement import device_of, parameter_of
from .widening import dtype_of_computing

TRACE_TOKENS = 4


@dataclass(frozen=True)
class TargetModule:
    """A linear module of a block, which an adapter may stand beside.

    Attributes:
        name: its path in the causal language model, as PEFT spells it (``model.layers.3.self_attn.q_proj``).
        block: the block it belongs to.
        order: its place in the order of execution.
        input_id: modules of the same number receive the same tensor.
        sees_sequences: whether it is given (batch, length, width) as such, and not flattened or turned over, as PEFT's
            activated LoRA must have it to know where a sequence begins.
        module: ``nn.Linear``, or ``Conv1D`` whose weight is (in_features, out_features).
    """

    name: str
    block: int
    order: int
    input_id: int
    in_features: int
    out_features: int
    sees_sequences: bool
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a view."""
        weight = parameter_of(self.module)
        return weight.T if isinstance(self.module, Conv1D) else weight

    def multiply_back(self, grad: Tensor) -> Tensor:
        """The gradient of the module's input, (…, in_features), of its output's, (…, out_features)."""
        return self.module.multiply_back(grad) if isinstance(self.module, HeldLinear) else grad @ self.weight

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return device_of(self.module)


def widths_of(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """in_features and out_features."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def find_targets(
    model: PreTrainedModel, decoder: nn.Module, block_list: list[tuple[str, nn.Module]], width: int
) -> tuple[dict[str, TargetModule], dict[str, str]]:
    """Run the decoder once: its modules that can be targets, by name, in execution order, and why others cannot.

    Args:
        block_list: the blocks with their paths; width: of what goes into the first.
    """
    linears = {
        f"{path}.{name}": (block, module)
        for block, (path, root) in enumerate(block_list)
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    # Name, input and output of every call. Inputs are kept, so that no two of them share an ``id``.
    calls: list[tuple[str, Tensor, Any]] = []

    def record(name: str) -> Any:
        return lambda _module, args, kwargs, output: calls.append((name, args[0] if args else kwargs["input"], output))

    with torch.no_grad(), ExitStack() as hooks:
        for name, (_, module) in linears.items():
            hooks.enter_context(module.register_forward_hook(record(name), with_kwargs=True))
        embeds = torch.ones(1, TRACE_TOKENS, width, dtype=dtype_of_computing(model), device=model.device)
        decoder(inputs_embeds=embeds, use_cache=False)
    times = dict.fromkeys(linears, 0)
    for name, _, _ in calls:
        times[name] += 1
    refused = {
        name: f"runs {count} times in a forward pass (as blocks in a loop do, and experts of a mixture), not once"
        if count
        else "is never called in a forward pass"
        for name, count in times.items()
        if count != 1
    }
    refused |= {
        f"{path}.{name}": "holds the weights of many experts in one tensor"
        for path, root in block_list
        for name, module in root.named_modules()
        if "expert" in name and any(weight.ndim == 3 for weight in module.parameters(recurse=False))
    }
    input_ids: dict[tuple[int, int], int] = {}
    targets: dict[str, TargetModule] = {}
    for name, tensor, output in calls:
        if name in refused:
            continue
        block, module = linears[name]
        in_features, out_features = widths_of(module)
        if tensor.shape[:-1].numel() != TRACE_TOKENS:
            # A router that sends only some tokens through an expert calls it once, but not with all of them.
            refused[name] = "does not see every token (as experts of a mixture do)"
            continue
        if not isinstance(output, Tensor):
            refused[name] = "gives more than its product (as routers of a mixture may)"
            continue
        input_id = input_ids.setdefault((block, id(tensor)), len(input_ids))
        # (batch, length, width), of which (batch * length, width) is a view.
        is_of_sequences = tensor.ndim == 3 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
        targets[name] = TargetModule(
            name, block, len(targets), input_id, in_features, out_features, is_of_sequences, module
        )
    return targets, refused
