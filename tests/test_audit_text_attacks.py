"""Attacks on texts from what crossed: each solves what is planted for it, and not what it cannot solve."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY
from tiny import TinyFactory
from torch import Tensor

from dlora.cloud.audit.defences import after_blocks, embeddings_of, loss_with, with_noise
from dlora.cloud.audit.epoch_averaging import average_repeats
from dlora.cloud.audit.nearest_neighbour import nearest, nearest_tokens
from dlora.cloud.audit.ridge_probe import RidgeProbe, embedding_table
from dlora.cloud.audit.sequential_matching import Matched, match_tokens
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
    sent = embeddings_of(parts.base, ids)
    for seen in (sent, rounded(sent, "fp16"), rounded(sent, "int8"), with_noise(sent, 0.3, seeded())):
        assert torch.equal(nearest_tokens(seen, table), ids)
    assert nearest(sent, table, 1).distances.max() == 0


def test_nearest_neighbour_does_not_read_hidden_states(parts: ModelParts) -> None:
    ids = some_ids()
    hidden = after_blocks(parts, ids, LENGTHS, 2)
    assert share(nearest_tokens(hidden, embedding_table(parts.base)), ids) < 0.6


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


def test_ridge_probe_reads_hidden_states_after_a_block(parts: ModelParts) -> None:
    ids = some_ids()
    probe = RidgeProbe.fit(parts, 1, tokens=4096)
    hidden = after_blocks(parts, ids, LENGTHS, 1)
    assert share(probe.guess(hidden), ids) > 0.7  # by chance it is 0.01
    hidden[0, 5] = 1e4  # a massive activation costs its own row at most
    assert share(probe.guess(hidden), ids) > 0.7
    again = RidgeProbe.fit(parts, 1, tokens=4096)
    assert torch.equal(again.matrix, probe.matrix)


def test_ridge_probe_does_not_read_secretly_rotated_embeddings(parts: ModelParts) -> None:
    ids = some_ids()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=seeded(5))).Q
    probe = RidgeProbe.fit(parts, 1, tokens=4096)
    assert share(probe.guess(embeddings_of(parts.base, ids) @ rotation), ids) < 0.2


def assert_all_found(matched: Matched, ids: Tensor) -> None:
    assert torch.equal(matched.ids, ids)
    assert bool(matched.found.all())


@pytest.mark.parametrize("blocks", [0, 1, 2, 4])
def test_sequential_matching_reads_every_token(parts: ModelParts, blocks: int) -> None:
    ids, steps = some_ids(), []
    hidden = after_blocks(parts, ids, LENGTHS, blocks)
    for seen in (hidden, rounded(hidden, "fp16"), rounded(hidden, "int8")):
        matched = match_tokens(
            seen, LENGTHS, parts, blocks, on_progress=lambda done, of: steps.append((done, of))
        )  # fmt: skip
        assert_all_found(matched, ids)
    assert steps[-1] == (TOKENS, TOKENS)


def test_sequential_matching_goes_on_where_the_probe_is_of_no_use(parts: ModelParts) -> None:
    """With a probe of other blocks the short list holds any tokens; then the whole vocabulary is tried."""
    ids = some_ids()
    hidden = after_blocks(parts, ids, LENGTHS, 2)
    probe = RidgeProbe.fit(parts, 2, tokens=1024)
    useless = RidgeProbe(probe.table, probe.centre, probe.scale, torch.zeros_like(probe.matrix), probe.offset)
    assert_all_found(match_tokens(hidden, LENGTHS, parts, 2, probe=useless), ids)
    few = match_tokens(hidden, LENGTHS, parts, 2, probe=useless, most_candidates=3)
    assert few.candidates.sort().values[: TOKENS - len(LENGTHS)].max() <= 2 * 3
    assert share(few.ids, ids) < 0.5


def test_sequential_matching_runs_a_family_without_a_cache(tiny: TinyFactory) -> None:
    parts = ModelParts(tiny("openai-gpt", blocks=3, hidden_size=WIDTH).base)
    ids = some_ids()
    assert_all_found(match_tokens(after_blocks(parts, ids, LENGTHS, 2), LENGTHS, parts, 2), ids)


def test_sequential_matching_does_not_read_what_other_blocks_made(parts: ModelParts, tiny: TinyFactory) -> None:
    ids = some_ids()
    other = ModelParts(tiny(blocks=4, hidden_size=WIDTH, seed=4).base)
    hidden = after_blocks(other, ids, LENGTHS, 2)
    assert share(match_tokens(hidden, LENGTHS, parts, 2).ids, ids) < 0.2
    with pytest.raises(ValueError, match="none of them empty"):
        match_tokens(hidden, [TOKENS, 0], parts, 2)
    with pytest.raises(ValueError, match="cannot have"):
        match_tokens(hidden, [3], parts, 2)


EPOCHS = 40
NOISE = 2.5
TEXTS = [60, 48, 60]  # so long that at this width the same text is known through the noise


def in_epochs(parts: ModelParts, ids: Tensor, *, fresh: bool) -> list[Tensor]:
    """The texts in the same order in each epoch."""
    texts = embeddings_of(parts.base, ids).split(TEXTS)
    return [
        with_noise(rows, NOISE, seeded(100 * epoch * fresh + text))
        for epoch in range(EPOCHS)
        for text, rows in enumerate(texts)
    ]


def of_average(parts: ModelParts, observations: list[Tensor], ids: Tensor) -> tuple[float, float]:
    """Share of the tokens that are read in the first epoch alone, and in the means of the groups."""
    table, texts = embedding_table(parts.base), len(TEXTS)
    groups = average_repeats(observations)
    assert [indices for indices, _ in groups] == [list(range(text, EPOCHS * texts, texts)) for text in range(texts)]
    alone = torch.cat([nearest_tokens(rows, table) for rows in observations[:texts]])
    averaged = torch.cat([nearest_tokens(mean, table) for _, mean in groups])
    return share(alone, ids), share(averaged, ids)


def test_averaging_reads_through_noise_that_is_fresh_each_time(parts: ModelParts) -> None:
    ids = some_ids(tokens=sum(TEXTS))
    alone, averaged = of_average(parts, in_epochs(parts, ids, fresh=True), ids)
    assert alone < 0.7
    assert averaged == 1.0


def test_averaging_gains_nothing_where_noise_is_the_same_each_time(parts: ModelParts) -> None:
    ids = some_ids(tokens=sum(TEXTS))
    alone, averaged = of_average(parts, in_epochs(parts, ids, fresh=False), ids)
    assert averaged == pytest.approx(alone, abs=0.01)  # the mean rounds
    assert averaged < 0.7


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_averaging_keeps_different_texts_apart(parts: ModelParts, noise: float) -> None:
    """Also where they begin alike, and in another token alone where noise lets it be seen."""
    texts = [some_ids(seed, 12) for seed in range(30)]
    begins_alike = texts[0].clone()
    begins_alike[6:] = texts[1][6:]
    texts.append(begins_alike)
    if noise < 1.0:
        differs = texts[2].clone()
        differs[5] = (differs[5] + 1) % VOCABULARY
        texts.append(differs)
    seen = [with_noise(embeddings_of(parts.base, ids), noise, seeded(index)) for index, ids in enumerate(texts)]
    assert [indices for indices, _ in average_repeats(seen)] == [[index] for index in range(len(texts))]
    assert average_repeats([]) == []


def test_defences_cost_what_they_change(parts: ModelParts) -> None:
    """Without noise the rest of the model gives the model's own loss; noise makes it another."""
    ids = some_ids()
    rows = torch.tensor([0, 3, 9, TOKENS - 2])
    labels = ids[rows + 1]
    last = torch.cat([parts.base.model(input_ids=each[None]).logits[0] for each in ids.split(LENGTHS)])
    wanted = float(torch.nn.functional.cross_entropy(last[rows], labels))
    for blocks in (0, 1, 4):
        hidden = after_blocks(parts, ids, LENGTHS, blocks)
        assert loss_with(parts, hidden, LENGTHS, rows, labels, blocks) == pytest.approx(wanted, rel=1e-4)
        noisy = with_noise(hidden, 1.0, seeded())
        assert (noisy - hidden).square().mean() / hidden.square().mean() == pytest.approx(1.0, rel=0.1)
        assert loss_with(parts, noisy, LENGTHS, rows, labels, blocks) != pytest.approx(wanted, rel=1e-3)
