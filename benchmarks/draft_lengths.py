"""How many tokens the server is asked to guess, against the best that any fixed number gives.

On SmolLM2 and a small model of another family, with the default's adapter trained on two kinds of text: answers of
PEFT, and of each of their tokens whether the base model would have said it. From these alone, and from what a guess
takes of a step, it follows how many tokens a second any number of guesses gives. How quickly the share that was right
is learnt and forgotten is looked at on validation rows; the bars, in docs/log/benchmarks/draft-lengths.json, are of
test rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from bars import at_least, write_bars
from children import cloud_server, log, need_bundle, new_parser, run_json, worker
from economy_data import PARTS, SETS
from small_models import need_small_model

from dlora.cloud.model.base_model import load_base_model
from dlora.edge.data.prompt import prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.drafts import Drafting
from dlora.edge.model import measured_drafts
from dlora.edge.model.measured_drafts import MeasuredDrafts
from dlora.protocol.messages import MAX_DRAFT

FILE: Final = Path("benchmarks") / "draft-lengths.json"  # in docs
FAMILY: Final = "gemma3"
TEXTS: Final = ("dialogue", "messages")
GUESS_OF_STEP: Final = (0.02, 0.1, 0.3, 0.6)  # 0.3: in passes on loopback; 0.1: over 80 ms; 0.02: a GPU far away
WEIGHTS, FADINGS = (0.05, 0.1, 0.2), (0.0, 0.05, 0.2)
Answer = list[bool]
"""Of each token after the first, whether the base model would have said it."""


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    found: dict[str, Any] = {}
    bars = {}
    models = {options.model: (options.model, options.bundle)}
    models[FAMILY] = str(need_small_model(FAMILY, options.small_models)), options.small_models / FAMILY / "bundle"
    for (name, (model, bundle)), text in product(models.items(), TEXTS):
        answers = _answers(options, name, model, bundle, text)
        of_test = {guess: _against_best(answers["test"], guess) for guess in GUESS_OF_STEP}
        found[f"{name}, {text}"] = {
            "right": round(float(np.mean([is_right for each in answers["test"] for is_right in each])), 3),
            "of_the_best": of_test,
            "validation": {
                f"weight {weight}, fading {fading}": _with_constants(answers["validation"], weight, fading)
                for weight, fading in product(WEIGHTS, FADINGS)
            },
        }
        log(json.dumps({f"{name}, {text}": found[f"{name}, {text}"]}))
        bars[f"{name}_{text}"] = at_least(0.9, min(of_test.values()), "python benchmarks/draft_lengths.py --data DATA")
    write_bars(options.docs / FILE, bars)
    print(json.dumps(found, indent=1))


# -- answers -----------------------------------------------------------------------------------------------


def _answers(options: argparse.Namespace, name: str, model: str, bundle: Path, text: str) -> dict[str, list[Answer]]:
    """Of validation and test rows."""
    work = options.work / f"{name} {text}"
    work.mkdir(parents=True, exist_ok=True)
    parts = dict(zip(PARTS, SETS[text].rows(options.data), strict=True))
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts["train"]), encoding="utf-8")
    if not (work / "adapter" / "dlora_adapter.json").exists():
        with cloud_server(model, options.threads) as url:
            run_json(
                "-m", "dlora.edge", "train", "--bundle", need_bundle(bundle), "--server", url, "--seed", 0, "--json",
                "--data", work / "train.jsonl", "--out", work / "adapter", "--steps", options.steps,
            )  # fmt: skip
    base, found = load_base_model(model).model, dict[str, list[Answer]]()
    with prompt_tokenizer(Bundle.open(bundle)) as tokenizer:
        stop = ",".join(map(str, tokenizer.stop_token_ids))
        with worker("peft_generate.py", model, options.threads, stop) as peft, torch.no_grad():
            for part in PARTS[1:]:
                found[part] = []
                for row in parts[part][: options.answers]:
                    asked = row.get("messages", [])[:1]
                    ids = tokenizer.encode_chat(asked) if asked else tokenizer.encode_text(row["prompt"])
                    request = {"adapter": str(work / "adapter"), "ids": ids.tolist(), "tokens": options.tokens}
                    answer = peft(request)["tokens"]
                    logits = base(input_ids=torch.tensor([[*ids.tolist(), *answer]])).logits[0]
                    said = logits.argmax(-1)[len(ids) : -1].tolist()
                    found[part].append([*map(int.__eq__, said, answer[1:])])
    return found


# -- steps -------------------------------------------------------------------------------------------------


def _with_constants(answers: Sequence[Answer], weight: float, fading: float) -> float:
    """The mean share of the best over all costs, if what was right were learnt and forgotten so quickly."""
    with patch.multiple(measured_drafts, _WEIGHT_OF_TOKEN=weight, _FADING=fading):
        return round(statistics.mean(_against_best(answers, guess) for guess in GUESS_OF_STEP), 3)


def _against_best(answers: Sequence[Answer], guess: float) -> float:
    """Tokens a second as the device chooses, of those with the best fixed number of guesses."""
    best = min(sum(_steps_s(each, guess, Drafting(MeasuredDrafts(), "server", length)) for each in answers)
               for length in range(MAX_DRAFT + 1))  # fmt: skip
    measured = MeasuredDrafts()
    return round(best / sum(_steps_s(each, guess, Drafting(measured, "server")) for each in answers), 3)


def _steps_s(answer: Answer, guess: float, drafting: Drafting) -> float:
    """Seconds of an answer where a step takes one, and each guess ``guess`` more."""
    seconds, ids, left = 0.0, np.zeros(1, np.int64), answer
    while left:
        step = drafting.next(ids, min(len(left), MAX_DRAFT))
        drafts = [int(is_right) for is_right in left[: step.guesses.drafts]]
        right = len(drafts) if all(drafts) else drafts.index(0)
        step_s = 1 + guess * len(drafts)
        found: Any = SimpleNamespace(drafts=drafts, drafts_s=guess * len(drafts))
        drafting.observe(step, found, [1] * min(right + 1, len(left)), step_s)
        seconds, left = seconds + step_s, left[right + 1 :]
    return seconds


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds banking77/")
    parser.add_argument("--small-models", type=Path, default=Path("build/benchmarks/defaults"), help="of defaults.py")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/draft-lengths"), help="for adapters")
    parser.add_argument("--steps", type=int, default=60, help="that adapters are trained for")
    parser.add_argument("--answers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at the most")
    return parser.parse_args()


if __name__ == "__main__":
    main()
