"""Whether a generated answer is right."""

from __future__ import annotations

import re

from dlora.edge.choices import AnswerScore
from dlora.edge.data.question import Question
from dlora.protocol.errors import UsageError


def compile_pattern(text: str) -> re.Pattern[str]:
    """A user's pattern. Raises ``UsageError``."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--pattern is no regular expression ({error})") from None


def is_right(how: AnswerScore, answer: str, question: Question, pattern: re.Pattern[str] | None = None) -> bool:
    """Whether a generated ``answer`` counts as right.

    ``pattern``: for ``regex``; None: any of the question's choices, as LLM-Adapters scores its sets. Where it has a
    group, the group is what is found.
    """
    if how == "likelihood":
        return answer == question.key
    if how == "exact":
        return _squashed(answer) == _squashed(question.reference)
    if how == "contains":
        return _squashed(question.key).casefold() in _squashed(answer).casefold()
    assert how == "regex", how
    found = _pattern(question, pattern).search(answer)
    if found is None:
        return False
    # Where the data name no key, the pattern finds it in the reference.
    wanted = _pattern(question, pattern).search(question.key)
    pair = _found(found), _found(wanted) if wanted else question.key
    if _pattern(question, pattern).flags & re.IGNORECASE:
        return pair[0].casefold() == pair[1].casefold()
    return pair[0] == pair[1]


def _pattern(question: Question, pattern: re.Pattern[str] | None) -> re.Pattern[str]:
    return pattern or re.compile("|".join(map(re.escape, question.choices)))


def _found(match: re.Match[str]) -> str:
    return next((group for group in match.groups() if group is not None), match[0])


def _squashed(text: str) -> str:
    return " ".join(text.split())
