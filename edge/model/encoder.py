"""What comes out of the model's first blocks, which the server runs: once for each text, forward only.

Nothing else is asked of such a server. What is sent depends on the text and on public weights: not on labels,
adapters or anything else that is trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dlora.edge.adapters.compatibility import check_sequence_length
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Send
from dlora.protocol.counting import cut_to_fit
from dlora.protocol.errors import RemoteProtocolError, SessionLostError
from dlora.protocol.micro_batch import Key
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole, decode_floats

from .decode_parts import fitting
from .ends import Embedding, LongArray
from .extension import Guesses
from .micro_batch import drafts_of
from .session import UntrainedSession

_MOST_TOKENS: Final = 1024  # of a micro-batch: enough to keep a server busy, and few megabytes in each direction
_WINDOW: Final = 4


def cut_for_encoding(lengths: Sequence[int], *, max_tokens: int = _MOST_TOKENS, packs: bool = True) -> Iterator[range]:
    """Which texts of ``lengths`` are asked for in one micro-batch, of a server that takes so many tokens at once."""
    for piece in cut_to_fit(lengths, max_tokens=min(max_tokens, _MOST_TOKENS), packs=packs):
        for start in range(piece.start, piece.stop, m.MAX_ENCODED_SEQUENCES):
            yield range(start, min(piece.stop, start + m.MAX_ENCODED_SEQUENCES))


@dataclass
class _Asked:
    """A micro-batch under way: its texts, whether it is the last one of its pack, and what came out of the blocks, once
    that is there."""

    sequences: Sequence[LongArray]
    ends_pack: bool
    found: Sequence[WireTensor] | None = None


class Encoder:
    """Asks for texts, several in a micro-batch and some micro-batches ahead; or for tokens that go on from others.

    Args:
        purpose: which blocks are run, and for how many tokens of a context the server is to keep keys and values.

    Attributes:
        session: open from the beginning.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, connection: Connection, purpose: m.Encode, codecs: Codecs, send: Send
    ) -> None:
        nothing = AdapterSet.create(AdapterSpec(), (), scaling=1.0, seed=(0,), unit="group", kill_every=1)
        fingerprint = bundle.manifest.base_model.fingerprint
        window = 1 if purpose.context_length else _WINDOW  # tokens of a context go on from each other
        self.connection = connection
        self.session = UntrainedSession(
            connection, nothing, purpose, codecs, base_fingerprint=fingerprint, window=window
        )
        self.session.open()
        self._embedding = Embedding(bundle, engine)
        self._codec = codecs.of(TensorRole.EMBEDDINGS)
        self._send = send
        self._vocabulary = bundle.manifest.base_model.vocabulary_size
        self._count = 0

    def encode(self, packs: Sequence[Sequence[LongArray]]) -> Iterator[list[WireTensor]]:
        """Of each pack of texts, int64 (tokens,), in order: the hidden states of each text (tokens, width), as they
        crossed.

        A pack is a micro-batch, or several where the server does not take as much. Raises what ``Connection`` raises,
        and ``DataError`` for a text that is longer than the server takes.
        """
        done = 0
        while done < len(packs):
            try:
                for found in self._encode(packs[done:]):
                    done += 1
                    yield found
            except SessionLostError:
                self.session.open()  # and what has not come is asked for again: another server may take less at once

    def decode(self, batch: MicroBatch, position: int, drafts: int) -> tuple[FloatArray, tuple[int, ...], float]:
        """Of tokens that go on from the first ``position`` of those that the server holds: the hidden states at the
        labels, and of at most ``drafts`` tokens that it guesses to follow, float32 (labelled + drafts, width); these
        tokens, and the seconds that they took.

        Raises what ``Connection`` raises: with ``SessionLostError`` the server holds no tokens any more.
        """
        opening = self.connection.session.opened_with
        assert opening is not None
        tokens = len(batch.ids)
        asked = fitting(Guesses(drafts), opening, self.connection.welcome, position + tokens, tokens)
        self._begin("decode", batch, m.Decoding(position, asked.drafts))
        message, guessed, drafts_s = self.connection.receive_any(), tuple[int, ...](), 0.0
        if isinstance(message, m.DraftTokens):
            guessed, drafts_s = drafts_of(message, self._vocabulary), message.computed_s
            message = self.connection.receive_any()
        if not isinstance(message, m.LabelledHiddenStates):
            raise RemoteProtocolError(f"{type(message).__name__} where hidden states were asked for")
        return decode_floats(message.hidden_states), guessed, drafts_s

    def _encode(self, packs: Sequence[Sequence[LongArray]]) -> Iterator[list[WireTensor]]:
        waiting, in_order = deque(each for pack in packs for each in self._micro_batches(pack)), deque[_Asked]()
        of_pack: list[WireTensor] = []
        under_way: dict[Key, _Asked] = {}
        while waiting or in_order:
            while waiting and len(in_order) < self.connection.session.window:  # no more is held than that
                asked = waiting.popleft()
                in_order.append(asked)
                under_way[self._begin("encode", batch_of(asked.sequences))] = asked
            message = self.connection.receive_any()
            if not isinstance(message, m.EncodedHiddenStates):
                raise RemoteProtocolError(f"{type(message).__name__} where hidden states were asked for")
            asked = under_way.pop((message.step, message.micro_batch))
            asked.found = [tensor.copied() for tensor in message.hidden_states]
            while in_order and (found := in_order[0].found) is not None:
                of_pack += found
                if in_order.popleft().ends_pack:
                    yield of_pack
                    of_pack = []

    def _micro_batches(self, sequences: Sequence[LongArray]) -> Iterator[_Asked]:
        welcome = self.connection.welcome
        lengths = [len(ids) for ids in sequences]
        check_sequence_length(max(lengths, default=0), welcome)
        for piece in cut_for_encoding(lengths, max_tokens=welcome.max_tokens, packs=welcome.packs):
            yield _Asked(sequences[piece.start : piece.stop], ends_pack=piece.stop == len(sequences))

    def _begin(self, mode: m.Mode, batch: MicroBatch, decoding: m.Decoding | None = None) -> Key:
        self._count = (self._count + 1) % 2**31
        key = self.connection.session.step, self._count
        sends_ids = self._send == "token-ids"
        hidden_states = None
        if not sends_ids:
            hidden_states = self._codec.encode(self._embedding(batch.ids, keep_table=mode == "decode"))
        self.connection.send(
            m.Embeddings(
                step=key[0],
                micro_batch=key[1],
                mode=mode,
                hidden_states=hidden_states,
                sequence_lengths=WireTensor.from_ints(batch.sequence_lengths),
                label_positions=WireTensor.from_ints(batch.label_positions),
                token_ids=WireTensor.from_ints(batch.ids) if sends_ids else None,
                decoding=decoding,
            )
        )
        if self.connection.recorder is not None:
            self.connection.recorder.add_micro_batch(mode, batch)
        return key


def batch_of(texts: Sequence[LongArray]) -> MicroBatch:
    """A micro-batch of texts, without labels."""
    return MicroBatch(
        ids=np.concatenate(texts),
        sequence_lengths=np.array([len(ids) for ids in texts], np.int32),
        label_positions=np.zeros(0, np.int32),
        labels=np.zeros(0, np.int64),
    )
