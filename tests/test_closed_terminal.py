"""A terminal that is closed, as at the end of an ssh connection, stops a run and a server as SIGTERM does."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from processes import CLOUD, EDGE, END_TIMEOUT_S, cloud_process
from terminals import terminal
from tiny import TinyFactory
from waiting import eventually

from dlora.edge.training.checkpoint import list_checkpoints

EXIT_CODE = 130


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"w1 w2 w{number}"}) + "\n" for number in range(3, 9)))
    return path


@pytest.mark.parametrize("ignored", [False, True], ids=["obeyed", "under nohup"])
def test_run_saves_its_step(tiny: TinyFactory, data: Path, tmp_path: Path, ignored: bool) -> None:
    out = tmp_path / "out"
    with (
        cloud_process(tiny().model, tmp_path / "server") as server,
        terminal(*train(tiny().bundle, server.url, data, out), ignores=ignored) as window,
    ):
        window.show_until(lambda: steps_of(out) > 0)
        if ignored:
            window.process.send_signal(signal.SIGHUP)
            done = steps_of(out)
            window.show_until(lambda: steps_of(out) > done + 5)  # one may have been under way
            window.process.terminate()
            window.show_to_its_end()
        else:
            window.close()
        assert window.process.wait(END_TIMEOUT_S) == EXIT_CODE
    (step, _), *_ = list_checkpoints(out / "checkpoints")
    assert step == steps_of(out) > 0


def test_run_that_is_stopping_saves_though_its_terminal_is_closed(
    tiny: TinyFactory, data: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a step that takes long, and then the window is closed."""
    out = tmp_path / "out"
    with (
        cloud_process(tiny().model, tmp_path / "server") as server,
        terminal(*train(tiny().bundle, server.url, data, out)) as window,
    ):
        window.show_until(lambda: steps_of(out) > 0)
        server.process.send_signal(signal.SIGSTOP)
        window.show_until(lambda: psutil.Process(server.process.pid).status() == psutil.STATUS_STOPPED)
        window.process.send_signal(signal.SIGINT)
        window.close()
        server.process.send_signal(signal.SIGCONT)
        assert window.process.wait(END_TIMEOUT_S) == EXIT_CODE
    assert list_checkpoints(out / "checkpoints")


def test_run_whose_reader_ends_with_the_terminal_saves(tiny: TinyFactory, data: Path, tmp_path: Path) -> None:
    """``dlora-edge train … 2>&1 | tee log``."""
    out = tmp_path / "out"
    command = shlex.join(map(str, train(tiny().bundle, "URL", data, out)))
    with cloud_process(tiny().model, tmp_path / "server") as server:
        piped = f"{command.replace('URL', server.url)} --json 2>&1 | tee {tmp_path / 'log'}; wait"
        with terminal("bash", "-c", piped) as window:
            window.show_until(lambda: steps_of(out) > 0)
            window.close()
            eventually(lambda: bool(list_checkpoints(out / "checkpoints")))
    (step, _), *_ = list_checkpoints(out / "checkpoints")
    assert step == steps_of(out)


@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["obeyed", "under nohup"])
def test_server_drains(tiny: TinyFactory, tmp_path: Path, ignored: bool) -> None:
    command = (CLOUD, "serve", tiny().model, "--port", 0, "--state-dir", tmp_path)
    with terminal(*command, ignores=ignored) as window:
        window.show_until(lambda: "listening on" in window.shown)
        if ignored:
            window.process.send_signal(signal.SIGHUP)
            (health,) = re.findall(r"http://\S+/healthz", window.shown)
            ends = time.monotonic() + 1
            while time.monotonic() < ends:  # one that drained would listen no more
                with urllib.request.urlopen(health) as answer:
                    assert json.load(answer)["status"] == "ok"
        else:
            window.close()
            assert window.process.wait(END_TIMEOUT_S) == 0


def train(bundle: Path, url: str, data: Path, out: Path) -> tuple[object, ...]:
    """A run that ends only when it is told to."""
    return (
        EDGE, "train", "--bundle", bundle, "--server", url, "--data", data, "--out", out, "--steps", 100_000,
        "--save-every", 100_000, "--kind", "lora", "--seed", 0,
    )  # fmt: skip


def steps_of(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0
