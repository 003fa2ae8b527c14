"""A model to generate with whose last blocks run here, with adapters in them, and keep their keys and values here."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.tensors import FloatArray

from .decode_blocks import DecodeBlocks
from .ends import Head, LongArray


class DeviceGenerator(ABC):
    """What the modes ``trunk`` and ``local`` share of a ``GeneratingModel``: they differ in what comes into the blocks.

    Args:
        blocks: with the adapters.
        invocation: the tokens from which on these act; none: everywhere.

    Attributes:
        compute_seconds: that this device has computed so far, without the embedding.
    """

    def __init__(self, bundle: Bundle, engine: Engine, blocks: DecodeBlocks, invocation: tuple[int, ...]) -> None:
        self.invocation = invocation
        self.compute_seconds = 0.0
        self._blocks = blocks
        self._head = Head(bundle, engine)
        self._last: list[FloatArray] = []  # last hidden states of the last tokens of this call

    def extend(self, ids: LongArray, known: int, acts_from: int, count: int) -> tuple[FloatArray, int]:
        """As ``GeneratingModel`` has it."""
        self._blocks.crop(known)
        self._last.clear()
        held = self._take_in(ids, acts_from, count)
        started = time.perf_counter()
        logits = self._head.logits(np.concatenate(self._last)[-count:])
        self.compute_seconds += time.perf_counter() - started
        if not np.isfinite(logits).all():
            text = "the logits are not finite: the adapter is of a run that diverged; train it anew with a lower --lr"
            raise NonFiniteError(text)
        return logits, held

    @abstractmethod
    def _take_in(self, ids: LongArray, acts_from: int, count: int) -> int:
        """Give the blocks, by ``_append``, what comes into them for the tokens of a text that they have not seen.

        Returns how many of its tokens need not be sent again.
        """

    def _append(self, hidden_states: FloatArray, acts_from: int, count: int) -> None:
        """Run the blocks on the next tokens; those before ``acts_from`` go through without adapters."""
        started = time.perf_counter()
        without = min(max(0, acts_from - self._blocks.length), len(hidden_states))
        for rows, acts in ((hidden_states[:without], False), (hidden_states[without:], True)):
            if len(rows):
                self._last.append(self._blocks.append(rows, with_lora=acts)[-count:].copy())
        self.compute_seconds += time.perf_counter() - started

    def release_weights(self) -> None:
        """Let the pages of the two ends' weights go, which ``extend`` keeps for the next token."""
        self._head.release()
