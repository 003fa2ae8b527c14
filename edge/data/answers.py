"""Which characters of a rendered conversation the assistant wrote, and are to be learnt."""

from __future__ import annotations

from collections.abc import Sequence

from dlora.protocol.errors import DataError

from .chat import ChatTemplate, Message
from .forms import Conversation

Span = tuple[int, int]


def answer_spans(
    template: ChatTemplate, said: Conversation, text: str, marks: Sequence[Span], *, only_last: bool, end: int
) -> list[Span]:
    """The character ranges of ``text`` to learn from, in order: where the template marks the assistant's, these; else
    each turn from the generation prompt on to its end-of-turn mark and what follows it.

    Args:
        text, marks: of ``template.render_marked``, for ``said``.
        only_last: the last answer, and no other.
        end: ranges that begin there or later may be left out: nothing is left of them.

    Raises ``DataError`` where nobody can say what they are.
    """
    if template.has_marks:
        return _marked(template, said, marks, only_last=only_last)
    numbers = [index for index, each in enumerate(said.messages) if each["role"] == "assistant" and index >= said.given]
    return _turns(template, said, text, numbers[-1:] if only_last else numbers, end)


def _marked(
    template: ChatTemplate, said: Conversation, marks: Sequence[Span], *, only_last: bool
) -> list[Span]:
    before = said.given
    if only_last:
        before = max(index for index, each in enumerate(said.messages) if each["role"] == "assistant")
    first = 0
    if any(each["role"] == "assistant" for each in said.messages[:before]):
        _, earlier = template.render_marked(said.messages[:before], tools=said.tools, settings=said.settings)
        first = len(earlier)
    found = [(start, end) for start, end in marks[first:] if end > start]
    if not found:
        raise DataError(
            "the chat template marks nothing of this conversation with {% generation %}, so there is nothing to learn; "
            "leave it out, or take --train-on all"
        )
    return found


def _turns(
    template: ChatTemplate, said: Conversation, text: str, numbers: Sequence[int], end: int
) -> list[Span]:
    """A turn begins where the rendering of what precedes it, with the generation prompt, ends: that is what the model
    sees when it is asked to answer."""

    def render(messages: Sequence[Message], *, asks: bool = False) -> str:
        return template.render(messages, add_generation_prompt=asks, tools=said.tools, settings=said.settings)

    spans: list[Span] = []
    for index in numbers:
        if index == 0:
            raise DataError("the first message is the assistant's; it needs a message to answer")
        before = render(said.messages[:index], asks=True)
        if len(before) >= end:
            return spans
        is_last = index + 1 == len(said.messages)
        through = text if is_last else render(said.messages[: index + 1])
        if not (text.startswith(through) and through.startswith(before)):
            one = "" if index == numbers[-1] else "--train-on last learns from the last answer only; else "
            raise DataError(
                f"the chat template rewrites earlier turns and has no {{% generation %}} marks, so what message "
                f"{index + 1} was trained on is unclear; {one}give one assistant turn a line, the last, or use prompt "
                "and completion"
            )
        spans.append((len(before), len(through)))
    return spans
