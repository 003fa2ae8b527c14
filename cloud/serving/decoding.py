"""One micro-batch of the mode ``decode``: tokens that go on in a session's context, and some that the server guesses.

Guesses are what the base model would say, one token after the other, or the model with an adapter that was lent: the
device checks each against what it chooses itself. What it does not choose is forgotten with the next micro-batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlora.cloud.exchange.differences import Differences
from dlora.cloud.exchange.exchange import MicroBatchExchange
from dlora.cloud.exchange.forward import Forward, Forwards
from dlora.cloud.exchange.passes import PassExchange, PassRunner
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.exchange.target_modules import running_targets
from dlora.cloud.model.context import Context, Ways
from dlora.cloud.model.layout import Layout
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.protocol import messages as m
from dlora.protocol.adapters import crossings
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates, Key, does_exchange
from dlora.protocol.passes import forward_waves

from .base_tokens import BaseTokens
from .micro_batch_device import MicroBatchDevice
from .pass_device import PassDevice, exchanged_bytes


def context_ways(purpose: m.Use | m.Encode, groups: Sequence[GroupSpec]) -> Ways:
    """How the blocks of a session's context run."""
    if isinstance(purpose, m.Encode):
        return Ways(purpose.blocks, has_base=purpose.drafts is not None, adapted=0)
    if not groups or purpose.lends:
        return Ways(0, has_base=True, adapted=0)
    if purpose.passes is None and purpose.drafts is None:
        return Ways(0, has_base=False, adapted=1)
    adapted = 1 if purpose.passes is None else len(forward_waves(range(len(groups)), purpose.passes))
    return Ways(min(group.block for group in groups), has_base=True, adapted=adapted)


@dataclass(frozen=True)
class Ahead:
    """Tokens that the server has gone on with before the device has asked for it.

    Attributes:
        position: of the first of them; tokens: the one that it expects, and what it guesses after it.
        inputs: what both sides know of what groups read at these.
    """

    position: int
    tokens: BaseTokens
    inputs: Differences


@dataclass
class SessionContext:
    """What a session keeps of its context from one micro-batch to the next.

    Attributes:
        lock: of the micro-batch that goes on in it. A device of somebody else's may send the next one while the server
            goes on ahead.
        guessed: where tokens lie in it that the server has guessed, until the device has said from where it goes on.
    """

    context: Context
    ahead: Ahead | None = None
    guessed: range = range(0)
    lock: threading.Lock = field(default_factory=threading.Lock)


class DecodeMicroBatch:
    """One micro-batch of the mode ``decode``.

    Args:
        held: of the session; changed when it runs.
        begun: its first message; group_states: what takes part.

    Attributes:
        codecs: how its tensors cross; lock: of the session's context, to be held while it runs.
    """

    def __init__(
        self, model: SessionModel, held: SessionContext, begun: m.Embeddings, group_states: GroupStates
    ) -> None:
        assert begun.decoding is not None
        self.key: Key = (begun.step, begun.micro_batch)
        self.codecs = model.opening.codecs_of(begun.mode)
        self._model = model
        self.lock = held.lock
        self._held = held
        self._context = held.context
        self._embeds = model.embeddings(begun)
        self._as_ids = begun.token_ids is not None
        self._decoding = begun.decoding
        self._passes = begun.passes
        self._states = group_states if does_exchange(begun) else GroupStates()
        self._likeliest: list[int] = []
        self._labelled = torch.from_numpy(begun.label_positions.data).long()
        self._crossing: Tensor | None = None
        if begun.crossing_positions is not None:
            self._crossing = torch.from_numpy(begun.crossing_positions.data).long()

    def may_share(self, most_tokens: int) -> bool:
        """Whether its forward passes may run side by side with those of others, in contexts of so many tokens: of
        answers, where no device is waited for within a pass."""
        is_live = self._context.ways.adapted > 0 and self._passes is None
        is_answer = isinstance(self._model.opening.purpose, m.Use)
        return is_answer and not is_live and self._context.room <= most_tokens

    @property
    def _acts_from(self) -> int:
        """In passes, or of an adapter that was lent: the first of its tokens at which adapters act; their number where
        they act at none."""
        if self._crossing is None:
            return 0
        return int(self._crossing[0]) if len(self._crossing) else len(self._embeds)

    def estimate(self, live_bytes: LiveBytes) -> int:
        """What it takes of memory."""
        rows = len(self._embeds) + self._decoding.guesses
        embeds = torch.empty(1, rows, self._embeds.shape[1], device="meta")
        found = live_bytes.estimate(Layout(embeds, None, None, None), None, self._decoding.position + rows)
        return found if self._passes is None else found + exchanged_bytes(self._model, self._states.live, rows)

    def run(self, device: MicroBatchDevice) -> None:
        """Raises what ``device`` does, and ``NonFiniteError``."""
        with torch.no_grad():
            ahead = self._find_ahead()
            self._count_guesses(device, ahead)
            self._held.ahead = None
            tokens = self._new_tokens() if ahead is None else ahead.tokens
            if ahead is None:
                device.run(self._take_in(device, tokens))
            if isinstance(self._model.opening.purpose, m.Encode):
                device.run(self._answer(device, tokens, tokens.hidden_states))
            elif self._passes is not None and self._states.live:
                self._run_passes(device, tokens, ahead, self._passes)
            elif self._passes is None and self._context.ways.adapted:
                device.run(self._answer(device, tokens, self._run_live(device, tokens)))
            else:
                device.run(self._run_base(device, tokens))

    def _count_guesses(self, device: MicroBatchDevice, ahead: Ahead | None) -> None:
        """Of the tokens that were guessed, those before the position that the device goes on from are right. Where it
        goes on from an earlier text, nobody knows."""
        held, guessed, position = self._held, self._held.guessed, self._decoding.position
        if position >= guessed.start:
            device.count_guesses(len(guessed), len(range(guessed.start, min(guessed.stop, position))))
        held.guessed = range(0)
        if ahead is not None:
            held.guessed = range(position + 1, position + 1 + len(ahead.tokens.ids))
        elif held.ahead is not None and position >= held.ahead.position:  # it has chosen another token before these
            device.count_guesses(len(held.ahead.tokens.ids), 0)

    def _find_ahead(self) -> Ahead | None:
        """What the server has gone on with, where the device goes on with the same."""
        ahead = self._held.ahead
        if ahead is None or not self._decoding.is_ahead or ahead.position != self._decoding.position:
            return None
        return ahead if torch.equal(ahead.tokens.embeds, self._embeds) else None

    def _new_tokens(self) -> BaseTokens:
        in_passes = self._passes is not None
        return BaseTokens(self._model, self._context, self._states, in_passes=in_passes, as_ids=self._as_ids)

    def _take_in(self, device: MicroBatchDevice, tokens: BaseTokens) -> Forwards:
        """The tokens, and those that are guessed after them."""
        self._context.crop(self._decoding.position)
        drafts = self._decoding.drafts
        yield from tokens.take(self._embeds, self._acts_from, goes_on=drafts > 0)
        if drafts:
            began = device.clock()
            yield from tokens.guess(drafts)
            first = self._decoding.position + len(self._embeds)
            self._held.guessed = range(first, first + len(tokens.ids))
            device.send_drafts(tokens.ids, device.clock() - began)

    def _run_base(self, device: MicroBatchDevice, tokens: BaseTokens) -> Forwards:
        """Where the device's adapters act on nothing."""
        yield from tokens.run()
        self._take_base_rows()
        yield from self._answer(device, tokens, tokens.last_hidden_states)

    def _take_base_rows(self) -> None:
        """Rows at which no adapter acts are those of the base model in each pass."""
        for number in range(self._context.ways.adapted):
            self._context.take_base_rows(number, self._decoding.position + self._acts_from)

    def _run_live(self, device: MicroBatchDevice, tokens: BaseTokens) -> Tensor:
        model, rows = self._model, self._crossing
        if rows is not None and tokens.ids:
            rows = torch.cat([rows, torch.arange(len(self._embeds), len(self._embeds) + len(tokens.ids))])
        exchange = MicroBatchExchange(
            device, model.base, model.groups, model.sites,
            live=self._states.live, trained=(), given={}, rows=None if rows is None else rows.to(model.base.device),
        )  # fmt: skip
        with running_targets(exchange):
            return self._context.adapted(0, tokens.hidden_states).run()

    def _run_passes(self, device: MicroBatchDevice, tokens: BaseTokens, ahead: Ahead | None, passes: m.Passes) -> None:
        model, live = self._model, self._states.live
        acting = tokens.hidden_states[:, self._acts_from :]
        self._take_base_rows()
        exchange = PassExchange(
            self._states, passes, lambda outputs: model.pass_runner(live, outputs=outputs), trains=False
        )
        groups_device = PassDevice(
            device, self.codecs, crossings(model.adapter, model.groups), acting.shape[1], model.base.dtype,
            model.base.device, ahead=None if ahead is None else ahead.inputs, sends_early=self._decoding.is_ahead,
        )  # fmt: skip
        passes_left = list(reversed(range(self._context.ways.adapted)))

        def run(runner: PassRunner) -> Tensor:
            part = self._context.adapted(passes_left.pop(), acting)
            forward = Forward(part, runner, None if passes_left else self._expected_from)
            device.run(iter([forward]) if passes_left else self._run_last_pass(device, tokens, forward))
            return forward.hidden_states

        exchange.forward(groups_device, tokens.reads, run)

    def _run_last_pass(self, device: MicroBatchDevice, tokens: BaseTokens, forward: Forward) -> Forwards:
        yield forward
        self._likeliest = forward.likeliest
        before = tokens.last_hidden_states[:, : self._acts_from]
        yield from self._answer(device, tokens, torch.cat([before, forward.hidden_states], 1))

    def _answer(self, device: MicroBatchDevice, tokens: BaseTokens, hidden_states: Tensor) -> Forwards:
        """Send what the device gets of all tokens, (1, tokens, width), and go on with the one that it should choose."""
        guessed = torch.arange(len(self._embeds), hidden_states.shape[1])
        rows = torch.cat([self._labelled, guessed]).to(hidden_states.device)
        expected = self._expect(tokens.ids)
        device.send_labelled(hidden_states[0].index_select(0, rows), 0, None if expected is None else expected[1])
        if expected is not None:
            yield from self._go_on_ahead(device, *expected)

    @property
    def _expected_from(self) -> int | None:
        """Of the tokens at which adapters act, the one whose likeliest next token is gone on with: where that is to be,
        and the device checks no tokens but those that the server has guessed."""
        last = len(self._embeds) - 1
        is_last = self._acts_from <= last <= int(self._labelled[0])
        return last - self._acts_from if self._decoding.ahead is not None and is_last else None

    def _expect(self, guessed: Sequence[int]) -> tuple[int, int] | None:
        """How long the context will be before the token that the device should choose next, and that token; None where
        it is not gone on with."""
        if not self._likeliest:
            return None
        right = 0
        while right < len(guessed) and guessed[right] == self._likeliest[right]:
            right += 1
        return self._decoding.position + len(self._embeds) + right, self._likeliest[right]

    def _go_on_ahead(self, device: MicroBatchDevice, length: int, token: int) -> Forwards:
        """Take in the token that the device should choose, and guesses after it, and send what groups read of them."""
        model, began = self._model, device.clock()
        assert self._decoding.ahead is not None
        self._context.crop(length)
        tokens = self._new_tokens()
        yield from tokens.take_expected(token, self._decoding.ahead)
        device.send_drafts(tokens.ids, device.clock() - began)
        widths = crossings(model.adapter, model.groups)
        groups_device = PassDevice(
            device, self.codecs, widths, 1 + len(tokens.ids), model.base.dtype, model.base.device
        )
        self._held.ahead = Ahead(length, tokens, groups_device.send_ahead(tokens.reads))
