"""One micro-batch of a conversation, as both sides hold it: the order and the shapes of its messages.

FORWARD, then LOSS and BACKWARD if it trains. Groups are asked wave after wave (``passes.py``), or one by one where they
are asked live: all that take part, in execution order. Every active one is given its gradients: a server that leaves
some out would train nothing, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from . import messages as m
from .adapters import Crossing
from .errors import ViolationError
from .passes import MOST_PIECES, forward_waves
from .states import TRANSITIONS, Side, State
from .tensors import WireTensor
from .wire_codecs import FOR_ALL, Codecs, TensorRole

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
        if role is None and tensor.dtype not in FOR_ALL:
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
        decoding: how its tokens go on in a context, in the mode ``decode``.
        lengths: of its sequences, in the mode ``encode``.
        exchanges: whether groups take part.
        passes: None where groups are asked live.
        ahead: of how many tokens C has sent what groups read before E has asked for it, after the last hidden states.
        sends_early: whether E sends what all groups write in the first wave before it is asked.
        early: of how many it has.
        asked, answered: of how many groups C has sent what they read, and E what they write, in all waves together.
        gradients: of how many groups gradients will be sent, in all backward passes together; still_to_come: of them.
        backward_pass: that is under way; grads_sent: the groups that have had theirs in it.
        unanswered: groups whose input gradient C waits for.
        goes_on: whether the last message was sent without waiting for the other side: a further piece of a pass, or
            what E sends early.
    """

    def __init__(self, begun: m.Embeddings, shapes: Shapes) -> None:
        self.key: Key = (begun.step, begun.micro_batch)
        self.mode = begun.mode
        self.trains = begun.mode == "train"
        self.state = State.FORWARD
        self.tokens = begun.tokens
        self.rows = begun.rows
        self.labelled = begun.label_positions.shape[0]
        self.decoding = begun.decoding
        self.lengths = tuple(begun.sequence_lengths.data.tolist()) if begun.mode == "encode" else ()
        self.exchanges = does_exchange(begun)
        self.passes = begun.passes
        self.sends_early = begun.sends_early
        self.ahead = 0
        self.early = 0
        self.asked = 0
        self.answered = 0
        self.gradients = 0
        self.still_to_come = 0
        self.backward_pass = 0
        self.grads_sent: set[int] = set()
        self.unanswered: set[int] = set()
        self.goes_on = False
        self._has_drafted = False
        self._asked_ahead = 0  # groups
        self._early_messages = 0
        self._asks_back = False  # for an input gradient, in this backward pass
        self._grads_before: set[int] = set()  # groups, in the backward pass before
        self._have_answered: set[int] = set()  # groups, in any backward pass
        self._shapes = shapes

    def advance(self, message: m.ExchangeMessage, sender: Side, groups: GroupStates) -> None:
        """Take the next message. Raises ``ViolationError``; nothing has changed then."""
        allowed_sender, next_state = TRANSITIONS[self.state].get(type(message), (None, self.state))
        if allowed_sender is not sender or (self.mode == "encode") is not isinstance(message, m.EncodedHiddenStates):
            raise ViolationError("not now")
        if sender is Side.CLOUD and self.sends_early and self.early < len(groups.live):
            raise ViolationError(f"only {self.early} of {len(groups.live)} groups have written early")
        goes_on = False
        match message:
            case m.EncodedHiddenStates():
                self._check_encoded(message)
            case m.DraftTokens():
                self._check_drafts(message)
                goes_on = True
            case m.GroupInput() if self.state is State.AHEAD:
                self._check_input_ahead(message, groups)
                next_state = State.IDLE if self._asked_ahead == len(groups.live) else State.AHEAD
                goes_on = True
            case m.GroupInput():
                goes_on = self._check_input(message, groups)
            case m.GroupDelta():
                goes_on = self._check_delta(message, groups)
            case m.LabelledHiddenStates():
                self._check_labelled(message, groups)
                next_state = State.LOSS if message.gradients or self.mode == "basis" else State.IDLE
                if message.next_token is not None:
                    next_state = self._begin_ahead(groups)
            case m.GradHiddenStates():
                shape = (self.labelled, self._shapes.welcome.hidden_size)
                self._shapes.check(message.grad_hidden_states, TensorRole.LAST_HIDDEN_STATES_GRAD, shape)
                next_state = State.IDLE if self.mode == "basis" else next_state
            case m.GroupGrad():
                goes_on = self._check_grad(message, groups)
                next_state = self._backward_state()
            case m.GroupInputGrad():
                self._check_input_grad(message)
                next_state = self._backward_state()
        self.state, self.goes_on = next_state, goes_on

    def _check_input(self, message: m.GroupInput, groups: GroupStates) -> bool:
        """Whether it goes on with a wave."""
        if unknown := set(message.groups) - set(groups.live):
            raise ViolationError(f"group {min(unknown)} does not exist, or belongs to a killed unit")
        is_first_wave = message.groups[0] == groups.live[0]  # no later one asks the lowest
        asked, answered = (self.asked, self.answered) if is_first_wave else self._with_early()
        begins, number, wave = self._wave_after(asked, groups)
        if answered < begins:
            raise ViolationError(f"group {message.groups[0]} before the groups that were asked have written")
        if message.groups != wave[: len(message.groups)]:
            raise ViolationError(
                f"group {message.groups[0]} out of turn; all live groups are asked, once, in execution order"
            )
        role = TensorRole.DIFFERENCE if number else TensorRole.GROUP_INPUT
        self._check_inputs(message.hidden_states, message.groups, role)
        self.asked, self.answered = asked + len(message.groups), answered
        return asked > begins

    def _check_delta(self, message: m.GroupDelta, groups: GroupStates) -> bool:
        """Whether E has not waited to be asked."""
        if self.sends_early and self.early < len(groups.live):
            wanted = groups.live[self.early :]
            if message.groups != wanted[: len(message.groups)]:
                raise ViolationError(f"group {message.groups[0]} early, when group {wanted[0]} comes next")
            if self._early_messages == MOST_PIECES:
                raise ViolationError(f"more than {MOST_PIECES} messages early")
            self._check_outputs(message.deltas, message.groups, TensorRole.DELTA)
            self.early += len(message.groups)
            self._early_messages += 1
            return True
        _, number, wave = self._wave_after(self.answered, groups)
        awaited = wave[: self.asked - self.answered]
        if message.groups != awaited[: len(message.groups)]:
            text = f"group {awaited[0]} was asked" if awaited else "none was asked"
            raise ViolationError(f"group {message.groups[0]} when {text}")
        self._check_outputs(message.deltas, message.groups, TensorRole.DIFFERENCE if number else TensorRole.DELTA)
        self.answered += len(message.groups)
        return False

    def _with_early(self) -> tuple[int, int]:
        """``asked`` and ``answered`` where C goes on, with what E has sent early, unless C has asked for that again."""
        if self.sends_early and not self.asked:
            return self.early, self.early
        return self.asked, self.answered

    def _wave_after(self, done: int, groups: GroupStates) -> tuple[int, int, tuple[int, ...]]:
        """The wave in which so many groups end: how many come before it, which pass it is, and what is left of it."""
        begins = 0
        for number, wave in enumerate(forward_waves(groups.live, self.passes)):
            if done < begins + len(wave):
                return begins, number if self.passes else 0, wave[done - begins :]
            begins += len(wave)
        return begins, 0, ()

    def _check_labelled(self, message: m.LabelledHiddenStates, groups: GroupStates) -> None:
        live, active, _ = groups
        total = sum(map(len, forward_waves(live, self.passes)))
        _, answered = self._with_early()
        if answered < total:
            raise ViolationError(f"only {answered} of {total} groups have written")
        width = self._shapes.encoded_width or self._shapes.welcome.hidden_size
        self._shapes.check(message.hidden_states, TensorRole.LAST_HIDDEN_STATES, (self.labelled, width))
        most = len(live) * (self.passes.backward if self.passes else 1) if self.trains else 0
        if message.gradients > most:
            raise ViolationError("more gradients than groups took part")
        if self.trains and message.gradients < len(active):
            raise ViolationError(f"{message.gradients} gradients for {len(active)} active groups")
        self.gradients = self.still_to_come = message.gradients

    def _check_drafts(self, message: m.DraftTokens) -> None:
        """Of a micro-batch's own, before anything else, or ahead."""
        is_ahead = self.state is State.AHEAD
        asked = m.Decoding(0) if self.decoding is None else self.decoding
        most = (asked.ahead if is_ahead else asked.drafts) or 0
        message.token_ids.check("int32", (None,))
        count = message.token_ids.shape[0]
        if self._has_drafted or self.asked or count > most or not (most or is_ahead):
            raise ViolationError(f"{count} guessed tokens, too late or where at most {most} were asked for")
        if count and message.token_ids.data.min() < 0:
            raise ViolationError("a guessed token below 0")
        self._has_drafted = True
        if is_ahead:
            self.ahead = 1 + count
            return
        self.tokens += count
        self.labelled += count
        self.rows += count

    def _begin_ahead(self, groups: GroupStates) -> State:
        if self.decoding is None or self.decoding.ahead is None or not groups.live:
            raise ViolationError("a next token that E has not asked for")
        self._has_drafted, self.asked = False, 0
        return State.AHEAD

    def _check_input_ahead(self, message: m.GroupInput, groups: GroupStates) -> None:
        wanted = groups.live[self._asked_ahead :]
        if not self.ahead or message.groups != wanted[: len(message.groups)]:
            raise ViolationError(f"group {message.groups[0]} ahead, out of turn or before the guessed tokens")
        width = self._crossing_of(message.groups).input_width
        shape = (len(message.groups) * self.ahead, width)
        self._shapes.check(message.hidden_states, TensorRole.GROUP_INPUT, shape)
        self._asked_ahead += len(message.groups)

    def _check_encoded(self, message: m.EncodedHiddenStates) -> None:
        if len(message.hidden_states) != len(self.lengths):
            raise ViolationError(f"{len(message.hidden_states)} tensors of {len(self.lengths)} sequences")
        for tensor, length in zip(message.hidden_states, self.lengths, strict=True):
            self._shapes.check(tensor, TensorRole.LAST_HIDDEN_STATES, (length, self._shapes.encoded_width))

    def _check_grad(self, message: m.GroupGrad, groups: GroupStates) -> bool:
        """Whether it goes on with a backward pass, of several."""
        number, of_message = message.backward_pass, set(message.groups)
        self._check_one(message.groups)
        last = self.passes.backward - 1 if self.passes else 0
        begins = number == self.backward_pass + 1 <= last and bool(self.grads_sent)
        if number != self.backward_pass and not begins:
            raise ViolationError(f"gradients of backward pass {number} in backward pass {self.backward_pass}")
        if begins:
            if self.unanswered:
                raise ViolationError(f"another backward pass before group {min(self.unanswered)} has answered")
            self._check_all_sent(self.grads_sent, self.backward_pass, groups)
        sent, before = (set(), self.grads_sent) if begins else (self.grads_sent, self._grads_before)
        if number and (unknown := of_message - before):
            raise ViolationError(f"gradients of group {min(unknown)}, which had none in the pass before")
        if number and message.answer and (unknown := of_message - self._have_answered):
            raise ViolationError(f"group {min(unknown)} is asked back, which was not in the pass before")
        if again := of_message & sent or of_message - set(groups.live):
            raise ViolationError(f"gradients of group {min(again)}, which did not take part, or again")
        left = self.still_to_come - len(message.groups)
        if left < 0 or len(of_message) < len(message.groups):
            raise ViolationError("more gradients than were announced")
        if message.answer and self.passes and number == last:
            raise ViolationError("an input gradient in the last backward pass")
        sent, asks_back = sent | of_message, message.answer or (self._asks_back and not begins)
        if self.passes is None:
            if len(groups.active - sent) > left:
                raise ViolationError(f"gradients of group {message.groups[0]}, which leave none for an active one")
        elif not left:
            if asks_back:
                raise ViolationError("an input gradient that no other backward pass follows")
            self._check_all_sent(sent, number, groups)
        self._check_outputs(message.grads, message.groups, TensorRole.DIFFERENCE if number else TensorRole.DELTA_GRAD)
        self.backward_pass, self.grads_sent, self.still_to_come, self._asks_back = number, sent, left, asks_back
        self._grads_before = before
        self.unanswered |= of_message if message.answer else set()
        return self.passes is not None and len(sent) > len(of_message)

    def _check_all_sent(self, sent: Collection[int], number: int, groups: GroupStates) -> None:
        """Raise ``ViolationError`` where a backward pass ends without the gradients of an active group."""
        # Those of the highest are the same in all passes.
        needed = groups.active - set(sent) - (set(groups.live[-1:]) if number else set())
        if needed:
            raise ViolationError(f"backward pass {number} without the gradients of group {min(needed)}")

    def _check_input_grad(self, message: m.GroupInputGrad) -> None:
        of_message = set(message.groups)
        self._check_one(message.groups)
        if len(of_message) < len(message.groups) or not of_message <= self.unanswered:
            raise ViolationError("an input gradient that nobody asked for")
        role = TensorRole.DIFFERENCE if self.backward_pass else TensorRole.INPUT_GRAD
        self._check_inputs(message.grad_hidden_states, message.groups, role)
        self.unanswered -= of_message
        self._have_answered |= of_message

    def _check_one(self, groups: Sequence[int]) -> None:
        if self.passes is None and len(groups) > 1:
            raise ViolationError("several groups at once where they are asked live")

    def _check_inputs(self, tensor: WireTensor, groups: Sequence[int], role: TensorRole) -> None:
        self._shapes.check(tensor, role, (len(groups) * self.rows, self._crossing_of(groups).input_width))

    def _check_outputs(self, tensors: Sequence[WireTensor], groups: Sequence[int], role: TensorRole) -> None:
        rows, widths = len(groups) * self.rows, self._crossing_of(groups).output_widths
        self._shapes.check_all(tensors, role, [(rows, width) for width in widths])

    def _crossing_of(self, groups: Sequence[int]) -> Crossing:
        """Of all of these, which are of the same widths."""
        first, *others = (self._shapes.crossings[group] for group in groups)
        if any(other != first for other in others):
            raise ViolationError("groups of other widths in one message")
        return first

    def _backward_state(self) -> State:
        return State.BACKWARD if self.still_to_come or self.unanswered else State.IDLE


def does_exchange(begun: m.Embeddings) -> bool:
    """Whether groups take part in a micro-batch: not in the modes ``basis`` and ``encode``, and not where no adapter
    acts on any token and nothing is trained, as in the beginning of a prompt."""
    if begun.mode == "encode":
        return False
    if begun.mode in m.WITHOUT_GRADIENTS:
        return begun.crossing_positions is None or begun.crossing_positions.shape[0] > 0
    return begun.mode != "basis"
