"""``selftest``, ``info`` and ``doctor`` on a real bundle: what they say, and that a wrong graph is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from processes import run_edge
from safetensors.numpy import load_file, save_file
from tiny import TinyFactory

from dlora.edge.run.footprint import tokens_that_fit, training_mb, usual_tokens
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import MANIFEST_NAME, FileSpec, Manifest, encode_manifest, load_manifest


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny().bundle


def with_golden(bundle: Path, copy: Path, change: dict[str, np.ndarray]) -> Path:
    """A copy whose golden vectors say something else, and whose digests are right."""
    shutil.copytree(bundle, copy)
    manifest = load_manifest(copy)
    path = copy / manifest.golden
    save_file({**load_file(path), **change}, path)
    content = path.read_bytes()
    spec = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    changed: Manifest = msgspec.structs.replace(manifest, files={**manifest.files, manifest.golden: spec})
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    return copy


def test_selftest_passes_and_says_how_fast(bundle: Path) -> None:
    done = run_edge("selftest", "--bundle", bundle, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert len(result["graphs"]) == len(load_manifest(bundle).graphs)
    assert all(graph["passed"] and graph["ms"] >= 0 for graph in result["graphs"])
    assert all(graph["error"] <= 2 * graph["tolerance"] for graph in result["graphs"])


def test_selftest_fails_on_a_golden_vector_that_differs(bundle: Path, tmp_path: Path) -> None:
    golden = load_file(bundle / load_manifest(bundle).golden)
    key = next(key for key in golden if key.startswith("adapter_forward") and ".out." in key)
    wrong = golden[key].copy()
    wrong.reshape(-1)[0] += np.abs(wrong).max() * 0.1
    copy = with_golden(bundle, tmp_path / "bundle", {key: wrong})
    done = run_edge("selftest", "--bundle", copy, "--json")
    assert done.code == 1
    result = json.loads(done.stdout)
    assert not result["passed"]
    assert [row["graph"] for row in result["graphs"] if not row["passed"]] == ["adapter_forward"]
    assert "Traceback" not in done.stderr
    shown = run_edge("selftest", "--bundle", copy)
    assert shown.code == 1
    assert "WRONG" in shown.stdout


def test_selftest_runs_graphs_of_unknown_kinds(bundle: Path, tmp_path: Path) -> None:
    """Of a later exporter, perhaps: one of the same formula under another name, with golden vectors of its own."""
    manifest = load_manifest(bundle)
    golden = {key: value for key, value in load_file(bundle / manifest.golden).items() if key.startswith("adamw.")}
    new = {key.replace("adamw.", "adamw_of_tomorrow."): value for key, value in golden.items()}
    copy = with_golden(bundle, tmp_path / "bundle", new)
    changed = load_manifest(copy)
    graphs = (*changed.graphs, msgspec.structs.replace(changed.graph("adamw"), kind="adamw_of_tomorrow"))
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(changed, graphs=graphs)))
    done = run_edge("selftest", "--bundle", copy, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["graphs"][-1]["graph"] == "adamw_of_tomorrow"
    assert run_edge("info", copy).code == run_edge("doctor", "--bundle", copy).code == 0


@pytest.mark.parametrize(("kind", "key", "said"), [
    ("adamw", "", "the bundle has no adamw graph, which this device needs; export it again"),
    ("adapter_forward", "7x9", "the bundle has no adapter_forward graph of 7x9, which"),
])  # fmt: skip
def test_missing_graph_is_a_bundle_error(bundle: Path, kind: str, key: str, said: str) -> None:
    manifest = load_manifest(bundle)
    lacking = msgspec.structs.replace(manifest, graphs=[graph for graph in manifest.graphs if graph.kind != "adamw"])
    with pytest.raises(BundleError, match=said):
        lacking.graph(kind, key)


def test_info_describes_a_bundle(bundle: Path) -> None:
    done = run_edge("info", bundle, "--json")
    result = json.loads(done.stdout)
    wanted = {
        "kind": "bundle", "lora_r": 4, "blocks": 2, "lora_target_modules": "q_proj, v_proj", "lora_exchange_groups": 2,
        "can_be_trained": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj", "exchange_groups": 8,
        "default_kind": "bottleneck", "default_blocks": "0-1", "default_exchange_groups": 8,
    }  # fmt: skip
    assert (done.code, {name: result[name] for name in wanted}) == (0, wanted)
    assert result["default_target_modules"] == result["can_be_trained"]
    assert run_edge("info", bundle).code == 0


def test_doctor_passes_and_estimates_training_memory_and_micro_batch(bundle: Path) -> None:
    done = run_edge("doctor", "--bundle", bundle, "--json")
    assert done.code == 0, done.stdout
    found = {check["check"]: check["found"] for check in json.loads(done.stdout)["checks"]}
    assert set(found) >= {"python", "memory", "engine", "bundle", "no torch"}
    manifest = load_manifest(bundle)
    assert f"this fp16 head takes about {training_mb(manifest, 64):,.0f} MB at 64 tokens" in found["memory"]
    assert f"fp32 {training_mb(manifest, 64, 'fp32'):,.0f}" in found["memory"]
    assert "tokens fit, 64 of them a sequence" in found["memory"]  # the model takes no longer one


def test_estimates_are_for_no_longer_sequence_than_the_model_takes(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert usual_tokens(manifest) == manifest.base_model.max_sequence_length == 64
    long = msgspec.structs.replace(manifest.base_model, max_sequence_length=8192)
    assert usual_tokens(msgspec.structs.replace(manifest, base_model=long)) == 256


def test_tokens_that_fit_matches_the_estimate(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    estimates = [training_mb(manifest, head_dtype=dtype) for dtype in ("int8", "fp16", "fp32")]
    assert estimates == sorted(estimates)
    fit = tokens_that_fit(manifest, 200.0)
    assert training_mb(manifest, fit) <= 200.0 < training_mb(manifest, fit + 1)
    assert tokens_that_fit(manifest, 50.0) == 0  # less than the runtime alone


def test_doctor_reports_problems_and_continues(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    next((tmp_path / "bundle").rglob("*.onnx")).unlink()
    done = run_edge("doctor", "--bundle", tmp_path / "bundle", "--server", "ws://127.0.0.1:9", "--json")
    result = json.loads(done.stdout)
    assert (done.code, result["ok"]) == (1, False)
    wrong = {check["check"]: check["found"] for check in result["checks"] if not check["ok"]}
    assert set(wrong) == {"bundle", "server"}
    assert "export the bundle again" in wrong["bundle"]
    assert "dlora-cloud serve" in wrong["server"]
