"""Exactly once and in order: a model of two sides, and connections that lose, repeat and damage what they carry."""

from __future__ import annotations

import conversations as c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.frames import Prefix, encode, read_prefix
from dlora.protocol.link import MAX_UNACKNOWLEDGED, REMEMBERED_FRAMES, Link


class Side:
    """One end, and the payloads that came out of it."""

    def __init__(self) -> None:
        self.link = Link()
        self.delivered: list[int] = []

    def send(self, step: int) -> bytearray:
        frame = encode(c.report(step), seq=self.link.sent + 1, ack=self.link.received)
        self.link.keep(frame)
        return frame

    def receive(self, frame: bytearray) -> bool:
        prefix = read_prefix(frame)
        if self.link.is_repeat(prefix):
            return False
        self.link.accept(prefix)
        self.delivered.append(prefix.seq)
        return True


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_each_frame_arrives_once_over_lossy_connections(data: st.DataObject) -> None:
    """Two sides talk; a frame is lost with the connection, or comes twice; then both resume."""
    here, there = Side(), Side()
    for step in range(data.draw(st.integers(1, 25))):
        speaker, listener = (here, there) if data.draw(st.booleans()) else (there, here)
        if len(speaker.link._outbox) == MAX_UNACKNOWLEDGED:  # its peer has to say something first
            speaker, listener = listener, speaker
        frame = speaker.send(step)
        fate = data.draw(st.sampled_from(["arrives", "twice", "lost"]))
        if fate != "lost":
            listener.receive(frame)
        if fate == "twice":
            assert not listener.receive(frame)
        if fate == "lost":
            lacks = [(there, here), (here, there)]
            for receiver, sender in lacks:
                for again in sender.link.missing(receiver.link.received):
                    receiver.receive(again)
    for side, peer in ((here, there), (there, here)):
        assert side.delivered == list(range(1, peer.link.sent + 1))


def test_outbox_holds_unacknowledged_frames() -> None:
    here, there = Side(), Side()
    frames = [here.send(step) for step in range(3)]
    assert here.link.missing(0) == frames
    there.receive(frames[0])
    there.receive(frames[1])
    here.receive(there.send(0))
    assert here.link.missing(2) == frames[2:]
    assert here.link.missing(3) == []
    with pytest.raises(RemoteProtocolError, match="a peer that has 1 frames"):
        here.link.missing(1)  # it acknowledged two
    with pytest.raises(RemoteProtocolError, match="a peer that has 4 frames"):
        here.link.missing(4)  # three were sent
    there.receive(frames[2])
    here.receive(there.send(1))
    with pytest.raises(RemoteProtocolError, match="a peer that has 0 frames, of 3"):
        here.link.missing(0)  # all are acknowledged, and none is kept


def test_a_peer_that_never_acknowledges_is_not_given_more_memory() -> None:
    here = Side()
    for step in range(MAX_UNACKNOWLEDGED):
        here.send(step)
    with pytest.raises(RemoteProtocolError, match="acknowledged none"):
        here.send(0)


def test_a_repeat_of_other_content_or_from_too_long_ago_is_refused() -> None:
    there = Side()
    there.receive(encode(c.report(1), seq=1))
    assert not there.receive(encode(c.report(1), seq=1))
    with pytest.raises(RemoteProtocolError, match="other content"):
        there.receive(encode(c.report(0), seq=1))
    for seq in range(2, REMEMBERED_FRAMES + 2):
        there.receive(encode(c.report(seq), seq=seq))
    assert not there.receive(encode(c.report(2), seq=2))
    with pytest.raises(RemoteProtocolError):
        there.receive(encode(c.report(1), seq=1))


@pytest.mark.parametrize(
    ("prefix", "text"),
    [(Prefix(0, 2, 0, 7), "1 comes next"), (Prefix(0, 1, 1, 7), "never sent"), (Prefix(0, 0, 0, 7), "other content")],
)
def test_impossible_frame_numbers_are_refused(prefix: Prefix, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        Side().link.is_repeat(prefix)
