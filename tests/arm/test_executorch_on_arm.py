"""The aarch64 binary with ExecuTorch in it, and what one without says. ``make test-arm WITH_EXECUTORCH=1``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from arm_place import Place
from arm_root import BINARIES, FROZEN, SHIM, Device, assert_same_through_blocks, losses, well

from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings

pytestmark = [pytest.mark.arm, pytest.mark.timeout(3600)]


def has_executorch() -> bool:
    return bool(json.loads((BINARIES / "aarch64" / "report.json").read_text())["executorch"])


@pytest.fixture(scope="module")
def both(place: Place) -> Path:
    """A bundle with the graphs of both engines."""
    pytest.importorskip("executorch", reason="exporting its programs takes executorch")
    bundle = place.directory / "both"
    model = str(place.directory / "model")
    export_bundle(ExportSettings(model, bundle, 4, 8.0, head_dtype="fp32", engine="both", device_blocks=2))
    return bundle


def test_both_engines_agree_or_one_line_says_why_not(place: Place, both: Path) -> None:
    """Every graph on both engines against torch's numbers, and three steps to the same losses."""
    device = Device((FROZEN,), place.directory)
    if not has_executorch():
        done = device(*_train(place, both, "none"), "--engine", "executorch")
        assert done.code == 12, done.stderr
        assert done.errors == done.stderr.splitlines()[-1:]
        assert done.errors[0].startswith("error: ExecuTorch engine not installed")
        return
    report = json.loads(well(device("selftest", "--bundle", both, "--threads", 1, "--json")))
    assert report["passed"]
    assert set(report["engines"]) == {"onnx", "executorch"}
    found = {}
    for engine in ("onnx", "executorch"):
        well(device(*_train(place, both, engine), "--engine", engine))
        found[engine] = losses(place.directory / engine)
    assert found["executorch"] == pytest.approx(found["onnx"], abs=1e-4)


def test_blocks_match_this_machine(place: Place, both: Path, tmp_path: Path) -> None:
    if not SHIM.exists():
        pytest.skip("there is no shim for aarch64; make shim ARCH=aarch64")
    assert_same_through_blocks(place, both, "executorch", tmp_path / "here")


def _train(place: Place, bundle: Path, name: str) -> list[object]:
    arguments = list(place.train(place.directory / name))
    arguments[arguments.index("--bundle") + 1] = bundle
    return arguments
