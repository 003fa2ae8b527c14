"""Rows of data as questions: of each row its last answer, with all that comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dlora.protocol.errors import DataError
from dlora.protocol.tensors import IntArray

from .encoding import encode_sample
from .forms import Completion, Conversation, Form, Sample, form_of, sample_of
from .question import Candidate, Question, Wanted
from .read_settings import ReadSettings
from .records import read_records
from .split import held_out_rows
from .tokenizer import EdgeTokenizer

# LLM-Adapters (Hu et al., arXiv 2304.01933) writes the answers that there are at the end of each question.
_ANSWER_FORMAT: Final = "Answer format:"


def read_questions(
    path: Path,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    wanted: Wanted,
    on_place: Callable[[str], None] = lambda _: None,
) -> list[Question]:
    """The questions of a file or a directory: of its held-out rows where there are such.

    Raises ``DataError`` with file and line for a row that asks nothing.
    """
    found, digests = list[Question](), list[int]()
    settings = replace(settings, too_long="error", train_on="last")
    for record in read_records(path, settings.columns, part=settings.part):
        on_place(record.place)
        if wanted.most is not None and not settings.split and len(found) >= wanted.most:
            break
        try:
            form = form_of(record)
            sample = sample_of(record, form, has_chat_template=tokenizer.has_chat_template)
            asked, prompt, reference = _asked(sample, tokenizer, form)
            key, choices = record.fields.get("answer"), _choices(record.fields) or [*wanted.choices]
            key = key if isinstance(key, str) and key.strip() else reference.strip()
            candidates = []
            if wanted.with_candidates:
                candidates = [*_candidates(sample, tokenizer, settings, reference, key, choices)]
            found.append(Question(record.place, asked, prompt.tobytes(), reference, key, choices, candidates))
            if settings.split:
                (encoded,) = encode_sample(sample, tokenizer, settings)
                digests.append(encoded.digest)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
    if not found:
        raise DataError(f"{path}: no examples in it")
    if settings.split:
        is_held = held_out_rows(np.array(digests, np.uint64), settings.split)
        found = [question for question, held in zip(found, is_held, strict=True) if held]
    return found[: wanted.most]


def _asked(sample: Sample, tokenizer: EdgeTokenizer, form: Form) -> tuple[str, IntArray, str]:
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


def _candidates(
    sample: Sample,
    tokenizer: EdgeTokenizer,
    settings: ReadSettings,
    reference: str,
    key: str,
    choices: Sequence[str],
) -> Iterator[Candidate]:
    if not choices:
        raise DataError(
            "it names no answers to choose among: give --choices, a list 'choices' in each row, or "
            "'Answer format: a/b' at the end of the question"
        )
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
        (encoded,) = encode_sample(other, tokenizer, settings)
        if not len(encoded.positions):
            raise DataError(f"{encoded.tokens} tokens, the limit is {settings.max_length}; raise --max-length")
        yield Candidate(choice, encoded.ids.tobytes(), encoded.positions.tobytes())
