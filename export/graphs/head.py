"""The LM head: logits, cross-entropy, and the gradient of the loss by the hidden states.

::

    raw    = h W^T + bias                         (rows, vocabulary)
    logits = cap(logit_scale * raw)               cap(x) = softcap * tanh(x / softcap), or x
    loss   = log(sum(exp(logits))) - logits[label]                      one for each row
    dh     = grad_scale * (softmax - onehot) * cap' * logit_scale W     one row for each row

Neither the logits nor a widened weight ever exist whole. A Scan walks over slabs of the vocabulary: it widens one slab
of the stored weight, multiplies, and folds what it finds into a running softmax, that of online softmax (Milakov and
Gimelshein, arXiv 1805.02867) with the gradient's product folded in, as cut cross-entropy does it (Wijmans et al.,
arXiv 2411.09009)::

    peak'   = max(peak, max(logits of the slab))
    total'  = total  * exp(peak - peak') + sum(p)                       p = exp(logits of the slab - peak')
    weighted_rows' = weighted_rows * exp(peak - peak') + (p * cap') W_slab

so that loss = peak + log(total) - logits[label], and dh needs weighted_rows / total and W[label] alone. A weight is
read and widened once a call, whatever the rows. The first slab takes what the others leave over, and stands
before the Scan: it starts the running values. ``head_torch.py`` has the same for ExecuTorch, and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from dlora.cloud.model.base_model import HeadEnd
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import HeadSpec, StoredDtype, TensorSpec

from .arrays import Arrays
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import Computed, Specs, TrainingGraph
from .head_torch import head_logits, head_loss, head_train, reference
from .stored_weight import CONSTANTS, pick, weight_inputs, widen
from .tolerances import Rounding, allowed

KINDS: Final = ("head_train", "head_loss", "head_logits")
ROUNDING: Final[dict[StoredDtype, dict[str, float]]] = {
    # What a rounded weight may change; the loss sees it only in the mean, but the gradient in every row.
    "fp32": {"losses": 0.0, "grad_hidden_states": 0.0, "logits": 0.0},
    "fp16": {"losses": 1e-3, "grad_hidden_states": 2e-3, "logits": 1e-3},
    "int8": {"losses": 2e-2, "grad_hidden_states": 5e-2, "logits": 5e-2},
    "int4": {"losses": 2e-1, "grad_hidden_states": 4e-1, "logits": 3e-1},
}
LOGITS_ROWS: Final = 2  # logits are wide, and golden vectors travel with every bundle
SLAB_VALUES: Final = 1024 * 576  # of the weight: 2.4 MB when wide, which a core's caches still hold
CALL_ROWS: Final = 128  # reading and widening the weight once a call is then an eighth of the work
LEAST_SLABS: Final = 4  # a tiny vocabulary is cut as well, or its tests would test nothing

_Folded = Literal["weighted_rows", "best"]  # what a walk over the vocabulary gives beside the softmax


@dataclass(frozen=True)
class HeadShape:
    """What the graphs depend on, as in ``HeadSpec`` of the manifest."""

    vocabulary_size: int
    hidden_size: int
    dtype: StoredDtype
    bias: bool
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, end: HeadEnd, spec: HeadSpec) -> HeadShape:
        """Of a base model's head, as a bundle stores it."""
        vocabulary_size, hidden_size = end.weight.shape
        bias = end.bias is not None
        return cls(vocabulary_size, hidden_size, spec.dtype, bias, spec.logit_scale, spec.softcap)

    @property
    def slab(self) -> int:
        """Vocabulary rows of a slab."""
        return max(1, min(SLAB_VALUES // self.hidden_size, self.vocabulary_size // LEAST_SLABS))

    @property
    def first(self) -> int:
        """Vocabulary rows of the first slab: what whole slabs leave over, else one of them."""
        return self.vocabulary_size % self.slab or self.slab


def head_graphs(head: HeadShape) -> tuple[TrainingGraph, ...]:
    """``head_train``, ``head_loss`` and ``head_logits``."""
    weights = list(weight_inputs(head.dtype, head.vocabulary_size, head.hidden_size))
    if head.bias:
        weights.append(TensorSpec("bias", "fp32", (head.vocabulary_size,)))
    hidden = TensorSpec("hidden_states", "fp32", ("rows", head.hidden_size))
    labels = TensorSpec("labels", "int64", ("rows",))
    grad_scale = TensorSpec("grad_scale", "fp32", ())
    losses = TensorSpec("losses", "fp32", ("rows",))
    grad = TensorSpec("grad_hidden_states", "fp32", ("rows", head.hidden_size))
    predictions = TensorSpec("predictions", "int64", ("rows",))
    logits = TensorSpec("logits", "fp32", ("rows", head.vocabulary_size))
    labelled = _of_labels(head)
    of_loss = labelled + _walk(head, "best") + _LOSS + "predictions = Squeeze (best, axis_1)\n"
    of_train = labelled + _walk(head, "weighted_rows") + _LOSS + _gradient(head)

    def graph(kind: str, inputs: Specs, outputs: Specs, body: str, function: Callable[..., Any]) -> TrainingGraph:
        module = partial(Computed, partial(function, head))
        names = frozenset(spec.name for spec in weights)
        return TrainingGraph(kind, (*weights, *inputs), outputs, _constants(head) + body, module, weights=names)

    return (
        graph("head_train", (hidden, labels, grad_scale), (losses, grad), of_train, head_train),
        graph("head_loss", (hidden, labels), (losses, predictions), of_loss, head_loss),
        graph("head_logits", (hidden,), (logits,), _all_logits(head), head_logits),
    )


def _constants(head: HeadShape) -> str:
    starts = range(head.first, head.vocabulary_size, head.slab)
    listed = ", ".join(map(str, starts))
    return f"""
        axis_0 = Constant <value = int64[1] {{0}}> ()
        axis_1 = Constant <value = int64[1] {{1}}> ()
        zero = Constant <value = int64[1] {{0}}> ()
        first = Constant <value = int64[1] {{{head.first}}}> ()
        slab = Constant <value = int64[1] {{{head.slab}}}> ()
        starts = Constant <value = int64[{len(starts)}, 1] {{{listed}}}> ()
        most_shape = Constant <value = int64[2] {{-1, {len(starts) * head.slab}}}> ()
        logit_scale = Constant <value = float {{{head.logit_scale!r}}}> ()
        softcap = Constant <value = float {{{head.softcap or 1.0!r}}}> ()
        one = Constant <value = float {{1.0}}> ()
        {CONSTANTS if head.dtype == "int4" else ""}
    """


def _slab_logits(head: HeadShape, p: str, start: str, end: str) -> str:
    """``{p}logits`` (rows, slab), ``{p}wide`` (slab, hidden_size) and what else the gradient needs."""
    lines = pick(head.dtype, p, f"Slice ({{}}, {start}, {end}, axis_0)") + widen(head.dtype, p, head.hidden_size)
    lines += f"{p}product = Gemm <transB = 1> (hidden_states, {p}wide)\n"
    if head.dtype == "int8":
        lines += f"{p}scales = Slice (row_scales, {start}, {end}, axis_0)\n"
    if head.bias:
        lines += f"{p}bias = Slice (bias, {start}, {end}, axis_0)\n"
    return lines + _logits(head, p)


def _of_labels(head: HeadShape) -> str:
    """``label_logits`` (rows, 1) and ``label_wide`` (rows, hidden_size): the rows of the weight that labels name."""
    lines = pick(head.dtype, "label_", "Gather <axis = 0> ({}, labels)")
    lines += widen(head.dtype, "label_", head.hidden_size)
    lines += "label_products = Mul (hidden_states, label_wide)\nlabel_product = ReduceSum (label_products, axis_1)\n"
    if head.dtype == "int8":
        lines += "label_flat_scales = Gather <axis = 0> (row_scales, labels)\n"
        lines += "label_scales = Unsqueeze (label_flat_scales, axis_1)\n"
    if head.bias:
        lines += "label_flat_bias = Gather <axis = 0> (bias, labels)\n"
        lines += "label_bias = Unsqueeze (label_flat_bias, axis_1)\n"
    return lines + _logits(head, "label_")


def _logits(head: HeadShape, p: str) -> str:
    """From ``{p}product`` to ``{p}logits``; where there is a cap, its slope is left behind."""
    steps = [
        (head.dtype == "int8", "unquantised", f"Mul ({{}}, {p}scales)"),
        (head.bias, "biased", f"Add ({{}}, {p}bias)"),
        (head.logit_scale != 1.0, "scaled", "Mul ({}, logit_scale)"),
        (head.softcap is not None, "shrunk", "Div ({}, softcap)"),
        (head.softcap is not None, "tanh", "Tanh ({})"),
        (head.softcap is not None, "capped", "Mul ({}, softcap)"),
    ]
    return _one_by_one(steps, p, f"{p}product", f"{p}logits")


def _backward(head: HeadShape, p: str, value: str, result: str) -> str:
    """From ``value``, the gradient by ``{p}logits``, to ``result``, that by ``{p}product`` but for ``logit_scale``."""
    lines = ""
    if head.softcap is not None:
        lines = f"{p}tanh_squared = Mul ({p}tanh, {p}tanh)\n{p}slope = Sub (one, {p}tanh_squared)\n"
    steps = [
        (head.softcap is not None, "d_capped", f"Mul ({{}}, {p}slope)"),
        (head.dtype == "int8", "d_unquantised", f"Mul ({{}}, {p}scales)"),
    ]
    return lines + _one_by_one(steps, p, value, result)


def _one_by_one(steps: list[tuple[bool, str, str]], p: str, value: str, result: str) -> str:
    """``result`` of ``value``, through those of ``steps`` that the head has: the name of each, and how it is made."""
    lines = ""
    for is_there, name, operation in steps:
        if is_there:
            lines += f"{p}{name} = {operation.format(value)}\n"
            value = f"{p}{name}"
    return lines + f"{result} = Identity ({value})\n"


def _walk(head: HeadShape, folded: _Folded) -> str:
    """``peak`` and ``total`` (rows, 1) of the softmax, and ``weighted_rows`` (rows, hidden_size) or
    ``best`` (rows, 1)."""
    lines = _slab(head, folded, "first_", "zero", "first")
    names = ("peak", "total", folded)
    if head.first == head.vocabulary_size:
        return lines + "".join(f"{name} = Identity (first_{name})\n" for name in names)
    kind = "int64[rows, 1]" if folded == "best" else f"float[rows, {head.hidden_size}]"
    before, after = (
        f"float[rows, 1] {prefix}_peak, float[rows, 1] {prefix}_total, {kind} {prefix}_{folded}"
        for prefix in ("before", "next")
    )
    return f"""{lines}
        {", ".join(names)} = Scan <num_scan_inputs = 1, body = fold_slab ({before}, int64[1] start) => ({after}) {{
            end = Add (start, slab)
            {_slab(head, folded, "next_", "start", "end")}
        }}> ({", ".join(f"first_{name}" for name in names)}, starts)
    """


def _slab(head: HeadShape, folded: _Folded, p: str, start: str, end: str) -> str:
    """One slab, ``next_``, folded into the running values, ``before_``; of the ``first_`` the start of these."""
    is_first = p == "first_"
    lines = _slab_logits(head, p, start, end) + f"{p}top = ReduceMax ({p}logits, axis_1)\n"
    if is_first:
        lines += "first_peak = Identity (first_top)\n"
    else:
        lines += "next_peak = Max (before_peak, next_top)\n"
        lines += "next_peak_change = Sub (before_peak, next_peak)\nnext_rescale = Exp (next_peak_change)\n"
    lines += f"{p}below = Sub ({p}logits, {p}peak)\n{p}p = Exp ({p}below)\n"
    lines += f"{'first_total' if is_first else 'next_more_total'} = ReduceSum ({p}p, axis_1)\n"
    if not is_first:
        lines += "next_rescaled_total = Mul (before_total, next_rescale)\n"
        lines += "next_total = Add (next_rescaled_total, next_more_total)\n"
    if folded == "weighted_rows":
        lines += _backward(head, p, f"{p}p", f"{p}d_product")
        if is_first:
            return lines + "first_weighted_rows = Gemm (first_d_product, first_wide)\n"
        lines += "next_rescaled_rows = Mul (before_weighted_rows, next_rescale)\n"
        return lines + "next_weighted_rows = Gemm (next_d_product, next_wide, next_rescaled_rows)\n"
    lines += f"{p}place = ArgMax <axis = 1> ({p}logits)\n{p}found = Add ({p}place, {start})\n"
    if is_first:
        return lines + "first_best = Identity (first_found)\n"
    # Greater and not equal: of equals the first counts.
    lines += "next_better = Greater (next_top, before_peak)\n"
    return lines + "next_best = Where (next_better, next_found, before_best)\n"


_LOSS: Final = """
        log_total = Log (total)
        log_sum = Add (peak, log_total)
        losses_wide = Sub (log_sum, label_logits)
        losses = Squeeze (losses_wide, axis_1)
"""


def _gradient(head: HeadShape) -> str:
    lines = "expected = Div (weighted_rows, total)\n" + _backward(head, "label_", "label_wide", "label_row")
    lines += "d_product = Sub (expected, label_row)\n"
    if head.logit_scale == 1.0:
        return lines + "grad_hidden_states = Mul (d_product, grad_scale)\n"
    return lines + "d_scaled = Mul (d_product, logit_scale)\ngrad_hidden_states = Mul (d_scaled, grad_scale)\n"


def _all_logits(head: HeadShape) -> str:
    """``logits`` (rows, vocabulary), which are the output: nothing is gained by not having them whole."""
    lines = _slab_logits(head, "first_", "zero", "first")
    if head.first == head.vocabulary_size:
        return lines + "logits = Identity (first_logits)\n"
    return f"""{lines}
        stacked = Scan <num_scan_inputs = 1, body = logits_of_slab
            (int64[1] start) => (float[rows, {head.slab}] next_logits) {{
            end = Add (start, slab)
            {_slab_logits(head, "next_", "start", "end")}
        }}> (starts)
        by_row = Transpose <perm = [1, 0, 2]> (stacked)
        most = Reshape (by_row, most_shape)
        logits = Concat <axis = 1> (first_logits, most)
    """


def head_tests(
    graph: TrainingGraph, end: HeadEnd, weights: Arrays, hidden_states: npt.NDArray[np.float32], dtype: StoredDtype
) -> Iterator[GoldenCase]:
    """Hidden states of the base model; labels are random.

    The graph's arithmetic is judged with the weight that it is given. What the rounding of that weight changes comes on
    top and has bounds of its own, ``ROUNDING``; the golden vectors have the base model's weight.
    """
    random = np.random.default_rng(1)
    values: Arrays = {
        **weights,
        "hidden_states": hidden_states,
        "labels": random.integers(0, len(end.weight), len(hidden_states)),
        "grad_scale": np.array(0.125, np.float32),
    }
    inputs = {spec.name: values[spec.name] for spec in graph.inputs}
    golden = reference(inputs, end, graph.kind)
    exact = golden if dtype == "fp32" else reference(inputs, end, graph.kind, stored=True)
    single = reference(inputs, end, graph.kind, torch.float32, stored=dtype != "fp32")
    tolerances = allowed(exact, single)
    choose = None
    if graph.kind == "head_loss":  # logits are no output of it, but say which predictions are right
        choose = partial(_predictions, exact["logits"], tolerances["logits"])
        golden, exact = ({"losses": each["losses"]} for each in (golden, exact))
    yield GoldenCase(inputs, exact, tolerances, Rounding(dtype, "head", golden, ROUNDING[dtype]), choose)


def _predictions(logits: npt.NDArray[np.generic], tolerance: float, found: Mapping[str, Arrays]) -> Arrays:
    """The tokens that all engines predict. Of two that are as good as equal, the graph's own choice is golden."""
    first = next(iter(found.values()))["predictions"]
    for name, outputs in found.items():
        tokens = outputs["predictions"]
        chosen = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        worse = float((logits.max(axis=1) - chosen).max() / np.abs(logits).max())
        if not worse <= tolerance or not np.array_equal(tokens, first):
            raise ExportError(f"the graph head_loss predicts other tokens on {name} than elsewhere: a bug in dlora")
    return {"predictions": first}


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The three graphs of the head."""
    end, hidden_states = materials.head, materials.hidden_states
    for graph in head_graphs(HeadShape.of(end, materials.head_spec)):
        rows = LOGITS_ROWS if graph.kind == "head_logits" else len(hidden_states)
        yield graph, head_tests(graph, end, materials.head_weights, hidden_states[:rows], materials.head_spec.dtype)
