"""What a model is worth on data: its losses, and its answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any

import numpy as np
import numpy.typing as npt

from dlora.edge.choices import AnswerScore
from dlora.edge.data.examples import Dataset
from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.data.question import Question
from dlora.edge.generation.answer import TextAnswer
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.evaluation import Evaluation, ExampleScores, TrainableModel, evaluate_examples
from dlora.edge.model.generating import GeneratingModel

from .answers import is_right
from .intervals import Interval, difference, interval


@dataclass(frozen=True)
class ScoredModel:
    """An adapter, or the base model, with what was found of it.

    Attributes:
        name: as the user gave it.
        evaluation, scores: of the examples.
        answers: to each question, where there are some: what it said, or the choice that it found likeliest.
        right: bool (questions,), which count.
    """

    name: str
    evaluation: Evaluation
    scores: ExampleScores
    answers: Sequence[str] = ()
    right: npt.NDArray[np.bool_] | None = None

    def result(self) -> dict[str, Any]:
        """Numbers with their intervals, as JSON has them."""
        scores = self.scores
        found: dict[str, Any] = {
            "name": self.name,
            "loss": self.evaluation.loss,
            "loss_interval": _ends(interval(scores.losses, scores.labels)),
            "token_accuracy": self.evaluation.token_accuracy,
            "token_accuracy_interval": _ends(interval(scores.right, scores.labels)),
            "exact_match": self.evaluation.exact_match,
            "exact_match_interval": _ends(interval(scores.right == scores.labels)),
        }
        if self.right is not None:
            of_answers = interval(self.right)
            found |= {"right": of_answers.mean, "right_interval": _ends(of_answers), "questions": len(self.right)}
        return found

    def difference_to(self, other: ScoredModel) -> dict[str, Any]:
        """How much this one is above ``other`` on the same examples, as JSON has it."""
        mine, theirs = self.scores, other.scores
        found = {
            "loss": difference(mine.losses, theirs.losses, mine.labels),
            "token_accuracy": difference(mine.right, theirs.right, mine.labels),
        }
        if self.right is not None and other.right is not None:
            found["right"] = difference(self.right, other.right)
        return {name: {"mean": each.mean, "interval": _ends(each)} for name, each in found.items()}


def generate_answers(
    model: GeneratingModel,
    tokenizer: PromptTokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    on_answer: Callable[[], None] = lambda: None,
) -> list[str]:
    """What the model answers, always the likeliest token. Raises what ``TextAnswer`` does."""
    found = []
    context = Context(model)
    for question in questions:
        answer = TextAnswer(
            context,
            tokenizer,
            np.frombuffer(question.prompt, np.int32).astype(np.int64),
            Sampling(),
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        for _ in answer:
            pass
        found.append(answer.text)
        on_answer()
    return found


def likeliest_choices(
    model: TrainableModel,
    questions: Sequence[Question],
    batch_size: int,
    on_examples: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Of each question the choice whose tokens are the likeliest together, given the question; of equals the first."""
    candidates = [candidate for question in questions for candidate in question.candidates]
    dataset = Dataset.of(
        (np.frombuffer(each.ids, np.int32), np.frombuffer(each.label_positions, np.int32)) for each in candidates
    )
    _, scores = evaluate_examples(model, dataset, batch_size, lambda done, _: on_examples(done))
    found, start = [], 0
    for question in questions:
        end = start + len(question.candidates)
        found.append(question.candidates[int(np.argmin(scores.losses[start:end]))].text)
        start = end
    return found


def rights_of(
    how: AnswerScore, answers: Sequence[str], questions: Sequence[Question], pattern: Pattern[str] | None
) -> npt.NDArray[np.bool_]:
    """Which answers count as right, bool (questions,)."""
    pairs = zip(answers, questions, strict=True)
    return np.array([is_right(how, answer, question, pattern) for answer, question in pairs], np.bool_)


def _ends(found: Interval) -> list[float]:
    return [found.low, found.high]
