"""What an attacker has of a run: the frames that crossed, put in order. Nothing here knows the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dlora.protocol import messages as m
from dlora.protocol.errors import DataError, RemoteProtocolError
from dlora.protocol.frames import Decoder, read_prefix
from dlora.protocol.recording import RecordedFrame, Recording
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import decode_floats


@dataclass(frozen=True)
class SeenFrame:
    """What can be told of a frame without reading it: under TLS, too.

    Attributes:
        time: in seconds; up: from the device to the server.
    """

    time: float
    up: bool
    nbytes: int


@dataclass
class SeenMicroBatch:
    """The messages of one micro-batch.

    Attributes:
        opening: of its session.
        frames: their sizes and times, in order.
        inputs, deltas, grads, input_grads: of each exchange group, as they crossed.
        last_hidden, last_grad: the last hidden states at the labels, and the loss's gradient of them.
        drafts: the tokens that the server has guessed and taken in after the device's.
        ahead: what each group read of tokens that the server has gone on with.
    """

    begun: m.Embeddings
    opening: m.OpenSession
    frames: list[SeenFrame]
    inputs: dict[int, WireTensor] = field(default_factory=dict)
    deltas: dict[int, tuple[WireTensor, ...]] = field(default_factory=dict)
    grads: dict[int, tuple[WireTensor, ...]] = field(default_factory=dict)
    input_grads: dict[int, WireTensor] = field(default_factory=dict)
    last_hidden: WireTensor | None = None
    last_grad: WireTensor | None = None
    drafts: tuple[int, ...] = ()
    ahead: dict[int, WireTensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """What is trained changes from one step to the next only, but for updates that are tried to find a learning
        rate, before the first; an evaluation has the number of the step after it."""
        return self.begun.step

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(length) for length in self.begun.sequence_lengths.data]

    @property
    def label_positions(self) -> list[int]:
        return [int(position) for position in self.begun.label_positions.data]

    @property
    def embeddings(self) -> Tensor | None:
        """float32 (tokens, embedding_size); None where tokens were sent themselves."""
        sent = self.begun.hidden_states
        return None if sent is None else floats(sent)


@dataclass
class Observed:
    """A whole recording.

    Attributes:
        welcomes: what the server said of itself, each time.
        micro_batches: in the order in which they began.
        given: what the device handed over of killed units: of each group the last, and how many micro-batches had
            begun.
        states: what the server keeps of each group; scores: of each report.
        said_up: the kinds of messages that the device sent.
    """

    welcomes: list[m.Welcome] = field(default_factory=list)
    openings: list[m.OpenSession] = field(default_factory=list)
    micro_batches: list[SeenMicroBatch] = field(default_factory=list)
    frames: list[SeenFrame] = field(default_factory=list)
    given: dict[int, tuple[m.GroupParameters, int]] = field(default_factory=dict)
    states: dict[int, m.AdapterState] = field(default_factory=dict)
    scores: list[WireTensor] = field(default_factory=list)
    said_up: set[type[m.Message]] = field(default_factory=set)

    @property
    def welcome(self) -> m.Welcome:
        """The last one."""
        return self.welcomes[-1]

    @property
    def opening(self) -> m.OpenSession:
        """Of the last session."""
        return self.openings[-1]

    @property
    def has_only_first_blocks(self) -> bool:
        """Whether the server was asked for nothing but the first blocks' hidden states of given texts, so that nothing
        of an adapter or of labels had reason to cross. An answer that is generated is another matter: it is text that
        the adapter has chosen."""
        allowed = {m.Hello, m.OpenSession, m.ResumeSession, m.CloseSession, m.Embeddings, m.Error}
        return (
            all(isinstance(opening.purpose, m.Encode) for opening in self.openings)
            and self.said_up <= allowed
            and all(each.begun.mode == "encode" and not each.label_positions for each in self.micro_batches)
        )


def floats(tensor: WireTensor) -> Tensor:
    """Its values, float32."""
    return torch.from_numpy(decode_floats(tensor)).float()


def joined(tensors: Iterable[WireTensor]) -> Tensor:
    """Their rows, one under the other, float32."""
    return torch.cat([floats(tensor) for tensor in tensors])


def observe(recording: Recording) -> Observed:
    """Read a recording's frames. Raises ``DataError`` for one that is damaged, of another version, or empty."""
    seen, reader = Observed(), _Reader()
    for number, recorded in enumerate(recording.frames, 1):
        try:
            reader.read(recorded, seen)
        except RemoteProtocolError as error:
            raise DataError(f"frame {number:,} of the recording cannot be read ({error}); record it again") from None
    if not seen.welcomes or not seen.micro_batches:
        raise DataError("the recording has no micro-batch: record a run that trains, evaluates or generates")
    if len({(type(each.purpose), each.groups, each.adapter.kind, each.adapter.r) for each in seen.openings}) > 1:
        raise DataError("the recording is of several runs: give the one of a single command")
    return seen


class _Reader:
    """Frames that came again after a lost connection count once."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._under_way: dict[tuple[int, int], SeenMicroBatch] = {}
        self._last = {True: 0, False: 0}  # number of a frame up, and down

    def read(self, recorded: RecordedFrame, seen: Observed) -> None:
        """Add a frame to what was seen. Raises ``RemoteProtocolError``."""
        frame, up = SeenFrame(recorded.time, recorded.up, len(recorded.frame)), recorded.up
        seen.frames.append(frame)
        message, number = self._decoder.decode(recorded.frame), read_prefix(recorded.frame).seq
        if number and number <= self._last[up]:
            return
        self._last[up] = number or self._last[up]
        if up:
            seen.said_up.add(type(message))
        match message:
            case m.Welcome():
                if message.protocol_version not in PROTOCOL_VERSIONS:
                    raise RemoteProtocolError(f"wire version {message.protocol_version} is not spoken here")
                seen.welcomes.append(message)
            case m.OpenSession():
                seen.openings.append(message)
                self._last = {True: 0, False: 0}
                self._under_way.clear()
            case m.GroupParameters() if message.tensors:
                seen.given[message.group] = message, len(seen.micro_batches)
            case m.AdapterState() if message.tensors:
                seen.states[message.group] = message
            case m.StepReport():
                seen.scores.append(message.scores)
            case m.ExchangeMessage():
                self._exchange(message, frame, seen)
            case _:
                pass

    def _exchange(self, message: m.ExchangeMessage, frame: SeenFrame, seen: Observed) -> None:
        key = message.step, message.micro_batch
        if isinstance(message, m.Embeddings):
            if not seen.openings:
                raise RemoteProtocolError("a micro-batch before a session is open")
            begun = SeenMicroBatch(message, seen.opening, [])
            if message.decoding is not None and message.decoding.is_ahead and seen.micro_batches:
                begun.inputs = dict(seen.micro_batches[-1].ahead)
            self._under_way[key] = begun
            seen.micro_batches.append(self._under_way[key])
        if key not in self._under_way:
            raise RemoteProtocolError("a message of a micro-batch that did not begin")
        micro_batch = self._under_way[key]
        micro_batch.frames.append(frame)
        match message:
            case m.DraftTokens() if micro_batch.last_hidden is None:
                micro_batch.drafts = tuple(message.token_ids.data.tolist())
            case m.GroupInput() if micro_batch.last_hidden is not None:
                _add(micro_batch.ahead, message.groups, message.hidden_states)
            case m.GroupInput():
                _add(micro_batch.inputs, message.groups, message.hidden_states)
            case m.GroupDelta():
                _add_each(micro_batch.deltas, message.groups, message.deltas)
            case m.GroupGrad():
                _add_each(micro_batch.grads, message.groups, message.grads)
            case m.GroupInputGrad():
                _add(micro_batch.input_grads, message.groups, message.grad_hidden_states)
            case m.LabelledHiddenStates():
                micro_batch.last_hidden = message.hidden_states
            case m.GradHiddenStates():
                micro_batch.last_grad = message.grad_hidden_states
            case _:
                pass


def _add(known: dict[int, WireTensor], groups: Sequence[int], crossed: WireTensor) -> None:
    """What crossed of these groups: itself, or, in passes, one under the other and added to what crossed before."""
    if len(groups) == 1 and groups[0] not in known:
        known[groups[0]] = crossed
        return
    for group, values in zip(groups, floats(crossed).tensor_split(len(groups)), strict=True):
        summed = values + floats(known[group]) if group in known else values
        known[group] = WireTensor("fp32", summed.contiguous().numpy())


def _add_each(known: dict[int, tuple[WireTensor, ...]], groups: Sequence[int], crossed: Sequence[WireTensor]) -> None:
    """The same of several tensors a group."""
    columns = []
    for place, tensor in enumerate(crossed):
        column = {group: known[group][place] for group in groups if group in known}
        _add(column, groups, tensor)
        columns.append(column)
    for group in groups:
        known[group] = tuple(column[group] for column in columns)


def whole_texts(tokens: Sequence[Sequence[int]], micro_batches: Sequence[SeenMicroBatch]) -> list[list[int]]:
    """The texts of micro-batches, whose packed tokens are given: of each sequence its own, and of what is generated,
    where tokens go on from others, the text that they make together, with what the server has guessed of it."""
    texts: list[list[int]] = []
    context: list[int] = []
    for packed, micro_batch in zip(tokens, micro_batches, strict=False):
        if micro_batch.begun.mode != "decode":
            ends = accumulate(micro_batch.lengths)
            texts += [list(packed[end - length : end]) for end, length in zip(ends, micro_batch.lengths, strict=True)]
            continue
        decoding = micro_batch.begun.decoding
        position = 0 if decoding is None else decoding.position
        if not position:
            context = []
            texts.append(context)
        context[position:] = [*packed, *micro_batch.drafts]
    return texts
