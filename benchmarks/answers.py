"""Answers of the four commonsense sets, scored by ``dlora-edge evaluate`` and with transformers. JSON on stdout.

    python benchmarks/answers.py --data ../shared/data/commonsense [--write docs/log/benchmarks/answers.json]

The reference asks with transformers' own tokenizer, chat template and ``generate``, always the likeliest token, and
scores as LLM-Adapters does (commonsense_evaluate.py): the first match of the set's words in the answer has to be the
row's ``answer``. Both have the same weights; the wire and the device's head are in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from bars import at_least, write_bars
from children import cloud_server, log, need_bundle, run_json

COMMAND: Final = "python benchmarks/answers.py --data ../shared/data/commonsense"
MODEL: Final = "smollm2-135m"
# Of LLM-Adapters' extract_answer.
WORDS: Final = {
    "boolq": "true|false",
    "arc_easy": "answer1|answer2|answer3|answer4|answer5",
    "arc_challenge": "answer1|answer2|answer3|answer4|answer5",
    "openbookqa": "answer1|answer2|answer3|answer4|answer5",
}
NEW_TOKENS: Final = 24


def reference(rows: list[dict[str, str]], words: str) -> list[dict[str, Any]]:
    """What transformers answers to each row, and whether it counts."""
    import torch
    from transformers import AutoTokenizer

    from dlora.cloud.model.loading import load_model
    from dlora.cloud.model.source import find_source

    source = find_source(MODEL)
    model = load_model(source)
    tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    found = []
    for row in rows:
        asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None)
        answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        matches = re.findall(words, answer.strip())
        found.append({"answer": answer, "right": bool(matches) and matches[0] == row["answer"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DLORA_DATA", "../shared/data/commonsense")))
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2-fp32"))
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the bars into this file, docs/log/benchmarks/answers.json")
    options = parser.parse_args()
    need_bundle(options.bundle)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, cloud_server(MODEL, options.threads) as (url, _):
        for name, words in WORDS.items():
            saved = Path(directory) / "answers.jsonl"
            result = run_json(
                "-m", "dlora.edge", "evaluate", "--bundle", options.bundle, "--server", url, "--wire-dtype", "fp32",
                "--threads", options.threads, "--data", options.data / name, "--answers", "regex", "--limit",
                options.rows, "--max-new-tokens", NEW_TOKENS, "--save", saved, "--max-length", 512, "--json",
            )  # fmt: skip
            ours = [json.loads(line)["answers"][0] for line in saved.read_text().splitlines()]
            rows = json.loads((options.data / name / "test.json").read_text())[: options.rows]
            theirs = reference(rows, words)
            pairs = [*zip(ours, theirs, strict=True)]
            found[name] = {
                "rows": len(pairs),
                "right": result["right"],
                "right_interval": result["right_interval"],
                "reference_right": sum(each["right"] for each in theirs) / len(pairs),
                "same_answer": sum(one["answer"] == other["answer"] for one, other in pairs),
                "same_score": sum(one["right"] == other["right"] for one, other in pairs),
            }
            log(f"{name}: {found[name]}")
    if options.write is not None:
        write_bars(
            options.write,
            {
                f"answers, {name}: rows with {what} of the reference": at_least(each["rows"], each[key], COMMAND)
                for name, each in found.items()
                for what, key in (("the answer", "same_answer"), ("the score", "same_score"))
            },
        )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
