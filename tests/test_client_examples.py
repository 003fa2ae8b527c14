"""The examples of loops of one's own, and the notebook, with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import quiet_environment
from serving import RunningServer, serving
from tiny import TinyFactory

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", max_position_embeddings=2048).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", max_position_embeddings=2048).base) as running:
        yield running


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200, check=False,
        env={**quiet_environment(), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("custom_loop", ["--steps", 4]),
        ("rejection_sampling", ["--rounds", 2, "--samples", 2, "--steps", 2, "--max-new-tokens", 5]),
    ],
)
def test_example_runs(name: str, options: list[object], bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(
        EXAMPLES / f"{name}.py", "--bundle", bundle, "--server", server.url, "--out", out, *options, cwd=tmp_path
    )
    assert f"saved: {out}" in said
    assert (out / "adapter_model.safetensors").exists()


def test_preferences_are_learnt(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    said = run(
        EXAMPLES / "preferences.py", "--bundle", bundle, "--server", server.url, "--out", tmp_path / "out",
        "--steps", 8, "--lr", 0.05, cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said.splitlines() if "loss " in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: nothing was learnt yet
    assert losses[-1] < losses[0] - 0.01


def test_notebook_runs_cell_by_cell(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "loop.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    code = "\n\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    said = run("notebook.py", cwd=tmp_path, DLORA_BUNDLE=str(bundle), DLORA_SERVER=server.url)
    assert said.count("step ") == 5
    assert (tmp_path / "my-notebook-adapter" / "adapter_config.json").exists()
