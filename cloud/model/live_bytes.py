"""How much memory a micro-batch will take, known before it runs.

Two things take it: the autograd graph that waits for the backward pass, and what a forward pass has in hand at once,
which evaluation takes as well. Both depend on the family, the attention kernel and the dtype, so the base model is
asked once: it runs a few tokens, and what autograd saves, and what is alive after each operation, is weighed. Two
lengths tell the part that grows with the tokens from the part that grows with their square (attention scores, masks).

The graph begins at the lowest trained group, so bytes are kept by the target module after which they are saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlora.protocol.groups import GroupSpec

from .base_model import BaseModel, model_code
from .held_linear import bytes_held, bytes_of_weights, weights_come_and_go
from .layout import Layout, random_embeds
from .memory import machine_bytes
from .row_blocks import DividedTexts, RowBlocks

# Two: a single sequence hides what is kept once for a batch, and what is copied for each sequence of one.
_SEQUENCES: Final = 2
# Of the shorter run; the other is twice as long. Attention kernels on GPUs pad to multiples of 16, which must not look
# like growth; CPUs do not, and are slow.
_LENGTH_ON_CPU: Final = 4
_LENGTH: Final = 16
_FIRST_ROWS: Final = (16, 48)  # multiples of 16 for the same reason
_LEAST_LIMIT: Final = 64 << 20
_MASK_BYTES: Final = 4  # of a row and a key, where texts lie end to end
_INPUT_BYTES: Final = 8  # of a value that a device sends: of its frame, and of the tensor made of it, both fp32


def default_live_limit(base: BaseModel) -> int:
    """Bytes for all running micro-batches together: half of what the model leaves of the memory of its device.

    The other half is for what this file does not weigh: frames on their way, Python, pieces that nothing fits into.
    Of all memory and not of what is free now, so that the same machine gives the same limits each time.
    """
    weights = bytes_of_weights(base.model, base.device)
    if base.device.type == "cuda":
        machine = torch.cuda.get_device_properties(base.device).total_memory
    else:
        machine = machine_bytes()
        weights += (base.processes - 1) * bytes_held(base.model)  # of the others, about
    return max(_LEAST_LIMIT, (machine - weights) // 2)


@dataclass(frozen=True)
class _Growth:
    """Bytes of a graph: ``constant + tokens * (linear + quadratic * length)``, padding counted among the tokens."""

    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def __add__(self, other: _Growth) -> _Growth:
        return _Growth(self.constant + other.constant, self.linear + other.linear, self.quadratic + other.quadratic)

    def at(self, tokens: int, length: int) -> float:
        """``length``: of what attention looks at for each token, its sequence, or a context that it goes on from."""
        return self.constant + tokens * (self.linear + self.quadratic * length)


@dataclass(frozen=True)
class _Growths:
    """Of one kind of input.

    Attributes:
        graph: what autograd saves above each target module, by its name.
        forward: what is alive at once in a forward pass without a graph, at those operations where it may be the most.
    """

    graph: dict[str, _Growth]
    forward: tuple[_Growth, ...]


@dataclass(frozen=True)
class LiveBytes:
    """What micro-batches of a base model take.

    Attributes:
        plain: where attention needs no mask; masked: where sequences are padded or packed.
        token_bytes: of each token beside them: what came for it, and what a group's exchange has in hand.
        context_token_bytes: of each token of a context, where attention copies a block's keys and values for all heads:
            both as wide as the hidden states, and as much again for families whose heads are wider together.
        first_row_bytes: above each target module, of each row whose keys and values ``RowBlocks`` keeps: these, and
            what autograd saves of them; attends_by_text: as ``RowBlocks`` has it.
    """

    plain: _Growths
    masked: _Growths
    token_bytes: int
    context_token_bytes: int
    first_row_bytes: dict[str, float]
    attends_by_text: bool

    @classmethod
    def measure(cls, base: BaseModel, row_blocks: RowBlocks | None = None) -> Self:
        """Run a few tokens through ``base`` and weigh what they take. Changes nothing, and keeps nothing."""
        # A group's input as it is sent; what its frozen modules give, its deltas, and their sums.
        widths = [group.in_features + 3 * group.out_features for group in base.groups(base.targets)]
        exchange = max(widths, default=0)
        token_bytes = base.embedding_size * _INPUT_BYTES + exchange * base.dtype.itemsize
        context_token_bytes = 4 * base.hidden_size * base.dtype.itemsize
        growths = _growths(base, masked=False), _growths(base, masked=True)
        if row_blocks is None:
            return cls(*growths, token_bytes, context_token_bytes, {}, attends_by_text=False)
        kept, by_text = _first_row_bytes(row_blocks), row_blocks.attends_by_text
        return cls(*growths, token_bytes, context_token_bytes, kept, by_text)

    def estimate(
        self, layout: Layout, lowest: GroupSpec | None, context_length: int = 0, texts: DividedTexts | None = None
    ) -> int:
        """Bytes that a micro-batch takes, from its first operation to its last.

        Args:
            layout: the micro-batch's input.
            lowest: the lowest group whose adapters are trained; None where nothing is, as when evaluating.
            context_length: tokens that the last one sees, where the input goes on from some before it.
            texts: where ``RowBlocks`` runs them: last rows have a graph, first rows leave keys and values.
        """
        sequences, length, _ = layout.inputs_embeds.shape
        if context_length > length:
            forward = self._forward(self._of(layout), length, context_length)
            return forward + context_length * self.context_token_bytes
        tokens = sequences * length
        mask = 0 if texts is None else tokens * tokens * _MASK_BYTES
        return mask + self.graph(layout, lowest, texts) + self._forward(self._of(layout), tokens, length)

    def graph(self, layout: Layout, lowest: GroupSpec | None, texts: DividedTexts | None = None) -> int:
        """The part of it that waits between the forward and the backward pass: what autograd saves, and what is kept of
        first rows."""
        if texts is not None:
            name = lowest.targets[0].name if lowest is not None else next(iter(self.first_row_bytes))
            tokens, first_rows = sum(texts.lengths), sum(texts.firsts)
            # Several texts: what attention takes and gives is copied, as keys and values of first rows are.
            kept = round((tokens if len(texts.lengths) > 1 else first_rows) * self.first_row_bytes[name])
            if lowest is None:
                return kept
            seen = max(texts.lengths) if self.attends_by_text else tokens
            return kept + round(self.masked.graph[name].at(tokens - first_rows, seen))
        if lowest is None:
            return 0
        sequences, length, _ = layout.inputs_embeds.shape
        return round(self._of(layout).graph[lowest.targets[0].name].at(sequences * length, length))

    def largest(self, max_tokens: int, longest: int) -> int:
        """The most that a micro-batch of ``max_tokens`` can take, in rows of up to ``longest`` tokens, in bytes."""
        length = min(max_tokens, longest)
        tokens = max(1, max_tokens // length) * length
        return max(
            round(max(growth.at(tokens, length) for growth in growths.graph.values()))
            + self._forward(growths, tokens, length)
            for growths in (self.plain, self.masked)
        )

    def _of(self, layout: Layout) -> _Growths:
        return self.masked if layout.attention_mask is not None or layout.position_ids is not None else self.plain

    def _forward(self, growths: _Growths, tokens: int, length: int) -> int:
        return tokens * self.token_bytes + round(max(growth.at(tokens, length) for growth in growths.forward))


def _growths(base: BaseModel, *, masked: bool) -> _Growths:
    length = _LENGTH_ON_CPU if base.device.type == "cpu" else _LENGTH
    short, long = (_saved(base, many, masked=masked) for many in (length, 2 * length))
    after_each = [
        sum((_growth(length, *pair) for pair in zip_longest(*sizes, fillvalue=0)), _Growth())
        for sizes in zip(short, long, strict=True)
    ]
    # For each target module: what is saved after it was called, to the very end.
    graph = dict(zip(reversed(base.targets), accumulate(reversed(after_each)), strict=True))
    return _Growths(graph, _forward_growths(base, length, masked=masked))


def _forward_growths(base: BaseModel, length: int, *, masked: bool) -> tuple[_Growth, ...]:
    """What is alive after each operation of a forward pass; of equal ones, one.

    Between two target modules both runs mostly call the same operations. Where they do not, as experts see other
    tokens, the most that is alive there counts, and grows with the tokens.
    """
    found: set[_Growth] = set()
    # Weights that come and go are alive as well: a part that does not grow, which a third run tells from the others.
    lengths = [length * number for number in range(1, 4 if weights_come_and_go(base.model) else 3)]
    for runs in zip(*(_alive(base, many, masked=masked) for many in lengths), strict=True):
        if len({tuple(name for name, _ in run) for run in runs}) == 1:
            found |= {_growth(length, *(total for _, total in operation)) for operation in zip(*runs, strict=True)}
        else:
            most = (
                max(total for _, total in run) / (_SEQUENCES * many) for many, run in zip(lengths, runs, strict=True)
            )
            found.add(_Growth(linear=max(most)))
    return tuple(found)


def _growth(length: int, short_bytes: int, long_bytes: int, longest_bytes: int | None = None) -> _Growth:
    """Of what took so many bytes in runs of ``length``, twice that, and three times that."""
    if longest_bytes is not None:
        quadratic = max(0.0, (longest_bytes - 2 * long_bytes + short_bytes) / (2 * _SEQUENCES * length**2))
        linear = max(0.0, (long_bytes - short_bytes) / (_SEQUENCES * length) - 3 * length * quadratic)
        constant = max(0.0, short_bytes - _SEQUENCES * length * (linear + length * quadratic))
        return _Growth(constant, linear, quadratic)
    if short_bytes == long_bytes:
        return _Growth(constant=short_bytes)
    a_token, a_token_of_long = short_bytes / (_SEQUENCES * length), long_bytes / (_SEQUENCES * 2 * length)
    quadratic = max(0.0, (a_token_of_long - a_token) / length)
    return _Growth(linear=a_token - quadratic * length, quadratic=quadratic)


def _saved(base: BaseModel, length: int, *, masked: bool) -> list[list[int]]:
    """For each target module: the sizes in bytes of what autograd saves from its call to the next one's."""
    with (
        model_code(base.name, base.architecture),
        torch.enable_grad(),
        _order_of_calls(base) as order,
        _record_saved_tensors(base, order) as saved,
    ):
        base.last_hidden_state(*_input(base, length, masked=masked, requires_grad=True))
    sizes: list[list[int]] = [[] for _ in base.targets]
    for called, storage in saved.values():
        if called:
            sizes[called - 1].append(storage.nbytes())
    return sizes


def _alive(base: BaseModel, length: int, *, masked: bool) -> list[list[tuple[str, int]]]:
    """Each operation and the bytes of all tensors after it: up to the first target module, then between each two."""
    with (
        model_code(base.name, base.architecture),
        torch.no_grad(),
        _order_of_calls(base) as order,
        _TensorByteCounter(base, order) as alive,
    ):
        base.last_hidden_state(*_input(base, length, masked=masked, requires_grad=False))
    totals: list[list[tuple[str, int]]] = alive.totals  # entering torch's mode gives Any
    return totals


def _first_row_bytes(blocks: RowBlocks) -> dict[str, float]:
    """``LiveBytes.first_row_bytes``."""
    base = blocks.base
    found: dict[str, list[int]] = {name: [] for name in base.targets}
    for firsts in _FIRST_ROWS:
        texts = DividedTexts((firsts + 1,), (firsts,))
        with model_code(base.name, base.architecture), _order_of_calls(base) as order:
            last_rows = blocks.begin(random_embeds(base, firsts + 1)[0], texts, 0)
            with torch.enable_grad(), _record_saved_tensors(base, order) as saved:
                last_rows.run(requires_grad=True)
        for name, target in base.targets.items():
            kept = sum(each.nbytes() for called, each in saved.values() if called > target.order)
            found[name].append(kept + last_rows.kept_bytes(target.block))
    return {name: (more - few) / (_FIRST_ROWS[1] - _FIRST_ROWS[0]) for name, (few, more) in found.items()}


def _input(base: BaseModel, length: int, *, masked: bool, requires_grad: bool) -> tuple[Tensor, Tensor | None]:
    shape = _SEQUENCES, length, base.embedding_size
    embeds = torch.ones(shape, dtype=base.dtype, device=base.device, requires_grad=requires_grad)
    if requires_grad:
        embeds = embeds.clone()  # CTRL changes in place what it is given, which autograd forbids of a leaf
    mask = None
    if masked:
        mask = torch.ones(_SEQUENCES, length, dtype=torch.long, device=base.device)
        mask[-1, -1] = 0  # a mask without padding may be dropped
    return embeds, mask


class _Calls:
    """How many target modules were called so far."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def _order_of_calls(base: BaseModel) -> Iterator[_Calls]:
    calls = _Calls()

    def call(order: int) -> None:
        calls.count = order + 1

    with ExitStack() as hooks:
        for target in base.targets.values():
            hook = target.module.register_forward_pre_hook(lambda *_, order=target.order: call(order))
            hooks.enter_context(hook)
        yield calls


@contextmanager
def _record_saved_tensors(base: BaseModel, calls: _Calls) -> Iterator[dict[int, tuple[int, torch.UntypedStorage]]]:
    """Collect what autograd saves: by address, how many target modules were called before, and the storage.

    A storage that is saved several times counts where it is saved last: a graph that begins lower holds it, too.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*base.model.parameters(), *base.model.buffers())}
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def save(tensor: Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = calls.count, storage  # held, so that its address is not given out again
        return storage

    def load(_: torch.UntypedStorage) -> Tensor:
        raise AssertionError("this graph is weighed, not run")

    with torch.autograd.graph.saved_tensors_hooks(save, load):
        yield saved


class _TensorByteCounter(TorchDispatchMode):
    """Follows the bytes of all tensors that a model makes, from each operation to the next.

    Attributes:
        totals: (operation, bytes) one after the other, before the first target module's call and after each.
    """

    def __init__(self, base: BaseModel, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.totals: list[list[tuple[str, int]]] = [[] for _ in range(len(base.targets) + 1)]
        self._calls = calls
        self._owned = {tensor.untyped_storage()._cdata for tensor in (*base.model.parameters(), *base.model.buffers())}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._owned:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.totals[self._calls.count].append((str(func), sum(size for _, size in self._alive.values())))
        return result
