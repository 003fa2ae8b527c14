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


def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a directory, made once a test run: its GGUF file takes fifteen seconds to read, each time."""
    from tiny import only_one

    from dlora.cloud.model.base_model import load_base_model

    directory = made_once(tmp_path_factory) / "smollm2"
    with only_one(directory):
        if not directory.exists():
            model = load_base_model("smollm2-135m").model
            model.hf_quantizer.remove_quantization_config(model)
            partial = directory.with_name("smollm2-partial")
            model.save_pretrained(partial)
            partial.rename(directory)
    return directory


@pytest.fixture
def exact_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are saved with float32 factors, for gradients that are held against torch's."""
    import numpy as np

    monkeypatch.setattr("dlora.edge.adapters.peft.NARROW", np.float32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFactory]:
    """``tiny().bundle``, ``tiny("gpt2", blocks=3).base``: made once a test run, for tests that only read them."""
    from tiny import TinyFactory

    made = TinyFactory(made_once(tmp_path_factory) / "tiny")
    yield made
    made.check_unchanged()
