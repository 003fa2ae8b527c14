"""The whole model as the device uses it: its own ends and adapters here, the frozen blocks over a connection."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dlora.edge.adapters.compatibility import check_sequence_length
from dlora.edge.adapters.compute import AdapterCompute
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.spans import COMPUTE
from dlora.edge.wire.usage import WireCounters
from dlora.protocol import messages as m
from dlora.protocol.choices import Send
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.micro_batch import Key
from dlora.protocol.tensors import FloatArray

from .decode_parts import check_room, part_of
from .ends import Embedding, Head, LongArray, LossGradient
from .extension import Extension, Guesses
from .kept_reads import KeptReads
from .micro_batch import DeviceMicroBatch, DeviceParts
from .session import ModelSession
from .split_decoder import SplitDecoder


class SplitModel:
    """Forward, backward and evaluation of micro-batches.

    Attributes:
        invocation: the tokens from which on the adapters act; none: everywhere.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        session: ModelSession,
        *,
        invocation: tuple[int, ...] = (),
        send: Send = "embeddings",
        passes: m.Passes | None = None,
        kept_reads: KeptReads | None = None,
    ) -> None:
        self.passes = passes
        self.session = session
        self.invocation = invocation
        self.connection = session.connection
        self.adapters = session.adapters
        spans = session.connection.spans
        self._compute = AdapterCompute(engine, session.adapters, lambda what, *when: spans.add(what, COMPUTE, *when))
        self._parts = DeviceParts(
            self.connection, Embedding(bundle, engine), Head(bundle, engine), self.adapters, self._compute,
            bundle.manifest.base_model.vocabulary_size,
            sends_token_ids=send == "token-ids", kept_reads=kept_reads,
        )  # fmt: skip
        self._evaluated = 0
        self._decoder = SplitDecoder(
            self.connection, lambda batch, **more: self._micro_batch(batch, self._next_key(), "decode", **more)
        )

    @property
    def counters(self) -> WireCounters:
        """What crossed so far; a lost session takes none of it with it."""
        return self.connection.counters

    @property
    def compute_seconds(self) -> float:
        """Seconds that this device has computed so far."""
        return self._parts.head_seconds + self._compute.seconds

    @contextmanager
    def asked_live(self) -> Iterator[None]:
        """Within, groups are asked live, whatever the run's passes are."""
        passes, self.passes = self.passes, None
        try:
            yield
        finally:
            self.passes = passes

    def forward_backward(
        self, batches: Sequence[MicroBatch], *, step: int, grad_scale: float, gradients: Sequence[LossGradient] = ()
    ) -> list[FloatArray]:
        """Train on micro-batches of one step, which the server must take: the cross-entropies of each, (labelled,).

        The adapters' gradients are added up in the order of the micro-batches, however the server's answers come.
        ``grad_scale`` is one over the labelled tokens of the whole step, whose loss is then their mean; ``gradients``:
        of each micro-batch's own loss, in place of that. Raises ``SessionLostError`` where all of it must be run again:
        the server knows nothing of it any more.
        """
        first = self.connection.session.next_micro_batch
        own: Sequence[LossGradient | None] = gradients or [None] * len(batches)
        runs = deque(
            self._micro_batch(batch, (step, first + index), "train", grad_scale=grad_scale, gradient=gradient)
            for index, (batch, gradient) in enumerate(zip(batches, own, strict=True))
        )
        parameters = self.adapters.parameters()
        losses: list[FloatArray] = []
        for run in self._run_all(runs):
            for name, grad in run.grads.items():
                parameters[name].add_grad(grad)
            assert run.losses is not None
            losses.append(run.losses)
        return losses

    def run_basis_pass(self, batches: Sequence[MicroBatch]) -> int:
        """Let the server see what the base model computes on these micro-batches, while its session is set up; how
        many it took them as.

        Raises as ``forward_backward`` does.
        """
        parts = [part for batch in batches for part in self.cut(batch)]
        for part in parts:
            run = self._micro_batch(part, self._next_key(), "basis", grad_scale=1.0 / len(part.labels))
            for _ in self._run_all(deque([run])):
                pass
        return len(parts)

    def cut(self, batch: MicroBatch) -> list[MicroBatch]:
        """``batch`` in parts that the server takes, each a micro-batch of its own; itself where it fits."""
        welcome = self.connection.welcome
        return batch.cut(max_tokens=welcome.max_tokens, packs=welcome.packs)

    def evaluate(self, batch: MicroBatch) -> tuple[FloatArray, LongArray]:
        """Losses float32 and likeliest tokens int64 at the labelled positions, (labelled,) each.

        Raises what ``Connection`` raises, and ``DataError`` where a sequence is longer than the server takes.
        """
        hidden_states = self._evaluate_hidden(batch)
        started = time.perf_counter()
        result = self._parts.head.loss(hidden_states, batch.labels)
        self._parts.head_seconds += time.perf_counter() - started
        return result

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        return self._room or self.connection.welcome.max_sequence_length

    @property
    def can_guess(self) -> bool:
        """Whether the server guesses tokens that may come next."""
        opening = self.connection.session.opened_with
        assert opening is not None
        return bool(self._room) and not isinstance(opening.purpose, m.Train) and opening.purpose.drafts is not None

    @property
    def _room(self) -> int:
        """For how many tokens of a context the server keeps keys and values."""
        opening = self.connection.session.opened_with
        assert opening is not None
        return opening.context_length

    def extend(self, ids: LongArray, known: int, acts_from: int, count: int, guesses: Guesses) -> Extension:
        """Logits of what follows the last tokens of a text, and of what the server guesses that may follow.

        Args:
            ids: int64 (tokens,), the whole text so far.
            known: how many of its first tokens are those that the model had last, in the same way, those that the
                server guessed among them; at most all but ``count``. They need not cross again where they are still
                held.
            acts_from: the row from which on the adapters act.
            count: of how many of the last tokens logits are wanted.

        Raises what ``Connection`` raises, and ``DataError`` for a text that is longer than ``context_limit``.
        """

        def attempt() -> Extension:
            check_room(ids, self.context_limit)
            if self._room:
                run, held = self._decoder.extend(ids, known, acts_from, count, guesses)
                assert run.hidden_states is not None
                expects = None if run.ahead is None else run.ahead.next_token
                return Extension(self._logits(run.hidden_states), tuple(run.drafts), held, run.drafts_s, expects)
            part = part_of(ids, 0, len(ids), len(ids) - count, acts_from)
            return Extension(self._logits(self._evaluate_hidden(part)))

        return self.session.run(attempt)

    def release_weights(self) -> None:
        """Let the pages of the two ends' weights go, which ``extend`` keeps for the next token."""
        self._parts.head.release()

    def _logits(self, hidden_states: FloatArray) -> FloatArray:
        started = time.perf_counter()
        logits = self._parts.head.logits(hidden_states)
        self._parts.head_seconds += time.perf_counter() - started
        return logits

    def _evaluate_hidden(self, batch: MicroBatch) -> FloatArray:
        def attempt() -> FloatArray:
            # Anew for each session: another server may take less at once.
            runs = deque(self._micro_batch(part, self._next_key(), "evaluate") for part in self.cut(batch))
            found = [run.hidden_states for run in self._run_all(runs) if run.hidden_states is not None]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return self.session.run(attempt)

    def _micro_batch(self, batch: MicroBatch, key: Key, mode: m.Mode, **more: Any) -> DeviceMicroBatch:
        """``more``: fields of ``DeviceMicroBatch``."""
        opening = self.connection.session.opened_with
        assert opening is not None
        passes = None if mode == "basis" else self.passes
        return DeviceMicroBatch(self._parts, batch, key, mode, opening.codecs_of(mode), passes=passes, **more)

    def _next_key(self) -> Key:
        self._evaluated = (self._evaluated + 1) % 2**31
        return self.connection.session.step, self._evaluated

    def _run_all(self, waiting: deque[DeviceMicroBatch]) -> Iterator[DeviceMicroBatch]:
        """Run micro-batches, as many at a time as the window allows; gives each once it is through, in their order.

        Nothing is kept of one that was given: it may hold the gradients of all adapters.
        """
        in_order, under_way = deque[DeviceMicroBatch](), dict[Key, DeviceMicroBatch]()
        window = self.connection.session.window
        while waiting or in_order:
            while waiting and len(under_way) < window:
                run = waiting.popleft()
                check_sequence_length(int(run.batch.sequence_lengths.max()), self.connection.welcome)
                under_way[run.key] = run
                in_order.append(run)
                run.begin()
            match self.connection.receive_any():
                case m.Signal() as signal:
                    self.session.handle_signal(signal)
                case m.ExchangeMessage() as message:
                    run = under_way[message.step, message.micro_batch]  # the session's rules let no other through
                    run.handle(message)
                    if run.is_finished:
                        del under_way[run.key]
                case message:
                    raise RemoteProtocolError(f"{type(message).__name__} while a micro-batch is under way")
            while in_order and in_order[0].is_finished:
                yield in_order.popleft()
