"""One micro-batch of the mode ``decode``: tokens that go on in a session's context, and some that the server guesses.

Guesses are what the base model would say, one token after the other, or the model with an adapter that was lent: the
device checks each against what it chooses itself. What it does not choose is forgotten with the next micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.cloud.exchange.differences import Differences
from dlora.cloud.exchange.exchange import MicroBatchExchange
from dlora.cloud.exchange.passes import PassExchange
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.exchange.target_modules import running_targets
from dlora.cloud.model.context import Context, Ways
from dlora.cloud.model.ends import find_head
from dlora.cloud.model.layout import Layout
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.protocol import messages as m
from dlora.protocol.adapters import crossings
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates, Key, does_exchange
from dlora.protocol.passes import forward_waves

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


class BaseTokens:
    """Tokens that go on in a context, in the base model alone, or with an adapter that was lent.

    Args:
        states: groups that the server applies; and those whose reads are wanted, where tokens run in passes. Without
            either the blocks from ``Ways.lowest`` on run when they are needed.
        as_ids: as ``SessionModel.embed`` takes it.

    Attributes:
        ids: of those that were guessed, the last ones.
        embeds: (tokens, embedding_size) of all; hidden_states: what came out of the first blocks; last_hidden_states:
            once all have run; (1, tokens, width) each.
    """

    def __init__(
        self, model: SessionModel, context: Context, states: GroupStates, *, in_passes: bool, as_ids: bool
    ) -> None:
        self.ids: list[int] = []
        self._model = model
        self._context = context
        self._reading = states.live if in_passes else ()
        self._given = states.given
        self._in_passes = in_passes
        self._as_ids = as_ids
        self._head = find_head(model.base)
        self._embeds: list[Tensor] = []
        self._hidden: list[Tensor] = []
        self._last: list[Tensor] = []
        self._reads: dict[int, list[Tensor]] = {group: [] for group in self._reading}
        self._not_run = 0  # of the last ones, through the other blocks

    @property
    def embeds(self) -> Tensor:
        return torch.cat(self._embeds)

    @property
    def hidden_states(self) -> Tensor:
        return torch.cat(self._hidden, 1)

    @property
    def last_hidden_states(self) -> Tensor:
        return torch.cat(self._last, 1)

    @property
    def reads(self) -> dict[int, Tensor]:
        """What each group reads at the tokens at which adapters act."""
        return {group: torch.cat(each) for group, each in self._reads.items()}

    def take(self, embeds: Tensor, acts_from: int = 0) -> None:
        """Take in tokens, (tokens, embedding_size); adapters act from number ``acts_from`` of these on."""
        self._embeds.append(embeds)
        self._hidden.append(self._context.run_first(embeds[None]))
        self._not_run += len(embeds)
        if (self._reading or self._given) and acts_from < len(embeds):
            self._run_groups(torch.arange(acts_from, len(embeds)) if acts_from else None)
        elif self._in_passes:
            self.run()

    def run(self) -> None:
        """Run all blocks on what was taken in."""
        if self._not_run:
            self._last.append(self._context.run_base()[:, -self._not_run :])
            self._not_run = 0

    def guess(self, count: int) -> None:
        """Take in so many tokens more, each the likeliest one after those before it."""
        for _ in range(count):
            self.run()
            (guessed,) = self.likeliest(self._last[-1][0, -1:])
            self.ids.append(guessed)
            self.take_guess(guessed)

    def take_guess(self, token: int) -> None:
        """Take in a token that the device has not sent, as it would embed it."""
        self.take(self._model.embed([token], as_ids=self._as_ids))

    def likeliest(self, last_hidden_states: Tensor) -> list[int]:
        """The token that is likeliest to follow each of these, (tokens, hidden_size)."""
        found: list[int] = self._head(last_hidden_states).argmax(-1).tolist()
        return found

    def _run_groups(self, rows: Tensor | None) -> None:
        runner = self._model.pass_runner(self._reading, self._given, rows)
        with running_targets(runner):
            self.run()
            for group, read in runner.reads.items():
                self._reads[group].append(read)


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
    """What a session keeps of its context from one micro-batch to the next."""

    context: Context
    ahead: Ahead | None = None


class DecodeMicroBatch:
    """One micro-batch of the mode ``decode``.

    Args:
        held: of the session; changed when it runs.
        begun: its first message; group_states: what takes part.

    Attributes:
        codecs: how its tensors cross.
    """

    def __init__(
        self, model: SessionModel, held: SessionContext, begun: m.Embeddings, group_states: GroupStates
    ) -> None:
        assert begun.decoding is not None
        self.key: Key = (begun.step, begun.micro_batch)
        self.codecs = model.opening.codecs_of(begun.mode)
        self._model = model
        self._held = held
        self._context = held.context
        self._embeds = model.embeddings(begun)
        self._as_ids = begun.token_ids is not None
        self._decoding = begun.decoding
        self._passes = begun.passes
        self._states = group_states if does_exchange(begun) else GroupStates()
        self._labelled = torch.from_numpy(begun.label_positions.data).long()
        self._crossing: Tensor | None = None
        if begun.crossing_positions is not None:
            self._crossing = torch.from_numpy(begun.crossing_positions.data).long()

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
            ahead, self._held.ahead = self._find_ahead(), None
            tokens = self._take_in(device) if ahead is None else ahead.tokens
            last = self._last_hidden_states(device, tokens, ahead)[0]
            guessed = torch.arange(len(self._embeds), len(last))
            labelled = last.index_select(0, torch.cat([self._labelled, guessed]).to(last.device))
            expected = self._expect(last, tokens)
            device.send_labelled(labelled, 0, None if expected is None else expected[1])
            if expected is not None:
                self._go_on_ahead(device, *expected)

    def _find_ahead(self) -> Ahead | None:
        """What the server has gone on with, where the device goes on with the same."""
        ahead = self._held.ahead
        if ahead is None or not self._decoding.is_ahead or ahead.position != self._decoding.position:
            return None
        return ahead if torch.equal(ahead.tokens.embeds, self._embeds) else None

    def _take_in(self, device: MicroBatchDevice) -> BaseTokens:
        """The tokens, and those that are guessed after them."""
        self._context.crop(self._decoding.position)
        tokens = self._new_tokens()
        tokens.take(self._embeds, self._acts_from)
        if self._decoding.drafts:
            began_s = device.computed_s
            tokens.guess(self._decoding.drafts)
            device.send_drafts(tokens.ids, device.computed_s - began_s)
        return tokens

    def _new_tokens(self) -> BaseTokens:
        in_passes = self._passes is not None
        return BaseTokens(self._model, self._context, self._states, in_passes=in_passes, as_ids=self._as_ids)

    def _last_hidden_states(self, device: MicroBatchDevice, tokens: BaseTokens, ahead: Ahead | None) -> Tensor:
        """What the device gets of all tokens, (1, tokens, width)."""
        model = self._model
        if isinstance(model.opening.purpose, m.Encode):
            return tokens.hidden_states
        if not self._context.ways.adapted:
            tokens.run()
            return tokens.last_hidden_states
        if self._passes is not None:
            return self._run_passes(device, tokens, ahead, self._passes)
        return self._run_live(device, tokens)

    def _run_live(self, device: MicroBatchDevice, tokens: BaseTokens) -> Tensor:
        model, rows = self._model, self._crossing
        if rows is not None and tokens.ids:
            rows = torch.cat([rows, torch.arange(len(self._embeds), len(self._embeds) + len(tokens.ids))])
        exchange = MicroBatchExchange(
            device, model.base, model.groups, model.sites,
            live=self._states.live, trained=(), given={}, rows=None if rows is None else rows.to(model.base.device),
        )  # fmt: skip
        with running_targets(exchange):
            return self._context.run_adapted(0, tokens.hidden_states)

    def _run_passes(
        self, device: MicroBatchDevice, tokens: BaseTokens, ahead: Ahead | None, passes: m.Passes
    ) -> Tensor:
        """Rows at which no adapter acts are those of the base model in each pass."""
        model, context, acts_from = self._model, self._context, self._acts_from
        last, acting = tokens.last_hidden_states, tokens.hidden_states[:, acts_from:]
        for number in range(context.ways.adapted):
            context.take_base_rows(number, self._decoding.position + acts_from)
        if not self._states.live:
            return last
        numbers, live = iter(range(context.ways.adapted)), self._states.live
        exchange = PassExchange(
            self._states, passes, lambda outputs: model.pass_runner(live, outputs=outputs), trains=False
        )
        groups_device = PassDevice(
            device, self.codecs, crossings(model.adapter, model.groups), acting.shape[1], model.base.dtype,
            model.base.device, ahead=None if ahead is None else ahead.inputs, sends_early=self._decoding.is_ahead,
        )  # fmt: skip
        adapted = exchange.forward(groups_device, tokens.reads, lambda: context.run_adapted(next(numbers), acting))
        return torch.cat([last[:, :acts_from], adapted], 1)

    def _expect(self, last: Tensor, tokens: BaseTokens) -> tuple[int, int] | None:
        """How long the context will be before the token that the device should choose next, and that token: where it is
        to be gone on with, and the device checks no tokens but those that the server has guessed."""
        certain = len(last) - len(tokens.ids)
        if self._decoding.ahead is None or not self._states.live or int(self._labelled[0]) < certain - 1:
            return None
        chosen = tokens.likeliest(last[certain - 1 :])
        right = 0
        while right < len(tokens.ids) and tokens.ids[right] == chosen[right]:
            right += 1
        return self._decoding.position + certain + right, chosen[right]

    def _go_on_ahead(self, device: MicroBatchDevice, length: int, token: int) -> None:
        """Take in the token that the device should choose, and guesses after it, and send what groups read of them."""
        model, began_s = self._model, device.computed_s
        assert self._decoding.ahead is not None
        self._context.crop(length)
        tokens = self._new_tokens()
        tokens.take_guess(token)
        tokens.guess(self._decoding.ahead)
        device.send_drafts(tokens.ids, device.computed_s - began_s)
        widths = crossings(model.adapter, model.groups)
        groups_device = PassDevice(
            device, self.codecs, widths, 1 + len(tokens.ids), model.base.dtype, model.base.device
        )
        self._held.ahead = Ahead(length, tokens, groups_device.send_ahead(tokens.reads))
