"""The base model: a frozen Hugging Face causal language model, cut at ``inputs_embeds`` and ``last_hidden_state``.

Any decoder-only family will do, because nothing here knows one by name. The blocks are the list of
``num_hidden_layers`` modules; which of their linear modules share an input is found by running them (``targets.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlora.protocol.choices import WeightFormat
from dlora.protocol.errors import DloraError, ExportError
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.text import first_line

from .divided_linear import divide
from .ends import EmbeddingEnd, HeadEnd, check_cut, find_embedding, find_head
from .fingerprint import fingerprint
from .gradients import check_causality, check_gradients, trace_gradients
from .held_linear import weights_of
from .hub import reach
from .loading import load_model, quiet
from .low_bits import hold_in_low_bits
from .placement import DeviceMap, place
from .source import ModelSource, find_source, public_name
from .targets import TRACE_TOKENS, TargetModule, find_targets
from .widening import dtype_of_computing
from .workers import Workers

__all__ = [
    "BaseModel",
    "EmbeddingEnd",
    "HeadEnd",
    "ModelSource",
    "TargetModule",
    "find_embedding",
    "find_head",
    "find_source",
    "load_base_model",
    "load_model",
    "model_code",
    "quiet",
    "reach",
]


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model in eval mode; no parameter requires a gradient.

    Attributes:
        name: as the user named it; architecture: Hugging Face ``model_type``.
        model: the causal language model; decoder: the part of it from ``inputs_embeds`` to ``last_hidden_state``.
        blocks: number of transformer blocks; block_modules: themselves, in the order of execution.
        embedding_size: width of ``inputs_embeds``; hidden_size: of ``last_hidden_state``.
        targets: all modules that can be targets, by name, in execution order.
        refused: linear modules of the blocks that cannot, and why.
        choosing: those of them that no gradient reaches, because they only choose what others look at.
        weight_format: how those of linear modules are held, or, in an export, what they were rounded to.
        processes: how many these are divided among.
    """

    name: str
    architecture: str
    model: PreTrainedModel
    decoder: nn.Module
    blocks: int
    block_modules: tuple[nn.Module, ...]
    embedding_size: int
    hidden_size: int
    vocabulary_size: int
    max_sequence_length: int
    parameters: int
    targets: dict[str, TargetModule]
    refused: dict[str, str]
    choosing: tuple[str, ...] = ()
    weight_format: WeightFormat = "full"
    processes: int = 1

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, name: str, weight_format: WeightFormat = "full", processes: int = 1
    ) -> Self:
        """Freeze ``model``, trace it, and check the cut and that no token sees a later one.

        Raises ``ExportError`` where it is not a decoder-only language model, its own code fails, no module of it can
        be a target, it does more at its two ends than a device can, or it is not causal.
        """
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ExportError(
                f"{name} is an encoder-decoder model ({config.model_type}); only decoder-only models are supported"
            )
        with model_code(name, config.model_type):
            text = config.get_text_config(decoder=True)
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            decoder, count = _find_decoder(model), getattr(text, "num_hidden_layers", None)
        if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
            raise ExportError(
                f"{name} ({config.model_type}) has no plain token embedding and linear LM head; it is not supported"
            )
        model.eval().requires_grad_(False)
        if not isinstance(count, int):
            raise ExportError(
                f"{name} ({config.model_type}) is no single stack of transformer blocks: its config has no "
                "num_hidden_layers; its architecture is not supported"
            )
        for block_list in _lists_of_blocks(model, decoder, count, name):
            with model_code(name, config.model_type), _given_embeddings(model, name):
                targets, refused = find_targets(model, decoder, block_list, embedding.embedding_dim)
            if targets:
                break
        if not targets:
            module, reason = next(iter(refused.items()), ("its blocks", "have no linear modules"))
            raise ExportError(f"{name} ({config.model_type}) has no module that can be a target: {module} {reason}")
        base = cls(
            name=name,
            architecture=config.model_type,
            model=model,
            decoder=decoder,
            blocks=len(block_list),
            block_modules=tuple(block for _, block in block_list),
            embedding_size=embedding.embedding_dim,
            hidden_size=head.in_features,
            vocabulary_size=head.out_features,
            max_sequence_length=int(getattr(text, "max_position_embeddings", None) or _NO_LIMIT),
            parameters=sum(math.prod(weight.shape) for weight in weights_of(model)),
            targets=targets,
            refused=refused,
            weight_format=weight_format,
            processes=processes,
        )
        with model_code(name, config.model_type):
            check_cut(base, find_embedding(base), find_head(base))
        with model_code(name, config.model_type, "trained"):
            check_gradients(base)
            gradients = trace_gradients(base)
        check_causality(base, gradients)
        reason = "gets no gradient (as what only chooses which tokens are looked at)"
        left = [target for name, target in targets.items() if name not in gradients.without]
        return replace(
            base,
            targets={target.name: replace(target, order=order) for order, target in enumerate(left)},
            refused=refused | dict.fromkeys(gradients.without, reason),
            choosing=gradients.without,
        )

    @cached_property
    def public_name(self) -> str:
        """What devices are told: ``name`` without the path."""
        return public_name(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the weights, the same whether they are held in float32 or bfloat16."""
        return fingerprint(self.model)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The module, from the model itself; ``from_model`` takes none without one."""
        module = self.model.get_input_embeddings()
        assert isinstance(module, nn.Embedding)
        return module

    @property
    def lm_head(self) -> nn.Linear:
        """Likewise."""
        module = self.model.get_output_embeddings()
        assert isinstance(module, nn.Linear)
        return module

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and takes embeddings in."""
        return dtype_of_computing(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def groups(self, names: Iterable[str]) -> tuple[GroupSpec, ...]:
        """The exchange groups of these target modules, in execution order.

        Raises ``ExportError`` for a name that is not a target of this model.
        """
        chosen: dict[int, list[TargetModule]] = {}
        names = set(names)
        for name in names - self.targets.keys():
            reason = self.refused.get(name, "is not a linear module of a block")
            raise ExportError(f"{name} cannot be a target module of {self.name}: it {reason}")
        for target in sorted((self.targets[name] for name in names), key=lambda target: target.order):
            chosen.setdefault(target.input_id, []).append(target)
        return tuple(
            GroupSpec(
                members[0].block,
                members[0].in_features,
                tuple(TargetSpec(member.name, member.out_features) for member in members),
            )
            for members in chosen.values()
        )

    def last_hidden_state(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run the decoder.

        Args:
            inputs_embeds: (batch, length, embedding_size), in the model's dtype; scaled where the family's
                own embedding module scales.
            attention_mask: int64 (batch, length), 1 for tokens and 0 for padding.
            position_ids: int64 (1, length), starting anew at each of several packed sequences.

        Returns: (batch, length, hidden_size), after the final norm.
        """
        given = {} if position_ids is None else {"position_ids": position_ids}
        hidden: Tensor = self.decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **given
        ).last_hidden_state
        return hidden


_NO_LIMIT = 1 << 20  # ALiBi families (BLOOM) name no longest sequence


def load_base_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda _: None,
    weight_format: WeightFormat = "full",
    device_map: DeviceMap | Literal["auto"] | None = None,
    workers: Workers | None = None,
) -> BaseModel:
    """Load a base model from a directory, a ``.gguf`` file, a hub id or an alias (``smollm2-135m``).

    ``say`` is called with a line where the Hugging Face hub is asked; ``weight_format``: how the weights of the
    linear modules are held; ``device_map``: where the parts are, in place of ``device``; auto: as accelerate balances;
    ``workers``: other processes that the weights are divided among.

    Raises ``UsageError`` where the path does not exist, ``MissingExtraError`` where an alias's package is not
    installed and ``ExportError`` where the model cannot be downloaded or is not supported.
    """
    model = load_model(reach(find_source(name), say), dtype)
    hold_in_low_bits(model, weight_format)
    if workers is not None:
        divide(model, workers)
    if device_map is None:
        model = model.to(device)  # type: ignore[arg-type]  # its decorator loses self
    else:
        place(model, None if device_map == "auto" else device_map)
    return BaseModel.from_model(model, name, weight_format, 1 if workers is None else workers.processes)


def _find_decoder(model: PreTrainedModel) -> nn.Module:
    """What transformers names as such; where that is the model itself (Llama 4's text model), the model inside."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def _lists_of_blocks(
    model: PreTrainedModel, decoder: nn.Module, count: int, name: str
) -> list[list[tuple[str, nn.Module]]]:
    """Every list of as many modules as the config says, with their paths: a vision tower may have as many blocks."""
    paths = {module: path for path, module in model.named_modules()}
    found = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise ExportError(
            f"{name} ({model.config.model_type}) has no list of {count} transformer blocks, the num_hidden_layers of "
            "its config; its architecture is not supported"
        )
    return [[(paths[block], block) for block in blocks] for blocks in found]


@contextmanager
def model_code(name: str, architecture: str, what: str = "run") -> Iterator[None]:
    """While the model's own code runs for the first times: what it raises becomes one line, an ``ExportError``."""
    try:
        yield
    except DloraError:
        raise
    except Exception as error:
        raise ExportError(
            f"{name} ({architecture}) cannot be {what}, its own code fails: {type(error).__name__}: {first_line(error)}"
        ) from None


@contextmanager
def _given_embeddings(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While the decoder is first run on embeddings: what fails there may run on token ids, and that is said then."""
    try:
        yield
    except Exception as error:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, TRACE_TOKENS, dtype=torch.long, device=model.device), use_cache=False)
        raise ExportError(
            f"{name} ({model.config.model_type}) runs on token ids but not on their embeddings alone, and so cannot be "
            f"cut; its architecture is not supported ({type(error).__name__}: {first_line(error)})"
        ) from None
