"""The conversation, without sockets or clocks: what may be said when, and in which shapes.

Each side holds one ``Session``. ``send`` checks a message and gives its frame; ``receive`` takes a frame and
gives the checked message. The rules are one table; ``docs/protocol.md`` draws it.

- E (the device) speaks first and starts everything; C (the server) only ever answers or asks for what a
  micro-batch needs.
- A micro-batch is lock-step: FORWARD, then LOSS and BACKWARD if it trains.
- E may start the next micro-batch before C's ``Signal`` to its last ``StepReport`` has come, so that reports
  cost no round trip. C answers a report before anything that E sent after it, so that no ``Signal`` stands between a
  micro-batch's first ``GroupInput`` and its end.
- A micro-batch asks every live group, once and in execution order, and gives every active one its gradients: a server
  that leaves some out would train nothing, and nobody would notice.
- After ``Error`` or ``CloseSession`` nothing may follow on that connection.
- A session outlives its connection: over a new one its device resumes it, in another ``Session`` that ends in
  RESUMED; the old ``Session`` then goes on where it stood. ``link.py`` makes up for what was lost between.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Final, NamedTuple

import numpy as np

from . import messages as m
from .codec import Decoder, Prefix, encode, read_prefix
from .counting import counted_tokens
from .errors import LocalProtocolError, RemoteProtocolError
from .groups import GroupSpec, group_units
from .kill_revive import UnitState
from .link import MAX_REPEATS, Link
from .messages import AnyMessage
from .tensors import ByteArray, WireTensor
from .version import PROTOCOL_VERSIONS


class Role(Enum):
    """Which side we are."""

    EDGE = "edge"
    CLOUD = "cloud"


class State(Enum):
    """Where the conversation stands."""

    START = auto()
    GREETING = auto()
    GREETED = auto()
    OPENING = auto()
    RESUMING = auto()
    RESUMED = auto()
    IDLE = auto()
    FORWARD = auto()
    DELTA = auto()
    LOSS = auto()
    BACKWARD = auto()
    CLOSED = auto()


E, C = Role.EDGE, Role.CLOUD

TRANSITIONS: Final[dict[State, dict[type, tuple[Role, State]]]] = {
    State.START: {m.Hello: (E, State.GREETING)},
    State.GREETING: {m.Welcome: (C, State.GREETED)},
    State.GREETED: {
        m.OpenSession: (E, State.OPENING),
        m.ResumeSession: (E, State.RESUMING),
        m.CloseSession: (E, State.CLOSED),
    },
    State.OPENING: {m.SessionOpened: (C, State.IDLE)},
    State.RESUMING: {m.SessionResumed: (C, State.RESUMED), m.SessionGone: (C, State.GREETED)},
    State.RESUMED: {},
    State.IDLE: {
        m.Embeddings: (E, State.FORWARD),
        m.StepReport: (E, State.IDLE),
        m.CloseSession: (E, State.CLOSED),
    },
    State.FORWARD: {m.GroupInput: (C, State.DELTA), m.LabelledHiddenStates: (C, State.LOSS)},
    State.DELTA: {m.GroupDelta: (E, State.FORWARD)},
    State.LOSS: {m.GradHiddenStates: (E, State.BACKWARD)},
    State.BACKWARD: {m.GroupGrad: (C, State.BACKWARD), m.GroupInputGrad: (E, State.BACKWARD)},
    State.CLOSED: {},
}
"""State, then message type, to (who may send it, next state). Three rules stand beside the table:
``LabelledHiddenStates`` with no gradients to come, and the last message of BACKWARD, lead to IDLE;
C sends ``Signal`` while a ``StepReport`` is unanswered, in IDLE, or in FORWARD before it asks for anything; either side
may send ``Error``."""

NUMBERED: Final = (m.ExchangeMessage, m.StepReport, m.Signal)
"""What the link numbers: the messages of a session that change what the two sides hold."""

HANDSHAKE: Final = (
    m.Hello, m.Welcome, m.OpenSession, m.SessionOpened, m.ResumeSession, m.SessionResumed, m.SessionGone,
)  # fmt: skip


class _ViolationError(Exception):
    def __init__(self, text: str, code: m.ErrorCode = m.ErrorCode.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code


class _MicroBatch(NamedTuple):
    """What is remembered of ``Embeddings``: not the tensors, which would outlive the micro-batch."""

    step: int
    micro_batch: int
    training: bool
    labelled: int


class Session:
    """One side's view of one conversation.

    Attributes:
        state: where the conversation stands.
        step: the optimizer step that comes next or is under way.
        units: uint8 (units,), the ``UnitState`` of each unit as last signalled.
        live: the groups of all units that are not killed, in execution order; active: those of units that are trained.
        bytes_sent, bytes_received: sizes of all frames so far (without the websocket's own framing).
        round_trips: how often we received after having sent.
        link: the numbers of the session's frames, and those that the peer may lack.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.START
        self.step = 0
        self.units: ByteArray = np.zeros(0, np.uint8)
        self.unit_groups: tuple[tuple[int, ...], ...] = ()
        self.live: tuple[int, ...] = ()
        self.active: frozenset[int] = frozenset()
        self.welcome: m.Welcome | None = None
        self.opened_with: m.OpenSession | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.round_trips = 0
        self.link = Link()
        self._decoder = Decoder()
        self._before_error = State.CLOSED
        self._repeats = 0  # frames in a row that came before
        self._last_of_handshake = 0  # checksum of the peer's last: what the link does not number may come twice, too
        self._sent_since_received = False
        self._unanswered_reports: list[int] = []
        self._micro_batch = 0
        self._begun: _MicroBatch | None = None
        self._tokens = 0
        self._asked = 0  # how many groups of ``live`` took part in this forward pass; the last one's deltas C waits for
        self._graded: set[int] = set()  # groups whose gradients have been sent
        self._unanswered: set[int] = set()  # groups whose input gradient C waits for
        self._gradients = 0

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        return self.opened_with.groups if self.opened_with else ()

    @property
    def at_rest(self) -> bool:
        """Whether no step is under way."""
        return self.state is State.IDLE and self._micro_batch == 0

    def send(self, message: AnyMessage) -> bytearray:
        """Check a message of ours and give its frame. Raises ``LocalProtocolError``: a bug of ours."""
        try:
            self._advance(message, self.role)
        except _ViolationError as error:
            raise LocalProtocolError(f"{type(message).__name__} in {self.state.name}: {error}") from None
        if isinstance(message, NUMBERED):
            frame = encode(message, seq=self.link.sent + 1, ack=self.link.received)
            self.link.keep(frame)
        else:
            frame = encode(message)
        self.bytes_sent += len(frame)
        self._sent_since_received = True
        return frame

    def receive(self, frame: bytes | bytearray | memoryview) -> AnyMessage | None:
        """Decode and check a frame of the peer's; None for one that came before.

        Raises ``RemoteProtocolError`` with its wire code.
        """
        message = self._decoder.decode(frame)
        prefix = read_prefix(frame)
        numbered = isinstance(message, NUMBERED)
        if numbered != (prefix.seq > 0):
            raise RemoteProtocolError(f"{type(message).__name__} with the number {prefix.seq}")
        in_handshake = isinstance(message, HANDSHAKE)
        if (numbered and self.link.is_repeat(prefix)) or (in_handshake and self._repeats_handshake(prefix)):
            if self._repeats == MAX_REPEATS:
                raise RemoteProtocolError(f"{MAX_REPEATS} frames in a row that came before, and another")
            self._repeats += 1
            self.bytes_received += len(frame)
            return None
        try:
            # Before anything changes: a refused message leaves the session as it was.
            if not all(tensor.is_finite() for tensor in m.tensors_of(message)):
                raise _ViolationError("NaN or infinity", m.ErrorCode.NON_FINITE)
            self._advance(message, C if self.role is E else E)
        except _ViolationError as error:
            text = f"{type(message).__name__} in {self.state.name}: {error}"
            raise RemoteProtocolError(text, error.code) from None
        if numbered:
            self.link.accept(prefix)
        elif in_handshake:
            self._last_of_handshake = prefix.checksum
        self._repeats = 0
        self.bytes_received += len(frame)
        self.round_trips += self._sent_since_received
        self._sent_since_received = False
        return message

    def resume(self, handshake: Session, received: int) -> list[bytearray]:
        """Go on over another connection, whose ``handshake`` has ended in RESUMED: the frames to send again.

        ``received`` is the last number that the peer has. Raises ``RemoteProtocolError`` if that cannot be.
        """
        missing = self.link.missing(received)
        if self.state is State.CLOSED:
            self.state = self._before_error
        self._last_of_handshake = handshake._last_of_handshake
        self.bytes_sent += handshake.bytes_sent + sum(map(len, missing))
        self.bytes_received += handshake.bytes_received
        self.round_trips += handshake.round_trips
        return missing

    def _repeats_handshake(self, prefix: Prefix) -> bool:
        return self.state is not State.CLOSED and prefix.checksum == self._last_of_handshake

    # -- the rules ---------------------------------------------------------------------------------------

    def _advance(self, message: AnyMessage, sender: Role) -> None:
        if self.state is State.CLOSED:
            raise _ViolationError("the conversation is over")
        if isinstance(message, m.Error):
            self._before_error, self.state = self.state, State.CLOSED
            return
        if isinstance(message, m.Signal):
            self._check_signal(message, sender)
            return
        who, next_state = TRANSITIONS[self.state].get(type(message), (None, self.state))
        if who is not sender:
            raise _ViolationError("not now")
        if isinstance(message, m.ExchangeMessage):
            self.state = self._check_exchange(message) or next_state
            return
        match message:
            case m.Welcome():
                if message.protocol_version not in PROTOCOL_VERSIONS:
                    raise _ViolationError("a version that was not offered", m.ErrorCode.VERSION)
                if message.max_sequence_length > message.max_tokens:
                    raise _ViolationError("a longest sequence that no micro-batch has room for")
                self.welcome = message
            case m.OpenSession():
                self._check_open(message)
            case m.SessionOpened():
                self._check_units(message.units)
                _check(message.ticket, "uint8", (None,))
                self._take_units(message.units.data)
            case m.StepReport():
                self._check_report(message)
            case _:
                pass
        self.state = next_state

    def _check_open(self, message: m.OpenSession) -> None:
        for group in message.groups:
            if not group.targets:
                raise _ViolationError("a group without target modules")
        if message.next_step > message.total_steps:
            raise _ViolationError("next_step lies after the end of the run")
        self.opened_with = message
        self.unit_groups = group_units(message.groups, message.kill_revive.unit)
        self.step = message.next_step

    def _check_units(self, units: WireTensor) -> None:
        _check(units, "uint8", (len(self.unit_groups),))
        if units.data.size and int(units.data.max()) > max(UnitState):
            raise _ViolationError("an unknown unit state")
        assert self.opened_with is not None
        config = self.opened_with.kill_revive
        active = units.data == UnitState.ACTIVE
        if int(active.sum()) < config.budget_floor(len(active)) or not active[list(config.pinned)].all():
            raise _ViolationError("fewer active units than the device asked for")

    def _check_signal(self, message: m.Signal, sender: Role) -> None:
        if sender is not C or not self._unanswered_reports:
            raise _ViolationError("a signal that answers no report")
        if not (self.state is State.IDLE or (self.state is State.FORWARD and not self._asked)):
            raise _ViolationError("a signal in the middle of a micro-batch")
        if message.step != self._unanswered_reports[0]:
            raise _ViolationError("a signal for another step")
        self._check_units(message.units)
        _check(message.ticket, "uint8", (None,))
        del self._unanswered_reports[0]
        self._take_units(message.units.data)

    def _take_units(self, units: ByteArray) -> None:
        self.units = units
        states = {group: state for state, groups in zip(units, self.unit_groups, strict=True) for group in groups}
        self.live = tuple(group for group in sorted(states) if states[group] != UnitState.KILLED)
        self.active = frozenset(group for group in self.live if states[group] == UnitState.ACTIVE)

    def _check_report(self, message: m.StepReport) -> None:
        if message.step != self.step or len(self._unanswered_reports) > 1:
            raise _ViolationError(f"a report of step {message.step} when step {self.step} was under way")
        _check(message.scores, "fp32", (len(self.unit_groups),))
        self._unanswered_reports.append(message.step)
        self.step += 1
        self._micro_batch = 0

    def _check_exchange(self, message: m.ExchangeMessage) -> State | None:
        """Check one message of a micro-batch; give the next state where the table alone cannot know it."""
        if isinstance(message, m.Embeddings):
            self._check_embeddings(message)
            return None
        begun = self._begun
        assert begun is not None
        if (message.step, message.micro_batch) != (begun.step, begun.micro_batch):
            raise _ViolationError("not the micro-batch that is under way")
        match message:
            case m.GroupInput():
                self._check_group_input(message)
            case m.GroupDelta():
                self._check_group_delta(message)
            case m.LabelledHiddenStates():
                self._check_labelled(message, begun)
                self._gradients = message.gradients
                return None if message.gradients else State.IDLE
            case m.GradHiddenStates():
                assert self.welcome is not None
                self._check_floats(message.grad_hidden_states, (begun.labelled, self.welcome.hidden_size))
            case m.GroupGrad():
                self._check_group_grad(message)
                return self._backward_state()
            case m.GroupInputGrad():
                if message.group not in self._unanswered:
                    raise _ViolationError("an input gradient that nobody asked for")
                self._check_floats(message.grad_hidden_states, (self._tokens, self.groups[message.group].in_features))
                self._unanswered.remove(message.group)
                return self._backward_state()
            case _:
                pass
        return None

    def _check_embeddings(self, message: m.Embeddings) -> None:
        welcome = self.welcome
        assert welcome is not None
        training = message.mode == "train"
        if message.step != self.step or (training and message.micro_batch != self._micro_batch):
            raise _ViolationError(f"step {message.step} when step {self.step} comes next")
        self._check_floats(message.hidden_states, (None, welcome.embedding_size))
        _check(message.sequence_lengths, "int32", (None,))
        _check(message.label_positions, "int32", (None,))
        tokens = message.hidden_states.shape[0]
        lengths, positions = message.sequence_lengths.data, message.label_positions.data
        if not 0 < tokens <= welcome.max_tokens:
            raise _ViolationError(f"{tokens} tokens; at most {welcome.max_tokens} fit", m.ErrorCode.LIMIT)
        if not lengths.size or lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != tokens:
            raise _ViolationError("sequence lengths that do not add up to the tokens")
        counted = counted_tokens(lengths, packs=welcome.packs)
        if counted > welcome.max_tokens:
            text = f"{tokens} tokens count as {counted} with their padding; at most {welcome.max_tokens} fit"
            raise _ViolationError(text, m.ErrorCode.LIMIT)
        if lengths.max() > welcome.max_sequence_length:
            limit = welcome.max_sequence_length
            raise _ViolationError(f"a sequence of {lengths.max()} tokens; at most {limit} fit", m.ErrorCode.LIMIT)
        if not positions.size or positions[0] < 0 or positions[-1] >= tokens or (positions[1:] <= positions[:-1]).any():
            raise _ViolationError("label positions that are not ascending rows of the tokens")
        self._begun = _MicroBatch(message.step, message.micro_batch, training, positions.size)
        self._tokens = tokens
        self._asked = 0
        self._graded.clear()
        self._unanswered.clear()
        self._micro_batch += training

    def _check_group_input(self, message: m.GroupInput) -> None:
        self._check_reports_are_answered()
        group = message.group
        if group not in self.live:
            raise _ViolationError(f"group {group} does not exist, or belongs to a killed unit")
        if self._asked == len(self.live) or group != self.live[self._asked]:
            raise _ViolationError(f"group {group} out of turn; all live groups are asked, once, in execution order")
        self._check_floats(message.hidden_states, (self._tokens, self.groups[group].in_features))
        self._asked += 1

    def _check_group_delta(self, message: m.GroupDelta) -> None:
        awaited = self.live[self._asked - 1]
        if message.group != awaited:
            raise _ViolationError(f"group {message.group} when group {awaited} was asked")
        self._check_outputs(message.deltas, message.group)

    def _check_labelled(self, message: m.LabelledHiddenStates, begun: _MicroBatch) -> None:
        assert self.welcome is not None
        self._check_reports_are_answered()
        if self._asked < len(self.live):
            raise _ViolationError(f"only {self._asked} of {len(self.live)} live groups were asked")
        self._check_floats(message.hidden_states, (begun.labelled, self.welcome.hidden_size))
        if message.gradients > (len(self.live) if begun.training else 0):
            raise _ViolationError("more gradients than groups took part")
        if begun.training and message.gradients < len(self.active):
            raise _ViolationError(f"{message.gradients} gradients for {len(self.active)} active groups")

    def _check_reports_are_answered(self) -> None:
        """C answers a report before anything that E sent after it: else the units would not be those of this step."""
        if self._unanswered_reports:
            raise _ViolationError(f"the report of step {self._unanswered_reports[0]} has no signal yet")

    def _check_group_grad(self, message: m.GroupGrad) -> None:
        group = message.group
        if group not in self.live or group in self._graded:
            raise _ViolationError(f"gradients of group {group}, which did not take part, or again")
        to_come = self._gradients - len(self._graded)
        if not to_come:
            raise _ViolationError("more gradients than were announced")
        if group not in self.active and len(self.active - self._graded) == to_come:
            raise _ViolationError(f"gradients of group {group}, which leave none for an active one")
        self._check_outputs(message.grads, group)
        self._graded.add(group)
        if message.answer:
            self._unanswered.add(group)

    def _backward_state(self) -> State:
        done = len(self._graded) == self._gradients and not self._unanswered
        return State.IDLE if done else State.BACKWARD

    def _check_outputs(self, tensors: Sequence[WireTensor], group: int) -> None:
        targets = self.groups[group].targets
        if len(tensors) != len(targets):
            raise _ViolationError(f"{len(tensors)} tensors for {len(targets)} target modules")
        for tensor, target in zip(tensors, targets, strict=True):
            self._check_floats(tensor, (self._tokens, target.out_features))

    def _check_floats(self, tensor: WireTensor, shape: tuple[int | None, ...]) -> None:
        assert self.opened_with is not None
        _check(tensor, self.opened_with.wire_dtype, shape)


def choose_version(offered: Sequence[int]) -> int | None:
    """The newest wire version that both sides speak, or None."""
    return max(set(offered) & set(PROTOCOL_VERSIONS), default=None)


def _check(tensor: WireTensor, dtype: str, shape: tuple[int | None, ...]) -> None:
    fits = len(tensor.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise _ViolationError(f"a tensor of {tensor.dtype} {tensor.shape} where {dtype} {shape} was due")
