"""What a step costs on the wire, exactly: the formula of docs/protocol.md, section Traffic.

Counted are whole frames. The websocket adds 2 to 10 bytes a frame, and 4 more for those that the device sends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from .choices import WireDtype
from .codec import frame_bytes
from .groups import GroupSpec
from .tensors import DTYPES


class Traffic(msgspec.Struct, frozen=True):
    """Bytes that the device sends (up) and receives (down), and the round trips it waits for."""

    bytes_up: int
    bytes_down: int
    round_trips: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
            self.round_trips + other.round_trips,
        )


def micro_batch_traffic(
    groups: Sequence[GroupSpec],
    *,
    live: Collection[int],
    graded: Collection[int],
    answered: Collection[int],
    tokens: int,
    sequences: int,
    labelled: int,
    embedding_size: int,
    hidden_size: int,
    wire_dtype: WireDtype,
) -> Traffic:
    """The traffic of one micro-batch.

    Args:
        groups: all exchange groups of the session.
        live: those that exchange in the forward pass.
        graded: those whose delta gradients the device gets; empty when evaluating.
        answered: those of ``graded`` whose input gradient goes back. Where groups follow one another: all
            but the lowest.
    """
    item = DTYPES[wire_dtype].itemsize
    up = frame_bytes(1, [tokens * embedding_size * item, sequences * 4, labelled * 4])
    down = frame_bytes(1, [labelled * hidden_size * item])
    for index in live:
        group = groups[index]
        outputs = [tokens * target.out_features * item for target in group.targets]
        down += frame_bytes(1, [tokens * group.in_features * item])
        up += frame_bytes(1, outputs)
        if index in graded:
            down += frame_bytes(1, outputs)
        if index in answered:
            up += frame_bytes(1, [tokens * group.in_features * item])
    if graded:
        up += frame_bytes(1, [labelled * hidden_size * item])
    # One for the embeddings, one for each answer that something follows, one for the loss's gradient.
    round_trips = 1 + len(live) + (1 + len(answered) if graded else 0)
    return Traffic(up, down, round_trips)


def report_traffic(units: int, ticket_bytes: int) -> Traffic:
    """The traffic of a step's report and its signal. No round trip: the next step's first covers it."""
    return Traffic(frame_bytes(1, [units * 4]), frame_bytes(1, [units, ticket_bytes]), 0)
