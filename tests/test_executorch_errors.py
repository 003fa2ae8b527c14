"""What the commands say of the ExecuTorch engine, and all that may be wrong with it: one line each."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_bundles import changed
from executorch_bundle import FEW_SHAPES, NEEDED, program
from msgspec import structs
from processes import run_edge
from safetensors.numpy import load_file, save_file
from test_cli import assert_fails
from tiny import TinyFactory

from dlora.edge.engine import shim
from dlora.export.to_executorch import BOUNDS
from dlora.protocol.errors import MissingExtraError
from dlora.protocol.manifest import ExecutorchSpec, load_manifest

ROOT = Path(__file__).parents[1]

pytestmark = [*NEEDED, pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(head_dtype="fp32", engine="both", **FEW_SHAPES).bundle


# -- what the commands say ---------------------------------------------------------------------------------------


def test_selftest_reports_both_engines(bundle: Path) -> None:
    done = run_edge("selftest", "--bundle", bundle, "--json")
    report = json.loads(done.stdout)
    assert (done.code, set(report["engines"])) == (0, {"onnx", "executorch"})
    assert report["passed"]
    for row in report["graphs"]:
        assert set(row["engines"]) == {"onnx", "executorch"}
        assert all(result["error"] <= 2 * row["tolerance"] for result in row["engines"].values())
    shown = run_edge("selftest", "--bundle", bundle, "--engine", "executorch")
    assert (shown.code, "onnxruntime" in shown.stdout) == (0, False)


def test_info_and_doctor_name_the_engines(bundle: Path) -> None:
    assert json.loads(run_edge("info", bundle, "--json").stdout)["engines"] == "executorch, onnx"
    done = run_edge("doctor", "--bundle", bundle, "--json")
    found = {check["check"]: check["found"] for check in json.loads(done.stdout)["checks"]}
    assert done.code == 0
    assert found["executorch"].startswith("ExecuTorch 1.")
    assert "for executorch and onnx" in found["bundle"]


def test_manifest_has_errors_of_each_engine_and_bounds(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.executorch is not None
    assert manifest.executorch.bounds == BOUNDS
    for graph in manifest.graphs:
        assert set(graph.files) == set(graph.errors) == {"onnx", "executorch"}
        assert graph.error == max(graph.errors.values()) <= graph.tolerance


# -- what may be wrong -------------------------------------------------------------------------------------------


def with_huge_memory(content: bytes) -> bytes:
    from executorch.exir._serialize import _deserialize_pte_binary, _serialize_pte_binary

    pte = _deserialize_pte_binary(content)
    pte.program.execution_plan[0].non_const_buffer_sizes[1] = 1 << 60
    return bytes(_serialize_pte_binary(pte))


def without_linear(content: bytes) -> bytes:
    assert content.count(b"aten::linear") == 1
    return content.replace(b"aten::linear", b"aten::lonear")


DAMAGED, OTHER_WEIGHT = "is damaged", "weight has another shape or dtype than its graph says"
FILES: dict[str, tuple[str, Callable[[bytes], bytes | np.ndarray[Any, Any]], tuple[str, ...]]] = {
    "empty": ("adapter_forward", lambda _: b"", (DAMAGED, "export the bundle again")),
    "no program": ("adapter_forward", lambda _: bytes(4096), (DAMAGED,)),
    "text": ("adapter_forward", lambda _: b"{}" * 1000, (DAMAGED,)),
    "cut": ("adapter_forward", lambda content: content[: len(content) // 2], (DAMAGED,)),
    "headless": ("adapter_forward", lambda content: bytes(64) + content[64:], (DAMAGED,)),
    "unknown operators": ("adapter_forward", without_linear, ("is not for ExecuTorch 1.",)),
    "a huge memory": (
        "head_loss", with_huge_memory, ("does not load on ExecuTorch", "out of memory", "close other programs")
    ),
    # A program is C++: it would read what is not there.
    "few weights": ("weight", lambda _: np.zeros((5, 16), np.float32), (OTHER_WEIGHT,)),
    "half weights": ("weight", lambda _: np.zeros((97, 16), np.float16), (OTHER_WEIGHT,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_a_one_line_error(bundle: Path, tmp_path: Path, name: str) -> None:
    """Its digest passes: whoever damaged it wrote the manifest as well."""
    kind, change, words = FILES[name]
    file, content = (load_manifest(bundle).head.weight, b"") if kind == "weight" else program(bundle, kind)
    wrong = changed(bundle, tmp_path / "bundle", files={file: change(content)})
    assert_fails(run_edge("selftest", "--bundle", wrong, "--engine", "executorch"), 4, *words)


def test_program_of_another_graph_is_an_error(bundle: Path, tmp_path: Path) -> None:
    name, _ = program(bundle, "adapter_forward")
    _, other = program(bundle, "adapter_input_grad")
    wrong = changed(bundle, tmp_path / "bundle", files={name: other})
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, name.rpartition("/")[2], "is not the graph that the manifest describes")


SPECS = {
    "endless digits": (ExecutorchSpec("9" * 5000 + ".0.0", dict(BOUNDS)), ("executorch.version",)),
    "newer": (ExecutorchSpec("97.0.0", dict(BOUNDS)), ("executorch 97.0.0", "update the engine")),
    "no bounds": (
        ExecutorchSpec("1.5.1", {"rank": 256, "rows": 256}),
        (f"has no bounds for {', '.join(sorted(set(BOUNDS) - {'rank', 'rows'}))}; export it again",),
    ),
    "lower bounds": (ExecutorchSpec("1.5.1", {**BOUNDS, "rank": 255}), ("is not the graph that the manifest",)),
    "higher bounds": (ExecutorchSpec("1.5.1", {**BOUNDS, "rank": 257}), ("is not the graph that the manifest",)),
    "nothing": (None, ("has no executorch graphs; export it again with --engine both",)),
}


@pytest.mark.parametrize("name", SPECS)
def test_manifest_that_says_something_else_is_an_error(bundle: Path, tmp_path: Path, name: str) -> None:
    spec, words = SPECS[name]
    wrong = changed(bundle, tmp_path / "bundle", lambda manifest: structs.replace(manifest, executorch=spec))
    assert_fails(run_edge("selftest", "--bundle", wrong, "--engine", "executorch"), 4, *words)


def test_changed_programs_load_or_are_refused(bundle: Path) -> None:
    """Each in a process of its own. Loading checks what ExecuTorch can, and what it finds while a program runs is an
    error, too. What it does not find ends the process, now or, where memory was spoiled, after an error was told: 41 of
    6,000 did. SECURITY.md says what that means."""
    count = 1200
    command = [sys.executable, ROOT / "tests" / "attacks" / "fuzz_programs.py", bundle, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["other"] == []
    assert sum(number for name, number in report["found"].items() if ":" in name) <= count / 20
    assert report["found"]["refused"] > count / 4


def test_missing_shim_is_an_error_that_says_how_to_build_it(bundle: Path, tmp_path: Path) -> None:
    arguments = ["selftest", "--bundle", bundle, "--engine", "executorch"]
    done = run_edge(*arguments, DLORA_EXECUTORCH_DIR=str(tmp_path))
    assert_fails(done, 12, "ExecuTorch engine not installed", str(tmp_path), "make shim")
    # Without it the other engine does.
    done = run_edge("selftest", "--bundle", bundle, "--json", DLORA_EXECUTORCH_DIR=str(tmp_path))
    assert (done.code, list(json.loads(done.stdout)["engines"])) == (0, ["onnx"])


def test_shim_is_searched_in_these_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shim.VARIABLE, raising=False)
    package = Path(shim.__file__).resolve().parents[1]
    checkout = [package / "native" / "lib", package.parent / "build" / "shim" / platform.machine()]
    assert shim.shim_directories() == checkout
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(tmp_path), raising=False)
    assert shim.shim_directories() == [tmp_path / "dlora_executorch", *checkout]
    monkeypatch.setenv(shim.VARIABLE, "/chosen")
    assert shim.shim_directories() == [Path("/chosen")]


def test_file_that_is_no_library_is_an_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / shim.LIBRARY).write_bytes(b"\x7fELF and no more")
    arguments = ["selftest", "--bundle", bundle, "--engine", "executorch"]
    assert_fails(run_edge(*arguments, DLORA_EXECUTORCH_DIR=str(tmp_path)), 12, "does not load", "make shim")
    report = json.loads(run_edge("doctor", "--json", DLORA_EXECUTORCH_DIR=str(tmp_path)).stdout)
    assert [check["check"] for check in report["checks"] if not check["ok"]] == ["executorch"]


def test_shim_of_another_abi_is_an_error(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or pytest.skip("no g++")
    (tmp_path / "other.c").write_text("int dlora_et_abi(void) { return 99; }")
    subprocess.run([compiler, "-shared", "-x", "c", tmp_path / "other.c", "-o", tmp_path / shim.LIBRARY], check=True)
    with pytest.raises(MissingExtraError, match=r"of another dlora \(ABI 99, this one wants 1\); build it again"):
        shim.Shim(tmp_path)


def test_export_without_executorch_names_the_extra(tmp_path: Path) -> None:
    """Before the model is loaded, which takes a while."""
    code = (
        "import sys, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'executorch' else find(name, *rest)\n"
        "from dlora.export.__main__ import main; main()"
    )
    arguments = ["nowhere", "--out", str(tmp_path / "out"), "--engine", "executorch"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 12
    assert done.stderr.count("\n") == 1
    assert "dlora[executorch]" in done.stderr


def test_building_without_a_compiler_is_one_line() -> None:
    script = ROOT / "edge" / "native" / "build.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env={"PATH": ""})
    assert (done.returncode, done.stderr) == (1, "error: there is no g++; install one (Debian: apt install g++)\n")


# -- the native runner -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    subprocess.run([sys.executable, ROOT / "edge" / "native" / "build.py", "--runner"], check=True, capture_output=True)
    return ROOT / "build" / "native" / platform.machine() / "dlora-native-runner"


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [("none", 0, "graphs are right"), ("golden", 1, "WRONG"), ("program", 2, "error: "),
     ("no golden", 2, "is no safetensors file")],
)  # fmt: skip
def test_the_native_runner_checks_forward_backward_and_adamw(
    bundle: Path, runner: Path, tmp_path: Path, damage: str, code: int, said: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = load_manifest(bundle)
    if damage == "golden":
        tensors = load_file(copy / manifest.golden)
        tensors["adamw.out.new_param"] = tensors["adamw.out.new_param"] * 1.001
        save_file(tensors, copy / manifest.golden)
    elif damage == "program":
        (copy / program(bundle, "adapter_input_grad")[0]).write_bytes(b"ET12" * 100)
    elif damage == "no golden":
        (copy / manifest.golden).write_bytes(b"\xff" * 100)
    done = subprocess.run([runner, copy], capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    if not code:
        count = sum(graph.kind.startswith(("adapter_", "core_", "adamw")) for graph in manifest.graphs)
        assert f"{count} of {count} graphs are right" in done.stdout
