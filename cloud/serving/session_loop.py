"""Runs one session: answers a device's messages, step after step, until it closes.

Between two messages that begin something it waits on the event loop. What one of them begins runs in a thread, and
where a session may have several micro-batches under way, each has a thread of its own. A micro-batch holds the compute
gate while it computes and lets go of it while it waits for the device, so that sessions share the cores without
oversubscribing them and a slow device stalls nobody but itself. It notices nothing of connections that come and go;
what it waits for has a deadline, and then the device must come back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, nullcontext
from typing import Final

import torch

from dlora.cloud.admission.quotas import Charge
from dlora.cloud.exchange.gate import Gate, TrainingGate
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.model.context import Context
from dlora.cloud.model.memory import release_freed_memory
from dlora.protocol import messages as m
from dlora.protocol.adapters import parameter_bytes, state_bytes
from dlora.protocol.controller import Controller
from dlora.protocol.counting import counted_tokens
from dlora.protocol.errors import RefusedError
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import decode_floats

from .decoding import DecodeMicroBatch, SessionContext, context_ways
from .micro_batch import ServerMicroBatch
from .micro_batch_device import MicroBatchDevice
from .service import Service
from .session_device import SessionDevice
from .sessions import ServerSession
from .ticket import ticket_of
from .timeouts import Deadlines

# For how long a thread looks for the next message while micro-batches are under way, before it looks at these again.
ANOTHER_WITHIN_S: Final = 1.0
# What a micro-batch of so many has freed goes back to the system at once: the next one's pieces do not fit into it.
MUCH_BYTES: Final = 16 << 20


class SessionLoop:
    """Answers the messages of one open session.

    Raises (from ``wait`` and ``answer``) ``RemoteProtocolError`` when the device breaks the rules, ``RefusedError``
    when the server says no, ``NonFiniteError`` when the base model's results are not finite, and whatever the transport
    raises when the device is lost.

    Args:
        controller: of Kill and Revive; None where the session does not train.
        deadlines: of the device; what is learnt here holds for its next session.
    """

    def __init__(
        self, service: Service, live: ServerSession, controller: Controller | None, deadlines: Deadlines
    ) -> None:
        opening = live.session.opened_with
        assert opening is not None
        self._service = service
        self._live = live
        self._session = live.session
        self._transport = live.transport
        self._quota = live.quota
        self._controller = controller
        self._clock = service.settings.clock
        self._deadlines = deadlines
        self._counts = service.counts
        self._device = SessionDevice(live.session, live.transport, service.settings.clock, service.counts)
        seed = opening.purpose.seed if isinstance(opening.purpose, m.Train) else 0
        self._model = SessionModel(service.base, opening, seed, parts=service.parts, row_blocks=service.row_blocks)
        self._window = opening.window
        self._running: set[futures.Future[None]] = set()
        self._begin_idle_time()
        self._charge_ended = threading.Condition()
        self._beginning = threading.Lock()  # one at a time is laid out and waits for memory
        purpose = opening.purpose
        self._is_given = is_given(purpose)
        if not live.session.has_adapter_state:
            for group in range(len(opening.groups)):
                self._hold(group)
                self._model.add(())
        self._context: SessionContext | None = None
        if not isinstance(purpose, m.Train) and purpose.context_length:
            self._make_context(purpose)

    def opened_message(self, name: str, token: bytes) -> m.SessionOpened:
        """The message that opens the session, with the controller's states and ticket where it trains."""
        if self._controller is None:
            return m.SessionOpened(session=name, token=token)
        units = WireTensor.from_bytes(self._controller.states)
        return m.SessionOpened(session=name, token=token, units=units, ticket=self._ticket(self._controller))

    async def wait(self) -> None:
        """Wait on the event loop until there is something to answer."""
        self._live.idle_since = now = self._clock()
        try:
            if now >= self._idle_until:
                raise TimeoutError
            await self._transport.wait_for_frame(self._idle_until - now)
        except TimeoutError:
            text = f"nothing came for {self._service.settings.timeouts.idle_s:.0f} s; go on with the ticket"
            raise RefusedError(text, m.ErrorCode.DEADLINE, retryable=True) from None
        finally:
            self._live.idle_since = None

    def answer(self) -> bool:
        """Answer what has come, in a thread; False where the device has closed the session.

        Returns once nothing is under way, but not while there is more that other micro-batches have read.
        """
        while self._answer_next():
            if not self._running and not self._device.has_more:
                if not self._is_idle:
                    self._begin_idle_time()
                return True
        return False

    def _begin_idle_time(self) -> None:
        """From now on it is idle. A message that came before is nothing new, and does not begin the time anew."""
        self._is_idle, self._idle_until = True, self._clock() + self._service.settings.timeouts.idle_s

    def close(self) -> None:
        """Wait, in a thread, for what is still under way, and let go of everything."""
        futures.wait(self._running)
        self._device.close()
        release_freed_memory()

    def _answer_next(self) -> bool:
        """Whether there may be more. Not a loop: what came would be kept for as long as the next takes to come."""
        give_up_at = self._idle_until if self._is_idle and not self._running else math.inf
        message = self._device.receive(None, ANOTHER_WITHIN_S, give_up_at)
        self._is_idle = self._is_idle and message is None
        match message:
            case m.Embeddings() as begun:
                # Of a basis pass one at a time, and none beside what is made of them: sums round by their order.
                if self._window == 1 or begun.mode == "basis":
                    self._run_micro_batch(begun)
                else:
                    self._running.add(running := self._service.threads.submit(self._run_or_fail, begun))
                    running.add_done_callback(self._running.discard)
            case m.StepReport() as report:
                self._handle_report(report)
            case m.AdapterState() as state:
                self._add_site(state)
            case m.MakeAdapterState(group=group):
                self._make_site(group)
            case m.GroupParameters() as given:
                self._take_parameters(given)
            case None:  # what came was nothing new, or micro-batches are under way and nothing came beside
                pass
            case _:  # the device closes the session, or gives it up
                return False
        return True

    # -- set-up ------------------------------------------------------------------------------------------

    def _make_context(self, purpose: m.Use | m.Encode) -> None:
        """Make room for a context's keys and values; idle ones, of this caller or of all, give way."""
        parts, sessions = self._service.parts, self._service.sessions
        assert parts is not None  # the session's rules
        ways = context_ways(purpose, self._model.groups)
        nbytes = ways.bytes_per_token(parts) * purpose.context_length
        while True:
            try:
                self._quota.hold(nbytes, "the context", "ask for a shorter one")
                break
            except RefusedError as refusal:
                of_caller = refusal.code == m.ErrorCode.QUOTA_LIVE_BYTES
                if not refusal.retryable or not sessions.end_idle(self._live.caller if of_caller else None):
                    raise
        self._live.cache_bytes = nbytes
        self._context = SessionContext(Context(parts, ways, purpose.context_length))

    def _add_site(self, state: m.AdapterState) -> None:
        self._hold(state.group)
        self._model.add(state.tensors)
        self._device.send(m.AdapterState(group=state.group, tensors=()))
        self._release_sketches()

    def _make_site(self, group: int) -> None:
        making_bytes = self._model.making_bytes
        with self._charged():
            self._hold(group)
            self._quota.hold(making_bytes)
            with self._service.gate.computing():
                made = self._model.make_state()
                self._model.add(made.tensors)
            self._quota.release(making_bytes)
            self._device.send(made)
        self._release_sketches()

    def _release_sketches(self) -> None:
        """Once every group has its state, nothing is kept of what they were made from."""
        if self._model.sketches and len(self._model.sites) == len(self._model.groups):
            self._model.sketches = []
            self._quota.release(self._model.sketch_bytes)
            release_freed_memory()

    def _hold(self, group: int) -> None:
        """Count what the server keeps of a group in the device's quota, until the session ends: what it may be given
        as well, so that a run that begins is not refused in the middle."""
        adapter, spec = self._model.adapter, self._model.groups[group]
        kept = state_bytes(adapter, spec, self._model.state_dtype)
        self._quota.hold(kept + (parameter_bytes(adapter, spec) if self._is_given else 0))

    def _take_parameters(self, given: m.GroupParameters) -> None:
        """Of a group that the server applies: until its unit is revived, or, where it is lent, the session ends."""
        with self._charged():
            self._model.take_parameters(given)
            self._device.send(m.GroupParameters(group=given.group, tensors=()))

    # -- reports -----------------------------------------------------------------------------------------

    def _handle_report(self, report: m.StepReport) -> None:
        assert self._controller is not None
        with self._charged():
            units = self._controller.report(report.step, decode_floats(report.scores))
            self._counts.steps.add()
            ticket = self._ticket(self._controller)
            self._device.send(m.Signal(step=report.step, units=WireTensor.from_bytes(units), ticket=ticket))
            for group in self._model.parameters.keys() - self._session.units.handed_over:
                del self._model.parameters[group]
        if self._service.draining.is_set():
            raise shutting_down()

    def _ticket(self, controller: Controller) -> WireTensor:
        return WireTensor.from_bytes(ticket_of(controller, self._service.ticket_key))

    # -- micro-batches -----------------------------------------------------------------------------------

    def _run_or_fail(self, begun: m.Embeddings) -> None:
        try:
            self._run_micro_batch(begun)
        except Exception as error:  # of a thread that nobody waits for, while another may wait for the device
            self._device.fail(error)
            self._transport.interrupt(error)

    def _run_micro_batch(self, begun: m.Embeddings) -> None:
        service, packs, arrived = self._service, self._service.may_pack, self._clock()
        if begun.mode == "basis" and not self._model.sketches:
            self._quota.hold(self._model.sketch_bytes)
            self._model.begin_sketches()
        group_states = self._session.units.group_states
        with self._beginning:
            run: ServerMicroBatch | DecodeMicroBatch
            if begun.mode == "decode":
                assert self._context is not None  # the session's rules
                run = DecodeMicroBatch(self._model, self._context, begun, group_states)
            else:
                run = ServerMicroBatch(self._model, begun, group_states, max_tokens=service.max_tokens, packs=packs)
            tokens = counted_tokens(begun.sequence_lengths.data, packs=packs) + begun.guesses
            mode = begun.mode
            del begun
            charge = self._admit(tokens, run.estimate(service.live_bytes))
            self._counts.tokens.add(tokens, mode)
        # Before it counts as computing: the server may still go on ahead in the context.
        with nullcontext() if isinstance(run, ServerMicroBatch) else run.lock:
            self._run_admitted(run, charge, arrived)

    def _run_admitted(self, run: ServerMicroBatch | DecodeMicroBatch, charge: Charge, arrived: float) -> None:
        service = self._service
        device = MicroBatchDevice(
            self._device, run.key, run.codecs, service.base.dtype, gate=self._gate_of(run), deadlines=self._deadlines,
            arrived=arrived,
        )  # fmt: skip
        started, times_lost = self._clock(), self._transport.times_lost
        try:
            with device.computing(), torch.autograd.set_multithreading_enabled(False):
                self._device.raise_failure()  # of another micro-batch, while this one waited
                run.run(device)
        finally:
            charge.end(self._clock() - started - device.idle_s)
            self._counts.waited_s.add(device.waited_s, "device")
            self._quota.count_kept(self._session.link.kept_bytes)
            with self._charge_ended:
                self._charge_ended.notify_all()
            if charge.live_bytes >= MUCH_BYTES:
                release_freed_memory()
        if self._transport.times_lost == times_lost:
            self._deadlines.all_answers.observe(device.waited_s)

    def _gate_of(self, run: ServerMicroBatch | DecodeMicroBatch) -> Gate:
        shared = self._service.shared_gate
        if shared is not None and isinstance(run, DecodeMicroBatch) and run.may_share(shared.most_tokens):
            return shared
        gate = self._service.gate
        return TrainingGate(gate) if isinstance(run, ServerMicroBatch) and run.lowest_trained is not None else gate

    @contextmanager
    def _charged(self) -> Iterator[None]:
        """Charge work of no tokens and its time: it is little, but a device may send nothing else."""
        charge = self._admit(0, 0)
        started = self._clock()
        try:
            yield
        finally:
            charge.end(self._clock() - started)

    def _admit(self, tokens: int, live_bytes: int) -> Charge:
        """Charge what comes to its device's quotas; over them, send the device away until there is room.

        Not while another micro-batch of the session is under way, which needs its device: that one is waited for first.
        And not for ever: a device that comes too early again and again loses its session, as an idle one does.
        """
        give_up_at = math.inf
        while True:
            self._quota.count_kept(self._session.link.kept_bytes)
            try:
                return self._quota.charge(tokens, live_bytes)
            except RefusedError as refusal:
                now = self._clock()
                if not refusal.retryable or now > give_up_at:
                    raise
                if self._wait_for_other_micro_batches() or self._end_idle_context(refusal):
                    continue
                wait_s = min(refusal.retry_after_s or 0.0, m.MAX_RETRY_AFTER_S)
                give_up_at = min(give_up_at, now + wait_s + self._service.settings.timeouts.idle_s)
                self._device.disconnect(refusal)
                self._live.idle_since = now  # it computes nothing: else two of a device could wait for each other
                self._transport.wait_for_device()
                self._counts.waited_s.add(self._clock() - now, "quota")
                self._live.idle_since = None

    def _end_idle_context(self, refusal: RefusedError) -> bool:
        """Whether another context of this device was idle, and has given its memory for what was refused."""
        if refusal.code != m.ErrorCode.QUOTA_LIVE_BYTES:
            return False
        return self._transport.run_on_loop(lambda: self._service.sessions.end_idle(self._live.caller))

    def _wait_for_other_micro_batches(self) -> bool:
        """Wait until one that runs has ended; False where none does."""
        with self._charge_ended:
            taken = self._quota.live_bytes
            self._charge_ended.wait_for(lambda: self._quota.live_bytes < taken or not taken)
            return taken > 0


def use_threads(threads: int) -> None:
    """OpenMP keeps this per thread; and when a new thread asks for the first time, it gets what another has set last,
    which may be one for a moment."""
    torch.get_num_threads()
    torch.set_num_threads(threads)


def is_given(purpose: m.Train | m.Use | m.Encode) -> bool:
    """Whether a device may give parameters of groups in a session for this."""
    match purpose:
        case m.Train():
            return purpose.kill_revive.gives_to_server
        case m.Use():
            return purpose.lends
        case _:
            return False


def shutting_down() -> RefusedError:
    """What devices are told when the server stops."""
    text = "shutting down; the run goes on with its ticket once the server is back"
    return RefusedError(text, m.ErrorCode.SHUTTING_DOWN, retryable=True)
