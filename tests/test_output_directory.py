"""A bundle's place: Ctrl-C right after a call that changes the disk leaves the old bundle whole and no scraps, and so
does a disk that is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_disk import small_disk
from tiny import TinyFactory

from dlora.export.__main__ import main
from dlora.export.output_directory import new_directory_for
from dlora.protocol.errors import StorageError
from dlora.protocol.manifest import MANIFEST_NAME


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """The ``nth`` call of ``Path``'s method does its work, and then Ctrl-C arrives."""
    real, calls = getattr(Path, name), []

    def interrupted(self: Path, *arguments: Any, **options: Any) -> Any:
        result = real(self, *arguments, **options)
        calls.append(self)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, name, interrupted)


def _write(out: Path, text: str) -> None:
    with new_directory_for(out, force=True) as partial:
        (partial / MANIFEST_NAME).write_text(text)


@pytest.mark.parametrize(("name", "nth"), [("mkdir", 1), ("mkdir", 2), ("rename", 1), ("rename", 2)])
def test_ctrl_c_at_any_time_leaves_only_a_whole_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    out = tmp_path / "bundle"
    _write(out, "old")
    with monkeypatch.context() as during:
        _interrupt_after(during, name, nth)
        with pytest.raises(KeyboardInterrupt):
            _write(out, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / MANIFEST_NAME).read_text() == ("new" if (name, nth) == ("rename", 2) else "old")


def test_ctrl_c_right_after_the_first_directory_was_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(monkeypatch, "mkdir", 2)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "bundle", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_bundle(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama").model
    with small_disk(tmp_path) as disk:
        out = disk / "bundle"
        _write(out, "old")
        (disk / "others").write_bytes(bytes((1 << 20) - (64 << 10)))
        monkeypatch.setattr("sys.argv", ["dlora-export", str(model), "--out", str(out), "--force"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == StorageError.exit_code
        assert "No space left on device; free space" in capsys.readouterr().err
        assert sorted(path.name for path in disk.iterdir()) == ["bundle", "others"]
        assert (out / MANIFEST_NAME).read_text() == "old"
