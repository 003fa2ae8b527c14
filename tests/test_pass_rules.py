"""The order of a micro-batch in passes, as both sides hold it: what comes, in which pieces, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import conversations as c
import pytest
import session_ways as w
from conversations import Pair

from dlora.protocol import beginnings
from dlora.protocol import messages as m
from dlora.protocol import micro_batch as micro_batch_module
from dlora.protocol import passes as passes_module
from dlora.protocol.adapters import AdapterSpec, Crossing
from dlora.protocol.passes import MAX_PIECE_GROUPS, PIECE_BYTES, Passes, backward_waves, forward_waves, pieces
from dlora.protocol.states import Side, State
from dlora.protocol.wire_codecs import Codecs

E = Side.EDGE
RANK = 2
ROWS = c.TOKENS
BOTTLENECK = AdapterSpec(kind="bottleneck", r=RANK)
"""All groups' tensors have the same width."""


def opening() -> list[m.AnyMessage]:
    states = [each for group in c.ALL for each in (w.state_of(group), m.AdapterState(group=group, tensors=()))]
    return [*c.opening(adapter=BOTTLENECK), *states]


def rows_of(groups: Sequence[int]) -> Any:
    return c.floats(len(groups) * ROWS, RANK)


def reads(*groups: int) -> m.GroupInput:
    return c.group_input(groups=groups, hidden_states=rows_of(groups))


def writes(*groups: int) -> m.GroupDelta:
    return c.group_delta(groups=groups, deltas=(rows_of(groups),))


def gradients(number: int, *groups: int, answer: bool = False) -> m.GroupGrad:
    return c.group_grad(groups=groups, grads=(rows_of(groups),), answer=answer, backward_pass=number)


def answers(*groups: int) -> m.GroupInputGrad:
    return c.group_input_grad(groups=groups, grad_hidden_states=rows_of(groups))


BEGUN = c.embeddings(passes=Passes(2, 2))
FORWARD = [BEGUN, reads(0, 1, 2), writes(0, 1, 2), reads(1, 2), writes(1, 2)]
LOSS = [*FORWARD, c.labelled(gradients=5), c.grad_hidden_states()]
FIRST_BACKWARD = [gradients(0, 0), gradients(0, 2, 1, answer=True), answers(2, 1)]
LAST_BACKWARD = [gradients(1, 1, 0)]


def test_a_whole_micro_batch() -> None:
    pair = Pair(opening())
    before = pair.sides[E].round_trips
    w.say_all(pair, [*LOSS, *FIRST_BACKWARD, *LAST_BACKWARD])
    assert {session.state for session in pair.sides.values()} == {State.IDLE}
    assert pair.sides[E].round_trips - before == 5
    pair.say(c.report(0))


def test_pieces_of_any_size_are_the_same_micro_batch() -> None:
    pair = Pair(opening())
    before = pair.sides[E].round_trips
    w.say_all(pair, [
        BEGUN, reads(0, 1), reads(2), writes(0), writes(1, 2), reads(1), writes(1), reads(2), writes(2),
        c.labelled(gradients=5), c.grad_hidden_states(), gradients(0, 2, answer=True), answers(2),
        gradients(0, 1, answer=True), gradients(0, 0), answers(1), gradients(1, 1), gradients(1, 0),
    ])  # fmt: skip
    assert pair.sides[E].state is State.IDLE
    assert pair.sides[E].round_trips - before == 5


@pytest.mark.parametrize(
    ("said", "message", "text"),
    [
        ([BEGUN], reads(1), "group 1 out of turn"),
        ([BEGUN], reads(0, 2), "group 0 out of turn"),
        ([BEGUN], reads(0, 0), "group 0 out of turn"),
        ([BEGUN], reads(3), "group 3 does not exist"),
        ([BEGUN], writes(0), "when none was asked"),
        ([BEGUN], c.labelled(gradients=5), "only 0 of 5 groups"),
        ([BEGUN, reads(0, 1)], writes(1), "when group 0 was asked"),
        ([BEGUN, reads(0, 1)], writes(0, 1, 2), "when group 0 was asked"),
        (FORWARD[:3], reads(0), "group 0 out of turn"),
        ([*FORWARD[:2], writes(0, 1)], reads(1, 2), "before the groups that were asked have written"),
        (FORWARD[:3], c.labelled(gradients=5), "only 3 of 5 groups"),
        (FORWARD, reads(1), "group 1 out of turn"),
        (FORWARD, c.labelled(gradients=2), "2 gradients for 3 active groups"),
        (FORWARD, c.labelled(gradients=7), "more gradients than groups took part"),
        (LOSS, gradients(1, 2), "backward pass 1 in backward pass 0"),
        (LOSS, gradients(0, 2, 2), "more gradients than were announced"),
        ([*LOSS, gradients(0, 2, 1, answer=True)], gradients(1, 1), "another backward pass before group 1"),
        ([*LOSS, gradients(0, 2, 1, answer=True), answers(2, 1)], gradients(1, 1), "without the gradients of group 0"),
        ([*LOSS, gradients(0, 2, 1, answer=True)], answers(0), "nobody asked for"),
        ([*LOSS, gradients(0, 2, 1, answer=True)], answers(2, 2), "nobody asked for"),
        ([*LOSS, *FIRST_BACKWARD], gradients(1, 1, answer=True), "an input gradient in the last backward pass"),
        ([*LOSS, *FIRST_BACKWARD], gradients(1, 2, 1), "without the gradients of group 0"),
        ([*LOSS, *FIRST_BACKWARD], gradients(0, 1), "did not take part, or again"),
        ([*LOSS, *FIRST_BACKWARD], gradients(2, 1), "backward pass 2 in backward pass 0"),
        ([*LOSS, *FIRST_BACKWARD, gradients(1, 1)], gradients(1, 1), "did not take part, or again"),
    ],
)
def test_what_is_out_of_order_is_refused(said: list[m.AnyMessage], message: m.AnyMessage, text: str) -> None:
    w.refused_by_both(Pair([*opening(), *said]), message, text)


def test_groups_of_other_widths_are_not_of_one_message() -> None:
    pair = Pair([*c.opening(), BEGUN])
    w.refused_by_both(pair, c.group_input(groups=(0, 1), hidden_states=c.floats(2 * ROWS, 4)), "of other widths")


def test_one_pass_back_gets_no_answers() -> None:
    pair = Pair([*opening(), c.embeddings(passes=Passes(1, 1)), reads(0, 1, 2), writes(0, 1, 2)])
    pair.say(c.labelled(gradients=3))
    pair.say(c.grad_hidden_states())
    w.refused_by_both(pair, gradients(0, 2, answer=True), "an input gradient in the last backward pass")
    pair.say(gradients(0, 2, 1, 0))
    assert pair.sides[E].state is State.IDLE


@pytest.mark.parametrize("mode", ["basis", "encode"])
def test_passes_are_for_training_and_evaluation(mode: str) -> None:
    setting_up = mode == "basis"
    way = c.opening(adapter=BOTTLENECK) if setting_up else w.encoding()
    more = {} if setting_up else {"label_positions": w.ints([])}
    w.refused_by_both(Pair(way), c.embeddings(mode=mode, passes=Passes(1, 1), **more), f"passes in the mode {mode}")


def test_waves() -> None:
    assert forward_waves([0, 3, 5], None) == [(0,), (3,), (5,)]
    assert forward_waves([0, 3, 5], Passes(1, 1)) == [(0, 3, 5)]
    assert forward_waves([0, 3, 5], Passes(3, 1)) == [(0, 3, 5), (3, 5), (3, 5)]
    assert forward_waves([4], Passes(3, 1)) == [(4,)]
    assert forward_waves([], Passes(3, 1)) == []
    assert backward_waves([0, 3, 5], {0, 3, 5}, [3, 5], Passes(1, 1)) == [[5, 3, 0]]
    assert backward_waves([0, 3, 5], {0, 3, 5}, [3, 5], Passes(1, 2)) == [[5, 3, 0], [3, 0]]
    # A group that is not trained passes gradients on.
    assert backward_waves([0, 3, 5], {0, 5}, [3, 5], Passes(1, 3)) == [[5, 3, 0], [3, 0], [0]]
    assert backward_waves([0, 3, 5], {5}, [], Passes(1, 3)) == [[5]]


def test_pieces_are_of_equal_widths_and_no_larger_than_a_frame_needs() -> None:
    narrow, wide = Crossing(1, (1,)), Crossing(1, (1, 2))
    assert pieces([0, 1, 2, 3], [narrow, narrow, wide, narrow], 1) == [(0, 1), (2,), (3,)]
    assert list(map(len, pieces(range(70), [narrow] * 70, 1))) == [MAX_PIECE_GROUPS, MAX_PIECE_GROUPS, 6]
    rows = PIECE_BYTES // (4 * narrow.width) // 2
    assert list(map(len, pieces(range(5), [narrow] * 5, rows))) == [2, 2, 1]
    assert list(map(len, pieces(range(2), [narrow] * 2, 4 * rows))) == [1, 1]


def test_live_a_message_is_of_one_group() -> None:
    gradients_of_two = [*opening(), c.embeddings()]
    for group in c.ALL:
        gradients_of_two += [reads(group), writes(group)]
    pair = Pair([*gradients_of_two, c.labelled(gradients=3), c.grad_hidden_states()])
    w.refused_by_both(pair, gradients(0, 2, 1, answer=True), "several groups at once")
    w.say_all(pair, [gradients(0, 2, answer=True), gradients(0, 1, answer=True)])
    w.refused_by_both(pair, answers(2, 1), "several groups at once")


def test_a_later_pass_goes_on_with_what_the_one_before_had() -> None:
    begun = c.embeddings(passes=Passes(1, 3))
    start = [*opening(), begun, reads(0, 1, 2), writes(0, 1, 2), c.labelled(gradients=8), c.grad_hidden_states()]
    first = [gradients(0, 2, answer=True), gradients(0, 1, 0), answers(2)]
    w.refused_by_both(Pair([*start, *first]), gradients(1, 1, 0, answer=True), "group 0 is asked back")
    without = [gradients(0, 2, 1, answer=True), gradients(0, 0), answers(2, 1), gradients(1, 1, answer=True)]
    pair = Pair([*start, *without, gradients(1, 0), answers(1)])
    w.refused_by_both(pair, gradients(2, 2), "group 2, which had none in the pass before")


KEPT = c.embeddings(passes=Passes(2, 2), kept_reads=bytes(16))
EARLY = [KEPT, writes(0, 1), writes(2)]


def test_what_comes_early_saves_a_round_trip_where_c_goes_on() -> None:
    pair = Pair(opening())
    before = pair.sides[E].round_trips
    w.say_all(pair, [*EARLY, reads(1, 2), writes(1, 2), *LOSS[-2:], *FIRST_BACKWARD, *LAST_BACKWARD])
    assert {session.state for session in pair.sides.values()} == {State.IDLE}
    assert pair.sides[E].round_trips - before == 4


def test_what_comes_early_is_forgotten_where_c_asks_all_the_same() -> None:
    pair = Pair(opening())
    before = pair.sides[E].round_trips
    w.say_all(pair, [*EARLY, *LOSS[1:], *FIRST_BACKWARD, *LAST_BACKWARD])
    assert {session.state for session in pair.sides.values()} == {State.IDLE}
    assert pair.sides[E].round_trips - before == 5


def test_with_one_pass_c_goes_on_with_hidden_states() -> None:
    early = [c.embeddings(passes=Passes(1, 1), kept_reads=bytes(16)), *EARLY[1:]]
    pair = Pair([*opening(), *early])
    w.say_all(pair, [c.labelled(gradients=3), c.grad_hidden_states(), gradients(0, 2, 1, 0)])
    assert pair.sides[E].state is State.IDLE


@pytest.mark.parametrize(
    ("said", "message", "text"),
    [
        ([KEPT], reads(0, 1, 2), "only 0 of 3 groups have written early"),
        (EARLY[:2], reads(1, 2), "only 2 of 3 groups have written early"),
        (EARLY[:2], c.labelled(gradients=5), "only 2 of 3 groups have written early"),
        ([KEPT], writes(1), "group 1 early, when group 0 comes next"),
        (EARLY[:2], writes(1, 2), "group 1 early, when group 2 comes next"),
        (EARLY, writes(0), "when none was asked"),
        (EARLY, reads(2), "group 2 out of turn"),
        (EARLY, c.labelled(gradients=5), "only 3 of 5 groups"),
        ([*EARLY, reads(0, 1, 2)], writes(1), "when group 0 was asked"),
        ([*EARLY, reads(0, 1, 2)], c.labelled(gradients=5), "only 0 of 5 groups"),
        ([*EARLY, reads(0, 1, 2)], reads(1, 2), "before the groups that were asked have written"),
        ([*EARLY, reads(1, 2), writes(1, 2)], reads(0), "group 0 out of turn"),
    ],
)
def test_what_is_out_of_order_with_kept_reads_is_refused(
    said: list[m.AnyMessage], message: m.AnyMessage, text: str
) -> None:
    w.refused_by_both(Pair([*opening(), *said]), message, text)


def test_no_more_comes_early_than_c_takes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch_module, "MOST_PIECES", 2)
    w.refused_by_both(Pair([*opening(), KEPT, writes(0), writes(1)]), writes(2), "more than 2 messages early")
    for module in (passes_module, beginnings):
        monkeypatch.setattr(module, "MOST_PIECES", 2)
    w.say_all(Pair(opening()), [KEPT])
    monkeypatch.setattr(passes_module, "PIECE_BYTES", 1)  # three groups in three pieces
    w.refused_by_both(Pair(opening()), KEPT, "takes more than 2 messages")


@pytest.mark.parametrize(
    ("codecs", "more"),
    [
        ("fp32", {}),
        ("fp32", {"passes": Passes(1, 1), "mode": "evaluate"}),
        ("fp32,group_input=fp16", {"passes": Passes(1, 1)}),
    ],
)
def test_kept_reads_are_of_training_in_passes_row_by_row(codecs: str, more: dict[str, Any]) -> None:
    way = c.opening(adapter=BOTTLENECK, codecs=Codecs.parse(codecs))
    states = opening()[len(way) :]
    w.refused_by_both(Pair([*way, *states]), c.embeddings(kept_reads=bytes(16), **more), "kept reads that are not of")
