"""A base model's blocks at the last rows of each of several texts, against keys and values of their first rows.

::

    text 1   f f f f l l l        first rows: once, without gradients; of each block their keys and values are kept
    text 2   f f l l l l l        last rows: end to end, as often as wanted; they see the first rows of their own text,
    text 3   l l                  and of the last ones those before them

Where adapters act on the last rows only, nothing that they change reaches a first row, and only the last ones want
gradients. What a block is given beside hidden states is ``row_arguments.py``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from dlora.protocol.errors import ExportError
from dlora.protocol.text import first_line

from .layout import is_near, random_embeds
from .parts import BlockCall, ModelParts, first_output
from .row_arguments import BlockPlan, RowArguments, first_argument
from .text_attention import TextAttention

_TRIED: Final = ((5, 3), (9, 4), (4, 0), (7, 6))
"""What every model is tried with: tokens of a text, and how many of them are first rows."""


@dataclass(frozen=True)
class DividedTexts:
    """Texts end to end, each divided into first and last rows.

    Attributes:
        lengths: tokens of each; firsts: of each how many are first rows: none, or more, but not all.
    """

    lengths: tuple[int, ...]
    firsts: tuple[int, ...]

    @property
    def first_rows(self) -> list[Tensor]:
        """Of each text, int64."""
        return [torch.arange(first) for first in self.firsts]

    @property
    def last_rows(self) -> list[Tensor]:
        """Of each text, int64."""
        return [torch.arange(first, length) for first, length in zip(self.firsts, self.lengths, strict=True)]

    def among_all(self, rows: Sequence[Tensor]) -> Tensor:
        """Where rows of each text lie among those of all texts, int64."""
        starts = accumulate(self.lengths[:-1], initial=0)
        return torch.cat([each + start for each, start in zip(rows, starts, strict=True)])


class RowBlocks:
    """Runs blocks at some rows, in several threads at once.

    Make one for a model: it is tried once, on a few tokens, against all rows.

    Attributes:
        attends_by_text: whether attention takes each text by itself, and not all of them under a mask.

    Raises ``ExportError`` where a family's blocks need something that does not go by rows.
    """

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts
        self.base = parts.base
        self.attends_by_text = False
        try:
            with torch.no_grad():
                calls = [self._calls(torch.zeros(1, length, self.base.embedding_size)) for length in (5, 8)]
                self._plans = [BlockPlan.of(*each) for each in zip(*calls, strict=True)]
                is_same = self._try()
        except Exception as error:  # whatever a family does with what it does not know
            self._refuse(f"{type(error).__name__}: {first_line(error)}")
        if not is_same:
            self._refuse("it gives something else there than among all rows")

    @classmethod
    def of(cls, parts: ModelParts | None) -> RowBlocks | None:
        """None where the model cannot be run so."""
        try:
            return None if parts is None else cls(parts)
        except ExportError:
            return None

    def begin(self, embeds: Tensor, texts: DividedTexts, lowest: int) -> LastRows:
        """Run all rows through all blocks, without gradients, and keep what the last rows need to run again from the
        block ``lowest`` on.

        Args:
            embeds: (tokens, embedding_size), of the texts, end to end.
        """
        device, no_rows = self.base.device, [torch.arange(0)] * len(texts.lengths)
        with torch.no_grad():
            calls = [self._calls(text[None]) for text in embeds.split(texts.lengths)]
            given = [[plan.others(call) for plan, call in zip(self._plans, text, strict=True)] for text in calls]
            every = RowArguments(given, [torch.arange(length) for length in texts.lengths], no_rows, device)
            hidden_states = torch.cat([first_argument(text[0]) for text in calls], 1)
            firsts, lasts = (texts.among_all(rows).to(device) for rows in (texts.first_rows, texts.last_rows))
            hidden_states = self.run(hidden_states, every, _Past(firsts[:0]), end=lowest)
            past = _Past(firsts)
            self.run(hidden_states, every, past, begin=lowest)
        past.complete(texts.firsts, [len(rows) for rows in texts.last_rows])
        arguments = RowArguments(given, texts.last_rows, texts.first_rows, device)
        return LastRows(self, arguments, hidden_states.index_select(1, lasts), lowest, past)

    def run(
        self, hidden_states: Tensor, arguments: RowArguments, past: _Past, *, begin: int = 0, end: int | None = None
    ) -> Tensor:
        """The blocks ``begin`` to ``end - 1``, or to the last, at the rows of the arguments: (1, rows, width)."""
        with TextAttention(*arguments.counts) as attention:
            for index, plan in list(enumerate(self._plans))[begin:end]:
                given = {plan.hidden_states: hidden_states, plan.cache: past}
                hidden_states = first_output(plan.forward(**arguments.of(index, plan), **given))
        self.attends_by_text = self.attends_by_text or attention.has_run
        return hidden_states

    def finish(self, hidden_states: Tensor) -> Tensor:
        """The final norm."""
        return self._parts.run(hidden_states, begin=self.base.blocks)

    def _calls(self, inputs_embeds: Tensor) -> list[BlockCall]:
        """How the decoder calls each block for one text; what it gives the first one is what goes into it."""
        calls: list[BlockCall] = []

        def run_block(index: int, call: BlockCall) -> Any:
            calls.append(call)
            return self._parts.left_out(index, first_argument(call))

        with torch.no_grad():
            self._parts.run_calls(run_block, inputs_embeds.to(self.base.device, self.base.dtype))
        return calls

    def _try(self) -> bool:
        """Whether blocks give at last rows what they give among all rows, from the first block on and from the middle
        on."""
        base = self.base
        lengths, firsts = zip(*_TRIED, strict=True)
        texts = DividedTexts(lengths, firsts)
        embeds = random_embeds(base, sum(lengths))[0]
        each = zip(embeds.split(lengths), firsts, strict=True)
        wanted = torch.cat([base.last_hidden_state(text[None].clone())[:, first:] for text, first in each], 1)
        return all(is_near(self.begin(embeds.clone(), texts, low).run(), wanted) for low in (0, base.blocks // 2))

    def _refuse(self, reason: str) -> NoReturn:
        raise ExportError(f"{self.base.name} ({self.base.architecture}) cannot be run at some rows: {reason}")


class LastRows:
    """Last rows of texts whose first rows have run.

    Args:
        arguments: of the blocks at these rows.
        hidden_states: (1, rows, width), what goes into the block ``lowest``.
    """

    def __init__(
        self, blocks: RowBlocks, arguments: RowArguments, hidden_states: Tensor, lowest: int, past: _Past
    ) -> None:
        self._blocks = blocks
        self._arguments = arguments
        self._hidden_states = hidden_states
        self._lowest = lowest
        self._past = past

    def run(self, *, requires_grad: bool = False) -> Tensor:
        """The last hidden states, (1, rows, hidden_size). It can be run again.

        ``requires_grad``: whether what goes into the lowest block is to have a gradient.
        """
        into = self._hidden_states.clone().requires_grad_() if requires_grad else self._hidden_states
        return self._blocks.finish(self._blocks.run(into, self._arguments, self._past, begin=self._lowest))

    def kept_bytes(self, block: int) -> int:
        """Of the keys and values of first rows in this block and those after it."""
        return self._past.nbytes(block)


class _Past:
    """A cache, as blocks see one. At first it keeps the keys and values of first rows; then it puts those of each text
    before the ones of its last rows.

    Not transformers' own: what is appended is kept nowhere, so that gradients go through it and the same rows can run
    again.

    Args:
        firsts: int64, where first rows lie among the rows that run at first.
    """

    def __init__(self, firsts: Tensor) -> None:
        self._firsts = firsts
        self._counts: tuple[list[int], list[int]] | None = None
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def complete(self, firsts: Sequence[int], lasts: Sequence[int]) -> None:
        """From now on the last rows run. Of each text how many rows of both there are."""
        self._counts = list(firsts), list(lasts)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values that a block's rows look at."""
        if self._counts is None:
            if len(self._firsts):
                keys, values = (each.index_select(-2, self._firsts) for each in (key_states, value_states))
                self._held[layer_idx] = keys, values
            return key_states, value_states
        if layer_idx not in self._held:
            return key_states, value_states
        pairs = zip(self._held[layer_idx], (key_states, value_states), strict=True)
        return tuple(_interleaved(held, new, *self._counts) for held, new in pairs)

    def nbytes(self, block: int) -> int:
        """Bytes that it holds of this block and those after it."""
        return sum(each.nbytes for index, pair in self._held.items() if index >= block for each in pair)


def _interleaved(firsts: Tensor, lasts: Tensor, first_counts: list[int], last_counts: list[int]) -> Tensor:
    """Of each text its first rows, and then its last ones."""
    texts = zip(firsts.split(first_counts, -2), lasts.split(last_counts, -2), strict=True)
    return torch.cat([part for text in texts for part in text], -2)
