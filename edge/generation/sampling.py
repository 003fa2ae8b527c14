"""Chooses the next token from its logits, in the order and with the meaning that transformers' ``generate`` has.

Penalties, then temperature, top-k, top-p and min-p; what is left is drawn from with one number, which depends on the
seed and on the token's place in the answer only. So the same answer comes out with drafts and without, and after a lost
server.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dlora.protocol.errors import DataError, UsageError
from dlora.protocol.tensors import FloatArray

MAX_LOGPROBS: Final = 20
_MAX_SEED: Final = 2**64
_MAX_TEMPERATURE: Final = 100.0
_MAX_PENALTY: Final = 100.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Raises ``UsageError`` for a value that makes no sense.

    Attributes:
        temperature: 0: always the likeliest token; what follows does nothing then but for the penalties.
        top_k: of so many likeliest tokens; 0: of all.
        top_p: of the likeliest tokens that together have this probability; 1: of all.
        min_p: of tokens at least so likely as a part of the likeliest one; 0: of all.
        repetition_penalty: divides the logits of tokens that came before, in the prompt too, or multiplies them where
            they are negative (Keskar et al., arXiv 1909.05858); 1: none.
        presence_penalty, frequency_penalty: are taken from the logits of tokens of the answer, once and for each time,
            as OpenAI defines them.
        logit_bias: added to the logits of single tokens.
        seed: None: another answer each time.
        logprobs: how many of the likeliest tokens to name with each, with their log-probabilities; None: not even its
            own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, _MAX_TEMPERATURE)
        _check("top_k", self.top_k, 0, 2**31)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 1 / _MAX_PENALTY, _MAX_PENALTY)
        _check("presence_penalty", self.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check("frequency_penalty", self.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check("seed", self.seed or 0, 0, _MAX_SEED - 1)
        _check("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS)
        if self.top_p == 0.0:
            raise UsageError("top_p must be above 0; 1 takes all tokens")


class Choice(NamedTuple):
    """A chosen token.

    Attributes:
        logprob: its natural log-probability under the model's own logits, before penalties and temperature; None where
            it was not asked for.
        top: the likeliest tokens and their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        prompt: the tokens before the answer.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | npt.NDArray[np.integer]) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._prompt = np.unique(np.asarray(prompt, np.int64))
        self._counts: dict[int, int] = {}
        self._produced = 0

    def choose(self, logits: FloatArray, allowed: npt.NDArray[np.bool_] | None = None) -> Choice:
        """The next token of the answer, from float32 (vocabulary,); ``allowed``: bool (vocabulary,), None: any."""
        sampling = self._sampling
        penalized = self._penalized(logits)
        if allowed is not None:
            if not allowed.any():
                raise DataError("no token can come next that keeps the answer to its schema; change the schema")
            penalized = np.where(allowed, penalized, -np.inf)
        if sampling.temperature == 0.0:
            token = int(penalized.argmax())
        else:
            token = self._draw(penalized)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._produced += 1
        return self._with_logprobs(token, logits)

    def _penalized(self, logits: FloatArray) -> npt.NDArray[np.float64]:
        sampling, values = self._sampling, logits.astype(np.float64)
        produced = np.fromiter(self._counts, np.int64, len(self._counts))
        if sampling.repetition_penalty != 1.0:
            seen = np.union1d(self._prompt, produced)
            found = values[seen]
            values[seen] = np.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and len(produced):
            times = np.fromiter(self._counts.values(), np.float64, len(self._counts))
            values[produced] -= sampling.presence_penalty + sampling.frequency_penalty * times
        for token, bias in sampling.logit_bias.items():
            if 0 <= token < len(values):
                values[token] += bias
        return values

    def _draw(self, values: npt.NDArray[np.float64]) -> int:
        sampling = self._sampling
        # Likeliest first, equal ones by their number. All that the limits leave is a beginning of this order.
        most = len(values) if not sampling.top_k else min(sampling.top_k, len(values))
        order = _likeliest(values, most)
        # From the largest on: a temperature near 0 then leaves zeros, and no infinities.
        with np.errstate(over="ignore"):
            probabilities = _softmax((values[order] - values[order[0]]) / sampling.temperature)
        kept = len(order)
        if sampling.top_p < 1.0:
            # Up to the token with which the sum reaches top_p.
            kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        if sampling.min_p > 0.0:
            kept = min(kept, int((probabilities >= sampling.min_p * probabilities[0]).sum()))
        kept = max(1, min(kept, len(order)))
        sums = np.cumsum(probabilities[:kept])
        drawn = np.searchsorted(sums, self._uniform() * sums[-1], side="right")
        return int(order[min(int(drawn), kept - 1)])

    def _uniform(self) -> float:
        """In [0, 1), of the seed and the token's place."""
        bits = np.random.Philox(key=self._seed, counter=self._produced)
        return float(np.random.Generator(bits).random())

    def _with_logprobs(self, token: int, logits: FloatArray) -> Choice:
        count = self._sampling.logprobs
        if count is None:
            return Choice(token)
        values = logits.astype(np.float64)
        peak = values.max()
        logprobs = values - peak - np.log(np.exp(values - peak).sum())
        top = _likeliest(logprobs, count)
        return Choice(token, float(logprobs[token]), tuple((int(each), float(logprobs[each])) for each in top))


def _likeliest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The ``count`` largest, largest first, equal ones by their number; -inf never comes before what is finite."""
    if count == 0:
        return np.zeros(0, np.int64)
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= least)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum(), np.float64)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} must be from {least:g} to {most:g}, not {str(value)[:20]}")
