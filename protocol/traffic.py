"""What a step costs on the wire, exactly: the formula of docs/reference/protocol.md, section Traffic.

Counted are whole frames. The websocket adds 2 to 10 bytes a frame, and 4 more for those that the device sends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from .adapters import Crossing
from .choices import Send
from .frames import HEADER_BLOCK, PREFIX_BYTES, frame_bytes
from .passes import Passes, backward_waves, forward_waves, pieces
from .wire_codecs import Codecs, TensorRole

_ENCODED_HEADER: Final = PREFIX_BYTES + 70  # of EncodedHiddenStates, without its tensors: names and numbers


class Traffic(msgspec.Struct, frozen=True):
    """Bytes that the device sends (up) and receives (down), and the round trips it waits for."""

    bytes_up: int
    bytes_down: int
    round_trips: int

    def __add__(self, other: Traffic) -> Traffic:
        up, down = self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down
        return Traffic(up, down, self.round_trips + other.round_trips)


def text_bytes(tokens: int, embedding_size: int, codecs: Codecs, send: Send) -> int:
    """What a text's ``tokens`` cost upwards, without their frame: as embeddings or as token ids."""
    return 4 * tokens if send == "token-ids" else codecs.of(TensorRole.EMBEDDINGS).nbytes(tokens, embedding_size)


def encode_traffic(lengths: Sequence[int], *, width: int, embedding_size: int, codecs: Codecs, send: Send) -> Traffic:
    """The traffic of one micro-batch of the mode ``encode``, of sequences of these lengths, in tokens; ``width``:
    of what comes out of the blocks that are run."""
    up = _embeddings_bytes(text_bytes(sum(lengths), embedding_size, codecs, send), [4 * len(lengths), 0], send)
    codec = codecs.of(TensorRole.LAST_HIDDEN_STATES)
    header = msgspec.msgpack.encode([(codec.dtype, (length, width), -1) for length in lengths])
    blocks = -(-(_ENCODED_HEADER + len(header)) // HEADER_BLOCK)
    down = frame_bytes(blocks, [codec.nbytes(length, width) for length in lengths])
    return Traffic(up, down, 1)


def micro_batch_traffic(
    crossings: Sequence[Crossing] = (),
    *,
    live: Collection[int] = (),
    with_grads: Collection[int] = (),
    answered: Collection[int] = (),
    is_basis: bool = False,
    tokens: int,
    sequences: int,
    labelled: int,
    embedding_size: int,
    hidden_size: int,
    codecs: Codecs,
    rows: int | None = None,
    send: Send = "embeddings",
    passes: Passes | None = None,
    reads_kept: bool = False,
) -> Traffic:
    """The traffic of one micro-batch.

    Args:
        crossings: what crosses for each exchange group of the session, as ``adapters.crossings`` gives it.
        live: groups that exchange in the forward pass.
        with_grads: those whose delta gradients the device gets; empty when evaluating.
        answered: those of ``with_grads`` whose input gradient goes back. Where groups follow one another: all
            but the lowest.
        is_basis: whether it is of the mode ``basis``: no group exchanges, and the loss's gradient goes back.
        rows: tokens that cross at each group; None: all, and E sends no positions.
        passes: None where each group is asked by itself.
        reads_kept: in passes, whether E has kept what groups read in the base pass, and C reads the same.
        send: what E begins with.
    """

    def nbytes(role: TensorRole, rows: int, width: int) -> int:
        return codecs.of(role).nbytes(rows, width)

    counted = [4 * sequences, 4 * labelled, *([] if rows is None else [4 * rows])]
    up = _embeddings_bytes(text_bytes(tokens, embedding_size, codecs, send), counted, send)
    rows = tokens if rows is None else rows
    down = frame_bytes(1, [nbytes(TensorRole.LAST_HIDDEN_STATES, labelled, hidden_size)])
    if passes is not None:
        exchanged = _passes_traffic(crossings, passes, live, with_grads, answered, rows, codecs, reads_kept=reads_kept)
        up, down, round_trips = up + exchanged.bytes_up, down + exchanged.bytes_down, exchanged.round_trips
    else:
        for index in live:
            width, outputs = crossings[index].input_width, crossings[index].output_widths
            down += frame_bytes(1, [nbytes(TensorRole.GROUP_INPUT, rows, width)])
            up += frame_bytes(1, [nbytes(TensorRole.DELTA, rows, output) for output in outputs])
            if index in with_grads:
                down += frame_bytes(1, [nbytes(TensorRole.DELTA_GRAD, rows, output) for output in outputs])
            if index in answered:
                up += frame_bytes(1, [nbytes(TensorRole.INPUT_GRAD, rows, width)])
        # One for the embeddings, one for each answer that something follows, one for the loss's gradient.
        round_trips = 1 + len(live) + (1 + len(answered) if with_grads else 0)
    if with_grads or is_basis:
        up += frame_bytes(1, [nbytes(TensorRole.LAST_HIDDEN_STATES_GRAD, labelled, hidden_size)])
    return Traffic(up, down, round_trips)


def _passes_traffic(
    crossings: Sequence[Crossing],
    passes: Passes,
    live: Collection[int],
    trained: Collection[int],
    reading: Collection[int],
    rows: int,
    codecs: Codecs,
    *,
    reads_kept: bool,
) -> Traffic:
    """Of all that groups exchange."""
    up = down = 0

    def nbytes(piece: Sequence[int], role: TensorRole, number: int, widths: Sequence[int]) -> int:
        codec = codecs.of(TensorRole.DIFFERENCE if number else role)
        return frame_bytes(1, [codec.nbytes(len(piece) * rows, width) for width in widths])

    forward = forward_waves(list(live), passes)
    for number, wave in enumerate(forward):
        for piece in pieces(wave, crossings, rows):
            crossing = crossings[piece[0]]
            if number or not reads_kept:
                down += nbytes(piece, TensorRole.GROUP_INPUT, number, [crossing.input_width])
            up += nbytes(piece, TensorRole.DELTA, number, crossing.output_widths)
    backward = backward_waves(list(live), trained, reading, passes) if trained else []
    for number, groups in enumerate(backward):
        answered = [group for group in groups if group in reading and number < len(backward) - 1]
        for chosen in ([group for group in groups if group not in answered], answered):
            for piece in pieces(chosen, crossings, rows):
                crossing = crossings[piece[0]]
                down += nbytes(piece, TensorRole.DELTA_GRAD, number, crossing.output_widths)
                if chosen is answered:
                    up += nbytes(piece, TensorRole.INPUT_GRAD, number, [crossing.input_width])
    return Traffic(up, down, 1 + len(forward) + len(backward) - (reads_kept and bool(forward)))


def adapter_state_traffic(state_nbytes: Sequence[Sequence[int]], *, made: bool) -> Traffic:
    """The traffic of setting up what the server keeps of each group, whose tensors have these sizes: it is ``made``
    there, or given back by the device."""
    groups = len(state_nbytes)
    with_state = sum(frame_bytes(1, list(sizes)) for sizes in state_nbytes)
    without = groups * frame_bytes(1, [])
    return Traffic(without, with_state, groups) if made else Traffic(with_state, without, groups)


def report_traffic(units: int, ticket_bytes: int) -> Traffic:
    """The traffic of a step's report and its signal. No round trip: the next step's first covers it."""
    return Traffic(frame_bytes(1, [units * 4]), frame_bytes(1, [units, ticket_bytes]), 0)


def _embeddings_bytes(text: int, others: list[int], send: Send) -> int:
    """A frame of ``Embeddings``, of its tensors' sizes: embeddings come first in it, and token ids last."""
    return frame_bytes(1, [*others, text] if send == "token-ids" else [text, *others])
