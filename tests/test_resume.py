"""A run that was stopped, or killed, and goes on equals the run that was not, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from processes import finish, run_edge, start_edge
from safetensors.numpy import load_file
from serving import serving
from tiny import TinyFactory
from waiting import eventually

from dlora.edge.training.checkpoint import list_checkpoints

BLOCKS = 4
STEPS = 40
SAVE_EVERY = 10
KILLING = (
    "--active-fraction", "0.5", "--kr-score", "grad", "--set", "kill_revive.warmup_steps=6",
    "--set", "kill_revive.kill_every=5",
    "--set", "kill_revive.revive_every=5", "--set", "kill_revive.probation=5",
)  # fmt: skip
KR = {"off": ("--active-fraction", "1"), "on": KILLING}
# What a step did. Its traffic depends on where the run was saved, its times on the machine.
SAME = ("step", "loss", "learning_rate", "grad_norm", "tokens", "labelled", "active_units", "live_units", "units")


@dataclass(frozen=True)
class Place:
    """A bundle, its data and a server."""

    bundle: Path
    data: Path
    url: str

    def train(self, out: Path, *options: object) -> list[object]:
        return [
            "train", "--kind", "lora", "--bundle", self.bundle, "--server", self.url, "--data", self.data, "--out", out,
            "--batch-size", 3, "--steps", STEPS, "--save-every", SAVE_EVERY, "--threads", 1, "--lr", 0.01,
            "--seed", 0, *options,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("resume")
    model = tiny(blocks=BLOCKS)
    rng = np.random.default_rng(2)
    rows = [{"text": " ".join(f"w{n}" for n in rng.integers(0, 89, int(rng.integers(4, 12))))} for _ in range(10)]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that nothing interrupted."""
    runs = {}
    for name, options in KR.items():
        runs[name] = tmp_path_factory.mktemp(f"whole-{name}")
        done = run_edge(*place.train(runs[name], *options))
        assert done.code == 0, done.stderr
    return runs


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in SAME} for row in map(json.loads, lines)]


def assert_same_run(out: Path, wanted: Path) -> None:
    assert rows(out) == rows(wanted)
    assert (out / "adapter_model.safetensors").read_bytes() == (wanted / "adapter_model.safetensors").read_bytes()
    (step, last), *_ = list_checkpoints(out / "checkpoints")
    (_, wanted_last), *_ = list_checkpoints(wanted / "checkpoints")
    assert step == STEPS
    found, tensors = load_file(last), load_file(wanted_last)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def wait_for_lines(path: Path, count: int) -> None:
    eventually(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)


@pytest.mark.parametrize("kr", KR)
def test_stopped_run_resumes_with_the_same_bits(place: Place, whole: dict[str, Path], kr: str, tmp_path: Path) -> None:
    process = start_edge(*place.train(tmp_path, *KR[kr]))
    wait_for_lines(tmp_path / "metrics.jsonl", SAVE_EVERY + 3)
    assert not psutil.Process(process.pid).children()  # whose tokenizer would take as much memory as training
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 130, stopped.stderr
    assert stopped.errors == [stopped.stderr.splitlines()[-1]]
    assert "dlora-edge resume" in stopped.errors[0]
    done = len(rows(tmp_path))
    assert SAVE_EVERY + 3 <= done < STEPS
    assert list_checkpoints(tmp_path / "checkpoints")[0][0] == done
    resumed = run_edge(*place.train(tmp_path, *KR[kr], "--resume", "--json"))
    assert resumed.code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["first_step"] == done
    assert_same_run(tmp_path, whole[kr])


def test_reference_run_kills_units(whole: dict[str, Path]) -> None:
    units = {row["units"] for row in rows(whole["on"])}
    assert len(units) > 2
    assert "1" * BLOCKS in units


def copied(whole: Path, out: Path, *, but_last: bool = True) -> Path:
    """A finished run as it stood one checkpoint before its end; or damaged there."""
    (out / "checkpoints").mkdir(parents=True)
    for step, path in list_checkpoints(whole / "checkpoints"):
        content = path.read_bytes()
        if step == STEPS:
            if but_last:
                continue
            middle = len(content) - 40
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (out / "checkpoints" / path.name).write_bytes(content)
    (out / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    return out


@pytest.mark.parametrize(("option", "value", "text"), [
    ("--lr", "0.02", "--lr 0.01, not 0.02"),
    ("--rank", "2", "--rank 4, not 2"),
    ("--wire-dtype", "fp32", "--wire-dtype fp16, not fp32"),
    ("--active-fraction", "0.5", "--active-fraction 1.0, not 0.5"),
    ("--set", "kill_revive.kill_every=7", "--set kill_revive.kill_every 25, not 7"),
    ("--kr-score", "random", "--kr-score static, not random"),
    ("--pin", "1", "another --pin"),
    ("--alpha", "4", "--alpha 8.0, not 4.0"),
    ("--warmup", "5", "--warmup 0.03, not 5.0"),
    ("--seed", "1", "another --seed. Go on"),  # and it stays untold
    ("--batch-size", "2", "--batch-size 3, not 2"),
    ("--steps", "39", "--steps (or what --epochs came to) 40, not 39"),
    ("--data", "{}/other.jsonl", "other training data (--data"),
])  # fmt: skip
def test_other_settings_are_refused_and_named(
    place: Place, whole: dict[str, Path], option: str, value: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text(place.data.read_text().replace("w1", "w2", 1))
    out = copied(whole["off"], tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = run_edge(*place.train(out, *KR["off"], option, value.format(tmp_path), "--resume"))
    assert done.code == 10, done.stderr
    assert len(done.errors) == 1
    assert f"the run that the checkpoint is of has {text}" in done.errors[0]
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_damaged_newest_checkpoint_is_skipped(place: Place, whole: dict[str, Path], tmp_path: Path) -> None:
    out = copied(whole["on"], tmp_path / "out", but_last=False)
    done = run_edge(*place.train(out, *KR["on"], "--resume"))
    assert done.code == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"checkpoint-{STEPS:06d}.safetensors is damaged" in warnings[0]
    assert_same_run(out, whole["on"])


def test_all_checkpoints_damaged_is_an_error(place: Place, whole: dict[str, Path], tmp_path: Path) -> None:
    out = copied(whole["off"], tmp_path / "out")
    for _, path in list_checkpoints(out / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-9])
    done = run_edge(*place.train(out, *KR["off"], "--resume"))
    assert (done.code, len(done.errors)) == (10, 1)


def test_a_new_run_does_not_overwrite_an_old_one(place: Place, whole: dict[str, Path]) -> None:
    before = (whole["off"] / "adapter_model.safetensors").read_bytes()
    done = run_edge(*place.train(whole["off"], *KR["off"]))
    assert done.code == 2
    assert "dlora-edge resume" in done.errors[0]
    assert (whole["off"] / "adapter_model.safetensors").read_bytes() == before
