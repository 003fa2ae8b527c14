"""The whole model where its last blocks, or all of them, run here.

Forward, backward and evaluation need no server but for what goes into the first of these, which a source has: what a
server gave once for each text (``cached_source.py``), or the embeddings (``embedding_source.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.usage import WireCounters
from dlora.protocol.errors import DataError, UsageError
from dlora.protocol.tensors import FloatArray

from .answer_blocks import AnswerBlocks
from .blocks import DeviceBlocks
from .ends import Head, LongArray, LossGradient
from .kept_first_rows import KeptFirstRows
from .kept_outputs import KeptOutputs
from .source import HiddenStateSource
from .trained_blocks import Kept

# Of a micro-batch. What attention computes grows with the square of it; with fewer, weights are widened too often.
MOST_TOKENS: Final = 256


class TrunkModel:
    """Forward, backward and evaluation of micro-batches on the device.

    Args:
        count: of blocks on the device.
        source: of what goes into the first of them.
        invocation: the tokens from which on adapters act; none: they act everywhere.

    Attributes:
        invocation: likewise.
        compute_seconds: that this device has computed so far.

    Raises ``BundleError``, and ``UsageError`` where an adapter is in none of these blocks.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        adapters: AdapterSet,
        count: int,
        source: HiddenStateSource,
        invocation: tuple[int, ...] = (),
    ) -> None:
        self.adapters = adapters
        self.invocation = invocation
        self.compute_seconds = 0.0
        self._source = source
        self._kept: KeptOutputs | None = None
        self._kept_first: KeptFirstRows | None = None
        bounds, rank = _bounds(bundle, engine), adapters.adapter_spec.r
        self._bound = bounds.get("positions")
        of_texts = ("positions", "first", "past") if invocation else ("positions",)
        self._most_tokens = min(MOST_TOKENS, *(bounds.get(name, MOST_TOKENS) for name in of_texts))
        self._blocks: DeviceBlocks | AnswerBlocks = (
            AnswerBlocks(bundle, engine, count, rank, bounds.get("new"))
            if invocation
            else DeviceBlocks(bundle, engine, count, rank)
        )
        if missing := sorted(set(adapters.parameters()) - set(self._blocks.parameter_shapes)):
            module = missing[0].rpartition(".")[0]
            raise UsageError(
                f"{module} cannot have an adapter in blocks on a device; choose others with --target-modules, or use "
                "--device-blocks 0"
            )
        self._head = Head(bundle, engine)

    def keep_outputs(self, dataset: Dataset, examples_a_step: int, unchanged_steps: Callable[[int], range]) -> None:
        """Keep what is computed alike again and again: see ``KeptOutputs`` and ``KeptFirstRows``."""
        kept = self._source.kept
        assert kept is not None  # whoever wants it makes a place for it
        if isinstance(self._blocks, AnswerBlocks):
            self._kept_first = KeptFirstRows(self._blocks, self._source, kept, dataset, self._most_tokens)
            return
        self._kept = KeptOutputs(
            self._blocks,
            self._source,
            kept,
            dataset,
            examples_a_step=examples_a_step,
            most_tokens=self._most_tokens,
            unchanged_steps=unchanged_steps,
        )

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        return self._source.crossed.counters

    def check_fits(self, longest: int) -> None:
        """Raise ``DataError`` where a sequence of ``longest`` tokens cannot be run here, now or never."""
        self._blocks.check_length(longest)
        bound = self._bound
        if bound is not None and longest > bound:
            raise DataError(
                f"the data has a sequence of {longest} tokens, ExecuTorch's programs of this bundle take {bound}; set "
                f"--max-length {bound}, or use --engine onnx"
            )

    def cut(self, batch: MicroBatch) -> list[MicroBatch]:
        """``batch`` in parts that take little memory: what attention needs grows with the square of the tokens."""
        return batch.cut(max_tokens=self._most_tokens, packs=True)

    def forward_backward(
        self, batches: Sequence[MicroBatch], *, step: int, grad_scale: float, gradients: Sequence[LossGradient] = ()
    ) -> list[FloatArray]:
        """Train on micro-batches of one step: the cross-entropies of each, (labelled,); gradients go into the
        parameters of active units.

        ``grad_scale`` is one over the labelled tokens of the whole step; ``gradients``: of each micro-batch's own loss,
        in place of that. Raises what the source raises.
        """
        parameters, trained = self.adapters.parameters(), self.adapters.trained_parameters()
        scaling = self.adapters.scaling
        lora = {name: parameter.with_gain for name, parameter in parameters.items()}
        losses = []
        own: Sequence[LossGradient | None] = gradients or [None] * len(batches)
        for batch, gradient in zip(map(MicroBatch.until_last_label, batches), own, strict=True):
            last, kept, started = self._forward(batch, lora, scaling, trained, step)
            found, grad = self._head.loss_and_grad(last, batch.labels, grad_scale, gradient)
            for name, each in self._blocks.backward(grad, kept, lora, scaling).items():
                parameters[name].add_grad_with_gain(each)
            losses.append(found)
            self.compute_seconds += time.perf_counter() - started
        return losses

    def evaluate(self, batch: MicroBatch) -> tuple[FloatArray, LongArray]:
        """Losses float32 and likeliest tokens int64 at the labelled positions, (labelled,) each.

        Raises what the source raises.
        """
        found = [self._evaluate(part) for part in self.cut(batch)]
        losses, predictions = (np.concatenate(each) for each in zip(*found, strict=True))
        return losses, predictions

    def _evaluate(self, batch: MicroBatch) -> tuple[FloatArray, LongArray]:
        batch = batch.until_last_label()
        lora = {name: parameter.with_gain for name, parameter in self.adapters.parameters().items()}
        last, _, started = self._forward(batch, lora, self.adapters.scaling)
        found = self._head.loss(last, batch.labels)
        self.compute_seconds += time.perf_counter() - started
        return found

    def _forward(
        self,
        batch: MicroBatch,
        lora: Mapping[str, FloatArray],
        scaling: float,
        trained: Collection[str] = (),
        step: int | None = None,
    ) -> tuple[FloatArray, Kept, float]:
        """The last hidden states of labelled tokens, what their backward pass needs, and when the device began.

        ``step``: that is trained, where what was kept for it may be taken.
        """
        blocks = self._blocks
        if isinstance(blocks, AnswerBlocks):
            hidden_states, started = self._source.hidden_states(batch), time.perf_counter()
            first = None if self._kept_first is None or step is None else self._kept_first.of(batch)
            return *blocks.forward(hidden_states, batch, lora, scaling, trained, first), started
        begin = 0 if self._kept is None or step is None else self._kept.count(step, trained)
        if self._kept is None or step is None or not begin:
            hidden_states, started = self._source.hidden_states(batch), time.perf_counter()
        else:
            started = time.perf_counter()
            hidden_states = self._kept.hidden_states(batch, step, begin, lora, scaling)
        lengths, labelled = batch.sequence_lengths, batch.label_positions
        return *blocks.forward(hidden_states, lengths, labelled, lora, scaling, trained, begin), started


def _bounds(bundle: Bundle, engine: Engine) -> Mapping[str, int]:
    """The most of each dimension that the engine's programs take; of one that is not there any number."""
    spec = bundle.manifest.executorch
    return spec.bounds if spec is not None and engine.name == "executorch" else {}
