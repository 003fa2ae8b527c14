"""Settings of the whole test run. Shared helpers are plain modules of this folder, such as ``families``."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dlora.protocol import interrupts

if TYPE_CHECKING:
    from tiny import TinyFactory

# Devices of the tests, child processes too, leave the user's own state alone.
os.environ.setdefault("DLORA_EDGE_STATE", tempfile.mkdtemp(prefix="dlora-test-"))

# A shell lets what a script runs in the background ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores

# Under --import-mode=importlib pytest puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header() -> str:
    """What each day tries another part of depends on it."""
    from drawn import DAY

    return f"day: DLORA_TEST_DAY={DAY}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What tests import stays until the end; to look through it for garbage again and again takes a tenth of all."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    """One thread for torch, where a test has loaded it: two would mostly wait for each other, with models this small.
    Most tests must run without it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command that a test runs in this process leaves signals as a command does that is done: ignored."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFactory]:
    """``tiny().bundle``, ``tiny("gpt2", blocks=3).base``: made once a test run, for tests that only read them."""
    from tiny import TinyFactory

    base = tmp_path_factory.getbasetemp()
    made = TinyFactory((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny")
    yield made
    made.check_unchanged()
