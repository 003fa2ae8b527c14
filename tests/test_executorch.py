"""The ExecuTorch engine: every graph against torch, cut inputs, whole runs without torch, and all that may be wrong."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import one_in
from executorch_bundle import FEW_SHAPES, NEEDED, program
from families import VOCABULARY
from processes import run_edge
from serving import config, random_dataset, randomize_all, serving
from test_cli import assert_fails
from test_graphs import _head_end, check_adamw, check_adapter, check_embedding, check_head
from tiny import TinyFactory

from dlora.edge.engine import shim
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.executorch_engine import ExecutorchEngine
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.training.side import ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.export.graphs import head_torch
from dlora.export.graphs.adamw import adamw_graph, adamw_scalars
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.graphs.head import HeadShape, head_graphs
from dlora.export.graphs.lora import adapter_graphs
from dlora.export.graphs.tolerances import relative_error
from dlora.export.to_executorch import BOUNDS
from dlora.export.verify import Compiled, compile_executorch
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import load_manifest

HIDDEN = 16
ODD = (45, 41)

pytestmark = [*NEEDED, pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(head_dtype="fp32", engine="both", **FEW_SHAPES).bundle


# -- graphs ------------------------------------------------------------------------------------------------------


@cache
def adapter_programs(shape: tuple[int, int]) -> list[tuple[TrainingGraph, Compiled]]:
    """Each takes a second to make."""
    return [(graph, compile_executorch(graph)) for graph in adapter_graphs(*shape)]


@pytest.mark.parametrize("shape", [(16, 24), ODD])
def test_adapter_programs_match_autograd(shape: tuple[int, int]) -> None:
    for graph, compiled in adapter_programs(shape):
        check_adapter(graph, compiled, shape, 8, (1, 7))


def test_adamw_program_matches_torch_over_twenty_steps() -> None:
    check_adamw(compile_executorch(adamw_graph()))


@pytest.mark.parametrize(
    ("dtype", "bias", "logit_scale", "softcap"),
    one_in(2, [("fp32", False, 1.0, None), ("fp16", True, 1.0, 3.0), ("int8", True, 0.5, 3.0)]),
)
def test_head_programs_match_autograd(
    dtype: Any, bias: bool, logit_scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several slabs, the last one shorter."""
    monkeypatch.setattr(head_torch, "SLABS", 2)
    monkeypatch.setattr(head_torch, "LEAST_ROWS", 1)
    shape = HeadShape(97, HIDDEN, dtype, bias, logit_scale, softcap)
    end = _head_end(97, shape)
    hidden = np.random.default_rng(0).standard_normal((9, HIDDEN), np.float32)
    check_head(shape, end, hidden, compile_executorch)


def test_first_of_equal_logits_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a slab and across slabs, as ONNX's ArgMax has it."""
    monkeypatch.setattr(head_torch, "SLABS", 3)
    monkeypatch.setattr(head_torch, "LEAST_ROWS", 1)
    shape = HeadShape(12, 2, "fp32", False, 1.0, None)
    graph = next(graph for graph in head_graphs(shape) if graph.kind == "head_loss")
    weight = np.zeros((12, 2), np.float32)
    weight[[2, 3, 9], 0] = 1.0
    inputs = {"weight": weight, "hidden_states": np.eye(2, dtype=np.float32), "labels": np.array([0, 1])}
    _, predictions = compile_executorch(graph).run(inputs)
    assert predictions.tolist() == [2, 0]


def test_head_program_widens_one_slab_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a program plans for: a slab as it is stored and as it is wide, and some (rows, slab) of its logits."""
    from executorch.exir._serialize import _deserialize_pte_binary

    monkeypatch.setattr(head_torch, "SLABS", 4)
    vocabulary, hidden = 65_536, 256
    shape = HeadShape(vocabulary, hidden, "fp16", False, 1.0, None)
    graph = next(graph for graph in head_graphs(shape) if graph.kind == "head_train")
    made = _deserialize_pte_binary(compile_executorch(graph).model).program
    planned = sum(made.execution_plan[0].non_const_buffer_sizes)
    slab = vocabulary // 4
    assert planned <= slab * hidden * (2 + 4) + 3 * BOUNDS["rows"] * slab * 4 + (1 << 20)


def test_embedding_program_multiplies_by_its_scale() -> None:
    check_embedding(compile_executorch)


# -- the engine on the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [
        ({"tokens": 3, "rank": 7, "rows": 5, "n": 31}, 2),
        # Beyond the bounds, so that they are cut: sums over 8,000 tokens in another order; a float32 adds 2**-24 of
        # itself each time.
        ({"tokens": 2 * BOUNDS["tokens"] + 3, "rank": 3, "rows": BOUNDS["rows"] + 1, "n": BOUNDS["n"] + 5}, 4),
    ],
    ids=["small", "cut"],
)
def test_both_engines_give_the_same_outputs(bundle: Path, sizes: dict[str, int], tolerance: int) -> None:
    """Every graph, at other sizes than export tried, inputs that are no C arrays among them."""
    opened = Bundle.open(bundle)
    both = OnnxEngine(opened, 1), ExecutorchEngine(opened, 1)
    for spec in opened.manifest.graphs:
        inputs = random_inputs(opened, spec, sizes)
        wanted, found = (engine.load(spec.kind, spec.key)(inputs) for engine in both)
        for one, other in zip(wanted, found, strict=True):
            assert one.dtype == other.dtype
            assert relative_error(other, one) <= tolerance * spec.tolerance


@pytest.mark.parametrize("rows", [1, 15, 16, 33])
def test_head_rows_are_split_among_threads(bundle: Path, rows: int) -> None:
    opened = Bundle.open(bundle)
    spec = opened.manifest.graph("head_train")
    inputs = random_inputs(opened, spec, {"rows": rows})
    alone, shared = (ExecutorchEngine(opened, threads).load("head_train")(inputs) for threads in (1, 3))
    for one, other in zip(alone, shared, strict=True):
        assert relative_error(other, one) <= spec.tolerance
    again = ExecutorchEngine(opened, 3).load("head_train")(inputs)
    assert [value.tobytes() for value in again] == [value.tobytes() for value in shared]


def test_inputs_may_be_empty_and_of_no_rank_beyond_the_bound(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    engine, specs = ExecutorchEngine(opened, 1), opened.manifest.graphs
    spec = next(spec for spec in specs if spec.kind == "adapter_weight_grad")
    found = engine.load(spec.kind, spec.key)(random_inputs(opened, spec, {"tokens": 0, "rank": 2}))
    assert not any(value.any() for value in found)
    inputs = random_inputs(opened, spec, {"tokens": 2, "rank": BOUNDS["rank"] + 1})
    with pytest.raises(UsageError, match=r"rank 257 is more .*\(256\); lower --rank"):
        engine.load(spec.kind, spec.key)(inputs)


def test_programs_may_be_used_by_many_threads(bundle: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    opened = Bundle.open(bundle)
    spec = next(spec for spec in opened.manifest.graphs if spec.kind == "adapter_forward")
    run = ExecutorchEngine(opened, 1).load(spec.kind, spec.key)
    cases = [random_inputs(opened, spec, {"tokens": 1 + seed, "rank": 1 + seed % 3}, seed) for seed in range(24)]
    wanted = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, cases * 4))
    for index, outputs in enumerate(found):
        assert all(np.array_equal(a, b) for a, b in zip(outputs, wanted[index % len(cases)], strict=True))


def test_shim_kernels_are_right_at_every_remainder(tmp_path: Path) -> None:
    """Widths, ranks and tokens that make no whole tile or vector, and more than a block of the inner dimension."""
    random = np.random.default_rng(0)
    wide, narrow = ODD
    programs = {}
    for graph, compiled in adapter_programs(ODD):
        (tmp_path / graph.kind).write_bytes(compiled.model)
        programs[graph.kind] = shim.load_shim().load(tmp_path / graph.kind)
    scale = np.array(0.5, np.float32)
    for tokens, rank in ((1, 1), (2, 3), (3, 4), (4, 8), (5, 9), (7, 17), (11, 33), (300, 40)):
        x, grad = (random.standard_normal((tokens, width), np.float32) for width in ODD)
        a, b = random.standard_normal((rank, wide), np.float32), random.standard_normal((narrow, rank), np.float32)
        z, dz = x @ a.T, 0.5 * (grad @ b)
        for kind, inputs, wanted in (
            ("adapter_forward", [x, a, b, scale], [z, 0.5 * (z @ b.T)]),
            ("adapter_input_grad", [grad, a, b, scale], [dz, dz @ a]),
            ("adapter_weight_grad", [x, z, grad, dz, scale], [dz.T @ x, 0.5 * (grad.T @ z)]),
        ):
            found = [np.full_like(value, np.nan) for value in wanted]
            programs[kind].run(inputs, found)
            for one, other in zip(found, wanted, strict=True):
                assert relative_error(one, other) <= 2e-6, (kind, tokens, rank)


@pytest.mark.parametrize(("dtype", "shape"), [("fp16", (70, 11)), ("int8", (13, 5))])
def test_shim_widens_stored_weights_exactly(dtype: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    """Every value of a stored weight, infinities and the smallest among them, through the logits of unit vectors."""
    vocabulary, hidden = shape
    weight = {
        "fp16": np.concatenate([np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0], np.float16)] * 110),
        "int8": np.arange(-128, 127, dtype=np.int8),
    }[dtype]
    weight = weight[: vocabulary * hidden].reshape(-1, hidden)[:vocabulary]
    vocabulary = len(weight)
    head = HeadShape(vocabulary, hidden, dtype, False, 1.0, None)
    graph = next(graph for graph in head_graphs(head) if graph.kind == "head_logits")
    (tmp_path / "program").write_bytes(compile_executorch(graph).model)
    inputs: list[Any] = [weight, np.eye(hidden, dtype=np.float32)]
    if dtype == "int8":
        inputs.insert(1, np.ones(vocabulary, np.float32))
    logits = np.empty((hidden, vocabulary), np.float32)
    shim.load_shim().load(tmp_path / "program").run(inputs, [logits])
    assert np.array_equal(logits, weight.astype(np.float32).T)


def random_inputs(bundle: Bundle, spec: Any, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """The bundle's weights, AdamW's real scalars, and random numbers; matrices lie in memory in all ways."""
    random = np.random.default_rng(seed)
    manifest = bundle.manifest
    scalars = adamw_scalars(3)
    inputs: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.name == "weight":
            file = manifest.embedding.weight if spec.kind == "embedding" else manifest.head.weight
            inputs["weight"] = bundle.weight(file)
        elif tensor.dtype == "int64":
            inputs[tensor.name] = random.integers(0, VOCABULARY, shape)
        elif tensor.name in scalars:
            inputs[tensor.name] = scalars[tensor.name]
        else:
            value = random.random(shape, np.float32)
            inputs[tensor.name] = np.asfortranarray(value) if len(shape) == 2 and seed % 2 == 0 else value
    return inputs


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "ffa"])
def test_ten_steps_match_the_losses_of_onnx(tiny: TinyFactory, bundle: Path, kind: str) -> None:
    base = tiny(**FEW_SHAPES).base
    optimizer = {"lr": 1e-2, "weight_decay": 0.01}
    run = config(kind=kind, total_steps=10, rank=4, lora_alpha=8.0, optimizer=optimizer, basis_steps=2)
    losses = []
    opened = Bundle.open(bundle)
    for engine in (OnnxEngine(opened, 1), ExecutorchEngine(opened, 2)):
        with serving(base) as server, Connection(server.url) as connection:
            make_side = partial(ServerSide, connection=connection)
            trainer = Trainer(opened, engine, make_side, run, random_dataset(VOCABULARY))
            randomize_all(trainer)
            losses.append([trainer.run_step().loss for _ in range(run.total_steps)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "executorch", "onnxruntime", "transformers"):
            raise ImportError(f"{name} is not to be imported", name=name)
sys.meta_path.insert(0, Refuse())
from dlora.edge.__main__ import main
main()
"""


def test_a_command_needs_neither_torch_nor_onnxruntime_nor_executorchs_python(
    tiny: TinyFactory, bundle: Path, tmp_path: Path
) -> None:
    base = tiny(**FEW_SHAPES).base
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 4)
    with serving(base) as server:
        arguments = [
            "train", "--kind", "lora", "--bundle", bundle, "--server", server.url, "--data", data,
            "--out", tmp_path / "out", "--steps", 2, "--engine", "executorch", "--json",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", NO_TORCH, *map(str, arguments)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["torch_loaded"] is False


def test_without_onnxruntime_its_engine_names_the_extra(bundle: Path, tmp_path: Path) -> None:
    arguments = ["selftest", "--bundle", str(bundle), "--engine", "onnx"]
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (12, 1), done.stderr
    assert "dlora[edge]" in done.stderr


@pytest.mark.parametrize(("choice", "ends"), [("auto", "int8"), ("executorch", "int4")])
def test_bundle_for_executorch_alone_works(tiny: TinyFactory, choice: str, ends: Any, tmp_path: Path) -> None:
    shapes = {"num_key_value_heads": 4, **FEW_SHAPES}
    model = tiny(rank=2, head_dtype=ends, embedding_dtype=ends, engine="executorch", **shapes)
    assert not list(model.bundle.rglob("*.onnx"))
    assert load_manifest(model.bundle).engines == ("executorch",)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 2)
    with serving(model.base) as server:
        common = ["--bundle", model.bundle, "--server", server.url]
        done = run_edge("evaluate", *common, "--data", data, "--engine", choice, "--json")
        assert done.code == 0, done.stderr
        done = run_edge("generate", *common, "--prompt", "w1", "--max-new-tokens", 2, "--engine", choice)
        assert done.code == 0, done.stderr
        assert_fails(
            run_edge("evaluate", *common, "--data", data, "--engine", "onnx"), 4, "has no onnx graphs", "--engine both"
        )


# -- the C ABI ---------------------------------------------------------------------------------------------------


def test_shim_refuses_tensors_of_wrong_shape_or_dtype(bundle: Path) -> None:
    name, _ = program(bundle, "adapter_forward")
    loaded = shim.load_shim().load(bundle / name)
    x, lora_a, lora_b = (np.ones(shape, np.float32) for shape in ((3, HIDDEN), (2, HIDDEN), (HIDDEN, 2)))
    scale, z, delta = np.array(1.0, np.float32), np.empty((3, 2), np.float32), np.empty((3, HIDDEN), np.float32)
    loaded.run([x, lora_a, lora_b, scale], [z, delta])
    too_long = np.ones((BOUNDS["tokens"] + 1, HIDDEN), np.float32)
    for inputs, outputs in (
        ([x, lora_a, lora_b], [z, delta]),
        ([x, lora_a, lora_b, scale], [z]),
        ([x.astype(np.float16), lora_a, lora_b, scale], [z, delta]),
        ([x[:, :5].copy(), lora_a, lora_b, scale], [z, delta]),
        ([too_long, lora_a, lora_b, scale], [z, delta]),
        ([x, lora_a, lora_b, scale], [z, np.empty((4, HIDDEN), np.float32)]),
    ):
        with pytest.raises(BundleError, match="fails on ExecuTorch: "):
            loaded.run(inputs, outputs)
    # And is none the worse for it.
    loaded.run([x, lora_a, lora_b, scale], [z, delta])
    assert np.array_equal(delta, np.full((3, HIDDEN), 2.0 * HIDDEN, np.float32))


def test_python_and_c_header_agree() -> None:
    header = (Path(shim.__file__).parents[1] / "native" / "dlora_executorch.h").read_text()
    assert f"#define DLORA_ET_ABI {shim.ABI}\n" in header
    assert f"#define DLORA_ET_MAX_DIMS {shim.MAX_DIMS}\n" in header
    assert ctypes.sizeof(shim._Tensor) == 8 + 4 + 4 + 8 * shim.MAX_DIMS
    with pytest.raises(BundleError, match="cannot be read"):
        shim.load_shim().load(Path("/nowhere.pte"))
