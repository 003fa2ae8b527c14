"""One micro-batch of a conversation, as both sides hold it: the order and the shapes of its messages.

It is lock-step: FORWARD, then LOSS and BACKWARD if it trains. It asks every live group, once and in execution order,
and gives every active one its gradients: a server that leaves some out would train nothing, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import messages as m
from .adapters import Crossing
from .counting import counted_tokens
from .errors import ViolationError
from .states import TRANSITIONS, Side, State
from .tensors import WireTensor
from .wire_codecs import CODECS, Codecs, TensorRole

Key = tuple[int, int]
"""Step and micro-batch: what every message of a micro-batch carries."""


class Shapes(NamedTuple):
    """What is the same for all micro-batches of a session and a mode: widths, codecs and the server's limits;
    ``encoded_width`` as ``OpenSession`` has it."""

    crossings: tuple[Crossing, ...]
    codecs: Codecs
    welcome: m.Welcome
    encoded_width: int = 0

    def check(self, tensor: WireTensor, role: TensorRole | None, shape: tuple[int | None, ...]) -> None:
        """Raise ``ViolationError`` unless the tensor is stored as its role's codec says (None: as any codec does), and
        of this shape."""
        if role is None and tensor.dtype not in CODECS:
            raise ViolationError(f"a tensor of {tensor.dtype} where floats were due")
        tensor.check(tensor.dtype if role is None else self.codecs.of(role).dtype, shape)

    def check_all(
        self, tensors: Sequence[WireTensor], role: TensorRole | None, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        """The same of one tensor for each of ``shapes``."""
        if len(tensors) != len(shapes):
            raise ViolationError(f"{len(tensors)} tensors where {len(shapes)} were due")
        for tensor, shape in zip(tensors, shapes, strict=True):
            self.check(tensor, role, shape)


class GroupStates(NamedTuple):
    """Groups by what their units do: ``live`` ones exchange, in execution order, ``active`` ones are trained, and those
    that are ``given`` C applies by itself."""

    live: tuple[int, ...] = ()
    active: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()


class MicroBatchRules:
    """One micro-batch that is under way. Not its tensors: they would outlive it.

    Args:
        begun: a message that ``check_embeddings`` passed.

    Attributes:
        mode: as its first message says; trains: whether a backward pass with the groups follows.
        state: FORWARD to BACKWARD, and IDLE once it is through.
        tokens: of all its sequences; rows: that cross at each group; labelled: whose last hidden state is wanted.
        position: of its first token in the context, in the mode ``decode``.
        lengths: of its sequences, in the mode ``encode``.
        exchanges: whether groups take part.
        asked: how many live groups took part in the forward pass; C waits for the last one's deltas in DELTA.
        gradients: how many groups will have their gradients sent; grads_sent: those that have.
        unanswered: groups whose input gradient C waits for.
    """

    def __init__(self, begun: m.Embeddings, shapes: Shapes) -> None:
        self.key: Key = (begun.step, begun.micro_batch)
        self.mode = begun.mode
        self.trains = begun.mode == "train"
        self.state = State.FORWARD
        self.tokens = begun.tokens
        self.rows = self.tokens if begun.crossing_positions is None else begun.crossing_positions.shape[0]
        self.labelled = begun.label_positions.shape[0]
        self.position = begun.position or 0
        self.lengths = tuple(begun.sequence_lengths.data.tolist()) if begun.mode == "encode" else ()
        self.exchanges = does_exchange(begun)
        self.asked = 0
        self.gradients = 0
        self.grads_sent: set[int] = set()
        self.unanswered: set[int] = set()
        self._shapes = shapes

    def advance(self, message: m.ExchangeMessage, sender: Side, groups: GroupStates) -> None:
        """Take the next message. Raises ``ViolationError``; nothing has changed then."""
        allowed_sender, next_state = TRANSITIONS[self.state].get(type(message), (None, self.state))
        if allowed_sender is not sender or (self.mode == "encode") is not isinstance(message, m.EncodedHiddenStates):
            raise ViolationError("not now")
        match message:
            case m.EncodedHiddenStates():
                self._check_encoded(message)
            case m.GroupInput():
                self._check_input(message, groups)
            case m.GroupDelta():
                self._check_delta(message, groups)
            case m.LabelledHiddenStates():
                self._check_labelled(message, groups)
                next_state = State.LOSS if message.gradients or self.mode == "basis" else State.IDLE
            case m.GradHiddenStates():
                shape = (self.labelled, self._shapes.welcome.hidden_size)
                self._shapes.check(message.grad_hidden_states, TensorRole.LAST_HIDDEN_STATES_GRAD, shape)
                next_state = State.IDLE if self.mode == "basis" else next_state
            case m.GroupGrad():
                self._check_grad(message, groups)
                next_state = self._backward_state()
            case m.GroupInputGrad():
                self._check_input_grad(message)
                next_state = self._backward_state()
        self.state = next_state

    def _check_input(self, message: m.GroupInput, groups: GroupStates) -> None:
        group, live = message.group, groups.live
        if group not in live:
            raise ViolationError(f"group {group} does not exist, or belongs to a killed unit")
        if self.asked == len(live) or group != live[self.asked]:
            raise ViolationError(f"group {group} out of turn; all live groups are asked, once, in execution order")
        width = self._shapes.crossings[group].input_width
        self._shapes.check(message.hidden_states, TensorRole.GROUP_INPUT, (self.rows, width))
        self.asked += 1

    def _check_delta(self, message: m.GroupDelta, groups: GroupStates) -> None:
        awaited = groups.live[self.asked - 1]
        if message.group != awaited:
            raise ViolationError(f"group {message.group} when group {awaited} was asked")
        self._check_outputs(message.deltas, message.group, TensorRole.DELTA)

    def _check_labelled(self, message: m.LabelledHiddenStates, groups: GroupStates) -> None:
        live, active, _ = groups
        if self.asked < len(live):
            raise ViolationError(f"only {self.asked} of {len(live)} live groups were asked")
        width = self._shapes.encoded_width or self._shapes.welcome.hidden_size
        self._shapes.check(message.hidden_states, TensorRole.LAST_HIDDEN_STATES, (self.labelled, width))
        if message.gradients > (len(live) if self.trains else 0):
            raise ViolationError("more gradients than groups took part")
        if self.trains and message.gradients < len(active):
            raise ViolationError(f"{message.gradients} gradients for {len(active)} active groups")
        self.gradients = message.gradients

    def _check_encoded(self, message: m.EncodedHiddenStates) -> None:
        if len(message.hidden_states) != len(self.lengths):
            raise ViolationError(f"{len(message.hidden_states)} tensors of {len(self.lengths)} sequences")
        for tensor, length in zip(message.hidden_states, self.lengths, strict=True):
            self._shapes.check(tensor, TensorRole.LAST_HIDDEN_STATES, (length, self._shapes.encoded_width))

    def _check_grad(self, message: m.GroupGrad, groups: GroupStates) -> None:
        group = message.group
        if group not in groups.live or group in self.grads_sent:
            raise ViolationError(f"gradients of group {group}, which did not take part, or again")
        to_come = self.gradients - len(self.grads_sent)
        if not to_come:
            raise ViolationError("more gradients than were announced")
        if group not in groups.active and len(groups.active - self.grads_sent) == to_come:
            raise ViolationError(f"gradients of group {group}, which leave none for an active one")
        self._check_outputs(message.grads, group, TensorRole.DELTA_GRAD)
        self.grads_sent.add(group)
        if message.answer:
            self.unanswered.add(group)

    def _check_input_grad(self, message: m.GroupInputGrad) -> None:
        if message.group not in self.unanswered:
            raise ViolationError("an input gradient that nobody asked for")
        width = self._shapes.crossings[message.group].input_width
        self._shapes.check(message.grad_hidden_states, TensorRole.INPUT_GRAD, (self.rows, width))
        self.unanswered.remove(message.group)

    def _check_outputs(self, tensors: Sequence[WireTensor], group: int, role: TensorRole) -> None:
        widths = self._shapes.crossings[group].output_widths
        self._shapes.check_all(tensors, role, [(self.rows, width) for width in widths])

    def _backward_state(self) -> State:
        is_finished = len(self.grads_sent) == self.gradients and not self.unanswered
        return State.IDLE if is_finished else State.BACKWARD


def does_exchange(begun: m.Embeddings) -> bool:
    """Whether groups take part in a micro-batch: not in the modes ``basis`` and ``encode``, and not where no adapter
    acts on any token and nothing is trained, as in the beginning of a prompt."""
    if begun.mode == "encode":
        return False
    if begun.mode in m.WITHOUT_GRADIENTS:
        return begun.crossing_positions is None or begun.crossing_positions.shape[0] > 0
    return begun.mode != "basis"


def check_embeddings(message: m.Embeddings, shapes: Shapes) -> None:
    """Raise ``ViolationError`` unless a micro-batch may begin so, as far as its own shapes and numbers say."""
    welcome = shapes.welcome
    if (message.hidden_states is None) is (message.token_ids is None):
        raise ViolationError("neither embeddings nor token ids, or both")
    if message.hidden_states is not None:
        shapes.check(message.hidden_states, TensorRole.EMBEDDINGS, (None, welcome.embedding_size))
    if message.token_ids is not None:
        message.token_ids.check("int32", (None,))
    message.sequence_lengths.check("int32", (None,))
    tokens, lengths = message.tokens, message.sequence_lengths.data
    if not 0 < tokens <= welcome.max_tokens:
        raise ViolationError(f"{tokens} tokens; at most {welcome.max_tokens} fit", m.ErrorCode.LIMIT)
    if not lengths.size or lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != tokens:
        raise ViolationError("sequence lengths that do not add up to the tokens")
    counted = counted_tokens(lengths, packs=welcome.packs)
    if counted > welcome.max_tokens:
        text = f"{tokens} tokens count as {counted} with their padding; at most {welcome.max_tokens} fit"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if lengths.max() > welcome.max_sequence_length:
        limit = welcome.max_sequence_length
        raise ViolationError(f"a sequence of {lengths.max()} tokens; at most {limit} fit", m.ErrorCode.LIMIT)
    _check_positions(message.label_positions, tokens, "label positions")
    if (message.mode == "encode") is bool(message.label_positions.shape[0]):
        raise ViolationError("no label positions, or some in the mode encode")
    if message.mode == "encode" and lengths.size > m.MAX_ENCODED_SEQUENCES:
        text = f"{lengths.size} sequences in the mode encode; at most {m.MAX_ENCODED_SEQUENCES} fit"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if message.mode == "encode" and (message.crossing_positions or message.examples):
        raise ViolationError("crossing positions, or examples, in the mode encode")
    if message.crossing_positions is not None:
        _check_positions(message.crossing_positions, tokens, "crossing positions")
    if message.examples is not None:
        message.examples.check("int32", (lengths.size,))
    if (message.mode == "decode") is (message.position is None) or (message.mode == "decode" and lengths.size > 1):
        raise ViolationError("a position belongs to the one sequence of the mode decode")


def check_position(begun: m.Embeddings, context_length: int, cached_tokens: int) -> None:
    """Raise ``ViolationError`` unless C, which holds keys and values of ``cached_tokens``, can go on from there with
    these, in the mode ``decode``."""
    if not context_length:
        raise ViolationError("a micro-batch of the mode decode, in a session that has no context length")
    assert begun.position is not None
    if begun.position > cached_tokens:
        raise ViolationError(f"tokens from position {begun.position} on, where only {cached_tokens} are held")
    if begun.position + begun.tokens > context_length:
        text = f"a context of {begun.position + begun.tokens} tokens; this session has room for "
        raise ViolationError(f"{text}{context_length}", m.ErrorCode.LIMIT)


def _check_positions(tensor: WireTensor, tokens: int, name: str) -> None:
    tensor.check("int32", (None,))
    positions = tensor.data
    if not positions.size:
        return
    if positions[0] < 0 or positions[-1] >= tokens or (positions[1:] <= positions[:-1]).any():
        raise ViolationError(f"{name} that are not ascending rows of the tokens")
