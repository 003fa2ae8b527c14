"""Guesses of the server in a conversation, as both sides hold it: how they come, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import conversations as c
import pytest
import session_ways as w
from conversations import Pair

from dlora.protocol import messages as m
from dlora.protocol.states import Side, State

PROMPT = [w.begun(0, 3, drafts=2), w.drafts(5, 6), *w.in_passes(5), w.last(3)]
AHEAD = w.WAYS[State.AHEAD]
WENT_ON = [*AHEAD, w.drafts(5), w.reads(2, *c.ALL)]


def test_guesses_are_taken_in_after_the_last_token() -> None:
    pair = Pair([*w.answering(), *PROMPT])
    assert [side.cached_tokens for side in pair.sides.values()] == [5, 5]
    assert (
        pair.sides[Side.EDGE].round_trips
        == Pair([*w.answering(), w.begun(0, 3), *w.in_passes(3), w.last(1)]).sides[Side.EDGE].round_trips
    )


def test_what_comes_ahead_is_gone_on_with() -> None:
    pair = Pair(WENT_ON)
    assert [(side.cached_tokens, side.tokens_ahead) for side in pair.sides.values()] == [(3, 2)] * 2
    before = pair.sides[Side.EDGE].round_trips
    ahead = w.begun(3, 2, is_ahead=True, micro_batch=1, label_positions=w.ints([0, 1]))
    rest = w.in_passes(2, micro_batch=1)[1:]
    w.say_all(pair, [ahead, *rest, w.last(2, micro_batch=1)])
    assert pair.sides[Side.EDGE].round_trips == before + 2
    assert [side.cached_tokens for side in pair.sides.values()] == [5, 5]


def test_the_device_need_not_wait_for_what_comes_ahead() -> None:
    """It takes what is still under way, and the server has sent all of it before it reads on."""
    edge, cloud = (Pair(AHEAD).sides[side] for side in (Side.EDGE, Side.CLOUD))
    frames = [cloud.send(each) for each in (w.drafts(5), w.reads(2, *c.ALL))]
    other = edge.send(w.begun(3, micro_batch=1))
    for frame in frames:
        edge.receive(frame)
    cloud.receive(other)
    assert edge.tokens_ahead == 0
    edge.receive(cloud.send(w.reads(1, *c.ALL, micro_batch=1)))
    assert [each.state for each in (edge, cloud)] == [State.FORWARD] * 2


def test_a_session_may_be_closed_while_something_comes_ahead() -> None:
    edge = Pair(AHEAD).sides[Side.EDGE]
    assert edge.may_close
    edge.send(m.CloseSession())


def ahead_of(tokens: int, **changes: int) -> m.Embeddings:
    return w.begun(3, tokens, is_ahead=True, micro_batch=1, **changes)


REFUSED: list[tuple[Sequence[m.AnyMessage], m.AnyMessage, str]] = [
    (w.answering(), w.begun(0, passes=None), "other passes than the session's"),
    (w.answering(passes=None), w.begun(0), "other passes than the session's"),
    (w.answering(drafts=None), w.begun(0, drafts=1), "in a session that asks for none"),
    (w.answering(drafts=None), w.begun(0, ahead=0), "in a session that asks for none"),
    (w.answering(), w.begun(0, 3, drafts=2, label_positions=w.ints([0])), "whose last hidden state is not asked for"),
    (w.answering(), w.begun(0, 3, crossing_positions=w.ints([0, 2])), "not from some token on"),
    ([*w.answering(), w.begun(0)], w.drafts(5), "at most 0 were asked for"),
    ([*c.opening(), c.embeddings()], w.drafts(5), "at most 0 were asked for"),  # of a micro-batch that trains
    ([*w.answering(), w.begun(0, drafts=2)], w.drafts(5, 6, 7), "at most 2 were asked for"),
    ([*w.answering(), w.begun(0, drafts=2)], w.drafts(-1), "below 0"),
    ([*w.answering(), w.begun(0, drafts=2), w.drafts(5)], w.drafts(6), "too late"),
    ([*w.answering(), w.begun(0, drafts=2), w.reads(1, *c.ALL)], w.drafts(6), "too late"),
    ([*w.answering(), w.begun(0, drafts=2), w.drafts(5)], w.reads(1, *c.ALL), "was due"),
    ([*w.answering(), w.begun(0, 3), *w.in_passes(3)], w.last(1, 9), "that E has not asked for"),
    (AHEAD, w.reads(1, *c.ALL), "before the guessed tokens"),
    (AHEAD, w.drafts(5, 6, 7), "at most 2 were asked for"),
    ([*AHEAD, w.drafts(5)], w.reads(2, 1), "out of turn"),
    ([*AHEAD, w.drafts(5)], w.reads(1, *c.ALL), "was due"),
    (WENT_ON, ahead_of(1), "that C has not gone on with"),
    (WENT_ON, ahead_of(2, drafts=1), "that C has not gone on with"),
    ([*WENT_ON, w.begun(3, micro_batch=1), *w.in_passes(1, micro_batch=1), w.last(1, micro_batch=1)],
     w.begun(4, 2, is_ahead=True, micro_batch=2), "that C has not gone on with"),
    (WENT_ON, m.GroupDelta(step=0, micro_batch=0, groups=(0,), deltas=(c.floats(2, w.BOTTLENECK.r),)), "not now"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "message", "text"), REFUSED, ids=lambda each: each if isinstance(each, str) else "")
def test_refused_by_both(way: Sequence[m.AnyMessage], message: m.AnyMessage, text: str) -> None:
    w.refused_by_both(Pair(way), message, text)


@pytest.mark.parametrize("asked", [{"drafts": 16}, {"drafts": 8, "ahead": 8}], ids=["drafts", "ahead"])
def test_guesses_need_room(asked: dict[str, int]) -> None:
    pair = Pair(w.answering(context_length=16))
    w.refused_by_both(pair, w.begun(0, **asked), "this session has room for 16", m.ErrorCode.LIMIT)
