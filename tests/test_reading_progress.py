"""How far the reading of a file has come."""

from __future__ import annotations

from pathlib import Path

from dlora.edge.run.reading_progress import ReadingProgress


def test_words_say_where_and_how_long(tmp_path: Path) -> None:
    path = tmp_path / "d:1.jsonl"
    path.write_text("x\n" * 1000)
    clock = iter([0.0, 30.0, 30.0, 30.0])
    progress = ReadingProgress(lambda: next(clock))
    assert progress.words("the chat template") == "the chat template"
    assert progress.words(f"{path}:100") == f"{path}: line 100 of 1,000, 10%"
    assert progress.words(f"{path}:400") == f"{path}: line 400 of 1,000, 40%, 1:00 left"
    assert progress.words(f"what follows {path}:400") == f"{path}: line 400 of 1,000, 40%, 1:00 left"
    assert progress.words(f"{tmp_path}:3") == f"{tmp_path}:3"
