"""Which tokens an answer may have that has to be JSON of a schema. For the child that holds the tokenizer.

The grammar's work is llguidance's, which is optional: the device does without it until somebody asks for JSON.
"""

from __future__ import annotations

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
                f"llguidance cannot use the bundle's tokenizer ({first_line(error)}); leave response_format out"
            ) from None

    def begin(self, number: int, schema: str) -> None:
        """Begin an answer that has to be JSON of a schema, itself JSON. Raises ``DataError`` for one that cannot be."""
        matcher_class = self._llguidance.LLMatcher
        try:
            grammar = matcher_class.grammar_from_json_schema(schema, defaults=_SPACING)
            matcher = matcher_class(self._tokenizer, grammar, log_level=0)
        except Exception as error:
            raise DataError(f"this JSON schema cannot be obeyed ({first_line(error)})") from None
        _check(matcher)
        self._matchers[number] = matcher

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
