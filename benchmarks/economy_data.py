"""The sets of ``economy.py``: rows to train on, to choose the learning rate by, and to test on, as JSONL.

What is drawn is drawn from constants, so that a set is the same in every run; only the order of training depends on a
run's seed. The data sets are not in the repository, but for the dialogue, which installs with a package.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from dialogue import write_dialogue

Rows = list[dict[str, Any]]
Parts = tuple[Rows, Rows, Rows]  # train, validation, test

MAX_LENGTH: Final = 512
PARTS: Final = ("train", "validation", "test")


@dataclass(frozen=True)
class BenchmarkSet:
    """One set.

    Attributes:
        rows: makes its parts of the data folder.
        steps: of a run, of 8 rows each; None: one epoch.
        loss_bar: how far above the baseline's a mean loss is still not worse; a share of it where ``relative``.
    """

    title: str
    rows: Callable[[Path], Parts]
    steps: int | None = None
    loss_bar: float = 0.02
    relative: bool = False


@dataclass(frozen=True)
class Data:
    """A set as tokens."""

    train: Dataset
    validation: Dataset
    test: Dataset

    @property
    def fingerprint(self) -> str:
        """Short hex digest of all three parts."""
        parts = (self.train, self.validation, self.test)
        return hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:12]


def load(name: str, folder: Path, work: Path, tokenizer: EdgeTokenizer) -> Data:
    """A set as tokens, by way of JSONL files in ``work`` that begin with ``name``."""
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for part, rows in zip(PARTS, SETS[name].rows(folder), strict=True):
        path = work / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        found.append(load_examples(path, tokenizer, max_length=MAX_LENGTH))
    return Data(*found)


def _banking(first: int, count: int, validation: int) -> Callable[[Path], Parts]:
    """``count`` intents of Banking77, from the ``first`` on in an order that is drawn once."""

    def rows(folder: Path) -> Parts:
        texts = (_text(folder / "banking77" / f"{name}.csv") for name in ("train", "test"))
        train, test = (list(csv.DictReader(io.StringIO(text, newline=""))) for text in texts)
        intents = sorted({row["category"] for row in train})
        chosen = set(np.random.default_rng(77).permutation(intents)[first : first + count].tolist())

        def of_chosen(table: Rows) -> Rows:
            return [
                {"prompt": f"Message: {row['text']}\nIntent:", "completion": " " + row["category"].replace("_", " ")}
                for row in table
                if row["category"] in chosen
            ]

        return *_hold_out(of_chosen(train), validation), _hold_out(of_chosen(test), len(test))[1]

    return rows


def _dialogue(lines: int | None) -> Callable[[Path], Parts]:
    """The demo's dialogue and its 96 held-out answers; ``lines`` of its training rows, or all of them."""

    def rows(_: Path) -> Parts:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_dialogue(Path(folder), 96, seed=0)
            train, test = ([json.loads(line) for line in _text(path).strip().split("\n")] for path in paths)
        kept, validation = _hold_out(train, 100)
        return kept[:lines], validation, test

    return rows


def _commonsense(name: str) -> Callable[[Path], Parts]:
    """A task in the form of LLM-Adapters: 1,200 rows to train on, 200 to validate, 500 of the test rows."""

    def rows(folder: Path) -> Parts:
        train, test = (_commonsense_rows(folder / "commonsense" / name / f"{part}.json") for part in ("train", "test"))
        kept, validation = _hold_out(train, 200)
        return kept[:1200], validation, _hold_out(test, 500)[1]

    return rows


def _commonsense_rows(path: Path) -> Rows:
    return [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in json.loads(_text(path))]


def _messages(folder: Path) -> Parts:
    """Ten other intents of Banking77 the other way round: nearly all tokens are the answer's."""
    train, validation, test = _banking(30, 10, 160)(folder)
    return _turned(train), _turned(validation), _turned(test)


def _turned(rows: Rows) -> Rows:
    texts = ((row["prompt"].removeprefix("Message: ").removesuffix("\nIntent:"), row["completion"]) for row in rows)
    return [{"prompt": f"Intent:{intent}\nMessage:", "completion": f" {text}"} for text, intent in texts]


PAGES: Final = "4351aeb378a73c2e3eab3596bb9b35cfa46873d8"  # the commit whose pages are read
FOLDERS: Final = tuple(f"docs/{name}" for name in ("decisions", "howto", "models.md", "operating.md", "quickstart.md"))
PIECE: Final = 700  # characters


def _documents(_: Path) -> Parts:
    """Pages of this repository's documentation, as they once were: paragraphs, joined to pieces."""
    names = _git("ls-tree", "-r", "--name-only", PAGES, *FOLDERS).splitlines()
    pages = [{"text": _git("show", f"{PAGES}:{name}")} for name in names]
    rest, test = _hold_out(pages, 16)
    train, validation = rest[12:], rest[:12]
    return _pieces(train), _pieces(validation), _pieces(test)


def _git(*command: str) -> str:
    found = subprocess.run(["git", *command], capture_output=True, text=True, encoding="utf-8", check=False)
    if found.returncode:
        raise SystemExit(f"error: this is no clone with the commit {PAGES[:12]}: {found.stderr.strip()}")
    return found.stdout


def _pieces(pages: Rows) -> Rows:
    pieces: list[str] = []
    for page in pages:
        pieces.append("")
        for paragraph in page["text"].split("\n\n"):
            if pieces[-1] and len(pieces[-1]) + len(paragraph) > PIECE:
                pieces.append("")
            pieces[-1] += paragraph[:PIECE] + "\n\n"
    return [{"text": piece.strip()} for piece in pieces if piece.strip()]


def _hold_out(rows: Sequence[dict[str, Any]], count: int) -> tuple[Rows, Rows]:
    """The rows in a drawn order: the others, and ``count`` held out."""
    shuffled = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    return shuffled[count:], shuffled[:count]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise SystemExit(
            f"error: {path} is not there; give the folder that holds banking77/ and commonsense/ as --data"
        ) from None


SETS: Final[dict[str, BenchmarkSet]] = {
    "chat60": BenchmarkSet("60 chat lines, 40 steps", _dialogue(60), 40, loss_bar=0.025, relative=True),
    "b10": BenchmarkSet("Banking77, 10 intents, one epoch", _banking(0, 10, 160)),
    "dialogue": BenchmarkSet("the demo's dialogue, 120 steps", _dialogue(None), 120, loss_bar=0.025, relative=True),
    "b20": BenchmarkSet("Banking77, 20 other intents, one epoch", _banking(10, 20, 200)),
    "arc_easy": BenchmarkSet("ARC-Easy, 150 steps", _commonsense("arc_easy"), 150),
    "boolq": BenchmarkSet("BoolQ, 150 steps", _commonsense("boolq"), 150),
    "documents": BenchmarkSet("pages of documentation, 40 steps", _documents, 40, relative=True),
    "messages": BenchmarkSet("Banking77, messages of an intent, one epoch", _messages, relative=True),
}
