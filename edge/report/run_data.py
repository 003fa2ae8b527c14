"""Reads a run's directory: all that a report is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dlora.edge.run.file_names import EVALUATIONS, METRICS, SUMMARY
from dlora.edge.run.guard import MOST_ABOVE, Worsening, held_out_worsening
from dlora.edge.run.run_file import RunFile, load_run_file
from dlora.protocol.errors import CheckpointError
from dlora.protocol.files import read_regular
from dlora.protocol.structure_words import structure_words

from .steps import Steps, read_steps


class EvaluationLine(msgspec.Struct, frozen=True):
    """A line of ``evaluations.jsonl``.

    Attributes:
        step: how many steps were done.
        loss: a mean over ``tokens``; token_accuracy, exact_match: shares of tokens and of examples that were right.
    """

    step: int
    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int
    examples: int


@dataclass(frozen=True)
class RunData:
    """A run, as its directory has it.

    Attributes:
        name: of the directory.
        evaluations: ascending.
        summary: of a run that is done; None of one that is not, or has gone on since.
    """

    name: str
    file: RunFile
    steps: Steps
    evaluations: tuple[EvaluationLine, ...]
    summary: dict[str, Any] | None

    @property
    def is_done(self) -> bool:
        return self.summary is not None

    @property
    def evaluation_bytes(self) -> int | None:
        """Bytes, up and down, of the evaluations of the last start of a run that is done."""
        found = [(self.summary or {}).get(f"eval_bytes_{way}") for way in ("up", "down")]
        sizes = [size for size in found if isinstance(size, int)]
        return sum(sizes) if len(sizes) == len(found) else None

    @property
    def live_loss(self) -> float | None:
        """Held-out loss of the saved adapter used live, as PEFT does; None where it was trained so, or nobody knows."""
        found = (self.summary or {}).get("eval_loss_live")
        return found if isinstance(found, float) else None

    @property
    def worsening(self) -> Worsening | None:
        """How the model is worse than before training, in the end, or by now and by far; None where it is not."""
        if self.file.eval_data is None:
            return self.steps.losses.worsening
        evaluations = [msgspec.structs.asdict(each) for each in self.evaluations]
        return held_out_worsening(evaluations, 1.0 if self.is_done else MOST_ABOVE)

    @property
    def before(self) -> EvaluationLine | None:
        """The evaluation before the first step."""
        return next((each for each in self.evaluations if each.step == 0), None)

    @property
    def after(self) -> EvaluationLine | None:
        """The last evaluation, where there is one after a step."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1].step else None

    @property
    def best(self) -> EvaluationLine | None:
        """The one with the lowest loss, the first of equals."""
        return min(self.evaluations, key=lambda each: each.loss, default=None)


def read_run(out: Path) -> RunData:
    """Read a run's directory. Raises ``CheckpointError`` where it is none, or one of its files is damaged."""
    file = load_run_file(out)
    steps = read_steps(out / METRICS)
    return RunData(
        name=out.absolute().name,
        file=file,
        steps=steps,
        evaluations=read_evaluations(out / EVALUATIONS),
        summary=_summary(out / SUMMARY, steps.count),
    )


def read_evaluations(path: Path) -> tuple[EvaluationLine, ...]:
    """Of an ``evaluations.jsonl``, ascending; none where there is none. Raises ``CheckpointError``."""
    try:
        decoder = msgspec.json.Decoder(EvaluationLine)
        lines = [decoder.decode(line) for line in read_regular(path).splitlines()]  # each is one object, and whole
        return tuple(sorted(lines, key=lambda each: each.step))
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = structure_words(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); remove it to go without evaluations") from None


def _summary(path: Path, steps: int) -> dict[str, Any] | None:
    try:
        found = json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({structure_words(error)}); remove it to go without") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no summary of a run; remove it to go without")
    return found if found.get("steps") == steps else None
