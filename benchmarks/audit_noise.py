"""Noise on the embeddings, attacked: what it hides of the text, what may be claimed for it, and what it costs.

It is no option of a device: an option is taken for protection, and this does not protect at a price that a model can
pay (docs/log/decisions/0051).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
from audit_averaging import average_repeats
from torch import Tensor
from torch.nn.functional import cross_entropy

from dlora.cloud.audit.finding import found_by
from dlora.cloud.audit.nearest_neighbour import embedding_table, nearest_tokens
from dlora.cloud.audit.scoring import Attack
from dlora.cloud.audit.text import score_tokens
from dlora.cloud.audit.truth import Truth
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import find_embedding, find_head
from dlora.cloud.model.parts import ModelParts

DELTA: Final = 1e-5
EPOCHS: Final = 10
MOST_TOKENS: Final = 4096  # of what is attacked


@dataclass(frozen=True)
class _Texts:
    """Some of the texts that crossed: ids int64 (tokens,), one text after another."""

    ids: Tensor
    lengths: list[int]

    def score(self, attack: str, ids: Tensor) -> Attack:
        return score_tokens(attack, [ids.cpu()], [self.ids], len(self.lengths))


@torch.no_grad()
def try_noise(times_rms: float, truth: Truth, base: BaseModel) -> dict[str, Any]:
    """Attack Gaussian noise of so many times the embeddings' root mean square, drawn anew each time that they cross.

    Returns: what may be claimed, the finding, and the base model's loss at next tokens with it and without.
    """
    parts, texts, table = ModelParts(base), _choose_texts(truth, MOST_TOKENS), embedding_table(base)
    hidden = find_embedding(base)(texts.ids.to(base.device)).to(base.dtype)
    draw = torch.Generator().manual_seed(0)
    deviation = times_rms * hidden.float().square().mean().sqrt()

    def noisy() -> Tensor:
        noise = torch.randn(hidden.shape, generator=draw).to(hidden.device)
        return (hidden.float() + deviation * noise).to(hidden.dtype)

    epochs = [noisy() for _ in range(EPOCHS)]
    attacks = [
        texts.score("nearest neighbour", nearest_tokens(epochs[0], table)),
        texts.score(f"mean of {EPOCHS} epochs, of texts that are alike", _averaged(epochs, texts, table)),
        texts.score(f"mean of {EPOCHS} epochs, of texts as long", _averaged_by_length(epochs, texts, table)),
    ]
    epsilon = epsilon_of(_largest_distance(table), float(deviation))
    return {
        "claim": (
            f"ε ≤ {math.ceil(10 * epsilon) / 10:,.1f} for each token each time that it crosses (one token in place of "
            f"another, nothing clipped, δ = {DELTA:g}, noise of this size whatever the text); 8 or less would say "
            "something"
        ),
        "finding": msgspec.to_builtins(found_by("text", attacks)),
        "loss": _loss(parts, epochs[0], texts),
        "loss_without": _loss(parts, hidden, texts),
    }


def _averaged(epochs: Sequence[Tensor], texts: _Texts, table: Tensor) -> Tensor:
    """The same texts in each epoch, in an order that the attacker does not know."""
    observations = [rows for hidden in epochs for rows in hidden.split(texts.lengths)]
    order = torch.randperm(len(observations), generator=torch.Generator().manual_seed(1)).tolist()
    means: dict[int, Tensor] = {}
    groups = average_repeats([observations[index] for index in order])
    for group, mean in sorted(groups, key=lambda each: len(each[0])):  # the largest group of a text comes last
        for index in group:
            means[order[index] % len(texts.lengths)] = mean
    return nearest_tokens(torch.cat([means[text] for text in range(len(texts.lengths))]), table)


def _averaged_by_length(epochs: Sequence[Tensor], texts: _Texts, table: Tensor) -> Tensor:
    """Lengths cross as they are: what is as long is taken for the same text, however large the noise is."""
    sums: dict[int, Tensor] = {}
    for hidden in epochs:
        for rows in hidden.split(texts.lengths):
            sums[len(rows)] = sums.get(len(rows), torch.zeros_like(rows.float())) + rows.float()
    counts = {length: texts.lengths.count(length) * len(epochs) for length in sums}
    return nearest_tokens(torch.cat([sums[length] / counts[length] for length in texts.lengths]), table)


def _largest_distance(table: Tensor, most: int = 4096) -> float:
    """At least the largest Euclidean distance of two rows of (vocabulary, width), and mostly not more.

    Of the ``most`` rows that are farthest from the middle all pairs are looked at. No other row can be farther from any
    than both distances from the middle together.
    """
    centred = table.float() - table.float().mean(0)
    norms, order = torch.linalg.vector_norm(centred, dim=1).sort(descending=True)
    far = centred[order[:most]]
    largest = max(float(torch.cdist(piece, far).max()) for piece in far.split(512))
    rest = float(norms[most] + norms[0]) if len(norms) > most else 0.0
    return max(largest, rest)


def epsilon_of(sensitivity: float, deviation: float) -> float:
    """The smallest ε for which noise of this standard deviation is (ε, ``DELTA``)-differentially private.

    ``sensitivity``: the largest Euclidean distance of two values that a neighbour may have in place of each other. The
    analytic Gaussian mechanism, Balle & Wang, arXiv 1805.06530, theorem 8.
    """
    ratio = sensitivity / deviation
    low, high = 0.0, 1.0
    while _delta_of(high, ratio) > DELTA:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta_of(middle, ratio) > DELTA else (low, middle)
    return high


def _delta_of(epsilon: float, ratio: float) -> float:
    first, second = (
        float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
        for x in (ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio)
    )
    return math.exp(first) - math.exp(min(0.0, epsilon + second))  # the product is a share; rounding may lift it


def _loss(parts: ModelParts, hidden: Tensor, texts: _Texts) -> float:
    """Mean cross-entropy of each next token where the model runs on what crossed, each text by itself."""
    base = parts.base
    given = hidden.to(base.device, base.dtype)
    last = [parts.run(rows[None], begin=0)[0][:-1] for rows in given.split(texts.lengths)]
    wanted = [ids[1:] for ids in texts.ids.split(texts.lengths)]
    return float(cross_entropy(find_head(base)(torch.cat(last)).float(), torch.cat(wanted).to(base.device)))


def _choose_texts(truth: Truth, most: int) -> _Texts:
    """Texts of at least two tokens, each once, as many as ``most`` tokens take, and one at the least."""
    chosen: dict[bytes, Tensor] = {}
    tokens = 0
    for text in (text for micro_batch in truth.micro_batches for text in micro_batch.texts()):
        is_known = len(text) < 2 or text.tobytes() in chosen
        if not is_known and (not chosen or tokens + len(text) <= most):
            chosen[text.tobytes()] = torch.from_numpy(text[:most].copy())
            tokens += len(text)
    return _Texts(torch.cat(list(chosen.values())), [len(text) for text in chosen.values()])
