"""The device's id: made once, the same ever after, and never a reason not to train."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import remount_read_only, small_disk

from dlora.edge.wire.identity import FILE_NAME, STATE_VARIABLE, load_device_id

STORMING = """
import sys
from pathlib import Path
from dlora.edge.wire.identity import load_device_id
print("ready", flush=True)
sys.stdin.readline()
print(load_device_id(Path(sys.argv[1]), print))
"""


def _refuse(text: str) -> None:
    pytest.fail(text)


def test_device_id_is_made_once_and_kept(tmp_path: Path) -> None:
    state = tmp_path / "not" / "there" / "yet"
    made = load_device_id(state, _refuse)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert load_device_id(state, _refuse) == made
    assert load_device_id(tmp_path / "another", _refuse) != made
    assert [path.name for path in state.iterdir()] == [FILE_NAME]
    assert stat.S_IMODE((state / FILE_NAME).stat().st_mode) == 0o600


def test_device_id_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or in the user's state directory."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "named"))
    made = load_device_id()
    assert json.loads((tmp_path / "named" / FILE_NAME).read_text()) == {"device": made}
    monkeypatch.delenv(STATE_VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    load_device_id()
    assert (tmp_path / "dlora-edge" / FILE_NAME).exists()


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b'{"device": 7}', b'{"device": "' + b"A" * 32 + b'"}', b'{"device": "\xd9"}',
    b'{"x":' + b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_file_is_one_warning_and_a_new_id(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(damage)
    warnings: list[str] = []
    made = load_device_id(tmp_path, warnings.append)
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert load_device_id(tmp_path, _refuse) == made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0), st.binary(max_size=3))
def test_device_has_an_id_on_any_disk_error(tmp_path: Path, at: int, patch: bytes) -> None:
    whole = b'{"device":"0123456789abcdef0123456789abcdef"}\n'
    at %= len(whole) + 1
    (tmp_path / FILE_NAME).write_bytes(whole[:at] + patch + whole[at + len(patch) + 1 :])
    made = load_device_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert load_device_id(tmp_path, _refuse) == made


def test_a_device_that_cannot_write_trains_under_an_id_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    made = [load_device_id(tmp_path / "file", warnings.append) for _ in range(2)]
    assert made[0] != made[1]
    assert len(warnings) == 2
    assert STATE_VARIABLE in warnings[0]
    assert "\n" not in warnings[0]
    (tmp_path / FILE_NAME).mkdir()  # which cannot be read
    load_device_id(tmp_path, warnings.append)
    assert (len(warnings), (tmp_path / FILE_NAME).is_dir()) == (3, True)


def test_a_read_only_disk_keeps_the_id_it_has_and_makes_no_new_one(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        made = load_device_id(disk / "whole")
        (disk / "empty").mkdir()
        remount_read_only(disk)
        assert load_device_id(disk / "whole", _refuse) == made
        warnings: list[str] = []
        load_device_id(disk / "empty", warnings.append)
        assert len(warnings) == 1
        assert "Read-only" in warnings[0]


def test_processes_that_start_together_get_one_id(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STORMING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=120)[0] for process in started]
    assert set(found) == {load_device_id(tmp_path, _refuse) + "\n"}
