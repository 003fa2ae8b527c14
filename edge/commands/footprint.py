"""What training with a bundle takes in memory, before anything is trained: an estimate, meant to be a little high.

Calibrated on SmolLM2-135M, docs/experiments.md; ``tests/test_real_model.py`` holds it to what real runs take.
"""

from __future__ import annotations

import math
from typing import Final

from dlora.edge.training.defaults import DEFAULT_KIND
from dlora.protocol.adapters import crossings, kind_of, parameter_count
from dlora.protocol.choices import KindChoice
from dlora.protocol.manifest import Manifest, StoredDtype

from .adapter_settings import default_adapters

RUNTIME_MB: Final = 100  # Python, the engine and its graphs, and one slab of the head
USUAL_TOKENS: Final = 256
STORED_DTYPES: Final[dict[StoredDtype, int]] = {"int8": 1, "fp16": 2, "fp32": 4}  # and bytes a value
_WIRE_BYTES: Final = 2  # fp16
_COPIES: Final = 4  # of a group's tensors and of the last hidden states: wire, frame, and as floats going and coming
_TRAINED_COPIES: Final = 4  # of what is trained: value, gradient and two moments


def training_mb(
    manifest: Manifest,
    tokens: int = USUAL_TOKENS,
    head_dtype: StoredDtype | None = None,
    *,
    kind: KindChoice = DEFAULT_KIND,
) -> float:
    """Peak of a run with the defaults of a kind, all active, in MB of 10**6 bytes, mapped weights included.

    Args:
        tokens: of a micro-batch, all of them labelled.
        head_dtype: of the same base model exported with another head; by default the bundle's own.
    """
    fixed = _fixed_bytes(manifest, head_dtype or manifest.head.dtype, kind)
    return (fixed + tokens * _token_bytes(manifest, kind)) / 1e6


def usual_tokens(manifest: Manifest) -> int:
    """Tokens of the micro-batch that an estimate is told for: no more than the base model takes in a sequence."""
    return min(USUAL_TOKENS, manifest.base_model.max_sequence_length)


def tokens_that_fit(manifest: Manifest, available_mb: float) -> int:
    """The largest micro-batch, in tokens, whose estimate is within ``available_mb``; 0 where none is."""
    left = available_mb * 1e6 - _fixed_bytes(manifest, manifest.head.dtype, DEFAULT_KIND)
    return max(0, int(left // _token_bytes(manifest, DEFAULT_KIND)))


def _fixed_bytes(manifest: Manifest, head_dtype: StoredDtype, kind: KindChoice) -> float:
    base = manifest.base_model
    spec, groups = default_adapters(kind, manifest)
    trained = parameter_count(spec, groups)
    kept = sum(math.prod(shape) for group in groups for shape in kind_of(spec).state_shapes(spec, group))
    # What the server keeps stays as it crosses: fp16 by default. The embedding's pages go before the head's come. Row
    # scales are a word of fp32 each.
    head = base.vocabulary_size * (base.hidden_size * STORED_DTYPES[head_dtype] + 4 * (head_dtype == "int8"))
    return RUNTIME_MB * 1e6 + 4 * trained * _TRAINED_COPIES + _WIRE_BYTES * kept + head


def _token_bytes(manifest: Manifest, kind: KindChoice) -> int:
    """Bytes of memory for each token of a micro-batch."""
    # Until backward a group's input is kept as it came, and z of each of its target modules.
    spec, groups = default_adapters(kind, manifest)
    widths = crossings(spec, groups)
    kept = sum(each.input_width * _WIRE_BYTES + 4 * spec.r * len(each.output_widths) for each in widths)
    widest = max(each.input_width + sum(each.output_widths) for each in widths)
    return kept + 4 * _COPIES * (widest + manifest.base_model.hidden_size)
