"""A large file of a bundle is read whole once, and again as soon as it may be another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from dlora.edge.engine import checked_files
from dlora.edge.engine.checked_files import FILE_NAME, LEAST_BYTES, CheckedFiles
from dlora.edge.state import STATE_VARIABLE
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import FileSpec, check_file

NAME = "weights/head.npy"


class Place:
    """A bundle of one file, and how often it was read."""

    def __init__(self, directory: Path, size: int) -> None:
        self.reads, self.bundle, self.file = 0, directory / "bundle", directory / "bundle" / NAME
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(os.urandom(size))
        self.spec = FileSpec(size, hashlib.sha256(self.file.read_bytes()).hexdigest())

    def check(self, *, again: bool = False) -> int:
        """Check it as each start does; how often it was read for that."""
        before, checked = self.reads, CheckedFiles()
        checked.check(self.bundle, NAME, self.spec, again=again)
        checked.save()
        return self.reads - before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    made = Place(tmp_path, LEAST_BYTES)

    def counted(bundle: Path, name: str, spec: FileSpec) -> None:
        made.reads += 1
        check_file(bundle, name, spec)

    monkeypatch.setattr(checked_files, "check_file", counted)
    monkeypatch.setattr(checked_files, "SETTLED_S", 0.0)
    return made


def test_a_file_is_read_once(place: Place) -> None:
    assert [place.check(), place.check(), place.check()] == [1, 0, 0]
    assert [place.check(again=True), place.check()] == [1, 0]


def test_a_file_with_other_bytes_is_refused(place: Place) -> None:
    """Of the same size, and with the time of the old one: what says that it changed cannot be set."""
    place.check()
    times = place.file.stat()
    place.file.write_bytes(bytes(LEAST_BYTES))
    os.utime(place.file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleError, match="is damaged: its SHA-256 is not the manifest's"):
        place.check()


def test_another_digest_is_not_the_one_that_was_checked(place: Place) -> None:
    place.check()
    place.spec = FileSpec(LEAST_BYTES, "0" * 64)
    with pytest.raises(BundleError, match="is damaged"):
        place.check()


def test_a_copy_in_its_place_is_read(place: Place) -> None:
    place.check()
    copy = place.file.with_suffix(".copy")
    copy.write_bytes(place.file.read_bytes())
    copy.replace(place.file)
    assert [place.check(), place.check()] == [1, 0]


def test_a_file_that_has_just_changed_is_not_remembered_yet(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change once more within the same tick of the file system's clock."""
    monkeypatch.setattr(checked_files, "SETTLED_S", 60.0)
    assert [place.check(), place.check()] == [1, 1]


def test_another_size_in_the_manifest_is_refused(place: Place) -> None:
    place.check()
    place.spec = FileSpec(9 * LEAST_BYTES, place.spec.sha256)
    with pytest.raises(BundleError, match="its size is not the manifest's"):
        place.check()


def test_two_processes_remember_both_files(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other", LEAST_BYTES)
    one, two = CheckedFiles(), CheckedFiles()
    one.check(place.bundle, NAME, place.spec, again=False)
    two.check(other.bundle, NAME, other.spec, again=False)
    one.save()
    two.save()
    assert [place.check(), CheckedFiles()._digests.keys() == {*one._found, *two._found}] == [0, True]


@pytest.mark.parametrize("content", [b"", b"{", b'{"1:2:3:4:5": 6}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_memory_is_none(place: Place, content: bytes, tmp_path: Path) -> None:
    place.check()
    (tmp_path / "state" / FILE_NAME).write_bytes(content)
    assert [place.check(), place.check()] == [1, 0]


def test_a_device_that_cannot_write_reads_each_time(place: Place, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in the place of the directory")
    assert [place.check(), place.check()] == [1, 1]


def test_small_files_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    Place(tmp_path, 100).check()
    assert not (tmp_path / "state").exists()
