"""The protocol's rules, both sides against each other: what may be said, what may not, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import conversations as c
import msgspec
import pytest
import session_ways as w
from conversations import Pair
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.protocol import messages as m
from dlora.protocol.choices import WireDtype
from dlora.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from dlora.protocol.frames import encode
from dlora.protocol.kill_revive import LIVE, KillReviveConfig, UnitState
from dlora.protocol.link import MAX_REPEATS
from dlora.protocol.session import HANDSHAKE, Session, choose_version
from dlora.protocol.states import TRANSITIONS, Side, State
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import FOR_ALL, Codecs, encode_floats

E, C = Side.EDGE, Side.CLOUD
f, ints = c.floats, WireTensor.from_ints
T, L, W = c.TOKENS, c.LABELLED, c.WIDTH

ONE_OF_EACH: dict[type, m.AnyMessage] = {
    type(message): message
    for message in (
        *c.opening(), c.embeddings(), c.group_input(), c.group_delta(), c.labelled(gradients=3), c.grad_hidden_states(),
        c.group_grad(group=1), c.group_input_grad(group=2), c.report(), c.signal(), m.CloseSession(), c.error(),
        c.resume_session(), c.session_resumed(), m.SessionGone(), m.MakeAdapterState(group=0), w.state_of(),
        c.parameters(), w.drafts(5),
    )
}  # fmt: skip


# -- whole conversations ---------------------------------------------------------------------------------


def test_whole_run_is_legal() -> None:
    pair = Pair(c.opening(kill_revive=msgspec.structs.replace(c.NONE_NEED_BE_ACTIVE, revive_every=0, probation=0)))
    states = [b"\1\1", b"\0\1", b"\1\0", b"\0\0"]
    for step, units in enumerate(states):
        assert pair.sides[E].units.states.tobytes() == units
        live = [group for group in c.ALL if units[c.GROUPS[group].block]]
        for micro_batch in range(2):
            w.say_all(pair, c.forward(step, micro_batch, live))
            w.say_all(pair, c.backward(step, micro_batch, live) if live else ())
            assert pair.sides[E].state is State.IDLE
        w.say_all(pair, c.forward(step, 40, live, mode="evaluate"))
        w.say_all(pair, (c.report(step), c.signal(step, states[(step + 1) % 4])))
    assert pair.sides[C].step == 4
    pair.say(m.CloseSession())
    assert {side.state for side in pair.sides.values()} == {State.CLOSED}


def test_round_trips_are_counted_where_one_side_waits() -> None:
    pair = Pair(c.opening())
    before = pair.sides[E].round_trips
    w.say_all(pair, (*c.forward(), *c.backward(), c.report()))
    # Embeddings, three deltas, the loss's gradient, two input gradients; nothing waits for the report.
    assert pair.sides[E].round_trips - before == 1 + 3 + 1 + 2


@pytest.mark.parametrize("when", range(2))
def test_next_micro_batch_may_come_before_the_signal(when: int) -> None:
    rest = [c.embeddings(1), c.group_input(1), c.group_delta(1)]
    rest.insert(when, c.signal(0))
    pair = Pair([*c.opening(), *c.forward(), *c.backward(), c.report(0), *rest])
    assert pair.sides[C].state is State.FORWARD


@pytest.mark.parametrize("reports", [1, 2])
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_micro_batch_waits_for_the_signals_of_all_reports_before_it(mode: str, reports: int) -> None:
    """A server that withholds signals would go on with the units of an earlier step."""
    pair = Pair([*c.opening(), *map(c.report, range(reports)), c.embeddings(reports, mode=mode)])
    for step in range(reports):
        w.refused_by_both(pair, c.group_input(reports), f"the report of step {step} has no signal yet")
        pair.say(c.signal(step))
    pair.say(c.group_input(reports))


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
    w.refused_by_both(pair, c.signal(0), "in the middle of a micro-batch")


@pytest.mark.parametrize(
    ("config", "fits", "kills_too_many"),
    [
        (KillReviveConfig(active_fraction=0.5), [b"\1\0"], [b"\0\0", b"\2\3"]),
        (KillReviveConfig(active_fraction=1.0), [b"\1\1"], [b"\1\0"]),
        (KillReviveConfig(active_fraction=0.5, pinned=(1,)), [b"\0\1"], [b"\1\0"]),
        (KillReviveConfig(score="static", static=(0,), active_fraction=0.0), [b"\1\0"], [b"\0\1"]),
        (c.NONE_NEED_BE_ACTIVE, [b"\0\0"], []),
    ],
)
def test_signal_that_kills_too_many_units_is_refused(
    config: KillReviveConfig, fits: list[bytes], kills_too_many: list[bytes]
) -> None:
    """A server that means harm cannot silence a device's adapters, or those that it pinned."""
    pair = Pair([*c.opening(kill_revive=config), c.report()])
    for units in kills_too_many:
        w.refused_by_both(pair, c.signal(0, units), "active")
    for units in fits:
        pair.say(c.signal(0, units))


@pytest.mark.parametrize("order", ["2 1 +1 +2 0", "2 1 +2 +1 0", "2 1 0 +2 +1"])
def test_gradients_may_be_outstanding_in_any_order(order: str) -> None:
    """Of parallel branches, and after the last gradient; ``+``: the device's answer."""
    pair = Pair([*c.opening(), *c.forward(), c.grad_hidden_states()])
    for each in order.split():
        assert pair.sides[E].state is State.BACKWARD
        group = int(each)
        pair.say(c.group_input_grad(group=group) if "+" in each else c.group_grad(group=group, answer=group > 0))
    assert pair.sides[E].state is State.IDLE


@pytest.mark.parametrize("state", [state for state in State if state is not State.CLOSED])
@pytest.mark.parametrize("sender", Side)
def test_an_error_closes_from_every_state(state: State, sender: Side) -> None:
    pair = Pair(w.WAYS[state])
    pair.say(c.error(), sender)
    assert {side.state for side in pair.sides.values()} == {State.CLOSED}
    for message in ONE_OF_EACH.values():
        w.refused_by_both(pair, message, "the conversation is over", sender=C)


@pytest.mark.parametrize("state", State)
def test_may_close_only_where_the_table_allows_it(state: State) -> None:
    session = Pair(w.WAYS[state]).sides[E]
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
        way = w.WAYS[state]
        if kind is m.GroupParameters:
            if state is State.IDLE:
                way = w.WAYS[State.TAKING_PARAMETERS][:-1]  # once a unit is held
            elif state is State.TAKING_PARAMETERS:
                message = c.parameters_taken()
        if state is State.FORWARD and kind is m.LabelledHiddenStates:
            way = [*c.opening(), *list(c.forward())[:-1]]  # once all groups were asked
        elif state is State.FORWARD and kind is m.GroupDelta:
            way = w.WAYS[w.ONE_ASKED]
        elif state is State.FORWARD and kind is m.DraftTokens:
            way = [*w.answering(), w.begun(0, drafts=2)]
        elif state is State.AHEAD and kind is m.GroupInput:
            way, message = [*way, w.drafts(5)], w.reads(2, *c.ALL)
        elif state is State.AHEAD and kind is m.Embeddings:
            message = w.begun(3, micro_batch=1)
        session = Pair(way).sides[side]
        assert session.state is state
        send, receive = lambda: session.send(message), lambda: c.hear(session, message)  # noqa: B023
        if allowed.get(kind) is side:
            send()
        else:
            w.refuses(session, send, LocalProtocolError)
        session = Pair(way).sides[side]
        if allowed.get(kind) is c.other(side):
            receive()
        elif message == last_of_handshake(state, side):
            assert receive() is None
        else:
            assert w.refuses(session, receive, RemoteProtocolError).code == m.ErrorCode.PROTOCOL


def last_of_handshake(state: State, side: Side) -> m.AnyMessage | None:
    """What this side heard last of a handshake that goes on: it may come twice."""
    heard = [each for each in w.WAYS[state] if isinstance(each, HANDSHAKE) and c.sender_of(each) is not side]
    return heard[-1] if heard and state is not State.CLOSED else None


@pytest.mark.parametrize("side", Side)
def test_repeated_handshake_message_is_ignored_also_after_resuming(side: Side) -> None:
    handshake = Pair(w.WAYS[State.RESUMED]).sides[side]
    session = Pair(w.WAYS[w.ONE_ASKED]).sides[side]
    opening = c.session_opened() if side is E else c.open_session()
    assert c.hear(session, opening) is None
    session.resume(handshake, session.link.sent)
    counted = {"bytes_received": 0, "_repeats": 0}
    before = c.everything(session) | counted
    assert c.hear(session, c.session_resumed() if side is E else c.resume_session()) is None
    assert c.everything(session) | counted == before
    w.refuses(session, lambda: c.hear(session, opening), RemoteProtocolError)


def refuses_endless_repeats(listener: Session, frame: bytearray) -> None:
    for _ in range(MAX_REPEATS):
        assert listener.receive(frame) is None
    error = w.refuses(listener, lambda: listener.receive(frame), RemoteProtocolError)
    assert "that came before, and another" in str(error)


@pytest.mark.parametrize("side", Side)
def test_endless_repeated_handshake_is_refused(side: Side) -> None:
    hello, welcome = w.WAYS[State.GREETED]
    listener = Pair(w.WAYS[State.GREETED]).sides[side]
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


# -- what is allowed beside the usual --------------------------------------------------------------------


@pytest.mark.parametrize("state", [UnitState.FADING, UnitState.HELD])
def test_fading_and_held_units_are_asked_and_need_no_gradients(state: UnitState) -> None:
    way = [*c.opening(kill_revive=w.HALF), c.report(0), c.signal(0, bytes([state, 1]))]
    pair = Pair([*way, *c.forward(1)])
    groups = pair.sides[E].units.group_states
    assert (groups.live, groups.active) == (c.ALL, {1, 2})
    pair = Pair([*way, *c.forward(1, gradients=2), c.grad_hidden_states(1)])
    w.refused_by_both(pair, c.group_grad(1, group=0), "leave none for an active one")
    w.say_all(pair, (c.group_grad(1, group=group, answer=False) for group in (2, 1)))
    assert pair.sides[E].state is State.IDLE


def test_parallel_blocks_exchange_gradients_in_any_order() -> None:
    """Where groups stand side by side, the first may have no gradient while a later one has, and in any order."""
    config = KillReviveConfig(active_fraction=0.3, unit="group")
    opening = [*c.opening(kill_revive=config)[:-1], c.session_opened(b"\1\1\1")]
    pair = Pair([*opening, c.report(0, units=3), c.signal(0, b"\3\1\3"), *c.forward(1, gradients=2)])
    w.say_all(pair, (c.grad_hidden_states(1), c.group_grad(1, group=2, answer=False)))
    w.refused_by_both(pair, c.group_grad(1, group=0, answer=False), "leave none for an active one")
    pair.say(c.group_grad(1, group=1, answer=False))
    assert pair.sides[E].state is State.IDLE


def test_a_killed_unit_is_held_for_a_step_and_then_given() -> None:
    pair = Pair([*w.HELD, *c.forward(1, gradients=3), *c.backward(1), *w.GIVING, c.report(1), c.signal(1, b"\1\4")])
    for side in pair.sides.values():
        assert side.units.group_states.live == (0,)
        assert side.units.group_states.given == {1, 2}
    w.say_all(pair, (*c.forward(2, live=(0,)), *c.backward(2, live=(0,)), *c.forward(2, 9, (0,), mode="evaluate")))
    # Revived: it exchanges again, and what the server had of it is gone.
    w.say_all(pair, (c.report(2), c.signal(2, b"\3\1")))
    assert pair.sides[C].units.handed_over == set()
    assert pair.sides[C].units.groups_to_give == [0]


def test_a_server_without_what_it_is_to_apply_gets_it_first() -> None:
    """As after it was restarted."""
    Pair([*w.GOES_ON, *w.GIVING, *c.forward(3, live=(0,)), *c.backward(3, live=(0,))])


def test_the_newest_common_version_is_chosen() -> None:
    ours = PROTOCOL_VERSIONS[-1]
    assert choose_version([0, ours, 99]) == ours
    assert choose_version([1, ours + 1]) is None  # 1 was never released


def test_set_up_may_stop_between_groups() -> None:
    """So that a server that stops need not wait for it."""
    pair = Pair(w.SETTING_UP)
    assert pair.sides[C].is_between_steps
    pair.say(m.MakeAdapterState(group=0))
    assert not pair.sides[C].is_between_steps
    pair.say(w.state_of())
    assert pair.sides[C].is_between_steps


def test_set_up_takes_states_of_either_side() -> None:
    pair = Pair(w.SETTING_UP)
    for group in range(len(c.GROUPS)):
        if group % 2:
            pair.say(w.state_of(group), sender=E)
            pair.say(c.adapter_state(group, tensors=()))
        else:
            w.say_all(pair, (m.MakeAdapterState(group=group), w.state_of(group)))
    assert pair.sides[E].state is pair.sides[C].state is State.IDLE


def test_basis_pass_comes_before_the_first_state() -> None:
    """As many micro-batches as the device likes, one at a time, and no group takes part."""
    pair = Pair(w.SETTING_UP)
    for micro_batch in (3, 0):
        w.say_all(pair, (w.changed(message, micro_batch=micro_batch) for message in w.BASIS))
        assert pair.sides[C].state is State.SETTING_UP
    for group in range(len(c.GROUPS)):
        w.say_all(pair, (m.MakeAdapterState(group=group), w.state_of(group)))
    assert pair.sides[E].state is pair.sides[C].state is State.IDLE


def test_a_micro_batch_may_begin_with_tokens() -> None:
    Pair([*c.opening(), c.embeddings(hidden_states=None, token_ids=ints([5, 6, 7]))])


def test_padding_counts_only_without_packing() -> None:
    message = c.embeddings(hidden_states=f(8, W), sequence_lengths=ints([5, 1, 1, 1]))  # 20 with padding; 16 fit
    Pair([*c.opening(), message])


@pytest.mark.parametrize("stored", FOR_ALL)
@pytest.mark.parametrize("asked", FOR_ALL)
def test_state_is_made_as_was_asked_and_given_as_it_is_stored(asked: WireDtype, stored: WireDtype) -> None:
    """So that a server has the bits that another one made, whatever this session asks for."""
    tensors = tuple(encode_floats(tensor.data, stored) for tensor in w.state_of().tensors)
    codecs = msgspec.structs.replace(Codecs.all("fp32"), adapter_state=asked)
    pair = Pair(c.opening(adapter=w.BOTTLENECK, codecs=codecs))
    pair.say(c.adapter_state(0, tensors=tensors), sender=E)
    assert pair.sides[C].state is State.TAKING_STATE
    pair = Pair([*c.opening(adapter=w.BOTTLENECK, codecs=codecs), m.MakeAdapterState(group=0)])
    if stored == asked:
        pair.say(c.adapter_state(0, tensors=tensors))
        assert pair.sides[E].state is State.SETTING_UP
    else:
        w.refused_by_both(pair, c.adapter_state(0, tensors=tensors), f"where {asked}", sender=C)


def test_a_context_goes_on_from_any_position_that_is_held() -> None:
    """Whatever came after it is forgotten."""
    pair = Pair(w.using())
    for position, tokens in ((0, 3), (3, 8), (11, 3), (4, 3), (7, 3), (0, 3)):
        w.say_all(pair, w.decoded(position, tokens))
        assert [side.cached_tokens for side in pair.sides.values()] == [position + tokens] * 2


def test_a_session_that_encodes_gives_each_sequence_by_itself() -> None:
    pair = Pair([*w.encoding(), w.to_encode(), w.encoded(1, T - 1)])
    assert pair.sides[E].state is State.IDLE
    w.say_all(pair, (w.to_encode(micro_batch=7), w.encoded(1, T - 1, micro_batch=7), m.CloseSession()))


def test_a_context_of_the_first_blocks_gives_what_comes_out_of_them() -> None:
    """At the labels, as wide as the session says; several texts may be asked for between."""
    pair = Pair([*w.ENCODED_CONTEXT, w.decoding(0), c.labelled(hidden_states=f(L, w.ENCODED_WIDTH))])
    assert [side.cached_tokens for side in pair.sides.values()] == [T] * 2
    w.say_all(pair, (w.to_encode(micro_batch=1), w.encoded(1, T - 1, micro_batch=1)))
    w.refused_by_both(pair, w.decoding(4), "tokens from position 4 on, where only 3 are held")
    w.refused_by_both(pair, w.decoding(3), "a context of 6 tokens; this session has room for 5", m.ErrorCode.LIMIT)
    pair.say(w.decoding(2))


@pytest.mark.parametrize("begun", [c.embeddings(mode="evaluate"), w.decoding(0)], ids=["evaluate", "decode"])
def test_where_no_row_crosses_no_group_is_asked(begun: m.Embeddings) -> None:
    pair = Pair([*w.using(), w.changed(begun, crossing_positions=ints([]))])
    w.refused_by_both(pair, c.group_input(hidden_states=f(0, W)), "does not exist, or belongs to a killed")
    pair.say(c.labelled())
    assert pair.sides[E].state is State.IDLE


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
    """A random legal conversation; between any two of its messages, messages at random are tried."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.pair = Pair()

    def say(self, message: m.AnyMessage) -> None:
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
@settings(max_examples=40, deadline=None)
def test_random_messages_between_legal_ones_never_change_the_state(data: st.DataObject) -> None:
    Talk(data).run()
