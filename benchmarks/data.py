"""``dlora-edge data`` on a million rows: its time beside the tokenizer's own, and its memory. JSON on stdout.

    python benchmarks/data.py --bundle build/smollm2 [--rows 1000000]

The rows are made here: random English words, as chat messages and as prompt and completion. The tokenizer's own time is
that of the same texts, one after the other, in a process that does nothing else. The command's time has all that it
does: JSON, the chat template, labels, lengths, duplicates, a part held out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from bars import at_most, write_bars
from children import log, need_bundle

from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle

COMMAND: Final = "python benchmarks/data.py --bundle build/smollm2"
MAX_RATIO: Final = 3.0
MAX_MB: Final = 250.0
_TOKENIZE: Final = "--tokenize-only"
_TEXT: Final = (
    "the a of harbour river bread time person year way day thing man world life hand part child eye woman place work "
    "week case point government company number group problem fact"
)


def write_rows(path: Path, form: str, count: int) -> None:
    """Rows that all differ, but for every thousandth."""
    drawn, words = random.Random(1), _TEXT.split()
    with path.open("wb") as file:
        for number in range(count):
            asked = " ".join(drawn.choices(words, k=drawn.randint(5, 25))) + f" {number}?"
            answer = " ".join(drawn.choices(words, k=drawn.randint(5, 40))) + "."
            if form == "chat messages":
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                row: dict[str, Any] = {"messages": messages}
            else:
                row = {"prompt": asked, "completion": f" {answer}"}
            line = msgspec.json.encode(row) + b"\n"
            file.write(line * (2 if number % 1000 == 999 else 1))


def texts_of(path: Path, tokenizer: EdgeTokenizer) -> Iterator[str]:
    """What the tokenizer is given of each row."""
    with path.open("rb") as file:
        for line in file:
            row = msgspec.json.decode(line)
            yield tokenizer.chat_template.render(row["messages"]) if "messages" in row else (
                row["prompt"] + row["completion"]
            )


def tokenizer_s(bundle: Path, path: Path) -> float:
    """Seconds that the tokenizer alone takes; rendering the texts is not counted."""
    tokenizer, passed = EdgeTokenizer.open(Bundle.open(bundle)), 0.0
    inner = tokenizer._tokenizer
    texts = texts_of(path, tokenizer)
    while some := [text for _, text in zip(range(1000), texts, strict=False)]:
        started = time.perf_counter()
        for text in some:
            inner.encode(text, add_special_tokens=False)
        passed += time.perf_counter() - started
    return passed


def measure(bundle: Path, path: Path, form: str, rows: int) -> dict[str, Any]:
    """The tokenizer's time and the command's, one after the other, and the most memory that a process took."""
    log(f"{form}: the tokenizer alone")
    alone = float(
        subprocess.run(
            [sys.executable, __file__, "--bundle", str(bundle), _TOKENIZE, str(path)],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout
    )  # fmt: skip
    log(f"{form}: {alone:.1f} s; dlora-edge data")
    started = time.perf_counter()
    command = [sys.executable, "-m", "dlora.edge", "data", str(path), "--bundle", str(bundle)]
    process = subprocess.Popen([*command, "--hold-out", "auto", "--show", "0", "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)  # of it and of the process that it reads in, whichever took more
    passed = time.perf_counter() - started
    assert status == 0, status
    assert found["rows"] == rows + rows // 1000, found["rows"]
    assert found["duplicates"]["count"] == rows // 1000, found["duplicates"]
    log(f"{form}: {passed:.1f} s")
    return {
        "form": form,
        "rows": found["rows"],
        "tokens": found["tokens"],
        "tokenizer_s": round(alone, 2),
        "data_s": round(passed, 2),
        "ratio": round(passed / alone, 3),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--write", type=Path, help="put the bars into this file, docs/log/benchmarks/data.json")
    parser.add_argument(_TOKENIZE, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    need_bundle(arguments.bundle)
    if arguments.tokenize_only is not None:
        print(tokenizer_s(arguments.bundle, arguments.tokenize_only))
        return
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for form in ("prompt and completion", "chat messages"):
            path = Path(directory) / "rows.jsonl"
            write_rows(path, form, arguments.rows)
            found.append(measure(arguments.bundle, path, form, arguments.rows))
    if arguments.write is not None:
        bars = {f"data, {each['form']}: time": at_most(MAX_RATIO, each["ratio"], COMMAND) for each in found}
        bars["data: peak memory, MB"] = at_most(MAX_MB, max(each["peak_mb"] for each in found), COMMAND)
        write_bars(arguments.write, bars)
    print(json.dumps({"rows": arguments.rows, "found": found}, indent=1))


if __name__ == "__main__":
    main()
