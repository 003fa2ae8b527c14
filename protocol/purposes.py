"""What a session can be for: ``purpose`` of ``OpenSession``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .choices import TableDtype
from .kill_revive import MAX_UNITS, KillReviveConfig
from .passes import Passes

Index = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Width = Annotated[int, msgspec.Meta(ge=1, le=2**24)]

MAX_TICKET_BYTES = 1 << 20


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="purpose", tag="train"):
    """The purpose of a training run: C switches its units, and E reports every step.

    Attributes:
        seed: of C's draws; total_steps: of the run, or of its present part, which kill-and-revive's timetable needs.
        next_step, ticket: where a run goes on, the step that comes next and the last ticket that E got.
        learnt: units whose adapters have an effect before step 0, from an adapter to start from or an earlier part.
    """

    kill_revive: KillReviveConfig
    seed: Index
    total_steps: Index
    next_step: Index = 0
    ticket: Annotated[bytes, msgspec.Meta(max_length=MAX_TICKET_BYTES)] | None = None
    learnt: Annotated[tuple[Index, ...], msgspec.Meta(max_length=MAX_UNITS)] = ()


class Use(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="purpose", tag="use"):
    """The purpose of evaluating and generating: every group of the session is live, all the time, or C applies it.

    Attributes:
        context_length: for how many tokens C is to keep keys and values, so that micro-batches of the mode ``decode``
            go on from them; 0: none.
        passes: how groups are asked in those; None: live.
        drafts: of E's embedding table, where C is to guess tokens that may come next: it takes these in as E would
            embed them. None: it is not asked for any.
        lends: whether E gives C what it has learnt of every group, before the first micro-batch, for C to apply until
            the session ends: nothing is asked then.
    """

    context_length: Index = 0
    passes: Passes | None = None
    drafts: TableDtype | None = None
    lends: bool = False


class Encode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="purpose", tag="encode"):
    """The purpose of a device that runs the model's last blocks itself: C runs the first ones, forward only.

    C may run all sequences of a micro-batch at once: what comes out of one depends, by rounding, on what it came with.

    Attributes:
        blocks: how many of them; width: of the hidden states that come out of the last of these.
        context_length: as of ``Use``, of keys and values of these blocks; where C is to guess, of all blocks.
        drafts: as of ``Use``.
    """

    blocks: Width
    width: Width
    context_length: Index = 0
    drafts: TableDtype | None = None


Purpose = Train | Use | Encode
