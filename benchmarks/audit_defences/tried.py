"""Defences that somebody might put in place of what crosses, attacked: what they hide, and what they cost.

None of these is an option of a device: an option is taken for protection, and these do not protect at a price that a
model can pay (docs/log/decisions/0051).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import torch
from torch import Tensor

from dlora.cloud.audit.audit import attacking
from dlora.cloud.audit.finding import Finding, found_by
from dlora.cloud.audit.nearest_neighbour import embedding_table, nearest_tokens
from dlora.cloud.audit.scoring import Attack
from dlora.cloud.audit.text import score_tokens
from dlora.cloud.audit.truth import Truth
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.parts import ModelParts
from dlora.protocol.errors import UsageError
from dlora.protocol.wire_codecs import decode_floats, encode_floats

from .defences import after_blocks, embeddings_of, loss_with, with_noise
from .epoch_averaging import average_repeats
from .gaussian_noise import DELTA, epsilon_of
from .ridge_probe import RidgeProbe
from .sequential_matching import match_tokens

EPOCHS: Final = 10
MOST_TOKENS: Final = 320  # of what is matched token by token
MOST_NOISY_TOKENS: Final = 4096
FP16_ERROR: Final = 0.01  # of the right token, relative to the distance of others: far above fp16's rounding
NOISE: Final = "noise"
FIRST_BLOCKS: Final = "first-blocks"


class TriedDefence(msgspec.Struct, frozen=True, kw_only=True):
    """A defence in place of what crossed: what attacks then find of the text, and what it costs.

    Attributes:
        claim: what may be said of it.
        loss: of the base model at the labels with it; loss_without: and without.
    """

    name: str
    claim: str
    finding: Finding
    loss: float
    loss_without: float


@dataclass(frozen=True)
class Defence:
    """One to try: ``noise=0.3``, or ``first-blocks=2``."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Defence:
        """What ``--try`` says. Raises ``UsageError``."""
        kind, _, amount = text.partition("=")
        try:
            number = float(amount)
        except ValueError:
            number = -1.0
        if kind == NOISE and 1e-3 <= number <= 1e4:
            return cls(kind, number)
        if kind == FIRST_BLOCKS and number.is_integer() and number > 0:
            return cls(kind, number)
        raise UsageError(
            f"--try {text[:60]}: write noise=TIMES, of the embeddings' rms, such as noise=0.3, or first-blocks=N, that "
            "the device holds, such as first-blocks=2"
        )


@dataclass(frozen=True)
class _Texts:
    """Some of the texts that crossed: ids int64 (tokens,), one text after another."""

    ids: Tensor
    lengths: list[int]

    @property
    def count(self) -> int:
        return len(self.lengths)


def check_defences(defences: Sequence[Defence], blocks: int) -> None:
    """Raise ``UsageError`` where more blocks are to be held than a model of so many has to give."""
    for each in defences:
        if each.kind == FIRST_BLOCKS and each.amount >= blocks:
            raise UsageError(f"--try first-blocks={each.amount:.0f}: the model has {blocks}; some must be left")


def try_defences(
    defences: Sequence[Defence], truth: Truth, base: BaseModel, on_attack: Callable[[str], None] = lambda _: None
) -> tuple[TriedDefence, ...]:
    """Attack each. Raises ``UsageError`` for more blocks than the model has, ``ExportError`` for a model that cannot be
    run in parts."""
    if not defences:
        return ()
    check_defences(defences, base.blocks)
    parts, tried = ModelParts(base), []
    for each in defences:
        name = f"{each.kind}={each.amount:g}"
        on_attack(name)
        is_noise = each.kind == NOISE
        with attacking(name):
            texts = _choose_texts(truth, MOST_NOISY_TOKENS if is_noise else MOST_TOKENS)
            plain = _loss(parts, embeddings_of(base, texts.ids), texts, 0)
            tried.append((_noise if is_noise else _first_blocks)(name, each.amount, texts, parts, plain))
    return tuple(tried)


def _noise(name: str, times_rms: float, texts: _Texts, parts: ModelParts, plain: float) -> TriedDefence:
    """Gaussian noise on what crosses, drawn anew each time."""
    table = embedding_table(parts.base)
    hidden = embeddings_of(parts.base, texts.ids)
    draw = torch.Generator().manual_seed(0)
    epochs = [with_noise(hidden, times_rms, draw) for _ in range(EPOCHS)]
    attacks = [
        _score("nearest neighbour", nearest_tokens(epochs[0], table), texts),
        _score(f"mean of {EPOCHS} epochs, of texts that are alike", _averaged(epochs, texts, table), texts),
        _score(f"mean of {EPOCHS} epochs, of texts as long", _averaged_by_length(epochs, texts, table), texts),
    ]
    deviation = times_rms * float(hidden.float().square().mean().sqrt())
    epsilon = epsilon_of(largest_distance(table), deviation)
    claim = (
        f"ε ≤ {math.ceil(10 * epsilon) / 10:,.1f} for each token each time that it crosses (one token in place of "
        f"another, nothing clipped, δ = {DELTA:g}, noise of this size whatever the text); 8 or less would say something"
    )
    loss = _loss(parts, epochs[0], texts, 0)
    return TriedDefence(name=name, claim=claim, finding=found_by("text", attacks), loss=loss, loss_without=plain)


def _averaged(epochs: Sequence[Tensor], texts: _Texts, table: Tensor) -> Tensor:
    """The same texts in each epoch, in an order that the attacker does not know."""
    observations = [rows for hidden in epochs for rows in hidden.split(texts.lengths)]
    order = torch.randperm(len(observations), generator=torch.Generator().manual_seed(1)).tolist()
    means: dict[int, Tensor] = {}
    groups = average_repeats([observations[index].float() for index in order])
    for group, mean in sorted(groups, key=lambda each: len(each[0])):  # the largest group of a text comes last
        for index in group:
            means[order[index] % texts.count] = mean
    return nearest_tokens(torch.cat([means[text] for text in range(texts.count)]), table)


def _averaged_by_length(epochs: Sequence[Tensor], texts: _Texts, table: Tensor) -> Tensor:
    """Lengths cross as they are: what is as long is taken for the same text, however large the noise is."""
    sums: dict[int, Tensor] = {}
    for hidden in epochs:
        for rows in hidden.split(texts.lengths):
            sums[len(rows)] = sums.get(len(rows), torch.zeros_like(rows.float())) + rows.float()
    counts = {length: texts.lengths.count(length) * len(epochs) for length in sums}
    return nearest_tokens(torch.cat([sums[length] / counts[length] for length in texts.lengths]), table)


def largest_distance(table: Tensor, most: int = 4096) -> float:
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


def _first_blocks(name: str, amount: float, texts: _Texts, parts: ModelParts, plain: float) -> TriedDefence:
    """The device runs the first blocks itself: hidden states cross in place of embeddings, in fp16."""
    blocks = int(amount)
    hidden = after_blocks(parts, texts.ids, texts.lengths, blocks)
    crossed = torch.from_numpy(decode_floats(encode_floats(hidden.float().cpu().numpy(), "fp16"))).to(hidden.device)
    probe = RidgeProbe.fit(parts, blocks)
    matched = match_tokens(crossed, texts.lengths, parts, blocks, largest_error=FP16_ERROR, probe=probe)
    attacks = [
        _score("sequential matching", matched.ids, texts),
        _score("ridge probe", probe.guess(crossed), texts),
    ]
    table = embedding_table(parts.base)
    if table.shape[1] == crossed.shape[1]:
        attacks.append(_score("nearest neighbour", nearest_tokens(crossed, table), texts))
    return TriedDefence(
        name=name,
        claim="nothing: the blocks are public",
        finding=found_by("text", attacks),
        loss=_loss(parts, crossed, texts, blocks),
        loss_without=plain,
    )


def _score(attack: str, ids: Tensor, texts: _Texts) -> Attack:
    return score_tokens(attack, [ids.cpu()], [texts.ids], texts.count)


def _loss(parts: ModelParts, hidden: Tensor, texts: _Texts, blocks: int) -> float:
    """Of each next token of the texts, by the base model."""
    ends = torch.tensor(texts.lengths).cumsum(0)
    last = torch.zeros(len(texts.ids), dtype=torch.bool)
    last[ends - 1] = True
    positions = torch.arange(len(texts.ids))[~last]
    return loss_with(parts, hidden, texts.lengths, positions, texts.ids[positions + 1], blocks)


def _choose_texts(truth: Truth, most: int) -> _Texts:
    """Texts of at least two tokens, each once, as many as ``most`` tokens take, and one at the least."""
    chosen: dict[bytes, Tensor] = {}
    tokens = 0
    for micro_batch in truth.micro_batches:
        for text in micro_batch.texts():
            if len(text) < 2 or text.tobytes() in chosen:
                continue
            if chosen and tokens + len(text) > most:
                continue
            chosen[text.tobytes()] = torch.from_numpy(text[:most].copy())
            tokens += len(text)
    if not chosen:
        raise UsageError("--try needs a recording with a text of two tokens or more")
    return _Texts(torch.cat(list(chosen.values())), [len(text) for text in chosen.values()])
