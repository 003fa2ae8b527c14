"""Sampling from Python: answers of the base model, or of adapters that lie here."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np

from dlora.edge.choices import EngineChoice
from dlora.edge.data.prompt import PromptTokenizer, prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.answer import TextAnswer
from dlora.edge.generation.generate import FinishReason
from dlora.edge.generation.prompt import Prompt
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.generating import GeneratingModel
from dlora.edge.model.opening import Opening, open_to_generate
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.identity import load_device_id

P = ParamSpec("P")
T = TypeVar("T")


def connect_settings(credentials: Credentials | None, max_retry_s: float | None) -> ConnectSettings:
    """How a client reaches its server."""
    return ConnectSettings(credentials or Credentials(), load_device_id(warn=lambda _: None), Retry(max_s=max_retry_s))


def in_thread(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The method for asyncio, whose name ends in ``_async``: the same in a thread."""

    @functools.wraps(method)
    async def twin(*arguments: P.args, **options: P.kwargs) -> T:
        client, *others = arguments
        return await asyncio.to_thread(getattr(client, method.__name__), *others, **options)

    twin.__name__ = f"{method.__name__}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__doc__ = f"``{method.__name__}`` in a thread."
    return twin


@dataclass(frozen=True)
class Sample:
    """One answer: its text, its token ids without the one that ended it, and, where they were asked for, their
    log-probabilities."""

    text: str
    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason | None


class SamplingClient:
    """Answers. Use it as a context: ``with SamplingClient.create(...) as client``."""

    def __init__(self, model: GeneratingModel, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._context = Context(model)
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def create(
        cls,
        bundle: Path | str,
        server: str | None = None,
        *,
        adapter: Path | str | None = None,
        wire_dtype: str = "fp16",
        context_length: int = 2048,
        threads: int = 0,
        engine: EngineChoice = "auto",
        credentials: Credentials | None = None,
        max_retry_s: float | None = None,
        tokenizer: PromptTokenizer | None = None,
    ) -> Iterator[Self]:
        """A client of a bundle; ``server``: None: all blocks run here.

        Args:
            adapter: its directory; None: the base model.
            context_length: the most tokens of a prompt with its answer.
            tokenizer: one that is open already.

        Raises what opening them raises.
        """
        opened, path = Bundle.open(Path(bundle)), None if adapter is None else Path(adapter)
        with ExitStack() as stack:
            words = tokenizer or stack.enter_context(prompt_tokenizer(opened))  # before there is an engine
            opening = Opening(
                opened, server, path, opened.manifest.base_model.blocks if server is None else 0, wire_dtype,
                threads=threads, engine=engine,
                connecting=None if server is None else connect_settings(credentials, max_retry_s), passes="auto",
                drafts=True,
            )  # fmt: skip
            model = stack.enter_context(open_to_generate(opening, context_length=context_length))
            yield cls(model, words)

    def sample(
        self,
        prompt: str | Sequence[dict[str, Any]] | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        as_it_is: bool = False,
    ) -> Sample:
        """One answer to a text (a user's turn, where there is a chat template), a chat, or token ids.

        ``as_it_is``: continue a text, and leave the chat template out.

        Raises ``DataError`` for a prompt that cannot be, and what ``Connection`` raises.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, logprobs=0 if logprobs else None
        )
        with self._lock:
            answer = TextAnswer(
                self._context, self.tokenizer, self._encode(prompt, as_it_is=as_it_is), sampling,
                max_new_tokens=max_new_tokens, stop=stop,
            )  # fmt: skip
            for _ in answer:
                pass
        chosen = answer.choices
        found = [float(choice.logprob or 0.0) for choice in chosen] if logprobs else None
        return Sample(answer.text, [choice.token for choice in chosen], found, answer.finish_reason)

    sample_async = in_thread(sample)

    def _encode(self, prompt: str | Sequence[Any], *, as_it_is: bool) -> Any:
        if isinstance(prompt, str):
            asked = Prompt.of_text(prompt, self.tokenizer, as_it_is=as_it_is)
            return asked.encode(self.tokenizer, self._model.invocation)
        messages = tuple(each for each in prompt if isinstance(each, dict))
        if messages and len(messages) == len(prompt):
            return Prompt(messages=messages).encode(self.tokenizer, self._model.invocation)
        return np.asarray(prompt, np.int64)
