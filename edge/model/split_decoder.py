"""A context whose blocks all run on the server: its tokens as micro-batches of the mode ``decode``.

In passes the server may go on with what it expects to come next before it is asked: it sends what groups read of these
tokens after the last hidden states. Where it was right, the next step begins with what the groups write.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dlora.edge.memory import MANY_TOKENS, release_freed_memory
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.adapters import crossings
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.passes import may_send_early

from .decode_parts import decode_parts, fitting, part_of
from .ends import LongArray
from .extension import Guesses
from .micro_batch import Ahead, DeviceMicroBatch


class SplitDecoder:
    """Sends what is new of a text, and takes what the server guesses.

    Args:
        make: a micro-batch of the mode ``decode``, with these fields of ``DeviceMicroBatch``.
    """

    def __init__(self, connection: Connection, make: Callable[..., DeviceMicroBatch]) -> None:
        self._connection = connection
        self._make = make
        self._last: DeviceMicroBatch | None = None  # of which something may still come, ahead

    def extend(
        self, ids: LongArray, known: int, acts_from: int, count: int, guesses: Guesses
    ) -> tuple[DeviceMicroBatch, int]:
        """As ``SplitModel`` has it: the micro-batch of the last tokens, which has its last hidden states, and how many
        tokens were held. Raises what ``Connection`` raises."""
        session, welcome = self._connection.session, self._connection.welcome
        position = end = min(known, session.cached_tokens)
        run = None
        if position == len(ids) - 1 and count == 1 and self._last is not None and self._last.ahead is not None:
            run = self._go_on_ahead(self._last, self._last.ahead, int(ids[-1]), position, guesses)
        if run is None:
            parts = decode_parts(
                ids, position, wanted_from=len(ids) - count, count=count, most=welcome.max_sequence_length,
                acts_from=acts_from,
            )  # fmt: skip
            for part in parts:
                is_last = end + len(part.ids) == len(ids)
                asked = self._fitting(guesses, len(ids), len(part.ids)) if is_last else Guesses()
                run = self._make(part, decoding=m.Decoding(end, asked.drafts, asked.ahead))
                self._run(run)
                end += len(part.ids)
                if len(part.ids) > MANY_TOKENS:  # else the LM head comes on top of what this left
                    release_freed_memory()
        assert run is not None
        return run, position

    def _go_on_ahead(
        self, last: DeviceMicroBatch, ahead: Ahead, token: int, position: int, guesses: Guesses
    ) -> DeviceMicroBatch | None:
        """The next micro-batch of what the server expected; None where it has expected something else."""
        session = self._connection.session
        if ahead.next_token != token:
            return None
        while last.key in session.under_way:
            self._receive(last)
        if ahead.drafts is None or not session.tokens_ahead:  # of a session that is gone
            return None
        ids = np.array([token, *ahead.drafts], np.int64)
        asked = self._fitting(Guesses(0, guesses.ahead), position + len(ids), len(ids))
        decoding = m.Decoding(position, 0, asked.ahead, is_ahead=True)
        run = self._make(part_of(ids, 0, len(ids), 0, 0), decoding=decoding, known=ahead.reads)
        run.drafts, run.drafts_s = ahead.drafts, ahead.drafts_s * len(ahead.drafts) / len(ids)
        self._run(run)
        return run

    def _fitting(self, guesses: Guesses, length: int, tokens: int) -> Guesses:
        opening = self._connection.session.opened_with
        assert opening is not None
        asked = fitting(guesses, opening, self._connection.welcome, length, tokens)
        if asked.ahead is not None and not may_send_early(crossings(opening.adapter, opening.groups), 1 + asked.ahead):
            return Guesses(asked.drafts)
        return asked

    def _run(self, run: DeviceMicroBatch) -> None:
        """Until its last hidden states are here."""
        before, self._last = self._last, run
        run.begin()
        while run.hidden_states is None:
            self._receive(run, before)

    def _receive(self, *runs: DeviceMicroBatch | None) -> None:
        message = self._connection.receive_any()
        if not isinstance(message, m.ExchangeMessage):
            raise RemoteProtocolError(f"{type(message).__name__} while a micro-batch is under way")
        key = message.step, message.micro_batch
        # The session's rules let no other through.
        next(run for run in runs if run is not None and run.key == key).handle(message)
