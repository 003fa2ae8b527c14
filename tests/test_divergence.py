"""Training that diverges ends with a code of its own, wherever it is found, and with advice that helps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import run_edge
from safetensors.numpy import load_file, save_file
from serving import serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

from dlora.edge.training.checkpoint import list_checkpoints
from dlora.edge.wire.connecting import refusal_of
from dlora.protocol import messages as m
from dlora.protocol.errors import NonFiniteError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("divergence")
    model = tiny()
    data = directory / "data.jsonl"
    data.write_text((json.dumps({"text": "w1 w2 w3 w4"}) + "\n") * 4)
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def test_diverging_run_ends_with_an_error(place: Place, tmp_path: Path) -> None:
    """A decay of lr × 100 a step makes every weight 10,000 times as large, and soon something is infinite."""
    options = {"steps": 40, "lr": 100, "weight_decay": 100, "schedule": "constant", "warmup": 0}
    done = run_edge(*place.train(tmp_path / "out", **options))
    assert_fails(done, NonFiniteError.exit_code, "training diverged at step", "NaN or infinity", "lower --lr than 100")
    assert "--resume" not in done.errors[0], "it would diverge again"
    assert list_checkpoints(tmp_path / "out" / "checkpoints")
    again = run_edge("resume", tmp_path / "out")
    assert again.code == NonFiniteError.exit_code
    assert again.errors == done.errors


def test_diverged_adapter_is_an_error_in_evaluation(place: Place, tmp_path: Path) -> None:
    """Its weights are beyond what floats hold once they are multiplied."""
    out = tmp_path / "out"
    assert run_edge(*place.train(out)).code == 0
    path = out / "adapter_model.safetensors"
    save_file({name: np.full_like(tensor, 1e30) for name, tensor in load_file(path).items()}, path)
    (out / "dlora_adapter.json").unlink()  # which says that they were changed
    done = run_edge(
        "evaluate", "--bundle", place.bundle, "--server", place.url, "--data", place.data, "--adapter", out,
        "--threads", 1,
    )  # fmt: skip
    assert_fails(done, NonFiniteError.exit_code, "NaN or infinity", "the adapter is of a run that diverged")


def test_non_finite_error_of_the_server_is_a_non_finite_error() -> None:
    error = m.Error(code=m.ErrorCode.NON_FINITE, message="NaN or infinity in the base model's results", retryable=False)
    assert isinstance(refusal_of(error, "ws://x"), NonFiniteError)


def test_service_does_not_restart_a_diverged_run() -> None:
    units = [next((ROOT / "packaging").glob("*.service")), ROOT / "docs" / "how-to" / "run-a-server.md"]
    lines = [line for unit in units for line in unit.read_text().splitlines() if line.startswith("RestartPrevent")]
    assert len(lines) == 2
    for line in lines:
        assert str(NonFiniteError.exit_code) in line.split("=")[1].split()
