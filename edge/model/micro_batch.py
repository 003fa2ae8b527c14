"""The device's part of one micro-batch: it begins it, and answers what the server sends.

This is the life of a micro-batch, on the device's side; docs/reference/protocol.md has both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dlora.edge.adapters.compute import AdapterCompute, Saved
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.recorder import Recorder
from dlora.edge.wire.spans import COMPUTE, Spans
from dlora.protocol import messages as m
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.micro_batch import Key
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole, decode_floats

from .ends import Embedding, Head, LossGradient


@dataclass
class DeviceParts:
    """What a model computes on the device.

    Attributes:
        sends_token_ids: whether the server looks tokens up, and not the device.
        recorder: keeps the truth of each micro-batch; None where nobody asks for that.
        head_seconds: spent in embedding and head so far; spans: when.
    """

    embedding: Embedding
    head: Head
    adapters: AdapterSet
    compute: AdapterCompute
    sends_token_ids: bool = False
    recorder: Recorder | None = None
    head_seconds: float = 0.0
    spans: Spans = field(default_factory=Spans)

    def add_head(self, what: str, started: float) -> None:
        """Count what one of the two ends has computed since then."""
        ended = time.perf_counter()
        self.head_seconds += ended - started
        self.spans.add(what, COMPUTE, started, ended)


class DeviceMicroBatch:
    """One micro-batch under way.

    Args:
        send: sends a message to the server.
        mode: what it is for; codecs: how its tensors cross.
        position: of its first token in the context, in the mode ``decode``.
        grad_scale: what the loss's gradient is multiplied with, where there is one; gradient: of another loss than the
            sum of cross-entropies.

    Attributes:
        longest: tokens of its longest sequence.
        is_finished: whether the server will send no more of it.
        hidden_states: once they have come, the last hidden states (labelled, hidden_size).
        losses: in training, (labelled,).
        grads: the gradient of each parameter, by name, once it is through; summed over its micro-batch.
    """

    def __init__(
        self,
        parts: DeviceParts,
        batch: MicroBatch,
        key: Key,
        send: Callable[[m.AnyMessage], None],
        *,
        mode: m.Mode,
        codecs: Codecs,
        grad_scale: float = 0.0,
        position: int | None = None,
        gradient: LossGradient | None = None,
    ) -> None:
        self.key = key
        self.longest = int(batch.sequence_lengths.max())
        self.is_finished = False
        self.hidden_states: FloatArray | None = None
        self.losses: FloatArray | None = None
        self.grads: dict[str, FloatArray] = {}
        self._parts = parts
        self._batch = batch
        self._step, self._micro_batch = key
        self._send = send
        self._mode = mode
        self._codecs = codecs
        self._grad_scale = grad_scale
        self._gradient = gradient
        self._position = position
        self._saved: dict[int, Saved] = {}
        self._to_come = 0

    def begin(self) -> None:
        """Send the embeddings, or the tokens."""
        parts, batch = self._parts, self._batch
        started = time.perf_counter()
        hidden_states = None
        if not parts.sends_token_ids:
            hidden_states = self._to_wire(
                parts.embedding(batch.ids, keep_table=self._mode == "decode"), TensorRole.EMBEDDINGS
            )
        parts.add_head("embedding", started)
        positions = batch.crossing_positions
        self._send(
            m.Embeddings(
                step=self._step,
                micro_batch=self._micro_batch,
                mode=self._mode,
                hidden_states=hidden_states,
                sequence_lengths=WireTensor.from_ints(batch.sequence_lengths),
                label_positions=WireTensor.from_ints(batch.label_positions),
                crossing_positions=None if positions is None else WireTensor.from_ints(positions),
                token_ids=WireTensor.from_ints(batch.ids) if parts.sends_token_ids else None,
                position=self._position,
            )
        )
        if parts.recorder is not None:
            parts.recorder.add_micro_batch(self._mode, batch)

    def handle(self, message: m.ExchangeMessage) -> None:
        """Answer the server's next message of this micro-batch."""
        match message:
            case m.GroupInput():
                self._answer_input(message)
            case m.LabelledHiddenStates():
                self._handle_last_hidden_states(message)
            case m.GroupGrad():
                self._answer_grad(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} of a micro-batch from the server")

    def _answer_input(self, message: m.GroupInput) -> None:
        outputs, saved = self._parts.compute.forward(message.group, message.hidden_states)
        if self._mode == "train":
            self._saved[message.group] = saved
        deltas = tuple(self._to_wire(output, TensorRole.DELTA) for output in outputs)
        self._send(m.GroupDelta(step=self._step, micro_batch=self._micro_batch, group=message.group, deltas=deltas))

    def _handle_last_hidden_states(self, message: m.LabelledHiddenStates) -> None:
        hidden_states = decode_floats(message.hidden_states)
        self._to_come = message.gradients
        self.is_finished = not self._to_come
        if self._mode in m.WITHOUT_GRADIENTS:
            self.hidden_states = hidden_states
            return
        started = time.perf_counter()
        head, labels = self._parts.head, self._batch.labels
        if self._gradient is None:
            self.losses, grads = head.loss_and_grad(hidden_states, labels, self._grad_scale)
        else:
            self.losses, grads = head.loss_and_own_grad(hidden_states, labels, self._gradient)
        self._parts.add_head("head and loss", started)
        if self._to_come or self._mode == "basis":
            self._send(
                m.GradHiddenStates(
                    step=self._step,
                    micro_batch=self._micro_batch,
                    grad_hidden_states=self._to_wire(grads, TensorRole.LAST_HIDDEN_STATES_GRAD),
                )
            )

    def _answer_grad(self, message: m.GroupGrad) -> None:
        group, compute = message.group, self._parts.compute
        grads: Sequence[FloatArray] = [decode_floats(grad) for grad in message.grads]
        dx, backward = compute.input_grad(group, grads)
        if message.answer:
            self._send(
                m.GroupInputGrad(
                    step=self._step,
                    micro_batch=self._micro_batch,
                    group=group,
                    grad_hidden_states=self._to_wire(dx, TensorRole.INPUT_GRAD),
                )
            )
        # After the answer has left: the server works on while we compute the weights' gradients.
        self.grads |= compute.weight_grads(group, self._saved.pop(group), grads, backward)
        self._to_come -= 1
        self.is_finished = not self._to_come

    def _to_wire(self, values: FloatArray, role: TensorRole) -> WireTensor:
        return self._codecs.of(role).encode(np.asarray(values))
