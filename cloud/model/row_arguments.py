"""What a base model's blocks are given at some rows of texts: rows of what the family's own decoder gives at all rows.

A decoder makes masks, rotations and biases from the length of a text. Two lengths tell which axis of them goes by rows,
and which by keys. No model-specific code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from .parts import BlockCall

_CACHES: Final = ("past_key_values", "cache", "past_key_value", "layer_past")
"""What blocks call their cache."""
_MASK: Final = "attention_mask"

_Role = Literal["same", "rows", "keys", "mask"]
_Roles = _Role | tuple[Any, ...]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class BlockPlan:
    """How one block is called.

    Attributes:
        forward: its own.
        names: of its parameters, in order; hidden_states, cache: those for these.
        roles: what becomes of each other argument where some rows run.
    """

    forward: Callable[..., Any]
    names: tuple[str, ...]
    hidden_states: str
    cache: str
    roles: dict[str, _Roles]

    @classmethod
    def of(cls, short: BlockCall, long: BlockCall) -> BlockPlan:
        """Of how the decoder calls it for two texts. Raises ``ValueError`` where what goes by rows cannot be told."""
        names = tuple(inspect.signature(short.func).parameters)
        given, longer = (_by_name(call, names) for call in (short, long))
        cache = next((name for name in _CACHES if name in names or name in given), None)
        if cache is None:
            raise ValueError("its blocks take no cache")
        others = given.keys() - {names[0], cache}
        roles = {name: "mask" if name == _MASK else _role(given[name], longer[name]) for name in others}
        return cls(short.func, names, names[0], cache, roles)

    def others(self, call: BlockCall) -> Arguments:
        """What a call gives beside hidden states and cache."""
        given = _by_name(call, self.names)
        return {name: given[name] for name in self.roles}


def first_argument(call: BlockCall) -> Tensor:
    """The hidden states of a call."""
    found: Tensor = call.args[0] if call.args else call.keywords["hidden_states"]
    return found


def _by_name(call: BlockCall, names: Sequence[str]) -> Arguments:
    return dict(zip(names, call.args, strict=False)) | call.keywords


def _role(short: Any, long: Any) -> _Roles:
    if isinstance(short, tuple | list):
        return tuple(_role(*each) for each in zip(short, long, strict=True))
    if not isinstance(short, Tensor):
        if short != long:
            raise ValueError(f"blocks are given {short!r} with one text and {long!r} with another")
        return "same"
    growing = [axis for axis in range(short.ndim) if short.shape[axis] != long.shape[axis]]
    if not growing:
        return "same"
    if growing == [1]:
        return "rows"
    if growing == [short.ndim - 1]:
        return "keys"
    raise ValueError(f"blocks are given a tensor of {tuple(short.shape)}, of which rows cannot be chosen")


class RowArguments:
    """Rows of texts, end to end, and what blocks are given at these.

    Args:
        given: of each text what each block is given at all of its rows.
        rows: of each text those that run, int64; past: those whose keys and values lie before theirs.
        device: of the blocks.
    """

    def __init__(
        self,
        given: Sequence[Sequence[Arguments]],
        rows: Sequence[Tensor],
        past: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._given = given
        self._rows = rows
        self._device = device
        self._keys = [torch.cat(pair) for pair in zip(past, rows, strict=True)]
        self._chosen: dict[tuple[Any, ...], Any] = {}  # most blocks are given the same

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Of each text how many rows run, and how many keys they may see."""
        return [len(rows) for rows in self._rows], [len(keys) for keys in self._keys]

    def of(self, block: int, plan: BlockPlan) -> Arguments:
        """All of a block."""
        return {
            # A family may ask its cache for nothing where it is not to use it.
            name: True if name == "use_cache" else self._merged([text[block][name] for text in self._given], role)
            for name, role in plan.roles.items()
        }

    def _merged(self, values: Sequence[Any], role: _Roles) -> Any:
        if isinstance(role, tuple):
            return tuple(self._merged([value[index] for value in values], one) for index, one in enumerate(role))
        if role == "same":
            return values[0]
        key = role, *map(id, values)
        if key not in self._chosen:
            self._chosen[key] = self._mask(values) if role == "mask" else self._choose(values, role)
        return self._chosen[key]

    def _choose(self, values: Sequence[Tensor], role: _Role) -> Tensor:
        chosen, axis = (self._rows, 1) if role == "rows" else (self._keys, -1)
        pairs = zip(values, chosen, strict=True)
        return torch.cat([value.index_select(axis, index.to(value.device)) for value, index in pairs], axis)

    def _mask(self, values: Sequence[Tensor | None]) -> Tensor:
        """(1, 1, rows, keys): for each text its own decoder's mask, and nothing of other texts."""
        like = next((value for value in values if value is not None), None)
        rows, keys = self.counts
        if like is None or like.dtype is torch.bool:
            mask = torch.zeros(sum(rows), sum(keys), dtype=torch.bool)
        else:
            mask = torch.full((sum(rows), sum(keys)), torch.finfo(like.dtype).min, dtype=like.dtype)
        row = key = 0
        for value, own, seen in zip(values, self._rows, self._keys, strict=True):
            # Without a mask attention is causal.
            visible = own[:, None] >= seen if value is None else value[0, 0].cpu()[own][:, seen]
            mask[row : row + len(own), key : key + len(seen)] = visible
            row, key = row + len(own), key + len(seen)
        return mask[None, None].to(self._device)
