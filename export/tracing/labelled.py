"""The last block, computed for labelled tokens only. For the others it computes keys and values, which those need.

The family's own code does not know that. So its traced graph is computed again, from its end: each node is asked for
its wanted rows, and asks its operands for theirs. What is not known to work row by row is computed whole, and its rows
are taken from that; so is what another node needs whole, such as the product that gives queries, keys and values in
one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from dlora.protocol.text import first_line

from .aten import COPIES, aten
from .modules import ROW_BY_ROW

_ELEMENTWISE: Final = (aten._to_copy.default, *COPIES)
_INSTEAD: Final[dict[Any, Callable[..., Any]]] = {**ROW_BY_ROW, aten.view.default: torch.reshape}
"""What computes some operators: rows may lie in another order in memory than all of them did."""


class LabelledRows:
    """A traced forward pass, whose nodes have example values, computed for some rows of its output.

    Args:
        given: the inputs of the graph, by their ``meta["name"]``; ``x`` (tokens, width) is among them.
        label_positions: int64 (labelled,): which rows are wanted, each once.
        label_index: int64 (tokens,): which of them each token's row is; ``labelled`` where it is none.
        tokens: this dimension's size in the graph, which no other one has.

    Attributes:
        computed_whole: the operators whose rows were taken from all that they give, though no other node needs that.
    """

    def __init__(self, given: Mapping[str, Tensor], label_positions: Tensor, label_index: Tensor, tokens: int) -> None:
        self.computed_whole: list[str] = []
        self._given = given
        self._label_positions = label_positions
        self._label_index = label_index
        self._tokens = tokens
        self._needed_whole: frozenset[fx.Node] = frozenset()
        self._values: dict[fx.Node, Any] = {}
        self._rows: dict[tuple[fx.Node, int], Any] = {}

    def of(self, node: fx.Node) -> Tensor:
        """The wanted rows of a node (tokens, …): (labelled, …)."""
        try:
            self._rows_of(node, 0)  # to find out what is needed whole; a trace drops what nothing uses
        except Exception as error:  # of a rule, for what no known family does: then all is computed
            self.computed_whole.append(f"{type(error).__name__}: {first_line(error)}")
            return self._taken(node, 0)
        self._needed_whole = frozenset(self._values)
        self._values, self._rows = {}, {}
        found: Tensor = self._rows_of(node, 0)
        return found

    def _value(self, argument: Any) -> Any:
        """What an argument is for all rows: a node's value, or a list of some."""
        return fx.node.map_arg(argument, self._value_of)

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "placeholder":
                self._values[node] = self._given[node.meta["name"]]
            elif node.target is aten.sym_size.int:  # for which nothing need be computed
                size = _sizes(_operand(node))[_axis(node, 1)]
                self._values[node] = self._given["x"].shape[0] if size == self._tokens else size
            elif node.op == "get_attr":
                self._values[node] = getattr(node.graph.owning_module, str(node.target))
            else:
                self._values[node] = self._call(node, self._value(node.args))
        return self._values[node]

    def _call(self, node: fx.Node, args: Sequence[Any]) -> Any:
        target: Any = node.target
        return _INSTEAD.get(target, target)(*args, **self._value(node.kwargs))

    def _rows_of(self, node: fx.Node, axis: int) -> Any:
        """What a node gives, where of its tokens along ``axis`` there are only the wanted ones."""
        key = node, axis
        if key not in self._rows:
            by_rows = None
            if node.op == "call_function" and node not in self._needed_whole:
                by_rows = self._by_rows(node, axis)
                if by_rows is None:
                    self.computed_whole.append(str(node.target))
            self._rows[key] = self._taken(node, axis) if by_rows is None else by_rows
        return self._rows[key]

    def _taken(self, node: fx.Node, axis: int) -> Tensor:
        """Of what is computed whole."""
        given = self._value_of(node), self._label_positions, self._label_index, axis
        taken: Tensor = _Take.apply(*given)  # type: ignore[no-untyped-call]
        return taken

    def _by_rows(self, node: fx.Node, axis: int) -> Any:
        """None where nothing is known of the operator, or not of its rows along this axis."""
        if node.target in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._call(node, [self._aligned(each, axis - _dims(node)) for each in node.args])
        rule = _RULES.get(node.target)
        return None if rule is None else rule(self, node, axis)

    def _aligned(self, operand: Any, from_end: int) -> Any:
        """An operand of an elementwise operator, which may have fewer axes, or one value for all rows."""
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], Tensor):
            return self._value(operand)
        axis = _dims(operand) + from_end
        is_same_for_all = axis < 0 or _sizes(operand)[axis] != self._tokens
        return self._value(operand) if is_same_for_all else self._rows_of(operand, axis)

    # -- the operators of blocks -----------------------------------------------------------------------------------

    def _first_operand(self, node: fx.Node, axis: int) -> Any:
        """An operator that has the rows of its first operand along the same axis."""
        return self._call(node, [self._rows_of(_operand(node), axis), *self._value(node.args[1:])])

    def _row_by_row(self, node: fx.Node, axis: int) -> Any:
        return self._first_operand(node, axis) if axis == 0 else None

    def _along_another(self, node: fx.Node, axis: int) -> Any:
        """Likewise, and works along an axis of its own."""
        return self._first_operand(node, axis) if _axis(node, 1) % _dims(node) != axis else None

    def _slice(self, node: fx.Node, axis: int) -> Any:
        """Along the rows themselves only where all of them stay."""
        if _axis(node, 1) % _dims(node) != axis:
            return self._first_operand(node, axis)
        keeps_all = _sizes(node) == _sizes(_operand(node))
        return self._rows_of(_operand(node), axis) if keeps_all else None

    def _mm(self, node: fx.Node, axis: int) -> Any:
        one, other = (_operand(node, place) for place in (0, 1))
        columns = _dims(node) - 1  # a product has rows of its left operand, columns of its right one, a batch of both
        left = self._rows_of(one, axis) if axis != columns else self._value(one)
        right = self._rows_of(other, axis) if axis != columns - 1 else self._value(other)
        return self._call(node, [left, right])

    def _permute(self, node: fx.Node, axis: int) -> Any:
        order: Any = node.args[1]
        return self._call(node, [self._rows_of(_operand(node), order[axis] % _dims(node)), order])

    def _view(self, node: fx.Node, axis: int) -> Any:
        sizes_in, sizes_out = _sizes(_operand(node)), _sizes(node)
        before = math.prod(sizes_out[:axis])
        same = [
            place
            for place, size in enumerate(sizes_in)
            if size == self._tokens and math.prod(sizes_in[:place]) == before
        ]
        return self._call(node, [self._rows_of(_operand(node), same[0]), self._shape(node, axis)]) if same else None

    def _expand(self, node: fx.Node, axis: int) -> Any:
        return self._call(node, [self._aligned(_operand(node), axis - _dims(node)), self._shape(node, axis)])

    def _shape(self, node: fx.Node, axis: int) -> list[Any]:
        """The sizes that a node names, where there are only the wanted rows."""
        shape = list(self._value(node.args[1]))
        shape[axis] = self._label_positions.shape[0]
        return shape

    def _unsqueeze(self, node: fx.Node, axis: int) -> Any:
        added = _axis(node, 1) % _dims(node)
        return self._first_operand(node, axis - (added < axis)) if axis != added else None

    def _squeeze(self, node: fx.Node, axis: int) -> Any:
        operand, dropped = _operand(node), _axes(node)
        left = [place for place in range(_dims(operand)) if place not in dropped or _sizes(operand)[place] != 1]
        return self._first_operand(node, left[axis])

    def _reduce(self, node: fx.Node, axis: int) -> Any:
        dims, keeps, reduced = _dims(_operand(node)), len(node.args) > 2 and bool(node.args[2]), _axes(node)
        left = range(dims) if keeps else [place for place in range(dims) if place not in reduced]
        return self._first_operand(node, left[axis]) if left[axis] not in reduced else None

    def _select_one(self, node: fx.Node, axis: int) -> Any:
        chosen = _axis(node, 1) % _dims(_operand(node))
        return self._first_operand(node, axis + (chosen <= axis))

    def _cat(self, node: fx.Node, axis: int) -> Any:
        joined = _axis(node, 1) % _dims(node)
        parts: Any = node.args[0]
        return None if joined == axis else self._call(node, [[self._rows_of(each, axis) for each in parts], joined])

    def _getitem(self, node: fx.Node, axis: int) -> Any:
        """One of several outputs, of an operator that has the rows of its operand."""
        several, index = node.args
        assert isinstance(several, fx.Node)
        dims = _dims(_operand(several))
        if several.target is aten.native_layer_norm.default:
            normalised: Any = several.args[1]
            works_on = range(dims - len(normalised), dims)
        elif several.target in (aten.split.Tensor, aten.split_with_sizes.default):
            works_on = range(_axis(several, 2) % dims, _axis(several, 2) % dims + 1)
        else:
            return None
        if axis in works_on:
            return None
        key = several, axis
        if key not in self._rows:
            self._rows[key] = self._first_operand(several, axis)
        return self._rows[key][index]


class _Take(torch.autograd.Function):
    """Some rows of a tensor along an axis. The gradient takes rows, too, with one of zeros for those that were not
    taken: engines are good at that, and not at adding into rows."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, label_positions: Tensor, label_index: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(label_index)
        ctx.axis = axis
        return torch.index_select(whole, axis, label_positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (label_index,) = ctx.saved_tensors
        shape = list(grad.shape)
        shape[ctx.axis] = 1
        with_zeros = torch.cat((grad, grad.new_zeros(shape)), ctx.axis)
        return torch.index_select(with_zeros, ctx.axis, label_index), None, None, None


def _operand(node: fx.Node, place: int = 0) -> fx.Node:
    operand = node.args[place]
    assert isinstance(operand, fx.Node)
    return operand


def _axis(node: fx.Node, place: int) -> int:
    """The argument that says along which axis an operator works; 0 where it is left out."""
    axis: Any = node.args[place] if len(node.args) > place else 0
    return int(axis)


def _axes(node: fx.Node) -> set[int]:
    """Likewise, of its operand, where there may be several."""
    axes: Any = node.args[1]
    return {axis % _dims(_operand(node)) for axis in axes}


def _dims(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _sizes(node: fx.Node) -> list[int]:
    """As they were when the graph was traced."""
    return [size if isinstance(size, int) else size.node.hint for size in node.meta["val"].shape]


_RULES: Final[dict[Any, Callable[[LabelledRows, fx.Node, int], Any]]] = {
    **dict.fromkeys(ROW_BY_ROW, LabelledRows._row_by_row),
    aten.mm.default: LabelledRows._mm,
    aten.bmm.default: LabelledRows._mm,
    aten.permute.default: LabelledRows._permute,
    aten.view.default: LabelledRows._view,
    aten.expand.default: LabelledRows._expand,
    aten.unsqueeze.default: LabelledRows._unsqueeze,
    aten.squeeze.dims: LabelledRows._squeeze,
    aten.mean.dim: LabelledRows._reduce,
    aten.sum.dim_IntList: LabelledRows._reduce,
    aten.select.int: LabelledRows._select_one,
    aten.cat.default: LabelledRows._cat,
    aten.slice.Tensor: LabelledRows._slice,
    aten._softmax.default: LabelledRows._along_another,
    operator.getitem: LabelledRows._getitem,
}
