"""Checkpoints: whole or passed over, and safe on a disk that is full, read-only or failing."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from small_disk import remount_read_only, small_disk

from dlora.edge.files import make_directory, write_atomically
from dlora.edge.training.checkpoint import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from dlora.protocol.errors import CheckpointError, StorageError


class State(msgspec.Struct, frozen=True):
    next_step: int
    ticket: bytes
    ages: list[int]


def save(directory: Path, step: int, size: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tensors = {
        "a.lora_A": rng.normal(size=(size, 3)).astype(np.float32),
        "a.turned": rng.normal(size=(4, 5)).astype(np.float32).T,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(step, np.int64),
    }
    save_checkpoint(directory, step, tensors, State(step, bytes([0, 255, step % 256]), [1, 2]))
    return tensors


def steps(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def load(directory: Path) -> Checkpoint:
    found = load_latest(directory)
    assert found is not None
    return found


def test_save_and_load_gives_the_same_bits(tmp_path: Path) -> None:
    tensors = save(tmp_path, 20)
    found = load(tmp_path)
    assert (found.step, found.path.name) == (20, "checkpoint-000020.safetensors")
    assert msgspec.convert(found.state, State) == State(20, b"\x00\xff\x14", [1, 2])
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert found.tensors[name].tobytes() == tensor.tobytes()
        assert found.tensors[name].flags.writeable


def test_same_state_gives_the_same_file(tmp_path: Path) -> None:
    save(tmp_path / "one", 5)
    save(tmp_path / "two", 5)
    one, two = (load(tmp_path / name).path.read_bytes() for name in ("one", "two"))
    assert one == two


def test_load_latest_is_none_without_checkpoints(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "no") is None
    (tmp_path / "checkpoint-x.safetensors").write_text("not ours")
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize(
    ("saved", "kept"),
    [((10, 20, 30, 1_000_000), [1_000_000, 30]), ((10, 20, 15), [15, 10])],
    ids=["the last two", "none later than the last saved"],
)
def test_last_two_checkpoints_are_kept(tmp_path: Path, saved: tuple[int, ...], kept: list[int]) -> None:
    for step in saved:
        save(tmp_path, step)
    assert steps(tmp_path) == kept
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 2


def test_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path, 20)
    save(tmp_path, 30)
    assert steps(tmp_path) == [30, 20, 10]
    save(tmp_path, 40)
    assert steps(tmp_path) == [40, 30]


def damage(directory: Path, step: int) -> None:
    path = directory / f"checkpoint-{step:06d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path, 20)
    said: list[str] = []
    found = load_latest(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert said == [
        f"{tmp_path / 'checkpoint-000020.safetensors'} is damaged (its SHA-256 differs); trying the one before"
    ]
    damage(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(2 damaged\)"):
        load_latest(tmp_path)


def test_every_changed_byte_and_every_end_too_early_is_detected(tmp_path: Path) -> None:
    save(tmp_path, 1, size=2)
    path = load(tmp_path).path
    whole = path.read_bytes()
    changed = [whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :] for at in range(len(whole))]
    a_pickle = b"\x80\x04}\x94\x8c\x01a\x94K\x01s."
    for content in (*changed, *(whole[:length] for length in range(len(whole))), a_pickle):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_latest(tmp_path)


def test_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    load(tmp_path).path.rename(tmp_path / "checkpoint-000099.safetensors")
    with pytest.raises(CheckpointError):
        load_latest(tmp_path)


def test_full_disk_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        save(disk, 10)
        save(disk, 20)
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        with pytest.raises(StorageError, match="No space left on device; free space"):
            save(disk, 30, size=200_000)
        assert {path.name: path.read_bytes() for path in disk.iterdir()} == before
        (disk / ".checkpoint-000025.safetensors.tmp").write_bytes(b"x" * 4096)  # what is left must not keep it full
        save(disk, 30)
        assert load(disk).step == 30
        assert {path.name for path in disk.iterdir()} == {path.name for _, path in list_checkpoints(disk)}


def test_read_only_disk_is_a_storage_error(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        save(disk, 10)
        remount_read_only(disk)
        for directory in (disk, disk / "new"):
            with pytest.raises(StorageError, match="Read-only file system"):
                save(directory, 20)
        assert load(disk).step == 10


@pytest.mark.parametrize("content", ["bytes(5000)", "(bytes(800), bytes(800))"])
def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path, content: str) -> None:
    """Works without root, so the promise is tested everywhere."""
    save(tmp_path, 10)
    program = (
        "import resource, signal, sys, pathlib; from dlora.edge.files import write_atomically\n"
        "from dlora.protocol.command import run_command\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"run_command(lambda: write_atomically(pathlib.Path(sys.argv[1]), {content}))\n"
    )
    path = load(tmp_path).path
    # Without coverage, whose own file is larger.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    assert load(tmp_path).step == 10


def test_file_in_place_of_directory_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        save(tmp_path / "file", 1)


@pytest.mark.parametrize("step", [7, 10, 37])
def test_leftover_of_a_killed_process_is_removed(tmp_path: Path, step: int) -> None:
    (tmp_path / f".checkpoint-{step:06d}.safetensors.tmp").write_bytes(b"half")
    save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000010.safetensors"]


def test_new_directories_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in a directory is of no use after a power cut that its own name did not survive."""
    synced: list[str] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    make_directory(tmp_path / "a" / "b" / "c")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} == set(synced)
    synced.clear()
    make_directory(tmp_path / "a" / "b" / "c")
    assert synced == []
    monkeypatch.chdir(tmp_path)
    make_directory(Path("d"))
    assert synced == [str(tmp_path)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_save_works_where_directories_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sync = os.fsync

    def fail_for_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    if number == errno.EINVAL:
        save(tmp_path / "run", 10)
        assert load(tmp_path / "run").step == 10
    else:
        with pytest.raises(StorageError):
            save(tmp_path / "run", 10)


def test_newest_checkpoint_loads_after_a_kill_at_any_time(tmp_path: Path) -> None:
    """A process that saves without end is killed; each time the newest checkpoint loads."""
    program = (
        "import sys, pathlib, numpy as np, msgspec\n"
        "from dlora.edge.training.checkpoint import save_checkpoint\n"
        "class S(msgspec.Struct): n: int\n"
        "for n in range(10**6):\n"
        "    save_checkpoint(pathlib.Path(sys.argv[1]), n, {'x': np.full(100_000, n)}, S(n))\n"
        "    print(n, flush=True)\n"
    )
    for _ in range(3):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        command = [sys.executable, "-c", program, str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(5):
                last = int(process.stdout.readline())
            process.kill()
        found = load(tmp_path / "run")
        assert found.step >= last
        assert (found.tensors["x"] == found.step).all()


def test_a_write_that_is_interrupted_leaves_the_old_file_alone(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, pieces())
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"old")]
