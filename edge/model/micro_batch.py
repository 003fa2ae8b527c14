"""The device's part of one micro-batch: it begins it, and answers what the server sends.

This is the life of a micro-batch, on the device's side; docs/reference/protocol.md has both sides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dlora.edge.adapters.compute import AdapterCompute, Saved
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.spans import COMPUTE
from dlora.protocol import messages as m
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.micro_batch import Key
from dlora.protocol.passes import reads_digest
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole, decode_floats

from .ends import Embedding, Head, LossGradient
from .kept_reads import Early, KeptReads, Stored
from .passes import DevicePasses


@dataclass
class DeviceParts:
    """What a model computes on the device.

    Attributes:
        connection: to the server, with what keeps the truth of each micro-batch, and when what happened.
        vocabulary: how many tokens there are.
        sends_token_ids: whether the server looks tokens up, and not the device.
        kept_reads: what is kept of what groups read in the base pass, in training in passes; None: nothing.
        head_seconds: spent in embedding and head so far.
    """

    connection: Connection
    embedding: Embedding
    head: Head
    adapters: AdapterSet
    compute: AdapterCompute
    vocabulary: int
    sends_token_ids: bool = False
    kept_reads: KeptReads | None = None
    head_seconds: float = 0.0

    def add_head(self, what: str, started: float) -> None:
        """Count what one of the two ends has computed since then."""
        ended = time.perf_counter()
        self.head_seconds += ended - started
        self.connection.spans.add(what, COMPUTE, started, ended)


def drafts_of(message: m.DraftTokens, vocabulary: int) -> tuple[int, ...]:
    """The tokens that a server has guessed. Raises ``RemoteProtocolError`` for one that the model does not have."""
    found = message.token_ids.data
    if found.size and int(found.max()) >= vocabulary:
        raise RemoteProtocolError(f"a guessed token that the model's {vocabulary} do not have")
    return tuple(found.tolist())


@dataclass
class Ahead:
    """What a server has sent after the last hidden states, so far.

    Attributes:
        next_token: that it expects to be chosen; drafts: what it guesses after that, once it has said so; drafts_s:
            that this took.
        reads: what groups read of all of these.
    """

    next_token: int
    drafts: Sequence[int] | None = None
    drafts_s: float = 0.0
    reads: list[tuple[tuple[int, ...], WireTensor]] = field(default_factory=list)


@dataclass(eq=False)
class DeviceMicroBatch:
    """One micro-batch under way.

    Attributes:
        mode: what it is for; codecs: how its tensors cross.
        decoding: how its tokens go on in a context, in the mode ``decode``.
        known: what groups read of these, where the server has sent it ahead.
        passes: None where each group is asked by itself.
        grad_scale: what the loss's gradient is multiplied with, where there is one; gradient: of another loss than the
            sum of cross-entropies.
        is_finished: whether the server will send no more of it.
        hidden_states: once they have come, the last hidden states (labelled, hidden_size), with those of ``drafts``.
        drafts: the tokens that the server has guessed and taken in after these; drafts_s: that this took.
        ahead: what the server has sent of tokens that may come next; None: it sends nothing.
        losses: in training, (labelled,).
        grads: the gradient of each parameter, by name, once it is through; summed over its micro-batch.
    """

    parts: DeviceParts
    batch: MicroBatch
    key: Key
    mode: m.Mode
    codecs: Codecs
    decoding: m.Decoding | None = None
    known: Early = ()
    passes: m.Passes | None = None
    grad_scale: float = 0.0
    gradient: LossGradient | None = None
    is_finished: bool = False
    hidden_states: FloatArray | None = None
    drafts: Sequence[int] = ()
    drafts_s: float = 0.0
    ahead: Ahead | None = None
    losses: FloatArray | None = None
    grads: dict[str, FloatArray] = field(default_factory=dict)
    _saved: dict[int, Saved] = field(init=False, default_factory=dict)
    _to_come: int = field(init=False, default=0)
    _passes: DevicePasses | None = field(init=False, default=None)
    _kept_reads: KeptReads | None = field(init=False, default=None)  # until the first wave is kept, or known
    _has_sent_early: bool = field(init=False, default=False)
    _read: dict[int, Stored] = field(init=False, default_factory=dict)  # in the first wave, to be kept

    def __post_init__(self) -> None:
        if self.passes is not None:
            self._passes = self._new_passes()
            self._kept_reads = self.parts.kept_reads if self.mode == "train" else None

    def begin(self) -> None:
        """Send the embeddings, or the tokens; and what groups write for what they are known to read."""
        parts, batch = self.parts, self.batch
        early = self.known if self._kept_reads is None else self._kept_reads.find(batch)
        started = time.perf_counter()
        hidden_states = None
        if not parts.sends_token_ids:
            embedded = parts.embedding(batch.ids, keep_table=self.mode == "decode")
            hidden_states = self._to_wire(embedded, TensorRole.EMBEDDINGS)
        parts.add_head("embedding", started)
        positions = batch.crossing_positions
        self.parts.connection.send(
            m.Embeddings(
                step=self.key[0],
                micro_batch=self.key[1],
                mode=self.mode,
                hidden_states=hidden_states,
                sequence_lengths=WireTensor.from_ints(batch.sequence_lengths),
                label_positions=WireTensor.from_ints(batch.label_positions),
                crossing_positions=None if positions is None else WireTensor.from_ints(positions),
                token_ids=WireTensor.from_ints(batch.ids) if parts.sends_token_ids else None,
                decoding=self.decoding,
                passes=self.passes,
                kept_reads=reads_digest(read for _, read in early) if early and self.decoding is None else None,
            )
        )
        self._has_sent_early = bool(early)
        for groups, read in early:
            self._write(groups, read)
        if parts.connection.recorder is not None:
            parts.connection.recorder.add_micro_batch(self.mode, batch)

    def handle(self, message: m.ExchangeMessage) -> None:
        """Answer the server's next message of this micro-batch."""
        if self._has_sent_early:
            self._count_early(is_refused=isinstance(message, m.GroupInput) and message.groups[0] == 0)
        match message:
            case m.DraftTokens() if self.ahead is not None:
                self.ahead.drafts, self.ahead.drafts_s = drafts_of(message, self.parts.vocabulary), message.computed_s
            case m.DraftTokens():
                self.drafts, self.drafts_s = drafts_of(message, self.parts.vocabulary), message.computed_s
            case m.GroupInput() if self.ahead is not None:
                self.ahead.reads.append((message.groups, message.hidden_states.copied()))
            case m.GroupInput() if self._passes is not None:
                self._answer_pass(message)
            case m.GroupInput():
                self._answer_input(message)
            case m.LabelledHiddenStates():
                self._handle_last_hidden_states(message)
            case m.GroupGrad():
                self._answer_grad(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} of a micro-batch from the server")

    def _answer_input(self, message: m.GroupInput) -> None:
        (group,) = message.groups
        outputs, saved = self.parts.compute.forward(group, message.hidden_states)
        if self.mode == "train":
            self._saved[group] = saved
        self._send_deltas(message.groups, tuple(self._to_wire(output, TensorRole.DELTA) for output in outputs))

    def _answer_pass(self, message: m.GroupInput) -> None:
        self._write(message.groups, message.hidden_states)
        if self._kept_reads is not None:
            read = message.hidden_states.data
            self._read |= zip(message.groups, np.split(read, len(message.groups)), strict=True)
            if len(self._read) == len(self.parts.adapters.groups):
                self._kept_reads.keep(self.batch, self._read)
                self._kept_reads = None
                self._read.clear()

    def _count_early(self, *, is_refused: bool) -> None:
        """The server has read the same as what is kept and goes on, or something else, which it sends now."""
        kept, self._has_sent_early = self._kept_reads, False
        if kept is not None:
            kept.count(is_refused=is_refused)
        if is_refused:
            self._passes = self._new_passes()
        else:
            self._kept_reads = None

    def _write(self, groups: tuple[int, ...], read: WireTensor) -> None:
        assert self._passes is not None
        self._send_deltas(groups, self._passes.write(groups, read))

    def _send_deltas(self, groups: tuple[int, ...], deltas: tuple[WireTensor, ...]) -> None:
        step, micro_batch = self.key
        self.parts.connection.send(m.GroupDelta(step=step, micro_batch=micro_batch, groups=groups, deltas=deltas))

    def _new_passes(self) -> DevicePasses:
        return DevicePasses(self.parts.compute, self.codecs, trains=self.mode == "train")

    def _handle_last_hidden_states(self, message: m.LabelledHiddenStates) -> None:
        hidden_states = decode_floats(message.hidden_states)
        self._to_come = message.gradients
        self.is_finished = not self._to_come
        if self.mode in m.WITHOUT_GRADIENTS:
            self.hidden_states = hidden_states
            self.ahead = None if message.next_token is None else Ahead(message.next_token)
            return
        started = time.perf_counter()
        self.losses, grads = self.parts.head.loss_and_grad(
            hidden_states, self.batch.labels, self.grad_scale, self.gradient
        )
        self.parts.add_head("head and loss", started)
        if self._to_come or self.mode == "basis":
            sent = self._to_wire(grads, TensorRole.LAST_HIDDEN_STATES_GRAD)
            step, micro_batch = self.key
            self.parts.connection.send(m.GradHiddenStates(step=step, micro_batch=micro_batch, grad_hidden_states=sent))

    def _answer_grad(self, message: m.GroupGrad) -> None:
        if self._passes is not None:
            self._answer_grads_of_pass(message, self._passes)
            return
        (group,), compute = message.groups, self.parts.compute
        grads: Sequence[FloatArray] = [decode_floats(grad) for grad in message.grads]
        dx, backward = compute.input_grad(group, grads)
        if message.answer:
            self._send_input_grads(message.groups, self._to_wire(dx, TensorRole.INPUT_GRAD))
        # After the answer has left: the server works on while we compute the weights' gradients.
        self.grads |= compute.weight_grads(group, self._saved.pop(group), grads, backward)
        self._to_come -= 1
        self.is_finished = not self._to_come

    def _answer_grads_of_pass(self, message: m.GroupGrad, passes: DevicePasses) -> None:
        sent = passes.input_grads(message.groups, message.grads, answer=message.answer)
        if sent is not None:
            self._send_input_grads(message.groups, sent)
        self._to_come -= len(message.groups)
        self.is_finished = not self._to_come
        if self.is_finished:
            self.grads |= passes.weight_grads()
            self._passes = None  # it may wait for others to be through

    def _send_input_grads(self, groups: tuple[int, ...], tensor: WireTensor) -> None:
        step, micro_batch = self.key
        self.parts.connection.send(
            m.GroupInputGrad(step=step, micro_batch=micro_batch, groups=groups, grad_hidden_states=tensor)
        )

    def _to_wire(self, values: FloatArray, role: TensorRole) -> WireTensor:
        return self.codecs.of(role).encode(np.asarray(values))
