"""Runs a request in its slot's thread, and tells the event loop what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.generation.answer import TextAnswer
from dlora.edge.generation.generate import Counters, FinishReason
from dlora.edge.generation.prompt import Prompt
from dlora.edge.generation.sampling import Choice
from dlora.protocol.errors import DataError, MissingExtraError, UsageError

from .requests import GenerationRequest
from .slots import OpenModel, ServedAdapter, Slot


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer.

    Attributes:
        index: of the answer; text: that it has more; choices: the tokens that this took.
        texts: of these tokens and of the likeliest in their place, where they were asked for.
    """

    index: int
    text: str
    choices: tuple[Choice, ...]
    texts: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class End:
    """The end of an answer."""

    index: int
    finish_reason: FinishReason
    counters: Counters


@dataclass(frozen=True)
class Generation:
    """What answers of a server are made with.

    Attributes:
        max_new_tokens: the most of an answer, whatever its request names.
        draft_length: as ``TokenAnswer`` takes it.
        warn: is told what is for the server's log.
    """

    tokenizer: PromptTokenizer
    open_model: OpenModel
    max_new_tokens: int
    draft_length: int | None
    warn: Callable[[str], None]

    def run(
        self, slot: Slot, adapter: ServedAdapter, request: GenerationRequest, should_stop: Callable[[], bool]
    ) -> Iterator[Piece | End]:
        """The answers to a request, one after the other. Raises ``DloraError``; the slot is closed then."""
        try:
            for number, prompt in enumerate(request.prompts):
                for choice in range(request.choices):
                    index = number * request.choices + choice
                    yield from self._answer(slot, adapter, request, prompt, index, should_stop)
        except (DataError, UsageError, MissingExtraError):
            raise  # the request's fault, found between two steps
        except BaseException:
            # A context in the middle of a step cannot go on; nor one whose server is gone for good.
            slot.close()
            raise

    def _answer(
        self,
        slot: Slot,
        adapter: ServedAdapter,
        request: GenerationRequest,
        prompt: Prompt,
        index: int,
        should_stop: Callable[[], bool],
    ) -> Iterator[Piece | End]:
        if should_stop():  # before the prompt is encoded: a request may have many
            yield End(index, "cancelled", Counters())
            return
        context = slot.context(adapter, self.open_model)
        ids = prompt.encode(self.tokenizer, context.model.invocation, self.warn)
        slot.remember(ids)
        sampling = request.sampling
        if sampling.seed is not None:  # several answers are not the same one
            sampling = replace(sampling, seed=(sampling.seed + index % request.choices) % 2**64)
        constraint = self.tokenizer.constrain(request.shapes) if request.shapes else None
        try:
            answer = TextAnswer(
                context,
                self.tokenizer,
                ids,
                sampling,
                max_new_tokens=min(request.max_new_tokens or self.max_new_tokens, self.max_new_tokens),
                stop=request.stop,
                draft_length=self.draft_length,
                constraint=constraint,
                should_stop=should_stop,
            )
            told = 0
            for text in answer:
                choices, told = tuple(answer.choices[told:]), len(answer.choices)
                yield Piece(index, text, choices, self._texts(choices, request))
            if rest := tuple(answer.choices[told:]):
                yield Piece(index, "", rest, self._texts(rest, request))
        finally:
            if constraint is not None:
                constraint.close()
        slot.remember(np.concatenate([ids, [choice.token for choice in answer.choices]]).astype(np.int64))
        context.model.release_weights()
        assert answer.finish_reason is not None
        yield End(index, answer.finish_reason, answer.counters)

    def _texts(self, choices: Sequence[Choice], request: GenerationRequest) -> dict[int, str]:
        """Here and not on the event loop: each is a call to the tokenizer's process."""
        if request.sampling.logprobs is None:
            return {}
        tokens = {token for choice in choices for token in (choice.token, *(top for top, _ in choice.top))}
        return {token: self.tokenizer.decode([token]) for token in tokens}
