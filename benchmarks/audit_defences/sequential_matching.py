"""Sequential matching: hidden states from after the first blocks are turned back into tokens, one after another.

A causal block's output at a position depends on the tokens up to there and on nothing else. Who knows the blocks and
the tokens before runs candidates through them: the one whose hidden state is closest to what crossed is the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from dlora.cloud.audit.nearest_neighbour import embedding_table, nearest
from dlora.cloud.model.cache import PartCache
from dlora.cloud.model.parts import ModelParts
from dlora.protocol.errors import ExportError

from .ridge_probe import RidgeProbe, run_blocks

_FIRST: Final = 16
_SHORT: Final = 128
_LONG: Final = 1024
_LONGEST: Final = 8192
_OTHERS: Final = 64  # candidates that the best one is compared with
_TOKENS_AT_ONCE: Final = 65536  # of candidates and what comes before each of them, for the memory's sake
# When a candidate is taken for the token itself; ``are_found`` has the reasons.
_CLOSE: Final = 0.1
_FAR: Final = 2.0
_DEVIATIONS: Final = 3.0
_LARGEST_COSINE: Final = 0.15
_TIMES_USUAL: Final = 2.0


class Matched(NamedTuple):
    """What was found for each token.

    Attributes:
        ids: int64 (tokens,).
        errors: float32 (tokens,), how far the best candidate is from what crossed, relative to its distance from the
            other candidates: near 0 for the token itself. With no blocks, the distance itself.
        found: bool (tokens,), whether the best candidate looks like the token itself, and not like a neighbour of it.
        candidates: int64 (tokens,), how many were tried.
    """

    ids: Tensor
    errors: Tensor
    found: Tensor
    candidates: Tensor


@torch.no_grad()
def match_tokens(
    hidden: Tensor,
    lengths: Sequence[int],
    parts: ModelParts,
    blocks: int,
    *,
    most_candidates: int | None = None,
    largest_error: float | None = None,
    probe: RidgeProbe | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Matched:
    """Find the tokens of sequences whose hidden states after the first ``blocks`` blocks crossed.

    A probe's 16 best tokens are tried first, then 128, then 1,024, then the whole vocabulary, until one of them looks
    like the token itself. After a token that was not found in the whole vocabulary, its sequence gets no such search
    again: what is compared after a wrong token no longer fits.

    Args:
        hidden: (tokens, width), all sequences one after another, as they crossed: rounded, or with noise.
        lengths: of the sequences.
        blocks: 0 where embeddings crossed: then it is the nearest neighbour.
        most_candidates: about so many for each token; None: up to the whole vocabulary. First tokens share theirs.
        largest_error: of the token itself, for who knows how rows were rounded: 0.01 is ample for fp16. None: what is
            left may be noise, and is judged by where it points; near a sequence's beginning that may be wrong.
        probe: fitted for the same blocks; None: one is fitted here.
        on_progress: called with the number of tokens done and of all.
    """
    report = on_progress or (lambda _done, _all: None)
    if sum(lengths) != len(hidden) or min(lengths, default=1) < 1:
        raise ValueError(f"sequences of {sum(lengths)} tokens, none of them empty, cannot have {len(hidden)} rows")
    if blocks == 0:
        guess = nearest(hidden, embedding_table(parts.base), 1)
        report(len(hidden), len(hidden))
        every = torch.full_like(guess.ids[:, 0], len(parts.base.token_embedding.weight))
        return Matched(guess.ids[:, 0], guess.distances[:, 0], torch.ones_like(every, dtype=torch.bool), every)
    probe = probe or RidgeProbe.fit(parts, blocks)
    rows = probe.limit(hidden.to(parts.base.device))
    most = len(probe.table) if most_candidates is None else most_candidates
    short = probe.shortlist(rows, min(_FIRST, most))  # of all rows in one go, which is much faster than one by one
    result = Matched(
        torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows)),
        torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.int64),
    )  # fmt: skip
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    firsts = ends - torch.tensor(lengths, dtype=torch.int64)
    done = 0
    if len(lengths):
        # Before first tokens there is nothing: all of them are compared with the same candidates.
        tried = short[firsts.to(rows.device)]
        _match(rows, firsts, tried, _Prefix(parts, blocks, probe.table), probe, most, result, largest_error)
        done = len(lengths)
        report(done, len(rows))
    after: dict[tuple[int, ...], list[int]] = {}
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        prefix = _Prefix(parts, blocks, probe.table)
        lost = False
        for position in range(first + 1, end):
            lost = lost or not result.found[position - 1]
            prefix.append(int(result.ids[position - 1]))
            wide = min(most, _LONG) if lost else most
            # What another sequence has after the same tokens, such as a template's, is looked for first.
            before = tuple(result.ids[first:position].tolist())
            known = torch.tensor(after.setdefault(before, []), dtype=torch.int64, device=rows.device)
            tried = torch.cat([short[position], known])
            _match(rows, torch.tensor([position]), tried, prefix, probe, wide, result, largest_error)
            if result.found[position]:
                after[before].append(int(result.ids[position]))
            done += 1
            report(done, len(rows))
    return result


def _match(
    rows: Tensor,
    positions: Tensor,
    short: Tensor,
    prefix: _Prefix,
    probe: RidgeProbe,
    most: int,
    result: Matched,
    largest_error: float | None,
) -> None:
    """Find the tokens at positions int64 (count,) that all come after ``prefix``; they are written into ``result``.

    ``short``: int64, of any shape: what is tried first.
    """
    search = _Search(rows[positions.to(rows.device)], prefix, probe)
    search.try_tokens(short)
    found, errors = _judge(search, result, largest_error)
    for count in (_SHORT, _LONG, _LONGEST):
        if bool(found.all()) or int(search.tried.sum()) >= most:
            break
        search.widen(min(count, most))
        found, errors = _judge(search, result, largest_error)
    # All others, from the front: vocabularies are mostly in the order in which tokens were merged, frequent ones first.
    for piece in torch.arange(len(probe.table), device=rows.device).split(_LONGEST):
        if bool(found.all()) or int(search.tried.sum()) >= most:
            break
        search.try_tokens(piece)
        found, errors = _judge(search, result, largest_error)
    result.ids[positions] = search.ids.cpu()
    result.errors[positions] = errors
    result.found[positions] = found
    result.candidates[positions] = int(search.tried.sum())


def _judge(search: _Search, result: Matched, largest_error: float | None) -> tuple[Tensor, Tensor]:
    """``are_found`` of the search, on the CPU, beside what was found before.

    Where rounding is known, a smaller error is the token. Noise is alike in all rows: where a row is much further off
    than others were, noise is not the reason.
    """
    found, errors = (each.cpu() for each in search.are_found())
    if largest_error is not None:
        return errors < largest_error, errors
    usual = torch.cat([result.errors[result.found], errors]).median()
    return found & (errors < torch.clamp_min(_TIMES_USUAL * usual, _CLOSE)), errors


class _Search:
    """The candidates for rows that come after the same prefix, and the best of them for each row.

    Attributes:
        ids: int64 (rows,), the best ones; tried: bool (vocabulary,).
    """

    def __init__(self, rows: Tensor, prefix: _Prefix, probe: RidgeProbe) -> None:
        self.ids = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self.tried = torch.zeros(len(probe.table), dtype=torch.bool, device=rows.device)
        self._rows = rows
        self._prefix = prefix
        self._probe = probe
        self._best = torch.zeros_like(rows)  # hidden states of the best candidates
        self._distances = torch.full((len(rows),), torch.inf, device=rows.device)
        self._others = rows[:0]  # hidden states of some candidates

    def widen(self, count: int) -> None:
        """Try the ``count`` best tokens of each row, as far as they were not yet tried."""
        probe = self._probe
        if count >= len(self.tried):
            self.try_tokens(torch.arange(len(self.tried), device=self.tried.device))
            return
        # The probe knows nothing of the prefix, which moves hidden states. Half of the candidates are looked for from
        # the best of the others: what it lacks, brought back to the embedding, is mostly free of that.
        half = -(-count // 2)
        self.try_tokens(probe.shortlist(self._rows, half))
        lacking = probe.embeddings(self._rows) - probe.embeddings(self._best)
        self.try_tokens(nearest(probe.table[self.ids].float() + lacking, probe.table, count - half).ids)

    def try_tokens(self, ids: Tensor) -> None:
        """int64, any shape; each that was not yet tried."""
        ids = ids.unique()
        ids = ids[~self.tried[ids]]
        if not len(ids):
            return  # an empty tensor is split into one empty piece, which no block takes
        self.tried[ids] = True
        for piece in ids.split(self._prefix.candidates_at_once):
            states = self._probe.limit(self._prefix.run(piece))
            distances = torch.cdist(self._rows, states, compute_mode="donot_use_mm_for_euclid_dist")
            closest, places = distances.min(1)
            better = closest < self._distances
            self._distances = torch.where(better, closest, self._distances)
            self.ids = torch.where(better, piece[places], self.ids)
            self._best = torch.where(better[:, None], states[places], self._best)
            self._others = torch.cat([self._others, states[: _OTHERS - len(self._others)]])

    def are_found(self) -> tuple[Tensor, Tensor]:
        """Whether the best candidate of each row is the token itself, and its error: bool and float32, both (rows,).

        If it is, what is left is rounding and noise. Either that is small beside the distances between candidates, or
        it points nowhere: its cosine with the way to another candidate is 0 but for 1 / sqrt(width). If it is a
        neighbour of the token, what is left leads to the token, which lies among the others: the cosine is about 1/2.
        Where noise is more than twice the distances, nothing can be told.
        """
        left = self._rows - self._best
        ways = self._others - self._best[:, None]  # (rows, others, width)
        far = ways.norm(dim=2)
        typical = far.median(1).values.clamp_min(1e-12)
        errors = left.norm(dim=1) / typical
        cosines = (ways @ left[:, :, None])[:, :, 0] / (far * left.norm(dim=1, keepdim=True)).clamp_min(1e-12)
        bound = min(_LARGEST_COSINE, _DEVIATIONS / left.shape[1] ** 0.5)
        return (errors < _CLOSE) | ((errors < _FAR) & (cosines.mean(1) < bound)), errors


class _Prefix:
    """The tokens that were found of a sequence; candidates are run after them.

    With a cache where the family can: else all is run again for each candidate.
    """

    def __init__(self, parts: ModelParts, blocks: int, table: Tensor) -> None:
        self._parts = parts
        self._blocks = blocks
        self._table = table
        self._embeddings = table[:0]
        self._cache = _new_cache(parts, blocks)

    @property
    def candidates_at_once(self) -> int:
        return max(1, min(_LONG, _TOKENS_AT_ONCE // (len(self._embeddings) + 1)))

    def append(self, token: int) -> None:
        embedding = self._table[token : token + 1]
        self._embeddings = torch.cat([self._embeddings, embedding])
        if self._cache is not None:
            self._parts.run(embedding[None], end=self._blocks, cache=self._cache)

    def run(self, candidates: Tensor) -> Tensor:
        """Tokens int64 (candidates,) to the hidden states of each after the prefix, float32 (candidates, width)."""
        embeddings = self._table[candidates][:, None]
        if self._cache is None or self._cache.length == 0:
            before = self._embeddings.expand(len(candidates), -1, -1)
            return run_blocks(self._parts, torch.cat([before, embeddings], 1), self._blocks)[:, -1]
        cache = self._parts.new_cache(end=self._blocks)
        layers: list[Any] = list(self._cache.decoder_cache.layers)  # that all keep plain keys and values was tried
        for index, layer in enumerate(layers):
            keys, values = (states.expand(len(candidates), -1, -1, -1) for states in (layer.keys, layer.values))
            cache.decoder_cache.update(keys, values, index)
        cache.length = self._cache.length
        return self._parts.run(embeddings, end=self._blocks, cache=cache)[:, 0].float()


def _new_cache(parts: ModelParts, blocks: int) -> PartCache | None:
    try:
        return parts.new_cache(end=blocks)
    except ExportError:
        return None
