"""Graphs are a stranger's programs: what is in none of ours is refused, and what takes too much memory is one line."""

from __future__ import annotations

import itertools
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import onnx
import pytest
from attacks.fuzz_manifest import manifest_of
from attacks.fuzz_target import mutate_bytes
from block_bundles import block_bundle, graphs_of, prepared
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_check import MAX_GRAPH_BYTES, OPERATORS, _check_tensor, check_graph
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.export.graphs.adamw import adamw_graph
from dlora.export.graphs.embedding import embedding_graph
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.graphs.head import HeadShape, head_graphs
from dlora.export.graphs.lora import adapter_graphs
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import Manifest, TensorSpec

X, Y = TensorSpec("x", "fp32", ("n",)), TensorSpec("y", "fp32", ("n",))


@cache
def every_graph() -> list[TrainingGraph]:
    """Of every kind and variant that the exporter has; of blocks, those of families that use all operators together."""
    heads = [
        HeadShape(vocabulary, hidden, dtype, bias, scale, cap)
        for dtype, bias, scale, cap, (vocabulary, hidden) in itertools.product(
            ("fp32", "fp16", "int8"), (False, True), (1.0, 0.5), (None, 3.0), ((97, 16), (262_144, 2048), (1, 1))
        )
    ]
    others = [adamw_graph(), *(embedding_graph(9, 4, dtype, 2.0) for dtype in ("fp32", "fp16"))]
    families = (("llama", "int4"), ("apertus", "fp32"), ("persimmon", "fp32"), ("mpt", "fp16"))
    blocks = [graph for family, dtype in families for graph in graphs_of(prepared(family, 1, dtype))]
    return [*adapter_graphs(5, 7), *blocks, *others, *(graph for head in heads for graph in head_graphs(head))]


def operators(graph: onnx.GraphProto) -> set[str]:
    inner = (operators(attribute.g) for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return {node.op_type for node in graph.node}.union(*inner)


@pytest.mark.slow  # every graph of every kind is made
def test_the_operators_are_those_that_the_exporter_uses() -> None:
    used: set[str] = set()
    for graph in every_graph():
        model = graph.to_onnx()
        check_graph(model.SerializeToString(deterministic=True))
        used |= operators(model.graph)
    assert used == OPERATORS


def parsed(body: str, declared: str = "(float[n] x) => (float[m] y)") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\ngraph {declared} {{ {body} }}')


REFUSED = {
    "a terabyte of one number": (
        "s = Constant <value = int64[1] {1000000000000}> () z = ConstantOfShape (s) y = Add (z, x)",
        "the operator 'ConstantOfShape'",
    ),
    "a loop": (
        "n = Constant <value = int64 {9000000000000000000}> () t = Constant <value = bool {1}> ()\n"
        "y = Loop <body = b (int64 i, bool c, float[n] v) => (bool d, float[n] w) {"
        " d = Identity (c) w = Identity (v) }> (n, t, x)",
        "the operator 'Loop'",
    ),
    "a loop as long as an input": (
        "y = Scan <num_scan_inputs = 1, body = one (float v) => (float w) { w = Identity (v) }> (x)",
        "a Scan over something other than a constant",
    ),
    "a loop over what was doubled": (
        "c = Constant <value = float[1] {1}> () a = Concat <axis = 0> (c, c) b = Concat <axis = 0> (a, a)\n"
        "y = Scan <num_scan_inputs = 1, body = one (float v) => (float w) { w = Identity (v) }> (b)",
        "a Scan over something other than a constant",
    ),
    "a loop in a loop": (
        "c = Constant <value = float[1] {1}> ()\n"
        "y = Scan <num_scan_inputs = 1, body = one (float v) => (float w) { d = Constant <value = float[1] {1}> ()"
        " w = Scan <num_scan_inputs = 1, body = two (float t) => (float u) { u = Identity (t) }> (d) }> (c)",
        "a graph in Scan",
    ),
    "an operator of somebody else": ("y = com.microsoft.Add (x, x)", "the operator"),
    "a graph where none belongs": (
        "y = Identity <body = b (float v) => (float w) { w = Identity (v) }> (x)",
        "a graph in Identity",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graph_with_a_forbidden_part_is_refused(name: str) -> None:
    body, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        check_graph(parsed(body).SerializeToString())


def test_model_with_a_forbidden_part_is_refused() -> None:
    large, weights, sparse, function = (parsed("y = Identity (x)") for _ in range(4))
    large.graph.node[0].doc_string = "x" * MAX_GRAPH_BYTES
    weights.graph.initializer.append(onnx.TensorProto(name="w", data_type=1, dims=[10**12]))
    sparse.graph.sparse_initializer.append(onnx.SparseTensorProto(dims=[10**12]))
    function.functions.append(onnx.FunctionProto(name="Add"))
    claims, elsewhere = (parsed("c = Constant <value = float[1] {1.0}> () y = Add (x, c)") for _ in range(2))
    claims.graph.node[0].attribute[0].t.dims[:] = [1 << 20, 1 << 20]
    elsewhere.graph.node[0].attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
    for model, text in (
        (large, "more than 256 KiB"),
        (weights, "field 5 in a graph"),
        (sparse, "field 15 in a graph"),
        (function, "field 25 in a model"),
        (claims, "claims to be larger than it is"),
        (elsewhere, "field 14 in a tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            check_graph(model.SerializeToString())


def test_dimension_of_a_wrong_wire_type_is_refused() -> None:
    """Of wire type 5: protobuf ignores it, and a product with its zero would be none."""
    tensor = onnx.TensorProto(data_type=1, dims=[1 << 40]).SerializeToString()
    with pytest.raises(ValueError, match="claims to be larger"):
        _check_tensor(tensor)
    with pytest.raises(ValueError, match="dimension of a wrong type"):
        _check_tensor(b"\x0d\0\0\0\0" + tensor)


def test_any_bytes_pass_or_raise_value_error(tiny: TinyFactory) -> None:
    """The graphs of a bundle, changed."""
    rng = Random(0)
    seeds = [path.read_bytes() for path in sorted(block_bundle(tiny, block_dtype="int4").rglob("*.onnx"))]
    for _ in range(600):
        data = rng.choice(seeds)
        for _ in range(rng.randrange(1, 4)):
            data = mutate_bytes(data, rng)
        with suppress(ValueError):
            check_graph(data)


def loaded(directory: Path, model: onnx.ModelProto, gives: TensorSpec = Y) -> Bundle:
    """A bundle whose embedding is this graph, of x to y."""
    content = model.SerializeToString()
    (directory / "graph.onnx").write_bytes(content)
    files = {"graph.onnx": content, "tokenizer.json": b"", "embedding.npy": b""}
    manifest = msgspec.json.decode(manifest_of(files), type=Manifest)
    graph = msgspec.structs.replace(manifest.graphs[0], inputs=(X,), outputs=(gives,))
    return Bundle(directory, msgspec.structs.replace(manifest, graphs=(graph,)))


def three_dimensions_of_one() -> str:
    axes = (("1,2", "u"), ("0,2", "v"), ("0,1", "w"))
    body = "".join(
        f"a{name} = Constant <value = int64[2] {{{axis}}}> () {name} = Unsqueeze (x, a{name}) " for axis, name in axes
    )
    return f"{body} uv = Mul (u, v) y = Mul (uv, w)"


@pytest.mark.parametrize("body", [
    three_dimensions_of_one(), "s = Shape (x) all = Concat <axis = 0> (s, s, s) y = Expand (x, all)"
], ids=["products", "expanded"])  # fmt: skip
def test_graph_that_needs_a_terabyte_is_an_error(body: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """10,000 numbers become 10^12."""
    model = parsed(body, "(float[n] x) => (float[a,b,c] y)")
    cube = msgspec.structs.replace(Y, shape=("a", "b", "c"))
    run = OnnxEngine(loaded(tmp_path, model, cube), threads=1).load("embedding")
    assert run({"x": np.ones(2, np.float32)})[0].shape == (2, 2, 2)
    with pytest.raises(BundleError, match=r"graph\.onnx fails on onnxruntime.*close other programs") as caught:
        run({"x": np.ones(10_000, np.float32)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_engine_refuses_a_forbidden_graph_in_one_line(tmp_path: Path) -> None:
    engine = OnnxEngine(loaded(tmp_path, parsed(REFUSED["a terabyte of one number"][0])))
    with pytest.raises(BundleError, match=r"graph\.onnx has the operator 'ConstantOfShape', which no graph may"):
        engine.load("embedding")
