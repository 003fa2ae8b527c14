"""The graphs of a LoRA adapter: its forward pass, and its backward pass in two halves.

::

    forward        z  = x A^T               delta  = scale * z B^T
    input_grad     dz = scale * grad B      grad_x = dz A
    weight_grad    grad_A = dz^T x          grad_B = scale * grad^T z

with x (tokens, in), A (rank, in), B (out, rank), z and dz (tokens, rank), delta and grad (tokens, out), and
scale = alpha / rank: LoRA (Hu et al., arXiv 2106.09685, section 4.1), as PEFT computes it. Number of tokens
and rank are dynamic, so one graph serves all adapters of a shape.

The graphs are written for what a rank is: small. Products stand so that the rank is the short side of a wide matrix,
not of a tall one, which matrix kernels are bad at, and ``scale`` goes over something as narrow as the rank, never over
(tokens, out): that alone took more time than the products (docs/experiments.md).
"""

from __future__ import annotations

from dlora.protocol.manifest import TensorSpec, adapter_key

from .graph import TrainingGraph


def adapter_graphs(in_features: int, out_features: int) -> tuple[TrainingGraph, ...]:
    """``adapter_forward``, ``adapter_input_grad`` and ``adapter_weight_grad`` of one shape."""
    key = adapter_key(in_features, out_features)
    x = TensorSpec("x", "fp32", ("tokens", in_features))
    grad = TensorSpec("grad", "fp32", ("tokens", out_features))
    z = TensorSpec("z", "fp32", ("tokens", "rank"))
    dz = TensorSpec("dz", "fp32", ("tokens", "rank"))
    lora_a = TensorSpec("lora_A", "fp32", ("rank", in_features))
    lora_b = TensorSpec("lora_B", "fp32", (out_features, "rank"))
    scale = TensorSpec("scale", "fp32", ())
    forward = TrainingGraph(
        "adapter_forward",
        inputs=(x, lora_a, lora_b, scale),
        outputs=(z, TensorSpec("delta", "fp32", ("tokens", out_features))),
        body="""
            z_by_rank = Gemm <transB = 1> (lora_A, x)
            z = Transpose <perm = [1, 0]> (z_by_rank)
            scaled_z = Mul (z, scale)
            delta = Gemm <transB = 1> (scaled_z, lora_B)
        """,
        key=key,
    )
    input_grad = TrainingGraph(
        "adapter_input_grad",
        inputs=(grad, lora_a, lora_b, scale),
        outputs=(dz, TensorSpec("grad_x", "fp32", ("tokens", in_features))),
        body="""
            gradB = MatMul (grad, lora_B)
            dz = Mul (gradB, scale)
            grad_x = MatMul (dz, lora_A)
        """,
        key=key,
    )
    weight_grad = TrainingGraph(
        "adapter_weight_grad",
        inputs=(x, z, grad, dz, scale),
        outputs=(
            TensorSpec("grad_A", "fp32", ("rank", in_features)),
            TensorSpec("grad_B", "fp32", (out_features, "rank")),
        ),
        body="""
            dz_by_rank = Transpose <perm = [1, 0]> (dz)
            grad_A = MatMul (dz_by_rank, x)
            z_by_rank = Transpose <perm = [1, 0]> (z)
            zgrad = MatMul (z_by_rank, grad)
            scaled_zgrad = Mul (zgrad, scale)
            grad_B = Transpose <perm = [1, 0]> (scaled_zgrad)
        """,
        key=key,
    )
    return forward, input_grad, weight_grad
