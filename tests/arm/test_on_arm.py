"""``dlora-edge`` on aarch64, emulated as a Cortex-A72 (Raspberry Pi 4): the frozen binary, and the plain package.

The server is here, the device in the arm root. ``make test-arm`` makes both and runs all of it; see README.md.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from arm_place import Place, train
from arm_root import (
    COMMANDS,
    FROZEN,
    PACKAGE,
    ROOT,
    Device,
    assert_same_through_blocks,
    entered,
    losses,
    run,
    wait_until,
    well,
)  # fmt: skip
from drawn import one_in
from processes import CloudProcess, cloud_process, run_edge
from without_torch import SUITES

pytestmark = [pytest.mark.arm, pytest.mark.timeout(3600)]
LOSS_TOLERANCE = 1e-4
REAL_BUNDLE = ROOT / "build" / "smollm2-fp32"


@pytest.fixture(params=one_in(2, list(COMMANDS)))
def device(request: pytest.FixtureRequest, place: Place) -> Device:
    return Device(COMMANDS[request.param], place.directory)


def test_numpy_matrix_product_is_exact(place: Place) -> None:
    """It does not under every processor that qemu offers: ``-cpu max`` was wrong by more than 1."""
    code = """
import numpy as np
rng = np.random.default_rng(0)
left, right = rng.normal(size=(70, 130)), rng.normal(size=(130, 90))
wanted = np.einsum("ij,jk->ik", left, right)
for dtype, bound in (("float64", 1e-14), ("float32", 1e-6)):
    assert np.abs(left.astype(dtype) @ right.astype(dtype) - wanted).max() < bound * np.abs(wanted).max()
"""
    well(run([PACKAGE, "-c", code], place.directory))


def test_doctor_and_selftest_pass(device: Device, place: Place) -> None:
    """The latter runs every graph against what torch computed here."""
    report = json.loads(well(device("doctor", "--bundle", place.bundle, "--server", place.server.url, "--json")))
    assert "aarch64" in report["checks"][0]["found"]
    assert json.loads(well(device("selftest", "--bundle", place.bundle, "--threads", 1, "--json")))["passed"]


def test_training_steps_match_this_machine(
    device: Device, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = place.directory / f"out-{len(list(place.directory.glob('out-*')))}"
    assert json.loads(well(device(*place.train(out))))["torch_loaded"] is False
    here = tmp_path_factory.mktemp("here")
    well(run_edge(*place.train(here), timeout_s=120))
    assert losses(out) == pytest.approx(losses(here), abs=LOSS_TOLERANCE)
    assert (out / "adapter_model.safetensors").stat().st_size == (here / "adapter_model.safetensors").stat().st_size


def test_blocks_match_this_machine(place: Place, tmp_path: Path) -> None:
    """On the plain package; ``test_executorch_on_arm.py`` has the same of the other engine."""
    assert_same_through_blocks(place, place.bundle, "onnx", tmp_path / "here")


def test_answers_match_this_machine(device: Device, place: Place) -> None:
    asked = ["generate", "--bundle", place.bundle, "--server", place.server.url, "--prompt", "w5 w6", "--threads", 1,
             "--max-new-tokens", 8, "--wire-dtype", "fp32", "--json"]  # fmt: skip
    found, wanted = (json.loads(well(done)) for done in (device(*asked), run_edge(*asked)))
    assert found["answer"] == wanted["answer"]
    assert found["tokens"] == 8


def test_the_binary_chats_and_serves(place: Place) -> None:
    """The network is the same inside and here."""
    where = ["--bundle", place.bundle, "--server", place.server.url, "--threads", 1]
    chat = f"echo /help | {FROZEN} chat {shlex.join(map(str, where))}"
    assert "Ctrl-C" in well(run(["sh", "-c", chat], place.directory))
    command = entered([FROZEN, "serve", *where, "--port", 0, "--json"], place.directory)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            url = json.loads(serving.stdout.readline())["url"].removesuffix("/v1")
            wait_until(lambda: status(f"{url}/health") == 200, 300)
            body = json.dumps({"messages": [{"role": "user", "content": "w5"}], "max_tokens": 4}).encode()
            with urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=300) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] <= 4
        finally:
            serving.kill()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_killed_run_resumes_with_the_same_steps(place: Place) -> None:
    """SIGKILL to everything in the root, then ``--resume``: the steps of a run that nobody disturbed."""
    out, whole = place.directory / "killed", place.directory / "whole"
    device = Device((FROZEN,), place.directory)
    with subprocess.Popen(entered([FROZEN, *place.train(out, 8)], place.directory), stdout=subprocess.DEVNULL) as first:
        wait_until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 2, 300)
        first.send_signal(signal.SIGKILL)
    well(device(*place.train(out, 8), "--resume"))
    well(device(*place.train(whole, 8)))
    assert losses(out) == losses(whole)
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_an_error_is_one_line_and_an_exit_code(place: Place) -> None:
    done = Device((FROZEN,), place.directory)("selftest", "--bundle", "/nonexistent")
    assert done.code == 4, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_suites_that_need_no_torch_pass(place: Place, suite: str) -> None:
    command = [PACKAGE, "-m", "pytest", "-p", "no:cacheprovider", f"tests/test_{suite}.py", "--timeout", 1200]
    done = run(["env", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis", *command], place.directory)
    assert done.code == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    with cloud_process(Path("smollm2-135m"), tmp_path_factory.mktemp("server"), "--threads", 2) as running:
        yield running


@pytest.mark.slow
def test_selftest_passes_on_the_real_bundle(device: Device) -> None:
    for bundle in (REAL_BUNDLE, ROOT / "build" / "smollm2"):
        report = json.loads(well(device("selftest", "--bundle", bundle, "--threads", 2, "--json")))
        assert report["passed"]


@pytest.mark.slow
def test_three_steps_of_the_real_model_match(
    device: Device, place: Place, real_server: CloudProcess, tmp_path: Path
) -> None:
    """Few labels: the head is the slow part under emulation."""
    asked = {"Where is my card? ": "card_arrival", "I lost it. ": "lost_card", "Hello ": "hello", "2 + 2 = ": "4"}
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in asked.items()]
    data = place.directory / "real.jsonl"
    data.write_text("".join(f"{row}\n" for row in rows))
    out = place.directory / f"real-{len(list(place.directory.glob('real-*')))}"
    well(device(*train(REAL_BUNDLE, real_server.url, data, out, 3)))
    well(run_edge(*train(REAL_BUNDLE, real_server.url, data, tmp_path, 3), timeout_s=300))
    assert losses(out) == pytest.approx(losses(tmp_path), abs=LOSS_TOLERANCE)
