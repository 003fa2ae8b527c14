"""A training run's session: it stands where the run stands, and reports every committed step."""

from __future__ import annotations

from collections.abc import Callable

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.model.session import ModelSession
from dlora.edge.seeds import seed_for_server
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.errors import CheckpointError, RemoteProtocolError, SessionLostError
from dlora.protocol.tensors import ByteArray, FloatArray, WireTensor

from .resolved import Resolved


class TrainSession(ModelSession):
    """The session of one run, or of its present part.

    A report whose signal has not come is sent again in the next session, which begins before it.

    ``base_fingerprint``: of the base model that the bundle pins.

    Attributes:
        basis_pass: what the server is to learn from, before it makes what it keeps of the groups, and how many
            micro-batches that were; None: nothing.
        step: the step that comes next, counted from the beginning of this part of the run.
        ticket: the controller's state, before the last report where that is unanswered.
        unanswered: the scores of the last committed step, until its signal has come.
    """

    def __init__(
        self, connection: Connection, adapters: AdapterSet, config: Resolved, *, base_fingerprint: str
    ) -> None:
        super().__init__(connection, adapters)
        self.basis_pass: Callable[[], int] | None = None
        self.step = 0
        self.ticket: bytes | None = None
        self.unanswered: FloatArray | None = None
        self._config = config
        self._base_fingerprint = base_fingerprint

    def opening_message(self) -> m.OpenSession:
        config = self._config
        return m.OpenSession(
            base_fingerprint=self._base_fingerprint,
            groups=self.adapters.group_specs,
            adapter=self.adapters.adapter_spec,
            codecs=config.codecs,
            evaluation_codecs=config.codecs.for_evaluation(),
            purpose=m.Train(
                kill_revive=config.units,
                seed=seed_for_server(config.seed),
                total_steps=config.steps,
                next_step=self.step - (self.unanswered is not None),
                ticket=self.ticket,
                learnt=tuple(index for index, unit in enumerate(self.adapters.units) if unit.has_learnt),
            ),
            window=min(config.window, self.connection.welcome.window),
            times=self.connection.spans.asks_server,
        )

    def run_basis_pass(self) -> int:
        return 0 if self.basis_pass is None else self.basis_pass()

    def handle_opened(self, opened: m.SessionOpened) -> None:
        states = _states(opened)
        if self.ticket is None:
            self.adapters.apply_signal(states)
        elif (states != self.adapters.states()).any():
            raise CheckpointError("the server's units are not the checkpoint's: its ticket belongs to another run")
        assert opened.ticket is not None
        self.ticket = opened.ticket.data.tobytes()

    def handle_signal(self, signal: m.Signal) -> None:
        self.adapters.apply_signal(_states(signal))
        self.ticket = signal.ticket.data.tobytes()
        self.unanswered = None

    def send_unanswered(self) -> None:
        self._give_parameters()
        if self.unanswered is not None:
            self._send_report()

    def report(self, scores: FloatArray) -> None:
        """The step is committed: its scores, float32 (units,), decide which units are active in the next. The signal to
        them comes with the next micro-batch, or with ``wait_for_signal``."""
        self.step += 1
        self.unanswered = scores
        try:
            self._give_parameters()
            self._send_report()
        except SessionLostError:
            self.open()

    def wait_for_signal(self) -> None:
        """Wait for the signal to the last report, where there is one."""
        while self.unanswered is not None:
            self.run(lambda: self.handle_signal(self.connection.receive(m.Signal)))

    def _send_report(self) -> None:
        assert self.unanswered is not None
        self.connection.send(m.StepReport(step=self.step - 1, scores=WireTensor("fp32", self.unanswered)))


def _states(message: m.Signal | m.SessionOpened) -> ByteArray:
    """A copy of the states that a message carries; the frame that they lie in can go."""
    if message.units is None:
        raise RemoteProtocolError("the server says nothing of the units")
    states: ByteArray = message.units.data.copy()
    return states
