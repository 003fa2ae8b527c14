"""What dlora does with every causal model type of transformers: ``python tests/model_types.py`` writes the second half
of docs/reference/models.md again, in about ten minutes; with names, only their rows. The types of tests/families.py are
in the first half.

Of each type a tiny model with random weights is made and saved, loaded as ``dlora-export`` and ``dlora-cloud serve``
load it, exported, and trained for a step through a server; its gradients are compared with those of PEFT in one
process. Each is tried in a process of its own, with limits of memory and time.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import peft_reference as reference
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES, REFUSED_FAMILIES, random_model, tiny_tokenizer
from models_table import PAGE, TYPES_HEADING, rows_below, write_rows
from serving import config, random_dataset, randomize, serving, training
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from type_configs import decoder_changes, tiny_config

from dlora.cloud.model.base_model import load_base_model, load_model, quiet
from dlora.cloud.model.source import find_source
from dlora.edge.training.trainer import Trainer
from dlora.export.bundle import export_bundle
from dlora.export.selection import select_targets
from dlora.export.settings import ExportSettings
from dlora.protocol.errors import DloraError, ExportError
from dlora.protocol.targets import ALL_LINEAR
from dlora.protocol.text import first_line

Outcome = Literal["works", "refused", "not built", "crashed"]
OUTCOMES: Final[tuple[Outcome, ...]] = "works", "refused", "not built"
LEAST_SHOWN: Final = 1e-5  # below it, what is shown would differ from machine to machine
MOST: Final = 1e-4  # fp32 throughout; sums are taken in another order
_MEMORY: Final = 8 << 30
_TIMEOUT_S: Final = 180
_HEADERS: Final[dict[Outcome, str]] = {
    "works": "| type | config | LoRA's default",
    "refused": "| type | config | error",
    "not built": "| type | config | what transformers says",
}
_COUNTS: Final = """\
transformers {version} has {count} causal model types. The {others} that are not in the tables above were tried by
`python tests/model_types.py` on {date}: {works} work ({both} of them not with the default config of their type),
{refused} are refused, {missing} cannot be built tiny."""
_VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
}
"""Settings that some models of a type have and that change what dlora says."""


@dataclass(frozen=True)
class Trial:
    """A type, and what its config has otherwise than by default."""

    model_type: str
    changes: dict[str, Any]

    @property
    def settings(self) -> str:
        return ", ".join(f"`{name}={value}`" for name, value in _flat(self.changes))


@dataclass(frozen=True)
class Result:
    """``text``: what else its row says; ``difference``: of the gradients from PEFT's, where it works."""

    outcome: Outcome
    text: str
    difference: float = 0.0


def other_types() -> list[str]:
    """The causal model types of the installed transformers that are not among the tested families."""
    tested = {*FAMILIES, *MORE_FAMILIES, *REFUSED_FAMILIES}
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - tested)


def trials(model_type: str) -> list[Trial]:
    """By default, and as what makes a decoder of it where that is something else."""
    try:
        changes = [decoder_changes(model_type), _VARIANTS.get(model_type, {})]
    except Exception:
        changes = []
    return [Trial(model_type, {}), *(Trial(model_type, each) for each in changes if each)]


def run_trial(trial: Trial) -> Result:
    """Try it in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(trial, its))
    process.start()
    its.close()
    try:
        has_answered = ours.poll(_TIMEOUT_S)
        result: Result = ours.recv() if has_answered else Result("not built", f"takes more than {_TIMEOUT_S} s")
    except EOFError:
        result = Result("not built", f"takes more than {_MEMORY >> 30} GB")
    process.kill()
    process.join()
    return result


def _child(trial: Trial, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        answer.send(try_in(trial, Path(directory)))
    answer.close()
    os._exit(0)  # the server's threads of this process are nobody's


def try_in(trial: Trial, directory: Path) -> Result:
    """Try it in this process; ``directory`` is an empty one."""
    model = directory / trial.model_type
    try:
        with quiet():
            _save(tiny_config(trial.model_type, **trial.changes), model)
    except Exception as error:  # whatever a type's own code raises
        reason = first_line(error).partition(". ")[0]
        return Result("not built", f"{type(error).__name__}: {_short(reason)}")
    try:
        return _train(model)
    except DloraError as error:
        if "internal error" in str(error):
            return Result("crashed", "internal error of the server")
        without_numbers = re.sub(r" \(its logits differ by [^)]*\)", "", str(error))
        return Result("refused", without_numbers.replace(str(model), trial.model_type))
    except Exception as error:
        traceback.print_exc(file=sys.__stderr__)
        return Result("crashed", f"{type(error).__name__}: {_short(first_line(error))}")


def _save(config: PreTrainedConfig, directory: Path) -> None:
    """As ``save_pretrained`` does, and of an encoder-decoder model the config only, which is all that is looked at."""
    if config.is_encoder_decoder:
        config.save_pretrained(directory)
        return
    random_model(config).save_pretrained(directory)
    config.save_pretrained(directory)  # some models keep that of their text part only
    tiny_tokenizer().save_pretrained(directory)


def _train(model: Path) -> Result:
    base = load_base_model(str(model))
    bundle = model.with_name("bundle")
    given: tuple[str, ...] | None = None
    try:
        selection = select_targets(base, None)
        text = f"{_names_text(selection.target_modules)} | {'dlora' if selection.notes else 'PEFT'}'s"
    except ExportError as error:
        if "give --target-modules" not in str(error):
            raise
        given, text = (ALL_LINEAR,), "none: give `--target-modules` | "
    export_bundle(ExportSettings(str(model), bundle, rank=4, alpha=8.0, head_dtype="fp32", target_modules=given))
    worst = 0.0
    with serving(base) as server:
        for targets in ((), (ALL_LINEAR,)):
            run = config(grad_accum=2, target_modules=targets)
            dataset = random_dataset(min(base.vocabulary_size, base.token_embedding.num_embeddings))
            with training(bundle, server.url, run, dataset) as trainer:
                randomize(trainer)
                worst = max(worst, _difference(trainer, load_model(find_source(str(model))), run))
    if worst > MOST:
        return Result("crashed", f"off PEFT's by {worst:.1e}")
    return Result("works", text, worst)


def _difference(trainer: Trainer, model: Any, run: Any) -> float:
    """The largest of the first step's loss and gradients from PEFT's, relative to these."""
    batches = trainer.batches.step_batches(0)
    labelled = sum(len(batch.labels) for batch in batches)
    losses = trainer.model.forward_backward(batches, step=0, grad_scale=1 / labelled)
    split = float(sum(part.sum() for part in losses)) / labelled
    model.config.use_cache = False  # RWKV's state is changed in place
    wrapped = reference.with_adapters(model.eval(), trainer.adapters, run.adapter.rank, run.adapter.alpha)
    loss = reference.loss_of(wrapped, batches)
    loss.backward()
    pairs = [
        (parameter.grad, reference.parameter(wrapped, name).grad.numpy())
        for name, parameter in trainer.adapters.parameters().items()
    ]
    # Rounding is all there is of the gradient of a router that takes one expert a token.
    least = 1e-3 * max(float(np.linalg.norm(wanted)) for _, wanted in pairs)
    errors = [np.linalg.norm(grad - wanted) / max(float(np.linalg.norm(wanted)), least) for grad, wanted in pairs]
    return float(max(abs(split - loss.item()) / loss.item(), *errors))


def rows_of(results: Sequence[tuple[Trial, Result]]) -> dict[Outcome, list[str]]:
    """The lines of a type in each table: of trials that say the same, the first."""
    rows: dict[Outcome, list[str]] = {}
    said: set[str] = set()
    for trial, result in results:
        if result.text not in said:
            rows.setdefault(result.outcome, []).append(row_of(trial, result))
        said.add(result.text)
    return rows


def row_of(trial: Trial, result: Result) -> str:
    """Differences as the power of ten that they are below, so that the page is the same from machine to machine."""
    text = result.text.replace("|", r"\|")
    if result.outcome == "works":
        text = f"{result.text} | < 1e{math.ceil(math.log10(max(result.difference, LEAST_SHOWN)))}"
    return f"| {trial.model_type} | {trial.settings} | {text} |"


def page_rows(outcome: Outcome) -> list[str]:
    """The lines of one table of the page."""
    return rows_below(_HEADERS[outcome])


def type_of(row: str) -> str:
    return row.split(" | ")[0].removeprefix("| ")


def trial_of(row: str) -> Trial:
    """What a line of the page is about."""
    (trial,) = (each for each in trials(type_of(row)) if each.settings == row.split(" | ")[1])
    return trial


def page_version() -> str:
    """Of transformers, when the tables were made."""
    return PAGE.read_text().partition(TYPES_HEADING)[2].partition("transformers ")[2].split()[0]


def write_page(names: Sequence[str]) -> int:
    """Try these types, and write their rows; returns how many have none, as they crashed or gave something else."""
    rows = {outcome: [row for row in page_rows(outcome) if type_of(row) not in names] for outcome in OUTCOMES}
    crashed = 0
    for name in names:
        begun = time.monotonic()
        found = rows_of([(trial, run_trial(trial)) for trial in trials(name)])
        for outcome, lines in found.items():
            print(f"{time.monotonic() - begun:5.1f} s  {outcome:9}  {'; '.join(lines)}", flush=True)
            crashed += outcome == "crashed"
            rows.get(outcome, []).extend(lines)
    for outcome, lines in rows.items():
        write_rows(_HEADERS[outcome], sorted(lines))
    works, refused, missing = ({type_of(row) for row in lines} for lines in rows.values())
    counts = _COUNTS.format(
        count=len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), version=transformers.__version__,
        date=datetime.now(UTC).date().isoformat(), others=len(other_types()), works=len(works),
        both=len(works & refused), refused=len(refused - works), missing=len(missing - works),
    )  # fmt: skip
    PAGE.write_text(re.sub(r"^transformers .*? built tiny\.", counts, PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
    return crashed


def _names_text(names: Sequence[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    whole = any(".0." in name for name in names)  # a vision tower has modules of the same names
    text = ", ".join(f"`{name}`" for name in (last if whole else names))
    return f"{text} of the text model" if whole else text


def _flat(changes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in changes.items():
        yield from _flat(value) if isinstance(value, dict) else [(name, value)]


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120].rpartition(' ')[0]} …"


if __name__ == "__main__":
    sys.exit(min(1, write_page(sys.argv[1:] or other_types())))
