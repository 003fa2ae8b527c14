"""Files that somebody else named or put there: read whole or not at all, and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from processes import BIN, quiet_environment, run_edge

from dlora.cloud.admission.tls import server_context
from dlora.cloud.serving.ticket_key import load_key
from dlora.edge.files import read_secret, read_small
from dlora.edge.report.run_data import read_evaluations
from dlora.edge.run.run_file import RUN_FILE, load_run_file
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.metrics import MetricsLog, read_metrics
from dlora.edge.wire.credentials import Credentials
from dlora.protocol.errors import CheckpointError, DataError, StorageError, UsageError
from dlora.protocol.recording import FRAMES_FILE, ID_BYTES, FramesWriter, read_recording

pytestmark = pytest.mark.timeout(120)


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def written(path: Path, content: bytes) -> threading.Thread:
    """Somebody who writes to a pipe once it is opened."""
    thread = threading.Thread(target=path.write_bytes, args=(content,))
    thread.start()
    return thread


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    frames = [(0.5, True, b"up"), (1.25, False, b"")]
    with (tmp_path / FRAMES_FILE).open("wb") as file:
        writer = FramesWriter(file, bytes(range(ID_BYTES)))
        for time, up, frame in frames:
            writer.add(time, frame, up=up)
    found = read_recording(tmp_path)
    assert found.id == bytes(range(ID_BYTES))
    assert [tuple(each) for each in found.frames] == frames


def test_a_pipe_with_a_writer_is_read(tmp_path: Path) -> None:
    path = pipe(tmp_path / "key")
    writer = written(path, b"x" * 5000)
    assert read_small(path, 5000) == b"x" * 5000
    writer.join()
    (reading, writing) = os.pipe()  # as a shell's <(…) is
    os.write(writing, b"key\n")
    os.close(writing)
    assert read_secret("--token-file", Path(f"/dev/fd/{reading}"), None) == "key"
    os.close(reading)


def test_what_is_too_large_or_a_pipe_without_a_writer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--token-file /dev/zero cannot be read: it has more than 4096 bytes"):
        read_secret("--token-file", Path("/dev/zero"), None)
    with pytest.raises(UsageError, match="it is a pipe, and nobody writes to it"):
        read_secret("--token-file", pipe(tmp_path / "pipe"), None)
    (tmp_path / "empty").touch()
    assert read_small(tmp_path / "empty", 9) == b""
    with pytest.raises(UsageError, match="Is a directory"):
        read_secret("--token-file", tmp_path, None)


@pytest.mark.parametrize("options", [
    ("train", "--data", "d", "--bundle", "b", "--out", "o", "--device-blocks", "1", "--cache-key-file"),
    ("train", "--config"), ("generate", "--bundle", "b", "--server", "ws://127.0.0.1:9", "--token-file"),
])  # fmt: skip
def test_command_does_not_wait_for_a_pipe(options: tuple[str, ...], tmp_path: Path) -> None:
    done = run_edge(*options, pipe(tmp_path / "pipe"))
    assert done.code in (2, 4)
    assert "Traceback" not in done.stderr


def test_a_key_can_come_from_a_process(tmp_path: Path) -> None:
    """``bash``'s process substitution, as people use it with a password manager."""
    command = f'"{BIN}/dlora-edge" serve --bundle "{tmp_path}" --api-key-file <(sleep 0.1; echo short)'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=100, env=quiet_environment(), check=False
    )
    assert done.returncode == 2
    assert "the key must be at least 8 ASCII characters" in done.stderr


def test_certificates_that_are_pipes_are_refused(tmp_path: Path) -> None:
    path = pipe(tmp_path / "pipe")
    for credentials, option in ((Credentials(ca=path), "--ca"), (Credentials(client_cert=path), "--client-cert")):
        with pytest.raises(UsageError, match=rf"{option} .*pipe cannot be read: it is no regular file"):
            credentials.ssl_context("wss://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"--tls-cert .*pipe cannot be read: it is no regular file"):
        server_context(path, path)


def test_pipe_in_a_run_is_one_line(tmp_path: Path) -> None:
    """The directory may be somebody else's."""
    for name in (RUN_FILE, "metrics.jsonl", "evaluations.jsonl", "checkpoint-000004.safetensors", "ticket.key"):
        pipe(tmp_path / name)
    pipe(tmp_path / FRAMES_FILE)
    for error, read in (
        (CheckpointError, lambda: load_run_file(tmp_path)),
        (CheckpointError, lambda: read_metrics(tmp_path / "metrics.jsonl")),
        (StorageError, lambda: MetricsLog(tmp_path / "metrics.jsonl")),
        (CheckpointError, lambda: read_evaluations(tmp_path / "evaluations.jsonl")),
        (StorageError, lambda: load_key(tmp_path)),
        (DataError, lambda: read_recording(tmp_path)),
    ):
        with pytest.raises(error, match="it is no regular file"):
            read()
    with pytest.raises(CheckpointError, match="1 damaged"):
        load_latest(tmp_path)
