"""What can be told without any text, label or adapter: sizes, times, and what crosses as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from dlora.protocol.adapters import crossings
from dlora.protocol.frames import HEADER_BLOCK
from dlora.protocol.wire_codecs import CODECS

from .finding import Finding, found_by
from .observed import Observed, SeenFrame, SeenMicroBatch, whole_texts
from .scoring import share
from .truth import Truth


def rows_from_size(nbytes: int, row_bytes: int, positions: int = 0) -> int:
    """Rows of a frame's first tensor, from the frame's size alone, which TLS does not hide.

    ``docs/reference/protocol.md``, Traffic: a block of header, then the rows; what follows is 4 bytes for each
    position, and mostly less than a row.
    """
    return max(0, nbytes - HEADER_BLOCK - 4 * positions) // row_bytes


def answer_seconds(frames: Sequence[SeenFrame]) -> Iterator[float]:
    """How long the device took for each answer: from a frame of the server's to the next of the device's."""
    for before, after in pairwise(frames):
        if after.up and not before.up:
            yield after.time - before.time


def audit_lengths(seen: Observed, truth: Truth) -> Finding:
    """How long texts are."""
    wanted = [int(length) for each in truth.micro_batches for length in each.lengths]
    as_they_are = [length for each in seen.micro_batches for length in each.lengths]
    right = sum(a == b for a, b in zip(as_they_are, wanted, strict=True))
    attacks = [share("sequence lengths as they are", right, len(wanted), len(wanted), "texts")]
    sized = [each for each in seen.micro_batches if each.begun.hidden_states is not None]
    if sized:
        right = sum(_sized_tokens(seen, each) == each.begun.tokens for each in sized)
        attacks.append(share("sizes of frames, also under TLS", right, len(sized), len(sized), "micro-batches"))
    why = "lengths cross as they are, and the size of a frame is a formula of them"
    return found_by("lengths of texts", attacks, why)


def _sized_tokens(seen: Observed, micro_batch: SeenMicroBatch) -> int:
    """Tokens of a micro-batch: of its first frame what is left without the positions, whose numbers other frames tell.

    Which frame is which, is known from their order. The recipe and the wire's dtypes are taken for known.
    """
    codecs, sizes = micro_batch.opening.codecs_of(micro_batch.begun.mode), [each.nbytes for each in micro_batch.frames]
    groups, positions = micro_batch.opening.groups, 0
    live = sorted(micro_batch.inputs)
    if micro_batch.last_hidden is not None and len(sizes) > 1 + 2 * len(live):
        row = CODECS[codecs.last_hidden_states].nbytes(1, seen.welcome.hidden_size)
        positions += rows_from_size(sizes[1 + 2 * len(live)], row)
    if micro_batch.begun.crossing_positions is not None and live:
        width = crossings(micro_batch.opening.adapter, [groups[live[0]]])[0].input_width
        positions += rows_from_size(sizes[1], CODECS[codecs.group_input].nbytes(1, width))
    row = CODECS[codecs.embeddings].nbytes(1, seen.welcome.embedding_size)
    return rows_from_size(sizes[0], row, positions)


def in_the_clear(seen: Observed) -> list[str]:
    """What crosses as it is, in words."""
    texts = len(whole_texts([[0] * each.begun.tokens for each in seen.micro_batches], seen.micro_batches))
    lasted_s = seen.frames[-1].time - seen.frames[0].time
    what = "1 text" if texts == 1 else f"{texts:,} texts"
    said = [f"{what} in {len(seen.micro_batches):,} micro-batches, and when: over {lasted_s:.1f} s"]
    first = seen.micro_batches[0].begun
    if first.mode == "decode":
        said.append(f"how long the prompt is: the first frame has {first.tokens:,} tokens, and the answer follows")
    seconds = sorted(answer_seconds(seen.frames))
    if seconds:
        said.append(f"how fast the device computes: an answer took it {1e3 * median(seconds):.1f} ms (median)")
    if seen.scores:
        units = seen.scores[0].shape[0]
        said.append(f"{len(seen.scores):,} reports of {units:,} scores: which parts of the model the data changes most")
    if seen.states:
        said.append(f"A, and B of a bottleneck, of {len(seen.states):,} groups: they are the server's")
    return said
