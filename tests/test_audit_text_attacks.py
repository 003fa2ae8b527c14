"""Attacks on texts from what crossed: each solves what is planted for it, and not what it cannot solve."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY
from tiny import TinyFactory
from torch import Tensor

from dlora.cloud.audit.nearest_neighbour import embedding_table, nearest, nearest_tokens
from dlora.cloud.model.parts import ModelParts

LENGTHS = [7, 1, 12, 9, 12]
TOKENS = sum(LENGTHS)
WIDTH = 64  # as many times smaller than a real model as its vocabulary


@pytest.fixture(scope="module")
def parts(tiny: TinyFactory) -> ModelParts:
    return ModelParts(tiny(blocks=4, hidden_size=WIDTH, seed=3).base)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_ids(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=seeded(seed))


def rounded(hidden: Tensor, dtype: str) -> Tensor:
    """As the wire's codecs round: int8 has a scale for each row."""
    if dtype == "fp16":
        return hidden.half()
    scales = hidden.abs().amax(1, keepdim=True) / 127
    return (hidden / scales).round() * scales


def share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())


def test_nearest_neighbour_reads_embeddings_rounded_and_with_noise(parts: ModelParts) -> None:
    ids, table = some_ids(), embedding_table(parts.base)
    sent = table[ids]
    noise = 0.3 * sent.square().mean().sqrt() * torch.randn(sent.shape, generator=seeded())
    for seen in (sent, rounded(sent, "fp16"), rounded(sent, "int8"), sent + noise):
        assert torch.equal(nearest_tokens(seen, table), ids)
    assert nearest(sent, table, 1).distances.max() == 0


def test_nearest_neighbour_does_not_read_hidden_states(parts: ModelParts) -> None:
    ids, table = some_ids(), embedding_table(parts.base)
    with torch.no_grad():
        hidden = torch.cat([parts.run(rows[None], end=2)[0] for rows in table[ids].split(LENGTHS)])
    assert share(nearest_tokens(hidden, table), ids) < 0.6


def test_nearest_neighbour_gives_what_all_distances_give_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around an offset that is large beside the differences, and in half precision, too."""
    module = "dlora.cloud.audit.nearest_neighbour"
    monkeypatch.setattr(f"{module}._VOCABULARY_AT_ONCE", 10)
    monkeypatch.setattr(f"{module}._ROWS_AT_ONCE", 4)
    table = torch.randn(33, 8, generator=seeded()) + 100.0
    rows = torch.randn(9, 8, generator=seeded(1)) + 100.0
    for entries in (table, table.to(torch.bfloat16)):
        distances = (rows[:, None] - entries.float()).norm(dim=2)
        for count in (1, 12, 33, 50):
            wanted = distances.topk(min(count, 33), largest=False)
            found = nearest(rows, entries, count)
            assert torch.allclose(found.distances, wanted.values)
            assert found.ids.dtype == torch.int64
    assert nearest(rows[:0], table, 3).ids.shape == (0, 3)
