"""What the commands say of the ExecuTorch engine, and all that may be wrong with it: one line each."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from executorch_bundle import FEW_SHAPES, NEEDED, copied, program, with_program
from processes import run_edge
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


def damages(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "no program": b"\0" * 4096,
        "text": b"{}" * 1000,
        "cut": content[: len(content) // 2],
        "headless": bytes(64) + content[64:],
        "tail": content[:-200] + bytes(200),
    }


@pytest.mark.parametrize("damage", ["empty", "no program", "text", "cut", "headless"])
def test_damaged_program_is_a_one_line_error(bundle: Path, tmp_path: Path, damage: str) -> None:
    """Its digest passes: whoever damaged it wrote the manifest as well."""
    name, content = program(bundle, "adapter_forward")
    wrong = with_program(bundle, tmp_path / "bundle", name, damages(content)[damage])
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, name.rpartition("/")[2], "is damaged", "export the bundle again")


def test_program_of_another_graph_is_an_error(bundle: Path, tmp_path: Path) -> None:
    name, _ = program(bundle, "adapter_forward")
    _, other = program(bundle, "adapter_input_grad")
    wrong = with_program(bundle, tmp_path / "bundle", name, other)
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "is not the graph that the manifest describes")


def test_program_with_unknown_operators_is_an_error(bundle: Path, tmp_path: Path) -> None:
    name, content = program(bundle, "adapter_forward")
    assert content.count(b"aten::linear") == 1
    wrong = with_program(bundle, tmp_path / "bundle", name, content.replace(b"aten::linear", b"aten::lonear"))
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "is not for ExecuTorch 1.")


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


def test_program_that_plans_for_a_huge_memory_is_an_error(bundle: Path, tmp_path: Path) -> None:
    from executorch.exir._serialize import _deserialize_pte_binary, _serialize_pte_binary

    name, content = program(bundle, "head_loss")
    pte = _deserialize_pte_binary(content)
    pte.program.execution_plan[0].non_const_buffer_sizes[1] = 1 << 60
    wrong = with_program(bundle, tmp_path / "bundle", name, bytes(_serialize_pte_binary(pte)))
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "does not load on ExecuTorch", "out of memory", "close other programs")


def test_version_of_endless_digits_is_an_error(bundle: Path, tmp_path: Path) -> None:
    wrong = copied(bundle, tmp_path / "bundle", executorch=ExecutorchSpec("9" * 5000 + ".0.0", dict(BOUNDS)))
    assert_fails(run_edge("selftest", "--bundle", wrong, "--engine", "executorch"), 4, "executorch.version")


def test_weights_that_lie_are_errors(bundle: Path, tmp_path: Path) -> None:
    """A program is C++: it would read what is not there."""
    import io

    import numpy as np

    spec = load_manifest(bundle).head
    for index, values in enumerate((np.zeros((5, 16), np.float32), np.zeros((97, 16), np.float16))):
        buffer = io.BytesIO()
        np.save(buffer, values)
        wrong = with_program(bundle, tmp_path / str(index), spec.weight, buffer.getvalue())
        done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
        assert_fails(done, 4, "weight has another shape or dtype than its graph says")


def test_bundle_of_a_newer_executorch_is_an_error(bundle: Path, tmp_path: Path) -> None:
    wrong = copied(bundle, tmp_path / "bundle", executorch=ExecutorchSpec("97.0.0", dict(BOUNDS)))
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "executorch 97.0.0", "update the engine")


def test_bundle_without_bounds_is_an_error(bundle: Path, tmp_path: Path) -> None:
    wrong = copied(bundle, tmp_path / "bundle", executorch=ExecutorchSpec("1.5.1", {"rank": 256, "rows": 256}))
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "has no bounds for labelled, n, new, past, positions, tokens; export it again")


@pytest.mark.parametrize("most", [255, 257])
def test_bounds_that_differ_from_the_program_are_an_error(bundle: Path, tmp_path: Path, most: int) -> None:
    wrong = copied(bundle, tmp_path / "bundle", executorch=ExecutorchSpec("1.5.1", {**BOUNDS, "rank": most}))
    done = run_edge("selftest", "--bundle", wrong, "--engine", "executorch")
    assert_fails(done, 4, "is not the graph that the manifest describes")


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


def test_bundle_without_programs_is_an_error(tiny: TinyFactory) -> None:
    done = run_edge("selftest", "--bundle", tiny().bundle, "--engine", "executorch")
    assert_fails(done, 4, "has no executorch graphs; export it again with --engine both")


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


def test_the_native_runner_checks_forward_backward_and_adamw(bundle: Path, runner: Path) -> None:
    done = subprocess.run([runner, bundle], capture_output=True, text=True, check=False)
    graphs = [
        graph for graph in load_manifest(bundle).graphs if graph.kind.startswith(("adapter_", "core_", "adamw"))
    ]
    assert done.returncode == 0, done.stderr
    assert f"{len(graphs)} of {len(graphs)} graphs are right" in done.stdout


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [("golden", 1, "WRONG"), ("program", 2, "error: "), ("no golden", 2, "is no safetensors file")],
)
def test_native_runner_detects_damage(
    bundle: Path, runner: Path, tmp_path: Path, damage: str, code: int, said: str
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(bundle, tmp_path / "bundle")
    golden = tmp_path / "bundle" / load_manifest(bundle).golden
    if damage == "golden":
        tensors = load_file(golden)
        tensors["adamw.out.new_param"] = tensors["adamw.out.new_param"] * 1.001
        save_file(tensors, golden)
    elif damage == "program":
        (tmp_path / "bundle" / program(bundle, "adapter_input_grad")[0]).write_bytes(b"ET12" * 100)
    else:
        golden.write_bytes(b"\xff" * 100)
    done = subprocess.run([runner, tmp_path / "bundle"], capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
