"""Chat templates: messages to text, as transformers renders them, and what of it the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dlora.protocol.errors import DataError
from dlora.protocol.text import first_line

from .forms import Conversation

Message = Mapping[str, Any]
Span = tuple[int, int]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text, untrusted: it runs in Jinja's immutable sandbox.
        tokens: what the template may name, ``bos_token`` and ``eos_token``.
        now: the date for templates that print it (Llama 3.2 does).

    Raises ``DataError`` for a template that does not compile.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, jinja2.ext.loopcontrols]
        )
        marks = environment.extensions[_Marks.identifier]
        assert isinstance(marks, _Marks)
        self._marks = marks
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Python's compiler has its own opinions of what Jinja makes of a template
            raise DataError(
                f"the bundle's chat template does not compile ({_reason(error)}); export the bundle again"
            ) from None
        self._tokens = dict(tokens)

    @property
    def has_marks(self) -> bool:
        """Whether the template itself says what the assistant wrote: ``{% generation %}``."""
        return self._marks.is_used

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one text. Raises ``DataError`` with the template's own complaint.

        Args:
            settings: what else the template may name, such as ``enable_thinking``.
        """
        text, _ = self.render_marked(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, settings=settings
        )
        return text

    def render_marked(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Likewise, and the character ranges that the template marks as the assistant's, in order."""
        # Many templates print a literal "None" for keys that are there without a value.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = {
            **(settings or {}), "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }  # fmt: skip
        try:
            return self._marks.render(self._template, {**given, "messages": plain})
        except Exception as error:
            # Templates are code: whatever a message drives them into is told as a fault of that message.
            refused = DataError(f"the chat template refuses these messages ({_reason(error)})")
            if not isinstance(error, jinja2.UndefinedError):
                raise refused from None
        try:  # templates of models that see take lists of parts, and some of them nothing else
            return self._marks.render(self._template, {**given, "messages": [*map(_in_parts, plain)]})
        except Exception:
            raise refused from None

    def answer_spans(
        self, said: Conversation, text: str, marks: Sequence[Span], *, only_last: bool, end: int
    ) -> list[Span]:
        """The character ranges of ``text`` to learn from, in order: where the template marks the assistant's, these;
        else each turn from the generation prompt on to its end-of-turn mark and what follows it.

        Args:
            text, marks: of ``render_marked``, for ``said``.
            only_last: the last answer, and no other.
            end: ranges that begin there or later may be left out: nothing is left of them.

        Raises ``DataError`` where nobody can say what they are.
        """
        answers = said.answers[-1:] if only_last else said.answers
        if self.has_marks:
            return self._marked_spans(said, marks, answers[0] if only_last else said.given)
        return self._turn_spans(said, text, answers, end)

    def _marked_spans(self, said: Conversation, marks: Sequence[Span], given: int) -> list[Span]:
        first = 0
        if any(each["role"] == "assistant" for each in said.messages[:given]):
            _, earlier = self.render_marked(said.messages[:given], tools=said.tools, settings=said.settings)
            first = len(earlier)
        found = [(start, end) for start, end in marks[first:] if end > start]
        if not found:
            raise DataError(
                "the chat template marks nothing of this conversation with {% generation %}, so there is nothing to "
                "learn; leave it out, or take --train-on all"
            )
        return found

    def _turn_spans(self, said: Conversation, text: str, answers: Sequence[int], end: int) -> list[Span]:
        """A turn begins where the rendering of what precedes it, with the generation prompt, ends: that is what the
        model sees when it is asked to answer."""
        spans: list[Span] = []
        for index in answers:
            if index == 0:
                raise DataError("the first message is the assistant's; it needs a message to answer")
            before = self.render_prompt(said, index)
            if len(before) >= end:
                return spans
            is_last = index + 1 == len(said.messages)
            through = (
                text if is_last else self.render(said.messages[: index + 1], tools=said.tools, settings=said.settings)
            )
            if not (text.startswith(through) and through.startswith(before)):
                one = "" if index == answers[-1] else "--train-on last learns from the last answer only; else "
                raise DataError(
                    f"the chat template rewrites earlier turns and has no {{% generation %}} marks, so what message "
                    f"{index + 1} was trained on is unclear; {one}give one assistant turn a line, the last, or use "
                    "prompt and completion"
                )
            spans.append((len(before), len(through)))
        return spans

    def render_prompt(self, said: Conversation, answer: int) -> str:
        """What the model sees when it is asked for a message of ``said``, by its index. Raises ``DataError``."""
        before = said.messages[:answer]
        return self.render(before, add_generation_prompt=True, tools=said.tools, settings=said.settings)


class _Marks(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` renders what it holds; templates mark assistant text with it.

    Where it begins is how much was rendered before, as transformers counts it
    (``transformers.utils.chat_template_utils``): a template that marks inside of a macro has no right places there
    either.

    Attributes:
        is_used: whether a template has it.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.is_used = False
        self._rendered = 0
        self._spans: list[Span] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.is_used = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def render(self, template: jinja2.Template, given: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text, and what of it is marked."""
        self._rendered, self._spans = 0, []
        pieces = []
        for piece in template.generate(given):
            pieces.append(piece)
            self._rendered += len(piece)
        return "".join(pieces), self._spans

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        self._spans.append((self._rendered, self._rendered + len(text)))
        return text


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no template of a chat wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    return first_line(error)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
