"""The base model in parts: from given hidden states, through some of its blocks, with a cache of keys and values.

::

    embeds ── what stands before the blocks ── 0 ── 1 ── 2 ── 3 ── final norm ── last hidden state

    run(embeds, end=2)                          0 ── 1 ──▶ hidden states after block 1
    run(hidden, begin=2)                       given ──▶ 2 ── 3 ── final norm ──▶ last hidden state

No model-specific code: it is always the family's own decoder that runs, and makes masks and positions as ever. Each
block's ``forward`` is wrapped once, and asks a thread-local for the part that runs in this thread. Without one it is
the base model's own. A block outside the part computes nothing and hands on the hidden states that it is given.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache

from dlora.protocol.errors import ExportError
from dlora.protocol.text import first_line

from .base_model import BaseModel, model_code
from .cache import PartCache
from .layout import is_near, random_embeds
from .targets import TRACE_TOKENS

_Forward = Callable[..., Any]
BlockCall = functools.partial[Any]
"""A block's own forward with the arguments given."""
_RunBlock = Callable[[int, BlockCall], Any]
"""What a wrapped block asks, with its number."""

CACHE_ARGUMENTS: Final = ("cache", "past_key_values")
"""What decoders call it: the first since transformers 5.24, the second before."""


class ModelParts:
    """Runs parts of a base model, in several threads at once.

    Make one for a model: its blocks are wrapped, and stay so. Where no part is asked for, it costs no bit.

    Args:
        base: every block is tried on its own, on a few tokens: three forward passes in all.

    Attributes:
        base: the model.

    Raises ``ExportError`` where blocks hand on more than hidden states, or do not run one after the other.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._running = threading.local()
        self._widths: list[int] = []  # of what goes into each block, and at last of what comes out of the last
        self._returned: list[int | None] = []  # by each block: None for a plain tensor, else how many beside it
        if len(set(base.block_modules)) < base.blocks:
            self._refuse("some of its blocks are one and the same module")
        originals = [block.forward for block in base.block_modules]
        for index, block in enumerate(base.block_modules):
            block.forward = self._wrap(index, block.forward)
        try:
            self._try_blocks()
        except BaseException:
            for block, original in zip(base.block_modules, originals, strict=True):
                block.forward = original
            raise

    @classmethod
    def of(cls, base: BaseModel) -> ModelParts | None:
        """None where it cannot be run in parts."""
        try:
            return cls(base)
        except ExportError:
            return None

    def width_after(self, blocks: int) -> int:
        """Width of the hidden states that come out of the first ``blocks`` blocks."""
        return self._widths[blocks]

    def run(
        self,
        hidden_states: Tensor,
        *,
        begin: int = 0,
        end: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: PartCache | None = None,
    ) -> Tensor:
        """Run the blocks ``begin`` to ``end - 1``, on all tokens or, with a cache, on those after the ones it holds.

        Args:
            hidden_states: in the model's dtype, (batch, length, width): what came out of block ``begin - 1``, or
                ``inputs_embeds`` where ``begin`` is 0.
            begin: 0 to the number of blocks, where only the final norm is left to do.
            end: None for the rest, with the final norm.
            attention_mask: int64 (batch, length), 1 for tokens and 0 for padding; not with a cache.
            position_ids: int64 (1, length), starting anew at each of several packed sequences; not with a cache.
            cache: from ``new_cache`` for these blocks; it takes the new tokens in. After an error it is as before.

        Returns: (batch, length, width) after block ``end - 1``, or (batch, length, hidden_size) after the final norm.

        Raises ``ValueError`` for blocks that there are not, another width, no tokens, and a cache of other blocks or of
        another model.
        """
        if cache is None:
            return self._run_part(self._part(hidden_states, begin, end), attention_mask, position_ids)
        if attention_mask is not None or position_ids is not None:
            raise ValueError("with a cache there is neither padding nor packing: all rows have the same length")
        with self.extending([cache], [hidden_states.shape[1]], begin, end):
            return self._run_part(self._part(hidden_states, begin, end), cache=cache.decoder_cache)

    def run_side_by_side(
        self, hidden_states: Tensor, begin: int, end: int | None, position_ids: Tensor, cache: DynamicCache
    ) -> Tensor:
        """As ``run``, of tokens of several contexts: (1, length, width), at the positions that they have there, (1,
        length). Their attention, and what is kept of them, is the cache's."""
        return self._run_part(self._part(hidden_states, begin, end), position_ids=position_ids, cache=cache)

    @contextmanager
    def extending(
        self, caches: Sequence[PartCache], counts: Sequence[int], begin: int, end: int | None
    ) -> Iterator[None]:
        """Within, caches of the blocks ``begin`` to ``end - 1`` take in so many tokens each. After an error they are as
        before."""
        for cache in caches:
            if cache.base is not self.base:
                raise ValueError("a cache of another model")
            if (cache.begin, cache.end) != (begin, end):
                raise ValueError(
                    f"a cache of blocks {cache.begin} to {cache.end} is not one of blocks {begin} to {end}"
                )
        try:
            yield
        except BaseException:
            for cache in caches:
                cache.cut(cache.length)
            raise
        for cache, count in zip(caches, counts, strict=True):
            cache.length += count

    def _run_part(
        self,
        part: _Part,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        embeds = part.hidden_states
        if part.begin > 0:
            # Masks and positions are made from their shape; no block sees their values.
            embeds = embeds.new_zeros(*embeds.shape[:-1], self.base.embedding_size)
        arguments: dict[str, Any] = {} if cache is None else {self._cache_argument: cache}
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        with self._within(part.run_block):
            output = self.base.decoder(
                inputs_embeds=embeds, attention_mask=attention_mask, use_cache=cache is not None, **arguments
            )
        last: Tensor = output.last_hidden_state if part.is_last else part.hidden_states
        return last

    @cached_property
    def largest_product(self) -> int:
        """Weights of the largest module that can be a target."""
        return max((target.in_features * target.out_features for target in self.base.targets.values()), default=0)

    def run_calls(
        self,
        run_block: Callable[[int, BlockCall], Any],
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Run the decoder, with ``run_block`` in place of each block's forward: it is given the block's number and how
        the decoder calls it."""
        ids = {} if position_ids is None else {"position_ids": position_ids}
        with self._within(run_block):
            self.base.decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **ids)

    def left_out(self, block: int, hidden_states: Tensor) -> Any:
        """What a block that is left out gives: what it was given."""
        return _given_on(hidden_states, self._returned[block])

    def most_context(self, most_bytes: int | None = None, computing_bytes: int = 0) -> int:
        """The most tokens of a context in all blocks; 0 where the family's past is not kept as keys and values.

        Args:
            most_bytes: of one context, with what computing takes for each of its tokens, ``computing_bytes``; None: no
                limit.
        """
        try:
            bytes_per_token = self.cache_bytes_per_token()
        except ExportError:
            return 0
        longest = self.base.max_sequence_length
        return longest if most_bytes is None else min(longest, most_bytes // (bytes_per_token + computing_bytes))

    def new_cache(self, *, begin: int = 0, end: int | None = None, room: int = 0) -> PartCache:
        """An empty cache for ``run`` with these blocks; ``room`` as ``PartCache`` takes it.

        Raises ``ExportError`` as ``check_cache`` does, and ``ValueError`` for blocks that there are not.
        """
        self.check_cache()
        self._check_blocks(begin, end)
        return PartCache(self.base, begin, end, room)

    def cache_bytes_per_token(self, begin: int = 0, end: int | None = None) -> int:
        """What a cache of the blocks ``begin`` to ``end - 1``, or to the last, takes for a token, in bytes.

        Raises ``ExportError`` as ``check_cache`` does.
        """
        return sum(self._cache_bytes[begin:end])

    @cached_property
    def _cache_bytes(self) -> list[int]:
        """Of each block, for a token."""
        cache = self.new_cache()
        with torch.no_grad():
            self.run(random_embeds(self.base, 1), cache=cache)
        return cache.nbytes_of_blocks

    def check_cache(self) -> None:
        """Raise ``ExportError`` where the family does not go on from keys and values as from the tokens themselves.

        As with blocks that keep a state instead, which cannot be cropped. It is tried once, on a few tokens.
        """
        if self._cache_refusal is not None:
            base = self.base
            raise ExportError(
                f"{base.name} ({base.architecture}) cannot run with a cache of keys and values: {self._cache_refusal}"
            )

    @cached_property
    def _cache_argument(self) -> str:
        """Empty where the decoder takes no cache."""
        known = inspect.signature(self.base.decoder.forward).parameters
        return next((name for name in CACHE_ARGUMENTS if name in known), "")

    @cached_property
    def _cache_refusal(self) -> str | None:
        if not self._cache_argument:
            return "its decoder takes none"
        base = self.base
        middle = max(1, base.blocks // 2)
        caches = PartCache(base, 0, middle), PartCache(base, middle, None)
        embeds = random_embeds(base, 6)

        def append(first: int, last: int) -> Tensor:
            hidden = self.run(embeds[:, first:last].clone(), end=middle, cache=caches[0])
            return self.run(hidden, begin=middle, cache=caches[1])

        try:
            with torch.no_grad():
                wanted = base.last_hidden_state(embeds.clone())
                append(0, 3)
                append(3, 5)
                for cache in caches:
                    cache.crop(4)
                found = append(4, 6)
        except Exception as error:  # whatever a family does with a cache that it does not know
            return f"it cannot go on from these alone ({type(error).__name__}: {first_line(error)})"
        for cache in caches:
            for index in range(base.blocks):
                if cache.decoder_cache.get_seq_length(index) != 6:
                    return f"block {index} keeps its past elsewhere"
        return None if is_near(found, wanted[:, 4:]) else "it gives something else with one than without"

    def _part(self, hidden_states: Tensor, begin: int, end: int | None) -> _Part:
        self._check_blocks(begin, end)
        if not hidden_states.shape[1]:
            raise ValueError("there are no tokens to run")
        width = hidden_states.shape[-1]
        if width != self._widths[begin]:
            raise ValueError(f"block {begin} takes hidden states of width {self._widths[begin]}, not {width}")
        return _Part(begin, self.base.blocks if end is None else end, end is None, hidden_states, self._returned)

    def _check_blocks(self, begin: int, end: int | None) -> None:
        blocks = self.base.blocks
        if not (0 <= begin <= blocks if end is None else 0 <= begin < end <= blocks):
            raise ValueError(f"there is no part from block {begin} to before block {end} in a model of {blocks} blocks")

    def _wrap(self, index: int, original: _Forward) -> _Forward:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            run_block: _RunBlock | None = getattr(self._running, "run_block", None)
            if run_block is None:
                return original(*args, **kwargs)
            return run_block(index, functools.partial(original, *args, **kwargs))

        return forward

    @contextmanager
    def _within(self, run_block: _RunBlock) -> Iterator[None]:
        self._running.run_block = run_block
        try:
            yield
        finally:
            self._running.run_block = None

    def _try_blocks(self) -> None:
        base = self.base
        embeds = random_embeds(base, TRACE_TOKENS)
        outputs: list[tuple[int, Any, Any]] = []

        def record(index: int, run: BlockCall) -> Any:
            output = run()
            first = first_output(output)
            # A copy: a later block may change it in place.
            outputs.append((index, output, first.clone() if isinstance(first, Tensor) else first))
            return output

        with torch.no_grad(), model_code(base.name, base.architecture), self._within(record):
            last = base.last_hidden_state(embeds.clone())
        if [index for index, *_ in outputs] != list(range(base.blocks)):
            self._refuse("its blocks do not run one after the other, each of them once")
        hidden = [embeds]
        for index, output, first in outputs:
            if not isinstance(first, Tensor):
                self._refuse(f"block {index} returns a {type(output).__name__}, not hidden states")
            self._returned.append(len(output) - 1 if isinstance(output, tuple | list) else None)
            hidden.append(first)
        self._widths = [states.shape[-1] for states in hidden]
        # If each of them gives on its own what it gives among the others, then so does any part. What a block may
        # leave behind for later ones must not help: by now it is of other tokens, and the later ones are tried first.
        with torch.no_grad():
            base.last_hidden_state(embeds.flip(1))
        self._try("what follows the blocks", hidden[-1], last, base.blocks, None)
        for index in reversed(range(base.blocks)):
            self._try(f"block {index}", hidden[index], hidden[index + 1], index, index + 1)

    def _try(self, name: str, given: Tensor, wanted: Tensor, begin: int, end: int | None) -> None:
        try:
            with torch.no_grad():
                found = self.run(given.clone(), begin=begin, end=end)
        except Exception as error:  # whatever a family does where blocks before are left out
            self._refuse(f"{name} fails on its own: {type(error).__name__}: {first_line(error)}")
        if not is_near(found, wanted):
            self._refuse(f"{name} takes more than the hidden states that come out of the block before")

    def _refuse(self, reason: str) -> NoReturn:
        raise ExportError(f"{self.base.name} ({self.base.architecture}) cannot be run in parts: {reason}")


@dataclass
class _Part:
    """One forward pass of the blocks ``begin`` to ``end - 1``.

    Attributes:
        is_last: whether the final norm follows.
        hidden_states: before the first of them what they are given, after the last what they give.
        returned: as ``ModelParts`` keeps it.
    """

    begin: int
    end: int
    is_last: bool
    hidden_states: Tensor
    returned: list[int | None]

    def run_block(self, index: int, run: BlockCall) -> Any:
        if self.begin <= index < self.end:
            output = run()
            if index == self.end - 1:
                self.hidden_states = first_output(output)
            return output
        return _given_on(self.hidden_states, self.returned[index])


def _given_on(hidden_states: Tensor, beside: int | None) -> Any:
    """What a block that is left out returns, as ``ModelParts`` keeps it."""
    return hidden_states if beside is None else (hidden_states, *(None,) * beside)


def first_output(output: Any) -> Any:
    """The hidden states that a block returns, alone or as the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output
