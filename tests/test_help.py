"""What commands say of themselves: help, versions, names, the shell's completion; and what ``make`` alone says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from processes import BIN, Finished, quiet_environment, run_command

from dlora.edge.settings import fields_of
from dlora.protocol.version import SOFTWARE_VERSION

ROOT = Path(__file__).parents[1]
PARTS = ("edge", "cloud", "export")
COMMANDS = [
    ("edge",), ("edge", "data"), ("edge", "plan"), ("edge", "train"), ("edge", "report"), ("edge", "compare"),
    ("edge", "evaluate"), ("edge", "generate"), ("edge", "chat"), ("edge", "serve"),
    ("edge", "selftest"), ("edge", "info"), ("edge", "doctor"), ("edge", "adapters"), ("edge", "adapters", "list"),
    ("edge", "adapters", "show"), ("cloud",), ("cloud", "serve"), ("cloud", "token"), ("cloud", "token", "create"),
    ("cloud", "token", "list"), ("cloud", "token", "revoke"), ("cloud", "token", "prune"), ("export",),
    ("export", "merge"),
]  # fmt: skip


def run(command: list[str], **environment: str) -> Finished:
    return run_command(command, env={**quiet_environment(), **environment})


def command_line(part: str, *words: str) -> list[str]:
    return [str(BIN / f"dlora-{part}"), *words]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_readable_in_80_columns(words: tuple[str, ...]) -> None:
    """No name is cut off, no type is broken, and what is explained has room to be read. ``-h`` gives it everywhere."""
    part, *rest = words
    done = run(command_line(part, *rest, "-h"), COLUMNS="80")
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.stdout
    starts = [found.end() for line in lines if (found := re.match(r"│ [* ]? *--.*?  +(?=[A-Z]\w+ )", line))]
    assert all(start <= 56 for start in starts), done.stdout  # 22 columns are left
    for line in lines:  # a type that does not fit is broken anywhere
        cells = re.split(r"  +", line.strip("│ "))
        assert all(cell.count("<") == cell.count(">") for cell in cells if re.match(r"<\w+[|>]", cell)), line
        assert all(cell.count("[") == cell.count("]") for cell in cells if re.match(r"\[-?\d", cell)), line


def test_help_of_train_is_short_and_all_of_it_is_long() -> None:
    """In panels, each of which is one structure of the settings."""
    short, long = (run(command_line("edge", "train", word), COLUMNS="80").stdout for word in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 110
    found = [re.findall(r"^│ *(--[\w-]+)", text, re.M) for text in (short, long)]
    basic, every = (set(options) - {"--help", "--help-all"} for options in found)
    assert len(basic) <= 25
    assert {"--bundle", "--server", "--data", "--out"} < basic < every
    assert every >= {f"--{field.option}" for field in fields_of() if field.depth != "rare"}
    for text in (short, long):
        panels = re.findall(r"^╭─ (.*?) ─+╮", text, re.M)
        assert panels == ["Options", *dict.fromkeys(field.panel for field in fields_of()), "Settings in a file"]


@pytest.mark.parametrize("part", PARTS)
def test_version_and_name_in_both_ways_to_start(part: str) -> None:
    module = [sys.executable, "-m", f"dlora.{part}"]
    for command in (command_line(part), module):
        assert run([*command, "--version"]).stdout == f"dlora-{part} {SOFTWARE_VERSION}\n"
        assert f"Usage: dlora-{part} " in run([*command, "--help"]).stdout
    wrong = run([*module, "--nonsense"])
    assert (wrong.code, f"dlora-{part}" in wrong.stderr) == (2, True)


COMPLETIONS = [
    ("edge", "tra", "train"), ("edge", "adapters sh", "show"), ("cloud", "ser", "serve"),
    ("export", "--ran", "--rank"), ("export", "mer", "merge"), ("export", "merge --ad", "--adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "begun", "whole"), COMPLETIONS)
def test_shell_completion_works(part: str, begun: str, whole: str, tmp_path: Path) -> None:
    settings = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run(command_line(part, "--install-completion", "bash"), **settings)
    assert done.code == 0, done.stderr
    (script,) = (tmp_path / ".bash_completions").iterdir()
    variable = f"_DLORA_{part.upper()}_COMPLETE"
    assert f"{variable}=complete_bash" in script.read_text()
    asked = {variable: "complete_bash", "COMP_WORDS": f"dlora-{part} {begun}", "COMP_CWORD": str(len(begun.split()))}
    assert run(command_line(part), **asked).stdout.split() == [whole]


@pytest.mark.parametrize("part", PARTS)
def test_help_and_completion_load_no_compute_libraries(part: str) -> None:
    heavy = {"torch", "transformers", "onnxruntime"}
    module = {"edge": "edge.commands.app", "cloud": "cloud.commands.app", "export": "export.cli"}[part]
    code = f"import sys, dlora.{module}; print(sorted({heavy!r} & set(sys.modules)))"
    assert run([sys.executable, "-c", code]).stdout == "[]\n"


@pytest.mark.parametrize(("part", "words"), [("cloud", ["serve", "org/name"]), ("export", ["org/name", "--out", "y"])])
def test_missing_library_is_a_one_line_error(part: str, words: list[str], tmp_path: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; from dlora.{part}.__main__ import main; main()"
    done = run([sys.executable, "-c", code, *words], DLORA_CLOUD_STATE=str(tmp_path))
    assert (done.code, done.stderr.count("\n")) == (12, 1), done.stderr
    assert f"'torch' is not installed; this command needs the extra '{part}'" in done.stderr


def test_make_without_target_lists_the_targets() -> None:
    plain, asked = (run(["make", "-C", str(ROOT), "--no-print-directory", *words]) for words in ([], ["help"]))
    assert plain == asked
    assert plain.code == 0
    targets = re.findall(r"^  make ([a-z-]+) .*\S$", plain.stdout, re.M)
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.M)
    assert phony
    assert sorted(targets) == sorted(set(phony[1].split()))
    assert all(len(line) <= 100 for line in plain.stdout.splitlines())
    assert not os.path.lexists(ROOT / "help")
