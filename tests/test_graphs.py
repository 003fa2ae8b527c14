"""Training graphs on ONNX Runtime against torch: adapters, AdamW, heads of every kind and of a real size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch

from dlora.cloud.model.base_model import HeadEnd
from dlora.export.graphs import head_torch
from dlora.export.graphs.adamw import adamw_graph, adamw_scalars
from dlora.export.graphs.embedding import embedding_graph
from dlora.export.graphs.golden_case import GoldenCase
from dlora.export.graphs.graph import Computed, TrainingGraph
from dlora.export.graphs.head import HeadShape, head_graphs, head_tests
from dlora.export.graphs.lora import adapter_graphs, adapter_tests
from dlora.export.graphs.tolerances import CEILING, FLOOR, allowed
from dlora.export.tracing.int4 import quantise_groups
from dlora.export.tracing.modules import quantise_rows
from dlora.export.verify import Compiled, compile_onnx, start_session, verify
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import TensorSpec

HIDDEN = 16

CompileGraph = Callable[[TrainingGraph], Compiled]


def run_torch_form(graph: TrainingGraph) -> Compiled:
    """What ExecuTorch's programs are made of, run by torch as it is."""
    module = graph.module()

    def run(inputs: Any) -> Any:
        found = module(*(torch.from_numpy(np.asarray(value)) for value in inputs.values()))
        return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]

    return Compiled(b"", run)


both_forms = pytest.mark.parametrize("compile_graph", [compile_onnx, run_torch_form])


@both_forms
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (1, 1), (33, 5)])
@pytest.mark.parametrize("rank", [1, 8])
def test_adapter_graphs_match_autograd(shape: tuple[int, int], rank: int, compile_graph: CompileGraph) -> None:
    for graph in adapter_graphs(*shape):
        check_adapter(graph, compile_graph(graph), shape, rank, (1, 5, 7))


def check_adapter(
    graph: TrainingGraph, compiled: Compiled, shape: tuple[int, int], rank: int, token_counts: Iterable[int]
) -> None:
    for tokens in token_counts:
        inputs = adapter_inputs(graph, shape, rank, tokens)
        found = outputs_of(graph, inputs, compiled)
        oracles.assert_near(found, oracles.expected(graph.kind, inputs), oracles.SUMS)


@both_forms
def test_adamw_graph_matches_torch_over_twenty_steps(compile_graph: CompileGraph) -> None:
    check_adamw(compile_graph(adamw_graph()))


@both_forms
def test_embedding_graph_multiplies_by_its_scale(compile_graph: CompileGraph) -> None:
    check_embedding(compile_graph)


@both_forms
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_an_embedding_is_as_near_as_what_is_stored(dtype: Any, compile_graph: CompileGraph) -> None:
    end = _head_end(48, HeadShape(48, HIDDEN, dtype, False, 1.0, None))
    graph = embedding_graph(48, HIDDEN, dtype, 2.0)
    values = {**_head_weights(end, dtype), "ids": np.array([47, 0, 47, 3])}
    inputs = {spec.name: values[spec.name] for spec in graph.inputs}
    found = outputs_of(graph, inputs, compile_graph(graph))
    oracles.assert_near(found, oracles.expected("embedding", inputs, embedding_scale=2.0), oracles.SUMS)
    whole = {"weight": end.weight.numpy(), "ids": values["ids"]}
    bound = oracles.SUMS + oracles.ROUNDING[dtype]
    oracles.assert_near(found, oracles.expected("embedding", whole, embedding_scale=2.0), bound)


def check_embedding(compile_graph: CompileGraph) -> None:
    weight = np.arange(12, dtype=np.float16).reshape(6, 2)
    compiled = compile_graph(embedding_graph(6, 2, "fp16", 2.5))
    (found,) = compiled.run({"weight": weight, "ids": np.array([5, 0, 5])})
    assert found.tolist() == [[25.0, 27.5], [0.0, 2.5], [25.0, 27.5]]


def check_adamw(compiled: Compiled) -> None:
    """Each step from the state that the last one left: near float64's path, and nearer to torch's in float32."""
    random = np.random.default_rng(3)
    param, grads = random.standard_normal(257, np.float32), random.standard_normal((20, 257), np.float32)
    state = {"param": param, "exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}
    for step, grad in enumerate(grads, 1):
        given = {**state, "grad": grad, **adamw_scalars(step)}
        state = dict(zip(state, compiled.run({name: given[name] for name in ADAMW_INPUTS}), strict=True))
    found = {f"new_{name}": value for name, value in state.items()}
    rates = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    oracles.assert_near(found, oracles.adamw_steps(param, grads, **rates), oracles.ADAMW)
    weight = torch.nn.Parameter(torch.from_numpy(param.copy()))
    optimizer = torch.optim.AdamW([weight], **rates)
    for grad in grads:
        weight.grad = torch.from_numpy(grad)
        optimizer.step()
    assert oracles.relative_error(found["new_param"], weight.detach().numpy()) <= 2e-7  # a unit in the last place


ADAMW_INPUTS = [spec.name for spec in adamw_graph().inputs]


def adapter_inputs(graph: TrainingGraph, shape: tuple[int, int], rank: int, tokens: int) -> oracles.Arrays:
    random = np.random.default_rng(tokens)
    sizes = {"in": shape[0], "out": shape[1], "rank": rank, "tokens": tokens}
    wanted = {
        "x": ("tokens", "in"), "grad": ("tokens", "out"), "z": ("tokens", "rank"), "dz": ("tokens", "rank"),
        "lora_A": ("rank", "in"), "lora_B": ("out", "rank"),
    }  # fmt: skip
    values = {name: random.standard_normal([sizes[size] for size in of], np.float32) for name, of in wanted.items()}
    values["scale"] = np.array(2.0, np.float32)
    return {spec.name: values[spec.name] for spec in graph.inputs}


def outputs_of(graph: TrainingGraph, inputs: oracles.Arrays, compiled: Compiled) -> oracles.Arrays:
    found = compiled.run(inputs)
    return {spec.name: value for spec, value in zip(graph.outputs, found, strict=True)}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.98), (0.0, 0.99999), (0.5, 0.9)])
def test_adamw_uses_the_same_one_minus_beta_as_torch(betas: tuple[float, float]) -> None:
    session = start_session(adamw_graph().to_onnx().SerializeToString())
    inputs = {name: np.zeros(1, np.float32) for name in ("param", "exp_avg", "exp_avg_sq")}
    inputs |= adamw_scalars(1) | {"grad": np.ones(1, np.float32)}
    inputs |= {f"beta{index}": np.array(beta, np.float32) for index, beta in enumerate(betas, 1)}
    found = session.run(["new_exp_avg", "new_exp_avg_sq"], inputs)
    assert [float(value[0]) for value in found] == [float(np.float32(1 - beta)) for beta in betas]


def _head_end(vocabulary: int, shape: HeadShape) -> HeadEnd:
    generator = torch.Generator().manual_seed(0)
    return HeadEnd(
        weight=torch.randn(vocabulary, HIDDEN, generator=generator) * 0.3,
        bias=torch.randn(vocabulary, generator=generator) if shape.bias else None,
        logit_scale=shape.logit_scale,
        softcap=shape.softcap,
        tied=False,
    )


def _head_weights(end: HeadEnd, dtype: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if dtype == "int8":
        inputs["weight"], inputs["row_scales"] = (tensor.numpy() for tensor in quantise_rows(end.weight))
    elif dtype == "int4":
        inputs["weight"], inputs["group_scales"] = (tensor.numpy() for tensor in quantise_groups(end.weight, 16))
    else:
        inputs["weight"] = end.weight.numpy().astype(np.float16 if dtype == "fp16" else np.float32)
    if end.bias is not None:
        inputs["bias"] = end.bias.numpy()
    return inputs


@both_forms
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("vocabulary", [5, 48, 96, 97, 1009])
@pytest.mark.parametrize(
    ("bias", "logit_scale", "softcap"), [(False, 1.0, None), (True, 1.0, None), (False, 0.25, None), (True, 0.5, 3.0)]
)
def test_head_graphs_match_autograd(
    dtype: Any,
    vocabulary: int,
    bias: bool,
    logit_scale: float,
    softcap: float | None,
    compile_graph: CompileGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_torch, "LEAST_ROWS", 5)  # several slabs in torch, too
    shape = HeadShape(vocabulary, HIDDEN, dtype, bias, logit_scale, softcap)
    end = _head_end(vocabulary, shape)
    hidden = np.random.default_rng(0).standard_normal((9, HIDDEN), np.float32)
    check_head(shape, end, hidden, compile_graph)


def check_head(shape: HeadShape, end: HeadEnd, hidden: oracles.Array, compile_graph: CompileGraph) -> None:
    """Exact for the weight that is stored, and as near to the whole weight's as its rounding allows."""
    scaling: dict[str, Any] = {"logit_scale": shape.logit_scale, "softcap": shape.softcap}
    labels = np.random.default_rng(1).integers(0, shape.vocabulary_size, len(hidden))
    for graph in head_graphs(shape):
        values = {
            **_head_weights(end, shape.dtype), "hidden_states": hidden, "labels": labels,
            "grad_scale": np.array(0.125, np.float32),
        }  # fmt: skip
        inputs = {spec.name: values[spec.name] for spec in graph.inputs}
        found, stored = outputs_of(graph, inputs, compile_graph(graph)), oracles.expected(graph.kind, inputs, **scaling)
        oracles.assert_near(found, stored, oracles.HEAD)
        if "predictions" in found:
            oracles.assert_predicts(found["predictions"], stored["logits"])
        whole = {name: value for name, value in inputs.items() if not name.endswith("_scales")}
        whole["weight"] = end.weight.numpy()
        bound = oracles.HEAD + oracles.ROUNDING[shape.dtype]
        oracles.assert_near(found, oracles.expected(graph.kind, whole, **scaling), bound)


def test_head_graph_widens_one_slab_at_most() -> None:
    for graph in head_graphs(HeadShape(49152, 576, "fp16", False, 1.0, None)):
        model = onnx.shape_inference.infer_shapes(graph.to_onnx())
        wide = [value for value in model.graph.value_info if _elements(value) >= 49152 * 576]
        assert not wide


def _elements(value: onnx.ValueInfoProto) -> int:
    return int(np.prod([dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim]))


def test_every_input_must_be_used() -> None:
    x, unused, y = (TensorSpec(name, "fp32", ("n",)) for name in ("x", "unused", "y"))
    with pytest.raises(ExportError, match=r"does not use its inputs \['unused'\]"):
        TrainingGraph("adamw", (x, unused), (y,), "y = Neg (x)", lambda: Computed(torch.neg)).to_onnx()


@pytest.mark.parametrize("value", [1.1, np.nan])
def test_a_graph_beyond_tolerance_is_refused(value: float) -> None:
    graph = embedding_graph(4, 2, "fp32", 1.0)
    inputs = {"weight": np.ones((4, 2), np.float32), "ids": np.array([1])}
    wrong = {"hidden_states": np.full((1, 2), value, np.float32)}
    with pytest.raises(ExportError, match="embedding is not exact enough: hidden_states is off by"):
        verify(graph, [GoldenCase(inputs, wrong, {"hidden_states": 1e-3})])


def test_tolerance_is_a_few_times_torchs_error_and_limited() -> None:
    exact = {"x": np.array([1.0])}
    for error, tolerance in ((0.0, FLOOR), (1e-5, FLOOR + 4e-5), (0.1, CEILING)):
        found = allowed(exact, {"x": np.array([1.0 + error])})["x"]
        assert tolerance <= found <= 1.11 * tolerance


LARGE = HeadShape(262_144, 640, "fp32", False, 1.0, None)  # of Gemma 3 270M


@pytest.fixture(scope="module")
def large_tests() -> dict[str, list[GoldenCase]]:
    """What the graphs of a head of that size are verified by: as in real ones, all rows of the weight share a
    direction. Most of it cancels in the gradient, and torch's own, in float32, is then off by 2e-5."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(LARGE.hidden_size, generator=generator)
    weight = torch.randn(LARGE.vocabulary_size, LARGE.hidden_size, generator=generator).mul_(0.05).add_(shared)
    hidden = torch.randn(8, LARGE.hidden_size, generator=generator).numpy()
    end = HeadEnd(weight, None, 1.0, None, tied=False)
    weights = _head_weights(end, "fp32")
    return {graph.kind: list(head_tests(graph, end, weights, hidden, "fp32")) for graph in head_graphs(LARGE)}


@pytest.mark.parametrize("kind", ["head_train", "head_loss", "head_logits"])
def test_a_large_head_is_as_exact_as_float32_can_be(large_tests: dict[str, list[GoldenCase]], kind: str) -> None:
    made = verify(graph_of(LARGE, kind), large_tests[kind])
    assert made.error <= made.tolerance <= CEILING
    if kind == "head_train":
        assert made.error > 1e-5


SLIP = """slip = Constant <value = float {{{}}}> ()
        slipped = Mul (d_product, slip)
        grad_hidden_states = Mul (slipped, grad_scale)"""
GRAD = "grad_hidden_states = Mul (d_product, grad_scale)"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("total = Add (next_rescaled_total", "total = Add (next_more_total"),
        ("Gemm (next_d_product, next_wide, next_rescaled_rows)", "Identity (before_weighted_rows)"),
        (GRAD, SLIP.format(1.001)),
    ],
    ids=["a slab is counted twice", "slabs are left out", "a thousandth too much"],
)
def test_a_large_head_that_is_wrong_is_refused(
    large_tests: dict[str, list[GoldenCase]], right: str, wrong: str
) -> None:
    with pytest.raises(ExportError, match="head_train is not exact enough"):
        verify(graph_of(LARGE, "head_train", right, wrong), large_tests["head_train"])


def graph_of(shape: HeadShape, kind: str, right: str = "", wrong: str = "") -> TrainingGraph:
    """Of a head, with an error in it."""
    graph = next(graph for graph in head_graphs(shape) if graph.kind == kind)
    assert isinstance(graph.body, str)
    assert right in graph.body
    return replace(graph, body=graph.body.replace(right, wrong))


def small_head(dtype: Any, kind: str) -> tuple[HeadShape, HeadEnd, Callable[[], Iterator[GoldenCase]]]:
    """Of 97 tokens: its shape, itself, and the tests that export makes for it."""
    shape = HeadShape(97, HIDDEN, dtype, False, 1.0, None)
    end = _head_end(97, shape)
    hidden = np.random.default_rng(0).standard_normal((9, HIDDEN), np.float32)
    return shape, end, lambda: head_tests(graph_of(shape, kind), end, _head_weights(end, dtype), hidden, dtype)


def test_a_head_that_predicts_other_tokens_is_refused() -> None:
    shape, _, tests = small_head("fp32", "head_loss")
    verify(graph_of(shape, "head_loss"), tests())
    with pytest.raises(ExportError, match="predicts other tokens"):
        verify(graph_of(shape, "head_loss", "ArgMax", "ArgMin"), tests())


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_rounded_head_has_the_arithmetic_tolerance_of_fp32(dtype: Any) -> None:
    """A slip of 5e-4 is below what rounding may cost, and refused all the same."""
    shape, _, tests = small_head(dtype, "head_train")
    assert verify(graph_of(shape, "head_train"), tests()).tolerance > 1e-3
    with pytest.raises(ExportError, match="grad_hidden_states is off by 5"):
        verify(graph_of(shape, "head_train", GRAD, SLIP.format(1.0005)), tests())


def test_head_with_too_large_int8_error_says_what_to_do() -> None:
    shape, end, tests = small_head("int8", "head_train")
    end.weight[:, 0] = 100.0  # one scale a row: next to this, the rest is nothing
    with pytest.raises(ExportError, match=r"int8 is too coarse .* off by .*; use --head-dtype fp16 or fp32"):
        verify(graph_of(shape, "head_train"), tests())


@pytest.mark.parametrize("shape", [(16, 24), (4096, 11008)])
def test_adapter_tolerances_follow_torchs_own_error(shape: tuple[int, int]) -> None:
    for graph in adapter_graphs(*shape):
        made = verify(graph, adapter_tests(graph, shape, 8, 2.0))
        assert FLOOR <= made.tolerance <= 1e-5
