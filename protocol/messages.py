"""Every message of the wire: one frozen structure each. docs/reference/protocol.md is normative, and has more words.

Field names are the wire names; a message's ``type`` is its class name in snake case. ``E`` is the device (edge), ``C``
the server (cloud).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .adapters import AdapterSpec
from .choices import WeightFormat
from .errors import ErrorCode as ErrorCode
from .groups import GroupSpec
from .limits import MAX_WINDOW
from .micro_batch_messages import MAX_DRAFT as MAX_DRAFT
from .micro_batch_messages import MAX_ENCODED_SEQUENCES as MAX_ENCODED_SEQUENCES
from .micro_batch_messages import MAX_SECONDS as MAX_SECONDS
from .micro_batch_messages import MAX_TIMES as MAX_TIMES
from .micro_batch_messages import WITHOUT_GRADIENTS as WITHOUT_GRADIENTS
from .micro_batch_messages import Decoding as Decoding
from .micro_batch_messages import DraftTokens as DraftTokens
from .micro_batch_messages import Embeddings as Embeddings
from .micro_batch_messages import EncodedHiddenStates as EncodedHiddenStates
from .micro_batch_messages import ExchangeMessage as ExchangeMessage
from .micro_batch_messages import GradHiddenStates as GradHiddenStates
from .micro_batch_messages import GroupDelta as GroupDelta
from .micro_batch_messages import GroupGrad as GroupGrad
from .micro_batch_messages import GroupInput as GroupInput
from .micro_batch_messages import GroupInputGrad as GroupInputGrad
from .micro_batch_messages import LabelledHiddenStates as LabelledHiddenStates
from .micro_batch_messages import Message as Message
from .micro_batch_messages import Mode as Mode
from .micro_batch_messages import Piece as Piece
from .micro_batch_messages import Seconds as Seconds
from .micro_batch_messages import Times as Times
from .passes import Passes as Passes
from .purposes import MAX_TICKET_BYTES as MAX_TICKET_BYTES
from .purposes import Encode as Encode
from .purposes import Index, Purpose, Width
from .purposes import Train as Train
from .purposes import Use as Use
from .tensors import WireTensor
from .wire_codecs import Codecs

ShortText = Annotated[str, msgspec.Meta(max_length=1024)]
MAX_GROUPS = 16_384
RESUME_TOKEN_BYTES = 32
MAX_RETRY_AFTER_S = 86_400
Window = Annotated[int, msgspec.Meta(ge=1, le=MAX_WINDOW)]
ResumeToken = Annotated[bytes, msgspec.Meta(min_length=RESUME_TOKEN_BYTES, max_length=RESUME_TOKEN_BYTES)]


class Hello(Message, frozen=True):
    """E sends first: the wire versions it speaks, and what it is.

    ``device`` is its own stable name, random: restarted, it takes the place of the session that it left behind.
    """

    protocol_versions: Annotated[list[int], msgspec.Meta(min_length=1, max_length=32)]
    software: ShortText
    device: ShortText = ""


class Welcome(Message, frozen=True):
    """C answers: the version both will speak, the base model it serves, and its limits.

    Attributes:
        base_fingerprint: hex SHA-256, see docs/reference/bundle.md.
        base_weight_format: how C holds the weights of its linear modules, which the fingerprint is of.
        embedding_size: width of the hidden states that E sends; hidden_size: of those that C returns.
        max_sequence_length: in tokens; max_tokens: of one micro-batch, as ``counting.py`` counts them.
        packs: whether C runs sequences end to end; otherwise each counts as the longest of its micro-batch.
        window: the most micro-batches of a session that C has under way at a time.
        max_context_length: the longest context, in tokens, whose keys and values C keeps; 0: it keeps none.
    """

    protocol_version: int
    software: ShortText
    base_model: ShortText
    base_fingerprint: ShortText
    base_weight_format: WeightFormat
    embedding_size: Width
    hidden_size: Width
    max_sequence_length: Width
    max_tokens: Width
    packs: bool
    window: Window = 1
    max_context_length: Index = 0


class OpenSession(Message, frozen=True):
    """E asks for a session on one base model with its own groups and adapters.

    Attributes:
        groups: the exchange groups in execution order; C refuses any that it did not trace itself.
        codecs: how each tensor crosses, by its role; evaluation_codecs: in micro-batches without gradients.
        window: how many micro-batches E may have under way at a time; at most what C said.
        times: whether C is to say when it did what, in its messages of a micro-batch.
    """

    base_fingerprint: ShortText
    groups: Annotated[tuple[GroupSpec, ...], msgspec.Meta(max_length=MAX_GROUPS)]
    adapter: AdapterSpec
    codecs: Codecs
    evaluation_codecs: Codecs
    purpose: Purpose
    window: Window = 1
    times: bool = False

    def codecs_of(self, mode: Mode) -> Codecs:
        """How the tensors of a micro-batch of this mode cross."""
        return self.evaluation_codecs if mode in WITHOUT_GRADIENTS else self.codecs

    @property
    def encoded_width(self) -> int:
        """Of the hidden states that C gives in a session of the purpose ``encode``; 0 in one of another."""
        return self.purpose.width if isinstance(self.purpose, Encode) else 0

    @property
    def context_length(self) -> int:
        """For how many tokens C keeps keys and values; 0: it keeps none."""
        return 0 if isinstance(self.purpose, Train) else self.purpose.context_length


class SessionOpened(Message, frozen=True):
    """C has opened the session.

    Attributes:
        session: a name for logs; token: resumes the session once, over another connection.
        units, ticket: only for the purpose ``train``; uint8 (units,), a ``UnitState`` each, and uint8, the controller's
            state, opaque and signed.
    """

    session: ShortText
    token: ResumeToken
    units: WireTensor | None = None
    ticket: WireTensor | None = None


class ResumeSession(Message, frozen=True):
    """E comes back to its session over a new connection, with the last token that it got.

    ``received``: ``seq`` of the last frame of the session that E has.
    """

    session: ShortText
    token: ResumeToken
    received: Index


class SessionResumed(Message, frozen=True):
    """C goes on with the session, and gives another token. Both sides send again what the other does not have.

    ``received``: ``seq`` of the last frame of the session that C has.
    """

    token: ResumeToken
    received: Index


class SessionGone(Message, frozen=True):
    """C does not have that session, or not for that token; E may open another on this connection."""


class MakeAdapterState(Message, frozen=True):
    """E asks C to make what C keeps of a group. C answers with the group's ``AdapterState``: made from what the base
    model has computed in this session's micro-batches of the mode ``basis``, or, where there were none, from its
    weights."""

    group: Index


class AdapterState(Message, frozen=True):
    """What C keeps of one group for the session: from C, which made it, or from E, to a C that has lost it.

    Attributes:
        tensors: of the shapes that the adapter's kind says; none where C says that it has taken E's.
        gradient_norm: of C, which made it from the mode ``basis``: about the norm of the gradient of the group's
            parameters, summed over those micro-batches; 0.0 in all others.
    """

    group: Index
    tensors: tuple[WireTensor, ...]
    gradient_norm: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class GroupParameters(Message, frozen=True):
    """E gives C what it trains of a group whose unit is killed, for C to apply until the unit is revived, or, where it
    ``lends`` an adapter, of each group, until the session ends; C answers with the same of no tensors. Only where E
    asked for ``on_kill`` ``give_to_server``, or for ``lends``.

    ``tensors``: of the adapter kind's ``parameter_shapes``, in that order, with the scaling in what is nearest to the
    output: stored as adapter state is.
    """

    group: Index
    tensors: tuple[WireTensor, ...]


class StepReport(Message, frozen=True):
    """E has committed a step and reports one score a unit: fp32 (units,), 0 for units that are not active."""

    step: Index
    scores: WireTensor


class Signal(Message, frozen=True):
    """C's answer to a report: the state of every unit from the next step on, and the new ticket.

    Attributes:
        units: uint8 (units,), a ``UnitState`` each.
        ticket: uint8, the controller's state after this report, opaque and signed.
    """

    step: Index
    units: WireTensor
    ticket: WireTensor


class CloseSession(Message, frozen=True):
    """E is done; C forgets the session."""


class Error(Message, frozen=True):
    """Either side gives up on the conversation, and says why; nothing may follow on this connection."""

    code: ShortText
    message: ShortText
    retryable: bool = False
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_RETRY_AFTER_S)] | None = None


AnyMessage = (
    Hello
    | Welcome
    | OpenSession
    | SessionOpened
    | ResumeSession
    | SessionResumed
    | SessionGone
    | MakeAdapterState
    | AdapterState
    | GroupParameters
    | Embeddings
    | DraftTokens
    | GroupInput
    | GroupDelta
    | LabelledHiddenStates
    | EncodedHiddenStates
    | GradHiddenStates
    | GroupGrad
    | GroupInputGrad
    | StepReport
    | Signal
    | CloseSession
    | Error
)
