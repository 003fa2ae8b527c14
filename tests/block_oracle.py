"""What the last blocks of a model compute with LoRA beside their linear modules: transformers, PEFT and autograd.

Nothing here is the exporter's, but for the names of blocks and modules, which a bundle gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.device_lora import DeviceLora
from dlora.protocol.manifest import BlockSpec, GraphSpec

Arrays = dict[str, Any]


@dataclass
class Passes:
    """One forward and backward pass of all sequences, which lie one after the other.

    Attributes:
        x, y, grad_x, grad_y: of each block, by its path, (tokens, width).
        last: the last hidden states (tokens, hidden_size).
        grads: of ``lora_A`` and ``lora_B`` by full name.
    """

    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)
    grad_x: dict[str, Tensor] = field(default_factory=dict)
    grad_y: dict[str, Tensor] = field(default_factory=dict)
    last: Tensor = field(default_factory=lambda: torch.empty(0))
    grads: dict[str, Tensor] = field(default_factory=dict)


def random_lora(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Values of ``parameter_shapes``, all far from zero's effect."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape, np.float32) * np.float32(0.2 if name.endswith("B") else shape[1] ** -0.5))
        for name, shape in shapes.items()
    }


def device_lora(lora: Mapping[str, np.ndarray], rank: int, scaling: float) -> DeviceLora:
    """As blocks take it that never train it."""
    scale = np.float32(scaling)
    return DeviceLora({name: value * scale if name.endswith("B") else value for name, value in lora.items()}, rank)


class TorchBlocks:
    """A model that PEFT has given LoRA, and the blocks whose passes are kept.

    Args:
        lora: by full name, as a device has them; others of its parameters are frozen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: Sequence[str],
        lora: Mapping[str, np.ndarray],
        scaling: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        names = sorted({name.rpartition(".")[0] for name in lora})
        rank = next(len(value) for name, value in lora.items() if name.endswith("lora_A"))
        self._paths = paths
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=names, task_type="CAUSAL_LM")
        self.peft = get_peft_model(model, config).to(dtype).eval()
        self._model: Any = self.peft.base_model.model
        self.parameters = {}
        for full, value in lora.items():
            name, _, half = full.rpartition(".")
            parameter = getattr(self._model.get_submodule(name), half)["default"].weight
            parameter.data.copy_(torch.from_numpy(value))
            self.parameters[full] = parameter
        assert sum(each.requires_grad for each in self.peft.parameters()) == len(lora)
        self._acts_from = 0
        for name in names:
            self._model.get_submodule(name).lora_B["default"].register_forward_hook(self._only_where_it_acts)

    def _only_where_it_acts(self, _module: Any, _args: Any, delta: Tensor) -> Tensor:
        acts = torch.arange(delta.shape[-2]) >= self._acts_from
        return delta * acts[:, None] if self._acts_from else delta

    def last_hidden_states(self, sequences: Sequence[Tensor]) -> Tensor:
        """(tokens, hidden_size), part of autograd's graph."""
        return torch.cat([self._decode(ids) for ids in sequences])

    def run(
        self,
        sequences: Sequence[Tensor],
        grad: Tensor | None,
        given: Mapping[str, np.ndarray] | None = None,
        acts_from: Sequence[int] = (),
    ) -> Passes:
        """Each sequence by itself.

        Args:
            grad: of the last hidden states; None: each block has a random one of its own.
            given: what comes into each block in place of what came out of the one before, (tokens, width).
            acts_from: of each sequence the row from which on LoRA acts; empty: everywhere.
        """
        self.peft.zero_grad()
        parts = []
        start = 0
        for ids, self._acts_from in zip(sequences, acts_from or [0] * len(sequences), strict=True):
            rows = slice(start, start + len(ids))
            mine = {name: torch.from_numpy(value[rows].copy()) for name, value in (given or {}).items()}
            parts.append(self._run(ids, None if grad is None else grad[rows], mine))
            start += len(ids)
        self._acts_from = 0
        found = Passes(last=torch.cat([part.last for part in parts]))
        for name in ("x", "y", "grad_x", "grad_y"):
            of = [getattr(part, name) for part in parts]
            setattr(found, name, {path: torch.cat([each[path] for each in of]) for path in self._paths})
        found.grads = {name: _grad(parameter) for name, parameter in self.parameters.items()}
        return found

    def _run(self, ids: Tensor, grad: Tensor | None, given: Mapping[str, Tensor]) -> Passes:
        kept = Passes()

        def before(path: str) -> Any:
            def hook(_module: Any, args: Any, kwargs: Any) -> Any:
                x = _first(args, kwargs)
                if grad is None or path in given or not kept.x:
                    x = (given[path][None].to(x.dtype) if path in given else x).detach().requires_grad_()
                x.retain_grad()
                kept.x[path] = x
                return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

            return hook

        def after(path: str) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                kept.y[path] = output[0] if isinstance(output, tuple | list) else output
                kept.y[path].retain_grad()

            return hook

        with ExitStack() as stack:
            for path in self._paths:
                block = self._model.get_submodule(path)
                stack.callback(block.register_forward_pre_hook(before(path), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after(path)).remove)
            kept.last = self._decode(ids)
        if grad is None:
            for seed, path in enumerate(self._paths):
                y = kept.y[path]
                y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
        else:
            kept.last.backward(grad.to(kept.last.dtype))
        return Passes(
            {path: x.detach()[0] for path, x in kept.x.items()},
            {path: y.detach()[0] for path, y in kept.y.items()},
            {path: _grad(x)[0] for path, x in kept.x.items()},
            {path: _grad(y)[0] for path, y in kept.y.items()},
            kept.last.detach(),
        )

    def _decode(self, ids: Tensor) -> Tensor:
        decoder = getattr(self._model, self._model.base_model_prefix)
        last: Tensor = decoder(input_ids=ids[None], use_cache=False).last_hidden_state
        return last[0]


def _first(args: Any, kwargs: Any) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.detach().clone()


def graph_inputs(
    bundle: Bundle,
    block: BlockSpec,
    graph: GraphSpec,
    lengths: Sequence[int],
    lora: Mapping[str, np.ndarray],
    scaling: float,
    others: Mapping[str, np.ndarray],
) -> Arrays:
    """Inputs of a block's graph, as docs/reference/bundle.md has them."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    own: Arrays = {"mask": plain_mask(lengths, block.window)[None, None], "scale": np.array(scaling, np.float32)}
    own |= {name: bundle.weight(file) for name, file in block.weights.items()}
    own |= {name: np.take(bundle.weight(table.file), positions, table.axis) for name, table in block.tables.items()}
    own |= {name.removeprefix(f"{block.path}."): value for name, value in lora.items()} | dict(others)
    return {spec.name: own[spec.name] for spec in graph.inputs}


def plain_mask(lengths: Sequence[int], window: int | None) -> np.ndarray:
    """float32 (tokens, tokens), one pair of tokens after the other."""
    tokens = [(sequence, place) for sequence, length in enumerate(lengths) for place in range(length)]
    mask = np.full((len(tokens), len(tokens)), np.finfo(np.float32).min, np.float32)
    for row, (of, at) in enumerate(tokens):
        for column, (other, place) in enumerate(tokens):
            if of == other and place <= at and (window is None or at - place < window):
                mask[row, column] = 0.0
    return mask
