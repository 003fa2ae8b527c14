"""How much there is to read, by room, and whether it is more than `size.toml` allows.

python .ci/size.py [--json]
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
PRODUCT: Final = ("protocol", "edge", "cloud", "export")
LEFT_OUT: Final = ("vendor",)


class Size(NamedTuple):
    """Of a file, or of some.

    Attributes:
        lines: all of them; statements: of Python, docstrings not among them; docstrings: lines of these.
    """

    files: int = 0
    lines: int = 0
    statements: int = 0
    docstrings: int = 0

    def __add__(self, other: tuple[int, ...]) -> Size:  # type: ignore[override]
        return Size(*(mine + its for mine, its in zip(self, other, strict=True)))


def size_of(path: Path) -> Size:
    """Of one file."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    statements = docstrings = 0
    for node in ast.walk(ast.parse(text)):
        statements += isinstance(node, ast.stmt)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings += (first.end_lineno or first.lineno) - first.lineno + 1
            statements -= 1
    return Size(1, len(text.splitlines()), statements, docstrings)


def sizes() -> dict[str, Size]:
    """Of each file, by its place from the root on."""
    return {
        str(path.relative_to(ROOT)): size_of(path)
        for folder in (*PRODUCT, "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not set(LEFT_OUT) & set(path.parts)
    }


def rooms(files: dict[str, Size]) -> dict[str, Size]:
    """Of each folder that has files of its own, and of what the ceilings are for."""
    found: dict[str, Size] = {}
    for name, size in files.items():
        top, room = name.split("/")[0], str(Path(name).parent)
        for each in {room, top, *(["product"] if top in PRODUCT else [])}:
            found[each] = found.get(each, Size()) + size
    return found


def excesses(files: dict[str, Size], found: dict[str, Size], ceilings: dict[str, Any]) -> list[str]:
    """What is above a ceiling, and what is excused and need not be."""
    said = [
        f"{room} has {found[room].lines:,} lines, its ceiling is {most:,}"
        for room, most in ceilings["lines"].items()
        if found[room].lines > most
    ]
    long = {}
    for name, size in files.items():
        top = name.split("/")[0]
        most = ceilings["longest_file"]["product" if top in PRODUCT else top]
        if size.lines > most:
            long[name] = f"{name} has {size.lines:,} lines, at most {most} are meant to be; divide it"
    excused = ceilings["long_for_a_reason"]
    said += [line for name, line in long.items() if name not in excused]
    return said + [f"{name} is no longer long: take it out of size.toml" for name in excused if name not in long]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    ceilings = tomllib.loads((ROOT / ".ci" / "size.toml").read_text())
    files = sizes()
    found = rooms(files)
    wrong = excesses(files, found, ceilings)
    if arguments.json:
        print(json.dumps({"rooms": {name: size._asdict() for name, size in found.items()}, "wrong": wrong}, indent=1))
    else:
        print(f"{'room':28}{'files':>6}{'lines':>8}{'ceiling':>9}{'statements':>12}{'docstrings':>12}")
        for name in sorted(found, key=lambda name: (name == "product", name)):
            size, most = found[name], ceilings["lines"].get(name)
            ceiling = "" if most is None else f"{most:,}"
            share = f"{size.docstrings / size.lines:.0%}"
            print(f"{name:28}{size.files:>6}{size.lines:>8,}{ceiling:>9}{size.statements:>12,}{share:>12}")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
