"""Runs one session: a thread that answers a device's messages, step after step, until it closes.

The thread holds the compute gate while it computes and lets go of it while it waits for the device, so that
sessions share the cores without oversubscribing them and a slow device stalls nobody but itself. It notices nothing
of connections that come and go; what it waits for has a deadline, and then the device must come back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dlora.cloud.door.quotas import SessionQuota
from dlora.cloud.exchange.sites import MicroBatchExchange, exchanging
from dlora.cloud.exchange.wire import from_wire, to_wire
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import Layout, lay_out
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.cloud.model.memory import release_freed
from dlora.protocol import messages as m
from dlora.protocol.controller import Controller
from dlora.protocol.counting import counted_tokens
from dlora.protocol.errors import DamagedFrameError, RefusedError, RemoteProtocolError
from dlora.protocol.session import Session
from dlora.protocol.tensors import WireTensor

from .patience import Deadlines
from .ticket import ticket_of


class Transport(Protocol):
    """Frames to and from one device, blocking; see ``SessionTransport``."""

    @property
    def losses(self) -> int: ...
    def send(self, frame: bytearray) -> None: ...
    def receive(self, timeout_s: float, give_up_at: float = ...) -> bytes: ...
    def hang_up(self, refusal: RefusedError | RemoteProtocolError) -> None: ...
    def wait_for_device(self, extra_s: float = 0.0) -> object: ...


class ComputeGate:
    """Lets ``width`` sessions compute at a time; the others wait their turn.

    Attributes:
        turns: how often a micro-batch has begun or ended to compute so far.
    """

    def __init__(self, width: int = 1) -> None:
        self.turns = 0
        self._free = threading.Semaphore(width)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self._free:
            self.turns += 1
            try:
                yield
            finally:
                self.turns += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within ``computing``: let others compute for as long as the device is waited for."""
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()


class SessionExecutor:
    """Answers the messages of one open session.

    Raises (from ``run``) ``RemoteProtocolError`` when the device breaks the rules, ``RefusedError`` when the server
    says no, ``NonFiniteError`` when the base model's results are not finite, and whatever the transport raises when
    the device is lost.

    Args:
        deadlines: of the device; what is learnt here holds for its next session.
        idle_timeout_s: how long nothing may come between micro-batches.
        draining: once set, the session ends after the step that it is in; ``run`` then raises ``shutting_down``.
    """

    def __init__(
        self,
        base: BaseModel,
        session: Session,
        transport: Transport,
        controller: Controller,
        *,
        ticket_key: bytes,
        gate: ComputeGate,
        threads: int,
        live_bytes: LiveBytes,
        quota: SessionQuota,
        deadlines: Deadlines,
        idle_timeout_s: float,
        draining: threading.Event,
    ) -> None:
        assert session.opened_with is not None
        assert session.welcome is not None
        self._base = base
        self._session = session
        self._transport = transport
        self._controller = controller
        self._ticket_key = ticket_key
        self._gate = gate
        self._threads = threads
        self._welcome = session.welcome
        self._live_bytes = live_bytes
        self._quota = quota
        self._deadlines = deadlines
        self._idle_timeout_s = idle_timeout_s
        self._draining = draining
        self._waited_s = 0.0  # for the device, in this micro-batch
        self._idle_s = 0.0  # for the device and for the gate
        self._wire_dtype = session.opened_with.wire_dtype
        self._input_grads: dict[int, Tensor] = {}
        self._micro_batch: m.Embeddings | None = None

    def opened(self, name: str, token: bytes) -> m.SessionOpened:
        """The message that opens the session, with the controller's states and ticket."""
        units = WireTensor.from_bytes(self._controller.states)
        return m.SessionOpened(session=name, units=units, ticket=self._ticket(), token=token)

    def run(self) -> None:
        """Answer until the device closes the session."""
        torch.set_num_threads(self._threads)  # OpenMP keeps this per thread, and this thread is new
        try:
            while self._answer_next():
                pass
        finally:
            self._micro_batch = None
            self._input_grads.clear()
            release_freed()

    def _answer_next(self) -> bool:
        """Whether there may be more. Not a loop: what came would be kept for as long as the next takes to come."""
        match self._receive_within(self._idle_timeout_s, time.monotonic() + self._idle_timeout_s):
            case m.Embeddings() as begun:
                self._run_micro_batch(begun)
            case m.StepReport() as report:
                self._handle_report(report)
            case None:
                text = f"nothing came for {self._idle_timeout_s:.0f} s; go on with the ticket"
                raise RefusedError(text, m.ErrorCode.DEADLINE, retryable=True)
            case _:  # the device closes the session, or gives it up
                return False
        return True

    def _handle_report(self, report: m.StepReport) -> None:
        self._admit(0, 0)  # it is little, but a device may send nothing else
        started = time.monotonic()
        try:
            units = self._controller.report(report.step, report.scores.to_floats())
            self._send(m.Signal(step=report.step, units=WireTensor.from_bytes(units), ticket=self._ticket()))
        finally:
            self._quota.end(time.monotonic() - started)
        if self._draining.is_set():
            raise shutting_down()

    def _ticket(self) -> WireTensor:
        return WireTensor.from_bytes(ticket_of(self._controller, self._ticket_key))

    def _run_micro_batch(self, begun: m.Embeddings) -> None:
        self._micro_batch = begun
        self._input_grads.clear()
        live, trained = self._session.live, self._session.active
        packs, lengths = self._welcome.packs, begun.sequence_lengths.data
        layout = lay_out(
            self._to_torch(begun.hidden_states),
            torch.from_numpy(lengths).long(),
            may_pack=packs,
            max_tokens=self._welcome.max_tokens,
        )
        lowest = self._session.groups[min(trained)] if trained and begun.mode == "train" else None
        self._admit(counted_tokens(lengths, packs=packs), self._live_bytes.estimate(layout, lowest))
        started, losses = time.monotonic(), self._transport.losses
        self._waited_s = self._idle_s = 0.0
        try:
            with self._gate.computing(), torch.autograd.set_multithreading_enabled(False):
                started = time.monotonic()
                self._compute(begun, layout, live, trained)
        finally:
            self._micro_batch = None
            self._quota.end(time.monotonic() - started - self._idle_s)
        if self._transport.losses == losses:
            self._deadlines.answers.observe(self._waited_s)

    def _compute(
        self, begun: m.Embeddings, layout: Layout, live: Collection[int], trained: Collection[int]
    ) -> None:
        training = begun.mode == "train"
        rows = layout.rows
        exchange = MicroBatchExchange(self, self._base, self._session.groups, live=live, trained=trained, rows=rows)
        with torch.set_grad_enabled(training), exchanging(exchange):
            hidden = self._base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)
            positions = torch.from_numpy(begun.label_positions.data).long().to(self._base.device)
            labelled_rows = positions if rows is None else rows.index_select(0, positions)
            labelled = hidden.reshape(-1, hidden.shape[-1]).index_select(0, labelled_rows)
        del hidden
        self._send(
            m.LabelledHiddenStates(
                step=begun.step,
                micro_batch=begun.micro_batch,
                hidden_states=to_wire(labelled, self._wire_dtype),
                gradients=exchange.gradients,
            )
        )
        if exchange.gradients:
            message = self._receive()
            assert isinstance(message, m.GradHiddenStates)
            labelled.backward(self._to_torch(message.grad_hidden_states))

    def _admit(self, tokens: int, live_bytes: int) -> None:
        """Charge what comes to its device's quotas; over them, send the device away until there is room.

        Not for ever: a device that comes too early again and again loses its session, as an idle one does.
        """
        give_up_at = math.inf
        while True:
            try:
                self._quota.begin(tokens, live_bytes)
                return
            except RefusedError as refusal:
                wait_s, now = min(refusal.retry_after_s or 0.0, m.MAX_RETRY_AFTER_S), time.monotonic()
                if not refusal.retryable or now > give_up_at:
                    raise
                give_up_at = min(give_up_at, now + wait_s + self._idle_timeout_s)
                self._transport.hang_up(refusal)
                self._transport.wait_for_device(wait_s)

    # -- Channel, for the exchange -----------------------------------------------------------------------

    def send_input(self, group: int, x: Tensor) -> None:
        step, micro_batch = self._under_way()
        hidden_states = to_wire(x, self._wire_dtype)
        self._send(m.GroupInput(step=step, micro_batch=micro_batch, group=group, hidden_states=hidden_states))

    def receive_deltas(self, group: int) -> list[Tensor]:
        message = self._receive()
        assert isinstance(message, m.GroupDelta)
        return [self._to_torch(delta) for delta in message.deltas]

    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None:
        step, micro_batch = self._under_way()
        on_wire = tuple(to_wire(grad, self._wire_dtype) for grad in grads)
        self._send(m.GroupGrad(step=step, micro_batch=micro_batch, group=group, grads=on_wire, answer=answer))

    def receive_input_grad(self, group: int) -> Tensor:
        while group not in self._input_grads:
            message = self._receive()
            assert isinstance(message, m.GroupInputGrad)
            self._input_grads[message.group] = self._to_torch(message.grad_hidden_states)
        return self._input_grads.pop(group)

    # -- the wire ----------------------------------------------------------------------------------------

    def _under_way(self) -> tuple[int, int]:
        assert self._micro_batch is not None
        return self._micro_batch.step, self._micro_batch.micro_batch

    def _to_torch(self, tensor: WireTensor) -> Tensor:
        return from_wire(tensor, self._base.device, self._base.dtype)

    def _send(self, message: m.AnyMessage) -> None:
        self._transport.send(self._session.send(message))

    def _receive(self) -> m.AnyMessage:
        """The device's next message of this micro-batch."""
        began, losses = time.monotonic(), self._transport.losses
        try:
            with self._gate.waiting():
                try:
                    message = self._await_answer(began + self._deadlines.answers.seconds - self._waited_s)
                finally:  # before the gate is waited for: what others compute is not the device's time
                    waited_s = time.monotonic() - began
                    self._waited_s += waited_s
        finally:
            self._idle_s += time.monotonic() - began
        if self._transport.losses == losses:  # else it tells of the network, not of the device
            self._deadlines.answer.observe(waited_s)
        if isinstance(message, m.Error):
            raise DeviceGaveUpError(message.message)
        return message

    def _await_answer(self, give_up_at: float) -> m.AnyMessage:
        """The next message; a device that is late is told to come again, and the clock starts anew."""
        late = RefusedError("the device did not answer in time", m.ErrorCode.DEADLINE, retryable=True)
        while time.monotonic() < give_up_at:
            message = self._receive_within(self._deadlines.answer.seconds, give_up_at)
            if message is not None:
                return message
            self._deadlines.answer.missed()
            self._transport.hang_up(late)
        self._deadlines.answers.missed()
        raise late

    def _receive_within(self, seconds: float, give_up_at: float = math.inf) -> m.AnyMessage | None:
        """The next message that did not come before, or None where there is none in time.

        A frame that came before is no answer: it does not begin the time anew.
        """
        left_s = seconds
        while True:
            began, losses = time.monotonic(), self._transport.losses
            try:
                message = self._session.receive(self._transport.receive(left_s, give_up_at))
            except TimeoutError:
                return None
            except DamagedFrameError as damage:
                self._transport.hang_up(damage)
                continue
            if message is not None:
                return message
            here = self._transport.losses == losses  # else it is another connection, and was away in between
            left_s = max(0.0, left_s - (time.monotonic() - began)) if here else seconds


def shutting_down() -> RefusedError:
    """What devices are told when the server stops."""
    text = "shutting down; the run goes on with its ticket once the server is back"
    return RefusedError(text, m.ErrorCode.SHUTTING_DOWN, retryable=True)


class DeviceGaveUpError(Exception):
    """The device ended the session in the middle of a micro-batch, and said why."""
