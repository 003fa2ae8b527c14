"""Chat templates: messages to text, as transformers renders them, and which characters the assistant wrote."""

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

Message = Mapping[str, Any]



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
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
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

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as one text. Raises ``DataError`` with the template's own complaint."""
        # Many templates print a literal "None" for keys that are there without a value.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=plain,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:
            # Templates are code: whatever a message drives them into is told as a fault of that message.
            raise DataError(f"the chat template refuses these messages ({_reason(error)})") from None

    def assistant_spans(
        self, messages: Sequence[Message], text: str, *, tools: Sequence[Any] | None = None, end: int | None = None
    ) -> list[tuple[int, int]]:
        """Character ranges of ``text`` (``render``'s) that the assistant wrote, its end-of-turn mark included.

        A turn begins where the rendering of what precedes it, with the generation prompt, ends; that is what
        the model sees when it is asked to answer. Raises ``DataError`` where the template rewrites earlier
        turns, so that no such place exists.

        Args:
            end: leave out turns that begin there or later. Each turn takes two renderings of all that precedes it.
        """
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise DataError("the first message is the assistant's; it needs a message to answer")
            before = self.render(messages[:index], add_generation_prompt=True, tools=tools)
            if end is not None and len(before) >= end:
                return spans
            last = index + 1 == len(messages)
            through = text if last else self.render(messages[: index + 1], tools=tools)
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the chat template rewrites earlier turns, so what message {index + 1} was trained on is unclear; "
                    "give one assistant turn a line, the last, or use prompt and completion"
                )
            spans.append((len(before), len(through)))
        return spans


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` renders what it holds; templates mark assistant text with it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
