"""Which groups are asked together in a micro-batch, and how often.

*Live*, each group is asked by itself: what it reads has in it what the ones before have written. In *passes* all groups
read at once and write at once: what a group reads comes from the pass before the one that it writes into. The first
pass is the base model alone. Backward likewise: what a group answers to its gradient goes into the next backward pass
over the same graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Final

import msgspec
import numpy as np

from .adapters import Crossing
from .tensors import WireTensor

MAX_PASSES: Final = 4
PIECE_BYTES: Final = 1 << 20
"""What is sent of several groups goes in pieces of about so much: a frame has a limit, and while one is on its way the
next is computed."""
MAX_PIECE_GROUPS: Final = 32  # whose numbers fit into a header of one block
MOST_PIECES: Final = 3
"""That are sent before an answer is waited for: a websocket takes so many frames in while nobody reads them."""
READS_DIGEST_BYTES: Final = 16

PassCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_PASSES)]
Waves = list[tuple[int, ...]]
"""Groups that are asked together, one wave after the other."""


class Passes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """How often the groups of a micro-batch write, and how often they get gradients.

    Without names on the wire: the header of ``Embeddings`` is to fit into one block.
    """

    forward: PassCount
    backward: PassCount

    @classmethod
    def parse(cls, text: str) -> Passes | None:
        """``2,2``, or ``live`` for None."""
        return None if text == "live" else cls(*map(int, text.split(",")))


def forward_waves(live: Sequence[int], passes: Passes | None) -> Waves:
    """In which waves ``live`` groups are asked in the forward pass.

    Nothing that an adapter changes reaches the lowest group: what it reads and writes in the first pass holds for all.
    """
    if passes is None:
        return [(group,) for group in live]
    waves = [tuple(live), *[tuple(live[1:])] * (passes.forward - 1)]
    return [wave for wave in waves if wave]


def backward_waves(
    live: Sequence[int], trained: Collection[int], reading: Collection[int], passes: Passes
) -> list[list[int]]:
    """The groups whose outputs' gradients are sent in each backward pass, from the highest down.

    Args:
        reading: live groups whose reads depend on what others write: what they answer goes into the next pass.
    """
    found = []
    for number in range(passes.backward if reading else 1):
        follows = number < passes.backward - 1
        groups = [group for group in live if group in trained or (follows and group in reading)]
        # Those of the highest are the same in each.
        found.append([group for group in reversed(groups) if not number or group != live[-1]])
    return [groups for groups in found if groups]


def pieces(groups: Sequence[int], crossings: Sequence[Crossing], rows: int) -> Waves:
    """A wave as it is sent, in messages of one or more groups: those that follow one another and are of the same
    widths, as many as take no more than ``PIECE_BYTES`` in fp32."""
    found: Waves = []
    for group in groups:
        nbytes = 4 * rows * crossings[group].width
        last = found[-1] if found else ()
        most = min(MAX_PIECE_GROUPS, max(1, PIECE_BYTES // max(1, nbytes)))
        if last and crossings[last[0]] == crossings[group] and len(last) < most:
            found[-1] = (*last, group)
        else:
            found.append((group,))
    return found


def may_send_early(crossings: Sequence[Crossing], rows: int) -> bool:
    """Whether what all groups write fits into what a device may send before the server reads any of it."""
    return len(pieces(range(len(crossings)), crossings, rows)) <= MOST_PIECES


def reads_digest(read: Iterable[WireTensor]) -> bytes:
    """BLAKE2b, of 16 bytes, of what groups read in the base pass: of their tensors as they are stored, in execution
    order, however they are cut into pieces."""
    digest = hashlib.blake2b(digest_size=READS_DIGEST_BYTES)
    for tensor in read:
        digest.update(np.ascontiguousarray(tensor.data).data)
    return digest.digest()
