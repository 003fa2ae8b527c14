"""The bars that benchmarks write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dlora.protocol.errors import StorageError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bars import FILE, at_least, at_most, write_bars

COMMAND = "python benchmarks/step.py"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_bar_holds_up_to_its_number_and_says_why_where_not() -> None:
    assert at_most(0.9, 0.9, COMMAND) == {"bar": 0.9, "value": 0.9, "holds": True, "command": COMMAND}
    missed = at_most(1e-4, 0.000123456, COMMAND)
    assert missed == {
        "bar": 1e-4, "value": 0.0001235, "holds": False, "command": COMMAND,
        "reason": "0.0001235 where at most 0.0001 is wanted",
    }  # fmt: skip
    assert not at_most(1.0, float("nan"), COMMAND)["holds"]
    # What is shown is rounded, and what decides is not.
    assert not at_most(0.9, 0.9000001, COMMAND)["holds"]
    assert at_least(5, 5.0, COMMAND) == {"bar": 5.0, "value": 5.0, "holds": True, "command": COMMAND}
    assert at_least(5, 4.9, COMMAND)["reason"] == "4.9 where at least 5 is wanted"
    assert not at_least(5, float("nan"), COMMAND)["holds"]


def test_bars_of_others_stay_and_names_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "docs" / FILE
    write_bars(path, {"z": at_most(1, 1, "one"), "m": at_most(1, 1, "one")})
    write_bars(path, {"m": at_most(1, 2, "another"), "a": at_most(1, 1, "another")})
    assert list(read(path)) == ["a", "m", "z"]
    assert [entry["command"] for entry in read(path).values()] == ["another", "another", "one"]
    write_bars(path, {"m": at_most(1, 1, "one")}, forget=["m", "z", "not there"])
    assert list(read(path)) == ["a", "m"]
    assert path.read_text().endswith("}\n")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_bars_that_cannot_be_written_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "economy.json"
    write_bars(path, {"a": at_most(1, 1, "one")})
    before = path.read_bytes()

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StorageError):
        write_bars(path, {"b": at_most(1, 1, "one")})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
