"""The device of one micro-batch: tensors to it and from it, what was computed for it, and how long it is waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from dlora.cloud.exchange.forward import Forwards
from dlora.cloud.exchange.gate import Gate
from dlora.cloud.exchange.torch_codecs import from_wire, to_wire
from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError
from dlora.protocol.micro_batch import Key
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .session_device import DeviceGaveUpError, SessionDevice
from .timeouts import Deadlines

M = TypeVar("M", bound=m.ExchangeMessage)


class MicroBatchDevice:
    """What the micro-batch sends goes out at once, and what it waits for has a deadline, after which the device is told
    to come again, and after longer the session ends.

    Made when the micro-batch begins to wait for its first turn to compute.

    Args:
        codecs: how its tensors cross; dtype: of those that came.
        arrived: when its first message was there.

    Attributes:
        clock: seconds that never go back.
        waited_s: for the device so far; idle_s: for the device and for the gate.
    """

    # Seven parameters: whose device it is, of what, and all that there is to wait for.
    def __init__(
        self,
        device: SessionDevice,
        key: Key,
        codecs: Codecs,
        dtype: torch.dtype,
        *,
        gate: Gate,
        deadlines: Deadlines,
        arrived: float,
    ) -> None:
        self.waited_s = 0.0
        self.idle_s = 0.0
        self._times: list[float] = [arrived] * 3
        self._began = device.clock()
        self._device = device
        self.clock = device.clock
        self._key = key
        self._codecs = codecs
        self._dtype = dtype
        self._gate = gate
        self._deadlines = deadlines
        self._input_grads: dict[int, WireTensor] = {}  # that came while another was waited for

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, the micro-batch computes; until its first turn comes, it waits."""
        began = self.clock()
        with self._gate.computing():
            now = self.clock()
            self.idle_s += now - began
            self._count_gate_wait(now - began)
            self._times += (began, began, now)
            yield

    def run(self, forwards: Forwards) -> None:
        """Run forward passes of the micro-batch's context, one after the other."""
        before = self.idle_s
        self._gate.run(forwards, self._count_idle)
        if self.idle_s > before:  # where others share the turn
            self._count_gate_wait(self.idle_s - before)

    def _count_idle(self, seconds: float) -> None:
        self.idle_s += seconds

    def _count_gate_wait(self, seconds: float) -> None:
        self._device.counts.gate_waits.add(seconds)

    def count_guesses(self, guessed: int, right: int) -> None:
        """Of so many tokens that were guessed for the device, it has gone on from ``right``."""
        if guessed:
            self._device.counts.guessed.add(guessed)
            self._device.counts.right.add(right)

    # -- tensors -------------------------------------------------------------------------------------------

    def send_input(self, group: int, x: Tensor) -> None:
        """What a group's adapters get, (rows, width)."""
        self.send_inputs((group,), self._to_wire(x, TensorRole.GROUP_INPUT))

    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]:
        """What a group's adapters give, (rows, width) each."""
        return [self._from_wire(delta, torch_device) for delta in self.receive(m.GroupDelta).deltas]

    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None:
        """Gradients of a group's outputs; ``answer``: whether that of its input is wanted."""
        on_wire = tuple(self._to_wire(grad, TensorRole.DELTA_GRAD) for grad in grads)
        self.send_output_grads((group,), on_wire, answer=answer)

    def receive_input_grad(self, group: int, torch_device: torch.device) -> Tensor:
        """The gradient of a group's input, (rows, width)."""
        while group not in self._input_grads:
            message = self.receive(m.GroupInputGrad)
            self._input_grads[message.groups[0]] = message.grad_hidden_states
        return self._from_wire(self._input_grads.pop(group), torch_device)

    def send_labelled(self, hidden_states: Tensor, gradients: int, next_token: int | None = None) -> None:
        """The last hidden states, (labelled, width), and how many groups' gradients will come; ``next_token`` as
        ``LabelledHiddenStates`` has it."""
        step, micro_batch = self._key
        on_wire = self._to_wire(hidden_states, TensorRole.LAST_HIDDEN_STATES)
        self._send(
            m.LabelledHiddenStates(
                step=step, micro_batch=micro_batch, hidden_states=on_wire, gradients=gradients,
                next_token=next_token, computed_s=self.computed_s, queued_s=self._queued_s, times=self._take_times(),
            )
        )  # fmt: skip

    def receive_labelled_grad(self, like: Tensor) -> Tensor:
        """Their gradient."""
        return self._from_wire(self.receive(m.GradHiddenStates).grad_hidden_states, like.device)

    def send_encoded(self, hidden_states: Sequence[Tensor]) -> None:
        """What comes out of the blocks that the device asked for, (tokens, width) a sequence."""
        step, micro_batch = self._key
        on_wire = tuple(self._to_wire(each, TensorRole.LAST_HIDDEN_STATES) for each in hidden_states)
        self._send(m.EncodedHiddenStates(step=step, micro_batch=micro_batch, hidden_states=on_wire))

    def _to_wire(self, tensor: Tensor, role: TensorRole) -> WireTensor:
        return to_wire(tensor, self._codecs, role)

    def _from_wire(self, tensor: WireTensor, torch_device: torch.device) -> Tensor:
        return from_wire(tensor, torch_device, self._dtype)

    # -- messages ------------------------------------------------------------------------------------------

    def send_drafts(self, token_ids: Sequence[int], seconds: float) -> None:
        """Tokens that were guessed, and how long that took, with what was computed for others meanwhile."""
        step, micro_batch = self._key
        ids = WireTensor.from_ints(token_ids)
        self._send(
            m.DraftTokens(
                step=step, micro_batch=micro_batch, token_ids=ids, computed_s=min(max(0.0, seconds), m.MAX_SECONDS)
            )
        )

    def send_inputs(self, groups: tuple[int, ...], tensor: WireTensor) -> None:
        """What some groups' adapters get, as it crosses."""
        step, micro_batch = self._key
        self._send(
            m.GroupInput(
                step=step, micro_batch=micro_batch, groups=groups, hidden_states=tensor, times=self._take_times()
            )
        )

    def send_output_grads(
        self,
        groups: tuple[int, ...],
        tensors: tuple[WireTensor, ...],
        *,
        answer: bool,
        backward_pass: int = 0,
    ) -> None:
        """Gradients of some groups' outputs, as they cross; ``answer``: whether their inputs' are wanted."""
        step, micro_batch = self._key
        self._send(
            m.GroupGrad(
                step=step, micro_batch=micro_batch, groups=groups, grads=tensors, answer=answer,
                backward_pass=backward_pass, computed_s=self.computed_s, queued_s=self._queued_s,
                times=self._take_times(),
            )
        )  # fmt: skip

    @property
    def computed_s(self) -> float:
        """Seconds that were computed so far."""
        return min(max(0.0, self.clock() - self._began - self.idle_s), m.MAX_SECONDS)

    @property
    def _queued_s(self) -> float:
        """Seconds that the gate was waited for so far."""
        return min(max(0.0, self.idle_s - self.waited_s), m.MAX_SECONDS)

    def _take_times(self) -> tuple[float, ...]:
        """What ``GroupInput`` says of the time since the last message; nothing where the device did not ask."""
        opening = self._device.session.opened_with
        times, self._times = self._times, []
        if opening is None or not opening.times:
            return ()
        since = (at - self._device.began for at in (*times[-m.MAX_TIMES + 1 :], self.clock()))
        return tuple(min(max(0.0, at), m.MAX_SECONDS) for at in since)

    def _send(self, message: m.ExchangeMessage) -> None:
        self._device.send(message)  # type: ignore[arg-type]

    def receive(self, kind: type[M]) -> M:
        """The device's next message of this micro-batch. Raises ``DeviceGaveUpError``, and what the transport does."""
        transport = self._device.transport
        began, times_lost = self.clock(), transport.times_lost
        try:
            with self._gate.waiting():
                try:
                    message = self._await_answer(began + self._deadlines.all_answers.seconds - self.waited_s)
                finally:  # before the gate is waited for: what others compute is not the device's time
                    received = self.clock()
                    waited_s = received - began
                    self.waited_s += waited_s
        finally:
            now = self.clock()
            self.idle_s += now - began
            self._count_gate_wait(now - received)
            self._times += (began, received, now)
        if transport.times_lost == times_lost:  # else it tells of the network, not of the device
            self._deadlines.one_answer.observe(waited_s)
        if isinstance(message, m.Error):
            raise DeviceGaveUpError(message.message)
        assert isinstance(message, kind)  # the session's rules let nothing else through
        return message

    def _await_answer(self, give_up_at: float) -> m.AnyMessage:
        """The next message; a device that is late is told to come again, and the clock starts anew."""
        late = RefusedError("the device did not answer in time", m.ErrorCode.DEADLINE, retryable=True)
        while self.clock() < give_up_at:
            message = self._device.receive(self._key, self._deadlines.one_answer.seconds, give_up_at)
            if message is not None:
                return message
            self._deadlines.one_answer.missed()
            self._device.disconnect(late)
        self._deadlines.all_answers.missed()
        raise late
