"""What a run needs is looked at before anything is computed or shown: its directory, its disk, its server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Finished, run_edge
from serving import serving
from small_disk import remount_read_only, small_disk
from test_cli import GOOD_ROW, Place, assert_fails
from tiny import TinyFactory

from dlora.protocol.errors import ConnectionFailedError, ModelMismatchError, StorageError, UsageError

NOBODY = "ws://127.0.0.1:1"


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data = tmp_path_factory.mktemp("look") / "good.jsonl"
    data.write_text((GOOD_ROW + "\n") * 4)
    with serving(tiny().base) as server:
        yield Place(tiny().bundle, data, server.url)


def assert_says_nothing_else(done: Finished, code: int, *words: str) -> None:
    assert_fails(done, code, *words)
    assert done.stderr.splitlines() == done.errors


def test_a_server_that_is_not_there_is_said_before_the_plan(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = run_edge(*place.train(out, server=NOBODY))
    assert_says_nothing_else(done, ConnectionFailedError.exit_code, "cannot reach ws://127.0.0.1:1", "start it")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_said_before_the_plan(place: Place, tiny: TinyFactory, tmp_path: Path) -> None:
    done = run_edge(*place.train(tmp_path / "out", bundle=tiny(seed=1).bundle))
    assert_says_nothing_else(done, ModelMismatchError.exit_code, "serves", "export a bundle")


def test_a_run_that_goes_on_waits_for_its_server(place: Place, tmp_path: Path) -> None:
    """It is not looked for first, as a run without it goes on as soon as it is there."""
    out = tmp_path / "out"
    assert run_edge(*place.train(out)).code == 0
    done = run_edge("resume", out, "--server", NOBODY, "--steps", 4, "--max-retry-s", 0)
    assert_fails(done, ConnectionFailedError.exit_code, "cannot reach")
    assert "run: 4 steps (2 of them done)" in done.stderr


def test_a_place_that_is_read_only_is_said_before_the_plan(place: Place, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        (disk / "there").mkdir()
        remount_read_only(disk)
        for out in (disk / "new", disk / "there"):
            done = run_edge(*place.train(out, server=NOBODY))
            assert_says_nothing_else(done, StorageError.exit_code, "cannot write", "Read-only", "choose another place")
            assert "saved" not in done.stderr


def test_a_disk_without_room_is_said_before_the_plan(place: Place, tmp_path: Path) -> None:
    """A megabyte holds a run of rank 4, and none of rank 256."""
    with small_disk(tmp_path) as disk:
        done = run_edge(*place.train(disk / "out", rank=256))
        assert_says_nothing_else(done, StorageError.exit_code, "has room for 1.0 MB", "needs 1.", "free space")
        assert list(disk.iterdir()) == []
        assert run_edge(*place.train(disk / "out", rank=4)).code == 0


def test_somebody_elses_files_are_said_before_the_plan(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_edge(*place.train(tmp_path / "file", server=NOBODY))
    assert_says_nothing_else(done, UsageError.exit_code, "is a file", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
