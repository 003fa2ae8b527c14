"""A block's rows that have a label, and no others: the same numbers, and less to compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlora.export.tracing.labelled import LabelledRows
from dlora.export.tracing.trace import _traced

TOKENS, WIDTH, HEADS = 13, 8, 2
ROWS = torch.tensor([0, 3, 4, 12])


def attention(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    queries, keys = ((x @ part).view(TOKENS, HEADS, -1).transpose(0, 1) for part in weight.split(WIDTH, 1)[:2])
    scores = (queries @ keys.transpose(1, 2) + mask).softmax(-1)
    return (scores @ keys).transpose(0, 1).reshape(TOKENS, -1)


def in_halves(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    first, second = x.split(WIDTH // 2, 1)
    turned = torch.cat((-second, first), 1)[None]
    return (turned[:, :, 1:].squeeze(0) + turned.unsqueeze(2).expand(1, TOKENS, 3, WIDTH)[0, :, 2, 1:]) * weight[0, 0]


def normed(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,), weight[0, :WIDTH]) * x.pow(2).mean(-1, keepdim=True).rsqrt()


def where_infinite(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Scores of minus infinity, as some families have them, and all rows of x by a slice."""
    hidden = torch.full((TOKENS,), -torch.inf).where(torch.arange(TOKENS) > 3, 0.0)
    return (x[:, None, :].expand(-1, 2, -1)[:, 1] @ x.T + hidden).softmax(-1) @ x


def running_sum(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """No row by itself: it must be computed whole."""
    return x.cumsum(0).tanh() @ weight


def shared(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """A product that is needed whole is not computed twice."""
    product = x @ weight
    return product * product.sum(0)


@pytest.mark.parametrize(
    ("compute", "computed_whole"),
    [
        (attention, []), (in_halves, []), (normed, []), (where_infinite, []), (shared, []),
        (running_sum, ["aten.cumsum.default"]),
    ],
)  # fmt: skip
def test_rows_are_those_of_all_that_is_computed(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor], computed_whole: list[str]
) -> None:
    random = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(TOKENS, WIDTH, generator=random, dtype=torch.float64),
        "weight": torch.randn(WIDTH, 3 * WIDTH, generator=random, dtype=torch.float64),
        "mask": torch.full((TOKENS, TOKENS), -1e9, dtype=torch.float64).triu(1),
    }
    open_sizes = {"x": {0: "positions"}, "mask": {0: "positions", 1: "positions"}}
    traced = _traced(lambda *tensors: [compute(*tensors)], given, open_sizes, ["y"])  # as blocks are traced
    (output,) = (node.args[0][0] for node in traced.graph.nodes if node.op == "output")
    index = torch.full((TOKENS,), len(ROWS)).index_put((ROWS,), torch.arange(len(ROWS)))
    labelled = LabelledRows(given, ROWS, index, TOKENS)
    given["x"].requires_grad_()
    found = labelled.of(output)
    assert torch.allclose(found, compute(**given)[ROWS], rtol=1e-12)
    assert labelled.computed_whole == computed_whole
    grads = [torch.autograd.grad(y.square().sum(), given["x"])[0] for y in (found, compute(**given)[ROWS])]
    assert torch.allclose(*grads, rtol=1e-12)
