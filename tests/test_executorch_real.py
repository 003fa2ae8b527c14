"""Both engines on the real SmolLM2-135M. Slow: ``make test-slow``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from executorch_bundle import NEEDED
from processes import cloud_process, run_edge

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "smollm2-both"  # fp32 head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), *NEEDED]


def test_every_graph_is_right_on_both_engines() -> None:
    done = run_edge("selftest", "--bundle", BUNDLE, "--json", timeout_s=300)
    report = json.loads(done.stdout)
    assert (done.code, set(report["engines"])) == (0, {"onnx", "executorch"})


def test_four_steps_of_the_real_model_match_onnx(smollm2: Path, tmp_path: Path) -> None:
    code = "import pathlib, sys, dialogue; dialogue.write_dialogue(pathlib.Path(sys.argv[1]), 48, 0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT / "examples")
    losses = []
    with cloud_process(smollm2, tmp_path / "server", "--threads", 2) as server:
        for engine in ("onnx", "executorch"):
            out = tmp_path / engine
            done = run_edge(
                "train", "--kind", "lora", "--bundle", BUNDLE, "--server", server.url, "--data",
                tmp_path / "train.jsonl", "--out", out, "--steps", 4,
                "--batch-size", 2, "--max-length", 128, "--too-long", "truncate", "--threads", 2,
                "--wire-dtype", "fp32", "--engine", engine, "--seed", 0, "--json", timeout_s=900,
            )  # fmt: skip
            assert done.code == 0, done.stderr
            assert json.loads(done.stdout)["torch_loaded"] is False
            losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
