"""TensorBoard's event files: what others' code reads in them is what ``metrics.jsonl`` has, once each."""

from __future__ import annotations

import json
import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from processes import finish, run_edge, start_edge
from runs import made_step, write_run
from small_disk import small_disk
from test_resume import KILLING, SAVE_EVERY, STEPS, Place, place, wait_for_lines

from dlora.edge.report.event_file import EventFile, _checksum
from dlora.edge.report.tensorboard import TensorboardWriter
from dlora.edge.run.file_names import EVALUATIONS, METRICS, TENSORBOARD
from dlora.edge.training.metrics import read_metrics
from dlora.protocol.errors import StorageError

__all__ = ["place"]  # a fixture

Scalars = dict[str, list[tuple[int, float]]]


def scalars_of(directory: Path) -> Scalars:
    """As tensorboardX's messages have them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: Scalars = {}
    (path,) = directory.iterdir()
    content, versions, times = path.read_bytes(), [], []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert content[8:12] == _checksum(content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        assert content[12 + length : 16 + length] == _checksum(content[12 : 12 + length])
        content = content[16 + length :]
        versions.append(event.file_version)
        times.append(event.wall_time)
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert versions[0] == "brain.Event:2"
    assert not any(versions[1:])
    assert times[1:] == sorted(times[1:])
    return found


def check(out: Path) -> None:
    """Each step and evaluation is there once, with the numbers of the run's own files."""
    found = scalars_of(out / TENSORBOARD)
    steps = read_metrics(out / METRICS)
    assert [step for step, _ in found["loss"]] == [each.step for each in steps]
    for name in ("loss", "learning_rate", "bytes_up", "step_s", "tokens"):
        assert [value for _, value in found[name]] == [np.float32(getattr(each, name)) for each in steps]
    by_role = {role for each in steps for role in each.up}
    for role in by_role:
        wanted = {each.step: np.float32(each.up[role]) for each in steps if role in each.up}
        assert dict(found[f"bytes_up/{role}"]) == wanted
    rows = [json.loads(line) for line in (out / EVALUATIONS).read_text().splitlines()]
    assert found["eval_loss"] == [(row["step"], np.float32(row["loss"])) for row in rows]


def test_checksums_are_those_of_the_format() -> None:
    """RFC 3720, B.4, masked."""
    masked = struct.unpack("<I", _checksum(bytes(32)))[0]
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0x8A9136AA


def test_a_run_goes_on_in_its_events(place: Place, tmp_path: Path) -> None:
    """After it was killed past its last checkpoint, and without another word about it."""
    out = tmp_path / "out"
    process = start_edge(*place.train(out, "--eval", place.data, "--eval-every", 7, "--tensorboard", *KILLING))
    wait_for_lines(out / METRICS, SAVE_EVERY + 2)
    process.kill()
    finish(process)
    assert run_edge("resume", out).code == 0
    check(out)
    assert run_edge("resume", out, "--no-tensorboard", "--steps", STEPS + 5).code == 0
    assert len(read_metrics(out / METRICS)) == STEPS + 5
    assert len(scalars_of(out / TENSORBOARD)["loss"]) == STEPS


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = write_run(tmp_path / "run", 30)
    writer = TensorboardWriter(out)
    writer.begin(30)
    writer.end()
    events = accumulator.EventAccumulator(str(out / TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    assert {"loss", "eval_loss", "bytes_up/delta", "step_s/server"} <= set(events.Tags()["scalars"])
    losses = [(each.step, each.value) for each in events.Scalars("loss")]
    assert losses == [(each.step, np.float32(each.loss)) for each in read_metrics(out / METRICS)]


def test_numbers_of_any_size_fit(tmp_path: Path) -> None:
    with closing(EventFile(tmp_path / "events.out.tfevents.1.x", 1e9)) as file:
        file.add(2**40, {"huge": 1e300, "none": float("nan"), "zwölf": 0.0}, 1e9)
    found = scalars_of(tmp_path)
    assert found["huge"] == [(2**40, float("inf"))]
    assert np.isnan(found["none"][0][1])
    assert found["zwölf"] == [(2**40, 0.0)]


def write_many(writer: TensorboardWriter) -> None:
    for step in range(4, 10_000):
        writer.step(made_step(step, 10_000))


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        out = write_run(disk / "run", 4)
        writer = TensorboardWriter(out)
        writer.begin(4)
        with pytest.raises(StorageError, match="No space left"):
            write_many(writer)
