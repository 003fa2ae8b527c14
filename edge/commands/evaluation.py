"""What ``dlora-edge evaluate`` does: each model on the same examples and questions, and how they compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from re import Pattern
from typing import TYPE_CHECKING, Any

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.choices import AnswerScore
from dlora.edge.data.examples import Dataset
from dlora.edge.data.loading import load_questions
from dlora.edge.data.question import Question, Wanted
from dlora.edge.engine.bundle import Bundle
from dlora.edge.files import write_atomically
from dlora.edge.run.display import Display
from dlora.edge.run.reading import read_held_out, test_settings
from dlora.edge.scoring.answers import compile_pattern
from dlora.edge.settings import Data, Settings
from dlora.edge.wire.recorder import Recorder, recording
from dlora.protocol.errors import DataError, UsageError

from .model_options import UsedModel

if TYPE_CHECKING:
    from dlora.edge.data.prompt import PromptTokenizer
    from dlora.edge.scoring.scored_model import ScoredModel


@dataclass(frozen=True)
class Asking:
    """How questions are asked, and answers scored."""

    how: AnswerScore
    pattern: Pattern[str] | None
    choices: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def of(cls, how: AnswerScore, *, pattern: str | None, choices: str | None, max_new_tokens: int) -> Asking:
        """Of options of the same names. Raises ``UsageError`` for those that do not go with ``how``."""
        if pattern is not None and how != "regex":
            raise UsageError(f"--pattern is for --answers regex, not {how}")
        named = tuple(word for each in (choices or "").split(",") if (word := each.strip()))
        if choices is not None and len(named) < 2:
            raise UsageError("--choices needs two answers at least, separated by commas")
        return cls(how, None if pattern is None else compile_pattern(pattern), named, max_new_tokens)

    def read(self, data: Data, bundle: Bundle, display: Display, limit: int | None) -> list[Question]:
        """The questions of the data, the first ``limit``. Raises ``DataError`` for those that cannot be scored so."""
        assert data.data is not None  # the command asks for it
        with display.reading() as on_tick:
            wanted = Wanted(self.choices, with_candidates=self.how == "likelihood", most=limit)
            found = load_questions(bundle, data.data, test_settings(data, bundle.manifest), wanted, on_tick)
        for question in found:
            if self.how == "regex" and self.pattern is None and not question.choices:
                raise DataError(f"{question.place}: it names no answers to look for: give --pattern or --choices")
            if self.how == "likelihood" and question.key not in question.choices:
                there = ", ".join(question.choices)
                raise DataError(f"{question.place}: its answer {question.key!r} is none of the choices {there}")
        return found


@dataclass(frozen=True)
class Answered:
    """Questions, and what each model answered."""

    models: Sequence[ScoredModel]
    questions: Sequence[Question]

    def save(self, path: Path) -> None:
        """A JSON object a line: place, asked, reference, and of each model its answer and whether it counts.

        Raises ``StorageError``.
        """
        write_atomically(path, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in self.rows()))

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "place": question.place,
                "asked": question.asked,
                "reference": question.reference,
                "key": question.key,
                "answers": [
                    {"name": model.name, "answer": model.answers[index], "right": bool(model.right[index])}
                    for model in self.models
                    if model.right is not None
                ],
            }
            for index, question in enumerate(self.questions)
        ]

    def show(self, result: dict[str, Any], count: int) -> None:
        """Print a table of the models, and answers side by side."""
        from .evaluation_tables import show_answers, show_models

        show_models(result)
        rows = self.rows()
        if self.questions:
            # Where models differ first: that is what one looks for.
            rows.sort(key=lambda row: len({each["answer"] for each in row["answers"]}) < 2)
            show_answers(rows[:count])


def evaluate_models(
    models: Sequence[tuple[str, UsedModel]],
    settings: Settings,
    display: Display,
    *,
    asking: Asking | None,
    limit: int | None,
    record: Path | None,
) -> tuple[dict[str, Any], Answered]:
    """What is found of each model, by its name, as JSON has it, and what they answered. Raises any ``DloraError``."""
    bundle = models[0][1].bundle
    dataset = read_held_out(settings.data, bundle, display)
    if limit is not None and limit < len(dataset):
        dataset = dataset.subset(range(limit))
    if len(models) > 1 and any(_invocation_of(model) for _, model in models):  # all on the same examples
        dataset = dataset.one_answer_each()
    questions = [] if asking is None else asking.read(settings.data, bundle, display, limit)
    from dlora.edge.data.prompt import prompt_tokenizer

    scored: list[ScoredModel] = []
    with ExitStack() as stack:
        tokenizer = None
        if asking is not None and asking.how != "likelihood":  # before there is an engine
            tokenizer = stack.enter_context(prompt_tokenizer(bundle))
        recorder = stack.enter_context(recording(record, bundle.tokenizer_file(), display.warn))
        for name, model in models:
            label = "" if len(models) == 1 else name
            scored.append(_score(
                name, model, dataset, questions, display, label=label, asking=asking, tokenizer=tokenizer,
                recorder=recorder,
            ))  # fmt: skip
    first, *others = scored
    evaluation = first.evaluation
    result = first.result() | {"tokens": evaluation.tokens, "examples": evaluation.examples}
    if asking is not None:
        result["answers"] = asking.how
    if others:
        result["against"] = [other.result() | {"difference": first.difference_to(other)} for other in others]
    return result, Answered(scored, questions)


def _invocation_of(model: UsedModel) -> tuple[int, ...]:
    """The tokens from which on a model's adapter acts; none: everywhere."""
    adapter = model.find_adapter()
    return () if adapter is None else load_adapter(adapter).invocation


def _score(
    name: str,
    used: UsedModel,
    dataset: Dataset,
    questions: Sequence[Question],
    display: Display,
    *,
    label: str,
    asking: Asking | None,
    tokenizer: PromptTokenizer | None,
    recorder: Recorder | None,
) -> ScoredModel:
    from dlora.edge.data.invocation import uninvoked_line
    from dlora.edge.model.evaluation import evaluate_examples
    from dlora.edge.scoring.scored_model import ScoredModel, generate_answers, likeliest_choices, rights_of

    answers: list[str] = []
    batch_size = used.settings.training.batch_size
    longest = max([int(dataset.lengths.max()), *(len(each.ids) // 4 for one in questions for each in one.candidates)])
    with used.open_to_evaluate(longest, recorder) as model:
        if model.invocation:
            dataset = dataset.one_answer_each()
            if line := uninvoked_line(dataset, model.invocation):
                display.warn(line)
        if recorder is not None:
            recorder.add_examples((example.ids, example.label_positions) for example in dataset)
        with display.evaluating(label, len(dataset)) as advance:
            evaluation, scores = evaluate_examples(model, dataset, batch_size, lambda done, _: advance(done))
        if asking is not None and asking.how == "likelihood":
            with display.evaluating(f"{label} choices", sum(len(each.candidates) for each in questions)) as advance:
                answers = likeliest_choices(model, questions, batch_size, advance)
    if asking is not None and tokenizer is not None:
        context_length = max(len(each.prompt) // 4 for each in questions) + asking.max_new_tokens
        opening = used.open_generating(context_length=context_length, recorder=recorder)
        with opening as generating, display.evaluating(f"{label} answers", len(questions)) as advance:
            answers = generate_answers(
                generating, tokenizer, questions, max_new_tokens=asking.max_new_tokens, on_answer=lambda: advance(1)
            )
    right = None if asking is None else rights_of(asking.how, answers, questions, asking.pattern)
    return ScoredModel(name, evaluation, scores, answers, right)
