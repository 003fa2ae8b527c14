"""Rows of data as questions: of each row its last answer, with all that comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dlora.protocol.errors import DataError

from .encoding import TokenSequence, encode_sample
from .forms import Completion, Conversation, Form, Sample, form_of, sample_of
from .question import Candidate, Question
from .read_settings import ReadSettings
from .records import Record, read_records
from .split import Split, held_out_rows
from .tokenizer import EdgeTokenizer

# LLM-Adapters (Hu et al., arXiv 2304.01933) writes the answers that there are at the end of each question.
_ANSWER_FORMAT: Final = "Answer format:"


def read_questions(
    path: Path,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    *,
    split: Split = 0.0,
    choices: Sequence[str] = (),
    with_candidates: bool = False,
    most: int | None = None,
    on_place: Callable[[str], None] = lambda _: None,
) -> list[Question]:
    """The questions of a file or a directory: of each row its last answer, with all that comes before it.

    Args:
        split: only the rows that are held out with it; 0: all.
        choices: words to choose among where the rows name none.
        with_candidates: whether to make them; every row needs choices then.
        most: so many questions, the first ones; None: all.

    Raises ``DataError`` with file and line for a row that asks nothing.
    """
    found, digests = list[Question](), list[int]()
    for record in read_records(path, settings.columns, part=settings.part):
        on_place(record.place)
        if most is not None and not split and len(found) >= most:
            break
        try:
            sample = sample_of(record, form_of(record), has_chat_template=tokenizer.has_chat_template)
            found.append(_question(record, sample, tokenizer, settings, choices, with_candidates=with_candidates))
            if split:
                digests.append(_encoded(sample, tokenizer, settings).digest)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
    if not found:
        raise DataError(f"{path}: no examples in it")
    if split:
        is_held = held_out_rows(np.array(digests, np.uint64), split)
        found = [question for question, held in zip(found, is_held, strict=True) if held]
    return found[:most]


def _question(
    record: Record,
    sample: Sample,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    given: Sequence[str],
    *,
    with_candidates: bool,
) -> Question:
    asked, ids, reference = _asked(sample, tokenizer, form_of(record))
    key, choices = record.fields.get("answer"), _choices(record.fields) or list(given)
    key = key if isinstance(key, str) and key.strip() else reference.strip()
    candidates = []
    if with_candidates:
        if not choices:
            raise DataError(
                "it names no answers to choose among: give --choices, a list 'choices' in each row, or "
                "'Answer format: a/b' at the end of the question"
            )
        candidates = [*_candidates(sample, tokenizer, settings, reference, key, choices)]
    return Question(record.place, asked, ids.tobytes(), reference, key, choices, candidates)


def _asked(sample: Sample, tokenizer: EdgeTokenizer, form: Form) -> tuple[str, Any, str]:
    """What comes before the last answer, as text and as int32 (tokens,); and that answer."""
    if isinstance(sample, Conversation):
        last = sample.answers[-1]
        if last == 0:
            raise DataError("the first message is the assistant's; it answers nothing")
        text = tokenizer.chat_template.render_prompt(sample, last)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return text, ids, str(sample.messages[last].get("content") or "")
    if isinstance(sample, Completion) and sample.prompt:
        return sample.prompt, tokenizer.encode_prompt_text(sample.prompt), sample.completion.strip()
    raise DataError(f"{form} asks nothing: answers need a prompt, or messages")


def _choices(fields: dict[str, Any]) -> list[str]:
    named = fields.get("choices")
    if isinstance(named, list) and named and all(isinstance(each, str) for each in named):
        return list(named)
    asked = fields.get("instruction")
    words = asked.rpartition(_ANSWER_FORMAT)[2].split() if isinstance(asked, str) and _ANSWER_FORMAT in asked else []
    return words[0].split("/") if len(words) == 1 and "/" in words[0][1:-1] else []


def _encoded(sample: Sample, tokenizer: EdgeTokenizer, settings: ReadSettings) -> TokenSequence:
    """A question with its answer, of which the answer is learnt."""
    (encoded,) = encode_sample(sample, tokenizer, replace(settings, too_long="error", train_on="last"))
    return encoded


def _candidates(
    sample: Sample,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    reference: str,
    key: str,
    choices: Sequence[str],
) -> Iterator[Candidate]:
    for choice in choices:
        answer = reference.replace(key, choice) if key in reference else choice
        other: Sample
        if isinstance(sample, Conversation):
            last = sample.answers[-1]
            messages = [*sample.messages[:last], {**sample.messages[last], "content": answer}]
            other = replace(sample, messages=messages)
        else:
            assert isinstance(sample, Completion)
            blanks = sample.completion[: len(sample.completion) - len(sample.completion.lstrip())]
            other = replace(sample, completion=blanks + answer)
        encoded = _encoded(other, tokenizer, settings)
        if not len(encoded.positions):
            raise DataError(f"{encoded.tokens} tokens, the limit is {settings.max_length}; raise --max-length")
        yield Candidate(choice, encoded.ids.tobytes(), encoded.positions.tobytes())
