"""A chat that grows turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.model.context import Context
from dlora.protocol.choices import Drafts

from .answer import TextAnswer
from .prompt import Prompt
from .sampling import Sampling

_ROOM_FOR_ANSWER: Final = 32  # tokens that must be left for an answer


@dataclass
class Chat:
    """What was said so far, and how it goes on.

    Attributes:
        system: what the model is told to be; None: nothing.
        max_new_tokens, drafts: of each answer, as ``TokenAnswer`` takes them.
        say: is told in one line what the user should know.
        messages: in OpenAI's form, the system's first.
    """

    tokenizer: PromptTokenizer
    _: KW_ONLY
    system: str | None
    sampling: Sampling
    max_new_tokens: int
    drafts: Drafts
    say: Callable[[str], None]
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; ``system``: from now on, None as before."""
        self.system = self.system if system is None else system
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, context: Context, should_stop: Callable[[], bool]) -> TextAnswer:
        """The answer to another turn of the user's. It becomes part of the chat with ``keep``.

        Where all of it has no room any more, the oldest turns are left out. Raises ``DataError`` where this one alone
        has none.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(asked, context)
        while len(ids) + _ROOM_FOR_ANSWER > context.limit and self._drop_oldest(asked):
            ids = self._encode(asked, context)
        answer = TextAnswer(
            context,
            self.tokenizer,
            ids,
            self.sampling,
            max_new_tokens=self.max_new_tokens,
            drafts=self.drafts,
            should_stop=should_stop,
        )
        self.messages = asked
        return answer

    def keep(self, answer: str) -> None:
        """What was answered to the last turn, or as much of it as came."""
        self.messages.append({"role": "assistant", "content": answer})

    def forget_last(self) -> None:
        """Take back the user's last turn, which got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _encode(self, messages: list[dict[str, Any]], context: Context) -> Any:
        if not self.tokenizer.has_chat_template:  # the texts, one after the other
            text = "\n".join(str(message["content"]) for message in messages)
            prompt = Prompt(messages=None, text=f"{text}\n")
        else:
            alone = str(messages[0]["content"]) if len(messages) == 1 else None
            prompt = Prompt(messages=tuple(messages), text=alone)
        return prompt.encode(self.tokenizer, context.model.invocation, self.say)

    def _drop_oldest(self, messages: list[dict[str, Any]]) -> bool:
        """Leave out the oldest turn and its answer; False where only the last is left."""
        first = 1 if messages[0]["role"] == "system" else 0
        if len(messages) - first < 3:
            return False
        del messages[first : first + 2]
        self.say("the chat is longer than its room: its oldest turn is left out from now on")
        return True
