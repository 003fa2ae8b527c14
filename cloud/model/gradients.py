"""What a short backward pass says of a base model: whether gradients pass, whether it is causal, and which target
modules have a gradient.

*Causal*: what it computes for a token depends on that token and earlier ones only. Gradients are asked and not values:
what attention masks has a gradient of exactly zero in every dtype, where values may change by rounding with the number
of tokens that a mixture sends to each expert.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.protocol.errors import ExportError

from .widening import class_of, widened_again

if TYPE_CHECKING:
    from .base_model import BaseModel

LARGEST_SHARE: Final = 1e-4  # of a causal model it is 0, of nine tiny ones that are not .03 and more
_TOLERANCE: Final = 0.2
_LENGTH: Final = 6
_EARLIER: Final = 3
_DECODER_SETTINGS: Final = ("is_decoder", "causal")  # of BERT's kin and of XLM


@dataclass(frozen=True)
class Gradients:
    """Of the hidden states of earlier tokens.

    Attributes:
        later_share: the largest on later tokens' embeddings, relative to the largest on their own.
        without: target modules whose output has none.
    """

    later_share: float
    without: tuple[str, ...]


def trace_gradients(base: BaseModel) -> Gradients:
    """One sequence of six tokens goes forward and back."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocabulary_size, (1, _LENGTH), generator=generator).to(base.device)
    weights = torch.randn(_EARLIER, base.hidden_size, generator=generator).to(base.device)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, output: outputs.update({name: output})

    with ExitStack() as hooks, torch.enable_grad(), widened_again():
        for name, target in base.targets.items():
            hooks.enter_context(target.module.register_forward_hook(keep(name)))
        given = base.token_embedding(ids).detach().requires_grad_()
        # A family may change in place what it is given, which autograd forbids of a leaf.
        hidden = base.last_hidden_state(given.clone())
        total = (hidden[0, :_EARLIER].float() * weights).sum()
        asked = {name: output for name, output in outputs.items() if output.requires_grad}
        grad, *others = torch.autograd.grad(total, [given, *asked.values()], allow_unused=True)
    found = {name for name, other in zip(asked, others, strict=True) if other is not None}
    assert grad is not None
    sizes = grad[0].float().abs().amax(-1)
    share = float(sizes[_EARLIER:].max() / sizes[:_EARLIER].max().clamp_min(1e-30))
    return Gradients(share, tuple(name for name in base.targets if name not in found))


def check_gradients(base: BaseModel) -> None:
    """Try the target modules that are not of the ordinary kind with weights of ordinary floats, one of each shape.

    Some give a product without a gradient, and say nothing: those that quantise what they are given, too (int8
    *dynamic*). What a gradient says of a step is held against what the step does, and may be a fifth off.

    Raises ``ExportError``.
    """
    tried = set[tuple[object, ...]]()
    for name, target in base.targets.items():
        module, stored = target.module, target.module._parameters.get("weight")
        key = type(module), type(stored), target.in_features, target.out_features
        has_floats = type(stored) is nn.Parameter and stored.is_floating_point() and stored.dtype.itemsize > 1
        if key in tried or (has_floats and class_of(module) in (nn.Linear, Conv1D)):
            continue
        tried.add(key)
        share = _predicted_share(module, target.in_features, base)
        if not abs(share - 1) < _TOLERANCE:
            raise ExportError(
                f"{base.name} cannot be trained: gradients do not pass its module {name} "
                f"({class_of(module).__name__}), as where inputs are quantised, too (int8 dynamic); give the model "
                "that it was made from"
            )


def _predicted_share(module: nn.Module, width: int, base: BaseModel) -> float:
    """How much of the squared length of a step's effect on a product the gradient predicts: 1 where it is right."""
    generator = torch.Generator().manual_seed(0)
    x, step = (torch.randn(1, _LENGTH, width, generator=generator).to(base.device, base.dtype) for _ in range(2))
    with torch.enable_grad():
        product = module(x.requires_grad_())
        effect = (module(x.detach() + step) - product).detach().float()
        if not product.requires_grad:
            return 0.0
        (grad,) = torch.autograd.grad((product.float() * effect).sum(), x, allow_unused=True)
    return 0.0 if grad is None else float((grad.float() * step.float()).sum() / effect.square().sum().clamp_min(1e-30))


def check_causality(base: BaseModel, gradients: Gradients) -> None:
    """Raises ``ExportError`` where ``later_share`` is above ``LARGEST_SHARE``.

    Not where it is no number: half precision has its limits.
    """
    if gradients.later_share > LARGEST_SHARE:
        config = base.model.config
        wrong = [name for name in _DECODER_SETTINGS if getattr(config, name, None) is False]
        advice = "its architecture is not supported"
        if wrong:
            advice = f"where it was trained as a decoder, its config.json must say {wrong[0]}: true"
        raise ExportError(
            f"{base.name} ({base.architecture}) is no causal language model: what it computes for a token depends on "
            f"later tokens; {advice}"
        )
