"""The protocol's rules, both sides against each other: what may be said, what may not, and what it leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import conversations as c
import msgspec
import numpy as np
import pytest
from conversations import MAX_CONTEXT, TOKENS, Pair
from hypothesis import given, settings
from hypothesis import strategies as st
from random_frames import Reached, frames

from dlora.protocol import messages as m
from dlora.protocol.adapters import KINDS, AdapterSpec, Crossing
from dlora.protocol.choices import WireDtype
from dlora.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from dlora.protocol.frames import encode
from dlora.protocol.groups import GroupSpec
from dlora.protocol.kill_revive import LIVE, KillReviveConfig, UnitState
from dlora.protocol.link import MAX_REPEATS
from dlora.protocol.session import HANDSHAKE, Session, choose_version
from dlora.protocol.states import TRANSITIONS, Side, State
from dlora.protocol.tensors import DTYPES, WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import CODECS, Codecs, encode_floats

E, C = Side.EDGE, Side.CLOUD

KEEPING = AdapterSpec(kind="keeping", r=2)


class Keeping:
    """A kind that is LoRA on the wire, and for which a server keeps a vector of each group."""

    name = "keeping"
    server_makes_state = True

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        return KINDS["lora"].crossing(spec, group)

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, tuple[int, ...]]:
        return KINDS["lora"].parameter_shapes(spec, group)

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[tuple[int, ...], ...]:
        return ((group.in_features,),)


KINDS.setdefault("keeping", Keeping())

# The shortest way to each state.
WAYS: dict[State, list[m.AnyMessage]] = {
    State.START: [],
    State.GREETING: c.opening()[:1],
    State.GREETED: c.opening()[:2],
    State.OPENING: c.opening()[:3],
    State.SETTING_UP: c.opening(adapter=KEEPING),
    State.MAKING_STATE: [*c.opening(adapter=KEEPING), m.MakeAdapterState(group=0)],
    State.TAKING_STATE: [*c.opening(adapter=KEEPING), c.adapter_state()],
    State.TAKING_PARAMETERS: [
        *c.opening(kill_revive=c.GIVES), c.report(), c.signal(units=b"\3\1"), c.parameters(),
    ],
    State.IDLE: c.opening(),
    State.FORWARD: [*c.opening(), c.embeddings()],
    State.DELTA: [*c.opening(), c.embeddings(), c.group_input()],
    State.LOSS: [*c.opening(), *c.forward()],
    State.BACKWARD: [*c.opening(), *c.forward(), c.grad_hidden_states(), c.group_grad(group=2)],
    State.RESUMING: [*c.opening()[:2], c.resume_session()],
    State.RESUMED: [*c.opening()[:2], c.resume_session(), c.session_resumed()],
    State.CLOSED: [*c.opening(), m.CloseSession()],
}
ONE_OF_EACH: dict[type, m.AnyMessage] = {
    type(message): message
    for message in (
        *c.opening(), c.embeddings(), c.group_input(), c.group_delta(), c.labelled(gradients=3), c.grad_hidden_states(),
        c.group_grad(group=1), c.group_input_grad(group=2), c.report(), c.signal(), m.CloseSession(), c.error(),
        c.resume_session(), c.session_resumed(), m.SessionGone(), m.MakeAdapterState(group=0), c.adapter_state(),
        c.parameters(),
    )
}  # fmt: skip


def refuses(session: Session, act: Callable[[], object], kind: type[ProtocolError]) -> Any:
    """That ``act`` raises ``kind`` and leaves the session as it was; gives the error."""
    before = c.everything(session)
    with pytest.raises(kind) as raised:
        act()
    assert c.everything(session) == before
    return raised.value


# -- whole conversations ---------------------------------------------------------------------------------


def test_whole_run_is_legal() -> None:
    pair = Pair(c.opening(kill_revive=c.NONE_NEED_BE_ACTIVE))
    states = [b"\1\1", b"\0\1", b"\1\0", b"\0\0"]
    for step, units in enumerate(states):
        assert pair.sides[E].units.states.tobytes() == units
        live = [group for group in c.ALL if units[c.GROUPS[group].block]]
        for micro_batch in range(2):
            for message in c.forward(step, micro_batch, live):
                pair.say(message)
            for message in c.backward(step, micro_batch, live) if live else ():
                pair.say(message)
            assert pair.sides[E].state is State.IDLE
        for message in c.forward(step, 40, live, mode="evaluate"):
            pair.say(message)
        pair.say(c.report(step))
        pair.say(c.signal(step, states[(step + 1) % 4]))
    assert pair.sides[C].step == 4
    pair.say(m.CloseSession())
    assert {side.state for side in pair.sides.values()} == {State.CLOSED}


def test_a_run_may_never_revive_a_unit() -> None:
    pair = Pair(c.opening(kill_revive=KillReviveConfig(revive_every=0, probation=0)))
    assert pair.sides[C].state is State.IDLE


def test_round_trips_are_counted_where_one_side_waits() -> None:
    pair = Pair(c.opening())
    before = pair.sides[E].round_trips
    for message in (*c.forward(), *c.backward(), c.report()):
        pair.say(message)
    # Embeddings, three deltas, the loss's gradient, two input gradients; nothing waits for the report.
    assert pair.sides[E].round_trips - before == 1 + 3 + 1 + 2


@pytest.mark.parametrize("when", range(2))
def testnext_micro_batch_may_come_before_the_signal(when: int) -> None:
    pair = Pair([*c.opening(), *c.forward(), *c.backward(), c.report(0)])
    rest = [c.embeddings(1), c.group_input(1), c.group_delta(1)]
    for message in rest[:when]:
        pair.say(message)
    pair.say(c.signal(0))
    for message in rest[when:]:
        pair.say(message)
    assert pair.sides[C].state is State.FORWARD


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_micro_batches_of_a_step_come_in_their_order_and_once(micro_batch: int) -> None:
    """With one of them twice, a step's gradients would be those of other data."""
    pair = Pair([*c.opening(), *c.forward(), *c.backward()])
    message, text = c.embeddings(0, micro_batch), f"micro-batch {micro_batch} when step 0, micro-batch 1 comes next"
    assert text in str(refuses(pair.sides[E], lambda: pair.sides[E].send(message), LocalProtocolError))
    assert text in str(refuses(pair.sides[C], lambda: c.hear(pair.sides[C], message), RemoteProtocolError))
    pair.say(c.embeddings(0, 1))


def refused_on_both_sides(pair: Pair, message: m.AnyMessage, text: str) -> None:
    """That neither side sends or takes ``message`` of the server's, and why."""
    assert text in str(refuses(pair.sides[C], lambda: pair.sides[C].send(message), LocalProtocolError))
    error = refuses(pair.sides[E], lambda: c.hear(pair.sides[E], message), RemoteProtocolError)
    assert text in str(error)
    assert error.code == m.ErrorCode.PROTOCOL


@pytest.mark.parametrize("reports", [1, 2])
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_micro_batch_waits_for_the_signals_of_all_reports_before_it(mode: str, reports: int) -> None:
    """A server that withholds signals would go on with the units of an earlier step."""
    pair = Pair([*c.opening(), *map(c.report, range(reports)), c.embeddings(reports, mode=mode)])
    for step in range(reports):
        refused_on_both_sides(pair, c.group_input(reports), f"the report of step {step} has no signal yet")
        pair.say(c.signal(step))
    pair.say(c.group_input(reports))


def test_a_forward_pass_of_no_group_waits_for_the_signal_as_well() -> None:
    way = [*c.opening(kill_revive=c.NONE_NEED_BE_ACTIVE), c.report(0), c.signal(0, b"\0\0"), c.report(1)]
    pair = Pair([*way, c.embeddings(2)])
    refused_on_both_sides(pair, c.labelled(2), "the report of step 1 has no signal yet")
    pair.say(c.signal(1, b"\0\0"))
    pair.say(c.labelled(2))
    assert pair.sides[E].state is State.IDLE


MIDDLE: dict[str, list[m.AnyMessage]] = {
    "before its delta": [c.group_input()],
    "between two groups": [c.group_input(), c.group_delta()],
    "at the loss": list(c.forward())[1:],
    "in the backward pass": [*list(c.forward())[1:], c.grad_hidden_states(), c.group_grad(group=2)],
}


@pytest.mark.parametrize("place", MIDDLE)
def test_signal_in_the_middle_of_a_micro_batch_is_refused(place: str) -> None:
    """No conversation of honest sides leads there, as groups wait for signals: so the device's session is told."""
    pair = Pair([*c.opening(), c.embeddings(), *MIDDLE[place]])
    for side in pair.sides.values():
        side._unanswered_reports = [0]
    refused_on_both_sides(pair, c.signal(0), "in the middle of a micro-batch")


@pytest.mark.parametrize(
    ("config", "units", "fits"),
    [
        (KillReviveConfig(active_fraction=0.5), b"\1\0", True),
        (KillReviveConfig(active_fraction=0.5), b"\0\0", False),
        (KillReviveConfig(active_fraction=0.5), b"\2\3", False),
        (KillReviveConfig(active_fraction=1.0), b"\1\0", False),
        (KillReviveConfig(active_fraction=0.5, pinned=(1,)), b"\0\1", True),
        (KillReviveConfig(active_fraction=0.5, pinned=(1,)), b"\1\0", False),
        (KillReviveConfig(score="static", static=(0,), active_fraction=0.0), b"\1\0", True),
        (KillReviveConfig(score="static", static=(0,), active_fraction=0.0), b"\0\1", False),
        (c.NONE_NEED_BE_ACTIVE, b"\0\0", True),
    ],
)
def test_signal_that_kills_too_many_units_is_refused(config: KillReviveConfig, units: bytes, fits: bool) -> None:
    """A server that means harm cannot silence a device's adapters, or those that it pinned."""
    pair = Pair([*c.opening(kill_revive=config), c.report()])
    if fits:
        pair.say(c.signal(0, units))
        return
    assert refuses(pair.sides[E], lambda: c.hear(pair.sides[E], c.signal(0, units)), RemoteProtocolError).code
    refuses(pair.sides[C], lambda: pair.sides[C].send(c.signal(0, units)), LocalProtocolError)


def test_a_third_report_waits_for_a_signal() -> None:
    pair = Pair([*c.opening(), c.report(0), c.report(1)])
    for side, act in (
        (E, pair.sides[E].send),
        (C, lambda message: c.hear(pair.sides[C], message)),
    ):
        refuses(pair.sides[side], lambda act=act: act(c.report(2)), ProtocolError)
    for message in (c.signal(0), c.report(2), c.signal(1), c.signal(2)):
        pair.say(message)


def test_a_signal_for_another_step_is_refused_and_the_right_one_still_comes() -> None:
    pair = Pair([*c.opening(), c.report(0)])
    for wrong in (c.signal(1), c.signal(0, b"\1"), c.signal(0, b"\1\x09")):
        refuses(pair.sides[C], lambda wrong=wrong: pair.sides[C].send(wrong), LocalProtocolError)
        refuses(
            pair.sides[E],
            lambda wrong=wrong: c.hear(pair.sides[E], wrong),
            RemoteProtocolError,
        )
    pair.say(c.signal(0, b"\0\1"))
    assert pair.sides[E].units.states.tolist() == [UnitState.KILLED, UnitState.ACTIVE]


@pytest.mark.parametrize("answers", [(1, 2), (2, 1)])
def test_parallel_branches_have_two_gradients_outstanding(answers: tuple[int, int]) -> None:
    pair = Pair([*c.opening(), *c.forward(), c.grad_hidden_states()])
    for message in (c.group_grad(group=2), c.group_grad(group=1)):
        pair.say(message)
    for group in answers:
        pair.say(c.group_input_grad(group=group))
        assert pair.sides[E].state is State.BACKWARD
    pair.say(c.group_grad(group=0, answer=False))
    assert pair.sides[E].state is State.IDLE


def test_the_answers_may_come_after_the_last_gradient() -> None:
    pair = Pair([*c.opening(), *c.forward(), c.grad_hidden_states()])
    for group in (2, 1, 0):
        pair.say(c.group_grad(group=group, answer=group > 0))
    for group in (2, 1):
        assert pair.sides[C].state is State.BACKWARD
        pair.say(c.group_input_grad(group=group))
    assert pair.sides[C].state is State.IDLE


@pytest.mark.parametrize("state", [state for state in State if state is not State.CLOSED])
@pytest.mark.parametrize("sender", Side)
def test_an_error_closes_from_every_state(state: State, sender: Side) -> None:
    pair = Pair(WAYS[state])
    pair.say(c.error(), sender)
    assert {side.state for side in pair.sides.values()} == {State.CLOSED}
    for message in ONE_OF_EACH.values():
        refuses(pair.sides[E], lambda message=message: pair.sides[E].send(message), LocalProtocolError)
        refuses(
            pair.sides[E],
            lambda message=message: c.hear(pair.sides[E], message),
            RemoteProtocolError,
        )


@pytest.mark.parametrize("state", State)
def test_may_close_only_where_the_table_allows_it(state: State) -> None:
    session = Pair(WAYS[state]).sides[E]
    assert session.may_close is (m.CloseSession in TRANSITIONS[state])
    if session.may_close:
        session.send(m.CloseSession())
    assert not session.may_close


# -- what is not in the table ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("state", State)
def test_message_not_in_the_state_table_is_refused_on_both_sides(state: State, side: Side) -> None:
    allowed = {kind: who for kind, (who, _) in TRANSITIONS[state].items()}
    for kind, example in ONE_OF_EACH.items():
        if kind is m.Error and state is not State.CLOSED:
            continue
        is_answer = kind is m.AdapterState and state is State.TAKING_STATE
        message = c.adapter_state(tensors=()) if is_answer else example
        way = WAYS[state]
        if kind is m.GroupParameters:
            if state is State.IDLE:
                way = WAYS[State.TAKING_PARAMETERS][:-1]  # once a unit is held
            elif state is State.TAKING_PARAMETERS:
                message = c.parameters_taken()
        if state is State.FORWARD and kind is m.LabelledHiddenStates:
            way = [*c.opening(), *list(c.forward())[:-1]]  # once all groups were asked
        session = Pair(way).sides[side]
        assert session.state is state
        send, receive = lambda: session.send(message), lambda: c.hear(session, message)  # noqa: B023
        if allowed.get(kind) is side:
            send()
        else:
            refuses(session, send, LocalProtocolError)
        session = Pair(way).sides[side]
        if allowed.get(kind) is c.other(side):
            receive()
        elif message == last_of_handshake(state, side):
            assert receive() is None
        else:
            assert refuses(session, receive, RemoteProtocolError).code == m.ErrorCode.PROTOCOL


def last_of_handshake(state: State, side: Side) -> m.AnyMessage | None:
    """What this side heard last of a handshake that goes on: it may come twice."""
    heard = [message for message in WAYS[state] if isinstance(message, HANDSHAKE) and c.sender_of(message) is not side]
    return heard[-1] if heard and state is not State.CLOSED else None


@pytest.mark.parametrize("side", Side)
def test_repeated_handshake_message_is_ignored_also_after_resuming(side: Side) -> None:
    handshake = Pair(WAYS[State.RESUMED]).sides[side]
    session = Pair(WAYS[State.DELTA]).sides[side]
    opening = c.session_opened() if side is E else c.open_session()
    assert c.hear(session, opening) is None
    session.resume(handshake, session.link.sent)
    counted = {"bytes_received": 0, "_repeats": 0}
    before = c.everything(session) | counted
    assert c.hear(session, c.session_resumed() if side is E else c.resume_session()) is None
    assert c.everything(session) | counted == before
    refuses(session, lambda: c.hear(session, opening), RemoteProtocolError)


def refuses_endless_repeats(listener: Session, frame: bytearray) -> None:
    for _ in range(MAX_REPEATS):
        assert listener.receive(frame) is None
    error = refuses(listener, lambda: listener.receive(frame), RemoteProtocolError)
    assert "that came before, and another" in str(error)


@pytest.mark.parametrize("side", Side)
def test_endless_repeated_handshake_is_refused(side: Side) -> None:
    hello, welcome = WAYS[State.GREETED]
    listener = Pair(WAYS[State.GREETED]).sides[side]
    refuses_endless_repeats(listener, encode(welcome if side is E else hello))


@pytest.mark.parametrize("side", Side)
def test_endless_repeated_frame_is_refused(side: Side) -> None:
    pair = Pair(c.opening())
    heard: dict[Side, bytearray] = {}

    def say(message: m.AnyMessage) -> None:
        speaker = c.sender_of(message)
        heard[c.other(speaker)] = pair.sides[speaker].send(message)
        assert pair.sides[c.other(speaker)].receive(heard[c.other(speaker)]) is not None

    for message in (c.embeddings(), c.group_input()):
        say(message)
    refuses_endless_repeats(pair.sides[side], heard[side])
    for message in (c.group_delta(), c.group_input(group=1)):
        say(message)
    refuses_endless_repeats(pair.sides[side], heard[side])


# -- right message, wrong content ------------------------------------------------------------------------


def nan(tensor: WireTensor) -> WireTensor:
    data = tensor.data.copy()
    data.reshape(-1)[-1] = np.nan
    return WireTensor(tensor.dtype, data, tensor.exponent)


f, ints = c.floats, WireTensor.from_ints
T, L, W = c.TOKENS, c.LABELLED, c.WIDTH
LONG = c.MAX_TOKENS + 1
WRONG: list[tuple[str, State, m.AnyMessage, m.ErrorCode]] = [
    ("another version", State.GREETING, c.welcome(version=99), m.ErrorCode.VERSION),
    ("a sequence too long for a micro-batch", State.GREETING,
     msgspec.structs.replace(c.welcome(), max_sequence_length=c.MAX_TOKENS + 1), m.ErrorCode.PROTOCOL),
    ("a group of nothing", State.GREETED, c.open_session(groups=(GroupSpec(0, 4, ()),)), m.ErrorCode.PROTOCOL),
    ("beyond the end", State.GREETED, c.open_session(next_step=10), m.ErrorCode.PROTOCOL),
    ("too few units", State.OPENING, c.session_opened(b"\1"), m.ErrorCode.PROTOCOL),
    ("unknown unit state", State.OPENING, c.session_opened(b"\1\7"), m.ErrorCode.PROTOCOL),
    ("a later step", State.IDLE, c.embeddings(step=1), m.ErrorCode.PROTOCOL),
    ("a later step, evaluating", State.IDLE, c.embeddings(step=1, mode="evaluate"), m.ErrorCode.PROTOCOL),
    ("a later micro-batch", State.IDLE, c.embeddings(micro_batch=1), m.ErrorCode.PROTOCOL),
    ("embedding width", State.IDLE, c.embeddings(hidden_states=f(T, W + 1)), m.ErrorCode.PROTOCOL),
    ("embedding rank", State.IDLE, c.embeddings(hidden_states=f(1, T, W)), m.ErrorCode.PROTOCOL),
    ("embedding dtype", State.IDLE, c.embeddings(hidden_states=f(T, W, dtype="fp16")), m.ErrorCode.PROTOCOL),
    ("embedding NaN", State.IDLE, c.embeddings(hidden_states=nan(f(T, W))), m.ErrorCode.NON_FINITE),
    ("lengths' sum", State.IDLE, c.embeddings(sequence_lengths=ints([T + 1])), m.ErrorCode.PROTOCOL),
    ("lengths' sum overflows", State.IDLE, c.embeddings(sequence_lengths=ints([2**31 - 1] * 2 + [T + 2])),
     m.ErrorCode.PROTOCOL),
    ("an empty sequence", State.IDLE, c.embeddings(sequence_lengths=ints([T, 0])), m.ErrorCode.PROTOCOL),
    ("a negative length", State.IDLE, c.embeddings(sequence_lengths=ints([T + 1, -1])), m.ErrorCode.PROTOCOL),
    ("no sequences", State.IDLE, c.embeddings(sequence_lengths=ints([])), m.ErrorCode.PROTOCOL),
    ("lengths' dtype", State.IDLE, c.embeddings(sequence_lengths=f(2)), m.ErrorCode.PROTOCOL),
    ("no tokens", State.IDLE, c.embeddings(hidden_states=f(0, W)), m.ErrorCode.LIMIT),
    ("too many tokens", State.IDLE,
     c.embeddings(hidden_states=f(LONG, W), sequence_lengths=ints([1] * LONG)), m.ErrorCode.LIMIT),
    ("too long a sequence", State.IDLE,
     c.embeddings(hidden_states=f(9, W), sequence_lengths=ints([9])), m.ErrorCode.LIMIT),
    ("no labels", State.IDLE, c.embeddings(label_positions=ints([])), m.ErrorCode.PROTOCOL),
    ("labels twice", State.IDLE, c.embeddings(label_positions=ints([1, 1])), m.ErrorCode.PROTOCOL),
    ("labels descending", State.IDLE, c.embeddings(label_positions=ints([2, 0])), m.ErrorCode.PROTOCOL),
    ("a label before", State.IDLE, c.embeddings(label_positions=ints([-1, 0])), m.ErrorCode.PROTOCOL),
    ("a label behind", State.IDLE, c.embeddings(label_positions=ints([0, T])), m.ErrorCode.PROTOCOL),
    ("report of another step", State.IDLE, c.report(1), m.ErrorCode.PROTOCOL),
    ("report of too many", State.IDLE, c.report(0, units=3), m.ErrorCode.PROTOCOL),
    ("scores' NaN", State.IDLE, m.StepReport(step=0, scores=nan(f(2))), m.ErrorCode.NON_FINITE),
    ("input of another step", State.FORWARD, c.group_input(step=1), m.ErrorCode.PROTOCOL),
    ("input of another micro-batch", State.FORWARD, c.group_input(micro_batch=1), m.ErrorCode.PROTOCOL),
    ("input of no group", State.FORWARD, c.group_input(group=3), m.ErrorCode.PROTOCOL),
    ("input of a later group", State.FORWARD, c.group_input(group=1), m.ErrorCode.PROTOCOL),
    ("no live group was asked", State.FORWARD, c.labelled(), m.ErrorCode.PROTOCOL),
    ("input's tokens", State.FORWARD, c.group_input(hidden_states=f(T + 1, W)), m.ErrorCode.PROTOCOL),
    ("input's width", State.FORWARD, c.group_input(group=2, hidden_states=f(T, W)), m.ErrorCode.PROTOCOL),
    ("input's dtype", State.FORWARD, c.group_input(hidden_states=f(T, W, dtype="fp16")), m.ErrorCode.PROTOCOL),
    ("input's NaN", State.FORWARD, c.group_input(hidden_states=nan(f(T, W))), m.ErrorCode.NON_FINITE),
    ("labelled rows", State.FORWARD, c.labelled(hidden_states=f(L + 1, W)), m.ErrorCode.PROTOCOL),
    ("more gradients than groups", State.FORWARD, c.labelled(gradients=1), m.ErrorCode.PROTOCOL),
    ("delta of another step", State.DELTA, c.group_delta(step=1), m.ErrorCode.PROTOCOL),
    ("delta of another group", State.DELTA, c.group_delta(group=1), m.ErrorCode.PROTOCOL),
    ("a delta too few", State.DELTA, c.group_delta(deltas=c.outputs(0)[:1]), m.ErrorCode.PROTOCOL),
    ("deltas changed about", State.DELTA, c.group_delta(deltas=c.outputs(0)[::-1]), m.ErrorCode.PROTOCOL),
    ("delta's dtype", State.DELTA, c.group_delta(deltas=c.outputs(0, "fp16")), m.ErrorCode.PROTOCOL),
    ("delta's NaN", State.DELTA, c.group_delta(deltas=(c.outputs(0)[0], nan(c.outputs(0)[1]))),
     m.ErrorCode.NON_FINITE),
    ("gradient's rows", State.LOSS, c.grad_hidden_states(grad_hidden_states=f(L - 1, W)), m.ErrorCode.PROTOCOL),
    ("gradient's micro-batch", State.LOSS, c.grad_hidden_states(micro_batch=2), m.ErrorCode.PROTOCOL),
    ("gradient's NaN", State.LOSS, c.grad_hidden_states(grad_hidden_states=nan(f(L, W))), m.ErrorCode.NON_FINITE),
    ("gradients again", State.BACKWARD, c.group_grad(group=2), m.ErrorCode.PROTOCOL),
    ("gradients of no group", State.BACKWARD, c.group_grad(group=3), m.ErrorCode.PROTOCOL),
    ("gradients' shape", State.BACKWARD, c.group_grad(group=1, grads=(f(T, 5),)), m.ErrorCode.PROTOCOL),
    ("dx unasked", State.BACKWARD, c.group_input_grad(group=1), m.ErrorCode.PROTOCOL),
    ("dx's shape", State.BACKWARD, c.group_input_grad(group=2, grad_hidden_states=f(T, W)), m.ErrorCode.PROTOCOL),
    ("dx's NaN", State.BACKWARD, c.group_input_grad(group=2, grad_hidden_states=nan(f(T, 6))),
     m.ErrorCode.NON_FINITE),
]  # fmt: skip


@pytest.mark.parametrize(("state", "message", "code"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_content_is_refused_with_its_code(state: State, message: m.AnyMessage, code: m.ErrorCode) -> None:
    pair = Pair(WAYS[state])
    sender = c.sender_of(message)
    listener = pair.sides[c.other(sender)]
    assert refuses(listener, lambda: c.hear(listener, message), RemoteProtocolError).code == code
    if code is not m.ErrorCode.NON_FINITE:  # ours are looked at where floats become wire tensors
        refuses(pair.sides[sender], lambda: pair.sides[sender].send(message), LocalProtocolError)


def test_sequences_count_as_the_longest_without_packing() -> None:
    lengths = [5, 1, 1, 1]  # 8 tokens, or 20 with padding; 16 fit
    long = c.embeddings(hidden_states=f(8, W), sequence_lengths=ints(lengths), label_positions=ints([0, 2]))
    for mode in ("train", "evaluate"):
        message = msgspec.structs.replace(long, mode=mode)
        Pair([*c.opening(), message])
        device, server = Pair([c.hello(), c.welcome(packs=False), c.open_session(), c.session_opened()]).sides.values()
        error = refuses(device, lambda: device.send(message), LocalProtocolError)  # noqa: B023
        assert "8 tokens count as 20 with their padding; at most 16 fit" in str(error)
        assert refuses(server, lambda: c.hear(server, message), RemoteProtocolError).code == m.ErrorCode.LIMIT  # noqa: B023


def test_a_killed_unit_does_not_exchange() -> None:
    pair = Pair([*c.opening(), c.report(0), c.signal(0, b"\0\1"), c.embeddings(1)])
    refuses(pair.sides[C], lambda: pair.sides[C].send(c.group_input(1, group=0)), LocalProtocolError)
    refuses(
        pair.sides[E],
        lambda: c.hear(pair.sides[E], c.group_input(1, group=0)),
        RemoteProtocolError,
    )
    pair.say(c.group_input(1, group=1))


def test_a_group_exchanges_once_in_a_micro_batch() -> None:
    pair = Pair([*c.opening(), c.embeddings(), c.group_input(), c.group_delta()])
    refused_on_both_sides(pair, c.group_input(), "group 0 out of turn")
    pair = Pair([*c.opening(), *list(c.forward())[:-1]])
    for group in c.ALL:
        refused_on_both_sides(pair, c.group_input(group=group), f"group {group} out of turn")


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_every_live_group_is_asked_in_order(asked: int, mode: str) -> None:
    """A server that leaves groups out trains nothing, and nobody would notice."""
    way = [message for group in range(asked) for message in (c.group_input(group=group), c.group_delta(group=group))]
    pair = Pair([*c.opening(), c.embeddings(mode=mode), *way])
    refused_on_both_sides(pair, c.labelled(), f"only {asked} of 3 live groups were asked")
    for group in set(c.ALL) - {asked}:
        refused_on_both_sides(pair, c.group_input(group=group), f"group {group} out of turn")
    pair.say(c.group_input(group=asked))


def test_fading_and_held_units_are_asked_and_need_no_gradients() -> None:
    config = KillReviveConfig(active_fraction=0.5)
    for state in (UnitState.FADING, UnitState.HELD):
        pair = Pair([*c.opening(kill_revive=config), c.report(0), c.signal(0, bytes([state, 1])), *c.forward(1)])
        assert pair.sides[E].units.group_states.live == c.ALL
        assert pair.sides[E].units.group_states.active == {1, 2}
        pair = Pair([*c.opening(kill_revive=config), c.report(0), c.signal(0, bytes([state, 1]))])
        for message in c.forward(1, gradients=2):
            pair.say(message)
        pair.say(c.grad_hidden_states(1))
        refused_on_both_sides(pair, c.group_grad(1, group=0), "leave none for an active one")
        for group in (2, 1):
            pair.say(c.group_grad(1, group=group, answer=False))
        assert pair.sides[E].state is State.IDLE


@pytest.mark.parametrize("gradients", [0, 1])
def test_every_active_group_must_get_its_gradients(gradients: int) -> None:
    config = KillReviveConfig(active_fraction=0.5)
    pair = Pair([*c.opening(kill_revive=config), c.report(0), c.signal(0, b"\3\1"), *list(c.forward(1))[:-1]])
    refused_on_both_sides(pair, c.labelled(1, gradients=gradients), f"{gradients} gradients for 2 active groups")
    pair.say(c.labelled(1, gradients=2))


def test_parallel_blocks_exchange_gradients_in_any_order() -> None:
    """Where groups stand side by side, the first may have no gradient while a later one has, and in any order."""
    config = KillReviveConfig(active_fraction=0.3, unit="group")
    opening = [*c.opening(kill_revive=config)[:-1], c.session_opened(b"\1\1\1")]
    pair = Pair([*opening, c.report(0, units=3), c.signal(0, b"\3\1\3"), *c.forward(1, gradients=2)])
    pair.say(c.grad_hidden_states(1))
    pair.say(c.group_grad(1, group=2, answer=False))
    refused_on_both_sides(pair, c.group_grad(1, group=0, answer=False), "leave none for an active one")
    pair.say(c.group_grad(1, group=1, answer=False))
    assert pair.sides[E].state is State.IDLE


def test_an_evaluation_has_no_gradients() -> None:
    way = [*c.opening(), *list(c.forward(mode="evaluate"))[:-1]]
    refused_on_both_sides(Pair(way), c.labelled(gradients=1), "more gradients than groups took part")


# -- units whose parameters the server is given -----------------------------------------------------------------

HELD = [*c.opening(kill_revive=c.GIVES), c.report(0), c.signal(0, b"\1\3")]
GIVING = [c.parameters(1), c.parameters_taken(1), c.parameters(2), c.parameters_taken(2)]


def test_a_killed_unit_is_held_for_a_step_and_then_given() -> None:
    pair = Pair([*HELD, *c.forward(1, gradients=3), *c.backward(1), *GIVING, c.report(1), c.signal(1, b"\1\4")])
    for side in pair.sides.values():
        assert side.units.group_states.live == (0,)
        assert side.units.group_states.given == {1, 2}
    for message in (*c.forward(2, live=(0,)), *c.backward(2, live=(0,)), *c.forward(2, 9, (0,), mode="evaluate")):
        pair.say(message)
    # Revived: it exchanges again, and what the server had of it is gone.
    for message in (c.report(2), c.signal(2, b"\3\1")):
        pair.say(message)
    assert pair.sides[C].units.handed_over == set()
    assert pair.sides[C].units.groups_to_give == [0]


def test_what_a_killed_unit_has_learnt_is_given_in_order_and_before_the_report() -> None:
    pair = Pair(HELD)
    refused_by_both(pair, c.report(1), "a report before the parameters of group 1")
    refused_by_both(pair, c.parameters(0), "the parameters of group 0, which are not due")
    refused_by_both(pair, c.parameters(2), "the parameters of group 2, which are not due")
    refused_by_both(pair, c.parameters(1, r=3), "where fp32 (2, 4) was due")
    for message in GIVING:
        pair.say(message)
    refused_by_both(pair, c.parameters(1), "not due")
    pair.say(c.report(1))


def test_nothing_is_given_in_the_middle_of_a_micro_batch() -> None:
    refused_by_both(Pair([*HELD, c.embeddings(1)]), c.parameters(1), "under way")


def test_a_server_without_what_it_is_to_apply_gets_it_first() -> None:
    """As after it was restarted."""
    opening = [*c.opening(kill_revive=c.GIVES, next_step=3, ticket=b"signed")[:-1], c.session_opened(b"\1\4")]
    pair = Pair(opening)
    refused_by_both(pair, c.embeddings(3), "a micro-batch before the parameters of group 1")
    for message in (*GIVING, *c.forward(3, live=(0,)), *c.backward(3, live=(0,))):
        pair.say(message)


@pytest.mark.parametrize("on_kill", ["fade", "bypass", "hold_forward"])
def test_a_server_cannot_ask_for_what_was_not_offered(on_kill: Any) -> None:
    """What a device has learnt leaves it only where its user chose that."""
    config = KillReviveConfig(active_fraction=0.5, on_kill=on_kill)
    refused_on_both_sides(
        Pair(c.opening(kill_revive=config)[:-1]), c.session_opened(b"\1\4"), "which the device did not ask for"
    )
    pair = Pair([*c.opening(kill_revive=config), c.report(0)])
    refused_on_both_sides(pair, c.signal(0, b"\1\4"), "which the device did not ask for")
    pair.say(c.signal(0, b"\1\3"))
    assert pair.sides[E].units.groups_to_give == []
    refused_by_both(pair, c.parameters(1), "not due")


def test_nothing_is_given_before_the_first_step() -> None:
    pair = Pair(c.opening(kill_revive=c.GIVES)[:-1])
    refused_on_both_sides(pair, c.session_opened(b"\1\4"), "given to the server before the run's first step")


def test_a_unit_is_not_said_to_be_given_that_was_not() -> None:
    pair = Pair([*c.opening(kill_revive=c.GIVES), c.report(0)])
    refused_on_both_sides(pair, c.signal(0, b"\1\4"), "group 1 given to the server, which the device has not done")


HALF_HELD = [*c.opening(kill_revive=KillReviveConfig(active_fraction=0.5)), c.report(0), c.signal(0, b"\3\1")]


def test_fewer_gradients_than_groups_end_the_backward_pass() -> None:
    way = [*HALF_HELD, *c.forward(1, gradients=2), c.grad_hidden_states(1)]
    pair = Pair([*way, *(c.group_grad(1, group=group, answer=False) for group in (2, 1))])
    assert pair.sides[E].state is State.IDLE


def test_more_gradients_than_announced_are_refused() -> None:
    pair = Pair([*HALF_HELD, *c.forward(1, gradients=2), c.grad_hidden_states(1)])
    for group in (2, 1):
        pair.say(c.group_grad(1, group=group, answer=True))
    refused_on_both_sides(pair, c.group_grad(1, group=0), "more gradients than were announced")


def test_the_newest_common_version_is_chosen() -> None:
    ours = PROTOCOL_VERSIONS[-1]
    assert choose_version([0, ours, 99]) == ours
    assert choose_version([1, ours + 1]) is None  # 1 was never released


# -- at random -------------------------------------------------------------------------------------------

small = st.integers(0, 3)
dtypes = st.sampled_from(["fp32", "fp16"])
shapes = st.sampled_from([(3, 4), (2, 4), (3, 2), (3, 6), (0, 4), (3,), (2,)])
tensors = st.builds(lambda shape, dtype: c.floats(*shape, dtype=dtype), shapes, dtypes) | st.builds(
    lambda values: WireTensor.from_ints(values), st.lists(st.integers(-1, 4), max_size=3)
)
exchange: dict[str, Any] = {"step": small, "micro_batch": small}
anything: st.SearchStrategy[m.AnyMessage] = st.one_of(
    st.sampled_from([m.CloseSession(), c.error(), *c.opening(), c.session_opened(b"\0\1")]),
    st.builds(c.embeddings, **exchange, mode=st.sampled_from(["train", "evaluate"])),
    st.builds(c.embeddings, small, hidden_states=tensors, label_positions=tensors),
    st.builds(c.group_input, **exchange, group=small),
    st.builds(c.group_input, small, hidden_states=tensors),
    st.builds(c.group_delta, **exchange, group=small),
    st.builds(c.group_delta, small, deltas=st.lists(tensors, max_size=3).map(tuple)),
    st.builds(c.labelled, **exchange, gradients=small),
    st.builds(c.labelled, small, hidden_states=tensors),
    st.builds(c.grad_hidden_states, **exchange),
    st.builds(c.group_grad, **exchange, group=small, answer=st.booleans()),
    st.builds(c.group_input_grad, **exchange, group=small),
    st.builds(c.group_input_grad, small, group=small, grad_hidden_states=tensors),
    st.builds(c.report, small, st.integers(1, 3)),
    st.builds(c.signal, small, st.binary(min_size=1, max_size=3)),
)
unit_states = st.lists(st.sampled_from(list(UnitState)), min_size=c.UNITS, max_size=c.UNITS).map(bytes)


class Talk:
    """A random legal conversation; between any two of its messages, messages at random may be tried."""

    def __init__(self, data: st.DataObject, *, noise: bool) -> None:
        self.draw = data.draw
        self.noise = noise
        self.pair = Pair()

    def say(self, message: m.AnyMessage) -> None:
        if self.noise:
            for _ in range(self.draw(st.integers(0, 2))):
                self.disturb(self.draw(anything), self.draw(st.sampled_from(Side)))
        self.pair.say(message)

    def disturb(self, message: m.AnyMessage, side: Side) -> None:
        session = self.pair.sides[side]
        for act in (lambda: session.send(message), lambda: c.hear(session, message)):
            before = c.everything(session)
            kept = {name: value for name, value in vars(session).items() if name not in ("_decoder", "link")}
            kept = copy.deepcopy(kept) | {"link": c.copy_link(session.link)}
            try:
                act()
            except ProtocolError:
                assert c.everything(session) == before
            else:  # it was legal, but is not part of this talk
                vars(session).update(kept)

    def run(self) -> None:
        gives = self.draw(st.booleans())
        on_kill: Any = "give_to_server" if gives else "fade"
        for message in c.opening(kill_revive=msgspec.structs.replace(c.NONE_NEED_BE_ACTIVE, on_kill=on_kill)):
            self.say(message)
        unsignalled: list[int] = []
        step = 0
        for step in range(self.draw(st.integers(0, 3))):
            for micro_batch in range(self.draw(st.integers(0, 2))):
                self.micro_batch(step, micro_batch, unsignalled)
            if len(unsignalled) == 2:
                self.signal(unsignalled)
            for group in self.pair.sides[E].units.groups_to_give:
                self.say(c.parameters(group))
                self.say(c.parameters_taken(group))
            self.say(c.report(step))
            unsignalled.append(step)
        self.say(m.CloseSession() if self.draw(st.booleans()) else c.error())

    def signal(self, unsignalled: list[int]) -> None:
        units = self.pair.sides[E].units
        states = [
            state if state != UnitState.GIVEN or units.handed_over.issuperset(groups) else UnitState.HELD
            for state, groups in zip(self.draw(unit_states), units.groups, strict=True)
        ]
        self.say(c.signal(unsignalled.pop(0), bytes(states)))

    def micro_batch(self, step: int, micro_batch: int, unsignalled: list[int]) -> None:
        draw = self.draw
        training = draw(st.booleans())
        if not training:
            self.say(c.embeddings(step, draw(small), mode="evaluate"))
            ((_, micro_batch),) = self.pair.sides[E].under_way
        else:
            micro_batch = self.pair.sides[E].next_micro_batch
            self.say(c.embeddings(step, micro_batch))
        while unsignalled:
            self.signal(unsignalled)
        units = self.pair.sides[E].units.states
        live = [group for group in c.ALL if units[c.GROUPS[group].block] in LIVE]
        for group in live:
            self.say(c.group_input(step, micro_batch, group))
            self.say(c.group_delta(step, micro_batch, group))
        active = [group for group in live if units[c.GROUPS[group].block] == UnitState.ACTIVE]
        more = [group for group in live if group not in active]
        with_grads = active + (draw(st.permutations(more))[: draw(st.integers(0, len(more)))] if more else [])
        gradients = len(with_grads) if training else 0
        self.say(c.labelled(step, micro_batch, gradients))
        if not gradients:
            return
        self.say(c.grad_hidden_states(step, micro_batch))
        to_send, to_answer = list(draw(st.permutations(with_grads))), []
        while to_send or to_answer:
            if to_send and (not to_answer or draw(st.booleans())):
                group, answer = to_send.pop(), draw(st.booleans())
                self.say(c.group_grad(step, micro_batch, group, answer=answer))
                to_answer += [group] * answer
            else:
                index = draw(st.integers(0, len(to_answer) - 1))
                self.say(c.group_input_grad(step, micro_batch, to_answer.pop(index)))
        assert self.pair.sides[C].state is State.IDLE


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_legal_conversations_never_raise(data: st.DataObject) -> None:
    Talk(data, noise=False).run()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_random_illegal_message_never_changes_the_state(data: st.DataObject) -> None:
    Talk(data, noise=True).run()


def test_random_bytes_never_change_the_state() -> None:
    """What is refused changes nothing. A few are in order here, by chance; then the next one finds a new session."""
    valid = [bytes(encode(message, seq=1)) for message in (*c.forward(), *c.backward(), c.signal(), c.error())]
    reached = Reached()
    session = Pair(WAYS[State.FORWARD]).sides[E]

    @settings(max_examples=200, deadline=None)
    @given(frames(valid, ["group_input", "group_grad", "labelled_hidden_states", "signal", "error"]))
    def receive(frame: bytes) -> None:
        nonlocal session
        before = c.everything(session)
        if reached.count(lambda: session.receive(frame)):
            session = Pair(WAYS[State.FORWARD]).sides[E]
        else:
            assert c.everything(session) == before

    receive()
    assert reached.past_checksum > 20, reached
    assert reached.parsed > 10, reached


def test_set_up_may_stop_between_groups() -> None:
    """So that a server that stops need not wait for it."""
    pair = Pair(c.opening(adapter=KEEPING))
    assert pair.sides[C].is_between_steps
    pair.say(m.MakeAdapterState(group=0))
    assert not pair.sides[C].is_between_steps
    pair.say(c.adapter_state(0))
    assert pair.sides[C].is_between_steps


def test_set_up_takes_each_group_once_and_in_order() -> None:
    pair = Pair(c.opening(adapter=KEEPING))
    for message in (m.MakeAdapterState(group=1), c.adapter_state(1)):
        refuses(pair.sides[E], lambda message=message: pair.sides[E].send(message), LocalProtocolError)
        error = refuses(pair.sides[C], lambda message=message: c.hear(pair.sides[C], message), RemoteProtocolError)
        assert "group 1 when group 0 comes next" in str(error)
    for group in range(len(c.GROUPS)):
        if group % 2:
            pair.say(c.adapter_state(group), sender=E)
            pair.say(c.adapter_state(group, tensors=()))
        else:
            pair.say(m.MakeAdapterState(group=group))
            pair.say(c.adapter_state(group))
    assert pair.sides[E].state is pair.sides[C].state is State.IDLE


BOTTLENECK = AdapterSpec(kind="bottleneck", r=2)


def basis_micro_batch(micro_batch: int = 0) -> list[m.AnyMessage]:
    begun = c.embeddings(mode="basis", micro_batch=micro_batch)
    return [begun, c.labelled(0, micro_batch), c.grad_hidden_states(0, micro_batch)]


def test_basis_pass_comes_before_the_first_state() -> None:
    """As many micro-batches as the device likes, one at a time, and no group takes part."""
    pair = Pair(c.opening(adapter=BOTTLENECK))
    for micro_batch in (3, 0):
        for message in basis_micro_batch(micro_batch):
            pair.say(message)
        assert pair.sides[C].state is State.SETTING_UP
    for group in range(len(c.GROUPS)):
        pair.say(m.MakeAdapterState(group=group))
        pair.say(c.adapter_state(group, tensors=bottleneck_state(group)))
    assert pair.sides[E].state is pair.sides[C].state is State.IDLE


def bottleneck_state(group: int) -> tuple[WireTensor, ...]:
    spec = c.GROUPS[group]
    return c.floats(2, spec.in_features), c.floats(spec.out_features, 2)


def refused_by_both(pair: Pair, message: m.AnyMessage, text: str, sender: Side | None = None) -> None:
    sender = sender or c.sender_of(message)
    assert text in str(refuses(pair.sides[sender], lambda: pair.sides[sender].send(message), LocalProtocolError))
    listener = pair.sides[c.other(sender)]
    assert text in str(refuses(listener, lambda: c.hear(listener, message), RemoteProtocolError))


def test_basis_pass_has_rules_of_its_own() -> None:
    start, end, grad = basis_micro_batch()
    pair = Pair(c.opening(adapter=BOTTLENECK))
    for mode in ("train", "evaluate"):
        refused_by_both(pair, c.embeddings(mode=mode), f"of the mode {mode} in SETTING_UP")
    pair.say(start)
    refused_by_both(pair, c.embeddings(mode="basis", micro_batch=1), "not now")
    refused_by_both(pair, m.MakeAdapterState(group=0), "under way")
    refused_by_both(pair, m.CloseSession(), "under way")
    refused_by_both(pair, c.group_input(), "group 0 does not exist")
    refused_by_both(pair, c.labelled(gradients=1), "more gradients")
    pair.say(end)
    pair.say(grad)
    pair.say(m.MakeAdapterState(group=0))
    pair.say(c.adapter_state(0, tensors=bottleneck_state(0)))
    refused_by_both(pair, start, "not now")


def test_no_basis_pass_where_it_would_come_to_nothing() -> None:
    """In a session that only uses, in one that is set up, and for a kind whose state the device gives."""
    opened = m.SessionOpened(session="one", token=c.TOKEN)
    use = Pair([*c.opening()[:2], c.open_session(adapter=BOTTLENECK, purpose=m.Use()), opened])
    refused_by_both(use, basis_micro_batch()[0], "in a session that does not")
    refused_by_both(Pair(c.opening()), basis_micro_batch()[0], "of the mode basis in IDLE")
    given = Pair(c.opening(adapter=AdapterSpec(kind="ffa", r=2)))
    for message in (basis_micro_batch()[0], m.MakeAdapterState(group=0)):
        refused_by_both(given, message, "comes from the device")


def test_bottleneck_wider_than_its_group_is_refused() -> None:
    pair = Pair(c.opening()[:2])
    refused_by_both(pair, c.open_session(adapter=AdapterSpec(kind="bottleneck", r=64)), "no wider")


def test_a_micro_batch_begins_with_embeddings_or_with_tokens() -> None:
    tokens = WireTensor.from_ints([5, 6, 7, 8])
    shapes = {"sequence_lengths": WireTensor.from_ints([4])}
    pair = Pair(c.opening())
    given = c.embeddings().hidden_states
    refused_by_both(pair, c.embeddings(hidden_states=None), "neither embeddings nor token ids")
    refused_by_both(pair, c.embeddings(hidden_states=given, token_ids=tokens), "or both")
    refused_by_both(pair, c.embeddings(hidden_states=None, token_ids=c.floats(4), **shapes), "int32")
    pair.say(c.embeddings(hidden_states=None, token_ids=tokens, **shapes))


@pytest.mark.parametrize("stored", CODECS)
@pytest.mark.parametrize("asked", CODECS)
def test_state_is_made_as_was_asked_and_given_as_it_is_stored(asked: WireDtype, stored: WireDtype) -> None:
    """So that a server has the bits that another one made, whatever this session asks for."""
    tensors = tuple(encode_floats(tensor.data, stored) for tensor in bottleneck_state(0))
    codecs = msgspec.structs.replace(Codecs.all("fp32"), adapter_state=asked)
    pair = Pair(c.opening(adapter=BOTTLENECK, codecs=codecs))
    pair.say(c.adapter_state(0, tensors=tensors), sender=E)
    assert pair.sides[C].state is State.TAKING_STATE
    pair = Pair([*c.opening(adapter=BOTTLENECK, codecs=codecs), m.MakeAdapterState(group=0)])
    if stored == asked:
        pair.say(c.adapter_state(0, tensors=tensors))
        assert pair.sides[E].state is State.SETTING_UP
    else:
        refused_by_both(pair, c.adapter_state(0, tensors=tensors), f"where {asked}", C)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_state_of_no_floats_is_refused(dtype: str) -> None:
    tensors = tuple(WireTensor(dtype, tensor.data.astype(DTYPES[dtype])) for tensor in bottleneck_state(0))
    pair = Pair(c.opening(adapter=BOTTLENECK))
    refused_by_both(pair, c.adapter_state(0, tensors=tensors), "where floats were due", E)


# -- what the server keeps of a context ------------------------------------------------------------------


def using(context_length: int = MAX_CONTEXT, **changes: Any) -> list[m.AnyMessage]:
    opened = m.SessionOpened(session="one", token=c.TOKEN)
    return [*c.opening()[:2], c.open_session(purpose=m.Use(context_length=context_length), **changes), opened]


def decoding(position: int | None, tokens: int = TOKENS, **changes: Any) -> m.Embeddings:
    tensors = {"hidden_states": c.floats(tokens, c.WIDTH), "sequence_lengths": WireTensor.from_ints([tokens])}
    return c.embeddings(mode="decode", position=position, **{**tensors, **changes})


def decoded(position: int, tokens: int = TOKENS) -> Iterator[m.AnyMessage]:
    yield decoding(position, tokens)
    for group in c.ALL:
        yield c.group_input(group=group, hidden_states=c.floats(tokens, c.GROUPS[group].in_features))
        deltas = tuple(c.floats(tokens, target.out_features) for target in c.GROUPS[group].targets)
        yield c.group_delta(group=group, deltas=deltas)
    yield c.labelled()


def test_a_context_goes_on_from_any_position_that_is_held() -> None:
    """Whatever came after it is forgotten."""
    pair = Pair(using())
    for position, tokens in ((0, 3), (3, 8), (11, 3), (4, 3), (7, 3), (0, 3)):
        for message in decoded(position, tokens):
            pair.say(message)
        assert [side.cached_tokens for side in pair.sides.values()] == [position + tokens] * 2
    refused_by_both(pair, decoding(4), "tokens from position 4 on, where only 3 are held")
    pair.say(decoding(3))
    refused_by_both(pair, decoding(3, micro_batch=1), "not now")


def test_a_context_stays_within_its_room() -> None:
    pair = Pair(using(context_length=5))
    for message in decoded(0):
        pair.say(message)
    refused_by_both(pair, decoding(3), "a context of 6 tokens; this session has room for 5")
    for message in decoded(2):
        pair.say(message)
    greeted = Pair(c.opening()[:2])
    refused_by_both(greeted, using(context_length=MAX_CONTEXT + 1)[2], "a context of 21 tokens; at most 20 fit")


def test_only_a_context_has_a_position() -> None:
    pair = Pair(using())
    for message in (decoding(None), c.embeddings(mode="evaluate", position=0)):
        refused_by_both(pair, message, "a position belongs to")
    two = WireTensor.from_ints([1, TOKENS - 1])
    refused_by_both(pair, decoding(0, sequence_lengths=two), "a position belongs to the one sequence")
    for other in (Pair(using(context_length=0)), Pair(c.opening())):
        refused_by_both(other, decoding(0), "in a session that has no context length")
    for mode in ("train", "basis"):
        refused_by_both(pair, c.embeddings(mode=mode), "a micro-batch that trains, in a session that does not")


# -- the first blocks alone ------------------------------------------------------------------------------

ENCODED_WIDTH = 6


def encoding(**changes: Any) -> list[m.AnyMessage]:
    opened = m.SessionOpened(session="one", token=c.TOKEN)
    settings = {"groups": (), "purpose": m.Encode(blocks=2, width=ENCODED_WIDTH), **changes}
    return [*c.opening()[:2], c.open_session(**settings), opened]


def to_encode(**changes: Any) -> m.Embeddings:
    return c.embeddings(mode="encode", **{"label_positions": WireTensor.from_ints([]), **changes})


def encoded(*lengths: int, micro_batch: int = 0, width: int = ENCODED_WIDTH) -> m.EncodedHiddenStates:
    tensors = tuple(c.floats(length, width) for length in lengths)
    return m.EncodedHiddenStates(step=0, micro_batch=micro_batch, hidden_states=tensors)


def test_a_session_that_encodes_gives_each_sequence_by_itself() -> None:
    pair = Pair(encoding())
    pair.say(to_encode())
    for wrong in (encoded(1, 1), encoded(1, 2, width=c.WIDTH)):
        refused_by_both(pair, wrong, "was due")
    for wrong in (encoded(TOKENS), encoded(1, 2, 1)):
        refused_by_both(pair, wrong, "tensors of 2 sequences")
    refused_by_both(pair, c.labelled(), "not now")
    pair.say(encoded(1, TOKENS - 1))
    assert pair.sides[E].state is State.IDLE
    pair.say(to_encode(micro_batch=7))
    pair.say(encoded(1, TOKENS - 1, micro_batch=7))
    pair.say(m.CloseSession())


def test_what_a_session_that_encodes_cannot_do() -> None:
    pair = Pair(encoding())
    refused_by_both(pair, to_encode(label_positions=WireTensor.from_ints([0])), "some in the mode encode")
    for name in ("crossing_positions", "examples"):
        refused_by_both(pair, to_encode(**{name: WireTensor.from_ints([0, 1])}), "in the mode encode")
    for mode in ("train", "evaluate", "basis"):
        refused_by_both(pair, c.embeddings(mode=mode), f"of the mode {mode} in a session that is for something else")
    refused_by_both(pair, decoding(0), "in a session that has no context length")
    many = m.MAX_ENCODED_SEQUENCES + 1
    wide = Pair([*c.opening()[:1], msgspec.structs.replace(c.welcome(), max_tokens=1000), *encoding()[2:]])
    tensors = {"hidden_states": c.floats(many, c.WIDTH), "sequence_lengths": WireTensor.from_ints([1] * many)}
    refused_by_both(wide, to_encode(**tensors), "129 sequences in the mode encode; at most 128 fit")
    refused_by_both(pair, c.report(), "a report where nothing is trained")
    for other in (Pair(using()), Pair(c.opening())):
        refused_by_both(other, to_encode(), "of the mode encode in a session that is for something else")
    refused_by_both(Pair(c.opening()[:2]), encoding(groups=c.GROUPS)[2], "groups in a session that only encodes")
    plain = Pair(using())
    plain.say(c.embeddings(mode="evaluate"))
    refused_by_both(plain, encoded(1, 2), "not now")


def test_a_context_of_the_first_blocks_gives_what_comes_out_of_them() -> None:
    """At the labels, as wide as the session says; several texts may be asked for between."""
    purpose = m.Encode(blocks=2, width=ENCODED_WIDTH, context_length=5)
    pair = Pair(encoding(purpose=purpose))
    pair.say(decoding(0))
    for wrong in (encoded(TOKENS), c.group_input()):
        refused_by_both(pair, wrong, "not now" if isinstance(wrong, m.EncodedHiddenStates) else "does not exist")
    refused_by_both(pair, c.labelled(), "was due")  # as wide as last hidden states
    labels = c.labelled().hidden_states.shape[0]
    narrow = c.labelled(hidden_states=c.floats(labels, ENCODED_WIDTH))
    refused_by_both(pair, msgspec.structs.replace(narrow, gradients=1), "more gradients than groups took part")
    pair.say(narrow)
    assert [side.cached_tokens for side in pair.sides.values()] == [TOKENS] * 2
    pair.say(to_encode(micro_batch=1))
    pair.say(encoded(1, TOKENS - 1, micro_batch=1))
    refused_by_both(pair, decoding(4), "tokens from position 4 on, where only 3 are held")
    refused_by_both(pair, decoding(3), "a context of 6 tokens; this session has room for 5")
    pair.say(decoding(2))
    greeted = Pair(c.opening()[:2])
    longer = msgspec.structs.replace(purpose, context_length=MAX_CONTEXT + 1)
    refused_by_both(greeted, encoding(purpose=longer)[2], "a context of 21 tokens; at most 20 fit")


@pytest.mark.parametrize("mode", ["evaluate", "decode"])
def test_where_no_row_crosses_no_group_is_asked(mode: str) -> None:
    nothing = WireTensor.from_ints([])
    begun = decoding(0) if mode == "decode" else c.embeddings(mode=mode)
    pair = Pair([*using(), msgspec.structs.replace(begun, crossing_positions=nothing)])
    refused_by_both(pair, c.group_input(hidden_states=c.floats(0, c.WIDTH)), "does not exist, or belongs to a killed")
    pair.say(c.labelled())
    assert pair.sides[E].state is State.IDLE
