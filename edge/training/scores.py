"""Scores of units, computed on the device: how much a unit's adapters matter now. The cloud ranks by them.

Every score is combined from a unit's adapters as a whole (a norm over all of them, a mean over all their numbers), so
that it does not depend on how the unit is cut into modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dlora.edge.adapters.kind import GroupAdapters
from dlora.protocol.choices import ScoreName


def unit_score(score: ScoreName, groups: Iterable[GroupAdapters]) -> float:
    """Of a unit with these groups, before a step, when its gradients are there; float32 is summed in float64.

    0.0 for ``random`` and ``static``, which need none.

    ==============  ===============================================================================
    ``sensitivity`` mean ``|w·g|`` over all parameters (AdaLoRA, arXiv 2303.10512, without its uncertainty term)
    ``grad``        ``||g||_F`` of what is nearest to the output; of LoRA, B
    ==============  ===============================================================================
    """
    if score == "grad":
        grads = [group.parameters()[name].grad for group in groups for name in group.scored_by_gradient()]
        flat = (grad.astype(np.float64).reshape(-1) for grad in grads if grad is not None)  # one copy at a time
        return math.sqrt(math.fsum(float(each @ each) for each in flat))
    if score == "sensitivity":
        parameters = [each for group in groups for each in group.parameters().values()]
        pairs = [(each.value, each.grad) for each in parameters if each.grad is not None]
        total = math.fsum(float(np.abs(weights * grad).sum(dtype=np.float64)) for weights, grad in pairs)
        return total / max(1, sum(grad.size for _, grad in pairs))
    return 0.0
