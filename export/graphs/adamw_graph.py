"""One AdamW step (Loshchilov & Hutter, arXiv 1711.05101), in the order of operations of ``torch.optim.AdamW``.

The host computes ``decay = 1 - lr * weight_decay``, ``step_size = lr / (1 - beta1**t)`` and
``sqrt_bias_correction2 = sqrt(1 - beta2**t)`` in double and passes them as float32: computed in float32 here
they would drift by 5e-6 over 20 steps.

``1 - beta`` needs more care. From ``float32(0.999)`` it comes out 1.3e-5 wrong, where torch starts from the
double. So the graph takes beta for the decimal of seven digits that its float32 stands for, which is as fine as
float32 is near 1, and gets torch's value bit for bit.
"""

from __future__ import annotations

from dlora.protocol.manifest import TensorSpec

from .graph import TrainingGraph

_COMPLEMENT = """
            wide{n} = Cast <to = 11> (beta{n})
            rest{n} = Sub (one, wide{n})
            shifted{n} = Mul (rest{n}, digits)
            whole{n} = Round (shifted{n})
            decimal{n} = Div (whole{n}, digits)
            complement{n} = Cast <to = 1> (decimal{n})
"""


def adamw_graph() -> TrainingGraph:
    """``adamw``: parameters of any shape, flattened to (n,)."""
    vector = [TensorSpec(name, "fp32", ("n",)) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    scalars = ("decay", "beta1", "beta2", "step_size", "sqrt_bias_correction2", "eps")
    return TrainingGraph(
        "adamw",
        inputs=(*vector, *(TensorSpec(name, "fp32", ()) for name in scalars)),
        outputs=tuple(TensorSpec(f"new_{spec.name}", "fp32", ("n",)) for spec in vector if spec.name != "grad"),
        body=f"""
            one = Constant <value = double {{1.0}}> ()
            digits = Constant <value = double {{10000000.0}}> ()
            {_COMPLEMENT.format(n=1)}
            {_COMPLEMENT.format(n=2)}
            towards = Sub (grad, exp_avg)
            change = Mul (towards, complement1)
            new_exp_avg = Add (exp_avg, change)
            kept = Mul (exp_avg_sq, beta2)
            weighted = Mul (grad, complement2)
            squared = Mul (weighted, grad)
            new_exp_avg_sq = Add (kept, squared)
            root = Sqrt (new_exp_avg_sq)
            corrected = Div (root, sqrt_bias_correction2)
            denominator = Add (corrected, eps)
            scaled = Mul (new_exp_avg, step_size)
            step = Div (scaled, denominator)
            decayed = Mul (param, decay)
            new_param = Sub (decayed, step)
        """,
    )
