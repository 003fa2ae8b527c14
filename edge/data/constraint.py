"""Which tokens an answer may have that has to have a shape. For the child that holds the tokenizer.

The grammar's work is llguidance's, which is optional: the device does without it until somebody asks for JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from dlora.edge.engine.bundle import Bundle
from dlora.protocol.command import missing_extra
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.text import first_line

# As Python's json writes it. Where any blanks may come, small models write them for ever.
_SPACING: Final[Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matchers:
    """Grammars under way, by number. Raises ``MissingExtraError`` where llguidance is not installed."""

    def __init__(self, bundle: Bundle) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise missing_extra(error, "json-schema") from None
        self._llguidance = llguidance
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        spec = bundle.manifest.tokenizer
        try:
            self._tokenizer = llguidance.LLTokenizer(
                str(bundle.file(spec.file)),
                n_vocab=bundle.manifest.base_model.vocabulary_size,
                eos_token=list(spec.all_stop_token_ids) or None,
            )
        except Exception as error:  # llguidance has no common public base
            raise BundleError(
                f"llguidance cannot use the bundle's tokenizer ({first_line(error)}); leave response_format out, and "
                "let tool_choice be auto"
            ) from None

    def begin(self, number: int, shapes: Sequence[tuple[str, str, str]]) -> None:
        """Begin an answer that has to have one of ``shapes``: text before, JSON schema (itself JSON), text after.

        Raises ``DataError`` for a schema that cannot be obeyed.
        """
        try:
            matcher = self._llguidance.LLMatcher(self._tokenizer, self._grammar(shapes), log_level=0)
        except Exception as error:
            raise DataError(f"this JSON schema cannot be obeyed ({first_line(error)})") from None
        _check(matcher)
        self._matchers[number] = matcher

    def _grammar(self, shapes: Sequence[tuple[str, str, str]]) -> str:
        """In llguidance's own form. A grammar for each schema, for what a schema refers to begins at its own root."""
        rules, grammars = [], []
        for index, (before, schema, after) in enumerate(shapes):
            made = self._llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_SPACING)
            grammars.append({**json.loads(made)["grammars"][0], "name": f"json_{index}"})
            # Its texts are written as JSON's are, and may not be empty.
            texts = [json.dumps(text) if text else "" for text in (before, after)]
            rules.append(f"{texts[0]} @json_{index} {texts[1]}")
        return json.dumps({"grammars": [{"lark_grammar": f"start: {' | '.join(rules)}"}, *grammars]})

    def allowed(self, number: int, accepted: int | None) -> bytes:
        """A bit a token, the lowest first, after one more was ``accepted``."""
        matcher = self._matchers.get(number)
        if matcher is None:  # of a process that had to be replaced
            raise DataError("the tokenizer was started anew in the middle of an answer; ask again")
        if accepted is not None:
            matcher.consume_token(accepted)
        bits: bytes = matcher.compute_bitmask()
        _check(matcher)
        return bits

    def end(self, number: int) -> None:
        """Forget it."""
        self._matchers.pop(number, None)


def _check(matcher: Any) -> None:
    """Raise ``DataError`` where it has failed: llguidance's own methods never raise for that."""
    if matcher.is_error():
        raise DataError(f"this JSON schema cannot be obeyed ({first_line(ValueError(matcher.get_error()))})")
