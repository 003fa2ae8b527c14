"""What can be told without any text, label or adapter: sizes, times, and what crosses as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from dlora.protocol.frames import HEADER_BLOCK
from dlora.protocol.wire_codecs import CODECS

from .finding import Finding, found_by
from .observed import Observed, SeenFrame, SeenMicroBatch
from .scoring import share
from .truth import Truth


def tokens_from_size(nbytes: int, row_bytes: int) -> int:
    """Tokens of a micro-batch, from the size of its first frame alone, which TLS does not hide.

    ``docs/protocol.md``, Traffic: a block of header, then the rows of the tokens; the lengths and label positions that
    follow are mostly less than a row. ``row_bytes``: of one token's embedding.
    """
    return max(0, nbytes - HEADER_BLOCK) // row_bytes


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
    codec = CODECS[micro_batch.opening.codecs_of(micro_batch.begun.mode).embeddings]
    return tokens_from_size(micro_batch.frames[0].nbytes, codec.nbytes(1, seen.welcome.embedding_size))


def in_the_clear(seen: Observed) -> list[str]:
    """What crosses as it is, in words."""
    texts = sum(len(each.lengths) for each in seen.micro_batches)
    lasted_s = seen.frames[-1].time - seen.frames[0].time
    said = [f"{texts:,} texts in {len(seen.micro_batches):,} micro-batches, and when: over {lasted_s:.1f} s"]
    seconds = sorted(answer_seconds(seen.frames))
    if seconds:
        said.append(f"how fast the device computes: an answer took it {1e3 * median(seconds):.1f} ms (median)")
    if seen.scores:
        units = seen.scores[0].shape[0]
        said.append(f"{len(seen.scores):,} reports of {units:,} scores: which parts of the model the data changes most")
    if seen.states:
        said.append(f"A, and B of a bottleneck, of {len(seen.states):,} groups: they are the server's")
    return said
