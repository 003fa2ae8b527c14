"""A row of data as a question: what the model is asked, what the data answer, and what else could be answered."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class Wanted:
    """Which questions, and what of them.

    Attributes:
        choices: words to choose among where the rows name none.
        with_candidates: whether to make them; every row needs choices then.
        most: so many questions, the first ones; None: all.
    """

    choices: tuple[str, ...] = ()
    with_candidates: bool = False
    most: int | None = None


class Candidate(msgspec.Struct, frozen=True):
    """An answer that could be given, as an example whose labels it is.

    Attributes:
        ids: int32 (tokens,), label_positions: int32 (labels,), both as bytes.
    """

    text: str
    ids: bytes
    label_positions: bytes


class Question(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        place: ``file:line``.
        asked: what comes before the answer, as text; prompt: the same as tokens, int32 (tokens,), as bytes.
        reference: the answer that the data give; key: the word of it that counts, where the data name one.
        choices: the words among which ``key`` is, where the data name them.
        candidates: the answers that these make.
    """

    place: str
    asked: str
    prompt: bytes
    reference: str
    key: str
    choices: list[str]
    candidates: list[Candidate]
