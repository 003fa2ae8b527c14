"""Ctrl-C and SIGTERM at any moment of a command: one line and 130, or the result that was there already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from drawn import one_in
from processes import CLOUD, EDGE, Finished, quiet_environment
from serving import serving
from tiny import TinyFactory

from dlora.protocol import interrupts

EXPORT = EDGE.replace("dlora-edge", "dlora-export")

# Signals this process in the midst of importing a module, and as Python clears up; and, as libraries do, makes an
# ImportError of whatever is raised meanwhile.
SITE = """
import atexit, os, signal, sys

sent, when = int(os.environ["SENT"]), os.environ["WHEN"]

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), sent)
                for _ in range(1000):
                    pass
            except BaseException as error:
                raise ImportError(f"{name} cannot be imported") from error

class Teardown:
    def __del__(self, kill=os.kill, pid=os.getpid(), sent=sent):
        kill(pid, sent)

if when == "at exit":
    atexit.register(os.kill, os.getpid(), sent)
elif when == "as Python clears up":
    sys.kept_until_the_end = Teardown()
else:
    sys.meta_path.insert(0, Import())
"""


@dataclass(frozen=True)
class Place:
    """A bundle, the model that it is of, a server of it, and where what signals a process lies."""

    bundle: Path
    model: Path
    url: str
    site: Path


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("interrupts")
    (directory / "sitecustomize.py").write_text(SITE)
    with serving(tiny().base) as server:
        yield Place(tiny().bundle, tiny().model, server.url, directory)


def run(place: Place, sent: signal.Signals, when: str, *command: object) -> Finished:
    """A command to its end, with a signal on the way; ``PYTHONPATH`` keeps what it had."""
    paths = [str(place.site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "SENT": str(int(sent)), "WHEN": when}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False,
        env={**quiet_environment(), **environment},
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


INT, TERM = signal.SIGINT, signal.SIGTERM


# Both signals where a command starts at once; where it must load torch first, by turns: the handler is the same.
@pytest.mark.parametrize(("command", "when", "sent"), [*one_in(2, [
    ("edge", "typer", INT), ("edge", "typer", TERM), ("edge", "msgspec", INT), ("edge", "msgspec", TERM),
    ("edge", "numpy", INT), ("edge", "numpy", TERM), ("edge", "onnxruntime", INT), ("edge", "onnxruntime", TERM),
    ("train", "websockets.sync.client", INT), ("train", "websockets.sync.client", TERM),
    ("train", "onnxruntime.capi", INT), ("train", "onnxruntime.capi", TERM),
]), *(pytest.param(*each, marks=pytest.mark.slow) for each in one_in(2, [
    ("cloud", "typer", INT), ("cloud", "typer", TERM), ("cloud", "torch", INT), ("cloud", "transformers", TERM),
    ("cloud", "torch.distributed", INT), ("export", "typer", INT), ("export", "typer", TERM), ("export", "peft", INT),
    ("export", "onnx", TERM),
]))], ids=lambda value: value.name if isinstance(value, signal.Signals) else value)  # fmt: skip
def test_signal_during_imports_ends_with_one_line_and_130(
    place: Place, tmp_path: Path, command: str, when: str, sent: signal.Signals
) -> None:
    """Once it was exit 12, as if a library were missing, and once ten minutes of a server that loaded on."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    where = ("--kind", "lora", "--bundle", place.bundle, "--server", place.url)
    commands: dict[str, list[object]] = {
        "edge": [EDGE, "selftest", "--bundle", place.bundle],
        "train": [EDGE, "train", *where, "--data", data, "--out", out],
        "cloud": [CLOUD, "serve", place.model, "--port", 0, "--state-dir", tmp_path],
        "export": [EXPORT, place.model, "--out", out],
    }
    done = run(place, sent, when, *commands[command])
    said = [line for line in done.stderr.splitlines() if not line.startswith("data: ")]
    assert (done.code, said) == (130, ["error: interrupted"]), done.stderr
    assert done.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("when", ["at exit", "as Python clears up"])
def test_signal_after_the_result_is_ignored(place: Place, when: str, sent: signal.Signals) -> None:
    """The result is out and its exit code is decided."""
    done = run(place, sent, when, EDGE, "info", place.bundle, "--json")
    assert (done.code, done.stderr) == (0, "")
    assert json.loads(done.stdout)
    failed = run(place, sent, when, EDGE, "info", place.site / "nothing")
    assert failed.code not in (0, 130)
    assert len(failed.errors) == 1


def test_only_signals_that_end_the_process_interrupt_its_work() -> None:
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    found: list[object] = []

    def work() -> None:
        with interrupts.raise_on_signal():
            found.extend(map(signal.getsignal, interrupts.SIGNALS))

    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts.exit_on_signal()
        ending = signal.getsignal(signal.SIGINT)
        work()
        in_a_thread = threading.Thread(target=work)
        in_a_thread.start()
        in_a_thread.join()
        assert signal.getsignal(signal.SIGINT) is ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raised, kept = interrupts.raise_interrupt, signal.SIG_IGN
    assert found == [raised, raised, kept, ending, ending, kept]


def test_command_started_with_sigint_ignored_continues(place: Place) -> None:
    """Shells do so for what a script runs in the background."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-S", "-c", code, EDGE, "info", place.bundle, "--json"]
    done = run(place, signal.SIGINT, "numpy", *command)
    assert done.code == 0, done.stderr
