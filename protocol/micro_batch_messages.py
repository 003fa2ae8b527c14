"""The messages of a micro-batch; docs/reference/protocol.md is normative, and has more words.

``messages.py`` has all others, and gives these by the same name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from .passes import MAX_PIECE_GROUPS, READS_DIGEST_BYTES
from .passes import Passes as Passes
from .purposes import Index
from .tensors import WireTensor

Mode = Literal["train", "evaluate", "basis", "decode", "encode"]
WITHOUT_GRADIENTS: tuple[Mode, ...] = ("evaluate", "decode", "encode")

MAX_ENCODED_SEQUENCES = 128  # C may run each by itself, and answers each with a tensor of its own

MAX_DRAFT = 16
"""Tokens that C guesses at a time."""

MAX_SECONDS = 1e6
MAX_TIMES = 3 * 64 + 1

Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
Times = Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=MAX_TIMES)]
Piece = Annotated[tuple[Index, ...], msgspec.Meta(min_length=1, max_length=MAX_PIECE_GROUPS)]
"""Groups that a message is of; their tensors stand one under the other in one."""
DraftCount = Annotated[int, msgspec.Meta(ge=0, le=MAX_DRAFT)]
ReadsDigest = Annotated[bytes, msgspec.Meta(min_length=READS_DIGEST_BYTES, max_length=READS_DIGEST_BYTES)]


def _tag(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag=_tag):
    """Base of all messages."""


class ExchangeMessage(Message, frozen=True):
    """Base of the messages of a micro-batch of a step; steps are counted from 0 in the present part of the run."""

    step: Index
    micro_batch: Index


class Decoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """How tokens go on in a context. Without names on the wire, as ``Passes``.

    Attributes:
        position: of the first of them. C forgets what it holds from there on, and takes these in.
        drafts: how many tokens C is to guess that may follow the last one. It takes them in after it, as if E had sent
            them, and says which with ``DraftTokens``.
        ahead: in passes: once C has sent the last hidden states, it is to go on with the token that it expects E to
            choose and so many guesses after it, and to send what groups read of these in the base pass. None: it is
            not.
        is_ahead: whether the tokens are those very ones: E has what groups read of them, and sends what they write at
            once.
    """

    position: Index
    drafts: DraftCount = 0
    ahead: DraftCount | None = None
    is_ahead: bool = False

    @property
    def guesses(self) -> int:
        """As of ``Embeddings``."""
        return self.drafts + (0 if self.ahead is None else 1 + self.ahead)


class Embeddings(ExchangeMessage, frozen=True):
    """E starts a micro-batch: the packed embeddings of its real tokens, or the tokens themselves.

    Attributes:
        mode: ``train`` if a backward pass with the groups will follow; ``evaluate`` if none will; ``basis``, while the
            session is set up, if one of the base model alone will, from whose gradients C makes its adapter state;
            ``decode`` if none will, and its one sequence goes on from tokens that C holds keys and values of.
            ``encode`` for hidden states in the middle of
            the model, in a session of that purpose, of whose modes it and ``decode`` are.
        hidden_states: (tokens, embedding_size); None where ``token_ids`` is there.
        sequence_lengths: int32 (sequences,), summing to tokens.
        label_positions: int32 (labelled,), ascending rows of the packed tokens whose last hidden state E wants; none in
            the mode ``encode``, which gives those of all tokens.
        crossing_positions: int32 (rows,), ascending rows at which adapters act: only these cross at each group, and
            there may be none. None: all tokens.
        examples: int32 (sequences,), numbers that E gives its examples, where C is to know one again.
        token_ids: int32 (tokens,), which C looks up; only where the device's user asked for it.
        decoding: where its tokens lie in the context; only in the mode ``decode``.
        passes: None: each group is asked by itself, live; only in the modes ``train``, ``evaluate`` and ``decode``, in
            the last as the session's purpose says.
        kept_reads: as ``reads_digest`` has it, of what E has kept of this micro-batch: what all live groups read in the
            base pass. E sends what they write at once, and C need not ask where it reads the same. None: nothing.
    """

    mode: Mode
    hidden_states: WireTensor | None
    sequence_lengths: WireTensor
    label_positions: WireTensor
    crossing_positions: WireTensor | None = None
    examples: WireTensor | None = None
    token_ids: WireTensor | None = None
    decoding: Decoding | None = None
    passes: Passes | None = None
    kept_reads: ReadsDigest | None = None

    @property
    def sends_early(self) -> bool:
        """Whether E sends what all groups write in the first pass without being asked."""
        return self.kept_reads is not None or (self.decoding is not None and self.decoding.is_ahead)

    @property
    def guesses(self) -> int:
        """The most tokens that C takes in beside those that E has sent."""
        return 0 if self.decoding is None else self.decoding.guesses

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        given = self.hidden_states if self.token_ids is None else self.token_ids
        return 0 if given is None else given.shape[0]

    @property
    def rows(self) -> int:
        """That cross at each group."""
        return self.tokens if self.crossing_positions is None else self.crossing_positions.shape[0]


class DraftTokens(ExchangeMessage, frozen=True):
    """C says which tokens it has guessed and taken in, before anything else of a micro-batch that asks for ``drafts``;
    and once more where it goes on ``ahead``.

    Attributes:
        token_ids: int32 (drafts,), maybe fewer than E asked for, or none. They follow E's last token; where C goes on
            ahead, the token that it expects.
        computed_s: that this took.
    """

    token_ids: WireTensor
    computed_s: Seconds = 0.0


class GroupInput(ExchangeMessage, frozen=True):
    """C sends the inputs of live exchange groups: (groups · rows, input_width), of the width that the adapter's kind
    says.

    In passes, from the second one on, differences to those of the pass before.

    Attributes:
        groups: one where they are asked live; in passes one or more of the same widths, in execution order.
        times: where E has asked for them: of each time that C has waited since its last message of the micro-batch,
            when it began to, when it had what it waited for, and when it had its turn to compute; then when it sent
            this. In seconds of a clock that began with the session.
    """

    groups: Piece
    hidden_states: WireTensor
    times: Times = ()


class GroupDelta(ExchangeMessage, frozen=True):
    """E answers with what the adapters of these groups give, (groups · rows, output_width) each; for LoRA one delta a
    target module. In passes, from the second one on, differences likewise; in the first one E may not have waited to be
    asked, where ``Embeddings`` has ``kept_reads``."""

    groups: Piece
    deltas: tuple[WireTensor, ...]


class LabelledHiddenStates(ExchangeMessage, frozen=True):
    """C ends the forward pass.

    Attributes:
        hidden_states: the last ones at the label positions, (labelled, hidden_size); or, in a session of the purpose
            ``encode``, what came there out of the last block that it ran, (labelled, width).
        gradients: of how many groups gradients will follow a ``GradHiddenStates``, in all passes together; at 0, E
            sends that only in the mode ``basis``.
        next_token: that C expects E to choose, where it goes on ahead: ``DraftTokens`` and ``GroupInput`` follow.
        computed_s: that C has computed on this micro-batch so far; queued_s: that it has waited for its turn.
        times: as in ``GroupInput``.
    """

    hidden_states: WireTensor
    gradients: Index
    next_token: Index | None = None
    computed_s: Seconds = 0.0
    queued_s: Seconds = 0.0
    times: Times = ()


class EncodedHiddenStates(ExchangeMessage, frozen=True):
    """C ends a micro-batch of the mode ``encode``: of each sequence what came out of the last block that it ran, as a
    tensor of its own, (length, width), which can be kept by itself."""

    hidden_states: tuple[WireTensor, ...]


class GradHiddenStates(ExchangeMessage, frozen=True):
    """E starts the backward pass: the loss's gradient, (labelled, hidden_size)."""

    grad_hidden_states: WireTensor


class GroupGrad(ExchangeMessage, frozen=True):
    """C sends the gradients of groups' deltas: (groups · rows, output_width) each.

    In passes, from the second one on, differences to those of the pass before.

    Attributes:
        groups: one where they are asked live; in passes one or more, from the highest down.
        answer: whether C waits for their ``GroupInputGrad``. The lowest group needs none, and no group does in the last
            pass.
        backward_pass: from 0.
        computed_s, queued_s: as in ``LabelledHiddenStates``; times: as in ``GroupInput``.
    """

    groups: Piece
    grads: tuple[WireTensor, ...]
    answer: bool
    backward_pass: Index = 0
    computed_s: Seconds = 0.0
    queued_s: Seconds = 0.0
    times: Times = ()


class GroupInputGrad(ExchangeMessage, frozen=True):
    """E answers with the gradients of the groups' inputs: (groups · rows, input_width)."""

    groups: Piece
    grad_hidden_states: WireTensor
