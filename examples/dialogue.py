"""Real dialogue for the demo: the English part of the package chatterbot-corpus (BSD), as JSONL."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

import yaml


def write_dialogue(directory: Path, held_out: int, seed: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl`` of ``messages`` rows, without a question in both; return their paths."""
    answers: dict[str, str] = {}
    for path in sorted(files("chatterbot_corpus").joinpath("data", "english").iterdir(), key=str):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) >= 2 and str(conversation[0]) not in answers:
                answers[str(conversation[0])] = str(conversation[1])
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in answers.items()
        if len(question) + len(answer) < 600
    ]
    random.Random(seed).shuffle(rows)
    paths = directory / "train.jsonl", directory / "eval.jsonl"
    for path, some in zip(paths, (rows[held_out:], rows[:held_out]), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    return paths
