"""The conversation, without sockets or clocks: what may be said when, and in which shapes.

Each side holds one ``Session``. ``send`` checks a message and gives its frame; ``receive`` takes a frame and
gives the checked message. The rules are one table (``states.py``); ``docs/reference/protocol.md`` draws it.

- E (the device) speaks first and starts everything; C (the server) only ever answers or asks for what a
  micro-batch needs.
- Up to ``window`` micro-batches are under way at a time, each in its own state (``micro_batch.py``).
- E may start the next micro-batch before C's ``Signal`` to its last ``StepReport`` has come, so that reports
  cost no round trip. C answers a report before anything that E sent after it, so that no ``Signal`` stands between a
  micro-batch's first ``GroupInput`` and its end.
- After ``Error`` or ``CloseSession`` nothing may follow on that connection.
- A session outlives its connection: over a new one its device resumes it, in another ``Session`` that ends in
  RESUMED; the old ``Session`` then goes on where it stood. ``link.py`` makes up for what was lost between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from . import messages as m
from .adapters import crossings, kind_of
from .beginnings import check_decoding, check_embeddings, check_opening
from .errors import LocalProtocolError, RemoteProtocolError, UsageError, ViolationError
from .frames import Decoder, Prefix, encode, read_prefix
from .groups import GroupSpec
from .link import MAX_REPEATS, Link
from .messages import AnyMessage
from .micro_batch import GroupStates, Key, MicroBatchRules, Shapes
from .states import TRANSITIONS, C, E, Side, State
from .tensors import tensors_of
from .units import Units
from .version import PROTOCOL_VERSIONS
from .wire_codecs import TensorRole, is_finite

NUMBERED: Final = (
    m.ExchangeMessage, m.MakeAdapterState, m.AdapterState, m.GroupParameters, m.StepReport, m.Signal,
)  # fmt: skip
"""What the link numbers: the messages of a session that change what the two sides hold."""

_WITH_MICRO_BATCHES: Final = (State.IDLE, State.SETTING_UP)
_BETWEEN_MICRO_BATCHES: Final = (m.GroupParameters, m.CloseSession)
_MODES_OF_FIRST_BLOCKS: Final = ("encode", "decode")  # of the purpose encode
_MODES_OF_ALL_BLOCKS: Final = ("train", "evaluate", "basis", "decode")

HANDSHAKE: Final = (
    m.Hello, m.Welcome, m.OpenSession, m.SessionOpened, m.ResumeSession, m.SessionResumed, m.SessionGone,
)  # fmt: skip


class Session:
    """One side's view of one conversation.

    Attributes:
        step: the optimizer step that comes next or is under way.
        units: what Kill and Revive switches, and so which groups take part.
        next_micro_batch: the number of the next one that trains, in this step.
        cached_tokens: of how many tokens C holds keys and values; tokens_ahead: of how many that may follow them it has
            sent what groups read, before E has asked for it.
        under_way: the micro-batches that have begun and are not through, oldest first.
        bytes_sent, bytes_received: of all frames so far; round_trips: how often we received after having sent
            what the peer waited for.
        link: the numbers of the session's frames, and those that the peer may lack.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.step = 0
        self.units = Units()
        self.next_micro_batch = 0
        self.cached_tokens = 0
        self.tokens_ahead = 0
        self.under_way: dict[Key, MicroBatchRules] = {}
        self.welcome: m.Welcome | None = None
        self.opened_with: m.OpenSession | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.round_trips = 0
        self.link = Link()
        self._state = State.START
        self._decoder = Decoder()
        self._before_error = State.CLOSED
        self._repeats = 0  # frames in a row that came before
        self._last_of_handshake = 0  # checksum of the peer's last: what the link does not number may come twice, too
        self._sent_since_received = False
        self._unanswered_reports: list[int] = []
        self._states_set_up = 0  # groups whose adapter state has been said
        self._shapes: Shapes | None = None

    @property
    def counters(self) -> tuple[int, int, int]:
        """Bytes sent, bytes received, round trips."""
        return self.bytes_sent, self.bytes_received, self.round_trips

    @property
    def state(self) -> State:
        """Where the conversation stands; with micro-batches under way, where the oldest of them does."""
        if self.under_way and self._state in _WITH_MICRO_BATCHES:
            return next(iter(self.under_way.values())).state
        return self._state

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        return self.opened_with.groups if self.opened_with else ()

    @property
    def is_between_steps(self) -> bool:
        """Whether no step is under way, nor a part of the set-up that the server computes."""
        return self.state is State.SETTING_UP or (self.state is State.IDLE and self.next_micro_batch == 0)

    def go_on_counting(self, before: Session) -> None:
        """Count on from what another session of the conversation has come to."""
        self.bytes_sent += before.bytes_sent
        self.bytes_received += before.bytes_received
        self.round_trips += before.round_trips

    @property
    def window(self) -> int:
        """How many micro-batches may be under way at a time, once the session is opened."""
        return self._opening.window

    @property
    def may_close(self) -> bool:
        """Whether the device may send ``CloseSession`` now."""
        return m.CloseSession in TRANSITIONS[self._state] and not self._awaited

    @property
    def _awaited(self) -> int:
        """Of how many micro-batches E waits for something: of one whose last hidden states it has, for nothing."""
        return sum(each.state is not State.AHEAD for each in self.under_way.values())

    @property
    def has_adapter_state(self) -> bool:
        """Whether the server keeps something of a group for the session."""
        adapter = self._opening.adapter
        kind = kind_of(adapter)
        return any(kind.state_shapes(adapter, group) for group in self.groups)

    @property
    def _opening(self) -> m.OpenSession:
        assert self.opened_with is not None
        return self.opened_with

    def send(self, message: AnyMessage) -> bytearray:
        """Check a message of ours and give its frame. Raises ``LocalProtocolError``: a bug of ours; and
        ``RemoteProtocolError`` where the peer acknowledges too little for the outbox to take it."""
        try:
            self._advance(message, self.side)
        except ViolationError as error:
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
        """Decode and check a frame of the peer's; None for one that came before. Raises ``RemoteProtocolError``."""
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
            if not all(is_finite(tensor) for tensor in tensors_of(message)):
                raise ViolationError("NaN or infinity", m.ErrorCode.NON_FINITE)
            goes_on = self._advance(message, C if self.side is E else E)
        except ViolationError as error:
            text = f"{type(message).__name__} in {self.state.name}: {error}"
            raise RemoteProtocolError(text, error.code) from None
        if numbered:
            self.link.accept(prefix)
        elif in_handshake:
            self._last_of_handshake = prefix.checksum
        self._repeats = 0
        self.bytes_received += len(frame)
        if not goes_on:
            self.round_trips += self._sent_since_received
            self._sent_since_received = False
        return message

    def resume(self, handshake: Session, received: int) -> list[bytearray]:
        """Go on over another connection, whose ``handshake`` has ended in RESUMED: the frames to send again, after the
        number ``received``, the last that the peer has. Raises ``RemoteProtocolError`` if that cannot be."""
        missing = self.link.missing(received)
        if self._state is State.CLOSED:
            self._state = self._before_error
        self._last_of_handshake = handshake._last_of_handshake
        self.bytes_sent += handshake.bytes_sent + sum(map(len, missing))
        self.bytes_received += handshake.bytes_received
        self.round_trips += handshake.round_trips
        return missing

    def _repeats_handshake(self, prefix: Prefix) -> bool:
        return self._state is not State.CLOSED and prefix.checksum == self._last_of_handshake

    # -- the rules ---------------------------------------------------------------------------------------

    def _advance(self, message: AnyMessage, sender: Side) -> bool:
        """Whether it was sent without waiting for the other side."""
        if self._state is State.CLOSED:
            raise ViolationError("the conversation is over")
        if isinstance(message, m.Error):
            self._before_error, self._state = self._state, State.CLOSED
            return False
        if isinstance(message, m.Signal):
            self._take_signal(message, sender)
            return False
        if isinstance(message, m.ExchangeMessage) and self._state in _WITH_MICRO_BATCHES:
            return self._advance_micro_batch(message, sender)
        allowed_sender, next_state = TRANSITIONS[self._state].get(type(message), (None, self._state))
        if allowed_sender is not sender:
            raise ViolationError("not now")
        if self._awaited and (self._state is State.SETTING_UP or isinstance(message, _BETWEEN_MICRO_BATCHES)):
            raise ViolationError("a micro-batch is under way")
        match message:
            case m.Welcome():
                self._take_welcome(message)
            case m.OpenSession():
                self._take_open(message)
            case m.SessionOpened():
                next_state = self._take_opened(message)
            case m.MakeAdapterState():
                self._check_group_to_set_up(message.group)
                self._check_server_makes_state()
            case m.AdapterState():
                next_state = self._take_adapter_state(message, next_state)
            case m.GroupParameters():
                self._take_parameters(message)
            case m.StepReport():
                self._take_report(message)
            case _:
                pass
        self._state = next_state
        return False

    # -- opening -----------------------------------------------------------------------------------------

    def _take_welcome(self, message: m.Welcome) -> None:
        if message.protocol_version not in PROTOCOL_VERSIONS:
            raise ViolationError("a version that was not offered", m.ErrorCode.VERSION)
        if message.max_sequence_length > message.max_tokens:
            raise ViolationError("a longest sequence that no micro-batch has room for")
        self.welcome = message

    def _take_open(self, message: m.OpenSession) -> None:
        welcome, purpose = self.welcome, message.purpose
        assert welcome is not None
        check_opening(message, welcome)
        try:
            widths = crossings(message.adapter, message.groups)
        except UsageError as error:
            raise ViolationError(str(error), m.ErrorCode.LIMIT) from None
        self.opened_with = message
        self.link.set_limit(message.window)
        self._shapes = Shapes(widths, message.codecs, welcome, message.encoded_width)
        self.units = Units(message)
        if isinstance(purpose, m.Train):
            self.step = purpose.next_step

    def _take_opened(self, message: m.SessionOpened) -> State:
        if isinstance(self._opening.purpose, m.Train):
            if message.units is None or message.ticket is None:
                raise ViolationError("no units, or no ticket, for a run that trains")
            message.ticket.check("uint8", (None,))
            self.units.take_opened(message.units)
        elif message.units is not None or message.ticket is not None:
            raise ViolationError("units or a ticket where nothing is trained")
        return State.SETTING_UP if self.has_adapter_state else State.IDLE

    def _check_server_makes_state(self) -> None:
        kind = kind_of(self._opening.adapter)
        if not kind.server_makes_state:
            raise ViolationError(f"the adapter state of the kind {kind.name} comes from the device")

    def _check_group_to_set_up(self, group: int) -> None:
        if group != self._states_set_up:
            raise ViolationError(f"the state of group {group} when group {self._states_set_up} comes next")

    def _take_adapter_state(self, message: m.AdapterState, next_state: State) -> State:
        assert self._shapes is not None
        self._check_group_to_set_up(message.group)
        if not math.isfinite(message.gradient_norm):
            raise ViolationError("a gradient's norm that is not finite", m.ErrorCode.NON_FINITE)
        adapter = self._opening.adapter
        shapes = kind_of(adapter).state_shapes(adapter, self.groups[message.group])
        if self._state is State.SETTING_UP:
            # E gives what it has as it is stored, whatever this session's codec: so C has the same bits.
            self._shapes.check_all(message.tensors, None, shapes)
            return next_state
        has_it_from_device = self._state is State.TAKING_STATE
        self._shapes.check_all(message.tensors, TensorRole.ADAPTER_STATE, () if has_it_from_device else shapes)
        self._states_set_up += 1
        return State.IDLE if self._states_set_up == len(self.groups) else next_state

    # -- Kill and Revive ---------------------------------------------------------------------------------

    def _take_signal(self, message: m.Signal, sender: Side) -> None:
        if sender is not C or not self._unanswered_reports:
            raise ViolationError("a signal that answers no report")
        if any(each.state is not State.FORWARD or each.asked for each in self.under_way.values()):
            raise ViolationError("a signal in the middle of a micro-batch")
        if message.step != self._unanswered_reports[0]:
            raise ViolationError("a signal for another step")
        message.ticket.check("uint8", (None,))
        self.units.take_signalled(message.units)
        del self._unanswered_reports[0]

    def _take_parameters(self, message: m.GroupParameters) -> None:
        assert self._shapes is not None
        shapes = self.units.check_parameters(message)
        is_answer = self._state is State.TAKING_PARAMETERS
        self._shapes.check_all(message.tensors, TensorRole.GROUP_PARAMETERS, () if is_answer else shapes)
        if is_answer:
            self.units.handed_over.add(message.group)

    def _take_report(self, message: m.StepReport) -> None:
        if not isinstance(self._opening.purpose, m.Train):
            raise ViolationError("a report where nothing is trained")
        if self.under_way or message.step != self.step or len(self._unanswered_reports) > 1:
            raise ViolationError(f"a report of step {message.step} when step {self.step} was under way")
        self.units.check_given_before_report()
        message.scores.check("fp32", (len(self.units.groups),))
        self._unanswered_reports.append(message.step)
        self.step += 1
        self.next_micro_batch = 0

    # -- micro-batches -----------------------------------------------------------------------------------

    def _advance_micro_batch(self, message: m.ExchangeMessage, sender: Side) -> bool:
        key = (message.step, message.micro_batch)
        if isinstance(message, m.Embeddings):
            self._begin_micro_batch(message, key, sender)
            return False
        micro_batch = self.under_way.get(key)
        if micro_batch is None:
            raise ViolationError("not a micro-batch that is under way" if self.under_way else "not now")
        if sender is C and self._unanswered_reports:
            # C answers a report before anything that E sent after it: else the units would not be those of this step.
            raise ViolationError(f"the report of step {self._unanswered_reports[0]} has no signal yet")
        micro_batch.advance(message, sender, self.units.group_states if micro_batch.exchanges else GroupStates())
        if micro_batch.decoding is not None and isinstance(message, m.LabelledHiddenStates):
            self.cached_tokens = micro_batch.decoding.position + micro_batch.tokens
        if micro_batch.state is State.IDLE:
            del self.under_way[key]
            if micro_batch.ahead and not self.under_way:  # else E has begun another meanwhile
                self.tokens_ahead = micro_batch.ahead
        return micro_batch.goes_on

    def _begin_micro_batch(self, message: m.Embeddings, key: Key, sender: Side) -> None:
        assert self._shapes is not None
        opening, mode = self._opening, message.mode
        if sender is not E or self._awaited == opening.window or key in self.under_way:
            raise ViolationError("not now")
        if mode not in (_MODES_OF_FIRST_BLOCKS if isinstance(opening.purpose, m.Encode) else _MODES_OF_ALL_BLOCKS):
            raise ViolationError(f"a micro-batch of the mode {mode} in a session that is for something else")
        if mode not in m.WITHOUT_GRADIENTS and not isinstance(opening.purpose, m.Train):
            raise ViolationError("a micro-batch that trains, in a session that does not")
        if (mode == "basis") is not (self._state is State.SETTING_UP):
            raise ViolationError(f"a micro-batch of the mode {mode} in {self._state.name}")
        if mode == "basis":
            self._check_server_makes_state()
            if self._states_set_up or self.under_way:  # one at a time: their gradients are summed, and order rounds
                raise ViolationError("not now")
        else:
            self.units.check_given_before_micro_batch()
        if message.step != self.step or (mode == "train" and message.micro_batch != self.next_micro_batch):
            next_one = f"step {self.step}, micro-batch {self.next_micro_batch}"
            raise ViolationError(f"step {message.step}, micro-batch {message.micro_batch} when {next_one} comes next")
        shapes = self._shapes._replace(codecs=opening.codecs_of(mode))
        check_embeddings(message, shapes)
        if mode == "decode":
            if self._awaited:  # whatever the window: they go on from each other
                raise ViolationError("not now")
            check_decoding(message, opening, shapes, self.cached_tokens, self.tokens_ahead)
        self.tokens_ahead = 0
        self.under_way[key] = MicroBatchRules(message, shapes)
        if message.passes is not None:
            # For good: gradients of the last backward pass are acknowledged with what comes after.
            self.link.set_limit(self._opening.window, len(self.groups))
        self.next_micro_batch += mode == "train"


def choose_version(offered: Sequence[int]) -> int | None:
    """The newest wire version that both sides speak, or None."""
    return max(set(offered) & set(PROTOCOL_VERSIONS), default=None)
