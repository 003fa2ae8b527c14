"""The two ends of the base model that the device holds: token embedding, and LM head with loss and gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, scalar
from dlora.edge.memory import release_freed_memory
from dlora.protocol.tensors import FloatArray

LongArray = npt.NDArray[np.int64]
LossGradient = Callable[[FloatArray], FloatArray]
"""The gradient of a loss by the log-probabilities of labels, float32 (labelled,), of these, (labelled,)."""


class Embedding:
    """Token ids int64 (tokens,) to hidden states float32 (tokens, embedding_size)."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._bundle = bundle
        self._files = bundle.manifest.embedding.weight_files
        self._graph = engine.load("embedding")

    def __call__(self, ids: LongArray, *, keep_table: bool = False) -> FloatArray:
        """``keep_table``: where the next tokens come at once. It may be the LM head's weight, too."""
        if not keep_table:
            release_freed_memory()  # what the last step left free, else the table comes on top of it
        weights = {name: self._bundle.weight(file) for name, file in self._files.items()}
        with self._bundle.reading_rows(self._files.values()):
            (hidden_states,) = self._graph({**weights, "ids": ids})
        if not keep_table:
            # The system maps the neighbours of each page that is touched: a few steps would bring in the whole table.
            for file in self._files.values():
                self._bundle.release(file)
        return hidden_states


class Head:
    """Hidden states at labelled positions to losses, gradients, predictions or logits.

    Rows go through the graphs in chunks of the manifest's ``rows``. That is when a step takes most memory: what is free
    goes back to the system before each chunk, and the weight's pages go after the last one.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        spec = bundle.manifest.head
        self._bundle = bundle
        self._weights: dict[str, Array] = {name: bundle.weight(file) for name, file in spec.weight_files.items()}
        self._rows = spec.rows
        self._graph = cache(engine.load)  # when first used: a run that never generates never pays for its graph

    def loss_and_grad(
        self, hidden_states: FloatArray, labels: LongArray, grad_scale: float, gradient: LossGradient | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Cross-entropy (rows,) and ``grad_scale`` times its gradient (rows, hidden_size), both float32.

        With ``gradient``, that of any loss of the labels' log-probabilities in place of it: the gradient of each row's
        cross-entropy, times what ``gradient`` makes of it.
        """
        graph = self._graph("head_train")
        losses = np.empty(len(labels), np.float32)
        grads = np.empty_like(hidden_states)
        scale = scalar(grad_scale if gradient is None else 1.0)
        for rows in self._chunks(len(labels)):
            losses[rows], grads[rows] = graph(
                self._weights | {"hidden_states": hidden_states[rows], "labels": labels[rows], "grad_scale": scale}
            )
        if gradient is not None:
            grads *= -np.asarray(gradient(-losses), np.float32)[:, None]
        return losses, grads

    def loss(self, hidden_states: FloatArray, labels: LongArray) -> tuple[FloatArray, LongArray]:
        """Cross-entropy float32 (rows,) and the likeliest token int64 (rows,)."""
        graph = self._graph("head_loss")
        losses = np.empty(len(labels), np.float32)
        predictions = np.empty(len(labels), np.int64)
        for rows in self._chunks(len(labels)):
            losses[rows], predictions[rows] = graph(
                self._weights | {"hidden_states": hidden_states[rows], "labels": labels[rows]}
            )
        return losses, predictions

    def logits(self, hidden_states: FloatArray) -> FloatArray:
        """Logits (rows, vocabulary) of a few rows."""
        (logits,) = self._graph("head_logits")(self._weights | {"hidden_states": hidden_states})
        return logits

    def release(self) -> None:
        """Give back what ``logits`` left in memory for the next call."""
        release_freed_memory()
        for file in self._bundle.manifest.head.weight_files.values():
            self._bundle.release(file)

    def _chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self._rows):
            release_freed_memory()
            yield slice(start, start + self._rows)
        self.release()


def finishing(gradient: LossGradient, failures: list[Exception]) -> LossGradient:
    """``gradient``, whose errors wait until the micro-batch is through: the server waits for an answer."""

    def safe(logprobs: FloatArray) -> FloatArray:
        try:
            return gradient(logprobs)
        except Exception as error:  # of a loss that somebody else wrote
            failures.append(error)
            return np.zeros_like(logprobs)

    return safe
