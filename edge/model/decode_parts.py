"""A text as micro-batches of the mode ``decode``: the tokens that go on from those that a server holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.protocol import messages as m
from dlora.protocol.errors import DataError

from .ends import LongArray
from .extension import Guesses


def check_room(ids: LongArray, limit: int) -> None:
    """Raise ``DataError`` for a text that is longer than there is room for."""
    if len(ids) > limit:
        raise DataError(f"the text has {len(ids)} tokens, there is room for {limit}; begin anew")


def decode_parts(
    ids: LongArray, position: int, *, wanted_from: int, count: int, most: int, acts_from: int = 0
) -> Iterator[MicroBatch]:
    """The tokens of a text from ``position`` on, as micro-batches of the mode ``decode``.

    Args:
        wanted_from: labels are the tokens from this one on, and the last of each micro-batch.
        count: the last has at least so many; most: tokens of a micro-batch.
        acts_from: the row from which on adapters act.
    """
    most = max(1, most - count)  # the last may have these more
    ends = [*range(position + most, len(ids) - count + 1, most), len(ids)]
    for start, end in zip([position, *ends[:-1]], ends, strict=True):
        yield part_of(ids, start, end, min(max(wanted_from, start), end - 1), acts_from)


def fitting(guesses: Guesses, opening: m.OpenSession, welcome: m.Welcome, length: int, tokens: int) -> Guesses:
    """As much of ``guesses`` as there is room for in a context of ``length`` tokens, the last ``tokens`` of which are
    sent now, and as the session has asked for."""
    purpose = opening.purpose
    if isinstance(purpose, m.Train) or purpose.drafts is None:
        return Guesses()
    room = min(purpose.context_length - length, welcome.max_tokens - tokens)
    drafts = max(0, min(guesses.drafts, m.MAX_DRAFT, room))
    left = room - drafts - 1
    if guesses.ahead is None or left < 0 or not isinstance(purpose, m.Use) or purpose.passes is None:
        return Guesses(drafts)
    return Guesses(drafts, min(guesses.ahead, m.MAX_DRAFT, left))


def part_of(ids: LongArray, start: int, end: int, wanted_from: int, acts_from: int) -> MicroBatch:
    """The tokens from ``start`` to before ``end``, labels from ``wanted_from`` on."""
    length = end - start
    crossing = None if acts_from <= start else np.arange(min(acts_from - start, length), length, dtype=np.int32)
    return MicroBatch(
        ids=ids[start:end],
        sequence_lengths=np.array([length], np.int32),
        label_positions=np.arange(wanted_from - start, length, dtype=np.int32),
        labels=np.zeros(end - wanted_from, np.int64),
        crossing_positions=crossing,
    )
