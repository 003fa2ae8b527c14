"""The LM head: logits, cross-entropy, and the gradient of the loss by the hidden states.

::

    raw    = h W^T + bias                         (rows, vocabulary)
    logits = cap(logit_scale * raw)               cap(x) = softcap * tanh(x / softcap), or x
    loss   = -log_softmax(logits)[label]          one for each row
    dh     = grad_scale * (dloss/draw) W          dloss/draw = (softmax - onehot) * cap' * logit_scale

A stored weight that is not float32 is never widened whole: a Scan walks over slabs of the vocabulary, and only one
slab at a time is float32. The slabs are cut by position from the graph's input, so the weight is not copied either.
What is left over where the slabs do not divide the vocabulary is a last, short one outside the Scan.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlora.protocol.manifest import StoredDtype, TensorSpec

from .graph import TrainingGraph

SLABS = 48


@dataclass(frozen=True)
class HeadShape:
    """What the graphs depend on, as in ``HeadSpec`` of the manifest."""

    vocabulary_size: int
    hidden_size: int
    dtype: StoredDtype
    bias: bool
    logit_scale: float
    softcap: float | None

    @property
    def slab(self) -> int:
        """Vocabulary rows of a slab."""
        return max(1, self.vocabulary_size // SLABS)

    @property
    def scanned(self) -> int:
        """Vocabulary rows that whole slabs cover."""
        return self.vocabulary_size // self.slab * self.slab


def head_graphs(head: HeadShape) -> tuple[TrainingGraph, ...]:
    """``head_train``, ``head_loss`` and ``head_logits``."""
    weights = [TensorSpec("weight", head.dtype, (head.vocabulary_size, head.hidden_size))]
    if head.dtype == "int8":
        weights.append(TensorSpec("row_scales", "fp32", (head.vocabulary_size,)))
    if head.bias:
        weights.append(TensorSpec("bias", "fp32", (head.vocabulary_size,)))
    hidden = TensorSpec("hidden_states", "fp32", ("rows", head.hidden_size))
    labels = TensorSpec("labels", "int64", ("rows",))
    grad_scale = TensorSpec("grad_scale", "fp32", ())
    losses = TensorSpec("losses", "fp32", ("rows",))
    grad = TensorSpec("grad_hidden_states", "fp32", ("rows", head.hidden_size))
    predictions = TensorSpec("predictions", "int64", ("rows",))
    logits = TensorSpec("logits", "fp32", ("rows", head.vocabulary_size))
    train = TrainingGraph(
        "head_train",
        inputs=(*weights, hidden, labels, grad_scale),
        outputs=(losses, grad),
        body=_constants(head) + _logits(head) + _LOSS + _gradient(head),
    )
    loss = TrainingGraph(
        "head_loss",
        inputs=(*weights, hidden, labels),
        outputs=(losses, predictions),
        body=_constants(head) + _logits(head) + _LOSS + "predictions = ArgMax <axis = 1, keepdims = 0> (logits)",
    )
    just_logits = TrainingGraph(
        "head_logits", inputs=(*weights, hidden), outputs=(logits,), body=_constants(head) + _logits(head)
    )
    return train, loss, just_logits


def _constants(head: HeadShape) -> str:
    starts = ", ".join(str(start) for start in range(0, head.scanned, head.slab))
    return f"""
        axis_0 = Constant <value = int64[1] {{0}}> ()
        axis_1 = Constant <value = int64[1] {{1}}> ()
        starts = Constant <value = int64[{head.scanned // head.slab}, 1] {{{starts}}}> ()
        slab = Constant <value = int64[1] {{{head.slab}}}> ()
        scanned = Constant <value = int64[1] {{{head.scanned}}}> ()
        vocabulary = Constant <value = int64[1] {{{head.vocabulary_size}}}> ()
        scanned_shape = Constant <value = int64[2] {{-1, {head.scanned}}}> ()
        logit_scale = Constant <value = float {{{head.logit_scale!r}}}> ()
        softcap = Constant <value = float {{{head.softcap or 1.0!r}}}> ()
        one = Constant <value = float {{1.0}}> ()
    """


def _logits(head: HeadShape) -> str:
    """From ``hidden_states`` to ``logits``; ``tanh`` is left behind where there is a cap."""
    lines, value = _product(head), "product"
    if head.dtype == "int8":
        lines += f"unquantised = Mul ({value}, row_scales)\n"
        value = "unquantised"
    if head.bias:
        lines += f"biased = Add ({value}, bias)\n"
        value = "biased"
    if head.logit_scale != 1.0:
        lines += f"scaled = Mul ({value}, logit_scale)\n"
        value = "scaled"
    if head.softcap is not None:
        lines += f"shrunk = Div ({value}, softcap)\ntanh = Tanh (shrunk)\ncapped = Mul (tanh, softcap)\n"
        value = "capped"
    return lines + f"logits = Identity ({value})\n"


def _product(head: HeadShape) -> str:
    """``product = hidden_states weight^T``, (rows, vocabulary)."""
    if head.dtype == "fp32":
        return "product = Gemm <transB = 1> (hidden_states, weight)\n"
    lines = f"""
        stacked = Scan <num_scan_inputs = 1, body = logits_of_slab
            (int64[1] first) => (float[rows, {head.slab}] part) {{
            last = Add (first, slab)
            stored = Slice (weight, first, last, axis_0)
            wide = Cast <to = 1> (stored)
            part = Gemm <transB = 1> (hidden_states, wide)
        }}> (starts)
        by_row = Transpose <perm = [1, 0, 2]> (stacked)
    """
    if head.scanned == head.vocabulary_size:
        return lines + "product = Reshape (by_row, scanned_shape)\n"
    return (
        lines
        + """
        most = Reshape (by_row, scanned_shape)
        stored_tail = Slice (weight, scanned, vocabulary, axis_0)
        wide_tail = Cast <to = 1> (stored_tail)
        tail = Gemm <transB = 1> (hidden_states, wide_tail)
        product = Concat <axis = 1> (most, tail)
    """
    )


_LOSS = """
        log_p = LogSoftmax <axis = 1> (logits)
        columns = Unsqueeze (labels, axis_1)
        log_p_label = GatherElements <axis = 1> (log_p, columns)
        log_likelihood = Squeeze (log_p_label, axis_1)
        losses = Neg (log_likelihood)
"""


def _gradient(head: HeadShape) -> str:
    """From ``log_p`` to ``grad_hidden_states``."""
    lines, value = (
        """
        p = Exp (log_p)
        p_label = Exp (log_p_label)
        p_label_off = Sub (p_label, one)
        d_logits = ScatterElements <axis = 1> (p, columns, p_label_off)
    """,
        "d_logits",
    )
    if head.softcap is not None:
        lines += f"""
        tanh_squared = Mul (tanh, tanh)
        cap_slope = Sub (one, tanh_squared)
        d_capped = Mul ({value}, cap_slope)
    """
        value = "d_capped"
    if head.logit_scale != 1.0:
        lines += f"d_scaled = Mul ({value}, logit_scale)\n"
        value = "d_scaled"
    if head.dtype == "int8":
        lines += f"d_unquantised = Mul ({value}, row_scales)\n"
        value = "d_unquantised"
    return lines + _product_grad(head, value) + "grad_hidden_states = Mul (d_hidden, grad_scale)\n"


def _product_grad(head: HeadShape, value: str) -> str:
    """``d_hidden = value weight``, (rows, hidden_size)."""
    if head.dtype == "fp32":
        return f"d_hidden = Gemm ({value}, weight)\n"
    size = head.hidden_size
    whole = head.scanned == head.vocabulary_size
    lines = f"""
        hidden_shape = Shape (hidden_states)
        zeros = ConstantOfShape (hidden_shape)
        {"d_hidden" if whole else "d_most"} = Scan <num_scan_inputs = 1, body = grad_of_slab
            (float[rows, {size}] sum, int64[1] first_back) => (float[rows, {size}] next_sum) {{
            last_back = Add (first_back, slab)
            stored_back = Slice (weight, first_back, last_back, axis_0)
            wide_back = Cast <to = 1> (stored_back)
            d_part = Slice ({value}, first_back, last_back, axis_1)
            next_sum = Gemm (d_part, wide_back, sum)
        }}> (zeros, starts)
    """
    if whole:
        return lines
    return (
        lines
        + f"""
        d_tail = Slice ({value}, scanned, vocabulary, axis_1)
        d_hidden = Gemm (d_tail, wide_tail, d_most)
    """
    )
