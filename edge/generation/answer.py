"""An answer as text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dlora.edge.data.prompt import Constraint, PromptTokenizer
from dlora.edge.model.context import Context
from dlora.edge.model.ends import LongArray
from dlora.protocol.choices import Drafts

from .generate import Counters, FinishReason, TokenAnswer
from .sampling import Choice, Sampling
from .text import AnswerText


class TextAnswer:
    """The text of one answer; iterating over it makes it.

    Args:
        prompt: int64 (tokens,), all that comes before it.
        stop: texts that end it.
        drafts, constraint, should_stop: as ``TokenAnswer`` takes them.

    Attributes:
        choices: the tokens that it consists of, so far.

    Raises what ``TokenAnswer`` and ``AnswerText`` do.
    """

    def __init__(
        self,
        context: Context,
        tokenizer: PromptTokenizer,
        prompt: LongArray,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        drafts: Drafts = "auto",
        constraint: Constraint | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.choices: list[Choice] = []
        self._text = AnswerText(tokenizer.stream(), stop)
        self._tokens = TokenAnswer(
            context,
            prompt,
            sampling,
            max_new_tokens=max_new_tokens,
            stop_token_ids=tokenizer.stop_token_ids,
            drafts=drafts,
            constraint=constraint,
            should_stop=should_stop,
        )

    @property
    def text(self) -> str:
        """So far."""
        return self._text.text

    @property
    def counters(self) -> Counters:
        return self._tokens.counters

    @property
    def finish_reason(self) -> FinishReason | None:
        """As ``TokenAnswer`` has it; a stop string is a ``stop``, too."""
        return "stop" if self._text.has_stopped else self._tokens.finish_reason

    def __iter__(self) -> Iterator[str]:
        """Its text as it comes, in pieces that are not empty. Raises what ``Context.logits`` does."""
        try:
            for choice in self._tokens:
                self.choices.append(choice)
                if piece := self._text.push(choice.token):
                    yield piece
                if self._text.has_stopped:
                    break
            if piece := self._text.finish():
                yield piece
        finally:
            self._text.close()
