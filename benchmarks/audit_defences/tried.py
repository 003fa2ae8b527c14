"""Defences that somebody might put in place of what crosses, attacked: what they hide, and what they cost.

None of these is an option of a device: an option is taken for protection, and these do not protect at a price that a
model can pay (docs/log/decisions/0051).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
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
from dlora.protocol.wire_codecs import decode_floats, encode_floats

from .noise import DELTA, average_repeats, epsilon_of
from .ridge_probe import RidgeProbe
from .sequential_matching import match_tokens

EPOCHS: Final = 10
MOST_TOKENS: Final = {"first-blocks": 320, "noise": 4096}  # of what is attacked; token by token it takes long


@dataclass(frozen=True)
class _Texts:
    """Some of the texts that crossed: ids int64 (tokens,), one text after another."""

    ids: Tensor
    lengths: list[int]

    def score(self, attack: str, ids: Tensor) -> Attack:
        return score_tokens(attack, [ids.cpu()], [self.ids], len(self.lengths))


@torch.no_grad()
def try_defences(names: Sequence[str], truth: Truth, base: BaseModel) -> dict[str, dict[str, Any]]:
    """Attack each: ``noise=0.3`` is Gaussian, of so many times the embeddings' root mean square, ``first-blocks=2`` is
    what crosses where the device holds these.

    Returns: by name what may be claimed, the finding, and the base model's loss at next tokens with it and without.
    """
    parts, found = ModelParts(base), {}
    for name in names:
        kind, _, amount = name.partition("=")
        texts = _choose_texts(truth, MOST_TOKENS[kind])
        embeddings = find_embedding(base)(texts.ids.to(base.device)).to(base.dtype)
        blocks = int(amount) if kind == "first-blocks" else 0
        if blocks:
            claim, crossed, attacks = _first_blocks(blocks, embeddings, texts, parts)
        else:
            claim, crossed, attacks = _noise(float(amount), embeddings, texts, embedding_table(base))
        found[name] = {
            "claim": claim,
            "finding": msgspec.to_builtins(found_by("text", attacks)),
            "loss": _loss(parts, crossed, texts, blocks),
            "loss_without": _loss(parts, embeddings, texts, 0),
        }
    return found


def _noise(times_rms: float, hidden: Tensor, texts: _Texts, table: Tensor) -> tuple[str, Tensor, list[Attack]]:
    """Drawn anew each time."""
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
    claim = (
        f"ε ≤ {math.ceil(10 * epsilon) / 10:,.1f} for each token each time that it crosses (one token in place of "
        f"another, nothing clipped, δ = {DELTA:g}, noise of this size whatever the text); 8 or less would say something"
    )
    return claim, epochs[0], attacks


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


def _first_blocks(
    blocks: int, embeddings: Tensor, texts: _Texts, parts: ModelParts
) -> tuple[str, Tensor, list[Attack]]:
    """The device runs the first blocks itself: hidden states cross in place of embeddings, in fp16."""
    hidden = torch.cat([parts.run(rows[None], end=blocks)[0].float() for rows in embeddings.split(texts.lengths)])
    crossed = torch.from_numpy(decode_floats(encode_floats(hidden.cpu().numpy(), "fp16"))).to(hidden.device)
    probe = RidgeProbe.fit(parts, blocks)
    attacks = [
        texts.score("sequential matching", match_tokens(crossed, texts.lengths, parts, blocks, probe)),
        texts.score("ridge probe", nearest_tokens(probe.embeddings(crossed), probe.table)),
        texts.score("nearest neighbour", nearest_tokens(crossed, probe.table)),
    ]
    return "nothing: the blocks are public", crossed, attacks


def _loss(parts: ModelParts, hidden: Tensor, texts: _Texts, blocks: int) -> float:
    """Mean cross-entropy of each next token where the rest of the model runs on what crossed, each text by itself."""
    base = parts.base
    given = hidden.to(base.device, base.dtype)
    last = [parts.run(rows[None], begin=blocks)[0][:-1] for rows in given.split(texts.lengths)]
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
