"""Losses of log-probabilities, with their gradients: for ``TrainingClient.forward_backward_custom``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dlora.protocol.errors import UsageError
from dlora.protocol.tensors import FloatArray

from .datum import Datum

LossFunction = Callable[[Sequence[Datum], list[FloatArray]], tuple[float, Sequence[FloatArray]]]
"""A loss of log-probabilities: gets the data and, of each datum, the log-probabilities of its targets that count,
float32 (labelled,); gives the loss, and its gradient by them, of the same shapes."""


def dpo_loss(reference: Sequence[FloatArray], beta: float = 0.1) -> LossFunction:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7) of pairs that follow each other,
    the chosen answer, then the rejected one::

        loss = mean over pairs of -log sigmoid(beta * ((chosen - chosen_ref) - (rejected - rejected_ref)))

    where each is the sum of an answer's log-probabilities.

    ``reference``: the log-probabilities of the same data before training, as ``forward`` gives them.
    """
    before = np.array([each.sum(dtype=np.float64) for each in reference])

    def loss(data: Sequence[Datum], logprobs: list[FloatArray]) -> tuple[float, list[FloatArray]]:
        if len(data) % 2 or len(data) != len(before):
            raise UsageError("preferences are pairs, a chosen answer and a rejected one, with a reference for each")
        sums = np.array([each.sum(dtype=np.float64) for each in logprobs]) - before
        margins = beta * (sums[0::2] - sums[1::2])
        pairs = len(margins)
        value = float(np.logaddexp(0.0, -margins).mean())
        slope = -beta / (1.0 + np.exp(margins)) / pairs  # of the chosen one's sum; the rejected one's is the opposite
        signs = np.stack([slope, -slope], axis=1).reshape(-1)
        return value, [np.full(len(each), sign, np.float32) for each, sign in zip(logprobs, signs, strict=True)]

    return loss
