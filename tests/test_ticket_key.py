"""The key that signs tickets: one for all who ask, whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

import pytest

from dlora.cloud.serving.ticket_key import KEY_BYTES, load_key
from dlora.protocol.errors import StorageError


def test_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    key = load_key(tmp_path / "new" / "state")
    assert len(key) == KEY_BYTES
    assert load_key(tmp_path / "new" / "state") == key
    assert stat.S_IMODE((tmp_path / "new" / "state" / "ticket.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "new" / "state").iterdir()] == ["ticket.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_wrong_size_is_an_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "ticket.key"
    path.write_bytes(bytes(size))
    with pytest.raises(StorageError, match=f"has {size} bytes"):
        load_key(tmp_path)
    assert path.read_bytes() == bytes(size)


def test_two_servers_that_start_together_share_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[bytes] = []
    make = secrets.token_bytes

    def slowly(size: int) -> bytes:
        monkeypatch.setattr(secrets, "token_bytes", make)
        first.append(load_key(tmp_path))  # another one, after we saw that there is none
        return make(size)

    monkeypatch.setattr(secrets, "token_bytes", slowly)
    assert load_key(tmp_path) == first[0]
    assert [path.name for path in tmp_path.iterdir()] == ["ticket.key"]


def test_key_file_appears_only_after_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(StorageError, match="--state-dir"):
        load_key(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_key_is_made_where_directories_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fail_for_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    assert load_key(tmp_path) == load_key(tmp_path)
