"""The whole model as the device uses it: its own ends and adapters here, the frozen blocks over a connection.

This is the life of a micro-batch, on the device's side; docs/protocol.md has both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dlora.edge.adapters.compute import AdapterCompute
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.choices import WireDtype
from dlora.protocol.errors import DataError, RemoteProtocolError, SessionLostError
from dlora.protocol.tensors import ByteArray, FloatArray, WireTensor

from .ends import Embedding, Head, LongArray


class SplitModel:
    """Forward, backward and evaluation of micro-batches.

    Args:
        on_signal: called with each signal as it comes, before anything of the next step is computed.
        reopen: called where the server has forgotten the session; opens another that stands where we do.

    Attributes:
        head_seconds: spent in embedding and head so far.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        connection: Connection,
        adapters: AdapterSet,
        *,
        wire_dtype: WireDtype,
        on_signal: Callable[[m.Signal], None],
        reopen: Callable[[], None],
    ) -> None:
        self.connection = connection
        self.adapters = adapters
        self.wire_dtype = wire_dtype
        self.head_seconds = 0.0
        self._embedding = Embedding(bundle, engine)
        self._head = Head(bundle, engine)
        self._compute = AdapterCompute(engine, adapters)
        self._on_signal = on_signal
        self._reopen = reopen
        self._evaluated = 0

    @property
    def compute_seconds(self) -> float:
        """Seconds that this device has computed so far."""
        return self.head_seconds + self._compute.seconds

    def forward_backward(self, batch: MicroBatch, *, step: int, micro_batch: int, grad_scale: float) -> FloatArray:
        """Train on one micro-batch that the server takes: losses (labelled,), gradients added to the adapters.

        ``grad_scale`` is one over the labelled tokens of the whole step: the step's loss is their mean. Raises
        ``SessionLostError`` where the whole step must be run again: the server knows nothing of it any more.
        """
        final = self._forward(batch, step=step, micro_batch=micro_batch, mode="train")
        hidden_states = final.hidden_states.to_floats()
        started = time.perf_counter()
        losses, grads = self._head.loss_and_grad(hidden_states, batch.labels, grad_scale)
        self.head_seconds += time.perf_counter() - started
        if final.gradients:
            self._backward(grads, step=step, micro_batch=micro_batch, gradients=final.gradients)
        return losses

    def cut(self, batch: MicroBatch) -> list[MicroBatch]:
        """``batch`` in parts that the server takes, each a micro-batch of its own; itself where it fits."""
        welcome = self.connection.welcome
        return batch.cut(max_tokens=welcome.max_tokens, packs=welcome.packs)

    def evaluate(self, batch: MicroBatch) -> tuple[FloatArray, LongArray]:
        """Losses and likeliest tokens at the labelled positions, (labelled,) each."""
        hidden_states = self._evaluate_hidden(batch)
        started = time.perf_counter()
        result = self._head.loss(hidden_states, batch.labels)
        self.head_seconds += time.perf_counter() - started
        return result

    def next_logits(self, ids: LongArray) -> FloatArray:
        """Logits (vocabulary,) of the token that follows ``ids``. The whole prefix crosses the wire each time."""
        batch = MicroBatch(
            ids=ids,
            sequence_lengths=np.array([len(ids)], np.int32),
            label_positions=np.array([len(ids) - 1], np.int32),
            labels=np.zeros(1, np.int64),
        )
        logits: FloatArray = self._head.logits(self._evaluate_hidden(batch))[0]
        return logits

    def report(self, step: int, scores: FloatArray) -> None:
        """Report a committed step; its signal comes with the next micro-batch, or with ``await_signal``.

        Both raise ``SessionLostError``; the report must then be sent again, in another session.
        """
        self.connection.send(m.StepReport(step=step, scores=WireTensor("fp32", scores)))

    def await_signal(self) -> None:
        """Wait for the signal to the last report, where nothing else will bring it."""
        self._on_signal(self.connection.receive(m.Signal))

    def _evaluate_hidden(self, batch: MicroBatch) -> FloatArray:
        while True:
            try:
                found = [self._evaluate_part(part) for part in self.cut(batch)]
                return found[0] if len(found) == 1 else np.concatenate(found)
            except SessionLostError:  # another server may take less at once
                self._reopen()

    def _evaluate_part(self, batch: MicroBatch) -> FloatArray:
        step, self._evaluated = self.connection.session.step, (self._evaluated + 1) % 2**31
        return self._forward(batch, step=step, micro_batch=self._evaluated, mode="evaluate").hidden_states.to_floats()

    def _forward(self, batch: MicroBatch, *, step: int, micro_batch: int, mode: m.Mode) -> m.LabelledHiddenStates:
        self._check_fits(batch)
        self._compute.forget()
        started = time.perf_counter()
        hidden_states = self._embedding(batch.ids)
        self.head_seconds += time.perf_counter() - started
        self.connection.send(
            m.Embeddings(
                step=step,
                micro_batch=micro_batch,
                mode=mode,
                hidden_states=self._to_wire(hidden_states),
                sequence_lengths=WireTensor.from_ints(batch.sequence_lengths),
                label_positions=WireTensor.from_ints(batch.label_positions),
            )
        )
        while True:
            match self.connection.receive_any():
                case m.Signal() as signal:
                    self._on_signal(signal)
                case m.GroupInput(group=group, hidden_states=x):
                    deltas = self._compute.forward(group, x, keep=mode == "train")
                    on_wire = tuple(self._to_wire(delta) for delta in deltas)
                    self.connection.send(m.GroupDelta(step=step, micro_batch=micro_batch, group=group, deltas=on_wire))
                case m.LabelledHiddenStates() as final:
                    return final
                case message:
                    raise RemoteProtocolError(f"{type(message).__name__} in the forward pass")

    def _check_fits(self, batch: MicroBatch) -> None:
        """Raise ``DataError`` for what the server would refuse."""
        welcome, longest = self.connection.welcome, int(batch.sequence_lengths.max())
        if longest > welcome.max_sequence_length:
            raise DataError(
                f"the data has a sequence of {longest} tokens, the server takes {welcome.max_sequence_length}; "
                f"set --max-length {welcome.max_sequence_length}"
            )

    def _backward(self, grad_hidden_states: FloatArray, *, step: int, micro_batch: int, gradients: int) -> None:
        self.connection.send(
            m.GradHiddenStates(step=step, micro_batch=micro_batch, grad_hidden_states=self._to_wire(grad_hidden_states))
        )
        for _ in range(gradients):
            message = self.connection.receive(m.GroupGrad)
            group = message.group
            grads = [grad.to_floats() for grad in message.grads]
            dx, dz = self._compute.input_grad(group, grads)
            if message.answer:
                self.connection.send(
                    m.GroupInputGrad(
                        step=step, micro_batch=micro_batch, group=group, grad_hidden_states=self._to_wire(dx)
                    )
                )
            # After the answer has left: the server works on while we compute dA and dB.
            self._compute.add_weight_grads(group, grads, dz)

    def _to_wire(self, values: FloatArray) -> WireTensor:
        return WireTensor.from_floats(values, self.wire_dtype)


def unit_states(signal: m.Signal | m.SessionOpened) -> ByteArray:
    """A copy of the states that a message carries; the frame that they lie in can go."""
    return np.array(signal.units.data, np.uint8)
