"""Runs a request in its slot's thread, and tells the event loop what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from starlette.requests import Request

from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.generation.answer import TextAnswer
from dlora.edge.generation.generate import Counters, FinishReason
from dlora.edge.generation.prompt import Prompt
from dlora.edge.generation.sampling import Choice
from dlora.edge.model.ends import LongArray
from dlora.protocol.choices import Drafts
from dlora.protocol.errors import DataError, DloraError, MissingExtraError, UsageError

from .errors import RequestError, as_request_error
from .requests import GenerationRequest
from .slots import OpenModel, ServedAdapter, Slot, Slots


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
        drafts: as ``TokenAnswer`` takes them.
        warn: is told what is for the server's log.
    """

    tokenizer: PromptTokenizer
    open_model: OpenModel
    max_new_tokens: int
    drafts: Drafts
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
                drafts=self.drafts,
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


@dataclass(eq=False)
class Events:
    """What comes of one request, for the event loop; the answers are made in a slot's thread.

    They are given up as soon as the client has left, between two steps with the server, and where ``is_stopping``.
    """

    generation: Generation
    slots: Slots
    is_stopping: Callable[[], bool]
    adapter: ServedAdapter
    asked: GenerationRequest
    request: Request

    def __post_init__(self) -> None:
        self._first: Piece | End | None = None
        self._queue: asyncio.Queue[Piece | End | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._is_in_slot = False
        self._loop = asyncio.get_running_loop()
        self._running = asyncio.create_task(self._run())
        self._watching = asyncio.create_task(self._watch())

    async def start(self, most_s: float | None) -> None:
        """Wait for the first of them, ``most_s`` at most, so that what cannot be has its status.

        Raises ``RequestError``.
        """
        with contextlib.suppress(TimeoutError):
            self._first = await asyncio.wait_for(anext(self), most_s)

    def __aiter__(self) -> AsyncIterator[Piece | End]:
        return self

    async def __anext__(self) -> Piece | End:
        first, self._first = self._first, None
        event = first or await self._queue.get()
        if isinstance(event, DloraError):
            raise as_request_error(event, self.asked.shaped_by) from None
        if isinstance(event, Exception):
            raise event
        return event

    async def close(self) -> None:
        """Give up what is not done yet, and wait until it has ended."""
        self._cancelled.set()
        self._watching.cancel()
        if not self._running.done() and self._queue.empty() and not self._is_in_slot:
            self._running.cancel()  # it still stands in line
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    def _should_stop(self) -> bool:
        return self._cancelled.is_set() or self.is_stopping()

    async def _run(self) -> None:
        try:
            async with self.slots.take(self.adapter, self._encode) as slot:
                self._is_in_slot = True

                def work() -> None:
                    for event in self.generation.run(slot, self.adapter, self.asked, self._should_stop):
                        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

                await asyncio.shield(self._loop.run_in_executor(slot.thread, work))
            self._queue.put_nowait(StopAsyncIteration())
        except Exception as error:
            self._queue.put_nowait(error)

    async def _encode(self) -> LongArray:
        """The prompt, by which a slot is chosen.

        Where the client leaves meanwhile it is encoded to its end all the same, which a thread does, and the place is
        not another's before: or clients that come and leave would have the tokenizer do more and more at a time.
        """
        encode = self.asked.prompts[0].encode
        encoding = asyncio.create_task(asyncio.to_thread(encode, self.generation.tokenizer))
        left: asyncio.CancelledError | None = None
        while not encoding.done():
            try:
                await asyncio.wait({encoding})
            except asyncio.CancelledError as error:  # may come twice
                left = error
        if left is not None:
            encoding.exception()  # nobody asks for it
            raise left
        return encoding.result()

    async def _watch(self) -> None:
        """The body was read: what comes next is that the client leaves."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._cancelled.set()
        if not self._is_in_slot:
            self._running.cancel()
            self._queue.put_nowait(RequestError(499, "the client left"))
