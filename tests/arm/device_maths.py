"""Runs in the arm root, on the plain package: adapters, AdamW and head against what torch computed on the host.

``DLORA_ARM_REFERENCE`` names a folder with ``bundle`` and ``reference.safetensors`` (``reference.py``). Its name
keeps the host from collecting it.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dlora.edge.adapters.compute import AdapterCompute
from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.lora import LoraGroup, LoraModule
from dlora.edge.adapters.units import AdapterSet, Unit
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.ends import Head
from dlora.edge.training.optimizer import AdamW
from dlora.edge.training.resolved import ChosenOptimizer
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.wire_codecs import encode_floats

PLACE = Path(os.environ["DLORA_ARM_REFERENCE"])
REFERENCE = load_file(PLACE / "reference.safetensors")
SCALING, LR, WEIGHT_DECAY = 2.0, 1e-2, 0.1  # reference.py's
# As export allows a small model: sums are taken in another order. The head's is of a fp32 head.
ADAPTER_TOLERANCE, ADAMW_TOLERANCE, HEAD_TOLERANCE = 2e-6, 2e-7, 1e-5


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(PLACE / "bundle")


def error(found: Array, wanted: Array) -> float:
    """Relative to the largest magnitude, as at export."""
    assert found.shape == wanted.shape
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def test_machine_is_aarch64() -> None:
    assert platform.machine() == "aarch64"


def test_numpy_matrix_product_is_exact() -> None:
    """It does not under every processor that qemu offers: ``-cpu max`` was wrong by more than 1."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(70, 130)), rng.normal(size=(130, 90))
    wanted = np.einsum("ij,jk->ik", left, right)
    assert error(left @ right, wanted) < 1e-14
    assert error(left.astype(np.float32) @ right.astype(np.float32), wanted) < 1e-6


@pytest.mark.parametrize("rank", [4, 7])
def test_adapter_graphs_match_reference(bundle: Bundle, rank: int) -> None:
    saved = {name.partition(".")[2]: value for name, value in REFERENCE.items() if name.startswith(f"{rank}.")}
    targets = bundle.manifest.groups[0].targets
    modules = [
        LoraModule(target.name, Parameter.of(saved[f"{index}.A"]), Parameter.of(saved[f"{index}.B"]))
        for index, target in enumerate(targets)
    ]
    adapters = AdapterSet(
        AdapterSpec(r=rank),
        bundle.manifest.groups[:1],
        [LoraGroup(modules, SCALING)],
        [Unit((0,))],
        scaling=SCALING,
        kill_every=1,
    )
    compute = AdapterCompute(OnnxEngine(bundle, 1), adapters)
    deltas, kept = compute.forward(0, encode_floats(saved["x"], "fp32"))
    grads = [saved[f"{index}.grad"] for index in range(len(targets))]
    grad_x, dz = compute.input_grad(0, grads)
    weight_grads = compute.weight_grads(0, kept, grads, dz)
    assert error(grad_x, saved["x.grad"]) < ADAPTER_TOLERANCE
    for index, module in enumerate(modules):
        assert error(deltas[index], saved[f"{index}.delta"]) < ADAPTER_TOLERANCE
        for half in ("A", "B"):
            found = weight_grads[f"{module.name}.lora_{half}"]
            assert error(found, saved[f"{index}.{half}.grad"]) < ADAPTER_TOLERANCE


def test_twenty_adamw_steps_match_reference(bundle: Bundle) -> None:
    parameter = Parameter.of(REFERENCE["adamw.start"])
    still = Parameter.of(np.zeros((13, 5), np.float32))  # B: without a gradient it stays
    group = GroupSpec(0, 1, (TargetSpec("one", 1),))
    lora = LoraGroup([LoraModule("one", parameter, still)], 1.0)
    one = AdapterSet(AdapterSpec(), [group], [lora], [Unit((0,))], scaling=1.0, kill_every=1)
    config = ChosenOptimizer(lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=0.0, schedule="constant", warmup=0.0)
    optimizer = AdamW(OnnxEngine(bundle, 1), config, 100)
    for grad in REFERENCE["adamw.grads"]:
        parameter.grad = grad
        optimizer.step(one, lr=LR)
    assert error(parameter.value, REFERENCE["adamw.end"]) < ADAMW_TOLERANCE


def test_head_graph_matches_reference(bundle: Bundle) -> None:
    head = Head(bundle, OnnxEngine(bundle, 1))
    labels = REFERENCE["head.labels"]
    losses, grads = head.loss_and_grad(REFERENCE["head.hidden"], labels, 1.0)
    assert error(losses, REFERENCE["head.loss"]) < HEAD_TOLERANCE
    assert error(grads, REFERENCE["head.grad"]) < HEAD_TOLERANCE
    assert error(head.loss(REFERENCE["head.hidden"], labels)[0], REFERENCE["head.loss"]) < HEAD_TOLERANCE
