"""What training with a bundle takes in memory, before anything is trained: an estimate, meant to be a little high.

Calibrated on SmolLM2-135M, docs/log/experiments.md; ``benchmarks/device.py`` has it beside what real runs take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from dlora.edge.training.choose_adapter import default_adapters
from dlora.edge.training.defaults import DEFAULT_KIND
from dlora.protocol.adapters import AdapterSpec, crossings, kind_of, parameter_count
from dlora.protocol.choices import KindChoice
from dlora.protocol.device_memory import RUNTIME_MB, TRAINED_COPIES, USUAL_TOKENS, head_bytes
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import Manifest, StoredDtype

_WIRE_BYTES: Final = 2  # fp16
_COPIES: Final = 4  # of a group's tensors and of the last hidden states: wire, frame, and as floats going and coming


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
    spec, groups = default_adapters(kind, manifest)
    return split_bytes(manifest, spec, groups, tokens, head_dtype) / 1e6


def split_bytes(
    manifest: Manifest,
    spec: AdapterSpec,
    groups: Sequence[GroupSpec],
    tokens: int,
    head_dtype: StoredDtype | None = None,
    *,
    together: int = 1,
) -> float:
    """Likewise in bytes, of a run in ``split`` with any adapters. ``together``: how many such micro-batches are under
    way at a time; each has gradients of its own."""
    fixed = _fixed_bytes(manifest, head_dtype or manifest.head.dtype, spec, groups)
    gradients = 4 * parameter_count(spec, groups) * (together - 1)
    return fixed + gradients + together * tokens * _token_bytes(manifest, spec, groups)


def usual_tokens(manifest: Manifest) -> int:
    """Tokens of the micro-batch that an estimate is told for: no more than the base model takes in a sequence."""
    return min(USUAL_TOKENS, manifest.base_model.max_sequence_length)


def tokens_that_fit(manifest: Manifest, available_mb: float) -> int:
    """The largest micro-batch, in tokens, whose estimate is within ``available_mb``; 0 where none is."""
    adapters = default_adapters(DEFAULT_KIND, manifest)
    left = available_mb * 1e6 - _fixed_bytes(manifest, manifest.head.dtype, *adapters)
    return max(0, int(left // _token_bytes(manifest, *adapters)))


def _fixed_bytes(manifest: Manifest, head_dtype: StoredDtype, spec: AdapterSpec, groups: Sequence[GroupSpec]) -> float:
    base = manifest.base_model
    trained = parameter_count(spec, groups)
    kept = sum(math.prod(shape) for group in groups for shape in kind_of(spec).state_shapes(spec, group))
    # What the server keeps stays as it crosses, as fp16 at most. The embedding's pages go before the head's come.
    head = head_bytes(base.vocabulary_size, base.hidden_size, head_dtype)
    return RUNTIME_MB * 1e6 + 4 * trained * TRAINED_COPIES + _WIRE_BYTES * kept + head


def _token_bytes(manifest: Manifest, spec: AdapterSpec, groups: Sequence[GroupSpec]) -> int:
    """Bytes of memory for each token of a micro-batch."""
    # Until backward a group's input is kept as it came, and z of each of its target modules.
    widths = crossings(spec, groups)
    kept = sum(each.input_width * _WIRE_BYTES + 4 * spec.r * len(each.output_widths) for each in widths)
    widest = max(each.input_width + sum(each.output_widths) for each in widths)
    return kept + 4 * _COPIES * (widest + manifest.base_model.hidden_size)
