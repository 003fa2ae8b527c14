"""Sequential matching: hidden states from after the first blocks are turned back into tokens, one after another.

A causal block's output at a position depends on the tokens up to there and on nothing else. Who knows the blocks and
the tokens before runs candidates through them: the one whose hidden state is closest to what crossed is the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from dlora.cloud.audit.nearest_neighbour import nearest
from dlora.cloud.model.parts import ModelParts

from .ridge_probe import RidgeProbe

_COUNTS: Final = (16, 128, 1024, 8192)  # of candidates; then the whole vocabulary
_OTHERS: Final = 64  # candidates that the best one is compared with
_TOKENS_AT_ONCE: Final = 65536  # of candidates and what comes before each of them, for the memory's sake
_FP16_ERROR: Final = 0.01  # of the right token, relative to the distance of others: far above fp16's rounding


@torch.no_grad()
def match_tokens(crossed: Tensor, lengths: Sequence[int], parts: ModelParts, blocks: int, probe: RidgeProbe) -> Tensor:
    """The tokens, int64 (tokens,), of sequences whose hidden states after the first ``blocks`` blocks crossed in fp16.

    Args:
        crossed: (tokens, width), all sequences one after another.
        lengths: of the sequences.
        probe: fitted for the same blocks.
    """
    found = []
    for rows in probe.limit(crossed.to(parts.base.device)).split(list(lengths)):
        prefix, is_lost = _Prefix(parts, blocks, probe), False
        for row in rows:
            token, is_right = _match(row, prefix, probe, _COUNTS[2] if is_lost else len(probe.table))
            is_lost = is_lost or not is_right  # what is compared after a wrong token no longer fits
            prefix.append(token)
            found.append(token)
    return torch.tensor(found)


def _match(row: Tensor, prefix: _Prefix, probe: RidgeProbe, most: int) -> tuple[int, bool]:
    """The token of a row (width,) that comes after ``prefix``, and whether what is left is no more than rounding.

    The probe's best tokens are tried first, then more of them, ``most`` at the most.
    """
    tried = torch.zeros(len(probe.table), dtype=torch.bool, device=row.device)
    token, best, distance, others = 0, row, torch.inf, row[None, :0].expand(0, len(row))
    for count in (*_COUNTS, len(tried)):
        if int(tried.sum()) >= most:
            break
        ids = _candidates(row, token, best, probe, count).unique()
        for piece in ids[~tried[ids]].split(prefix.candidates_at_once):
            if not len(piece):
                continue  # an empty tensor is split into one empty piece, which no block takes
            tried[piece] = True
            states = prefix.run(piece)
            others = torch.cat([others, states[: _OTHERS - len(others)]])
            distances = (states - row).norm(dim=1)
            place = int(distances.argmin())
            if float(distances[place]) < distance:
                token, best, distance = int(piece[place]), states[place], float(distances[place])
            if distance < _FP16_ERROR * float((others - best).norm(dim=1).median()):
                return token, True
    return token, False


def _candidates(row: Tensor, token: int, best: Tensor, probe: RidgeProbe, count: int) -> Tensor:
    """About ``count`` tokens, int64 (count,), that may be the row's; ``token``: the best so far, with its state."""
    if count == _COUNTS[0] or count >= len(probe.table):
        return probe.shortlist(row[None], count)[0]
    # The probe knows nothing of the prefix, which moves hidden states. Half of the candidates are looked for from the
    # best of the others: what it lacks, brought back to the embedding, is mostly free of that.
    lacking = probe.embeddings(row[None]) - probe.embeddings(best[None])
    near = nearest(probe.table[token].float() + lacking, probe.table, count // 2).ids
    return torch.cat([probe.shortlist(row[None], count // 2)[0], near[0]])


class _Prefix:
    """The tokens that were found of a sequence; candidates are run after them."""

    def __init__(self, parts: ModelParts, blocks: int, probe: RidgeProbe) -> None:
        self._parts = parts
        self._blocks = blocks
        self._probe = probe
        self._cache = parts.new_cache(end=blocks)

    @property
    def candidates_at_once(self) -> int:
        return max(1, min(_COUNTS[2], _TOKENS_AT_ONCE // (self._cache.length + 1)))

    def append(self, token: int) -> None:
        self._parts.run(self._probe.table[token][None, None], end=self._blocks, cache=self._cache)

    def run(self, candidates: Tensor) -> Tensor:
        """Tokens int64 (candidates,) to the hidden states of each after the prefix, float32 (candidates, width)."""
        cache = self._parts.new_cache(end=self._blocks)
        layers: list[Any] = list(self._cache.decoder_cache.layers) if self._cache.length else []
        for index, layer in enumerate(layers):
            keys, values = (states.expand(len(candidates), -1, -1, -1) for states in (layer.keys, layer.values))
            cache.decoder_cache.update(keys, values, index)
        cache.length = self._cache.length
        states = self._parts.run(self._probe.table[candidates][:, None], end=self._blocks, cache=cache)
        return self._probe.limit(states[:, 0])
