"""How a decoder calls its blocks: which tensors it hands them beside the hidden states, and what these depend on.

A device has no decoder, only blocks. So what the decoder makes for them is taken apart once, at export: a *mask* says
which tokens see which, a *table* has a row for each position (cosine and sine of a rotary embedding, ALiBi), and what
depends on neither is a weight like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.errors import ExportError

MASK: Final = "mask"
BLOCKED: Final = torch.finfo(torch.float32).min  # what is added where a token does not see another
ROUNDING: Final = 1e-4  # of float32: the same sums in another order
# A prime, which no other dimension is likely to be; where one is, the next.
_TOKENS: Final = (23, 29, 31, 37, 41, 43, 47)
_MAX_TABLE_ROWS: Final = 8192
_SHORT: Final = 64  # tokens that show a mask without a window


class CannotRunOnDevice(ExportError):
    """A base model whose blocks no device can run; the message says why."""


@dataclass(frozen=True)
class BlockCall:
    """One block and the arguments that its decoder gives it.

    Attributes:
        path: its name in the causal language model (``model.layers.29``).
        leaves, structure: the arguments, flattened; the first leaf holds the hidden states.
        context: the leaves that are tensors beside the hidden states, by a name of theirs.
        tokens: how many the call was made with.
        config: the model's, which says how attention is computed.
        is_seen: whether the mask says True where a token sees another; None for one that is added.
    """

    index: int
    path: str
    block: nn.Module
    leaves: tuple[Any, ...]
    structure: Any
    context: Mapping[str, int]
    tokens: int
    config: Any
    is_seen: bool | None = None

    def __call__(self, hidden_states: Tensor, context: Mapping[str, Tensor], **arguments: Any) -> Tensor:
        """Hidden states after the block, (tokens, width), of those before it.

        Args:
            context: what takes the place of the decoder's tensors; those that are not named stay.
            arguments: others of the block, in place of what the decoder gave.
        """
        leaves = [hidden_states.unsqueeze(0), *self.leaves[1:]]
        for name, tensor in context.items():
            leaves[self.context[name]] = self._as_mask(tensor) if name == MASK else tensor
        (kwargs,) = pytree.tree_unflatten(leaves, self.structure)
        with attention(self.config, eager=True):
            output = self.block.forward(**{**kwargs, **arguments})
        after: Tensor = output[0] if isinstance(output, tuple | list) else output
        return after.squeeze(0)

    def _as_mask(self, added: Tensor) -> Tensor:
        """A mask that is added to scores, in the form that the block takes."""
        if self.is_seen is None:
            return added
        return added >= 0 if self.is_seen else added < 0

    def tensors(self) -> dict[str, Tensor]:
        """What the decoder gave it beside the hidden states, by name."""
        return {name: self.leaves[leaf] for name, leaf in self.context.items()}

    def hidden_states(self) -> Tensor:
        """What the decoder gave it, (tokens, width)."""
        given: Tensor = self.leaves[0]
        return given.squeeze(0)


def record_calls(base: BaseModel, tokens: int = 0, *, seed: int = 0) -> tuple[BlockCall, ...]:
    """Run the decoder on ``tokens`` random tokens (0: a number that is no other dimension) and keep its blocks' calls.

    Raises ``CannotRunOnDevice`` where a block is called in another way than a decoder's usually is.
    """
    tokens = tokens or unusual_number(base)
    with recorded(base) as (calls, _), torch.no_grad(), attention(config_of(base), eager=True):
        base.last_hidden_state(random_embeds(base, tokens, seed))
    return tuple(_call(base, index, kwargs, tokens) for index, kwargs in enumerate(calls))


def random_embeds(base: BaseModel, tokens: int, seed: int = 0) -> Tensor:
    """(1, tokens, embedding_size): the embeddings of random tokens."""
    weight = base.token_embedding.weight
    ids = torch.randint(len(weight), (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        embeds: Tensor = base.token_embedding(ids.to(weight.device))
    return embeds


def windows(base: BaseModel) -> tuple[int | None, ...]:
    """How many tokens each block's attention sees at most, counted back from the token itself; None: all before it.

    Raises ``CannotRunOnDevice`` for a block that masks its attention otherwise, or not by an argument.
    """
    widest = int(getattr(config_of(base), "sliding_window", None) or 0)
    tokens = min(table_rows(base), max(_SHORT, widest + 2))
    found = []
    for call in calls_without_computing(base, tokens, eager=True):
        mask = call.tensors().get(MASK)
        if mask is None:
            raise CannotRunOnDevice(f"block {call.index} takes no attention mask, which is to keep sequences apart")
        seen = _seen(mask, tokens)
        window = int(seen[-1].sum())
        if not torch.equal(seen, sees(torch.tensor([tokens]), window)):
            raise CannotRunOnDevice(f"block {call.index} masks its attention in a way of its own")
        found.append(None if window == tokens else window)
    return tuple(found)


def sees(lengths: Tensor, window: int | None) -> Tensor:
    """bool (tokens, tokens): which tokens each token of sequences of ``lengths``, one after the other, sees."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(int(lengths.sum()))
    back = place[:, None] - place[None, :]
    seen = (sequence[:, None] == sequence[None, :]) & (back >= 0)
    return seen if window is None else seen & (back < window)


def table_rows(base: BaseModel) -> int:
    """The most tokens of a sequence that tables have rows for."""
    return min(base.max_sequence_length, _MAX_TABLE_ROWS)


def tables(base: BaseModel, names: Mapping[int, Sequence[str]]) -> dict[int, dict[str, tuple[Tensor, int | None]]]:
    """What the decoder hands its blocks for the positions 0, 1, 2 …, as far as ``table_rows`` goes.

    Args:
        names: by each block's number, those of its context that are wanted.

    Returns, by block and name: the tensor, and the axis of its positions; None where it has none.

    Raises ``CannotRunOnDevice`` where a tensor depends on how many tokens there are.
    """
    rows = table_rows(base)
    fewer = rows // 2 + 1
    long, short = (calls_without_computing(base, tokens, eager=False) for tokens in (rows, fewer))
    found: dict[int, dict[str, tuple[Tensor, int | None]]] = {}
    for index, wanted in names.items():
        mine = found.setdefault(index, {})
        for name in wanted:
            table, part = long[index].tensors()[name], short[index].tensors()[name]
            axes = [axis for axis, size in enumerate(part.shape) if size == fewer and table.shape[axis] == rows]
            if len(axes) > 1:
                raise CannotRunOnDevice(f"block {index} takes {name} for each pair of tokens")
            same = table.narrow(axes[0], 0, fewer) if axes else table
            if same.shape != part.shape or not torch.allclose(same, part, rtol=1e-6, atol=1e-6):
                raise CannotRunOnDevice(f"{name} of block {index} depends on how many tokens there are")
            mine[name] = table, axes[0] if axes else None
    return found


def final_modules(base: BaseModel) -> tuple[nn.Module, ...]:
    """What stands between the last block and ``last_hidden_state``, in order: the final norm, mostly alone.

    Raises ``CannotRunOnDevice`` where it is more than modules one after the other.
    """
    blocks = set(base.block_modules)
    inside = {module for block in blocks for module in block.modules()}
    outside = [
        module
        for module in base.decoder.modules()
        if module not in inside and not blocks & set(module.modules()) and not isinstance(module, nn.Embedding)
    ]
    calls: list[tuple[nn.Module, Any, Any]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module, args[0] if args else None, output))

    with ExitStack() as stack, recorded(base) as (_, returned), torch.no_grad(), attention(config_of(base), eager=True):
        for module in outside:
            stack.callback(module.register_forward_hook(keep).remove)
        wanted = base.last_hidden_state(random_embeds(base, 5))
    chain: list[nn.Module] = []
    current = returned[-1][0] if isinstance(returned[-1], tuple | list) else returned[-1]
    while current is not wanted:
        following = next(((module, output) for module, given, output in calls if given is current), None)
        if following is None or not isinstance(following[1], Tensor):
            break
        chain.append(following[0])
        current = following[1]
    if not torch.equal(current, wanted):  # equal: a view of it
        raise CannotRunOnDevice("what follows its blocks is not modules one after the other")
    return tuple(chain)


@contextmanager
def attention(config: Any, *, eager: bool) -> Iterator[None]:
    """While attention is plain, so that masks are tensors, or the model's own; ``config`` is the decoder's."""
    before = config._attn_implementation
    if eager:
        # Not by the model's own method: Falcon has none that works, and reads this.
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def config_of(base: BaseModel) -> Any:
    """The decoder's, which says how attention is computed."""
    return base.model.config.get_text_config(decoder=True)


@contextmanager
def recorded(
    base: BaseModel, hand_on: Callable[[int, Tensor], Any] | None = None
) -> Iterator[tuple[list[dict[str, Any]], list[Any]]]:
    """Collect the arguments of every call of a block, by their names, and what each returned.

    ``hand_on``: gives what a block returns that computes nothing, of its number and its hidden states.
    """
    calls: list[dict[str, Any]] = []
    returned: list[Any] = []
    originals = [block.forward for block in base.block_modules]

    def record(index: int, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(inspect.unwrap(type(block).forward))

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(None, *args, **kwargs)  # None for self
            given = dict(bound.arguments)
            del given[next(iter(signature.parameters))]
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
            calls.append(given)
            returned.append(
                original(*args, **kwargs) if hand_on is None else hand_on(index, next(iter(given.values())))
            )
            return returned[-1]

        return forward

    for index, (block, original) in enumerate(zip(base.block_modules, originals, strict=True)):
        block.forward = record(index, block, original)
    try:
        yield calls, returned
    finally:
        for block, original in zip(base.block_modules, originals, strict=True):
            block.forward = original


def calls_without_computing(base: BaseModel, tokens: int, *, eager: bool) -> list[BlockCall]:
    """How the decoder calls its blocks for ``tokens`` embeddings that are zero, where no block computes anything."""
    with recorded(base) as (_, returned), torch.no_grad():
        base.last_hidden_state(random_embeds(base, 3))

    def hand_on(index: int, hidden_states: Tensor) -> Any:
        """In a tuple, and with as much beside it, as the block has it."""
        usual = returned[index]
        return (hidden_states, *(None,) * (len(usual) - 1)) if isinstance(usual, tuple | list) else hidden_states

    embeds = torch.zeros(1, tokens, base.embedding_size, dtype=base.dtype, device=base.device)
    with recorded(base, hand_on) as (calls, _), torch.no_grad(), attention(config_of(base), eager=eager):
        base.last_hidden_state(embeds)
    return [_call(base, index, kwargs, tokens) for index, kwargs in enumerate(calls)]


def _call(base: BaseModel, index: int, kwargs: dict[str, Any], tokens: int) -> BlockCall:
    block = base.block_modules[index]
    path = next(name for name, module in base.model.named_modules() if module is block)
    named, structure = pytree.tree_flatten_with_path((kwargs,))
    leaves = tuple(leaf for _, leaf in named)
    if not isinstance(leaves[0], Tensor) or leaves[0].ndim != 3:
        raise CannotRunOnDevice(f"block {index} is not given its hidden states first")
    context: dict[str, int] = {}
    is_seen = None
    for leaf, (keys, value) in enumerate(named):
        if leaf == 0 or not isinstance(value, Tensor):
            continue
        if _is_mask(value, tokens) and MASK not in context:
            context[MASK] = leaf
            if value.dtype == torch.bool:
                is_seen = bool(value[..., 0, 0])
        else:
            context[".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys[1:])] = leaf
    return BlockCall(index, path, block, leaves, structure, context, tokens, config_of(base), is_seen)


def _is_mask(tensor: Tensor, tokens: int) -> bool:
    return tensor.ndim == 4 and tensor.shape[-2:] == (tokens, tokens) and not tensor.dtype.is_complex


def _seen(mask: Tensor, tokens: int) -> Tensor:
    """bool (tokens, tokens) of a mask: whether a row's token sees a column's."""
    plain = mask[0, 0]
    if not bool((mask == plain).all()):
        raise CannotRunOnDevice("its attention heads have masks of their own")
    if plain.dtype != torch.bool:
        return plain >= 0
    return plain if bool(plain[0, 0]) else ~plain


def near(found: Tensor, wanted: Tensor, tolerance: float = ROUNDING) -> bool:
    """Whether no value is off by more than this part of the largest one."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def unusual_number(base: BaseModel, but: int = 0) -> int:
    """Of tokens: one that is no dimension of the model, nor ``but``."""
    sizes = {size for parameter in base.model.parameters() for size in parameter.shape}
    return next(number for number in _TOKENS if number not in {*sizes, but})
